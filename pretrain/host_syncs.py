"""Finds host syncs without a GPU: operations for which the host waits until the device has finished all queued work.

In a training step the host runs ahead of the device and queues work for it. Some operations stop this: those that need
a value of the device on the host (`.item()`, `if x > 0`), whose result has a shape that depends on values (`x[mask]`,
`nonzero`), or that copy between pageable memory and the device (`torch.tensor(…, device=…)`). The device is then idle
until the host has queued work again.

`HostSyncs` is a dispatch mode over fake tensors, which have a shape, a dtype and the device "cuda", but no values, so
that no GPU is needed. It sees every operation of forward, backward and update, and records those that would wait, with
the line of the file that called them. It cannot see kernels that wait inside one operation; on a GPU, `forbidden` makes
such a wait an error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import linecache
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import FakeWork
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain import kernels
from pretrain.build import placed
from pretrain.objectives.base import Batch, Objective
from pretrain.optim.skip_steps import Guard
from pretrain.parallel.engine import Engine
from pretrain.recipes.recipe import Recipe
from pretrain.step import one_step

# {function that may wait for the device: reason}. None of them runs in every step.
ALLOWED = {
    "pretrain.metrics.Writer.flush": "every `log.every` steps, copies the scalars of these steps to the host at once",
    "pretrain.checkpoint.save.Saver.save": "every `checkpoint.every` steps, copies weights and optimizer state",
    "pretrain.run_exports.write_exports": "every `export.every` steps, copies the weights of the exported networks",
}
DEVICE = torch.device("cuda", 0)  # the device of the fake tensors

aten = torch.ops.aten
READS = {bool: True, int: 1, float: 1.0, complex: 1.0}  # {type: value that a read of a fake tensor returns}
VALUES = {aten._local_scalar_dense.default, aten.equal.default}  # operations that read a value
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# Operations without a tag of torch whose CUDA kernels copy a status or a size to the host.
WAITING = {aten._linalg_check_errors.default, aten._unique2.default, aten.masked_scatter.default}
STATIC = {aten.nonzero_static.default, aten.nonzero_static.out}  # the size of their result is an argument
TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Sync:
    """One host sync: why the host waits, and the stack as (file, line number), the innermost line first."""

    reason: str
    lines: tuple[tuple[str, int], ...]

    def place(self, file: str = "") -> str:
        """The innermost line of the stack as text. If the stack has lines of `file`: the innermost of these, followed
        by the line that waits."""
        inner = self.lines[0]
        own = next((line for line in self.lines if Path(line[0]) == Path(file)), inner) if file else inner
        code = linecache.getline(*own).strip()
        called = "" if own == inner else f", which calls {Path(inner[0]).name}, line {inner[1]}"
        return f"{Path(own[0]).name}, line {own[1]}{called}: {code}"

    def __str__(self) -> str:
        return f"{self.place()}: {self.reason}"


class HostSyncs(TorchDispatchMode):
    """Records host syncs in `found`. After each, the operation returns a made-up result: true, 1, or all positions of a
    mask. Enter this mode inside a `FakeTensorMode`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Sync] = []
        self._pinned: set[StorageWeakRef] = set()

    def pinned(self, tensor: Tensor) -> Tensor:
        """Mark a tensor on the host as being in pinned memory. Returns it."""
        self._pinned.add(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.is_pinned.default:
            return self._is_pinned(args[0])
        if func is aten._pin_memory.default:
            return self.pinned(args[0].clone())
        if func.namespace == "c10d":  # a collective does not make the host wait, and cannot run here
            return args[0], FakeWork().boxed()
        reason = self._reason(func, args, kwargs)
        if reason:
            self._note(reason)
        if reason or func in VALUES:  # a fake tensor on the host has no values, either
            return _as_if_answered(func, args, kwargs)
        return func(*args, **kwargs)

    def _is_pinned(self, tensor: Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()) in self._pinned

    def _note(self, reason: str) -> None:
        lines, allowed = _stack(sys._getframe(2))
        sync = Sync(reason, lines)
        if not allowed and sync not in self.found:
            self.found.append(sync)

    def _reason(self, func: Any, args: Any, kwargs: Any) -> str:
        """Why an operation would wait for the device; "" if it would not."""
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            return self._copy(args[0], torch.device(kwargs["device"]), bool(kwargs.get("non_blocking")))
        if func is aten.copy_.default:
            return self._copy(args[1], args[0].device, bool(kwargs.get("non_blocking") or args[2:] == (True,)))
        if not _may_wait(func):
            return ""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(map(_on_device, tensors)) or kwargs.get("output_size") is not None:
            return ""
        if func in INDEXING:
            return _indexing(func, args)
        if torch.Tag.data_dependent_output in func.tags:
            return "the host reads a value of the device"
        return f"{func.overloadpacket.__name__}: the host waits for the size of the result"

    def _copy(self, source: Tensor, target: torch.device, non_blocking: bool) -> str:
        if _on_device(source) == (target.type == DEVICE.type):
            return ""
        if _on_device(source):
            return "a copy from the device to the host"
        if not self._is_pinned(source):
            return "a copy from pageable memory to the device"
        return "" if non_blocking else "a copy to the device without non_blocking=True"


@functools.cache
def _may_wait(func: Any) -> bool:
    """Whether an operation waits for the device with some arguments. Copies are not included."""
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return func in INDEXING | WAITING or (func not in STATIC and not tags.isdisjoint(func.tags))


def _on_device(tensor: Tensor) -> bool:
    return tensor.device.type == DEVICE.type


def _indexing(func: Any, args: Any) -> str:
    """Why `x[indices]`, or an assignment to it, waits."""
    indices = [i for i in args[1] if i is not None]
    if any(i.device.type == "cpu" and i.ndim for i in indices):
        return "indices on the host are copied to the device"
    masks = [i for i in indices if i.dtype in (torch.bool, torch.uint8)]
    if not masks:
        return ""
    filled = func is not aten.index.Tensor and args[2].numel() == 1 and args[2].device.type == "cpu"
    if filled and len(masks) == len(indices):
        return ""  # x[mask] = number is masked_fill
    return "indexing by a mask: the host waits for the number of places where it is true"


def _as_if_answered(func: Any, args: Any, kwargs: Any) -> Any:
    """A made-up result of an operation that waits, for which all values on the device are true or 1."""
    if func is aten._local_scalar_dense.default:
        return READS[bool if args[0].dtype == torch.bool else float if args[0].is_floating_point() else int]
    if func is aten.equal.default:
        return True
    if func is aten.nonzero.default:
        return args[0].new_zeros((args[0].numel(), args[0].ndim), dtype=torch.long)
    if func is aten.masked_select.default:
        return args[0].expand(torch.broadcast_shapes(args[0].shape, args[1].shape)).flatten().clone()
    if func in INDEXING:
        indices: list[Tensor | None] = []
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                indices += [args[0].new_zeros(index.numel(), dtype=torch.long) for _ in range(index.ndim)]
            else:
                indices.append(None if index is None else index.to(args[0].device))
        return func(args[0], indices, *args[2:], **kwargs)
    return func(*args, **kwargs)


def _stack(frame: FrameType | None) -> tuple[tuple[tuple[str, int], ...], bool]:
    """(stack of `frame` without lines of torch, the innermost first; whether one of its functions is in ALLOWED)."""
    lines, allowed = [], False
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(TORCH) and file != __file__:
            lines.append((file, frame.f_lineno))
            allowed |= f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}" in ALLOWED
        frame = frame.f_back
    return tuple(lines), allowed


# ---------------------------------------------------------------- a training step on the fake device
@contextlib.contextmanager
def fake_device() -> Iterator[HostSyncs]:
    """Within the context, tensors are fake, `DEVICE` can be used without a GPU, and host syncs are recorded. Objects
    that were created in the context cannot be used afterwards."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # of CUDA that is not there
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(mock.patch.object(torch.autograd, "backward", _backward))
        stack.enter_context(mock.patch.object(nn.Module, "to", _to))
        # autocast is as on a GPU
        stack.enter_context(mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        stack.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True))
        # On a machine with a GPU, a trial of a kernel would compute with fake tensors, and its result would be cached.
        stack.enter_context(mock.patch.object(kernels, "unusable", lambda *_: "cannot be tried with fake tensors"))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(HostSyncs())


def _backward(root: Tensor, *_: Any, **__: Any) -> None:
    """`torch.autograd.backward` of a scalar, node by node in Python, because PyTorch's engine needs the context of a
    real device."""
    seen, waiting, uses = {root.grad_fn}, [root.grad_fn], Counter[Any]()
    while waiting:
        for node, _ in waiting.pop().next_functions:  # type: ignore[union-attr]
            uses[node] += 1
            if node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    given: dict[Any, dict[int, Tensor]] = {root.grad_fn: {root.output_nr: torch.ones_like(root)}}
    ready: list[Any] = [root.grad_fn]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            gradients = _apply(node, given.pop(node, {}))
            for (after, place), gradient in zip(node.next_functions, gradients, strict=False):
                if after is None:
                    continue
                if gradient is not None:
                    about = after._input_metadata[place]
                    gradient = gradient.sum_to_size(about.shape).to(about.dtype)  # undo broadcasts and casts
                    held = given.setdefault(after, {})
                    held[place] = held[place] + gradient if place in held else gradient
                uses[after] -= 1
                if not uses[after]:
                    ready.append(after)


def _apply(node: Any, given: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs of a node of the graph. `given`: the gradients of its outputs, by number."""
    about = node._input_metadata  # of each output of the forward
    inputs = [given.get(place) for place in range(len(about))]
    if hasattr(node, "variable"):  # AccumulateGrad
        (gradient,) = inputs
        if gradient is not None:
            leaf = node.variable
            leaf.grad = gradient.detach() if leaf.grad is None else leaf.grad + gradient
        return ()
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # of a Function in Python, which gets no None
        gradients = node.apply(*(g if g is not None else _zeros(a) for g, a in zip(inputs, about, strict=True)))
    else:
        gradients = node(*inputs)
    return gradients if isinstance(gradients, tuple) else (gradients,)


def _zeros(about: Any) -> Tensor:
    return torch.zeros(about.shape, dtype=about.dtype, device=about.device)


def _to(module: nn.Module, device: torch.device) -> nn.Module:
    """Replaces `module.to(device)`: real parameters become fake ones on the device, and shared ones stay shared."""
    known: dict[int, Tensor] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    trained = isinstance(tensor, nn.Parameter)
                    known[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if trained else empty
                held[name] = known[id(tensor)]  # type: ignore[assignment]
    return module


def of_steps(objective: Objective, recipe: Recipe, batch: Batch) -> list[Sync]:
    """The host syncs of a training step in bf16: placing the batch, forward, backward, update, `after_step`. Those of
    the second step are returned, because the first may create constants. If the first step fails after a host sync, its
    own are returned.

    `batch`: a micro-batch of the stream, on the host. The objective cannot be used afterwards.
    """
    recipe = recipe.replace(precision="bf16")
    with fake_device() as syncs:
        engine = Engine(objective.train(), recipe, DEVICE)
        guard = Guard(objective, recipe.skip, DEVICE)
        held = {key: syncs.pinned(torch.empty(value.shape, dtype=value.dtype)) for key, value in batch.items()}
        placed(objective, held, DEVICE)
        for step in range(2):
            syncs.found.clear()
            try:
                batch = placed(objective, held, DEVICE)
                one_step(engine, guard, [batch], step, recipe.optim.lr(step), recipe.optim.weight_decay(step))
            except Exception:
                if not syncs.found:
                    raise
                break  # a made-up result did not fit
            if not syncs.found:
                break  # the second step has none, either
    return syncs.found


# ---------------------------------------------------------------- on a real GPU
@contextlib.contextmanager
def forbidden() -> Iterator[None]:
    """Within the context, a host sync of a real CUDA device raises RuntimeError, except in the functions of ALLOWED."""
    with contextlib.ExitStack() as stack:
        for name in ALLOWED:
            owner, _, attribute = name.rpartition(".")
            holder = _resolve(owner)
            stack.enter_context(mock.patch.object(holder, attribute, _free(getattr(holder, attribute))))
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        stack.callback(torch.cuda.set_sync_debug_mode, before)
        yield


def _resolve(dotted: str) -> Any:
    """A module, or a class in one, by its dotted name."""
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        module, _, name = dotted.rpartition(".")
        return getattr(importlib.import_module(module), name)


def _free(function: Any) -> Any:
    """The function, with host syncs allowed while it runs."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return call
