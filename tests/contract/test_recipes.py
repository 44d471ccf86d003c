"""Every recipe of the project trains at reduced width, without an unused key, and can be planned at its full width."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from common import config
from pretrain.contract import TEXT
from pretrain.estimate import plan
from pretrain.recipes import recipe
from pretrain.train import train
from tests.conftest import TINY, data_of, sampled, teacher_run, tiny, tiny_recipe

HEADS = ["objective.prototypes=64", "objective.head_hidden=64", "objective.head_bottleneck=32"]
IBOT = ["objective.ibot_prototypes=32", "objective.ibot_hidden=48", "objective.ibot_bottleneck=16"]
CROPS = ["objective.local_size=16", "objective.local_crops=2"]
RUN_SIZES = ["model.positions=rope", "model.local_cls_norm=true", "model.rope_rescale=2.0", *HEADS, *IBOT, *CROPS]


def stage(shards: Path, name: str, *options: str) -> Path:
    """A run that a recipe of a later stage starts from."""
    run = shards.parent / f"stage_{name}"
    if not run.is_dir():
        train(tiny_recipe("dinov3", shards, run, *RUN_SIZES, "objective.koleo_group=null", "steps=1", *options))
    return run


def reduced(name: str, shards: Path) -> list[str]:
    """Options that make a recipe small and, for later stages, name a small run to start from."""
    if name == "dinov3_vits16_demo":
        return [*HEADS[1:], *CROPS]
    if name == "dinov3_vitl16_im1k":
        return [*HEADS, *CROPS, "objective.koleo_group=8"]
    if name == "dinov3_vit7b16_pretrain":
        return [*RUN_SIZES]
    if name == "dinov3_vit7b16_gram":
        run = stage(shards, "pretrain", "objective.gram_teacher=none", "objective.gram_size=512")
        return [
            *RUN_SIZES,
            f"init.run={run}",
            f"objective.gram_teacher={run / 'export' / '1'}",
            "objective.gram_size=64",
        ]
    if name == "dinov3_vit7b16_highres":
        sizes = "objective.resolutions=[[32, 16, 48, 0.5], [48, 16, 64, 0.5]]"
        return [*RUN_SIZES, f"init.run={stage(shards, 'gram')}", sizes, "objective.local_size=96"]
    if name == "dinov3_distill_multi":
        return [
            f"objective.teacher={teacher_run(shards)}",
            "objective.students=[convnext_micro]",
            "objective.local_size=32",
        ]
    group = ["objective.koleo_group=8"] if name == "dinov2_vitl14" else []
    given = recipe.load(name).objective
    own = tiny(given.name, shards)
    return [*(o for o in own if o.startswith("data.") or (o.startswith("objective.") and is_used(o, given))), *group]


def is_used(override: str, section: config.Section) -> bool:
    """Whether the option of an override has an effect with the other options of the section."""
    field = config.fields(type(section)).get(override.partition("=")[0].removeprefix("objective."))
    chooser, allowed, excluded = field.metadata.get("only", ("", (), None)) if field else ("", (), None)
    return not chooser or config.has_effect(getattr(section, chooser), allowed, excluded)


def small(name: str, shards: Path) -> list[str]:
    """Overrides with which a recipe trains in seconds on a CPU, but for its data, its run folder and its steps."""
    given = recipe.load(name)
    own = [*TINY, *reduced(name, shards)]
    if given.model.reads == "audio":
        own = [option for option in tiny(given.objective.name, shards) if not option.startswith("model=")]
        own += ["parallel.mode=single"]
    if given.model.reads == "tokens":
        own = [*TEXT, "threads=1", "precision=fp32", "parallel.mode=single"]
        own += ["parallel.recompute=none", "parallel.compile=false", "eval.val=[]", "eval.test=[]"]
        own += ["model.kv_heads=1"] * hasattr(type(given.model), "kv_heads") + ["model.mlp_width=64", "data.length=32"]
    if given.model.reads == "clip":
        own = [*tiny(given.objective.name, shards)[1:], "parallel.mode=single", "parallel.recompute=none"]
        own += ["model.image_size=32", "model.patch_size=8", "eval.val=[]", "eval.test=[]", "data.fps=8"]
    own += ["parallel.micro_batch=8"] if given.parallel.micro_batch else []
    return [*own, "data.batch=16", "data.workers=0"]


# One recipe for each kind of data and network, and every stage of DINOv3; `make test-matrix` trains the others.
IN_CI = (
    *("demo", "byol_resnet50", "dinov2_vitl14", "finetune_cpu"),
    *("dinov3_vits16_demo", "dinov3_vitl16_im1k", "dinov3_vit7b16_gram"),
    *("dinov3_vit7b16_highres", "dinov3_distill_multi"),
    *("gpt_dial", "llama_8b", "bert_base", "t5_base", "siglip_vitb16", "vjepa2_vitl16", "bestrq_cpu"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(recipe.names(), *IN_CI))
def test_recipe_trains_two_steps(name: str, shards: Path, tmp_path: Path):
    data = [*data_of(recipe.load(name).objective.name, shards), "steps=2", f"run={tmp_path / 'run'}"]
    cfg = recipe.load(name, [*small(name, shards), *data])
    run = train(cfg)
    assert (run / "export" / "2" / "model.safetensors").is_file()
    again = recipe.load(run)  # what was stored is whole: it loads, and resolves to itself
    assert recipe.config.to_dict(again) == recipe.config.to_dict(cfg)


PAPERS = [name for name in recipe.names() if name.startswith("dino") and not name.endswith("_cpu")]


@pytest.mark.parametrize("name", PAPERS)
def test_header_tells_the_batch_and_who_ran_it(name: str):
    text = (recipe.FOLDER / f"{name}.yaml").read_text()
    assert f"# Batch, hardware, time, score: {recipe.load(name).data.batch:,}; " in text
    assert "ot run by us" in text.partition("steps:")[0]


@pytest.mark.parametrize("name", [name for name in recipe.names() if name.endswith("_cpu")])
def test_a_short_run_replaces_the_initial_weights_of_its_teacher(name: str):
    """The teacher is exported. In 500 steps with V-JEPA 2's momentum, 69 % of its initial weights would remain."""
    cfg = recipe.load(name)
    momentum = getattr(cfg.objective, "momentum", "auto")
    if momentum != "auto":  # otherwise from the number of steps
        assert math.prod(momentum(step) for step in range(cfg.steps)) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(recipe.names(), "demo", "dinov2_vits16", "gpt2_124m"))
def test_recipe_is_planned(name: str, shards: Path):
    """At full width, without weights or data. Only a teacher or a tokenizer has to exist, because its options determine
    the heads."""
    small = [f"objective.teacher={teacher_run(shards)}"] if "distill" in name else []
    small += ["objective.koleo_group=16"] if getattr(recipe.load(name).objective, "koleo_group", None) else []
    small += reduced(name, shards) if "beit" in name or "finetune" in name else []
    batch = 2 if recipe.load(name).model.reads == "tokens" else 32
    cfg = recipe.load(name, [f"data.train={shards}", f"data.batch={batch}", "parallel.micro_batch=null", *small])
    traced = plan.trace(cfg)
    assert traced.trained > 1e4 and traced.flops > 1e9 and traced.peak > 1e6
    if name == "dinov3_vit7b16_gram":
        assert traced.trained / 1e9 == pytest.approx(6.716 + 0.29, rel=0.05) and traced.frozen > 1.9 * traced.trained
    if name == "dinov3_distill_multi":  # its eight students, as published, and their heads
        bodies = 21.6 + 85.7 + 303.2 + 840.6 + 27.8 + 49.5 + 87.6 + 196.2
        assert traced.trained / 1e6 == pytest.approx(bodies, rel=0.01)
    sizes = {
        "gpt2_124m": 124.4,
        "llama_1b": 1235.8,
        "llama_8b": 8030.3,
        "bert_base": 109.5,
        "t5_base": 222.9,
    }  # millions, as published
    assert traced.trained / 1e6 == pytest.approx(sizes.get(name, traced.trained / 1e6), rel=0.005)
