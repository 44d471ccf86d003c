"""Offloading with FSDP2: shards and the optimizer are in host memory, buffers and activations on the GPU, and no
operation mixes the two. The GPU exists for fake tensors only, which have a device but no values; an operation on
tensors of two devices raises the same error as on a real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.local import environments
from pretrain.build import build_objective
from pretrain.models.build import build_model
from pretrain.ops.parameter_shards import local
from pretrain.optim.skip_steps import Guard
from pretrain.parallel import fsdp2
from pretrain.parallel.modes import build_engine
from tests.parallel.modes import LR, recipe_of
from tests.parallel.test_engine import Guided

GPU = torch.device("cuda", 0)
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class OneDevice(TorchDispatchMode):
    """Raises an error for an operation on tensors of two devices, including lists of tensors, which fake tensors
    allow. Copies are allowed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        # a scalar on the CPU goes to any kernel
        devices = {t.device.type for t in tensors if t.dim() or t.device.type != "cpu"}
        assert len(devices) < 2 or func in COPIES, f"{func}: {[(t.device, t.shape) for t in tensors[:4]]}"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def rank_1_of_2(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for key, value in environments(2)[1].items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    # what fake tensors do not know: pinned memory, and the number that a teacher on the CPU asks for
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: 0.0)
    make_mesh = dist.init_device_mesh

    def real_mesh(*args: Any, **options: Any) -> DeviceMesh:  # the ranks in it have to be real numbers
        with unset_fake_temporarily():
            return make_mesh(*args, **options)

    monkeypatch.setattr(dist, "init_device_mesh", real_mesh)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield
    dist.destroy_process_group()


CASES = [(name, optimizer, "sharded") for optimizer in ("adamw", "lars") for name in ("mae", "dinov2", "simclr")]


@pytest.mark.parametrize(("name", "optimizer", "frozen"), [*CASES, ("mae", "adamw", "replicated")])
def test_a_step_mixes_no_devices(name: str, optimizer: str, frozen: str, rank_1_of_2: None, shards: Path):
    """MAE has a table among its buffers, DINOv2 a teacher, SimCLR batch norms; a network that is
    frozen for good may be whole on the device, while all that is sharded is in main memory."""
    options = {"parallel.offload": True, "parallel.frozen": frozen, "optim.name": optimizer}
    cfg = recipe_of(name, shards, "fsdp2", options)
    model: Any = build_objective(cfg, empty=fsdp2.starts_empty(cfg))
    if frozen == "replicated":
        with torch.device("meta"):
            model = Guided(cfg.objective, lambda **changes: build_model(cfg.model, **changes))
    with FakeTensorMode(allow_non_fake_inputs=True):
        engine = build_engine(model, cfg, GPU)
        whole = set(model.frozen.parameters()) if frozen == "replicated" else set()
        assert {local(p).device.type for p in set(model.parameters()) - whole} == {"cpu"}
        assert {p.device for p in whole} <= {GPU} and not any(isinstance(p, DTensor) for p in whole)
        assert {buffer.device for buffer in model.buffers()} <= {GPU}
        for parameter in engine.parameters:
            parameter.grad = torch.zeros_like(parameter)
        guard = Guard(model, cfg.skip, GPU)
        guard.before()
        with OneDevice():
            norm = engine.step(LR, 0.05, lambda norm: guard.judge(torch.zeros((), device=GPU), norm))
            guard.after()
            model.after_step(0)
        assert norm.device == guard.skipped.device == GPU and engine.optimizer.found_inf.device.type == "cpu"
        engine.load_state_dict(engine.state_dict())
