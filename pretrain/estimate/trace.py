"""Train two steps of a recipe's objective with fake tensors, to count its FLOPs, its memory, and the bytes of its
collectives.

Floating-point tensors are fake: they have a shape, but no values and no memory. Integers and booleans are real, so that
shapes which depend on masks and kept patches are those of a real step. The batch is made by the objective's views from
random samples.
"""

from __future__ import annotations

import contextlib
import unittest.mock
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._distributed_c10d import FakeWork
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from common.errors import ConfigError
from data_pipeline.stream.worker import collated
from pretrain import kernels
from pretrain.build import noise_samples, views
from pretrain.kernels import norms
from pretrain.models.layers import LayerNorm
from pretrain.models.t5 import RelativeBias
from pretrain.models.text_layers import Masks
from pretrain.models.text_mlp import RMSNorm
from pretrain.objectives.base import Objective
from pretrain.optim.groups import make_optimizer
from pretrain.parallel import blocks
from pretrain.parallel.deepspeed import AUTOCAST
from pretrain.parallel.engine import COMPUTE, accumulation
from pretrain.parallel.fsdp2 import stay_gathered
from pretrain.recipes.recipe import Recipe

MAX_SAMPLES = 16  # number of random samples; larger batches repeat them
CATEGORIES = ("parameters", "casts", "gradients", "optimizer", "teacher", "activations")
aten, c10d = torch.ops.aten, torch.ops.c10d
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COLLECTIVES = {  # {operation: (its name, index of the argument that is the full tensor)}
    c10d.allreduce_.default: ("all-reduce", 0),
    c10d._allgather_base_.default: ("all-gather", 0),
    c10d._reduce_scatter_base_.default: ("reduce-scatter", 1),
}


@dataclass
class Unit:
    """A module whose parameters a sharded engine gathers together, and how often a micro-batch calls it."""

    trained: int  # number of trained parameters
    frozen: int  # number of frozen parameters
    kept: bool  # whether it stays gathered from forward to backward
    cast: int  # number of all parameters that ZeRO-3 gathers in the compute dtype
    calls: int = 0  # number of calls in a micro-batch


@dataclass
class Trace:
    """The work and memory of one rank in a step."""

    units: list[Unit]
    flops: int
    memory: dict[str, int]  # {category: bytes} when their sum, weighted by the `share` of each category (`run`), peaks
    # {kind: bytes} of the objective's collectives: in forward and backward of a micro-batch, and after a step
    collectives: dict[str, int] = field(default_factory=dict)
    after_step: dict[str, int] = field(default_factory=dict)
    # fp32 bytes of the matrices that the optimizer (Muon) sends to all ranks if each rank has all parameters
    exchanged: int = 0


class _Real(TorchDispatchMode):
    """A dispatch mode above the fake mode: it computes operations without fake inputs, so that integers have real
    values, and counts collectives instead of running them."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._collective(func, args)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if tensors and not any(isinstance(x, FakeTensor) for x in tensors):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func in INDEXING:  # replace a boolean mask by the indices where it is true
            indices = [i if i is None or i.dtype != torch.bool else _true_indices(i) for i in args[1]]
            args = (args[0], [each for i in indices for each in (i if isinstance(i, tuple) else (i,))], *args[2:])
        out = func(*args, **kwargs)
        if not tensors and isinstance(out, Tensor) and not out.is_floating_point():  # arange, zeros(dtype=bool), …
            with _disable_current_modes():
                return func(*args, **kwargs)
        return out

    def _collective(self, func, args):
        if func in COLLECTIVES:
            name, place = COLLECTIVES[func]
            size = sum(t.nbytes for t in tree_leaves(args[place]) if isinstance(t, Tensor))
            self.collectives[name] = self.collectives.get(name, 0) + size
        return args[0], FakeWork().boxed()

    def take(self) -> dict[str, int]:
        """The bytes of the collectives since the last call, by kind."""
        taken, self.collectives = self.collectives, {}
        return taken


def _true_indices(mask: Tensor) -> Tensor | tuple[Tensor, ...]:
    if isinstance(mask, FakeTensor):
        return mask
    with _disable_current_modes():
        return mask.nonzero(as_tuple=True)


class Memory(TorchDispatchMode):
    """Counts the bytes of all living storages by category, and keeps the counts at the peak, when their sum, weighted
    by the `share` of each category, is largest.

    torch's MemTracker finds the same peaks, but it refuses frozen modules and has no shares; see
    docs/negative_results.md.
    """

    def __init__(self, share: dict[str, float]) -> None:
        super().__init__()
        self.share = share
        self.alive: dict[int, tuple[weakref.ref, int, str]] = {}  # {address: (storage, bytes, category)}
        self.now = dict.fromkeys(CATEGORIES, 0)
        self.reset_peak()

    def reset_peak(self) -> None:
        self.peak, self.at_peak = 0.0, dict(self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        cast = func is aten._to_copy.default and self._of(args[0]) in ("parameters", "teacher")
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.add(value, "casts" if cast else "activations")
        return out

    def add(self, tensor: Tensor, category: str) -> None:
        """Count the storage of a tensor, unless it is known already."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, int(storage.nbytes())
        if address in self.alive:
            return
        self.alive[address] = (weakref.ref(storage, lambda _: self._gone(address)), size, category)
        self.now[category] += size
        total = sum(self.share[name] * size for name, size in self.now.items())
        if total > self.peak:
            self.peak, self.at_peak = total, dict(self.now)

    def mark(self, tensors: Iterable[Any], category: str) -> None:
        """Move the storages of tensors to a category. Values that are not tensors are ignored."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self.add(tensor, category)
                address = tensor.untyped_storage()._cdata
                reference, size, old = self.alive[address]
                self.alive[address] = (reference, size, category)
                self.now[old] -= size
                self.now[category] += size

    def _of(self, tensor: Tensor) -> str | None:
        known = self.alive.get(tensor.untyped_storage()._cdata)
        return known[2] if known else None

    def _gone(self, address: int) -> None:
        _, size, category = self.alive.pop(address)
        self.now[category] -= size


def _attention(query, key, value, *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad, query, key, value, *_, **__) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


FLOPS = {  # of the CPU's kernels, which torch's FLOP counter does not know
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


# ---------------------------------------------------------------- what kernels of a GPU keep
class _FusedRMSNorm(RMSNorm):
    """Its kernel for CUDA keeps what LayerNorm's does; on a CPU, PyTorch has single operations for it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), None, self.eps)


class _NoMasks(Masks):
    """Attention of documents and windows by FlexAttention, xformers or varlen: no mask of T × T."""

    def forward(
        self, queries: Tensor, keys: Tensor, windows: list[int], documents: Tensor | None, causal: bool
    ) -> list[Any]:
        return [None for _ in windows]


class _NoBias(RelativeBias):
    def forward(self, queries: Tensor, keys: Tensor, documents: Tensor | None = None) -> Any:
        return self.weight[:1].t().view(1, -1, 1, 1)


FUSED: kernels.Table = {LayerNorm: norms.CudaLayerNorm, RMSNorm: _FusedRMSNorm}
WITHOUT_MASKS: kernels.Table = {Masks: _NoMasks, RelativeBias: _NoBias}


def example(cfg: Recipe, objective: Objective, count: int) -> dict[str, Tensor]:
    """A micro-batch on the device, which the objective's views have made from `count` random samples. Call it under the
    fake mode, so that floating-point tensors and images are fake."""
    different = min(count, MAX_SAMPLES)
    samples = noise_samples(cfg, objective, different)
    batch, real = dict[str, Tensor](), dict[str, np.ndarray]()
    for key, value in samples[0].items():
        owner, dot, _ = key.rpartition(".")
        if dot and owner in samples[0]:  # an extra of `Part.place`, which is not in a placed batch
            continue
        part = objective.parts.get(objective.part_of.get(key, key))
        shape = value.shape if part is None else part.placed_shape(value.shape)
        if shape != value.shape:
            batch[key] = torch.empty(count, *shape)
        elif value.dtype in (np.uint8, np.uint16) or np.issubdtype(value.dtype, np.floating):
            batch[key] = torch.empty(count, *value.shape)
        else:
            real[key] = np.stack([samples[i % different][key] for i in range(count)])
    for key, value in (real | collated(views(cfg, objective), real)).items():
        if np.issubdtype(value.dtype, np.floating):
            batch[key] = torch.empty(value.shape)
        else:
            with _disable_current_modes():
                batch[key] = torch.from_numpy(value)
    return batch


@contextlib.contextmanager
def _trace_environment(processes: int) -> Iterator[None]:
    """Context for a trace: a process group of the right size, and no random initialisation."""
    alone = processes > 1 and not dist.is_initialized()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # copying fake tensors warns
        for name in vars(
            nn.init
        ):  # some of these draw until all numbers are in a range, which never ends for fake ones
            if name.endswith("_") and not name.startswith("_"):
                stack.enter_context(unittest.mock.patch.object(nn.init, name, lambda tensor, *_, **__: tensor))
        if alone:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
            stack.callback(dist.destroy_process_group)
        yield


def run(cfg: Recipe, micro: int, accumulate: int, processes: int, share: dict[str, float]) -> Trace:
    """Train two steps of one process with `accumulate` micro-batches of `micro` samples. `share`: the share of each
    category of memory that the process holds.

    Raises ConfigError if the objective needs values of fake tensors, or has no micro-batches.
    """
    memory, real = Memory(share), _Real()
    with _trace_environment(processes), FakeTensorMode(allow_non_fake_inputs=True), real, memory:
        try:
            return _run(cfg, micro, accumulate, processes, memory, real)
        except (RuntimeError, NotImplementedError) as error:
            text = " ".join(str(error).split())[:200] or type(error).__name__
            raise ConfigError(
                f"objective.name = {cfg.objective.name}: cannot be planned without data ({text}), because its shapes"
                " depend on floating-point values; let them depend on integers or booleans of the batch"
            ) from None


def _enough_micro_batches(accumulate: int) -> int:
    """A smaller number of micro-batches with the same peak memory: the smallest divisor of `accumulate` above 1,
    because a queue of negatives accepts only divisors."""
    return next((n for n in range(2, accumulate + 1) if accumulate % n == 0), 1)


def _run(cfg: Recipe, micro: int, accumulate: int, processes: int, memory: Memory, real: _Real) -> Trace:
    from pretrain.build import build_objective

    objective = build_objective(cfg)
    accumulation(cfg, objective.is_coupled(), processes)  # refuses batch norms, which only the built objective shows
    if cfg.device == "cpu":
        kernels.apply(objective, torch.device("cpu"))
    else:
        kernels.replace(objective, FUSED if cfg.parallel.attention == "sdpa" else FUSED | WITHOUT_MASKS)
    blocks.prepare(objective, cfg.parallel.recompute, compiled=False)
    optimizer = make_optimizer(objective, cfg.optim)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    memory.mark(objective.parameters(), "teacher")
    memory.mark(trained, "parameters")
    for p in trained:
        p.register_post_accumulate_grad_hook(lambda p: memory.mark([p.grad], "gradients"))
    units = _units(objective)
    batch = example(cfg, objective, micro)
    traced = _enough_micro_batches(accumulate)
    for _ in range(2):  # in the second step, the optimizer has its state
        memory.reset_peak()
        real.take()
        for unit in units:
            unit.calls = 0
        flops = 0
        for _ in range(traced):
            with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
                with torch.autocast("cpu", COMPUTE[cfg.precision], enabled=cfg.precision != "fp32"):
                    loss, _ = objective(batch, 0)
                (loss / traced).backward()
            del loss
            flops = counter.get_total_flops()
        torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        of_loss = real.take()
        optimizer.step()
        exchanged = real.take().get("all-gather", 0)
        memory.mark((v for state in optimizer.state.values() for v in state.values()), "optimizer")
        optimizer.zero_grad(set_to_none=True)
        objective.after_step(0)
        of_update = real.take()
    for unit in units:
        unit.calls //= traced
    of_loss = {name: size // traced for name, size in of_loss.items()}
    # After a step, rows of all samples are gathered, but what is all-reduced are sums over the samples.
    rows = {name: size * accumulate // traced for name, size in of_update.items() if name != "all-reduce"}
    return Trace(units, flops, memory.at_peak, of_loss, of_update | rows, exchanged)


def _units(objective: Objective) -> list[Unit]:
    """The modules whose parameters a sharded engine gathers at once. Hooks count their calls."""
    seen: set[nn.Parameter] = set()
    units = []
    modules = objective.shard_units()
    kept = stay_gathered(modules)
    cast = {p for m in objective.modules() if isinstance(m, AUTOCAST) for p in m.parameters(recurse=False)}
    for module in modules:  # children before parents; a parent has the parameters that its children do not have
        new = [p for p in module.parameters() if p not in seen]
        seen.update(new)
        sizes = [sum(p.numel() for p in new if p.requires_grad is trained) for trained in (True, False)]
        unit = Unit(sizes[0], sizes[1], module in kept, sum(p.numel() for p in new if p in cast))
        units.append(unit)

        def count_call(*_: Any, unit: Unit = unit) -> None:
            unit.calls += 1

        module.register_forward_pre_hook(count_call)
    return units
