"""Segmentation and depth of furnished rooms with true masks and depths: a pretrained export, the untrained network, and
what the position of a pixel alone tells.

    python benchmarks/dense.py FOLDER [--model EXPORT] [--pretrain 210] [--steps 200]

500 rooms for training and 100 with other objects for the test are drawn from the 3-D models of a Debian package
(`rooms.py`). The pretrained export is that of `--model`, beside whose folder the export of step 0 lies, or else SimCLR is
trained on the pictures alone, by the recipe `demo`. The protocols `segmentation` and `depth` train
their linear heads on frozen features, `finetune_segmentation` the whole network, as many steps.

    dense.{pretrained,untrained,position}.miou              mean IoU over 12 kinds of surfaces
    dense.{pretrained,untrained,position}.{rmse,delta1}     error of depths in metres; share of pixels within 25 %
    dense.finetuned.{pretrained,untrained}.miou             by `finetune_segmentation`, from these weights

position: for each pixel the most frequent class, or the mean depth, at this place of the training pictures.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from learning import ENGINE
from rooms import CLASSES, rooms
from steps import emit

from data_pipeline.formats.pixel_maps import MASKS
from eval import depth, segmentation
from eval.dense_data import DEPTHS, Pairs
from eval.features import open_encoder
from eval.run import evaluate
from pretrain.recipes import recipe
from pretrain.train import train

SIZE = 64  # pixels of a window


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, help="an export RUN/export/STEP, with RUN/export/0 beside it")
    parser.add_argument("--pretrain", type=int, default=210, help="steps of SimCLR")
    parser.add_argument("--steps", type=int, default=200, help="steps of each head, and of each fine-tuning")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = rooms(options.folder)
    known, asked = folder / "train", folder / "test"

    def show(name: str, scores: dict[str, float], versus: str) -> None:
        for metric, unit in (("miou", "mIoU"), ("rmse", "metres"), ("delta1", "share")):
            if metric in scores:
                emit(f"dense.{name}.{metric}", scores[metric], unit, versus)

    show("position", position(known, asked), "the same for all pictures")
    run = options.folder / "runs" / f"simclr-{options.pretrain}"
    exports = {"untrained": run / "export" / "0", "pretrained": run / "export" / str(options.pretrain)}
    if options.model:
        exports = {"untrained": options.model.parent / "0", "pretrained": options.model}
    if not exports["pretrained"].is_dir():
        own = [f"steps={options.pretrain}", f"export={options.pretrain}", f"run={run}", "overwrite=true"]
        train(recipe.load("demo", [*ENGINE, *own, f"data.train={known}"]))
    heads = {name: {"steps": options.steps} for name in ("segmentation", "depth")}
    for name, export in exports.items():
        rows = evaluate(export, [*heads], [str(known)], [str(asked)], image_size=SIZE, options=heads, device="cpu")
        show(name, {row["metric"]: row["value"] for row in rows}, f"heads of {options.steps} steps")
    for name, export in exports.items():
        tuned = options.folder / "runs" / f"finetune-{name}-{options.steps}"
        own = [f"steps={options.steps}", f"export={options.steps}", f"objective.classes={len(CLASSES)}"]
        own += [f"data.train={known}", f"init.backbone={export}", f"run={tuned}", "overwrite=true"]
        train(recipe.load("finetune_segmentation_cpu", [*ENGINE, *own]))
        rows = evaluate(tuned / "export" / str(options.steps), ["segmenter"], [], [str(asked)], device="cpu")
        show(f"finetuned.{name}", {row["metric"]: row["value"] for row in rows}, f"{options.steps} steps")


if __name__ == "__main__":
    main()
