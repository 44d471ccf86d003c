"""The sections of a recipe, one dataclass each, with a comment that explains each option.

`unlabeled recipes show NAME` prints these comments beside the keys. `pretrain/recipes/recipe.py` puts the sections
together and reads them from files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from common.config import Facts, Section, option, option_if
from common.schedules import Schedule
from pretrain.optim import optimizers
from pretrain.trackers import trackers

if TYPE_CHECKING:
    Derived = int
    Optimizer = str
    TrackerName = str
else:
    Optimizer = Literal[*optimizers.names()]
    TrackerName = Literal[*trackers.names()]
    Derived = int | Literal["auto"]  # `recipe.resolve` replaces "auto" by a number before it is used


@dataclass
class Source(Section):
    """One of several datasets that are mixed."""

    shorthand = "shards"
    shards: list[str]  # folders, tars or globs, as in data.train
    # weight of this dataset in mixed steps, relative to the other datasets; null: its number of samples
    weight: float | None = None
    # share of the steps whose batch comes from this dataset only (DINOv3: 0.1 for ImageNet)
    homogeneous: float = 0.0


@dataclass
class Phase(Section):
    """A change of the batch or of the weights that starts at a step; null keeps the previous value. The position in
    each dataset does not change."""

    step: int  # first step of the phase
    batch: int | None = None  # replaces data.batch
    weights: list[float] | None = None  # replaces `weight` in data.mix; one for each dataset
    homogeneous: list[float] | None = None  # replaces `homogeneous` in data.mix; one for each dataset


@dataclass
class Seconds(Section):
    """A number of samples that is limited by their lengths: recordings of `seconds` in total, with their padding."""

    seconds: float  # total length of the recordings, with their padding

    def check(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds = {self.seconds:g}: write a number above 0")


@dataclass
class Budget(Seconds):
    """A batch by budget: recordings of `seconds` in total, with their padding, over all processes. The recordings of a
    batch have similar lengths, and each is used once in an epoch."""

    advice = {
        "tokens": "all rows of text have data.length tokens, as documents are packed and captions padded; for N tokens"
        " write data.batch=N/data.length, the number of rows"
    }

    # largest number of groups of recordings of similar lengths; batches are made inside of a group
    buckets: int = option(16, low=1)


BATCH_SCHEMA = (int, {"seconds": float})  # of `data.batch` in a stored recipe, see `common.untrusted.schema_error`


def batch_text(batch: Any) -> str:
    """`data.batch` for messages: of a recipe, or its plain value in a stored one."""
    if isinstance(batch, Budget):
        return f"{batch.seconds:g} s"
    return f"{batch['seconds']:g} s" if isinstance(batch, dict) else str(batch)


@dataclass
class Fetch(Section):
    """How bytes are fetched from a store. These options do not change the result of the training."""

    shorthand = "cache"
    # a folder on a local disk that keeps fetched bytes for the next epoch and the next start; null: no cache
    cache: str | None = None
    # size of that cache in GB; when it is full, the bytes whose next use is furthest in the future are dropped first
    cache_gb: float = option(100.0, above=0)
    # MB that are fetched before they are needed, in addition to those that are kept for shuffling
    ahead_mb: float = option(512.0, low=0)
    requests: int = option(16, low=1)  # number of requests that are sent at the same time
    attempt_seconds: float = option(30.0, above=0)  # time limit of one request, in seconds
    retry_seconds: float = option(600.0, low=0)  # seconds without any answer after which the run ends
    # seconds without a batch after which the stacks of all processes are written to standard error; with several
    # processes at most half of `parallel.timeout`
    stall_seconds: float = option(120.0, above=0)


def stored_dtype(facts: Facts) -> str | None:
    """the dtype that keeps all bits of the images"""
    return facts.pixels or None


@dataclass
class Data(Section):
    """The data, and how they are read and decoded. `batch` is the global batch: the samples of a step, over all
    processes."""

    shorthand = "train"
    # folders, tars or globs of WebDataset shards, local or any fsspec URL, read as one dataset; or local folders of
    # images
    train: list[str] = field(default_factory=list)
    mix: list[Source] = field(default_factory=list)  # several datasets with their weights, instead of `train`
    # number of samples in a step, over all processes; auto, for decoders only: see pretrain/recipes/size_dial.py. Audio:
    # or {seconds: S}, recordings of S seconds in total, with their padding, in groups of similar lengths
    batch: Derived | Budget = option(256, low=1)
    # changes of batch or weights during the run; phases may be added to a run that has started
    phases: list[Phase] = field(default_factory=list)
    shuffle: bool = True  # whether samples are shuffled; false: the order of the shards
    # number of data worker processes for each training process; null: chosen from the number of cores
    workers: int | None = option(None, low=0)
    threads: int = option(1, low=1)  # number of threads of each data worker
    # how data workers are started; auto: fork on a CPU, and forkserver with an accelerator, as a fork of a process that
    # uses CUDA is not safe
    start_method: Literal["auto", "fork", "forkserver", "spawn"] = "auto"
    # MB of decoded images that the threads of a data worker may hold at once; a larger image is decoded alone
    decode_mb: float = option(1024.0, above=0)
    # number of pixels of the largest image that is decoded; a larger image counts as damaged
    max_pixels: int = option(100_000_000, low=1, high=1 << 30)
    # implementation of colour augmentations: see data_pipeline/views/colors.py
    color: Literal["exact", "fused", "device"] = "exact"
    fps: float = option(4.0, above=0)  # video: frames per second of a clip, which has model.frames frames
    # share of the samples that may be damaged before the run ends; ten samples may be damaged in any case
    bad_share: float = option(1e-4, low=0)
    bad_shard_share: float = option(0.01, low=0)  # the same share for a single shard
    fetch: Fetch = field(default_factory=Fetch)
    # text: number of tokens in a row, T; null: model.context, or for captions the number of the method (clip: 77,
    # siglip: 64)
    length: int | None = option(None, low=1)
    tokenizer: str = ""  # captions: a tokenizer.json, or a folder that contains one; local or any URL
    # captions: the field of the .json members that holds the caption, or a list of captions, of which one is drawn each
    # time; "": the .txt members
    captions: str = ""
    # text: split cuts the concatenated documents into rows; best_fit puts whole documents into rows where they fit
    packing: Literal["split", "best_fit"] = "split"
    document_mask: bool = True  # text: whether tokens attend to and predict tokens of their own document only
    sample_rate: int = option(16000, low=1000, high=1_000_000)  # audio: Hz to which recordings are resampled
    # audio: seconds of a cut, which is drawn from a longer recording; a shorter recording is padded, in a batch by budget
    # to the longest one of its group only
    seconds: float = option(10.0, above=0, high=3600)
    # dtype of decoded pixels until they are on the device; auto: the one that keeps all bits of the images
    pixel_dtype: Literal["auto", "uint8", "uint16", "float32"] = option(
        "auto", auto=stored_dtype, former_default="uint8"
    )
    # mean of the training pixels, one for each of model.in_channels: on a scale from 0 to 1, or for signed and float
    # images in their own unit; the default is ImageNet's
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])  # standard deviation of the same pixels

    def check(self) -> None:
        if self.budget is None:
            return
        if self.mix:
            raise ValueError(
                "data.mix has several datasets, but data.batch is a budget of seconds, which takes one; name all their"
                " shards in data.train, or write a number of samples"
            )
        if self.phases:
            raise ValueError(
                "data.phases changes the batch or the weights, but data.batch is a budget of seconds; remove data.phases,"
                " or write a number of samples"
            )

    @property
    def budget(self) -> Budget | None:
        """The budget of a batch; None if `batch` is a number of samples."""
        return self.batch if isinstance(self.batch, Budget) else None

    @property
    def batch_size(self) -> int:
        """The number of samples in a step; of a budget, the number of recordings of `data.seconds` that it holds."""
        return max(1, int(self.batch.seconds // self.seconds)) if isinstance(self.batch, Budget) else self.batch

    @property
    def batch_text(self) -> str:
        """`batch` for messages."""
        return batch_text(self.batch)


@dataclass
class Optim(Section):
    """The optimizer and its schedules. Weight decay applies to matrices, not to biases, norms and scales, and to tokens
    and position tables only with `decay_tokens`."""

    shorthand = "name"
    # a file of pretrain/optim/: adamw; muon, for the matrices in blocks, with AdamW for all other parameters; lars; sgd
    name: Optimizer = "adamw"
    lr: Schedule = field(default_factory=lambda: Schedule(1e-3))  # learning rate
    # decay rate of the weights of matrices; with adamw and muon it is decoupled from the gradient
    weight_decay: Schedule = field(default_factory=lambda: Schedule(0.05))
    # whether class token, registers, mask token and position table have weight decay as well; true reproduces DINO,
    # DINOv2, DINOv3 and I-JEPA
    decay_tokens: bool = False
    # decay of the running mean of gradients, for adamw and for the parameters that muon leaves to it
    beta1: float = option_if(0.9, "name", "adamw", "muon", low=0, below=1)
    # decay of the running mean of squared gradients
    beta2: float = option_if(0.999, "name", "adamw", "muon", low=0, below=1)
    # added to the root of the mean of squared gradients, by which an update is divided
    eps: float = option_if(1e-8, "name", "adamw", "muon", low=0)
    momentum: float = option_if(0.95, "name", unless="adamw", low=0, below=1)  # momentum of muon, lars and sgd
    nesterov: bool = option_if(False, "name", "sgd")  # whether sgd looks ahead along the momentum
    # trust coefficient of lars: the norm of an update relative to the norm of the weights, at a learning rate of 1
    trust: float = option_if(0.001, "name", "lars", above=0)
    # a gradient is scaled down if its norm exceeds this limit; null: no limit
    clip: float | None = option(None, above=0)
    # which norm is limited: that of all gradients together; of each module by itself, that is, of each backbone and of
    # each head, which reproduces DINOv2 and DINOv3; or of the gradient of each tensor, which reproduces DINO
    clip_scope: Literal["global", "module", "tensor"] = option_if("global", "clip", unless=None)
    # factor of the learning rate from one block to the one below it: that of block i of n is layer_decay^(n − i)
    layer_decay: float = option(1.0, above=0, high=1)
    # further factor of the learning rate of the patch embedding
    patch_embed_lr: float = option(1.0, low=0)
    # backbones that have these two factors; transformers: all except convolutional networks, as in the distillation of
    # DINOv3, whose ConvNeXts have one learning rate
    layer_decay_of: Literal["all", "transformers"] = "all"
    freeze_last_layer: int = option(0, low=0)  # number of steps in which the last layers of heads are frozen
    # number of steps in which only the heads are trained, for a backbone that starts from given weights
    freeze_backbone: int = option(0, low=0)


@dataclass
class Init(Section):
    """The weights from which a new run starts, unless they are random. A run that continues from a checkpoint of its
    own ignores them."""

    shorthand = "backbone"
    # weights of the backbone only: an export, a folder of transformers or timm, or a file of the DINOv2 or DINOv3
    # releases; heads are initialised anew
    backbone: str = ""
    # weights of the text model that the objective has beside `model` (clip, siglip): an export of a text model, a
    # folder of transformers, or an export or folder with an image model and a text model, of which the latter is read
    text: str = ""
    # weights of the whole objective, with teacher and heads: a run folder, RUN/checkpoints/STEP, or a URL; the
    # optimizer is initialised anew
    run: str = ""
    # which weights of `init.run` the trained network starts from: its own, or those of its moving average (the EMA
    # teacher)
    weights: Literal["student", "teacher"] = option_if("student", "run", unless="")


@dataclass
class Parallel(Section):
    """How the run is distributed over processes."""

    shorthand = "mode"
    # single: one process; ddp: a replica in each process; fsdp2: everything is sharded; zero1, zero2, zero3: the stages
    # of DeepSpeed
    mode: Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "single"
    # fsdp2: number of replicas of the model, each of which is sharded over a group of processes (HSDP)
    replicate: int = option_if(1, "mode", "fsdp2", low=1)
    # fsdp2: whether a frozen teacher, which never changes, is sharded, or replicated in each process
    frozen: Literal["sharded", "replicated"] = option_if("sharded", "mode", "fsdp2")
    # which activations of transformer blocks are recomputed in the backward pass; selective: all except the results of
    # matrix products and attention
    recompute: Literal["none", "selective", "full"] = "none"
    compile: bool = False  # whether each block is compiled with torch.compile
    # implementation of attention: sdpa is PyTorch's, with one call for each size of crop, and dense masks for documents
    # and windows; the others, on CUDA only, compute all sizes and documents in one call; auto: the best that is
    # available
    attention: Literal["auto", "sdpa", "xformers", "varlen", "flex"] = "auto"
    # fsdp2: whether parameters, gradients and optimizer states are kept in host memory; zero: the optimizer states only
    offload: bool = option_if(False, "mode", "fsdp2", "zero1", "zero2", "zero3")
    # seconds that a process waits for the others after the first step, plus `data.fetch.retry_seconds` if shards are
    # remote; before the first step it waits half an hour
    timeout: float = option(300.0, above=0)
    # largest number of samples in one forward of a process, above which gradients are accumulated; null: no limit. If
    # data.batch is a budget: {seconds: S}
    micro_batch: int | Seconds | None = option(None, low=1)
    # allow gradient accumulation for an objective whose loss couples the samples of a batch, or whose network has batch
    # norms; they then see only one micro-batch at a time
    accumulate_coupled: bool = False


@dataclass
class Checkpoint(Section):
    """When, where and how a run is saved, and the checkpoint from which it starts. Except `resume`, these options do
    not change the result of the training."""

    shorthand = "every"
    every: int = option(1000, low=1)  # number of steps between two checkpoints
    keep: int = option(2, low=1)  # number of newest checkpoints that are kept
    keep_every: int | None = option(None, low=1)  # also keep the checkpoints whose step is a multiple of this
    # async: a checkpoint is copied to host memory and written while the training continues
    mode: Literal["sync", "async"] = "sync"
    folder: str = ""  # local, or any fsspec URL (s3://…) that all processes share; empty: RUN/checkpoints
    # where a new run begins: latest (the newest checkpoint in this folder), none (at the first step), a step in this
    # folder, or the path or URL of a checkpoint; when the run has saved checkpoints, it resumes from the newest of them
    resume: int | str = "latest"
    # what the run does if a checkpoint cannot be written within `retry_seconds`
    on_error: Literal["stop", "continue"] = "stop"
    # seconds after the first failed attempt in which a write is tried again
    retry_seconds: float = option(60.0, low=0)


@dataclass
class Skip(Section):
    """When the optimizer skips a step. A step whose loss or gradient is not finite on any process is always skipped: it
    changes neither weights nor optimizer, teacher or buffers."""

    shorthand = "most"
    most: int = option(10, low=1)  # largest number of skipped steps in a row; one more ends the run with a report
    # also skip a step whose loss is more than this number of standard deviations above the mean of the last 128 losses
    sigma: float | None = None


@dataclass
class Export(Section):
    """When the encoder is exported to RUN/export/STEP, in a folder that other libraries open, and scored."""

    shorthand = "every"
    # number of steps between two exports; the first and the last step are exported in any case
    every: int = option(1000, low=1)


@dataclass
class Tracker(Section):
    """A tracker that shows the metrics and scores of the run, in addition to TensorBoard."""

    shorthand = "name"
    name: TrackerName  # a file of pretrain/trackers/
    project: str = "unlabeled"  # the project of the run there; of mlflow, the experiment
    run: str = ""  # the name of the run there; empty: that of the run folder
    # a local folder for what the tracker stores, which runs may share; empty: RUN/trackers/NAME
    folder: str = ""
    # where the run is sent: the URL of a server, or for trackio a Space such as me/runs; empty: nothing is sent
    # anywhere. Keys come from the tracker's own environment variables
    server: str = ""


@dataclass
class Log(Section):
    """What is logged while the run trains."""

    shorthand = "every"
    # number of steps between two writes, each of which waits for the device; the log has a row for every step in any
    # case
    every: int = option(10, low=1)
    flops: bool = True  # log model FLOP/s and MFU; this traces one step at the start
    # text: number of steps between two computations of the loss on eval.val, which is also computed after the last
    # step; 0: never
    val_every: int = 100
    val_batches: int = 4  # number of global batches for that loss; always the same rows
    # trackers that show the run, such as wandb; TensorBoard's files are written in any case
    trackers: list[Tracker] = field(default_factory=list)

    def check(self) -> None:
        names = [tracker.name for tracker in self.trackers]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"log.trackers names {repeated[0]} twice; name each tracker once")
