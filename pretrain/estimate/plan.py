"""Estimates what a run needs before it starts (`unlabeled plan RECIPE`): parameters, FLOPs, memory of a process, bytes
between processes, hours.

`trace.py` trains two steps of the recipe's objective in one process with fake tensors. From its result this module
computes the requirements of each process in a `parallel.mode`. It imports torch only inside functions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ConfigError, DataError
from common.untrusted import loads, read_text, schema_error
from pretrain.estimate.hardware import PEAKS, peak_of
from pretrain.recipes import parallel_checks
from pretrain.recipes.recipe import Recipe
from pretrain.run_folder.written_files import FLOPS, RECIPE

if TYPE_CHECKING:
    from pretrain.estimate.trace import Trace, Unit

WHOLE = {"parameters": 1.0, "casts": 1.0, "gradients": 1.0, "optimizer": 1.0, "teacher": 1.0, "activations": 1.0}
FP32_BYTES = 4  # bytes of an element of a parameter, and of each tensor of its optimizer state
ZERO_BUCKET = 500_000_000  # elements in DeepSpeed's gradient buffer, even for a small model (reduce_bucket_size)
# ZeRO-3 keeps a parameter gathered if fewer other parameters (elements) are used before its next use
# (stage3_max_reuse_distance).
ZERO_REUSE = 1_000_000_000


@dataclass
class Plan:
    """The estimate. Bytes are those of one process; FLOPs are those of a step with the global batch."""

    trained: int  # number of trained parameters
    frozen: int  # number of frozen parameters, those of teachers
    flops: int  # model FLOPs, without recomputation of activations
    computed: int  # FLOPs with recomputation
    batch: int
    micro: int  # number of samples of a process in one micro-batch
    accumulate: int
    processes: int
    memory: dict[str, int]  # on the device, by category, at the moment when their sum is largest
    host: dict[str, int]  # in host memory, by category, if the recipe offloads
    collectives: dict[str, int]  # {kind of collective: bytes per step of the full tensors that it works on}

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


def trace(cfg: Recipe, processes: int | None = None) -> Plan:
    """The plan of a recipe on a number of processes (default: those of this run). Raises ConfigError for a recipe that
    cannot run on them."""
    processes = int(os.environ.get("WORLD_SIZE", 1)) if processes is None else processes
    if processes < 1:
        raise ConfigError(f"--processes {processes}: write 1 or more")
    parallel_checks.check(cfg, processes)
    if cfg.precision == "auto":
        cfg = cfg.replace(precision="fp32" if cfg.device == "cpu" else "bf16")
    from pretrain.estimate import trace as tracer
    from pretrain.objectives.finder import find
    from pretrain.optim import optimizers
    from pretrain.parallel.engine import accumulation

    batch = cfg.data.batch_size
    accumulate = accumulation(cfg, find(cfg.objective.name).couples_batch, processes)
    micro = max(1, batch // (processes * accumulate))
    states = len(optimizers.optimizer_class(cfg.optim.name).state_names)
    share = shares(cfg, processes, accumulate, states)
    offloaded = _offloaded(cfg)
    on_device = {name: 0.0 if name in offloaded else part for name, part in share.items()}
    found = tracer.run(cfg, micro, accumulate, processes, on_device)
    flops = found.flops
    if cfg.parallel.recompute != "none":
        plain = cfg.replace(parallel=cfg.parallel.replace(recompute="none"))
        flops = tracer.run(plain, micro, 1, processes, WHOLE).flops
    memory = {name: int(size * on_device[name]) for name, size in found.memory.items()}
    memory |= transient(cfg, found.units, processes)
    trained, frozen = sum(u.trained for u in found.units), sum(u.frozen for u in found.units)
    sizes = {
        "parameters": FP32_BYTES * trained,
        "gradients": FP32_BYTES * trained,
        "optimizer": FP32_BYTES * states * trained,
    }
    sizes["teacher"] = FP32_BYTES * frozen
    return Plan(
        trained,
        frozen,
        flops * accumulate * processes,
        found.flops * accumulate * processes,
        batch,
        micro,
        accumulate,
        processes,
        {name: size for name, size in memory.items() if size},
        {name: int(sizes[name] * share[name]) for name in offloaded if sizes[name]},
        traffic(cfg, found, processes, accumulate),
    )


def step_flops(cfg: Recipe, run: Path) -> int:
    """The FLOPs of a step with the global batch. Tracing a large model takes up to a minute, so the result is stored in
    RUN/flops.json for the next start of the same recipe. Raises ConfigError."""
    from data_pipeline.storage.urls import write_atomically

    file, key = run / FLOPS, hashlib.sha256((run / RECIPE).read_bytes()).hexdigest()
    with contextlib.suppress(OSError, ValueError):
        stored = loads(read_text(file))
        if not schema_error(stored, {"recipe": str, "flops": int}) and stored["recipe"] == key:
            return stored["flops"]
    flops = trace(cfg).flops
    with contextlib.suppress(DataError):  # if the disk is full, the next start traces again
        write_atomically(str(file), [json.dumps({"recipe": key, "flops": flops}).encode()])
    return flops


def shares(cfg: Recipe, processes: int, accumulate: int, states: int) -> dict[str, float]:
    """{category of memory: share that each process holds}. `states`: number of optimizer state tensors per
    parameter."""
    mode, piece = cfg.parallel.mode, 1 / processes
    if mode == "fsdp2":
        piece *= cfg.parallel.replicate
        cut = dict.fromkeys(("parameters", "optimizer", "teacher", "gradients"), piece)
        if accumulate > 1:
            cut["gradients"] = 1.0  # they are reduced and scattered only at the last micro-batch
        if cfg.parallel.frozen == "replicated":
            cut["teacher"] = 1.0
        return WHOLE | cut | {"casts": 0.0}  # weights are gathered in the compute dtype, see `transient`
    if mode == "ddp":
        return WHOLE | {"gradients": 0.0}  # gradients are views of the buckets, see `transient`
    if mode == "zero3":
        # weights are gathered in the compute dtype, see `transient`
        return WHOLE | {"casts": 0.0} | dict.fromkeys(("parameters", "optimizer", "teacher", "gradients"), piece)
    if mode in ("zero1", "zero2"):  # the optimizer has a copy of its parameters, even if they are fp32
        return WHOLE | {"optimizer": piece * (states + 1) / states} | ({"gradients": piece} if mode == "zero2" else {})
    return dict(WHOLE)


def _offloaded(cfg: Recipe) -> tuple[str, ...]:
    if not cfg.parallel.offload:
        return ()
    return ("parameters", "gradients", "optimizer", "teacher") if cfg.parallel.mode == "fsdp2" else ("optimizer",)


def _width(cfg: Recipe) -> int:
    """Bytes of a number in the compute dtype."""
    return 4 if cfg.precision == "fp32" else 2


def transient(cfg: Recipe, units: list[Unit], processes: int) -> dict[str, int]:
    """Bytes that a mode needs for communication: gathered units and buffers. The figures for ZeRO are from the source
    of DeepSpeed 0.19."""
    trained, mode = sum(u.trained for u in units), cfg.parallel.mode
    if mode == "ddp":
        return {"buffers": FP32_BYTES * trained}  # the gradient buckets, of which gradients are views
    if mode == "fsdp2":
        width, replicated = _width(cfg), cfg.parallel.frozen == "replicated"
        sizes = [width * (u.trained + (0 if replicated else u.frozen)) for u in units]
        kept = sum(size for size, u in zip(sizes, units, strict=True) if u.kept)
        passing = [size for size, u in zip(sizes, units, strict=True) if not u.kept]
        largest = max(u.trained for u in units)
        # gathered: a unit and the next one, which is prefetched; buffers: the gradients of a unit, and the fp32 copy
        # that is reduced
        return {
            "gathered": kept + max(a + b for a, b in pairwise([0, *passing, 0])),
            "buffers": (width + FP32_BYTES) * largest,
        }
    if mode.startswith("zero"):
        gathered = int(_zero3_width(cfg, units) * (_kept(trained) + max(u.trained + u.frozen for u in units)))
        return {"gathered": gathered if mode == "zero3" else 0, "buffers": FP32_BYTES * ZERO_BUCKET}
    return {}


def _zero3_width(cfg: Recipe, units: list[Unit]) -> float:
    """Bytes of a parameter that ZeRO-3 gathers, on average: weights of linear and convolutional layers in the compute
    dtype, the others in fp32."""
    cast, count = sum(u.cast for u in units), sum(u.trained + u.frozen for u in units)
    return FP32_BYTES + (_width(cfg) - FP32_BYTES) * cast / count


def _kept(trained: int) -> int:
    """Number of parameters that ZeRO-3 keeps gathered from forward to backward. These are the last ones: the distance
    between two uses counts the parameters used in between, in forward and in backward."""
    return min(trained, ZERO_REUSE // 2)


def traffic(cfg: Recipe, found: Trace, processes: int, accumulate: int) -> dict[str, int]:
    """{kind of collective: bytes per step of the full tensors}.

    In a ring of n processes, each sends (n − 1) / n of these bytes for an all-gather or reduce-scatter, and twice that
    for an all-reduce.
    """
    mode, units = cfg.parallel.mode, found.units
    trained = sum(u.trained for u in units)
    out = {name: accumulate * size for name, size in found.collectives.items()}

    def add(name: str, size: int) -> None:
        out[name] = out.get(name, 0) + size

    for name, size in found.after_step.items():
        add(name, size)
    if mode == "ddp":
        add("all-reduce", FP32_BYTES * trained)
    elif mode == "fsdp2":
        pieces = processes // cfg.parallel.replicate
        frozen = 0 if cfg.parallel.frozen == "replicated" else 1
        # A trained unit is gathered for forward and backward of each call; a unit that stays gathered, only once.
        gathers = sum(
            u.trained + frozen * u.frozen if u.kept else u.calls * (2 * u.trained + frozen * u.frozen) for u in units
        )
        if pieces > 1:
            add("all-gather", accumulate * _width(cfg) * gathers)
            add("reduce-scatter", FP32_BYTES * trained)
        if cfg.parallel.replicate > 1:
            add("all-reduce", FP32_BYTES * trained // pieces)
    elif mode in ("zero1", "zero2"):  # gradients are all-reduced (use_multi_rank_bucket_allreduce)
        add("all-reduce", FP32_BYTES * trained * (accumulate if mode == "zero2" else 1))
        add("all-gather", FP32_BYTES * trained)
    elif mode == "zero3":
        frozen = sum(u.frozen for u in units)
        gathers = 2 * trained - _kept(trained) + frozen
        add("all-gather", accumulate * round(_zero3_width(cfg, units) * gathers))
        add("reduce-scatter", accumulate * FP32_BYTES * trained)
    matrices = found.exchanged // FP32_BYTES * (FP32_BYTES if cfg.device == "cpu" else 2)  # Muon's, in bf16 on a GPU
    if matrices and mode == "fsdp2":  # rows are sent to the rank that computes, and back
        add("all-to-all", 2 * matrices)
    elif matrices:
        add("all-gather", matrices)
    return out if processes > 1 else {}


def describe(cfg: Recipe, device: str, mfu: float, processes: int = 1) -> list[str]:
    """The lines of `unlabeled plan`. Raises ConfigError for a device that is not in the table."""
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu:g}: write a share of the peak, such as 0.4")
    if peak_of(device, "fp32") is None:
        raise ConfigError(f"--device {device}: not known; known: {', '.join(PEAKS)}")
    if cfg.precision == "auto":
        cfg = cfg.replace(precision="bf16" if cfg.device != "cpu" and peak_of(device, "bf16") else "fp32")
    peak = peak_of(device, cfg.precision)
    if peak is None:
        raise ConfigError(f"--device {device}: has no {cfg.precision}; write precision=fp32")
    plan = trace(cfg, processes)
    hours = plan.computed * cfg.steps / (peak * mfu * processes) / 3600
    teacher = f", {plan.frozen / 1e6:.1f} M of a teacher" if plan.frozen else ""
    again = f"; {_scaled(plan.computed)} with recomputation" if plan.computed != plan.flops else ""
    micro = f"{plan.accumulate} micro-batches of {plan.micro}" if plan.accumulate > 1 else f"{plan.micro}"
    from pretrain.build import parts_of

    parts = parts_of(cfg)
    unit = f"{next(iter(parts.values())).noun}s"
    seen = f"{cfg.steps * plan.batch / 1e6:.3g} M {unit}"
    if length := getattr(parts.get("tokens"), "length", 0):
        unit, seen = f"rows of {length} tokens", f"{cfg.steps * plan.batch * length / 1e9:.3g} G tokens"
    out = [
        f"{cfg.objective.name} on {cfg.model.name}, {cfg.precision}, {cfg.parallel.mode} on {processes} × {device}",
        f"parameters   {plan.trained / 1e6:.1f} M trained{teacher}",
        f"a step       {plan.batch} {unit}, {micro} per process; {_scaled(plan.flops)}{again}",
        f"the run      {cfg.steps} steps, {seen}, {_scaled(cfg.steps * plan.computed)}",
        f"time         {_time(hours)} at {mfu:.0%} of {processes} × {peak / 1e12:.3g} TFLOP/s",
        f"data         {plan.batch * peak * mfu / plan.computed:,.0f} {unit} per second for each process",
        f"memory       {_sizes(plan.memory)} on each device",
    ]
    if plan.host:
        out.append(f"main memory  {_sizes(plan.host)} for each process")
    if plan.collectives:
        each = ", ".join(f"{name} {_size(size)}" for name, size in plan.collectives.items())
        out.append(f"traffic      a step: {each}")
    return out + [f"derived      {line}" for line in cfg.derived]


def _size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


def _sizes(sizes: dict[str, int]) -> str:
    return f"{_size(sum(sizes.values()))} ({', '.join(f'{name} {_size(size)}' for name, size in sizes.items())})"


def _scaled(flops: float) -> str:
    for scale, letter in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T")):
        if flops >= scale:
            return f"{flops / scale:.3g} {letter}FLOP"
    return f"{flops / 1e9:.3g} GFLOP"


def _time(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{max(1, math.ceil(hours * 60))} min"
