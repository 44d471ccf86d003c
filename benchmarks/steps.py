"""The speed of a training step on one CPU thread, compared with the rate of matrix products and with lightly's modules.

Figures, for MAE, SimCLR and DINOv2 with ViT-S/16 at 224 pixels, in fp32 and with bf16 autocast:

    step.X.P.share_of_gemm          linear FLOPs of the step / its CPU seconds / rate of a 2048³ matrix product in the
                                    same precision
    step.X.P.samples_per_cpu_second images (of any number of views) per CPU second
    step.X.P.versus_lightly         CPU seconds of the same step made of lightly's modules / ours; above 1, ours is
                                    faster

A step is that of the recipe X_vits16 with a small batch: forward, backward, gradient norm, fused AdamW and the
teacher's average, if there is one, through `Engine`, on images that the objective's views make of noise. Linear FLOPs
are those of the matrix products of linear layers and of the patch convolution, forward and backward, as
`FlopCounterMode` counts them (including teacher and heads); the products of attention, norms and all else count as
overhead. lightly's modules (`lightly_methods/`, on timm's ViT as lightly wraps it) get the same batch, sizes, optimizer
and allocator. All are timed alternately, and each figure is the median of the rounds' ratios of CPU seconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain.build import backbone, build_objective, noise_batch, placed
from pretrain.estimate.trace import FLOPS
from pretrain.models.layers import Features
from pretrain.objectives.finder import find
from pretrain.optim.skip_steps import Guard
from pretrain.parallel.device import keep_freed_memory
from pretrain.parallel.engine import Engine
from pretrain.recipes.recipe import Recipe, load
from pretrain.step import one_step

BATCH = {"mae": 16, "simclr": 8, "dinov2": 4}  # images per step; 4 to 9 CPU seconds each
OPTIONS = {"mae": ["parallel.micro_batch=null"], "simclr": [], "dinov2": ["objective.prototypes=4096"]}
# {method: the file of the objective that is made of lightly's modules}
LIGHTLY = {path.stem: str(path) for path in sorted((Path(__file__).parent / "lightly_methods").glob("*.py"))}
LINEAR = {
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.convolution,
    torch.ops.aten.convolution_backward,
}
CPU = torch.device("cpu")


def recipe(name: str, precision: str) -> Recipe:
    return load(f"{name}_vits16", ["device=cpu", f"precision={precision}", f"data.batch={BATCH[name]}", *OPTIONS[name]])


def ours(cfg: Recipe, device: torch.device = CPU) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """(a batch of noise, a function that trains one of our objectives on it for a step)."""
    engine = Engine(build_objective(cfg), cfg, device)
    objective = engine.objective
    guard = Guard(objective, cfg.skip, device)
    batch = placed(objective, noise_batch(cfg, objective, cfg.data.batch_size), device)

    def step() -> None:
        one_step(engine, guard, [batch], 0, lr=1e-4, weight_decay=0.05)

    return batch, step


class LightlyViT(nn.Module):
    """timm's ViT as lightly wraps it, of the sizes of a recipe's ViT and with the interface of our backbones."""

    def __init__(self, cfg: Any, several_sizes: bool):
        super().__init__()
        from lightly.models.modules import MaskedVisionTransformerTIMM
        from timm.models.vision_transformer import VisionTransformer

        sizes = {"img_size": cfg.image_size, "patch_size": cfg.patch_size, "embed_dim": cfg.dim, "depth": cfg.depth}
        vit = VisionTransformer(**sizes, num_heads=cfg.heads, num_classes=0, dynamic_img_size=several_sizes)
        self.network = MaskedVisionTransformerTIMM(vit)
        self.embed_dim, self.image_size, self.patch_size = cfg.dim, cfg.image_size, cfg.patch_size

    def forward(self, images: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> Features:
        mask = mask if mask is None else F.pad(mask, (1, 0))
        keep = keep if keep is None else F.pad(keep + 1, (1, 0))  # the class token is token 0
        x = self.network.encode(images, idx_keep=keep, mask=mask)
        side = images.shape[-1] // self.patch_size
        return Features(x[:, 0], x[:, 1:], x[:, :0], (side, side))


def lightly(cfg: Recipe, batch: dict[str, Tensor], device: torch.device = CPU, vit: bool = True) -> Callable[[], None]:
    """A function that trains the same method, made of lightly's modules, on the same batch for a step. `vit`: whether
    its network is `LightlyViT`; false: it is ours."""
    several_sizes = "local" in batch
    network = (lambda **_: LightlyViT(cfg.model, several_sizes)) if vit else functools.partial(backbone, cfg)
    objective = find(LIGHTLY[cfg.objective.name])(cfg.objective, network).to(device)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            loss, _ = objective(batch, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(0)

    return step


def cpu_seconds(run: Callable[[], None], times: int = 1, device: torch.device = CPU) -> float:
    """The mean CPU seconds of a call; on a GPU, the seconds until it is idle again."""
    idle, clock = (torch.cuda.synchronize, time.perf_counter) if device.type == "cuda" else (int, time.process_time)
    idle()
    start = clock()
    for _ in range(times):
        run()
    idle()
    return (clock() - start) / times


def linear_flops(step: Callable[[], None]) -> int:
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        step()
    return sum(count for op, count in counter.get_flop_counts()["Global"].items() if op in LINEAR)


def emit(name: str, value: float, unit: str, versus: str) -> None:
    print(json.dumps({"name": name, "value": float(f"{value:.3g}"), "unit": unit, "versus": versus}), flush=True)


def emit_means(prefix: str, found: list[dict[str, float]], versus: str) -> None:
    """Emit PREFIX.KEY, the mean over seeds, and of several seeds PREFIX.KEY.seed_std. `found`: {key: accuracy} of each
    seed."""
    for key in found[0]:
        values = [scores[key] for scores in found]
        emit(f"{prefix}.{key}", mean(values), "accuracy", versus)
        if len(values) > 1:
            emit(f"{prefix}.{key}.seed_std", stdev(values), "accuracy", f"{len(values)} seeds")


def measure(name: str, precision: str, rounds: int) -> None:
    cfg = recipe(name, precision)
    batch, step = ours(cfg)
    other = lightly(cfg, batch) if name in LIGHTLY else None
    a, b, out = (
        torch.randn(2048, 2048, dtype=torch.bfloat16 if precision == "bf16" else torch.float32) for _ in range(3)
    )
    product = lambda: torch.mm(a, b, out=out)  # noqa: E731
    flops = linear_flops(step)
    product(), step(), other and other()  # warm-up; `linear_flops` has run one step before
    shares, speeds, ratios = [], [], []
    for _ in range(rounds):
        product_before, ours_seconds = cpu_seconds(product, 3), cpu_seconds(step)
        lightly_seconds = cpu_seconds(other) if other else 0.0
        gemm = 2 * 2048**3 / ((product_before + cpu_seconds(product, 3)) / 2)  # FLOP/s
        shares.append(flops / ours_seconds / gemm)
        speeds.append(BATCH[name] / ours_seconds)
        ratios.append(lightly_seconds / ours_seconds)
        line = f"{name} {precision}: {ours_seconds:.2f} CPU s per step, lightly {lightly_seconds:.2f}"
        line += f", {flops / 1e9:.0f} GFLOP, product {gemm / 1e12:.3f} TFLOP/s"
        print(line, file=sys.stderr, flush=True)
    prefix = f"step.{name}.{precision}"
    emit(f"{prefix}.share_of_gemm", median(shares), "ratio", "2048^3 GEMM, same process")
    emit(f"{prefix}.samples_per_cpu_second", median(speeds), "1/s", "one thread")
    if other:
        emit(f"{prefix}.versus_lightly", median(ratios), "ratio", "lightly's modules, CPU seconds, interleaved")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=list(BATCH), choices=list(BATCH))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as pretrain/train.py does, before any model is built
    for name in options.objectives:
        for precision in options.precisions:
            measure(name, precision, options.rounds)


if __name__ == "__main__":
    main()
