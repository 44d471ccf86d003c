"""No training step waits for the device: on a fake CUDA device, without a GPU, no operation of a step is a host
sync. `pretrain/host_syncs.py` finds them. First these tests check that it finds each kind of host sync and nothing
else; then that no objective and no step of the loop has one, except in the functions of `host_syncs.ALLOWED`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, is_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from data_pipeline.stream import stream as stream_module
from data_pipeline.stream.stream import Stream
from pretrain import contract, host_syncs, kernels
from pretrain.build import build_objective, build_stream, open_samples
from pretrain.host_syncs import ALLOWED, DEVICE, HostSyncs, fake_device, of_steps
from pretrain.kernels import flex_attention, packed_attention
from pretrain.loop_step import train_step
from pretrain.metrics import Clock, Writer
from pretrain.objectives import finder
from pretrain.optim.skip_steps import Guard
from pretrain.parallel import processes
from pretrain.parallel.engine import Engine
from pretrain.signals import Stop
from tests.conftest import QUICK, folder_of, sampled, tiny_recipe

CPU = torch.device("cpu")
NAMES = finder.names()


# ---------------------------------------------------------------- what is seen
def on_device(*shape: int) -> Tensor:
    return torch.ones(shape, device=DEVICE, requires_grad=True)


class Reads(torch.autograd.Function):
    """A function whose backward reads a value."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad * float(grad.sum())


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: 1 if x.sum() > 0 else 2,
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to host, not blocking": lambda x: x.to("cpu", non_blocking=True),
    "from the host": lambda x: x + torch.ones(4).to(DEVICE),
    "from the host, not blocking": lambda x: x + torch.ones(4).to(DEVICE, non_blocking=True),
    "from pinned memory, blocking": lambda x: x + torch.ones(4).pin_memory().to(DEVICE),
    "copy_ from the host": lambda x: torch.empty_like(x).copy_(torch.ones(4)),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "scalar tensor": lambda x: torch.tensor(1.0, device=x.device),
    "as_tensor": lambda x: torch.as_tensor(3, device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "a list as index": lambda x: x[[0, 1]],
    "indices on the host": lambda x: x[torch.tensor([0, 1])],
    "nonzero": lambda x: x.nonzero(),
    "where of one argument": lambda x: torch.where(x > 0),
    "mask as index": lambda x: x[x > 0],
    "assignment by a mask": lambda x: torch.zeros_like(x).index_put_((x > 0,), x.detach()),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.long, device=x.device)),
    "bincount": lambda x: torch.bincount(torch.zeros(4, dtype=torch.long, device=x.device)),
    "one_hot": lambda x: torch.nn.functional.one_hot(torch.zeros(4, dtype=torch.long, device=x.device)),
    "inverse": lambda x: torch.linalg.inv(x.outer(x)),
    "arange to a value": lambda x: torch.arange(x.sum().long(), device=x.device),
    "backward": lambda x: Reads.apply(x).sum().backward(),
}  # fmt: skip


def waits(act: Callable[[Tensor], object]) -> list[host_syncs.Sync]:
    with fake_device() as syncs:
        x = on_device(4)
        with contextlib.suppress(Exception):  # of a result whose shape cannot be known: it has been noted before
            act(x)
    return syncs.found


@pytest.mark.parametrize("name", WAITS)
def test_every_kind_of_host_sync_is_seen(name: str):
    found = waits(WAITS[name])
    assert found and Path(found[0].lines[0][0]) == Path(__file__), found
    assert "test_syncs.py, line" in str(found[0])


def free(x: Tensor) -> None:
    """None of these operations waits."""
    drawn = torch.rand(4).pin_memory().to(DEVICE, non_blocking=True)
    y = x * 2.0 + torch.full((), 3.0, device=x.device) + torch.zeros(4, device=x.device) + torch.tensor(2.0) + drawn
    mask = y > 0
    y = torch.where(mask, y, 0.0).masked_fill(~mask, 1.0)
    z = y.detach().clone()
    z[mask] = 0.0
    z[1:] = 2.0
    indices = mask.to(torch.uint8).argsort(stable=True)
    picked = y[indices] + y.index_select(0, indices) + y.gather(0, indices) + y[None, :2].sum()
    picked.repeat_interleave(2).topk(2).values.sum().backward()
    torch.randperm(4, device=x.device)
    torch.nn.functional.one_hot(indices, 4)
    torch.nonzero_static(mask, size=4)


def test_what_does_not_wait_is_not_taken_for_a_host_sync():
    with fake_device() as syncs:
        free(on_device(4))
    assert not syncs.found, "\n".join(map(str, syncs.found))


def test_a_line_is_named_once_with_what_it_calls(tmp_path: Path):
    """The line in the author's file, and the line below it that waits."""

    def helper(x: Tensor) -> float:
        return x.sum().item()

    def author(x: Tensor) -> float:
        return helper(x) + helper(x)

    found = waits(author)
    assert len({sync.place() for sync in found}) == 1 and "return x.sum().item()" in found[0].place()
    assert "reads a value" in str(found[0])


# ---------------------------------------------------------------- objectives
@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A process group of two ranks, of which only this one exists; the collectives of losses and batch norm are
    called."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


SMALL = ["model.depth=1"]  # a second block does what the first one does
OBJECTIVES = {name: (name, SMALL) for name in NAMES} | {"batch norm": ("simclr", ["model=resnet_micro"])}


@pytest.mark.parametrize("name", sampled(OBJECTIVES, *QUICK, "batch norm", others=pytest.mark.slow))
def test_no_objective_has_a_host_sync(name: str, shards: Path, request: pytest.FixtureRequest):
    """Placing a batch, forward, backward, update and `after_step`, with each variant of its options."""
    objective, own = OBJECTIVES[name]
    sizes = contract.tiny(objective, lambda kind: folder_of(kind, shards))
    made = [contract.build_case(objective, [*sizes[0], *variant, *own]) for variant in [[], *sizes[1:]]]
    request.getfixturevalue("two_ranks")
    found = [sync for one in made for sync in of_steps(one.objective, one.recipe, one.host_batch)]
    assert not found, "\n".join(map(str, found))


ATTENTION = [
    ("xformers", "dinov3", []),
    ("varlen", "dinov3", []),
    ("flex", "dinov3", []),
    ("flex", "gpt", ["model.windows=[8,0]"]),
    ("flex", "bert", []),
    ("flex", "t5", []),
]


@pytest.mark.parametrize(
    ("library", "name", "own"), ATTENTION, ids=lambda value: value if isinstance(value, str) else ""
)
def test_no_mask_of_a_kernel_has_a_host_sync(
    library: str, name: str, own: list[str], shards: Path, monkeypatch: pytest.MonkeyPatch
):
    """Crops of several sizes with every library; documents, windows and relative positions with FlexAttention, as
    `auto` chooses. Operations that need a GPU are omitted, because only the masks could wait."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
        called.append(q)
        return q + k.mean() + v.mean()

    called: list[Tensor] = []
    if library == "xformers":
        monkeypatch.setattr(pytest.importorskip("xformers.ops"), "memory_efficient_attention", attend)
        # which needs a driver for pinned memory
        place = "xformers.ops.fmha.attn_bias._to_device_tensor"
        monkeypatch.setattr(place, lambda seq, dtype, device: torch.tensor(seq, dtype=dtype, device=device))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attend)
    monkeypatch.setattr(flex_attention, "attention", attend)
    made = contract.build_case(name, [*contract.tiny(name, lambda kind: folder_of(kind, shards))[0], *SMALL, *own])
    kernels.replace(made.objective, kernels.attention_kernels(library))
    caches: Any = (flex_attention.packed_mask.__wrapped__, packed_attention.block_diagonal, packed_attention.borders)
    for cache in caches:
        cache.cache_clear()
    found = of_steps(made.objective, made.recipe, made.host_batch)
    for cache in caches:  # of fake masks
        cache.cache_clear()
    assert called and not found, "\n".join(map(str, found))


# ---------------------------------------------------------------- the loop
class FakeStream:
    """A real stream whose batches become fake tensors in pinned memory."""

    def __init__(self, stream: Stream, syncs: HostSyncs):
        self.stream, self.syncs, self.workers = stream, syncs, 1

    def __next__(self) -> dict[str, Tensor]:
        with _disable_current_modes():
            batch = next(self.stream)
        return {k: self.syncs.pinned(torch.empty(v.shape, dtype=v.dtype)) for k, v in batch.items() if is_tensor(v)}


VIEWS = ["data.color=device", "model.positions=rope", "model.rope_rescale=2.0"]
LOOPS = {
    "bf16": ("dinov2", ["precision=bf16", "optim.clip=1.0", "skip.sigma=6.0", *VIEWS, *SMALL]),
    "fp16, lars": ("simclr", ["precision=fp16", "optim.name=lars", "model=resnet_micro"]),
    "accumulated, muon": ("gpt", ["parallel.micro_batch=8", "optim.name=muon", *SMALL]),
}


@pytest.mark.parametrize("name", LOOPS)
def test_no_step_of_the_loop_has_a_host_sync(name: str, shards: Path, tmp_path: Path):
    objective, options = LOOPS[name]
    cfg = tiny_recipe(objective, shards, tmp_path / "run", *options)
    made = build_objective(cfg)
    stream, stop = build_stream(cfg, made, open_samples(cfg)), Stop()
    with fake_device() as syncs:
        engine, guard = Engine(made, cfg, DEVICE), Guard(made, cfg.skip, DEVICE)
        for step in range(2):
            syncs.found.clear()  # in the first one, constants are made
            values = train_step(
                cfg, step, engine, FakeStream(stream, syncs), guard, Clock(), stop, processes.Agreement()
            )
    assert not syncs.found, "\n".join(map(str, syncs.found))
    logged = [value for value in values.values() if isinstance(value, Tensor)]
    assert len(logged) > 2 and all(value.device == DEVICE for value in logged)
    assert all(p.device == DEVICE for p in made.parameters())


def test_batches_of_a_gpu_come_in_pinned_memory(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """This depends on the device of the run, not on the machine."""
    cfg = tiny_recipe("mae", shards, tmp_path / "run")
    made, samples = build_objective(cfg), open_samples(cfg)
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        pinned = [build_stream(cfg, made, samples, None, device).reading.pinned for device in (DEVICE, CPU)]
        assert pinned == [True, False]
    loaders = []
    monkeypatch.setattr(stream_module, "DataLoader", lambda *args, **options: loaders.append(options) or [])
    build_stream(cfg, made, samples, None, DEVICE)._start()
    assert loaders[0]["pin_memory"] is True


# ---------------------------------------------------------------- what may wait
def test_what_may_wait_is_a_list_with_reasons(monkeypatch: pytest.MonkeyPatch):
    for name, reason in ALLOWED.items():
        owner, _, attribute = name.rpartition(".")
        assert callable(getattr(host_syncs._resolve(owner), attribute)) and len(reason) > 20

    def logged(x: Tensor) -> float:
        return x.sum().item()

    assert waits(logged)
    monkeypatch.setitem(ALLOWED, f"{__name__}.{logged.__qualname__}", "this test")
    assert not waits(logged)


def test_a_gpu_forbids_all_but_the_list(monkeypatch: pytest.MonkeyPatch):
    """CUDA's debug mode is "error" within `forbidden`, and has its former value in the allowed functions and
    afterwards."""
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    seen = []
    monkeypatch.setattr(Writer, "flush", lambda self: seen.append(modes[-1]))
    with host_syncs.forbidden():
        seen.append(modes[-1])
        Writer.flush(None)  # type: ignore[arg-type]
        seen.append(modes[-1])
    assert seen == ["error", "default", "error"] and modes[-1] == "default"
