"""CPU seconds of a DINOv3 training step with ViT-S/16, 2 × 224 + 8 × 96 pixels, 4,096 prototypes and batches of 4 and
8, compared with the rate of matrix products and with the same step made of timm's modules.

    python benchmarks/dinov3_step.py [--batches 4 8] [--precisions fp32 bf16] [--rounds 3]

One thread. All parts are timed alternately, and each figure is the median of the rounds' ratios.

    share_of_gemm           FLOPs of the step's linear layers and convolutions / its CPU seconds / the rate of a 2048³
                            product of that precision in the same process (torch.mm)
    share_of_own_products   the same, relative to the rate of the matrix products in the blocks, forward and backward, which
                            are timed alone, with the kernel that the step uses
    versus_timm             CPU seconds of the same step (crops, masks, losses, AdamW, moving average) made of timm's
                            DINOv3 ViT with one forward for each size and straightforward losses / ours
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
import torch.nn.functional as F
from steps import CPU, cpu_seconds, emit, linear_flops
from torch import Tensor, nn

from pretrain.build import build_objective, noise_batch, placed
from pretrain.optim.groups import thaw
from pretrain.parallel.device import keep_freed_memory
from pretrain.parallel.engine import Engine
from pretrain.recipes.recipe import load

PROTOTYPES = 4096


def ours(precision: str, batch: int, compiled: bool = False) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """(a batch, a function that trains our DINOv3 on it for a step)."""
    sizes = [f"objective.prototypes={PROTOTYPES}", "model.image_size=224", "model.drop_path=0.0", f"data.batch={batch}"]
    cfg = load(
        "dinov3_vits16_demo",
        [*sizes, "device=cpu", f"precision={precision}", "objective.head_hidden=2048", "objective.head_bottleneck=256",
         "objective.local_size=96", "objective.local_crops=8", "objective.momentum=0.994", "objective.teacher_temperature=0.07"],
    )  # fmt: skip
    engine = Engine(build_objective(cfg), cfg, CPU)
    objective = engine.objective
    if compiled:
        for part in (objective.student["backbone"], objective.teacher["backbone"]):
            for block in part.blocks:
                block.compile()
    inputs = placed(objective, noise_batch(cfg, objective, batch), CPU)

    def step() -> None:
        loss, _ = engine.forward(inputs, 0)
        engine.backward(loss)
        thaw(engine.optimizer, 0)
        engine.step(lr=1e-4, weight_decay=0.04)
        objective.after_step(0)

    return inputs, step


class Head(nn.Module):
    """The projection head of DINO and iBOT."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 256)
        )
        self.last = nn.Linear(256, PROTOTYPES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.normalize(self.mlp(x), dim=-1))


class Network(nn.Module):
    """timm's ViT with a mask token and two heads."""

    def __init__(self) -> None:
        super().__init__()
        import timm

        self.vit = timm.create_model("vit_small_patch16_dinov3_qkvb", num_classes=0, img_size=224)
        self.mask_token = nn.Parameter(torch.zeros(384))
        self.dino, self.ibot = Head(384), Head(384)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(class tokens, patches) after the last norm."""
        x = self.vit.patch_embed(images)  # [B, h, w, D]
        if mask is not None:
            x = torch.where(mask.view(*x.shape[:3], 1), self.mask_token.to(x.dtype), x)
        x, rope = self.vit._pos_embed(x)
        for block in self.vit.blocks:
            x = block(x, rope=rope)
        x = self.vit.norm(x)
        return x[:, 0], x[:, 5:]


def sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    """The teacher's assignments of logits [B, K], by three Sinkhorn-Knopp iterations."""
    q = (logits.float() / temperature).exp()
    for _ in range(3):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / len(q)
    return q * len(q)


def cross_entropy(p: Tensor, logits: Tensor) -> Tensor:
    """The cross-entropy of targets p [..., K] and the student's logits."""
    return -(p * F.log_softmax(logits.float() / 0.1, dim=-1)).sum(-1)


def timm_step(precision: str, batch: dict[str, Tensor]) -> Callable[[], None]:
    """A function that trains timm's modules on the same batch for a step."""
    student = Network()
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.04, fused=True)
    images, local, mask = batch["global"].flatten(0, 1), batch["local"].flatten(0, 1), batch["mask"].flatten(0, 1)

    def loss_of() -> Tensor:
        with torch.no_grad():
            cls, patches = teacher(images)
            p_cls, p_patch = (
                sinkhorn(teacher.dino(cls), 0.07).unflatten(0, (-1, 2)),
                sinkhorn(teacher.ibot(patches[mask]), 0.07),
            )
        cls, patches = student(images, mask)
        small, _ = student(local)
        s, s_local = student.dino(cls).unflatten(0, (-1, 2)), student.dino(small).unflatten(0, (-1, 8))
        pairs = [cross_entropy(p_cls[:, t], s[:, 1 - t]) for t in range(2)]
        pairs += [cross_entropy(p_cls[:, t], s_local[:, i]) for t in range(2) for i in range(8)]
        weight = (1 / mask.sum(1).clamp(min=1)).unsqueeze(1).expand_as(mask)[mask]
        total = torch.stack(pairs).mean() + (cross_entropy(p_patch, student.ibot(patches[mask])) * weight).sum() / len(
            mask
        )
        for g in range(2):
            z = F.normalize(cls.unflatten(0, (-1, 2))[:, g].float(), dim=-1)
            nearest = (z @ z.T).fill_diagonal_(-1).argmax(1)
            total = total - 0.1 * ((z - z[nearest]).norm(dim=-1) + 1e-8).log().mean()
        return total

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
                average.mul_(0.994).add_(parameter, alpha=0.006)

    return step


def own_products(size: int, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """(a function that computes the matrix products of a block of the student, forward and backward; their FLOPs)."""
    tokens = size * (2 * 201 + 8 * 41)
    cases = []
    for inputs, outputs in ((384, 1152), (384, 384), (384, 1536), (1536, 384)):
        x, w, g = (torch.randn(*shape).to(dtype) for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs)))
        cases.append((x, w, g))

    def run() -> None:
        for x, w, g in cases:
            x @ w.t(), g @ w, g.t() @ x

    return run, 6 * tokens * sum(w.numel() for _, w, _ in cases)


def measure(precision: str, size: int, rounds: int, compiled: bool) -> None:
    batch, step = ours(precision, size, compiled)
    other = timm_step(precision, batch)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b, out = (torch.randn(2048, 2048, dtype=dtype) for _ in range(3))
    square_product = lambda: torch.mm(a, b, out=out)  # noqa: E731
    block_products, block_flops = own_products(size, dtype)
    flops = linear_flops(ours(precision, size)[1])
    first = cpu_seconds(step)  # with compilation
    square_product(), block_products(), step(), other(), other()  # warm-up
    shares, own_shares, ratios = [], [], []
    for _ in range(rounds):
        product_before, ours_seconds, timm_seconds = (
            cpu_seconds(square_product, 3),
            cpu_seconds(step),
            cpu_seconds(other),
        )
        gemm = 2 * 2048**3 / ((product_before + cpu_seconds(square_product, 3)) / 2)  # FLOP/s
        blocks = block_flops / cpu_seconds(block_products)  # FLOP/s
        shares.append(flops / ours_seconds / gemm)
        own_shares.append(flops / ours_seconds / blocks)
        ratios.append(timm_seconds / ours_seconds)
        line = (
            f"b{size} {precision}: {ours_seconds:.2f} CPU s per step (the first {first:.1f}), timm {timm_seconds:.2f}"
        )
        line += f", {flops / 1e9:.0f} GFLOP, product {gemm / 1e12:.3f} TFLOP/s, those of the blocks {blocks / 1e12:.3f}"
        print(line, file=sys.stderr, flush=True)
    prefix = f"dinov3_step.b{size}.{precision}{'.compiled' if compiled else ''}"
    emit(f"{prefix}.share_of_gemm", median(shares), "ratio", "2048^3 GEMM, same process")
    emit(f"{prefix}.share_of_own_products", median(own_shares), "ratio", "the blocks' matrix shapes, same process")
    emit(f"{prefix}.versus_timm", median(ratios), "ratio", "the same step from timm's ViT, CPU seconds, interleaved")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--compile", action="store_true", help="compile our blocks; the time of the first step is printed"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    for size in options.batches:
        for precision in options.precisions:
            measure(precision, size, options.rounds, options.compile)


if __name__ == "__main__":
    main()
