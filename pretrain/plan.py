"""Plan: what a recipe takes, known before it runs: parameters, FLOPs, memory by category, hours. `unlabeled plan RECIPE` prints it.

The recipe's own objective is built and trained for two steps under fake tensors, which have shapes but no memory, on a batch that its own views made of
noise. What the data decide (masks, kept patches) is carried along as real numbers, so the shapes that follow from it are those of a real step.
"""

from __future__ import annotations

import contextlib
import math
import unittest.mock
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from pretrain.config import ConfigError
from pretrain.objectives.base import Objective
from pretrain.optim import make_optimizer
from pretrain.parallel.engine import accumulation
from pretrain.peak import PEAKS, peak_of
from pretrain.recipe import Recipe

SAMPLES = 16  # whose views are made to learn the shapes; larger batches repeat them
FACTS = 1 << 24  # numbers that an integer tensor may have to be carried along
aten = torch.ops.aten
DECIDED_BY_VALUES = {aten.nonzero.default, aten.repeat_interleave.Tensor}  # their output's shape


@dataclass
class Plan:
    """Bytes are of one process that holds everything; FLOPs of a step over the global batch."""

    trained: int  # parameters
    frozen: int  # of the teacher
    flops: int
    batch: int
    micro: int
    memory: dict[str, int] = field(default_factory=dict)  # by category, at the moment when their sum is largest

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


class _Facts(TorchDispatchMode):
    """Above the fake mode: computes integer and boolean tensors really, wherever all that they come from is known."""

    def __init__(self) -> None:
        super().__init__()
        self.known: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()

    def learn(self, fake: Tensor, real: Tensor) -> None:
        self.known[fake.untyped_storage()] = real.untyped_storage()  # type: ignore[assignment]

    def real(self, fake: Tensor) -> Tensor | None:
        constant = getattr(fake, "constant", None)  # of torch.tensor([...])
        if constant is not None:
            return constant
        storage: Any = self.known.get(fake.untyped_storage())
        if storage is None:
            return None
        with _outside():
            plain = torch.empty(0, dtype=fake.dtype).set_(storage)
            return plain.as_strided(fake.shape, fake.stride(), fake.storage_offset())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func is aten.index.Tensor:
            return func(
                args[0], [self._positions(i) for i in args[1]] if len(args[1]) > 1 else self._unfold(args[1][0])
            )
        facts = [self.real(x) if not x.is_floating_point() else None for x in inputs]
        settled = all(f is not None for f in facts)
        if func in DECIDED_BY_VALUES and settled:
            with _outside():
                found = func(facts[0]).contiguous()
            out = torch.empty(found.shape, dtype=found.dtype, device=args[0].device)
            self.learn(out, found)
            return out
        if func is aten._local_scalar_dense.default and settled:
            with _outside():
                return facts[0].item()
        out = func(*args, **kwargs)
        plain = isinstance(out, Tensor) and not out.is_floating_point() and out.numel() <= FACTS
        if plain and settled and out.untyped_storage() not in self.known:
            reals = iter(facts)
            with _outside():
                a, k = tree_map_only(
                    Tensor, lambda _: next(reals), (args, {**kwargs, "device": "cpu"} if "device" in kwargs else kwargs)
                )
                found = func(*a, **k)
                found = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype).copy_(found)
            self.learn(out, found)
        elif settled and inputs and func._schema.is_mutable and self.real(inputs[0]) is not None:
            reals = iter(facts)
            with _outside():
                a, k = tree_map_only(Tensor, lambda _: next(reals), (args, kwargs))
                func(*a, **k)
        return out

    def _positions(self, index: Tensor | None) -> Tensor | None:
        return self._unfold(index)[0] if index is not None and index.dtype == torch.bool else index

    def _unfold(self, index: Tensor | None) -> list[Tensor | None]:
        """A boolean index as the integer ones that it stands for."""
        if index is None or index.dtype != torch.bool:
            return [index]
        real = self.real(index)
        if real is None:
            return [index]
        with _outside():
            count = int(real.sum())
        return [torch.zeros_like(index, dtype=torch.int64).new_zeros(count) for _ in range(index.ndim)]


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    """Real tensors, whatever modes are on."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


class _Memory(TorchDispatchMode):
    """Bytes of all storages that are alive, and what they were when there were most."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[int, int] = {}  # of storages that are alive; addresses are used again, numbers are not
        self.alive: dict[int, int] = {}  # number -> bytes
        self.total = self.peak = self.count = 0
        self.at_peak: dict[int, int] = {}
        self.gradients: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.see(value)
        return out

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.numbers:
            return
        self.count += 1
        size = int(storage.nbytes())
        self.numbers[storage._cdata], self.alive[self.count] = self.count, size
        self.total += size
        weakref.finalize(storage, self._gone, storage._cdata, self.count)
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.alive)

    def _gone(self, address: int, number: int) -> None:
        del self.numbers[address]
        self.total -= self.alive.pop(number)

    def of(self, tensors: Iterable[Any]) -> set[int]:
        """The numbers of their storages."""
        return {self.numbers[t.untyped_storage()._cdata] for t in tensors if isinstance(t, Tensor)}


def example(cfg: Recipe, objective: Objective, count: int) -> dict[str, Tensor]:
    """A micro-batch that the objective's views made of noise, as the device sees it: images as floats."""
    body = objective.encoder()
    views = type(objective).views(cfg.objective, body.image_size, body.patch_size)
    rng = np.random.default_rng(0)
    side = max(64, int(1.2 * body.image_size))
    parts = []
    for n in range(min(count, SAMPLES)):
        image = rng.integers(0, 256, (side, side, cfg.model.in_channels), dtype=np.uint8)
        sample = {"image": image, "id": n, "epoch": 0, "slot": n, "batch": count, "step": 0, "seed": cfg.seed}
        parts.append(views(sample, lambda k, n=n: np.random.default_rng([n, k])))  # type: ignore[misc]
    repeat = [parts[i % len(parts)] for i in range(count)]
    return {key: torch.from_numpy(np.stack([part[key] for part in repeat])) for key in parts[0]}


@contextlib.contextmanager
def _without_values() -> Iterator[None]:
    """Initialisation draws numbers until they fit, which fake tensors cannot."""
    with contextlib.ExitStack() as stack:
        for name in ("trunc_normal_", "normal_", "uniform_", "xavier_uniform_", "kaiming_normal_", "kaiming_uniform_"):
            stack.enter_context(unittest.mock.patch.object(nn.init, name, lambda tensor, *_, **__: tensor))
        yield


def _attention(query, key, value, *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad, query, key, value, *_, **__) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


ATTENTION = {  # the CPU's kernels, which torch's counter does not know
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def trace(cfg: Recipe) -> Plan:
    """Train two steps under fake tensors. Raises ConfigError where the objective asks fake tensors for values that nothing settles."""
    from pretrain.train import build_objective

    memory, facts = _Memory(), _Facts()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, _without_values(), memory:
        objective = build_objective(cfg)
        optimizer = make_optimizer(objective, cfg.optim)
        accumulate = accumulation(cfg, objective.couples_batch)
        micro = cfg.data.batch // accumulate
        with _outside():
            real = example(cfg, objective, micro)
        try:
            flops = _steps(cfg, fake, facts, memory, objective, optimizer, real, accumulate)
        except (RuntimeError, NotImplementedError) as error:
            text = " ".join(str(error).split())[:200] or type(error).__name__
            raise ConfigError(
                f"objective.name = {cfg.objective.name}: cannot be planned without data ({text})"
            ) from None
        trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in objective.parameters() if not p.requires_grad)
        out = Plan(trained, frozen, flops, cfg.data.batch, micro)
        out.memory = _by_category(memory, objective, optimizer)
    return out


def _steps(cfg, fake, facts, memory, objective, optimizer, real, accumulate) -> int:
    """FLOPs of a step; `memory` has seen two, of which the second has the optimizer's state."""
    batch = {}
    for key, value in real.items():
        value = value.float() if value.dtype == torch.uint8 else value
        batch[key] = fake.from_tensor(value)
        memory.see(batch[key])
        if not value.is_floating_point():
            facts.learn(batch[key], value)
    del real
    for _ in range(2):
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter, facts:
            for _ in range(min(accumulate, 2)):
                with torch.autocast("cpu", torch.bfloat16, enabled=cfg.precision == "bf16"):
                    loss, _ = objective(batch, 0)
                (loss / accumulate).backward()
                del loss
            flops = counter.get_total_flops() // min(accumulate, 2)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        memory.gradients = memory.of(p.grad for p in parameters)
        torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.after_step(0)
    return flops * accumulate


def _by_category(memory: Any, objective: Objective, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    sets = {
        "parameters": memory.of(p for p in objective.parameters() if p.requires_grad),
        "teacher": memory.of(p for p in objective.parameters() if not p.requires_grad),
        "optimizer": memory.of(v for state in optimizer.state.values() for v in state.values()),
    }
    out = {name: sum(memory.at_peak.get(k, 0) for k in found) for name, found in sets.items()}
    gradients = memory.gradients & memory.at_peak.keys()
    out["gradients"] = sum(memory.at_peak[k] for k in gradients)
    out["activations"] = sum(memory.at_peak.values()) - sum(out.values())
    return out


def describe(cfg: Recipe, device: str, mfu: float, count: int = 1) -> list[str]:
    """The lines of `unlabeled plan`. Raises ConfigError for a device that the table does not have."""
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu}: write a share of the peak, such as 0.4")
    if count < 1:
        raise ConfigError(f"--count {count}: write 1 or more devices")
    precision = "bf16" if cfg.precision == "auto" else cfg.precision
    peak = peak_of(device, precision)
    if peak is None:
        raise ConfigError(f"--device {device}: not known; known: {', '.join(PEAKS)}")
    cfg.precision = precision  # type: ignore[assignment]
    plan = trace(cfg)
    hours = plan.flops * cfg.steps / (peak * mfu * count) / 3600
    gigabytes = {name: size / 2**30 for name, size in plan.memory.items()}
    whole = f" and {plan.frozen / 1e6:.1f} M of a teacher" if plan.frozen else ""
    return [
        f"{cfg.objective.name} on {cfg.model.name}, {precision}",
        f"parameters   {plan.trained / 1e6:.1f} M trained{whole}",
        f"a step       {plan.batch} samples in micro-batches of {plan.micro}, {plan.flops / 1e12:.3g} TFLOP",
        f"the run      {cfg.steps} steps, {cfg.steps * plan.batch / 1e6:.3g} M samples, {cfg.steps * plan.flops / 1e18:.3g} EFLOP",
        f"time         {_hours(hours)} on {count} × {device} at {mfu:.0%} of {peak / 1e12:.0f} TFLOP/s",
        f"memory       {plan.peak / 2**30:.2f} GiB on one device: {', '.join(f'{n} {g:.2f}' for n, g in gigabytes.items())}",
    ]


def _hours(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{math.ceil(hours * 60)} minutes"
