"""Recipes and configs: which are accepted, which are refused, and whether the message names the file, the key, the
value and the nearest names."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from common import config, yaml_values
from common.errors import ConfigError
from common.schedules import Schedule
from pretrain.recipes import recipe
from pretrain.recipes.recipe import load


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


def test_keys_that_a_later_choice_does_not_know_fall_away(base: Path):
    """Keys in the same layer are kept, and training then reports them as keys that nothing reads."""
    child = base.with_name("child.yaml")
    child.write_text(
        "extends: base.yaml\nobjective: {name: dinov3, momentum: {kind: cosine, value: 0.99, final: 1.0}, gram_teacher: ema, gram_size: 64}\n"
        "optim: {name: muon, momentum: 0.9, lr: {kind: wsd, value: 2e-3, final: 1e-5, decay: 0.3, start: 1e-4, warmup: 5}}\n"
        "parallel: {mode: fsdp2, replicate: 2}\n"
    )
    cosine = load(child, ["optim.lr.kind=cosine"]).optim.lr
    assert (cosine.kind, cosine.final, cosine.decay, cosine.start) == ("cosine", 1e-5, 0.2, 1e-4)
    changes = [
        "optim.lr.kind=constant",
        "optim.lr.warmup=0",
        "objective.gram_teacher=none",
        "objective.momentum.kind=constant",
    ]
    cfg = load(child, [*changes, "optim.name=adamw", "parallel.mode=ddp"])
    assert {cfg.optim.lr(0), cfg.optim.lr(99)} == {2e-3} and cfg.objective.momentum(50) == 0.99
    assert (cfg.optim.momentum, cfg.parallel.replicate, cfg.objective.gram_size) == (0.95, 1, "auto")
    left = dict(config.unread(cfg))
    assert not [key for key in left if key.startswith(("optim.lr", "objective.gram", "objective.momentum"))]
    assert load(child, ["parallel.mode=fsdp2"]).parallel.replicate == 2
    lars = load("gpt2_124m", ["optim.name=lars"]).optim  # the recipe sets a beta2, which LARS has not
    assert (lars.beta2, lars.momentum, lars.trust) == (0.999, 0.95, 0.001)
    assert load(child, ["optim.name=lars"]).optim.momentum == 0.9  # which both have
    same = load(child, ["optim.lr.final=1e-4", "optim.lr.kind=constant"])
    same.optim.lr(0)
    assert dict(config.unread(same))["optim.lr.final"] == 1e-4
    stored = base.with_name("stored.yaml")
    stored.write_text(config.dump(load(child)))  # as a run keeps it
    assert load(stored, ["optim.lr.kind=constant"]).optim.lr.final == 0.0
    refused(
        "command line: objective.momentum.value is missing",
        base,
        ["objective=dinov3", "objective.momentum.kind=cosine"],
    )


def test_schedules_follow_the_new_length_of_a_stored_run(base: Path, tmp_path: Path):
    stored = tmp_path / "run" / "recipe.yaml"
    stored.parent.mkdir()
    stored.write_text(
        config.dump(load(base, ["optim.lr={kind: cosine, value: 1e-3}", "optim.weight_decay={value: 0.1, steps: 40}"]))
    )
    cfg = load(stored.parent, ["steps=200"])
    assert (cfg.optim.lr.steps, cfg.optim.weight_decay.steps) == (200, 40)
    assert load(stored.parent, ["steps=200", "optim.lr.steps=100"]).optim.lr.steps == 100


def test_a_batch_that_fits_is_one_answer():
    """The overrides that an error suggests are accepted."""
    from pretrain.recipes import parallel_checks

    said = [
        (parallel_checks.fitting_batch(load(name, overrides), processes, samples), name, overrides, processes)
        for name, overrides, processes, samples in [
            ("mae_vits16", [], 1, 37),
            ("mae_vits16", ["parallel.mode=ddp"], 4, 1030),
            ("dinov3_vits16_demo", ["objective.koleo_group=8"], 1, 37),
            ("dinov3_vits16_demo", ["objective.koleo_group=8"], 1, 5),
        ]
    ]
    assert [words for words, *_ in said] == [
        "data.batch=37",
        "data.batch=1024",
        "data.batch=32",
        "data.batch=5 objective.koleo_group=null",
    ]
    for words, name, overrides, processes in said:
        parallel_checks.check(load(name, [*overrides, *words.split()]), processes)


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
        ("optim=3", "optim.name = 3: expected one of adamw, lars, muon, sgd"),
        ("optim=lasr", "optim.name = 'lasr': expected one of adamw, lars, muon, sgd; did you mean lars"),
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
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "recipe.yaml").write_text("steps: 1\nmodel: vit_small\nobjective: mae\n")
    refused(
        f"{tmp_path}/runs/fist: no such run folder or file; did you mean {tmp_path}/runs/first", f"{tmp_path}/runs/fist"
    )
    refused("runs: is no run folder: it holds no recipe.yaml", tmp_path / "runs")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    refused("not a text file", tmp_path / "x.yaml")


def test_unread_names_keys_that_nothing_read(base: Path):
    cfg = load(base, ["model.rope_base=50", "optim.clip=3"])
    assert cfg.optim.clip == 3
    keys = dict(config.unread(cfg))
    assert keys["model.rope_base"] == 50 and "optim.clip" not in keys
    assert cfg.model.replace(depth=2).rope_base == 50  # reading a changed copy counts
    assert "model.rope_base" not in dict(config.unread(cfg))


def test_a_settled_copy_is_read_without_a_trace():
    """Reads in `forward` compile to one graph and change nothing; reads of the recipe are recorded."""
    import torch

    recorded = load(
        "demo", ["objective=dinov3", "objective.local_weight={kind: linear, value: 1.0, steps: 9}"]
    ).objective
    settled = recorded.settled()
    before = dict(vars(settled.local_weight)), dict(vars(settled))

    def forward(x: torch.Tensor, cfg: config.Section) -> torch.Tensor:
        return x * cfg.koleo_weight + cfg.local_weight(3)  # type: ignore[attr-defined]

    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2), settled), forward(torch.ones(2), recorded))
    assert (vars(settled.local_weight), vars(settled)) == before and "_read" not in before[1]
    assert {"koleo_weight", "local_weight"} <= vars(recorded)["_read"]
    assert isinstance(settled, type(recorded)) and config.config_class(settled) is config.config_class(
        recorded
    ) is type(recorded)


def test_fields_count_as_read_where_they_have_an_effect():
    gram = ["objective=dinov3", "objective.gram_every=7", "objective.local_weight={value: 2.0, final: 1.0}"]
    for overrides, left in [
        (gram, {"objective.gram_every", "objective.local_weight.final"}),
        ([*gram, "objective.gram_teacher=ema", "objective.local_weight.kind=linear"], set()),
    ]:
        cfg = load("demo", overrides)
        config.count_as_read(cfg.objective, config.fields(type(cfg.objective)))
        assert {key for key, _ in config.unread(cfg) if key.startswith("objective.")} == left


def test_an_objective_in_a_file_of_the_users_own(tmp_path: Path, base: Path):
    path = tmp_path / "mine.py"
    path.write_text(
        '"""Mine."""\nimport torch\nfrom dataclasses import dataclass\nfrom pretrain.objectives.options import Options\n'
        "@dataclass\nclass Config(Options):\n    width: int = 3\n"
    )
    assert load(base, [f"objective={path}", "objective.width=4"]).objective.width == 4
    path.write_text("def broken(:\n")
    refused("line 1", base, [f"objective={path}"])
    path.write_text("x = 1\n")
    refused("has no `@dataclass class Config", base, [f"objective={path}"])


def test_loading_imports_no_torch():
    code = "import sys; from pretrain.recipes.recipe import load; load('demo', ['objective=dinov2']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_schedules():
    assert Schedule(3.0)(10**9) == 3.0
    cosine = Schedule(2.0, kind="cosine", start=0.5, final=1.0, warmup=10, steps=111)
    assert [cosine(0), cosine(5), cosine(10), cosine(110), cosine(500)] == pytest.approx([0.5, 1.25, 2.0, 1.0, 1.0])
    assert cosine(35) == pytest.approx(1.0 + 1.0 * (1 + math.cos(math.pi * 0.25)) / 2)
    wsd = Schedule(1.0, kind="wsd", warmup=0.1, decay=0.2, steps=100)
    assert [wsd(5), wsd(10), wsd(80), wsd(99)] == pytest.approx([0.5, 1.0, 1.0, 0.0])
    for kind in ("linear", "cosine", "wsd"):
        usual, open_ = (Schedule(2.0, kind=kind, warmup=4, decay=0.5, steps=20, open=wide) for wide in (False, True))
        assert usual(0) == usual(19) == 0 and open_(0) == pytest.approx(2 / 5) and 0 < open_(19) < open_(18) < 2
        assert usual(4) == open_(4) == 2
    assert Schedule(1.0, kind="linear", steps=4, open=True)(3) == pytest.approx(0.25)
    assert Schedule(1.0, kind="linear", steps=5)(2) == pytest.approx(0.5)
    warm = Schedule(0.07, start=0.04, warmup=0.3, steps=100)
    assert [warm(0), warm(15), warm(30), warm(99)] == pytest.approx([0.04, 0.055, 0.07, 0.07])


# ---------------------------------------------------------------- hostile YAML, folders and numbers
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("x: " + "[" * 5000, "nested too deeply"),
        ("x: " + "{a: " * 5000, "nested too deeply"),
        ("1: 2", "the key 1 is no name"),
        ("null: 1", "the key null is no name"),
        ("? [a]\n: b", "the key a list or a mapping is no name"),
        ("data: {? {a: 1} : 2}", "the key a list or a mapping is no name"),
        ("seed: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("seed: 2001-99-99", "not valid YAML"),
        (f"seed: {'9' * 5000}", "not valid YAML"),
        ("seed: &a [*a]", "unconstructable recursive node"),
        (
            "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)),
            "more than 100000 values",
        ),
        ("seed: \0", "not valid YAML"),
        ('extends: "\\ud800"', "an unpaired surrogate"),
        ('run: "\\udfff"', "an unpaired surrogate"),
        ('data: {train: ["a\\ud800"]}', "an unpaired surrogate"),
        ('"\\ud800": 1', "an unpaired surrogate"),
        ("extends: " + "a/" * 3000, "a path of more than 3800 bytes; no file has one"),
    ],
)
def test_hostile_yaml_is_one_line(base: Path, line: str, says: str):
    base.write_text(f"{base.read_text()}{line}\n")
    refused(says, base)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.workers=-3", "data.workers = -3: must be 0 or more"),
        ("data.threads=0", "data.threads = 0: must be 1 or more"),
        ("data.decode_mb=0", "data.decode_mb = 0.0: must be above 0"),
        ("data.max_pixels=0", "data.max_pixels = 0: must be from 1 to 2^30"),
        (f"data.max_pixels={1 << 31}", "must be from 1 to 2^30"),
        ("data.fetch.requests=0", "data.fetch.requests = 0: must be 1 or more"),
        ("data.fetch.retry_seconds=.nan", "data.fetch.retry_seconds = nan: must be 0 or more"),
        ("parallel.micro_batch=0", "parallel.micro_batch = 0: must be 1 or more"),
        ("parallel.timeout=-1", "parallel.timeout = -1.0: must be above 0"),
        ("threads=0", "threads = 0: must be 1 or more"),
        ("model.depth=100000", "model.depth = 100000: must be from 1 to 1000"),
        (f"seed={1 << 64}", "must fit into 64 bits"),
        ("run=s3://bucket/x", "a run folder lies on a disk; write run=FOLDER, and checkpoint.folder=s3://bucket/x"),
        (f"run=runs/{'x' * 300}", "is 305 bytes long, with a part of 300; no folder has such a name"),
        (f"run={'x/' * 2500}", "is 5000 bytes long"),
        ('run="a\\0b"', "no folder has such a name"),
        (f"init.run={'x/' * 2500}", "init.run = 'x/x/"),
        (f"init.backbone=a/{'x' * 300}", "is 302 bytes long, with a part of 300; no folder has such a name"),
        (f"data.train=[a, {'x/' * 2500}]", "data.train = 'x/x/"),
        (f"checkpoint.resume={'x/' * 2500}", "is 5000 bytes long, with a part of 1; no folder has such a name"),
    ],
)
def test_numbers_and_folders_that_cannot_be(base: Path, override: str, says: str):
    assert says in refused("", base, [override])


def test_long_texts_that_are_no_paths_are_kept(base: Path):
    """Prompts, URLs, and lists of shards in braces, each of which is short."""
    braces = f"shards/{{{','.join(f'{n:06d}' for n in range(100))}}}.tar"
    url = f"s3://bucket/{'x' * 300}/"
    got = load(base, [f"data.train=['{braces}', {url}]", f"eval.prompts=[{'x' * 5000}]"])
    assert got.data.train == [braces, url] and got.eval.prompts == ["x" * 5000]


def test_a_run_folder_below_home(base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load(base, ["run=~/x"]).run == "/home/somebody/x"


def test_every_path_of_a_recipe_may_lie_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A shell does not expand ~ in `data.train=~/x` or in a list; a prompt that begins with ~ is not a path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text(
        "extends: mae_vits16\neval:\n  gallery: [~/g, s3://b/~/g]\n  prompts: [~/is home]\n"
    )
    paths = ["data.train=~/a", "eval.val=[~/v, ~/w]", "checkpoint.folder=~/c", "checkpoint.resume=~/r/checkpoints/3"]
    recipe = load("~/base.yaml", [*paths, "data.fetch.cache=~/cache", "init.backbone=~/b", "eval.test=~/t"])
    values = dict(yaml_values.leaves(config.to_dict(recipe)))
    expected = {
        **{"data.train[0]": "a", "eval.gallery[0]": "g", "eval.val[0]": "v", "eval.val[1]": "w", "eval.test[0]": "t"},
        **{"checkpoint.folder": "c", "checkpoint.resume": "r/checkpoints/3", "data.fetch.cache": "cache"},
        "init.backbone": "b",
    }
    assert {key: values[key] for key in expected} == {key: f"{tmp_path}/{name}" for key, name in expected.items()}
    assert recipe.eval.gallery[1] == "s3://b/~/g" and recipe.eval.prompts == ["~/is home"]
    (tmp_path / "more.yaml").write_text("extends: ~/base.yaml\ndata:\n  mix: [{shards: ~/m}]\ninit:\n  run: ~/old\n")
    more = load(tmp_path / "more.yaml")
    assert more.data.mix[0].shards == [f"{tmp_path}/m"] and more.init.run == f"{tmp_path}/old"
    assert refused(
        "data.train = ~no_such_user/x: no home folder is known for ~no_such_user; write the whole path",
        tmp_path / "base.yaml",
        ["data.train=~no_such_user/x"],
    )


def test_a_recipe_of_a_name_that_no_file_has():
    refused("a name of more than 255 bytes", "x" * 300)
