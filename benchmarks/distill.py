"""Students of a teacher that was pretrained here, against the same students trained from scratch with the same budget, on real images.

    python benchmarks/distill.py FOLDER [--teacher-steps 1200] [--steps 300] [--seeds 3]

The demo's photographed textures (64 pixels). A DINOv3 ViT (6 blocks of 128, patches of 8) is pretrained; then, for each seed, a ViT (3 blocks of 64) and a
ConvNeXt learn from it in one run, from its prototypes; and alone, for as many steps of the same batch: the ViT by DINOv3, the ConvNeXt, which takes no masks,
by SimCLR. Figures, k-NN accuracy on test textures that nothing was trained on, mean over seeds: distill.{vit,convnext}.{distilled,scratch}.knn.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from statistics import mean

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from steps import emit

from data_pipeline.build import build
from data_pipeline.demo_data import fetch
from eval.run import evaluate
from pretrain.recipe import load
from pretrain.train import train

CROPS = ["objective.local_size=32", "objective.local_crops=4"]
HEADS = [
    "objective.head_hidden=256",
    "objective.head_bottleneck=64",
    "objective.prototypes=256",
    "objective.unit_prototypes=true",
]
ENGINE = ["data.batch=64", "data.workers=1", "threads=1", "precision=fp32", "device=cpu", "optim.clip=null", "log=50"]
RATES = ["optim.layer_decay=1.0", "optim.patch_embed_lr=1.0", "optim.lr={kind: cosine, value: 1.0e-3, warmup: 0.1}"]
TEMPERATURE = "objective.teacher_temperature={value: 0.07, start: 0.04, warmup: 0.1}"
MOMENTUM = "objective.momentum={kind: cosine, value: 0.98, final: 1.0}"
VIT = ["model.patch_size=8", "model.image_size=64", "model.layer_scale=0.1"]
STUDENT = ["model=dinov3_vits16", "model.dim=64", "model.depth=3", "model.heads=2", *VIT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--teacher-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    folder = options.folder
    torch.set_num_threads(1)
    fetch(folder / "images", "materials", lambda line: print(line, file=sys.stderr))
    for split in ("train", "test"):
        if not (folder / "shards" / split).is_dir():
            build(folder / "images" / split, folder / "shards" / split)
    known, asked = [str(folder / "shards" / "train")], [str(folder / "shards" / "test")]

    def run(name: str, steps: int, *overrides: str) -> Path:
        common = [
            f"data.train={known[0]}",
            f"run={folder / name}",
            f"steps={steps}",
            f"checkpoint={steps}",
            f"export={steps}",
        ]
        return train(load("dinov3_vits16_demo", [*overrides, *common, *ENGINE, *RATES]))

    def knn(export: Path) -> float:
        rows = evaluate(export, ["knn"], known, asked)
        return next(row["value"] for row in rows if row["metric"] == "accuracy")

    wide = ["model=dinov3_vits16", "model.dim=128", "model.depth=6", "model.heads=4", *VIT]
    teacher = run("teacher", options.teacher_steps, *wide, *CROPS, *HEADS, TEMPERATURE, MOMENTUM)
    end = str(options.steps)
    emit(
        "distill.teacher.knn",
        knn(teacher / "export" / str(options.teacher_steps)),
        "accuracy",
        f"{options.teacher_steps} steps",
    )
    scores: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        s = f"seed={seed + 1}"
        objective = [
            "objective=distillation",
            f"objective.teacher={teacher}",
            "objective.students=[convnext_micro]",
            *CROPS,
            TEMPERATURE,
            MOMENTUM,
        ]
        both = run(f"distilled-{seed}", options.steps, *STUDENT, *objective, s) / "export"
        alone = run(f"vit-{seed}", options.steps, *STUDENT, *CROPS, *HEADS, TEMPERATURE, MOMENTUM, s) / "export" / end
        other = run(
            f"convnext-{seed}",
            options.steps,
            "model=convnext_micro",
            "objective=simclr",
            "objective.head_hidden=512",
            s,
        )
        found = {"vit.distilled": both / end, "convnext.distilled": both / "convnext_micro" / end}
        found |= {"vit.scratch": alone, "convnext.scratch": other / "export" / end}
        for name, export in found.items():
            scores.setdefault(name, []).append(knn(export))
        print(seed, {name: round(values[-1], 4) for name, values in scores.items()}, file=sys.stderr, flush=True)
    for name, values in scores.items():
        spread = f"{options.seeds} seeds, {min(values):.3f} to {max(values):.3f}"
        emit(f"distill.{name}.knn", mean(values), "accuracy", spread)


if __name__ == "__main__":
    main()
