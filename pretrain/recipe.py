"""Recipe: one YAML that names everything a run needs. `load("demo", ["steps=100"])` checks it whole and imports no torch.

A recipe may extend another (`extends: NAME or FILE`); dotted overrides come last. The resolved recipe, every default written out, is stored in
the run folder and reruns the run exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pretrain import bounds, config, dial, objective
from pretrain.config import ConfigError, Origin, Section
from pretrain.errors import nearest
from pretrain.models import presets
from pretrain.schedules import Schedule

FOLDER = Path(__file__).parent / "recipes"
CHOSEN = {"model", "objective"}  # sections whose options depend on their name


if TYPE_CHECKING:
    Derived = int
else:
    Derived = int | Literal["auto"]  # `resolve` puts a number in its place before anything computes with it


@dataclass
class Source(Section):
    """One of several datasets that are mixed."""

    shorthand = "shards"
    shards: list[str]
    weight: float | None = None  # of its samples in mixed steps, relative to the others; null: as many as it has
    homogeneous: float = 0.0  # share of the steps that are filled from it alone (DINOv3: 0.1 of ImageNet)


@dataclass
class Phase(Section):
    """From a step on, another batch or other weights; null: as before. Each dataset goes on where it was."""

    step: int
    batch: int | None = None
    weights: list[float] | None = None  # one for each dataset of data.mix
    homogeneous: list[float] | None = None


@dataclass
class Fetch(Section):
    """How bytes come from a store. No number of the training depends on these."""

    shorthand = "cache"
    cache: str | None = (
        None  # a folder on a local disk that keeps what was fetched, for the next epoch and the next start
    )
    cache_gb: float = 100.0
    ahead_mb: float = 512.0  # fetched before it is needed, beside what is held for shuffling
    requests: int = 16  # in flight at a time
    attempt_seconds: float = 30.0  # for one request
    retry_seconds: float = 600.0  # without any answer before the run ends
    stall_seconds: float = 300.0  # without a batch before the stacks of all processes are written to stderr


@dataclass
class Data(Section):
    """What is read. `batch` is the global batch: samples per step over all processes."""

    shorthand = "train"
    train: list[str] = field(
        default_factory=list
    )  # folders, tars or globs of WebDataset shards, local or any fsspec URL, read as one dataset
    mix: list[Source] = field(default_factory=list)  # instead of `train`: several datasets and their weights
    batch: Derived = 256  # auto, for decoders: see pretrain/dial.py
    phases: list[Phase] = field(default_factory=list)  # changes of batch or weights; may be added while a run goes on
    shuffle: bool = True
    workers: int | None = None  # data processes per trainer process; null: from the machine's cores
    threads: int = 1  # of each data process
    color: Literal["exact", "fused", "device"] = "exact"  # how colours are changed: data_pipeline/views.py
    bad_share: float = 1e-4  # of the samples may be damaged, and 10 in any case, before the run ends
    bad_shard_share: float = 0.01  # the same for one shard
    fetch: Fetch = field(default_factory=Fetch)
    length: int | None = None  # text: tokens of a row, T; null: model.context
    packing: Literal["split", "best_fit"] = (
        "split"  # text: rows cut from the concatenation, or documents laid whole into rows where they fit
    )
    document_mask: bool = True  # text: tokens see and predict their own document only
    mean: list[float] = field(
        default_factory=lambda: [0.485, 0.456, 0.406]
    )  # of the training pixels, in [0, 1], one for each of model.in_channels; ImageNet's
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])


@dataclass
class Optim(Section):
    """AdamW (arXiv 1711.05101), or Muon for the matrices inside of blocks and AdamW for the rest. Weight decay falls on matrices only: not on biases,
    norms, scales, tokens and position tables."""

    shorthand = "name"
    name: Literal["adamw", "muon"] = "adamw"
    lr: Schedule = field(default_factory=lambda: Schedule(1e-3))
    weight_decay: Schedule = field(default_factory=lambda: Schedule(0.05))
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.95  # of Muon
    clip: float | None = None  # of the global gradient norm; null: none
    layer_decay: float = 1.0  # block i of the backbone's n learns at the rate × this^(n − i)
    patch_embed_lr: float = 1.0  # factor of the patch embedding's rate, on top
    freeze_last_layer: int = 0  # steps for which a head's prototypes do not learn
    freeze_backbone: int = 0  # steps for which only the heads learn: for a backbone that comes with weights


@dataclass
class Init(Section):
    """What a new run starts from, where that is not random. A run that goes on from its own checkpoint does not read it."""

    shorthand = "backbone"
    backbone: str = ""  # weights of the backbone alone: an export, a transformers or timm folder, an official DINOv2 or DINOv3 file; heads begin anew
    run: str = ""  # weights of everything (teacher, heads): a run, or RUN/checkpoints/STEP, or a URL; the optimizer begins anew


@dataclass
class Parallel(Section):
    """How the run is spread over processes."""

    shorthand = "mode"
    mode: Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "single"
    replicate: int = 1  # fsdp2: so many groups of processes, each with all pieces among its own (HSDP)
    frozen: Literal["sharded", "replicated"] = (
        "sharded"  # fsdp2: whether each process has all of a frozen teacher that never moves
    )
    recompute: Literal["none", "selective", "full"] = (
        "none"  # activations of transformer blocks, in backward; selective: not of matrix products
    )
    compile: bool = False  # torch.compile of each block
    offload: bool = False  # fsdp2: parameters, gradients and optimizer in main memory; zero: the optimizer
    timeout: float = 300.0  # seconds that a process waits for another, after the first step; before it half an hour
    micro_batch: int | None = None  # samples per process in one forward; null: all at once, no accumulation
    accumulate_coupled: bool = False  # let an objective whose loss couples the batch see only a micro-batch of it


@dataclass
class Checkpoint(Section):
    """When, where and how a run is saved, and what it goes on from. No number of the training depends on these."""

    shorthand = "every"
    every: int = 1000  # steps
    keep: int = 2  # the newest so many stay
    keep_every: int | None = None  # and those of every so many steps
    mode: Literal["sync", "async"] = "sync"  # async: written beside the training, from a copy in main memory
    folder: str = ""  # local or any fsspec URL (s3://…), one that all processes share; empty: RUN/checkpoints
    resume: int | str = (
        "latest"  # or none (from the start), or a step of this folder, or the path or URL of a checkpoint
    )
    on_error: Literal["stop", "continue"] = "stop"  # when one cannot be written for `retry_seconds`
    retry_seconds: float = 60.0


@dataclass
class Skip(Section):
    """A step whose loss or gradient is not finite on any process changes nothing: not weights, optimizer, teacher, nor buffers."""

    shorthand = "most"
    most: int = 10  # such steps in a row; one more ends the run with a report
    sigma: float | None = (
        None  # skip also where the loss is so many standard deviations above the last 128; null: never
    )


@dataclass
class Export(Section):
    shorthand = "every"
    every: int = 1000  # steps; the first (untrained) and the last are always written


@dataclass
class Log(Section):
    shorthand = "every"
    every: int = 10  # steps between two writes (each one waits for the device); every step has its row all the same
    flops: bool = True  # model FLOP/s and MFU, for which a step is traced at the start


@dataclass
class Eval(Section):
    """What is scored: labelled shards, and protocols by name. `val` is looked at while the run goes on, `test` once at its end."""

    gallery: list[str] = field(
        default_factory=list
    )  # labelled shards that heads and neighbours learn from while it runs
    val: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    test_gallery: list[str] = field(default_factory=list)  # the same for `test`; empty: `gallery`
    periodic: list[str] = field(default_factory=lambda: ["knn"])  # for every export, on val
    final: list[str] = field(default_factory=lambda: ["knn", "linear"])  # for the first and the last export, on test
    image_size: int | None = None  # pixels; null: the model's
    pixels: bool = True  # score raw pixels (of text, bytes) too, as the floor
    prompts: list[str] = field(default_factory=list)  # that a language model goes on from at each export


@dataclass
class Recipe(Section):
    steps: Derived  # auto, for decoders: see pretrain/dial.py
    model: Section = field(metadata={"choose": presets.choose})
    objective: Section = field(metadata={"choose": objective.config_class})
    run: str = ""  # the run folder; empty: runs/<name of the recipe>
    seed: int = 0
    device: str = "auto"  # auto: cuda where there is one, else cpu
    precision: Literal["auto", "fp32", "bf16", "fp16"] = (
        "auto"  # of the computation; weights stay fp32. auto: what is faster here, measured on the first batch
    )
    threads: int | None = None  # of the model's process on CPU; null: from the machine's cores
    overwrite: bool = False  # delete what the run folder holds and start again
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    init: Init = field(default_factory=Init)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    skip: Skip = field(default_factory=Skip)
    export: Export = field(default_factory=Export)
    log: Log = field(default_factory=Log)
    eval: Eval = field(default_factory=Eval)
    derived = list[str]()  # no field; of an instance: what the size dial derived, in lines


def is_text(recipe: Recipe) -> bool:
    """Whether a recipe's model reads tokens."""
    return hasattr(type(vars(recipe)["model"]), "vocab_size")


def names() -> dict[str, str]:
    """{name: its one-line purpose (the first comment line)} of all recipes that come with the project."""
    return {path.stem: path.read_text().partition("\n")[0].lstrip("# ") for path in sorted(FOLDER.glob("*.yaml"))}


def find(name: str, beside: Path | None = None, where: str = "") -> Path:
    """The file of a recipe given by path (also relative to `beside`) or by name; `where` leads the error."""
    for candidate in (Path(name), *([beside / name] if beside else []), FOLDER / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
        if candidate.is_dir() and (candidate / "recipe.yaml").is_file():  # a run folder stands for its own recipe
            return candidate / "recipe.yaml"
    if name.endswith((".yaml", ".yml")):
        raise ConfigError(f"{where}{name}: no such file")
    raise ConfigError(
        f"{where}{name}: no such recipe; {nearest(name, names())} (`unlabeled recipes` lists them; a path must end in .yaml)"
    )


def _read(path: Path, values: dict, origin: Origin, seen: tuple[Path, ...] = ()) -> None:
    """Lay a recipe file, and before it what it extends, over `values`."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: extends itself by way of {' → '.join(p.name for p in seen)}")
    content = config.read_yaml(path)
    base = content.pop("extends", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: extends = {base!r}: expected the name or the file of a recipe")
        _read(find(base, path.parent, f"{path}: extends "), values, origin, (*seen, path))
    config.merge(values, origin, content, str(path), CHOSEN)


def load(name: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe of that name or path with dotted overrides ("optim.lr.value=1e-3") laid over it, checked whole."""
    path = find(str(name))
    values: dict[str, Any] = {}
    origin: Origin = {}
    _read(path, values, origin)
    for text in overrides or []:
        key, value = config.parse_override(text)
        config.merge(values, origin, config.nest(key, value), "command line", CHOSEN)
    recipe = config.build(Recipe, values, origin or {"": str(path)})
    recipe.run = vars(recipe)["run"] or f"runs/{path.stem}"
    return resolve(recipe)


def resolve(recipe: Recipe) -> Recipe:
    """Settle what the size dial derives, give every schedule the run's length where it has none, and check what one field alone cannot tell."""
    stored = vars(recipe)
    recipe.derived = [*recipe.derived, *dial.turn(recipe)]
    for section in config.sections(recipe):
        if isinstance(section, Schedule):
            if vars(section)["steps"] is None:
                section.steps = stored["steps"]
            section._defaults = {
                **vars(section).get("_defaults", {}),
                "steps": section.steps,
            }  # known to all, so no key that nobody reads
    if stored["init"].backbone and stored["init"].run:
        raise ConfigError("init.backbone and init.run are both given; init.run brings the backbone, too")
    for key, value in [("steps", stored["steps"]), ("data.batch", vars(stored["data"])["batch"])]:
        if value < 1:
            raise ConfigError(f"{key} = {value}: must be 1 or more")
    for key in (
        "checkpoint.every",
        "checkpoint.keep",
        "checkpoint.keep_every",
        "export.every",
        "log.every",
        "skip.most",
    ):
        owner, name = key.split(".")
        every = vars(stored[owner])[name]
        if every is not None and every < 1:
            raise ConfigError(f"{key} = {every}: must be 1 or more{' steps' if 'every' in name else ''}")
    bounds.check(recipe)
    return recipe
