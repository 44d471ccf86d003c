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
overhead. lightly's modules get the same images, sizes, optimizer and allocator. All are timed alternately, and each
figure is the median of the rounds' ratios of CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain.build import build_objective, noise_batch, placed
from pretrain.estimate.trace import FLOPS
from pretrain.optim.skip_steps import Guard
from pretrain.parallel.device import keep_freed_memory
from pretrain.parallel.engine import Engine
from pretrain.recipes.recipe import Recipe, load
from pretrain.step import one_step

BATCH = {"mae": 16, "simclr": 8, "dinov2": 4}  # images per step; 4 to 9 CPU seconds each
OPTIONS = {"mae": ["parallel.micro_batch=null"], "simclr": [], "dinov2": ["objective.prototypes=4096"]}
LINEAR = {
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.convolution,
    torch.ops.aten.convolution_backward,
}
CPU = torch.device("cpu")


def recipe(name: str, precision: str) -> Recipe:
    return load(f"{name}_vits16", ["device=cpu", f"precision={precision}", f"data.batch={BATCH[name]}", *OPTIONS[name]])


def ours(cfg: Recipe) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """(a batch, a function that trains one of our objectives on it for a step)."""
    engine = Engine(build_objective(cfg), cfg, CPU)
    objective, size = engine.objective, BATCH[cfg.objective.name]
    guard = Guard(objective, cfg.skip, CPU)
    batch = placed(objective, noise_batch(cfg, objective, size), CPU)

    def step() -> None:
        one_step(engine, guard, [batch], 0, lr=1e-4, weight_decay=0.05)

    return batch, step


class LightlyMAE(nn.Module):
    """MAE as in lightly's documentation, with the decoder of the paper and normalised targets."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        from lightly.models import utils
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

        self.utils, self.patch = utils, vit.patch_embed.patch_size[0]
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder = MAEDecoderTIMM(vit.patch_embed.num_patches, self.patch, embed_dim=vit.embed_dim, decoder_depth=8)

    def forward(self, images: Tensor) -> Tensor:
        size = (len(images), self.backbone.sequence_length)
        keep, mask = self.utils.random_token_mask(size, mask_ratio=0.75)
        encoded = self.decoder.embed(self.backbone.encode(images, idx_keep=keep))
        x = self.utils.repeat_token(self.decoder.mask_token, size)
        x = self.decoder.decode(self.utils.set_at_index(x, keep, encoded.type_as(x)))
        predicted = self.decoder.predict(self.utils.get_at_index(x, mask))
        target = self.utils.get_at_index(self.utils.patchify(images, self.patch), mask - 1)
        return nn.functional.mse_loss(predicted, self.utils.normalize_mean_var(target))


class LightlySimCLR(nn.Module):
    """SimCLR as in lightly's documentation: one forward per view."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        self.backbone, self.head = vit, SimCLRProjectionHead(vit.embed_dim, 2048, 128)
        self.criterion = NTXentLoss(temperature=0.1)

    def forward(self, images: Tensor) -> Tensor:
        z = [self.head(self.backbone(images[:, view])) for view in range(2)]
        return self.criterion(*z)


LIGHTLY: dict[str, type[nn.Module]] = {"mae": LightlyMAE, "simclr": LightlySimCLR}


def lightly(name: str, precision: str, images: Tensor) -> Callable[[], None]:
    """A function that trains lightly's modules on the same images for a step."""
    warnings.simplefilter("ignore")  # lightly 1.6 deprecates the decoder that its documentation uses
    from timm.models.vision_transformer import vit_small_patch16_224

    module = LIGHTLY[name](vit_small_patch16_224(num_classes=0))
    optimizer = torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.05, fused=True
    )

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = module(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def cpu_seconds(run: Callable[[], None], times: int = 1) -> float:
    start = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - start) / times


def linear_flops(step: Callable[[], None]) -> int:
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        step()
    return sum(count for op, count in counter.get_flop_counts()["Global"].items() if op in LINEAR)


def emit(name: str, value: float, unit: str, versus: str) -> None:
    print(json.dumps({"name": name, "value": float(f"{value:.3g}"), "unit": unit, "versus": versus}), flush=True)


def measure(name: str, precision: str, rounds: int) -> None:
    batch, step = ours(recipe(name, precision))
    other = lightly(name, precision, batch["image"]) if name in LIGHTLY else None
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
