"""How much faster each kernel for CPUs is than the plain module that it replaces.

    python benchmarks/kernels.py [--rounds 7]

    kernels.cpu.N.gain         CPU seconds of the plain module / of the kernel N, forward and backward
    kernels.cpu.N.step_gain    the same for a whole step of a decoder, forward to AdamW: 6 blocks of width 384, batches
                               of 8 × 256 tokens, a vocabulary of 4,096, fp32

One thread. The two alternate in one process, and each figure is the median of the rounds' ratios. A kernel that gains
less than a tenth is deleted.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from steps import cpu_seconds, emit
from torch import nn

from pretrain import kernels
from pretrain.models import families
from pretrain.models.build import build_model
from pretrain.models.text_mlp import RMSNorm
from pretrain.parallel.device import keep_freed_memory

TOKENS, WIDTH, VOCABULARY = (8, 256), 384, 4096
# {name of a kernel: (function that makes its plain module, shape of an input)}
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "rms_norm": (lambda: RMSNorm(WIDTH, 1e-5), (TOKENS[0] * TOKENS[1], WIDTH)),
}


def module_step(module: nn.Module, shape: tuple[int, ...]) -> Callable[[], None]:
    """A function that runs forward and backward of a module."""
    x, gradient = torch.randn(shape), torch.randn(shape)

    def run() -> None:
        module(x.detach().requires_grad_()).backward(gradient)
        module.zero_grad()

    return run


def training_step(model: nn.Module) -> Callable[[], None]:
    """A function that trains a decoder for one step."""
    tokens = torch.randint(0, VOCABULARY, (TOKENS[0], TOKENS[1] + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        model.head(model(tokens[:, :-1]).tokens, tokens[:, 1:]).backward()  # type: ignore[operator]
        optimizer.step()
        optimizer.zero_grad()

    return run


def gain(plain: Callable[[], None], kernel: Callable[[], None], rounds: int, times: int) -> float:
    """The ratio of CPU seconds, plain / kernel: the median of the rounds."""
    for _ in range(2):  # warm-up, which allocates memory
        plain(), kernel()
    ratios = []
    for n in range(rounds):
        order = [plain, kernel] if n % 2 else [kernel, plain]
        seconds = {run: cpu_seconds(run, times) for run in order}
        ratios.append(seconds[plain] / seconds[kernel])
    print(f"ratios {min(ratios):.3f} to {max(ratios):.3f}", file=sys.stderr, flush=True)
    return median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    sizes = {"dim": WIDTH, "depth": 6, "heads": 6, "mlp_width": 1024, "context": TOKENS[1]}
    for name, (make, shape) in MODULES.items():
        plain = make()
        kernel = copy.deepcopy(plain)
        kernels.replace(kernel, kernels.CPU)
        replacement = {type(plain): type(kernel)}
        value = gain(module_step(plain, shape), module_step(kernel, shape), options.rounds, 20)
        emit(f"kernels.cpu.{name}.gain", value, "×", f"{type(plain).__name__} of {shape}, forward and backward")
        model = build_model(families.Decoder(**sizes, vocab_size=VOCABULARY))
        replaced = copy.deepcopy(model)
        kernels.replace(replaced, replacement)
        value = gain(training_step(model), training_step(replaced), options.rounds, 1)
        emit(f"kernels.cpu.{name}.step_gain", value, "×", "a step of a decoder with the plain module")


if __name__ == "__main__":
    main()
