"""Gram anchoring on real images: the patch similarities of a small ViT degrade in long training, and a Gram stage
restores them.

    python benchmarks/gram.py FOLDER [--steps 600] [--stage 150] [--picture gram.png]

The images are the demo's photographed textures (64 pixels). A DINOv3 ViT (4 blocks of width 64, patches of 8) is
pretrained, and each export is scored on mosaics of four test images of different materials. The export at two fifths of
the run is the Gram teacher (the k-NN accuracy of patches differs too little between exports to choose one). From the
last checkpoint, two runs of equal length continue: without a Gram term (control) and with it. NAME is snapshot (the
Gram teacher), before (the end of pretraining), control, or after (the Gram stage):

    gram.NAME             area under the ROC curve with which the similarities of a patch distinguish its own image of a
                          mosaic from the three others
    gram.accuracy.NAME    k-NN accuracy of patches: the material, by the 20 nearest patches of training images
    gram.agreement.NAME   correlation of the similarities with those of the snapshot
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from steps import emit
from torch import Tensor

from data_pipeline.build.build_shards import build
from data_pipeline.build.demo_images import fetch
from data_pipeline.shards.samples import Samples
from pretrain.interchange.export import load as load_export
from pretrain.models.layers import Backbone
from pretrain.ops.gram import resize_map
from pretrain.recipes.recipe import load
from pretrain.run_folder.export_folders import exports
from pretrain.train import train

SIDE, PATCH = 64, 8
MODEL = [
    "model=dinov3_vits16",
    "model.dim=64",
    "model.depth=4",
    "model.heads=2",
    "model.patch_size=8",
    "model.image_size=64",
]
MODEL += ["model.layer_scale=0.1", "model.registers=4"]
COMMON = [
    "objective.local_size=32",
    "objective.local_crops=4",
    "objective.head_hidden=256",
    "objective.head_bottleneck=64",
]
COMMON += [
    "objective.prototypes=256",
    "objective.unit_prototypes=true",
    "data.batch=32",
    "data.workers=1",
    "threads=1",
    "precision=fp32",
    "device=cpu",
]
COMMON += ["optim.layer_decay=1.0", "optim.patch_embed_lr=1.0", "optim.clip=3.0", "objective.flip=0.5", "log=50"]


def load_images(shards: Path) -> tuple[np.ndarray, list[str]]:
    """(uint8 [N, 64, 64, 3], labels) of all samples."""
    samples = Samples([str(shards)])
    return np.stack([samples.image(i, 3) for i in range(len(samples))]), [samples.label(i) for i in range(len(samples))]


def mosaics(images: np.ndarray, labels: list[str], count: int) -> tuple[np.ndarray, np.ndarray]:
    """(mosaics uint8 [count, 3, 128, 128] of four images of different materials, label numbers [count, 16, 16] of their
    patches)."""
    rng, names = np.random.default_rng(0), sorted(set(labels))
    materials = np.array([names.index(label) for label in labels])
    out, truth = np.empty((count, 3, 2 * SIDE, 2 * SIDE), np.uint8), np.empty((count, 16, 16), np.int64)
    for n in range(count):
        for quarter, material in enumerate(rng.choice(len(names), 4, replace=False)):
            image = images[rng.choice(np.flatnonzero(materials == material))]
            y, x = divmod(quarter, 2)
            out[n, :, y * SIDE : (y + 1) * SIDE, x * SIDE : (x + 1) * SIDE] = image.transpose(2, 0, 1)
            truth[n, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = material
    return out, truth


@torch.inference_mode()
def patches(encoder: Backbone, facts: dict, images: np.ndarray) -> Tensor:
    """L2-normalised patches [B, N, D] of uint8 images [B, 3, H, W]."""
    mean, std = (torch.tensor(facts[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    parts = [(torch.from_numpy(images[i : i + 64]).float() / 255 - mean) / std for i in range(0, len(images), 64)]
    return torch.cat([F.normalize(encoder(part).tokens, dim=-1) for part in parts])


class Scorer:
    """Computes the figures of exported folders, from mosaics of test images and from training images."""

    def __init__(self, folder: Path):
        images, labels = load_images(folder / "shards" / "train")
        test, test_labels = load_images(folder / "shards" / "test")
        names = sorted(set(labels))
        chosen = np.random.default_rng(1).permutation(len(images))[:400]
        self.gallery = images[chosen].transpose(0, 3, 1, 2)  # [400, 3, 64, 64]
        self.gallery_materials = torch.tensor([names.index(labels[i]) for i in chosen]).repeat_interleave(64)
        self.mosaics, materials = mosaics(test, test_labels, 60)
        self.materials = torch.from_numpy(materials).flatten(1)  # [60, 256]

    def accuracy(self, path: Path) -> float:
        """The k-NN accuracy of the patches of the mosaics."""
        encoder, facts = load_export(path)
        gallery = patches(encoder, facts, self.gallery).flatten(0, 1)  # [400·64, D]
        accuracies = []
        for tokens, materials in zip(patches(encoder, facts, self.mosaics), self.materials, strict=True):
            similarity, nearest = (tokens @ gallery.T).topk(20)  # [256, 20]
            votes = torch.zeros(len(tokens), int(self.gallery_materials.max()) + 1)
            votes.scatter_add_(1, self.gallery_materials[nearest], ((similarity - similarity[:, :1]) / 0.07).exp())
            accuracies.append((votes.argmax(1) == materials).float().mean())
        return float(torch.stack(accuracies).mean())

    def similarities(self, path: Path, count: int = 30) -> Tensor:
        """The similarities [count, 256, 256] between the patches of each mosaic."""
        tokens = patches(*load_export(path), self.mosaics[:count])
        return tokens @ tokens.transpose(1, 2)

    def agreement(self, path: Path, snapshot: Path) -> float:
        """Correlation of the similarities off the diagonal with those of a snapshot, mean over mosaics."""
        off_diagonal = ~torch.eye(256, dtype=torch.bool)
        correlations = []
        for a, b in zip(self.similarities(path), self.similarities(snapshot), strict=True):
            correlations.append(torch.corrcoef(torch.stack([a[off_diagonal], b[off_diagonal]]))[0, 1])
        return float(torch.stack(correlations).mean())

    def separation(self, path: Path) -> float:
        """`separation` of an export, mean over mosaics."""
        pairs = zip(self.similarities(path), self.materials, strict=False)
        return float(torch.stack([separation(*pair) for pair in pairs]).mean())


def separation(similarity: Tensor, materials: Tensor) -> Tensor:
    """Area under the ROC curve with which the similarities [N, N] of a patch distinguish its own image of a mosaic from
    the three others, mean over patches. `materials` [N]: label numbers."""
    count = len(materials)
    same = materials.unsqueeze(1) == materials  # [N, N], whether two patches are of the same image
    ranks = similarity.argsort(1).argsort(1).float() + 1  # the rank of a patch with itself is N
    positives = same.sum(1) - 1  # without the patch itself
    rank_sum = (ranks * same).sum(1) - count
    return ((rank_sum - positives * (positives + 1) / 2) / (positives * (count - 1 - positives))).mean()


def picture(scorer: Scorer, folders: dict[str, Path], target: Path, rows: int = 5) -> None:
    """Save a picture. Each row has a mosaic, and for each folder the similarities of all patches to the one at a
    quarter of both sides."""
    maps = {name: scorer.similarities(path, rows) for name, path in folders.items()}
    patch, lines = 4 * 16 + 4, []
    for n in range(rows):
        image = scorer.mosaics[n].transpose(1, 2, 0).copy()
        image[30:42, 30:42] = image[30:42, 30:42] // 2 + np.array([127, 0, 0], np.uint8)
        tiles = [image]
        for similarities in maps.values():
            values = resize_map(similarities[n, patch].view(1, 256, 1), (16, 16), (128, 128)).view(128, 128)
            low, high = values.quantile(0.02), values.quantile(0.98)
            tiles.append((((values - low) / (high - low)).clamp(0, 1) * 255).byte().numpy()[..., None].repeat(3, -1))
        lines.append(np.concatenate([np.pad(tile, ((0, 4), (0, 4), (0, 0)), constant_values=255) for tile in tiles], 1))
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(lines)).save(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--stage", type=int, default=150)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("overrides", nargs="*", help="overrides of the recipe, such as objective.ibot_weight=0.0")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    fetch(options.folder / "images", "materials", lambda line: print(line, file=sys.stderr))
    for split in ("train", "test"):
        if not (options.folder / "shards" / split).is_dir():
            build(options.folder / "images" / split, options.folder / "shards" / split)
    data = [*MODEL, *COMMON, f"data.train={options.folder / 'shards' / 'train'}", *options.overrides]
    scorer, start = Scorer(options.folder), time.process_time()

    def run(name: str, steps: int, *overrides: str) -> Path:
        lengths = [
            f"run={options.folder / name}",
            f"steps={steps}",
            f"export={max(1, steps // 10)}",
            f"checkpoint={steps}",
        ]
        return train(load("dinov3_vits16_demo", [*data, *lengths, *overrides]))

    schedule = [f"optim.lr={{kind: constant, value: {options.lr}, warmup: 100, final: 0.0}}", "objective.momentum=0.99"]
    temperature = "objective.teacher_temperature={value: 0.07, start: 0.04, warmup: 0.1}"
    first = run("pretrain", options.steps, *schedule, temperature)
    curve = {step: scorer.accuracy(path) for step, path in exports(first).items()}
    seconds = round(time.process_time() - start)
    print(json.dumps({"accuracy": curve, "cpu_seconds": seconds}), file=sys.stderr, flush=True)
    snapshot = min(curve, key=lambda step: abs(step - 0.4 * options.steps))
    teacher, last = exports(first)[snapshot], exports(first)[options.steps]
    common = [*schedule, "objective.teacher_temperature=0.07", f"init.run={first}"]
    control = run("control", options.stage, *common)
    gram = [
        f"objective.gram_teacher={teacher}",
        "objective.gram_size=128",
        "objective.gram_weight=2.0",
        "objective.gram_updates=0",
    ]
    stage = run("gram", options.stage, *common, *gram)
    ends = {"before": last, "control": exports(control)[options.stage], "after": exports(stage)[options.stage]}
    for name, path in {"snapshot": teacher, **ends}.items():
        emit(
            f"gram.{name}", scorer.separation(path), "area under ROC", f"snapshot of step {snapshot} of {options.steps}"
        )
        emit(f"gram.accuracy.{name}", scorer.accuracy(path), "patch accuracy", "20 nearest patches")
    for name, path in ends.items():
        emit(
            f"gram.agreement.{name}",
            scorer.agreement(path, teacher),
            "correlation",
            "the snapshot's patch similarities",
        )
    if options.picture:
        picture(scorer, {"snapshot": teacher, **ends}, options.picture)


if __name__ == "__main__":
    main()
