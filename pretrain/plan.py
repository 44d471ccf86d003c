"""Plan: what a recipe takes, known before it runs: parameters, FLOPs, memory of a process, bytes between processes, hours. `unlabeled plan RECIPE`.

`plan_trace.py` trains the recipe's objective for two steps of one process without memory; here is what each `parallel.mode` makes of that.
Nothing at the top imports torch.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from pretrain.config import ConfigError
from pretrain.parallel import rules
from pretrain.peak import PEAKS, peak_of
from pretrain.recipe import Recipe, is_text

if TYPE_CHECKING:
    from pretrain.plan_trace import Unit

WHOLE = {"parameters": 1.0, "casts": 1.0, "gradients": 1.0, "optimizer": 1.0, "teacher": 1.0, "activations": 1.0}
FP32, ADAM = 4, 8  # bytes of a parameter, and of its two moments
ZERO_BUCKET = 500_000_000  # gradients that DeepSpeed has room for, however small the model is (reduce_bucket_size)
ZERO_REUSE = (
    1_000_000_000  # parameters: what is used again before so many others stays gathered (stage3_max_reuse_distance)
)


@dataclass
class Plan:
    """Bytes are of one process; FLOPs of a step over the global batch."""

    trained: int  # parameters
    frozen: int  # of teachers
    flops: int  # of the model: what is computed again is not counted
    computed: int  # with what is computed again
    batch: int
    micro: int  # samples of a process in one forward
    accumulate: int
    processes: int
    memory: dict[str, int]  # on the device, by category, at the moment when their sum is largest
    host: dict[str, int]  # in main memory, where the recipe offloads
    collectives: dict[str, int]  # per step: bytes of the whole tensors that are gathered, reduced and scattered

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


def trace(cfg: Recipe, processes: int | None = None) -> Plan:
    """The plan of a recipe with so many processes (default: as many as there are). Raises ConfigError for what cannot be."""
    processes = int(os.environ.get("WORLD_SIZE", 1)) if processes is None else processes
    if processes < 1:
        raise ConfigError(f"--processes {processes}: write 1 or more")
    rules.check(cfg, processes)
    if cfg.precision == "auto":
        cfg = cfg.replace(precision="fp32" if cfg.device == "cpu" else "bf16")
    from pretrain import plan_trace
    from pretrain.objective import find
    from pretrain.parallel.engine import accumulation

    batch = cfg.data.batch
    accumulate = accumulation(cfg, find(cfg.objective.name).couples_batch, processes)
    micro = batch // (processes * accumulate)
    share = shares(cfg, processes, accumulate)
    offloaded = _offloaded(cfg)
    on_device = {name: 0.0 if name in offloaded else part for name, part in share.items()}
    found = plan_trace.run(cfg, micro, accumulate, processes, on_device)
    flops = found.flops
    if cfg.parallel.recompute != "none":
        plain = cfg.replace(parallel=cfg.parallel.replace(recompute="none"))
        flops = plan_trace.run(plain, micro, 1, processes, WHOLE).flops
    memory = {name: int(size * on_device[name]) for name, size in found.memory.items()}
    memory |= transient(cfg, found.units, processes)
    trained, frozen = sum(u.trained for u in found.units), sum(u.frozen for u in found.units)
    sizes = {"parameters": FP32 * trained, "gradients": FP32 * trained, "optimizer": ADAM * trained}
    sizes["teacher"] = FP32 * frozen
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
        traffic(cfg, found.units, processes, accumulate, found.collectives),
    )


def shares(cfg: Recipe, processes: int, accumulate: int) -> dict[str, float]:
    """How much of each category a process holds."""
    mode, piece = cfg.parallel.mode, 1 / processes
    if mode == "fsdp2":
        piece *= cfg.parallel.replicate
        cut = dict.fromkeys(("parameters", "optimizer", "teacher", "gradients"), piece)
        if accumulate > 1:
            cut["gradients"] = 1.0  # they cross processes at the last micro-batch only
        if cfg.parallel.frozen == "replicated":
            cut["teacher"] = 1.0
        return WHOLE | cut | {"casts": 0.0}  # weights are gathered in the compute type, see `transient`
    if mode == "zero3":
        return WHOLE | dict.fromkeys(("parameters", "optimizer", "teacher", "gradients"), piece)
    if mode in ("zero1", "zero2"):  # the optimizer has a copy of its parameters, fp32 or not
        return WHOLE | {"optimizer": piece * (ADAM + FP32) / ADAM} | ({"gradients": piece} if mode == "zero2" else {})
    return dict(WHOLE)


def _offloaded(cfg: Recipe) -> tuple[str, ...]:
    if not cfg.parallel.offload:
        return ()
    return ("parameters", "gradients", "optimizer", "teacher") if cfg.parallel.mode == "fsdp2" else ("optimizer",)


def _width(cfg: Recipe) -> int:
    """Bytes of a number in the compute type."""
    return 4 if cfg.precision == "fp32" else 2


def transient(cfg: Recipe, units: list[Unit], processes: int) -> dict[str, int]:
    """Bytes that a mode needs for its communication: gathered units, and buffers. What is said of ZeRO is from DeepSpeed 0.19's source."""
    trained, mode = sum(u.trained for u in units), cfg.parallel.mode
    if mode == "ddp":
        return {"buffers": FP32 * trained}  # its buckets
    if mode == "fsdp2":
        width, replicated = _width(cfg), cfg.parallel.frozen == "replicated"
        sizes = [width * (u.trained + (0 if replicated else u.frozen)) for u in units]
        largest = max(u.trained for u in units)
        # a unit and the one that is on its way; a unit's gradients, and the same in fp32 on their way
        return {"gathered": max(a + b for a, b in pairwise([*sizes, 0])), "buffers": (width + FP32) * largest}
    if mode.startswith("zero"):
        gathered = FP32 * (_kept(trained) + max(u.trained + u.frozen for u in units))
        return {"gathered": gathered if mode == "zero3" else 0, "buffers": FP32 * ZERO_BUCKET}
    return {}


def _kept(trained: int) -> int:
    """Parameters that ZeRO-3 keeps gathered from forward to backward: the last ones, as those between are counted on both ways."""
    return min(trained, ZERO_REUSE // 2)


def traffic(cfg: Recipe, units: list[Unit], processes: int, accumulate: int, asked: dict[str, int]) -> dict[str, int]:
    """Bytes per collective and step. Of n processes, a ring sends (n − 1) / n of these for a gather or a scatter, and twice that for an all-reduce."""
    mode, trained = cfg.parallel.mode, sum(u.trained for u in units)
    out = {name: accumulate * size for name, size in asked.items()}

    def add(name: str, size: int) -> None:
        out[name] = out.get(name, 0) + size

    if mode == "ddp":
        add("all-reduce", FP32 * trained)
    elif mode == "fsdp2":
        pieces = processes // cfg.parallel.replicate
        frozen = 0 if cfg.parallel.frozen == "replicated" else 1
        gathers = sum(u.calls * (2 * u.trained + frozen * u.frozen) for u in units)  # trained ones in backward, too
        if pieces > 1:
            add("all-gather", accumulate * _width(cfg) * gathers)
            add("reduce-scatter", FP32 * trained)
        if cfg.parallel.replicate > 1:
            add("all-reduce", FP32 * trained // pieces)
    elif mode in ("zero1", "zero2"):  # whose gradients go through one all-reduce (use_multi_rank_bucket_allreduce)
        add("all-reduce", FP32 * trained * (accumulate if mode == "zero2" else 1))
        add("all-gather", FP32 * trained)
    elif mode == "zero3":
        frozen = sum(u.frozen for u in units)
        add("all-gather", accumulate * FP32 * (2 * trained - _kept(trained) + frozen))
        add("reduce-scatter", accumulate * FP32 * trained)
    return out if processes > 1 else {}


def describe(cfg: Recipe, device: str, mfu: float, processes: int = 1) -> list[str]:
    """The lines of `unlabeled plan`. Raises ConfigError for a device that the table does not have."""
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
    again = f"; {_scaled(plan.computed)} with what is computed again" if plan.computed != plan.flops else ""
    micro = f" in {plan.accumulate} micro-batches of {plan.micro}" if plan.accumulate > 1 else f" at once: {plan.micro}"
    unit, seen = "images", f"{cfg.steps * plan.batch / 1e6:.3g} M images"
    if is_text(cfg):
        length = cfg.data.length or cfg.model.context  # type: ignore[attr-defined]
        unit, seen = f"rows of {length} tokens", f"{cfg.steps * plan.batch * length / 1e9:.3g} G tokens"
    out = [
        f"{cfg.objective.name} on {cfg.model.name}, {cfg.precision}, {cfg.parallel.mode} on {processes} × {device}",
        f"parameters   {plan.trained / 1e6:.1f} M trained{teacher}",
        f"a step       {plan.batch} {unit}, for a process{micro}; {_scaled(plan.flops)}{again}",
        f"the run      {cfg.steps} steps, {seen}, {_scaled(cfg.steps * plan.computed)}",
        f"time         {_time(hours)} at {mfu:.0%} of {processes} × {peak / 1e12:.3g} TFLOP/s",
        f"memory       {_sizes(plan.memory)} of each device",
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
