"""ZeRO-3: no rank has the whole objective on its device, only rank 0 has it in host memory, and weights are gathered
in the compute dtype."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launch.local import environments, wait
from pretrain.build import build_objective
from pretrain.optim.skip_steps import Guard
from pretrain.parallel import fsdp2, processes
from pretrain.parallel.modes import build_engine
from tests.conftest import tiny_recipe
from tests.forked import Forked
from tests.parallel.modes import batches, mine, one_step, recipe_of


def rank(shards: str, target: str) -> None:
    """One step of DINOv3, whose teachers are frozen. Records the tensors that were moved as a whole and those that
    were gathered."""
    from deepspeed.runtime.zero import partition_parameters

    device = torch.device("cpu")
    processes.start("zero3", device)
    cfg = recipe_of("dinov3", Path(shards), "zero3", {"precision": "bf16"})
    data = [mine(batch) for batch in batches(cfg, Path(shards), 2)]
    model = build_objective(cfg, empty=fsdp2.starts_empty(cfg))
    empty, whole, gathered = all(p.is_meta for p in model.parameters()), Counter[str](), Counter[str]()
    move, gather = nn.Module.to, partition_parameters._dist_allgather_fn

    def moved(module: nn.Module, *args: Any, **options: Any) -> nn.Module:
        whole[type(module).__name__] += 1
        return move(module, *args, **options)

    def counted(shard: torch.Tensor, *args: Any, **options: Any) -> Any:
        gathered[str(shard.dtype)] += shard.numel()
        return gather(shard, *args, **options)

    nn.Module.to, partition_parameters._dist_allgather_fn = moved, counted  # type: ignore[method-assign]
    engine = build_engine(model, cfg, device)
    loss, _, _ = one_step(engine, Guard(model, cfg.skip, device), data, 0)
    found = {"empty": empty, "whole": whole, "gathered": gathered, "loss": float(loss)}
    found["sharded"] = all(hasattr(p, "ds_tensor") for p in model.parameters())
    Path(target, f"{processes.rank()}.json").write_text(json.dumps(found))
    processes.stop()


@pytest.mark.slow
def test_parameters_are_sharded_one_by_one_and_gathered_in_bf16(shards: Path, tmp_path: Path):
    tiny_recipe("dinov3", shards, tmp_path)  # makes what its options name
    assert wait([Forked(rank, str(shards), str(tmp_path), env=e) for e in environments(2)]) == 0
    found = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2)]
    assert [one["empty"] for one in found] == [False, True] and found[0]["loss"] == found[1]["loss"]
    for one in found:
        assert one["sharded"] and not one["whole"]
        assert one["gathered"]["torch.bfloat16"] > 4 * one["gathered"].get("torch.float32", 0)
