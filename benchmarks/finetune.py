"""Fine-tuning and LoRA against probes of the same frozen features, with the same labelled images, on the demo's textures.

    python benchmarks/finetune.py FOLDER [--pretrain 210] [--steps 800] [--seeds 1]

SimCLR is trained without labels on all training images, by the recipe `demo`. Of each of their textures twelve patches
are labelled, from which each classifier learns, and four are held out. The demo's test images are of other textures.
Everything is scored at 64 pixels. Fine-tuning starts from the logistic regression (LP-FT, arXiv 2202.10054).

    finetune.{probe,logistic,full,lora}.accuracy        on the held-out patches of the same textures
    finetune.{probe,logistic,full,lora}.new_textures    on the demo's test images
    finetune.{full,lora}.….seed_std                     standard deviation over seeds, of two or more
    finetune.lora.versus_full.{accuracy,new_textures}   mean over seeds of the difference to `full` in points
    finetune.lora.parameters                            trained parameters, as a share of those of `full`

probe: the grid of `linear`, over class tokens of several blocks and the mean of the patches. logistic: of the class token
of the last block, which the fine-tuned classifiers read, too.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from learning import ENGINE, PROBE, SIZE
from steps import emit, emit_means

from data_pipeline.build.build_shards import build
from data_pipeline.build.demo_images import fetch
from eval.run import evaluate
from pretrain.build import build_objective
from pretrain.recipes import recipe
from pretrain.train import train

LABELLED = 12  # patches of each texture, of sixteen
COSTS = [1.0]  # C of the regression from which fine-tuning starts; a large one gives too confident logits
TUNING = {
    "full": ["optim.lr.value=2e-3"],
    "lora": ["objective.lora=3", "optim.lr.value=5e-3", "optim.layer_decay=1"],
}


def pretrained(folder: Path, steps: int) -> Path:
    """The export of SimCLR after `steps` on the demo's training images, whose shards are folder/shards."""
    fetch(folder / "images", "materials", lambda line: print(line, file=sys.stderr))
    for part in ("train", "test"):
        if not (folder / "shards" / part).is_dir():
            build(folder / "images" / part, folder / "shards" / part)
    export = folder / "runs" / f"simclr-{steps}" / "export" / str(steps)
    if not export.is_dir():
        own = [f"steps={steps}", f"export={steps}", f"run={export.parents[1]}", "overwrite=true"]
        train(recipe.load("demo", [*ENGINE, *own, f"data.train={folder / 'shards' / 'train'}"]))
    return export


def split(images: Path, out: Path) -> None:
    """Build the shards out/known and out/held_out from the demo's training images."""
    for path in images.glob("*/*.png"):
        part = "known" if int(path.stem.rpartition("-")[2]) < LABELLED else "held_out"
        target = out / "images" / part / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            os.link(path, target)
    for part in ("known", "held_out"):
        if not (out / part).is_dir():
            build(out / "images" / part, out / part)


def accuracies(model: Path, name: str, known: Path, asked: dict[str, Path], **options: Any) -> dict[str, float]:
    """{set of query images: accuracy by the protocol `name`}."""
    found = {}
    for key, query in asked.items():
        given = {name: {k: v.format(key) if isinstance(v, str) else v for k, v in options.items()}}
        rows = evaluate(model, [name], [str(known)], [str(query)], image_size=SIZE, options=given, device="cpu")
        found[key] = next(row["value"] for row in rows if row["metric"] == "accuracy")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pretrain", type=int, default=210, help="steps of SimCLR")
    parser.add_argument("--steps", type=int, default=800, help="steps of each fine-tuning")
    parser.add_argument("--seeds", type=int, default=1, help="of each fine-tuning; all start from the same export")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder: Path = options.folder / "materials"
    start = pretrained(folder, options.pretrain)
    split(folder / "images" / "train", folder / "halves")
    known = folder / "halves" / "known"
    asked = {"accuracy": folder / "halves" / "held_out", "new_textures": folder / "shards" / "test"}
    emit_means(
        "finetune.probe", [accuracies(start, "linear", known, asked, **PROBE["linear"])], "grid of frozen features"
    )
    heads = folder / f"heads-{time.time_ns()}"
    heads.mkdir()
    head = {"save": str(heads / "{}"), "costs": COSTS}
    emit_means("finetune.logistic", [accuracies(start, "logistic", known, asked, **head)], "frozen class token, C = 1")

    trained: dict[str, int] = {}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in TUNING}
    spent: dict[str, list[float]] = {name: [] for name in TUNING}
    for seed, name in itertools.product(range(options.seeds), TUNING):
        run = folder / "runs" / f"finetune-{name}-{options.steps}-{seed}"
        own = [*TUNING[name], f"steps={options.steps}", f"export={options.steps}", f"checkpoint={options.steps}"]
        own += [f"seed={seed}", f"run={run}", "overwrite=true", f"data.train={known}", f"init.backbone={start}"]
        cfg = recipe.load("finetune_cpu", [*ENGINE, *own, f"objective.head_from={heads / 'accuracy'}"])
        begin = time.process_time()
        train(cfg)
        spent[name].append(time.process_time() - begin)
        found[name].append(accuracies(run / "export" / str(options.steps), "classifier", known, asked))
        print(f"seed {seed}: {name} {found[name][-1]}", file=sys.stderr)
        trained[name] = sum(p.numel() for p in build_objective(cfg).parameters() if p.requires_grad)
    for name in TUNING:
        emit_means(
            f"finetune.{name}",
            found[name],
            f"{options.seeds} seeds, {options.steps} steps, {mean(spent[name]):.0f} CPU s",
        )
    for key in asked:
        points = mean(100 * (lora[key] - full[key]) for lora, full in zip(found["lora"], found["full"], strict=True))
        emit(f"finetune.lora.versus_full.{key}", points, "points", f"full, {options.seeds} seeds")
    emit("finetune.lora.parameters", trained["lora"] / trained["full"], "share", f"{trained['full']} of full")


if __name__ == "__main__":
    main()
