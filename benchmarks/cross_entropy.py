"""Compares the chunked cross-entropy of `pretrain/ops/cross_entropy.py` with a plain head and F.cross_entropy, for
2,048 rows of 384 features and a vocabulary of 50,304.

    python benchmarks/cross_entropy.py [--rounds 5]

One thread, forward and backward, alternating; P is fp32, or bf16 with autocast.

    cross_entropy.P.cpu_versus_plain       CPU seconds, ours / plain: the median of the rounds' ratios
    cross_entropy.P.memory_versus_plain    largest growth of the resident set beyond inputs and gradients, ours / plain
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from plan import MAPPED, resident
from steps import cpu_seconds, emit
from torch import Tensor

from pretrain.ops.cross_entropy import cross_entropy

ROWS, WIDTH, CLASSES = 2048, 384, 50304


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"ours": cross_entropy, "plain": plain}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(CLASSES, WIDTH).mul_(0.02).requires_grad_()
    return torch.randn(ROWS, WIDTH).requires_grad_(), weight, torch.randint(CLASSES, (ROWS,))


def step(loss: Callable, precision: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    hidden.grad = weight.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        value = loss(hidden, weight, targets)
    value.backward()


def memory_growth(name: str, precision: str) -> int:
    """The largest growth of the resident set of this process in bytes, without the two gradients."""
    hidden, weight, targets = inputs()
    small = (hidden[:64].detach().requires_grad_(), weight[:64].detach().requires_grad_(), targets[:64] % 64)
    step(LOSSES[name], precision, *small)
    for x in (hidden, weight):
        x.grad = torch.ones_like(x)  # allocated before memory is measured
    gc.collect()
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM
    step(LOSSES[name], precision, hidden, weight, targets)
    return resident("VmHWM") - before


def measured(name: str, precision: str) -> int:
    """`memory_growth` in a new process."""
    command = [sys.executable, "-W", "ignore", __file__, "--measure", name, precision]
    done = subprocess.run(command, env=os.environ | MAPPED, stdout=subprocess.PIPE, check=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--measure",
        nargs=2,
        metavar=("LOSS", "PRECISION"),
        help="print the bytes of this process only (used internally)",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        print(memory_growth(*options.measure))
        return
    tensors = inputs()
    for precision in ("fp32", "bf16"):
        ratios = []
        for _ in range(options.rounds):
            seconds = {name: cpu_seconds(partial(step, loss, precision, *tensors)) for name, loss in LOSSES.items()}
            ratios.append(seconds["ours"] / seconds["plain"])
        what = f"{ROWS} x {WIDTH} -> {CLASSES}, {precision}, one thread, F.linear and F.cross_entropy"
        emit(f"cross_entropy.{precision}.cpu_versus_plain", median(ratios), "×", what)
        ratio = measured("ours", precision) / measured("plain", precision)
        emit(f"cross_entropy.{precision}.memory_versus_plain", ratio, "×", what)


if __name__ == "__main__":
    main()
