"""Segmentation and depth of furnished rooms with true masks and depths: pretrained exports, their untrained networks, and
what the position of a pixel alone tells.

    python benchmarks/dense.py FOLDER [--methods simclr …] [--pretrain 300] [--steps 500] [--depth-steps 4000] [--tune 400]
                                      [--model NAME=RUN/export/STEP …]

500 rooms for training and 100 with other objects for the test are drawn from the 3-D models of a Debian package
(`rooms.py`). Each method of METHODS is trained on the pictures alone, by its recipe with smaller crops, so that objects
are seen as large as in the evaluation. `--model` names further exports, beside which the export of step 0 lies. The protocols
`segmentation` and `depth` train their linear heads on frozen features, `patch_knn` trains nothing, and
`finetune_segmentation` trains the whole network.

    dense.position.{miou,rmse,delta1}                       mean IoU over 12 kinds of surfaces, error of depths in metres,
                                                            share of pixels whose depth is within 25 %
    dense.NAME.{untrained,pretrained}.{miou,rmse,delta1}    NAME: a method, and those of `--model`
    dense.NAME.{untrained,pretrained}.knn.miou              by the nearest patches
    dense.finetuned.{untrained,pretrained}.miou             of SimCLR's network; `--tune 0` leaves it out

position: for each pixel the most frequent class, or the mean depth, at this place of the training pictures.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from learning import ENGINE
from rooms import CLASSES, HEIGHT, WIDTH, rooms
from steps import emit

from data_pipeline.formats.pixel_maps import MASKS
from eval import depth, segmentation
from eval.dense_data import DEPTHS, Pairs
from eval.features import open_encoder
from eval.run import evaluate
from pretrain.recipes import recipe
from pretrain.train import train

SIZE = 64  # pixels of a window
# Of heads; the published rates are for 100 times as many steps. Depth is that of whole pictures, by the features of all
# blocks, as DINOv2 concatenates four, in steps of few pictures, which are many for the same time: chosen by the error in
# 100 rooms of training, for which heads learned from the others.
HEADS = {
    "segmentation": {"rate": 1e-2},
    "depth": {"rate": 2e-2, "batch": 4, "layers": 3, "height": HEIGHT, "width": WIDTH},
}
PATCH_KNN = {"size": SIZE, "k": [10], "patches": 16_384}
METHODS = {  # recipe and options; crop_scale: smallest share of a picture
    "simclr": ("demo", ["objective.crop_scale=0.2"]),
    "dinov2": ("dinov2_cpu", ["objective.global_scale=0.3"]),
    "mae": ("mae_cpu", ["objective.crop_scale=0.3", "model.image_size=64"]),
}


def position(known: Path, asked: Path) -> dict[str, float]:
    """The scores of predictions that are the same for all pictures."""
    encoder, _ = open_encoder("pixels", device="cpu")
    masks = [Pairs(encoder, [str(each)], "", MASKS, "segmentation.member") for each in (known, asked)]
    depths = [Pairs(encoder, [str(each)], "", DEPTHS, "depth.member") for each in (known, asked)]
    options, metres = segmentation.Config(), depth.Config()
    votes: np.ndarray | None = None
    for _, values in (masks[0].read(n) for n in masks[0].numbers):
        one = np.eye(len(CLASSES))[values.clip(0, len(CLASSES) - 1)] * (values < len(CLASSES))[..., None]
        votes = one if votes is None else votes + one
    assert votes is not None
    chosen = torch.from_numpy(votes.argmax(-1))
    confusion = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.long)
    for _, values in (masks[1].read(n) for n in masks[1].numbers):
        confusion += segmentation.confusion_of(chosen, segmentation.class_map(values, options), len(CLASSES))
    maps = np.stack([depth.metres(values, metres) for _, values in (depths[0].read(n) for n in depths[0].numbers)])
    mean = torch.from_numpy(maps.sum(0) / np.maximum((maps > 0).sum(0), 1)).clamp_min(metres.nearest)
    errors = [
        depth.errors(mean, torch.from_numpy(depth.metres(values, metres)))
        for _, values in (depths[1].read(n) for n in depths[1].numbers)
    ]
    of_depth = {key: float(np.mean([each[key] for each in errors])) for key in ("rmse", "delta1")}
    return {"miou": segmentation.scores(confusion)["miou"], **of_depth}


def pretrained(folder: Path, name: str, steps: int, shards: Path) -> Path:
    """The export of a method after `steps` on the pictures."""
    base, changes = METHODS[name]
    export = folder / "runs" / f"{name}-{steps}" / "export" / str(steps)
    if not export.is_dir():
        own = [f"steps={steps}", f"export={steps}", f"run={export.parents[1]}", "overwrite=true", *changes]
        train(recipe.load(base, [*ENGINE, *own, f"data.train={shards}"]))
    return export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="*", default=["simclr"], choices=METHODS)
    parser.add_argument("--pretrain", type=int, default=300, help="steps of each method")
    parser.add_argument("--steps", type=int, default=500, help="steps of each head for segmentation")
    parser.add_argument("--depth-steps", type=int, default=4000, help="steps of each head for depth")
    parser.add_argument("--tune", type=int, default=400, help="steps of each fine-tuning")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=RUN/export/STEP")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = rooms(options.folder)
    known, asked = folder / "train", folder / "test"

    def show(name: str, scores: dict[str, float], versus: str) -> None:
        for metric, unit in (("miou", "mIoU"), ("rmse", "metres"), ("delta1", "share")):
            if metric in scores:
                emit(f"dense.{name}.{metric}", scores[metric], unit, versus)

    show("position", position(known, asked), "the same for all pictures")
    models = {name: pretrained(options.folder, name, options.pretrain, known) for name in options.methods}
    models |= {name: Path(path) for name, path in (each.split("=", 1) for each in options.model)}
    steps = {"segmentation": options.steps, "depth": options.depth_steps}
    heads: dict[str, dict[str, Any]] = {name: {"steps": steps[name], **own} for name, own in HEADS.items()}
    for name, export in models.items():
        for kind, folder in (("pretrained", export), ("untrained", export.parent / "0")):
            data = {"gallery": [str(known)], "query": [str(asked)], "image_size": SIZE, "device": "cpu"}
            rows = evaluate(folder, [*heads], options=heads, **data)
            show(
                f"{name}.{kind}",
                {row["metric"]: row["value"] for row in rows},
                f"heads of {options.steps} and {options.depth_steps} steps",
            )
            rows = evaluate(folder, ["patch_knn"], options={"patch_knn": PATCH_KNN}, **data)
            show(f"{name}.{kind}.knn", {row["metric"]: row["value"] for row in rows}, "no training")
    own = models.get("simclr")
    for kind, export in (("untrained", own.parent / "0"), ("pretrained", own)) if options.tune and own else ():
        tuned = options.folder / "runs" / f"finetune-{kind}-{options.tune}"
        changes = [f"steps={options.tune}", f"export={options.tune}", f"objective.classes={len(CLASSES)}"]
        changes += [f"data.train={known}", f"init.backbone={export}", f"run={tuned}", "overwrite=true"]
        train(recipe.load("finetune_segmentation_cpu", [*ENGINE, *changes]))
        rows = evaluate(tuned / "export" / str(options.tune), ["segmenter"], [], [str(asked)], device="cpu")
        show(f"finetuned.{kind}", {row["metric"]: row["value"] for row in rows}, f"{options.tune} steps")


if __name__ == "__main__":
    main()
