"""A recipe's own objective, trained for two steps without memory or data: what it computes, keeps, and sends to other processes.

Floats are fake tensors, which have a shape and no values. Integers and booleans are real, so that the shapes which masks and kept patches decide are
those of a real step; the batch is what the objective's views make of noise.
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
from torch import Tensor, nn
from torch._C._distributed_c10d import FakeWork
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from pretrain.config import ConfigError
from pretrain.inputs import of_noise
from pretrain.models import fused, text_mlp
from pretrain.objectives.base import Objective
from pretrain.ops import cross_entropy
from pretrain.ops.products import elsewhere, fp32_is_faster, onednn
from pretrain.optim import make_optimizer
from pretrain.parallel import blocks
from pretrain.parallel.engine import COMPUTE
from pretrain.recipe import Recipe

SAMPLES = 16  # whose views are made to learn the shapes; larger batches repeat them
CATEGORIES = ("parameters", "casts", "gradients", "optimizer", "teacher", "activations")
aten, c10d = torch.ops.aten, torch.ops.c10d
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COLLECTIVES = {  # operation -> (its name, which argument is the whole tensor)
    c10d.allreduce_.default: ("all-reduce", 0),
    c10d._allgather_base_.default: ("all-gather", 0),
    c10d._reduce_scatter_base_.default: ("reduce-scatter", 1),
}


@dataclass
class Unit:
    """A module that a sharded engine gathers at once: its own parameters, and how often a micro-batch calls it."""

    trained: int  # parameters
    frozen: int
    calls: int = 0


@dataclass
class Trace:
    """What a process does in a step. Bytes are at the moment when most of them are needed, shared out as `share` of `run` says."""

    units: list[Unit]
    flops: int
    memory: dict[str, int]
    collectives: dict[str, int] = field(default_factory=dict)  # bytes of those that the objective itself asks for


class _Real(TorchDispatchMode):
    """Above the fake mode: what no fake tensor goes into is computed really, so integers keep their values. Nothing crosses processes."""

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
        if func in INDEXING:  # a mask, as the places where it is true
            places = [i if i is None or i.dtype != torch.bool else _places(i) for i in args[1]]
            args = (args[0], [each for i in places for each in (i if isinstance(i, tuple) else (i,))], *args[2:])
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


def _places(mask: Tensor) -> Tensor | tuple[Tensor, ...]:
    if isinstance(mask, FakeTensor):
        return mask
    with _disable_current_modes():
        return mask.nonzero(as_tuple=True)


class Memory(TorchDispatchMode):
    """Bytes of all storages that are alive, by category, and what they were when most were needed, each category taken `share` times.

    torch's MemTracker finds the same peaks, but refuses frozen modules and knows no shares; see docs/negative_results.md.
    """

    def __init__(self, share: dict[str, float]) -> None:
        super().__init__()
        self.share = share
        self.alive: dict[int, tuple[weakref.ref, int, str]] = {}  # by address
        self.now = dict.fromkeys(CATEGORIES, 0)
        self.forget()

    def forget(self) -> None:
        """Begin anew with the peak."""
        self.peak, self.at_peak = 0.0, dict(self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        cast = func is aten._to_copy.default and self._of(args[0]) in ("parameters", "teacher")
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.see(value, "casts" if cast else "activations")
        return out

    def see(self, tensor: Tensor, category: str) -> None:
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
        """Put what these tensors hold into a category."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self.see(tensor, category)
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


def _product(x, *_, out_shape, **__) -> int:
    return 2 * x[-1] * out_shape.numel()


FLOPS = {  # of the CPU's kernels, which torch's counter does not know
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
if onednn is not None:
    FLOPS[onednn] = _product


def example(cfg: Recipe, objective: Objective, count: int) -> dict[str, Tensor]:
    """A micro-batch that the objective's views made of noise, as the device sees it. Call it under the fake mode: floats and images are fake."""
    made = min(count, SAMPLES)
    parts = of_noise(cfg, objective, made)
    batch = {}
    for key, value in parts[0].items():
        if value.dtype == np.uint8 or np.issubdtype(value.dtype, np.floating):
            batch[key] = torch.empty(count, *value.shape)
        else:
            with _disable_current_modes():
                batch[key] = torch.from_numpy(np.stack([parts[i % made][key] for i in range(count)]))
    return batch


@contextlib.contextmanager
def _setting(cfg: Recipe, processes: int) -> Iterator[None]:
    """What a trace needs around it: the right number of processes, no numbers drawn, and the attention of the recipe's device."""
    alone = processes > 1 and not dist.is_initialized()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # of copies of fake tensors
        for name in vars(nn.init):  # it draws until numbers fit, which fake ones never do
            if name.endswith("_") and not name.startswith("_"):
                stack.enter_context(unittest.mock.patch.object(nn.init, name, lambda tensor, *_, **__: tensor))
        # one piece instead of hundreds, each of which would cost Python's time
        stack.enter_context(unittest.mock.patch.object(fused, "pieces", lambda size, *tensors: [tensors]))
        stack.enter_context(unittest.mock.patch.object(cross_entropy, "CACHED", 1 << 62))
        stack.enter_context(unittest.mock.patch.object(text_mlp, "ROWS", 4096))
        if cfg.device != "cpu":
            stack.enter_context(elsewhere())
        if alone:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
            stack.callback(dist.destroy_process_group)
        yield


def run(cfg: Recipe, micro: int, accumulate: int, processes: int, share: dict[str, float]) -> Trace:
    """Train two steps of one process with `accumulate` micro-batches of `micro` samples; `share` of each category is what this process holds.

    Raises ConfigError where the objective asks fake tensors for values.
    """
    memory, real = Memory(share), _Real()
    fp32_is_faster()  # measured while tensors have numbers
    with _setting(cfg, processes), FakeTensorMode(allow_non_fake_inputs=True), real, memory:
        try:
            return _run(cfg, micro, min(accumulate, 2), memory, real)
        except (RuntimeError, NotImplementedError) as error:
            text = " ".join(str(error).split())[:200] or type(error).__name__
            raise ConfigError(
                f"objective.name = {cfg.objective.name}: cannot be planned without data ({text}); its shapes depend on floats; let them depend on integers or booleans of the batch"
            ) from None


def _run(cfg: Recipe, micro: int, accumulate: int, memory: Memory, real: _Real) -> Trace:
    from pretrain.train import build_objective

    objective = build_objective(cfg)
    blocks.prepare(objective, cfg.parallel.recompute, compiled=False)
    optimizer = make_optimizer(objective, cfg.optim)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    memory.mark(objective.parameters(), "teacher")
    memory.mark(trained, "parameters")
    for p in trained:
        p.register_post_accumulate_grad_hook(lambda p: memory.mark([p.grad], "gradients"))
    units = _units(objective)
    batch = example(cfg, objective, micro)
    for _ in range(2):  # from the second on, the optimizer has its state
        memory.forget()
        real.collectives = {}
        for unit in units:
            unit.calls = 0
        flops = 0
        for _ in range(accumulate):
            with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
                with torch.autocast("cpu", COMPUTE[cfg.precision], enabled=cfg.precision != "fp32"):
                    loss, _ = objective(batch, 0)
                (loss / accumulate).backward()
            del loss
            flops = counter.get_total_flops()
        torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        optimizer.step()
        memory.mark((v for state in optimizer.state.values() for v in state.values()), "optimizer")
        optimizer.zero_grad(set_to_none=True)
        objective.after_step(0)
    for unit in units:
        unit.calls //= accumulate
    asked = {name: size // accumulate for name, size in real.collectives.items()}
    return Trace(units, flops, memory.at_peak, asked)


def _units(objective: Objective) -> list[Unit]:
    """What a sharded engine gathers at once, with counters of calls."""
    seen: set[nn.Parameter] = set()
    units = []
    for module in objective.shard_units():  # children before parents: each has what those before it left
        own = [p for p in module.parameters() if p not in seen]
        seen.update(own)
        unit = Unit(sum(p.numel() for p in own if p.requires_grad), sum(p.numel() for p in own if not p.requires_grad))
        module.register_forward_pre_hook(lambda *_, unit=unit: setattr(unit, "calls", unit.calls + 1))  # type: ignore[misc]
        units.append(unit)
    return units
