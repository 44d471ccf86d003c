"""Compares students of a teacher that is pretrained here with the same students trained from scratch with the same
budget, on real images.

    python benchmarks/distill.py FOLDER [--teacher-steps 500] [--steps 150] [--seeds 3]

The images are the demo's photographed textures. The demo's ViT (3 blocks of width 96, patches of 4) is pretrained with
SimCLR. Then, for each seed, a ViT (2 blocks of width 48) and a ConvNeXt learn its features in one run, and each is
trained alone with SimCLR, with the same number of steps, images and crops and the same learning rate. The cost of the
teacher's pretraining and of its forward on the students' crops is not counted. Figures: k-NN accuracy on test textures
that were not used in any training, mean over seeds: distill.{vit,convnext}.{distilled,scratch}.knn.
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

from data_pipeline.build.build_shards import build
from data_pipeline.build.demo_images import fetch
from eval.run import evaluate
from pretrain.recipes.recipe import load
from pretrain.train import train

ENGINE = ["data.workers=1", "threads=1", "precision=fp32", "device=cpu", "log=50"]
RATES = ["optim.lr={kind: cosine, value: 1.5e-3, warmup: 0.1}"]
# The crops equal those of SimCLR here. The moving average of the students is short (0.9): with a longer one, an export
# of such a short run would be an average of its middle.
DISTILLED = [
    "objective.loss=features",
    "objective.global_scale=0.4",
    "objective.local_crops=0",
    "objective.blur=[0.5, 0.5, 0.5]",
    "objective.solarize=0.0",
    "objective.momentum=0.9",
    "objective.students=[convnext_micro image_size=32]",
]
STUDENT = "vit dim=48 depth=2 heads=2 image_size=32 patch_size=4"
SIZE = 64  # pixels of the images in the evaluation, as in the demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--teacher-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    folder = options.folder
    torch.set_num_threads(1)
    fetch(folder / "images", "materials", lambda line: print(line, file=sys.stderr))
    for split in ("train", "test"):
        if not (folder / "shards" / split).is_dir():
            build(folder / "images" / split, folder / "shards" / split)
    gallery, query = [str(folder / "shards" / "train")], [str(folder / "shards" / "test")]

    def run(name: str, steps: int, batch: int, *overrides: str) -> Path:
        common = [
            f"data.batch={batch}",
            f"data.train={gallery[0]}",
            f"run={folder / name}",
            f"steps={steps}",
            f"checkpoint={steps}",
            f"export={steps}",
        ]
        return train(load("demo", [*overrides, *common, *ENGINE, *RATES])) / "export"

    def knn(export: Path) -> float:
        rows = evaluate(export, ["knn"], gallery, query, image_size=SIZE)
        return next(row["value"] for row in rows if row["metric"] == "accuracy")

    teacher = run("teacher", options.teacher_steps, 128) / str(options.teacher_steps)
    emit("distill.teacher.knn", knn(teacher), "accuracy", f"{options.teacher_steps} steps")
    end = str(options.steps)
    vit = [f"model.{option}" if "=" in option else f"model={option}" for option in STUDENT.split()]
    scores: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        budget = (options.steps, 64, f"seed={seed + 1}")
        objective = ["objective=distillation", f"objective.teacher={teacher}", *DISTILLED]
        distilled = run(f"distilled-{seed}", *budget, *vit, *objective)
        vit_scratch = run(f"vit-{seed}", *budget, *vit)
        convnext_scratch = run(f"convnext-{seed}", *budget, "model=convnext_micro", "model.image_size=32")
        students = {"vit.distilled": distilled / end, "convnext.distilled": distilled / "convnext_micro" / end}
        students |= {"vit.scratch": vit_scratch / end, "convnext.scratch": convnext_scratch / end}
        for name, export in students.items():
            scores.setdefault(name, []).append(knn(export))
        print(seed, {name: round(values[-1], 4) for name, values in scores.items()}, file=sys.stderr, flush=True)
    for name, values in scores.items():
        spread = f"{options.seeds} seeds, {min(values):.3f} to {max(values):.3f}"
        emit(f"distill.{name}.knn", mean(values), "accuracy", spread)


if __name__ == "__main__":
    main()
