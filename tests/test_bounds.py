"""Values of options that make no sense are refused in one line before anything runs, instead of a traceback of a
data worker or a loss that is NaN."""

from __future__ import annotations

from pathlib import Path

import pytest

from common import config
from common.errors import ConfigError
from pretrain.build import build_objective
from pretrain.recipes import defaults, parallel_checks, recipe
from pretrain.train import train
from tests.conftest import tiny_recipe


@pytest.mark.parametrize("name", recipe.names())
def test_recipes_are_within(name: str):
    recipe.load(name)


@pytest.mark.parametrize(
    "option, message",
    [
        ("objective.blur=[0.5]", r"objective.blur = \[0.5\]: write 3 numbers, for the first"),
        ("objective.blur=[0.5, 2, 0.1]", r"objective.blur\[1\] = 2.0: must be from 0 to 1"),
        ("objective.mask_share=1.5", "objective.mask_share = 1.5: must be from 0 to 1"),
        ("objective.mask_ratio_min=0.6", "mask_ratio_min = 0.6: must be at most objective.mask_ratio_max = 0.5"),
        ("objective.local_scale=0.5", "local_scale = 0.5: must be at most objective.global_scale = 0.32"),
        ("objective.global_scale=0", "objective.global_scale = 0.0: must be above 0 and at most 1"),
        ("objective.local_crops=-1", "objective.local_crops = -1: must be 0 or more"),
        ("objective.gram_size=0", "objective.gram_size = 0: must be 1 or more"),
        ("objective.gram_every=0", "objective.gram_every = 0: must be 1 or more"),
        ("objective.prototypes=0", "objective.prototypes = 0: must be 1 or more"),
        ("objective.ibot_prototypes=0", "objective.ibot_prototypes = 0: must be 1 or more"),
        ("objective.koleo_group=1", "objective.koleo_group = 1: must be 2 or more, or null"),
        ("objective.student_temperature=0", "objective.student_temperature = 0.0: must be above 0"),
        ("objective.teacher_temperature=0", "objective.teacher_temperature.value = 0.0: must be above 0"),
        (
            "objective.teacher_temperature={kind: cosine, value: 0.07, final: 0.0}",
            "objective.teacher_temperature.final = 0.0: must be above 0",
        ),
        ("objective.momentum=1.5", "objective.momentum.value = 1.5: must be from 0 to 1"),
        ("model.patch_size=0", "model.patch_size = 0: must be from 1 to 2"),
        ("model.registers=-1", "model.registers = -1: must be 0 or more"),
        ("optim.clip=0", "optim.clip = 0.0: must be above 0, or null"),
        ("optim.freeze_backbone=-1", "optim.freeze_backbone = -1: must be 0 or more"),
    ],
)
def test_refused_as_it_is_read(option: str, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        tiny_recipe("dinov3", tmp_path, tmp_path / "run", option)


@pytest.mark.parametrize(
    "name, option, message",
    [
        ("gpt", "objective.z_loss=-1e-4", "objective.z_loss = -0.0001: must be 0 or more"),
        ("gpt", "model.vocab_size=0", "model.vocab_size = 0: must be from 1 to 2"),
        ("gpt", "model.context=0", "model.context = 0: must be from 1 to 2"),
        ("gpt", "model.kv_heads=-1", "model.kv_heads = -1: must be from 1 to 2"),
        ("gpt", "model.head_dim=0", "model.head_dim = 0: must be from 1 to 2"),
        ("bert", "model.segments=0", "model.segments = 0: must be from 1 to 2"),
        ("bert", "model.mlp_width=0", "model.mlp_width = 0: must be from 1 to 2"),
        ("t5", "model.decoder_depth=-1", "model.decoder_depth = -1: must be from 1 to 1000, or null"),
        ("t5", "model.buckets=2", "model.buckets = 2: must be 4 or more"),
        ("t5", "model.max_distance=16", "model.max_distance = 16: must be above half of model.buckets = 32"),
    ],
)
def test_of_text_refused_before_a_step(name: str, option: str, message: str, shards: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        train(tiny_recipe(name, shards, tmp_path / "run", option))


@pytest.mark.parametrize(
    "option, message",
    [
        ("objective.local_size=20", r"crops of \[32, 20, 64\] pixels do not divide into patches of 8"),
        ("objective.resolutions=[[32, 16, 64]]", "must be .global, local, Gram pixels"),
        ("objective.resolutions=[[32, 0, 64, 1]]", r"crops of \[32, 0, 64\] pixels do not divide"),
        ("objective.koleo_group=3", "objective.koleo_group = 3: does not divide data.batch = 16"),
        ("objective.koleo_neighbours=4", "koleo_neighbours = 4: must be less than objective.koleo_group = 4"),
    ],
)
def test_refused_before_the_first_step(option: str, message: str, shards: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        train(tiny_recipe("dinov3", shards, tmp_path / "run", option))


def test_a_contrastive_loss_needs_others(tmp_path: Path):
    for options, says in [
        (["data.batch=1"], "data.batch = 1: simclr compares samples with others of their batch; write 2 or more"),
        (["parallel.micro_batch=1", "parallel.accumulate_coupled=true"], "parallel.micro_batch = 1: simclr compares"),
    ]:
        with pytest.raises(ConfigError, match=says):
            build_objective(tiny_recipe("simclr", tmp_path / "shards", tmp_path / "run", *options))


def test_groups_of_koleo_divide_what_a_forward_sees(tmp_path: Path):
    """The micro-batches of all processes, and the batch of every phase."""
    options = ["objective.koleo_group=8", "data.batch=32"]
    micro = [*options, "parallel.micro_batch=4", "parallel.mode=ddp"]
    parallel_checks.check(tiny_recipe("dinov3", tmp_path, tmp_path / "run", *micro), 2)
    with pytest.raises(ConfigError, match="does not divide micro-batches of 4 on 1 processes"):
        parallel_checks.check(tiny_recipe("dinov3", tmp_path, tmp_path / "run", *micro), 1)
    with pytest.raises(ConfigError, match=r"does not divide data\.batch = 12"):
        parallel_checks.check(
            tiny_recipe("dinov3", tmp_path, tmp_path / "run", *options, "data.phases=[{step: 4, batch: 12}]"), 1
        )


def test_neighbours_of_koleo_are_fewer_than_what_a_forward_sees(tmp_path: Path):
    options = ["objective.koleo_group=null", "data.batch=16", "objective.koleo_neighbours=8"]
    parallel_checks.check(tiny_recipe("dinov3", tmp_path, tmp_path / "run", *options), 1)
    micro = [*options, "parallel.micro_batch=4", "parallel.mode=ddp"]
    with pytest.raises(ConfigError, match=r"koleo_neighbours = 8: .* images of micro-batches of 4 on 2 processes"):
        parallel_checks.check(tiny_recipe("dinov3", tmp_path, tmp_path / "run", *micro), 2)
    with pytest.raises(ConfigError, match=r"koleo_neighbours = 8: .* images of data\.batch = 8"):
        parallel_checks.check(tiny_recipe("dinov3", tmp_path, tmp_path / "run", *options, "data.batch=8"), 1)


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("mae", "objective.mask_ratio=1", "objective.mask_ratio = 1.0: must be above 0 and below 1"),
        ("mae", "objective.decoder_depth=0", "objective.decoder_depth = 0: must be 1 or more"),
        ("bert", "objective.masked=0.95", r"objective.masked = 0.95, objective.random = 0.1: .* at most 1"),
        ("t5", "objective.share=1", "objective.share = 1.0: must be above 0 and below 1"),
        ("t5", "objective.span=0.5", "objective.span = 0.5: must be 1 or more"),
        (
            "ijepa",
            "objective.target_scale=[0.2, 0.15]",
            r"objective.target_scale = \[0.2, 0.15\]: write two numbers, the",
        ),
        (
            "ijepa",
            "objective.context_scale=[0.8]",
            r"objective.context_scale = \[0.8\]: write two numbers, the smaller one",
        ),
        ("mae", "optim.layer_decay=0", "optim.layer_decay = 0.0: must be above 0 and at most 1"),
        ("mae", "optim.lr={value: 1.0, warmup: -1}", "optim.lr.warmup = -1.0: must be 0 or more"),
    ],
)
def test_limits_of_every_method(name: str, option: str, message: str):
    model = {"bert": "bert_micro", "t5": "t5_micro"}.get(name, "vit_micro")
    with pytest.raises(ConfigError, match=f"command line: {message}"):
        recipe.load("demo", [f"objective={name}", f"model={model}", option])


def test_a_file_of_the_users_own_has_limits_and_rules(tmp_path: Path):
    """Limits, a check of two options, and a rule for `auto` in the file are used without importing torch."""
    path = tmp_path / "mine.py"
    path.write_text(
        '"""Mine."""\nimport torch\nfrom dataclasses import dataclass\nfrom typing import Literal\n'
        "from common.config import Facts, option\nfrom pretrain.objectives.options import Options\n\nLEAST = 2\n\n"
        "@torch.no_grad()\ndef heavy():\n    pass\n\n"
        'def per_batch(facts: Facts) -> int:\n    """One for each sample of a batch."""\n    return max(LEAST, facts.batch)\n\n'
        "@dataclass\nclass Config(Options):\n    momentum: float = 3.0\n    share: float = option(0.1, low=0, high=1)\n"
        '    count: int | Literal["auto"] = option("auto", low=LEAST, auto=per_batch)\n\n'
        '    def check(self):\n        if self.share > self.momentum:\n            raise ValueError("objective.share = too much")\n'
    )
    own = [f"objective={path}", "data.train=x"]
    loaded = recipe.load("demo", own)
    assert vars(loaded.objective)["momentum"] == 3.0 and "objective.share" not in dict(config.unread(loaded))
    for option, says in [
        ("objective.share=1.5", "objective.share = 1.5: must be from 0 to 1"),
        ("objective.count=1", "objective.count = 1: must be 2 or more"),
        ("objective.momentum=0", "command line: objective.share = too much"),
    ]:
        with pytest.raises(ConfigError, match=says):
            recipe.load("demo", [*own, option])
    loaded = recipe.load("demo", [*own, "objective.momentum=2", "data.batch=8"])
    assert "objective.momentum" in dict(config.unread(loaded))  # a check is no use of an option
    lines = defaults.settle(loaded)
    assert "objective.count = 8 (auto: One for each sample of a batch)" in lines and loaded.objective.count == 8
    path.write_text(path.read_text().replace("low=LEAST", "low=torch.pi"))
    with pytest.raises(ConfigError, match="Config uses torch; it is read before torch is imported"):
        recipe.load("demo", own)
