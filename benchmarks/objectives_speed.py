"""The speed of a training step of each image objective, compared with the same method made of lightly's modules.

    python benchmarks/objectives_speed.py [--objectives simclr dino …] [--rounds 7] [--precision fp32]

Figures, on one thread of a CPU, or on a GPU if there is one:

    objectives.NAME.versus_lightly           seconds of a step of lightly's modules / ours; above 1, ours is faster
    objectives.NAME.samples_per_cpu_second   images (of any number of views) per second of ours; on a GPU:
                                             samples_per_gpu_second

The sizes are those with which `learning.py` trains: the recipe `NAME_cpu` or the demo's options, a ViT of three blocks of
width 96 with 64 patches, and a batch of 128. Both get the same batch, which the objective's views have made of noise, the
same head widths and AdamW. A step is forward, backward, update, and the teacher's average; ours also has the gradient
norm, the check for values that are not finite, and what a run logs. lightly's methods that mask patches use timm's ViT of
these sizes, as lightly wraps it, unless ours has rotary positions (CAPI); the other ones use our network, so that only
heads, losses and averages differ. The two are timed alternately, and a figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import sys
from statistics import median

import torch
from learning import load, names
from steps import CPU, LIGHTLY, cpu_seconds, emit, lightly, ours

from pretrain.parallel.device import keep_freed_memory
from pretrain.recipes import defaults

MASKED = ("capi", "dinov2", "ijepa", "mae", "simmim")  # methods for which lightly has a ViT of its own
SAMPLES = 4320  # of the demo, from which `auto` computes sizes
COMPARED = [name for name in names() if name in LIGHTLY]


def measure(name: str, rounds: int, precision: str, device: torch.device) -> None:
    cfg = load(name, f"precision={precision}", f"device={device.type}", "steps=500")
    defaults.settle(cfg, SAMPLES)
    batch, step = ours(cfg, device)
    vit = name in MASKED and cfg.model.positions != "rope"  # which lightly's ViT does not have
    other = lightly(cfg, batch, device, vit)
    speeds, ratios = [], []
    for warm_up in [True, True, *[False] * rounds]:
        seconds, lightlys = cpu_seconds(step, 3, device), cpu_seconds(other, 3, device)
        if not warm_up:
            speeds.append(cfg.data.batch_size / seconds)
            ratios.append(lightlys / seconds)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(
        f"{name}: {cfg.data.batch_size / median(speeds):.4f} s per step, ratios {spread}", file=sys.stderr, flush=True
    )
    against = "timm's ViT" if vit else "our network"
    emit(f"objectives.{name}.versus_lightly", median(ratios), "ratio", f"lightly's modules on {against}, interleaved")
    unit = "gpu" if device.type == "cuda" else "cpu"
    emit(f"objectives.{name}.samples_per_{unit}_second", median(speeds), "1/s", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=COMPARED, choices=COMPARED)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as pretrain/train.py does, before any model is built
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    for name in options.objectives:
        measure(name, options.rounds, options.precision, device)


if __name__ == "__main__":
    main()
