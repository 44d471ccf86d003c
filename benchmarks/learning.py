"""How well each image objective learns in the same CPU time, on real images, beside raw pixels, an untrained network, the
same network trained with labels, and the same method made of lightly's modules.

    python benchmarks/learning.py FOLDER [--objectives simclr byol …] [--seconds 90] [--seeds 1] [--set materials]
                                         [--network vit] [--lightly] [key=value …]

The images are the demo's: photographed textures (`materials`), of whose families none is both in training and in test,
handwritten digits (`digits`), or pictures of clothes (`fashion`). Each objective trains the same small network in one
process and one thread, by its recipe `NAME_cpu` or the options in RECIPES: the demo's ViT (3 blocks of width 96, patches
of 4 on crops of 32 pixels), or a ResNet-18 with a quarter of the published widths (small stem, crops of 64 pixels).
`key=value` changes the recipes of all. First the CPU seconds of a step are measured, data included; the run then has as
many steps as fit into the budget, so that its schedules end with it.

k-NN and linear accuracy are those of test images. `patch_knn` is the accuracy of pixels by k-NN of patches (the
protocol `patch_knn`) in mosaics of four images of different labels, made of test images and, for the gallery, of
training images. `--lightly` also trains each method that `lightly_methods/` has, for as many steps with the same
options, batches and optimizer: only heads, losses and averages are lightly's.

    learning.NAME.{knn,linear,patch_knn}            accuracy after the run; `versus`: steps, CPU seconds
    learning.NAME.{knn,linear,patch_knn}.seed_std   standard deviation over seeds, of two or more
    learning.lightly_NAME.…                         the same of lightly's modules
    learning.NAME.versus_lightly                    mean of these accuracies, ours / lightly's
    learning.supervised.…                           the objective `finetune`, from random weights
    learning.{untrained,untrained_mean}.…           the network at step 0 (of the first seed): with its class token, or
                                                    the pooled map of a ResNet, and with the mean of its patches, as
                                                    the method exports it; `_sincos`, `_rope`: with other positions
    learning.pixels.{knn,linear}                    raw pixels
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tarfile
import time
from pathlib import Path
from statistics import mean

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from gram import PATCH, load_images, mosaics
from package_data import fashion
from PIL import Image
from steps import LIGHTLY, emit, emit_means

from common.errors import ConfigError
from data_pipeline.build.build_shards import build
from data_pipeline.build.demo_images import fetch
from data_pipeline.parts.label import Label
from eval.run import evaluate
from pretrain.build import build_objective, build_stream, open_samples, placed
from pretrain.interchange.export import load as load_export
from pretrain.objectives import finder
from pretrain.optim.skip_steps import Guard
from pretrain.parallel.engine import Engine
from pretrain.recipes import defaults, recipe
from pretrain.step import one_step
from pretrain.train import train

RECIPES: dict[str, list[str]] = {  # options over `demo`, of objectives without a recipe NAME_cpu
    "simclr": [],
}
# {objective: (option, another objective)}: the option is the export of the other objective's last run
AFTER = {"beit": ("objective.visual_tokenizer", "vqvae")}
NETWORKS = {
    "vit": ["model.patch_size=4", "model.image_size=32"],
    "resnet18": ["model=resnet18", "model.stem=small", "model.widths=[16, 32, 64, 128]"],
}
# of `finetune_cpu`, which starts from a pretrained backbone: from random weights all layers have one learning rate
SUPERVISED = ["objective.pool=cls", "optim.layer_decay=1.0"]
ENGINE = [
    "data.workers=0",
    "threads=1",
    "precision=fp32",
    "device=cpu",
    "log=50",
    "log.flops=false",
    "eval.image_size=64",
]
MEASURED = 4  # steps that are measured, after two others
SIZE = 64  # pixels that evaluation shows, as in the demo
MOSAICS = {"train": 300, "test": 100}
# a mosaic of 128 pixels is shown at 64, so that its four images have the size of the crops in training
PROBE = {"linear": {"steps": 500}, "patch_knn": {"size": SIZE, "patches": 16384, "k": [10]}}
METRICS = {"knn": "accuracy", "linear": "accuracy", "patch_knn": "pixel_accuracy"}
CPU = torch.device("cpu")


def names() -> list[str]:
    """All objectives that read images only."""
    known = {*RECIPES, *(name.removesuffix("_cpu") for name in recipe.names() if name.endswith("_cpu"))}
    return sorted(name for name in known if finder.find(name).parts.keys() == {"image"})


def load(name: str, *overrides: str, network: str = "vit") -> recipe.Recipe:
    own = [f"objective={name}", *RECIPES[name]] if name in RECIPES else []
    base = "demo" if name in RECIPES else f"{name}_cpu"
    return recipe.load(base, [*own, *NETWORKS[network], *ENGINE, *overrides])


def seconds_of_a_step(cfg: recipe.Recipe) -> float:
    """CPU seconds of a training step, with its data."""
    samples = open_samples(cfg)
    classes = len(Label().about(samples, cfg.model)["classes"])
    defaults.settle(cfg, sum(map(len, samples)), classes=classes)
    objective = build_objective(cfg, start=True)
    engine, guard = Engine(objective, cfg, CPU), Guard(objective, cfg.skip, CPU)
    stream = build_stream(cfg, objective, samples)
    for step in range(2 + MEASURED):
        if step == 2:
            start = time.process_time()
        one_step(engine, guard, [placed(objective, next(stream), CPU)], step, lr=1e-4, weight_decay=0.05)
    return (time.process_time() - start) / MEASURED


def write_mosaics(shards: Path, target: Path, count: int) -> None:
    """Write mosaics of four images of different labels, with the label of each pixel, to `target`/0.tar."""
    images, truth = mosaics(*load_images(shards), count)
    target.mkdir(parents=True)
    with tarfile.open(target / "0.tar", "w") as tar:
        for number, (image, labels) in enumerate(zip(images, truth, strict=True)):
            mask = labels.astype(np.uint8).repeat(PATCH, 0).repeat(PATCH, 1)
            for ending, pixels in (("jpg", image.transpose(1, 2, 0)), ("mask.png", mask)):
                data = io.BytesIO()
                Image.fromarray(pixels).save(data, "PNG" if ending.endswith("png") else "JPEG", quality=95)
                info = tarfile.TarInfo(f"{number:04d}.{ending}")
                info.size = len(data.getvalue())
                tar.addfile(info, io.BytesIO(data.getvalue()))


class Scorer:
    """Scores networks on the sets in a folder, which it makes."""

    def __init__(self, folder: Path, images: str):
        if images == "fashion":
            fashion(folder / "images")
        else:
            fetch(folder / "images", images, lambda line: print(line, file=sys.stderr))
        self.shards = {split: folder / "shards" / split for split in MOSAICS}
        self.mosaics = {split: folder / "mosaics" / split for split in MOSAICS}
        for split, count in MOSAICS.items():
            if not self.shards[split].is_dir():
                build(folder / "images" / split, self.shards[split])
            if not self.mosaics[split].is_dir():
                write_mosaics(self.shards[split], self.mosaics[split], count)

    def scores(self, model: str | Path) -> dict[str, float]:
        """{protocol: accuracy} of an export, or of "pixels"."""
        out = {}
        for protocols, sets in ((["knn", "linear"], self.shards), (["patch_knn"], self.mosaics)):
            if model == "pixels" and sets is self.mosaics:
                continue  # pixels have no patches
            known, asked = ([str(sets[split])] for split in ("train", "test"))
            options = {protocol: PROBE[protocol] for protocol in protocols if protocol in PROBE}
            rows = evaluate(model, protocols, known, asked, image_size=SIZE, options=options, device="cpu")
            out |= {row["protocol"]: row["value"] for row in rows if row["metric"] == METRICS[row["protocol"]]}
        return out


def untrained_name(cfg: recipe.Recipe, export: Path) -> str:
    """The name of an untrained network: by the feature that the method exports, and by its positions."""
    pool = "_mean" if load_export(export)[1]["pool"] == "mean" else ""
    positions = getattr(cfg.model, "positions", "learned")
    return f"untrained{pool}" + ("" if positions == "learned" else f"_{positions}")


class Comparison:
    """Trains and scores methods with the same budget."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.folder: Path = options.folder / options.set
        self.scorer = Scorer(self.folder, options.set)
        self.untrained: set[str] = set()  # names of those that are scored
        self.exports = dict[str, Path]()  # of the last run of each method

    def recipe(self, name: str, *overrides: str) -> recipe.Recipe:
        data = [f"data.train={self.scorer.shards['train']}", *self.options.overrides]
        data += [f"{AFTER[name][0]}={self.exports[AFTER[name][1]]}"] if name in AFTER else []
        data += SUPERVISED if name == "finetune" else []
        return load(name, *data, *overrides, network=self.options.network)

    def train(self, name: str, label: str, steps: int, file: str | None = None) -> list[dict[str, float]]:
        """Train a method with each seed and print its figures. `file`: of another objective with the same options."""
        found, spent = [], []
        for seed in range(self.options.seeds):
            run = self.folder / "runs" / f"{label}-{self.options.network}-{self.options.seconds:g}-{seed}"
            own = [f"steps={steps}", f"checkpoint={steps}", f"export={steps}", f"run={run}", "overwrite=true"]
            cfg = self.recipe(name, *own, f"seed={seed}")
            cfg.objective.name = file or cfg.objective.name
            start = time.process_time()
            train(cfg)
            spent.append(time.process_time() - start)
            first = untrained_name(cfg, run / "export" / "0")
            if first not in self.untrained:
                self.untrained.add(first)
                emit_means(f"learning.{first}", [self.scorer.scores(run / "export" / "0")], f"step 0 of {label}")
            self.exports[label] = run / "export" / str(steps)
            found.append(self.scorer.scores(self.exports[label]))
        emit_means(f"learning.{label}", found, f"{steps} steps, {mean(spent):.0f} CPU s")
        return found

    def compare(self, name: str) -> None:
        label = "supervised" if name == "finetune" else name
        try:
            seconds = seconds_of_a_step(self.recipe(name, "steps=100", "run=unused"))
        except (ConfigError, ValueError) as error:
            print(f"{label}: left out: {error}", file=sys.stderr)
            return
        steps = max(8, round(self.options.seconds / seconds))
        found = self.train(name, label, steps)
        if self.options.lightly and name in LIGHTLY:
            theirs = self.train(name, f"lightly_{name}", steps, LIGHTLY[name])
            ours, others = (mean(mean(scored.values()) for scored in each) for each in (found, theirs))
            emit(f"learning.{name}.versus_lightly", ours / others, "ratio", "mean accuracy, the same steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--objectives", nargs="+", choices=[*names(), "supervised"], default=[*names(), "supervised"])
    parser.add_argument("--seconds", type=float, default=90, help="CPU seconds of each training")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", choices=["materials", "digits", "fashion"], default="materials")
    parser.add_argument("--network", choices=list(NETWORKS), default="vit")
    parser.add_argument("--lightly", action="store_true", help="also train lightly's modules, for as many steps")
    parser.add_argument("overrides", nargs="*", help="overrides of all recipes, such as data.batch=64")
    options = parser.parse_intermixed_args()
    for name, (_, other) in AFTER.items():
        if name in options.objectives and other not in options.objectives:
            parser.error(f"{name} needs a run of {other}; write --objectives {other} {name}")
    torch.set_num_threads(1)
    comparison = Comparison(options)
    emit_means("learning.pixels", [comparison.scorer.scores("pixels")], "raw pixels")
    for name in sorted(options.objectives, key=AFTER.__contains__):
        comparison.compare("finetune" if name == "supervised" else name)


if __name__ == "__main__":
    main()
