"""Every recipe that comes with the project trains, at reduced width, and no key of it is unused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain import recipe
from pretrain.train import train
from tests.conftest import SMALL, TINY


@pytest.mark.parametrize("name", recipe.names())
def test_recipe_trains_two_steps(name: str, shards: Path, tmp_path: Path):
    small = SMALL.get(recipe.load(name).objective.name, [])
    micro = ["parallel.micro_batch=8"] if recipe.load(name).parallel.micro_batch else []
    cfg = recipe.load(
        name,
        [
            *TINY,
            *small,
            *micro,
            f"data.train={shards}",
            "data.batch=16",
            "data.workers=0",
            "steps=2",
            f"run={tmp_path / 'run'}",
        ],
    )
    run = train(cfg)
    assert (run / "export" / "2" / "model.safetensors").is_file()
    again = recipe.load(run)  # what was stored is whole: it loads, and resolves to itself
    assert recipe.config.to_dict(again) == recipe.config.to_dict(cfg)
