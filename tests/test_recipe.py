"""Recipes and config: what loads, what is refused, and whether the message names the file, the key, the value and the nearest names."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import config, recipe
from pretrain.config import ConfigError
from pretrain.recipe import load
from pretrain.schedules import Schedule


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(
        "# a base\nsteps: 100\nmodel: vit_small\nobjective: {name: mae, mask_ratio: 0.6}\noptim: {lr: 1e-3}\n"
    )
    return path


def refused(match: str, *args) -> str:
    with pytest.raises(ConfigError, match=match) as error:
        load(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_recipe_loads_and_has_a_purpose():
    assert "demo" in recipe.names()
    for name, purpose in recipe.names().items():
        assert len(purpose) > 20, name
        assert load(name).run == f"runs/{name}"


def test_a_recipe_extends_another_and_overrides_come_last(base: Path):
    child = base.with_name("child.yaml")
    child.write_text("# a child\nextends: base.yaml\nsteps: 50\noptim: {lr: {kind: cosine}}\n")
    cfg = load(child, ["steps=7", "objective.decoder_depth=2"])
    assert (cfg.steps, cfg.objective.mask_ratio, cfg.objective.decoder_depth) == (7, 0.6, 2)
    assert (cfg.optim.lr.kind, cfg.optim.lr.value, cfg.optim.lr.steps) == (
        "cosine",
        1e-3,
        7,
    )  # the scalar of the base took its long form


def test_another_name_drops_the_options_of_the_old_one(base: Path):
    assert not hasattr(load(base, ["objective=simclr"]).objective, "mask_ratio")
    assert load(base, ["objective.name=mae"]).objective.mask_ratio == 0.6


def test_the_resolved_recipe_is_the_same_recipe(base: Path, tmp_path: Path):
    first = load(base, ["optim.lr={kind: wsd, value: 2e-4, warmup: 0.1}", "data.train=[a, b]"])
    stored = tmp_path / "stored.yaml"
    stored.write_text(config.dump(first))
    assert config.to_dict(load(stored)) == config.to_dict(first)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "objective.mask_ration=0.5",
            "command line: objective.mask_ration = 0.5: no such key; did you mean mask_ratio",
        ),
        ("stepss=5", "stepss = 5: no such key; did you mean steps"),
        ("steps=many", "command line: steps = 'many': expected a whole number"),
        ("steps=true", "steps = True: expected a whole number"),
        ("steps=0", "steps = 0: must be 1 or more"),
        (
            "optim.lr.kind=cosin",
            "optim.lr.kind = 'cosin': expected one of constant, linear, cosine, wsd; did you mean cosine",
        ),
        ("optim.lr=[1]", r"optim.lr.value = \[1\]: expected a number"),
        ("optim=3", "optim.name = 3: expected one of adamw, muon"),
        ("eval=3", "eval = 3: expected a mapping with gallery, val"),
        ("data.train=[a, 1]", r"data.train\[1\] = 1: expected text"),
        ("model=vit_smal", "model.name = 'vit_smal': no such model; did you mean vit_small"),
        ("objective=simlcr", "objective.name = 'simlcr': no such objective; did you mean simclr"),
        ("objective=my_method.py", "no such file"),
        ("precision=fp8", "precision = 'fp8': expected one of auto, fp32, bf16"),
        ("export.every=0", "export.every = 0: must be 1 or more"),
        ("steps", "'steps' is no override; write key=value"),
        ("model.dim=[", "not valid YAML"),
    ],
)
def test_bad_override(base: Path, override: str, says: str):
    refused(says, base, [override])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps: 1\nsteps: 2\n", "the key 'steps' is given twice"),
        ("- 1\n", "holds list, but a recipe is a mapping"),
        ("steps: 10\nobjective: mae\n", "model"),
        ("model: vit\nobjective: mae\n", "steps is missing; write steps: a whole number"),
        ("extends: bad.yaml\n", "extends itself"),
        ("extends: nowhere\n", "nowhere: no such recipe"),
        (
            "steps: 10\nmodel: vit\nobjective: {name: mae, mask: 1}\n",
            "bad.yaml: objective.mask = 1: no such key; did you mean mask_ratio",
        ),
    ],
)
def test_bad_file(tmp_path: Path, text: str, says: str):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert str(path) in refused(says, path)


def test_bad_recipe_names(tmp_path: Path):
    refused("dem: no such recipe; did you mean demo", "dem")
    refused("no such file", "dem.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    refused("not a text file", tmp_path / "x.yaml")


def test_unread_names_keys_that_nothing_read(base: Path):
    cfg = load(base, ["model.rope_base=50", "optim.clip=3"])
    assert cfg.optim.clip == 3
    keys = dict(config.unread(cfg))
    assert keys["model.rope_base"] == 50 and "optim.clip" not in keys
    assert cfg.model.replace(depth=2).rope_base == 50  # reading a changed copy counts
    assert "model.rope_base" not in dict(config.unread(cfg))


def test_an_objective_in_a_file_of_the_users_own(tmp_path: Path, base: Path):
    path = tmp_path / "mine.py"
    path.write_text(
        '"""Mine."""\nimport torch\nfrom dataclasses import dataclass\nfrom pretrain.config import Section\n'
        "@dataclass\nclass Config(Section):\n    width: int = 3\n"
    )
    assert load(base, [f"objective={path}", "objective.width=4"]).objective.width == 4
    path.write_text("def broken(:\n")
    refused("line 1", base, [f"objective={path}"])
    path.write_text("x = 1\n")
    refused("has no `@dataclass class Config", base, [f"objective={path}"])


def test_loading_imports_no_torch():
    code = "import sys; from pretrain.recipe import load; load('demo', ['objective=dinov2']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_schedules():
    assert Schedule(3.0)(10**9) == 3.0
    cosine = Schedule(2.0, kind="cosine", start=0.5, final=1.0, warmup=10, steps=111)
    assert [cosine(0), cosine(5), cosine(10), cosine(110), cosine(500)] == pytest.approx([0.5, 1.25, 2.0, 1.0, 1.0])
    assert cosine(35) == pytest.approx(1.0 + 1.0 * (1 + math.cos(math.pi * 0.25)) / 2)
    wsd = Schedule(1.0, kind="wsd", warmup=0.1, decay=0.2, steps=100)
    assert [wsd(5), wsd(10), wsd(80), wsd(99)] == pytest.approx([0.5, 1.0, 1.0, 0.0])
    assert Schedule(1.0, kind="linear", steps=5)(2) == pytest.approx(0.5)
    warm = Schedule(0.07, start=0.04, warmup=0.3, steps=100)
    assert [warm(0), warm(15), warm(30), warm(99)] == pytest.approx([0.04, 0.055, 0.07, 0.07])
