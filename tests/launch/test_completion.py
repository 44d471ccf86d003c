"""Completion in a real bash: the words that the tab key offers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.completion import script
from tests.forked import ROOT

ASK = """
set -e
source "$SCRIPT"
COMP_LINE="$1"; COMP_POINT=${#COMP_LINE}; COMP_TYPE=9; COMP_KEY=9
_python_argcomplete "$COMMAND"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def offered(line: str, folder: Path) -> list[str]:
    """The words that bash offers after a line. For a word with "=", only the part after it, because bash splits
    words at "="."""
    command = folder / "unlabeled"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m launch.cli "$@"\n')
    command.chmod(0o755)
    (folder / "script").write_text(script())
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SCRIPT": str(folder / "script"), "COMMAND": str(command)}
    done = subprocess.run(
        ["bash", "-c", ASK, "bash", line], capture_output=True, text=True, env=env, cwd=folder, check=True
    )
    return [word.strip() for word in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("line", "among"),
    [
        ("unlabeled ", {"train", "shards", "recipes", "completion"}),
        ("unlabeled shards pre", {"preview"}),
        ("unlabeled completion ", {"bash", "zsh"}),
        ("unlabeled train mae", {"mae_vits16"}),
        ("unlabeled recipes show dinov3_", {"dinov3_vits16_demo", "dinov3_vitl16_im1k"}),
        ("unlabeled train mae_vits16 objective.mask", {"objective.mask_ratio="}),
        ("unlabeled train mae_vits16 objective=simclr objective.temp", {"objective.temperature="}),
        ("unlabeled train mae_vits16 --processes 2 optim.lr", {"optim.lr=", "optim.lr.value=", "optim.lr.warmup="}),
        ("unlabeled train mae_vits16 parallel.mode=fs", {"fsdp2"}),
        ("unlabeled plan dinov2_vits16 model=vit_l", {"vit_large"}),
        ("unlabeled train demo optim=", {"adamw", "muon"}),
        ("unlabeled train demo parallel.compile=", {"true", "false"}),
        ("unlabeled train demo data.train=my", {"my photos/"}),
        ("unlabeled train mine", {"mine.yaml"}),
    ],
)
def test_bash_offers(line: str, among: set[str], tmp_path: Path):
    (tmp_path / "my photos").mkdir()
    (tmp_path / "mine.yaml").write_text("extends: demo\n")
    found = offered(line, tmp_path)
    assert among <= {word.replace("\\", "") for word in found}, found


def test_a_line_that_cannot_be_read_offers_the_keys_that_all_recipes_have(tmp_path: Path):
    assert "steps=" in offered("unlabeled train no_such_recipe objective=nonsense st", tmp_path)
