"""The cost of a step of Muon for each rank, with the matrices of a ViT.

    muon.flops_of_the_busiest_rank.M.N  FLOPs of its matrix products with parallel.mode M on N ranks / those of a single
                                        rank that does everything; 1 / N is an even distribution
    muon.step_seconds.stacked           CPU seconds of a step on one rank / those of a loop that orthogonalises one
                                        matrix after another

Ranks are processes on this machine, with gloo. FLOPs are counted, so they do not depend on the load of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from launch.local import environments
from pretrain.optim.muon import MuonAdamW, _orthogonal_parts
from pretrain.parallel import processes

CPU = torch.device("cpu")


def matrices(width: int, depth: int) -> list[tuple[int, int, tuple[int, ...]]]:
    """(rows, columns, parts) of the matrices in a ViT's blocks."""
    return [
        shape
        for _ in range(depth)
        for shape in (
            (3 * width, width, (width,) * 3),
            (width, width, ()),
            (4 * width, width, ()),
            (width, 4 * width, ()),
        )
    ]


def optimizer_of(shapes: list[tuple[int, int, tuple[int, ...]]], sharded: bool) -> MuonAdamW:
    """Muon with random parameters of the given shapes, which have gradients."""
    groups, mesh = [], dist.init_device_mesh("cpu", (processes.world(),)) if sharded else None
    for rows, columns, parts in shapes:
        value, gradient = torch.randn(rows, columns), torch.randn(rows, columns)
        if mesh is not None:
            value, gradient = (distribute_tensor(each, mesh, [Shard(0)]) for each in (value, gradient))
        parameter = nn.Parameter(value)
        parameter.grad = gradient
        groups.append({"params": [parameter], "muon": True, "parts": parts})
    optimizer = MuonAdamW(groups, 0.95, (0.9, 0.95), 1e-8)
    for group in optimizer.param_groups:
        group.update(lr=1e-3, weight_decay=0.1)
    return optimizer


def flops(mode: str, width: int, depth: int) -> int:
    """The FLOPs of this rank's matrix products in a step."""
    torch.set_num_threads(1)
    processes.start("ddp", CPU)
    optimizer = optimizer_of(matrices(width, depth), mode == "fsdp2")
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    processes.stop()
    return counter.get_total_flops()


def flops_of_each_rank(mode: str, ranks: int, options: argparse.Namespace) -> list[int]:
    command = [sys.executable, __file__, "--measure", mode, "--width", str(options.width)]
    command += ["--depth", str(options.depth)]
    started = [
        subprocess.Popen(command, env=os.environ | place, stdout=subprocess.PIPE, text=True)
        for place in environments(ranks)
    ]
    answers = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"Muon's step failed with {mode} on {ranks} ranks; its error is above")
    return [int(answer.split()[-1]) for answer in answers]


def step_versus_loop(shapes: list[tuple[int, int, tuple[int, ...]]], rounds: int) -> float:
    """CPU seconds of a step / those of a loop over the same matrices."""
    optimizer = optimizer_of(shapes, False)

    def loop() -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                _orthogonal_parts(p.grad.unsqueeze(0), group["parts"])

    ratios = []
    for _ in range(1 + rounds):
        times = []
        for work in (optimizer.step, loop):
            began = time.process_time()
            work()
            times.append(time.process_time() - began)
        ratios.append(times[0] / times[1])
    return median(ratios[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--measure", choices=["ddp", "fsdp2"], help="print the FLOPs of this process only (used internally)"
    )
    options = parser.parse_args()
    if options.measure:
        print(flops(options.measure, options.width, options.depth))
        return

    def emit(name: str, value: float, unit: str, versus: str) -> None:
        print(json.dumps({"name": name, "value": round(value, 3), "unit": unit, "versus": versus}), flush=True)

    what = f"one rank, {options.depth} blocks of width {options.width}"
    (alone,) = flops_of_each_rank("ddp", 1, options)
    for mode in ("ddp", "fsdp2"):
        for ranks in (2, 4):
            found = flops_of_each_rank(mode, ranks, options)
            emit(f"muon.flops_of_the_busiest_rank.{mode}.{ranks}", max(found) / alone, "share", what)
    torch.set_num_threads(1)
    ratio = step_versus_loop(matrices(options.width, options.depth), options.rounds)
    emit("muon.step_seconds.stacked", ratio, "×", "the orthogonalisation alone, one matrix after another")


if __name__ == "__main__":
    main()
