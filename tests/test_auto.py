"""Values that replace `auto`, that they are logged and stored, and that a collapse is reported."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from common import config
from common.config import Facts
from common.errors import ConfigError
from common.schedules import warmup
from pretrain import collapse_monitor
from pretrain.build import build_objective
from pretrain.models import families
from pretrain.objectives import moco, options
from pretrain.recipes import defaults, recipe, size_dial
from pretrain.train import train
from tests.conftest import tiny_recipe, tokens, unlabeled

ALL = [
    "objective.prototypes=auto",
    "objective.momentum=auto",
    "objective.teacher_temperature=auto",
    "model.drop_path=auto",
    "optim.lr={kind: cosine, value: 1.0e-3, warmup: auto}",
]


def facts(steps: int = 1, batch: int = 1, samples: int = 1, dim: int = 1) -> Facts:
    return Facts(steps, batch, samples, {"dim": dim})


def test_rules_meet_the_published_recipes():
    imagenet, lvd = 1_281_167, 1_689_000_000
    asked = [(imagenet, 2048), (lvd, 4096), (50_000, 256), (1_000, 64), (10, 8), (lvd, 64)]
    counts = [options.prototypes(facts(samples=n, batch=b)) for n, b in asked]
    assert counts == [65536, 262144, 2048, 256, 256, 4096]
    asked = [(125_000, 1024), (125_000, 2048), (1_000_000, 8), (1000, 64), (100, 8)]
    momenta = [options.momentum(facts(steps, batch)) for steps, batch in asked]
    assert [m.value for m in momenta] == pytest.approx([0.996, 0.992, 1 - 1e-4, 0.98, 0.8])
    assert [m.final for m in momenta] == pytest.approx([0.99984, 0.99984, 1 - 1e-4, 0.98, 0.8])
    assert {m.kind for m in momenta} == {"cosine"} and momenta[0].steps == 125_000
    assert warmup(facts(125_000, 1024, imagenet)) == 12500 and warmup(facts(125_000, 2048, imagenet)) == 6256
    assert warmup(facts(5, 8, 10)) == 1
    warm = options.temperature(facts(125_000, 2048, imagenet))
    assert (warm.value, warm.start, warm.warmup) == (0.07, 0.04, 18767.0)
    short = options.temperature(facts(1000, 64, 5000))
    assert (short.value, short.warmup) == (0.05, 300)
    biases = [options.log_share_of_partners(facts(batch=batch)) for batch in (32768, 128, 1)]
    assert biases == pytest.approx([-10.0, math.log(1 / 128), 0.0])

    assert options.sinkhorn_temperature(facts(125_000, 2048, imagenet)) == warm
    assert options.sinkhorn_temperature(facts(1000, 64, 5000))(999) == 0.025
    assert [options.small_data(facts(samples=n)) for n in (99_999, 100_000)] == [True, False]
    asked = [(10**6, 256, imagenet), (500, 128, 100_000), (240, 128, 4320), (100_000, 4096, lvd), (10, 64, 20)]
    assert [moco.negatives(facts(*f)) for f in asked] == [64_000, 768, 256, 65_536, 128]
    asked = [(125_000, 2048, imagenet, 1024), (10**6, 4096, lvd, 4096), (1000, 64, 2000, 384), (10**6, 64, 2000, 192)]
    assert [families.drop_path(facts(*one)) for one in asked] == [0.3, 0.0, 0.05, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dinov2", "dinov3"])
def test_values_are_said_stored_and_kept(shards: Path, tmp_path: Path, objective: str):
    small = [o for o in ALL if objective == "dinov3" or "prototypes" not in o]
    overrides = [*small, "data.batch=8", "steps=4", "checkpoint=2"]
    run = train(tiny_recipe(objective, shards, tmp_path / "run", *overrides))
    said = (run / "log.txt").read_text()
    for key in (
        "objective.momentum = 0.5 → 0.5",
        "objective.teacher_temperature = 0.025 (auto",
        "model.drop_path = 0.0",
        "optim.lr.warmup = 1.0",
    ):
        assert key in said, said
    stored = recipe.load(run)
    assert vars(stored.objective)["momentum"].value == pytest.approx(0.5)
    still_auto = re.findall(r"(\w+): auto\b", (run / "recipe.yaml").read_text())
    assert set(still_auto) <= {"device", "start_method", "attention"}  # what each machine decides for itself
    again = tiny_recipe(objective, shards, tmp_path / "run", *overrides)
    assert train(again) == run and "objective.momentum" not in (run / "log.txt").read_text().removeprefix(said)


@pytest.mark.slow
def test_a_stage_has_the_prototypes_of_the_run_that_it_starts_from(shards: Path, tmp_path: Path):
    first = train(
        tiny_recipe(
            "dinov3", shards, tmp_path / "first", "objective.gram_size=512", "objective.gram_teacher=none", "steps=1"
        )
    )
    options = ["objective.prototypes=auto", f"init.run={first}", "steps=1"]
    second = train(tiny_recipe("dinov3", shards, tmp_path / "second", *options))
    assert vars(recipe.load(second).objective)["prototypes"] == 64
    said = (second / "log.txt").read_text()
    assert (
        "objective.prototypes = 64 (auto: The value of the same option in the run that this one starts from (`init.run`))"
        in said
    )


@pytest.mark.parametrize(
    ("objective", "values"),
    [
        ("dino", {"head_norms": True, "centering": "sinkhorn", "prototypes": 512}),
        ("swav", {"last_norm": True, "prototypes": 64}),
    ],
)
def test_a_stage_on_more_data_has_the_tensors_of_the_run_that_it_starts_from(objective: str, values: dict):
    cfg = recipe.load(f"{objective}_cpu", ["init.run=runs/first"])
    defaults.settle(cfg, 10**6, lambda run: {"objective": {"name": objective, **values}})
    assert {key: vars(cfg.objective)[key] for key in values} == values
    alone = recipe.load(f"{objective}_cpu")
    defaults.settle(alone, 10**6)
    assert not any(vars(alone.objective)[key] == value for key, value in values.items())


def test_a_value_of_auto_keeps_the_limits_of_its_option():
    cfg = recipe.load("finetune_cpu", ["objective.pool=cls"])
    with pytest.raises(
        ConfigError, match=r"objective.classes = 1 \(auto: the number of classes that the shards name\): must be 2"
    ):
        defaults.settle(cfg, 1000, classes=1)
    assert defaults.settle(cfg, 1000, classes=2) and cfg.objective.classes == 2


def test_the_gram_teacher_sees_twice_the_image(tmp_path: Path):
    gram = ["objective=dinov3", "objective.prototypes=64", "model=vit_small", "objective.gram_teacher=ema"]
    cfg = recipe.load("demo", [*gram, "model.image_size=96"])
    (line,) = defaults.settle(cfg, 1000)
    assert cfg.objective.gram_size == 192 and line.startswith("objective.gram_size = 192 (auto: Twice the image size")
    none = recipe.load("demo", [*gram[:-1]])
    assert defaults.settle(none, 1000) == [] and none.objective.gram_size == "auto"
    before = dict(config.unread(recipe.load("demo", [*gram[:-1], "objective.gram_size=512"])))
    assert "objective.gram_size" not in before  # the former default, which stored recipes hold


@pytest.mark.slow
def test_accumulation_in_small_batches(shards: Path, tmp_path: Path):
    """One process, batch 8 in micro-batches of 4."""
    run = train(
        tiny_recipe(
            "dinov3",
            shards,
            tmp_path / "run",
            *ALL,
            "data.batch=8",
            "parallel.micro_batch=4",
            "parallel.accumulate_coupled=true",
            "objective.koleo_group=2",
            "steps=3",
        )
    )
    assert (run / "export" / "3").is_dir()


def test_one_sample(shards: Path, tmp_path: Path):
    """A batch of 1: KoLeo has no neighbours and is 0, all other terms are computed."""
    run = train(
        tiny_recipe("dinov3", shards, tmp_path / "run", "data.batch=1", "objective.koleo_group=null", "steps=2")
    )
    assert (run / "export" / "2").is_dir()


# ---------------------------------------------------------------- collapse
def rows(**series: list[float]) -> list[dict]:
    return [
        {"step": i, **{k.replace("__", "/"): v[i] for k, v in series.items()}}
        for i in range(len(next(iter(series.values()))))
    ]


def said_of(prototypes: int | None = 64, warmup: int = 0, **series: list[float]) -> list[str]:
    said: list[str] = []
    watch = collapse_monitor.CollapseMonitor(prototypes, said.append, warmup=warmup)
    for row in rows(**series):
        watch.read([row])
    return said


def test_collapse_is_named_once():
    falling = [0.5 * 0.8**i for i in range(80)]
    (line,) = said_of(feature_std=falling)
    assert line.startswith("step 30: collapse: the class tokens of all images") and "0.5 at the start" in line
    (line,) = said_of(rank=[9.0] * 5 + [1.1] * 40)
    assert line.startswith("step 24:")
    (line,) = said_of(vit__teacher_entropy=[math.log(64)] * 400)  # at the beginning, it is so
    assert line.startswith("step 319:") and "vit/teacher_entropy = 4.16" in line and "ln K = 4.16" in line
    (line,) = said_of(teacher_entropy=[math.log(64)] * 600, warmup=500)  # the network has hardly moved before
    assert line.startswith("step 519:")


def test_a_run_that_goes_on_remembers_how_it_began(tmp_path: Path):
    """A collapse before a restart is still a collapse; its values do not count as those at the start of the run."""
    path = tmp_path / "metrics.jsonl"
    for text, count in [
        ('{"step": 0, "feature_std": 0.5, "rank": 9.0, "loss": 3.0}\n{"step"', 1),
        ('{"st', 0),
        ("[1]", 0),
        ("[" * 100_000, 0),
        ('{"step": "0", "feature_std": 0.5}', 0),
        ("", 0),
    ]:
        path.write_text(text)
        said: list[str] = []
        watch = collapse_monitor.CollapseMonitor(64, said.append, path)
        watch.read([{"step": 100 + i, "feature_std": 0.01} for i in range(30)])
        assert len(said) == count and all("0.5 at the start" in line for line in said)
    assert collapse_monitor.CollapseMonitor(64, said.append, tmp_path / "nothing").first == {}


def test_the_verdict_on_a_whole_run():
    falling = [0.5 * 0.8**i for i in range(80)]
    assert collapse_monitor.verdict(rows(feature_std=falling, rank=[9.0] * 80), 64, 0) == (
        "collapsed at step 30 (feature_std), and was still collapsed at the end; its exports are of little use"
    )
    back = collapse_monitor.verdict(rows(feature_std=falling, rank=[9.0] * 5 + [1.1] * 20 + [9.0] * 55), None, 0)
    assert back == (
        "collapsed at step 24 (rank, feature_std), and was still collapsed at the end; of these, rank recovered; its"
        " exports are of little use"
    )
    low, high = [1.1] * 20, [9.0] * 55
    assert collapse_monitor.verdict(rows(rank=[9.0, *low, *high]), None, 0) == (
        "collapsed at step 20 (rank), and recovered; compare the scores of its exports with those of step 0"
    )
    # a narrow network begins with a low rank, of which half is left
    assert collapse_monitor.verdict(rows(rank=[1.68] + [1.35] * 40), None, 0) == ""
    assert "collapsed" in collapse_monitor.verdict(rows(rank=[1.68] + [1.1] * 40), None, 0)
    assert collapse_monitor.verdict([*rows(feature_std=[0.5] * 40), {"step": 41, "rank": None}], None, 0) == ""


@pytest.mark.slow
def test_a_run_that_collapsed_says_so_when_it_ends(shards: Path, tmp_path: Path):
    cfg = tiny_recipe("mae", shards, tmp_path, "steps=4", "checkpoint=2")
    train(cfg)
    assert "collapsed at" not in (tmp_path / "log.txt").read_text()
    shutil.rmtree(tmp_path / "checkpoints" / "000000004")
    (tmp_path / "checkpoints" / "latest").unlink()
    seen = [{"step": 1, "loss": 1.0, "feature_std": 0.01 if n else 0.5} for n in range(30)]  # before the restart
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in seen))
    train(tiny_recipe("mae", shards, tmp_path, "steps=4", "checkpoint=2"))
    last = (tmp_path / "log.txt").read_text().splitlines()[-1]
    assert (
        "collapsed at step 1 (feature_std), and was still collapsed at the end; its exports are of little use" in last
    )


def test_what_is_no_collapse():
    assert said_of(feature_std=[0.5] * 80, rank=[5.0, 1.2] * 40, teacher_entropy=[3.9, 4.16] * 40) == []
    assert said_of(feature_std=[0.5, *[0.01] * 19, 0.5, *[0.01] * 19]) == []
    assert said_of(rank=[1.0] * 60) == []  # a batch of two has no more
    assert said_of(feature_std=[0.5, *[float("nan")] * 60]) == []
    assert said_of(None, teacher_entropy=[4.16] * 60) == []
    # beside the thresholds: a tenth of the first spread, a rank of 1.5, 0.995 of ln K from step 300 on
    assert said_of(feature_std=[0.5] + [0.051] * 40) == [] and len(said_of(feature_std=[0.5] + [0.049] * 40)) == 1
    assert said_of(rank=[9.0] + [1.51] * 40) == [] and len(said_of(rank=[9.0] + [1.49] * 40)) == 1
    few, most = [0.994 * math.log(64)] * 400, [0.996 * math.log(64)] * 400
    assert said_of(teacher_entropy=few) == [] and len(said_of(teacher_entropy=most)) == 1
    assert said_of(teacher_entropy=most[:300]) == []


@pytest.mark.slow
def test_a_run_that_collapses_says_so(shards: Path, tmp_path: Path):
    """DINOv2 with a student that is trained to make all class tokens equal."""
    options = ["objective.koleo_weight=-30.0", "objective.momentum=0.5", "optim.lr=3e-3", "steps=150", "log=10"]
    run = train(tiny_recipe("dinov2", shards, tmp_path / "run", *options))
    assert "collapse: the class tokens of all images are becoming alike" in (run / "log.txt").read_text()


# ---------------------------------------------------------------- the size dial
def test_the_dial_counts_the_weights_of_the_model():
    """Every matrix of the model except the embedding."""
    for overrides in ([], ["model.mlp=swiglu"], ["model.kv_heads=1", "model.dim=96", "model.heads=3"]):
        cfg = recipe.load(
            "gpt_dial", ["data.train=x", "model.depth=2", "model.vocab_size=640", "model.context=64", *overrides]
        )
        body = build_objective(cfg).encoder()
        matrices = sum(p.numel() for name, p in body.named_parameters() if p.ndim == 2 and "embed" not in name)
        assert size_dial.weights(cfg.model) == matrices


def test_the_dial_follows_its_laws():
    """One number determines width, heads, batch, steps and learning rate; larger models get more tokens, larger
    batches and lower rates."""
    found = {}
    for depth in (4, 8, 12, 20, 26):
        cfg = recipe.load("gpt_dial", ["data.train=x", f"model.depth={depth}"])
        n = size_dial.weights(cfg.model)
        compute = 6 * n * 12 * n
        tokens = cfg.data.batch * 2048
        assert math.log2(cfg.data.batch).is_integer() and 0.7 < tokens / (0.2920 * compute**0.3271) < 1.42
        assert cfg.steps * tokens == pytest.approx(12 * n, rel=0.01)
        assert cfg.optim.lr.value == pytest.approx(0.3118 * compute**-0.125, rel=0.01)
        assert cfg.optim.lr.steps == cfg.steps
        found[depth] = (cfg.data.batch, cfg.steps, cfg.optim.lr.value)
    batches, steps, rates = zip(*found.values(), strict=True)
    assert (
        list(batches) == sorted(batches) and list(steps) == sorted(steps) and list(rates) == sorted(rates, reverse=True)
    )


@pytest.mark.slow
def test_the_dial_is_said_and_stored(shards: Path, tmp_path: Path):
    """The command prints the values and stores them; values that the user gives are not changed."""
    overrides = ["model.depth=1", "model.vocab_size=512", "model.context=32", f"data.train={tokens(shards.parent)}"]
    overrides += ["data.workers=0", "steps=3", "device=cpu", "precision=fp32", "threads=1", f"run={tmp_path / 'run'}"]
    done = unlabeled("train", "gpt_dial", *overrides)
    assert done.returncode == 0, done.stderr
    assert "data.batch = 64 (auto: 2,048 tokens in rows of 32" in done.stdout and "optim.lr.value = " in done.stdout
    assert "steps = " not in done.stdout.partition("gpt on")[0]
    stored = recipe.load(tmp_path / "run")
    assert (stored.data.batch, stored.steps) == (64, 3) and not stored.derived
    assert unlabeled("train", "gpt_dial", *overrides).returncode == 0  # the same run: nothing to do


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps=auto"], r"steps = auto: is derived for decoders \(model=gpt\), not for model.name = "),
        (["optim.weight_decay=auto"], "of all schedules only optim.lr can be derived"),
    ],
)
def test_the_dial_is_for_decoders(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        recipe.load("demo", overrides)
