"""Whether the methods for image-text pairs, video and audio learn on real data of ordinary packages, on one CPU core.

    python benchmarks/multimodal.py FOLDER [--objectives clip siglip …] [--seconds 240] [--seeds 3] [--tune]

Each trains by its recipe NAME_cpu in one thread, for as many steps as fit into the CPU seconds of a run; the steps are
measured first, data included, or given by --steps. Data and runs go to FOLDER. Three figures for each metric, means
over the seeds, and `seed_std`:

    multimodal.NAME.METRIC              after the run; `versus`: steps, CPU seconds
    multimodal.NAME.METRIC.untrained    of the network at step 0
    multimodal.NAME.METRIC.floor        of features without a network, see below

clip, siglip: emoji in eight styles with names and keywords (emoji.py). zeroshot: accuracy for pictures of concepts that
no run has seen, each described by its name and keywords, among all of them. Floor: a linear map from a histogram of
colours to the words of a description, fitted on the same training pictures, at the ridge that is best for the pictures
asked for. With --tune, the concepts asked for are others, and neither these nor the reported ones are trained on:
learning rate, weight decay and temperature below were chosen by these.

bestrq, audio_mae: words spoken by Debian's espeak-ng, which has to be installed (apt-get install espeak-ng). knn, linear:
accuracy for words of unseen voices. Floor: mean and deviation of the log-mel bands.

videomae, vjepa2: a camera that moves along a wall of unseen furniture in one of eight directions, in noise (walls.py).
linear, fewshot (25 labelled videos of each direction), knn: accuracy for the direction, of which single frames say
nothing. Floor: `mae` trained on single frames for the same time. multimodal.walls.flow: the accuracy of the least-squares
motion, without a network.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from emoji import emoji
from learning import seconds_of_a_step
from package_data import WORDS, spoken
from PIL import Image
from steps import emit, emit_means
from walls import DIRECTIONS, RATE, flow_accuracy, walls

from data_pipeline.shards.samples import Samples
from eval.run import evaluate
from pretrain.recipes.recipe import Recipe, load
from pretrain.train import train

Scores = dict[str, float]  # by metric
CPU = ["data.workers=0", "threads=1", "precision=fp32", "device=cpu", "overwrite=true", "log={every: 50, flops: false}"]


@dataclass
class Task:
    """What a method is trained on, and how its exports are scored."""

    options: list[str]  # of the recipe
    score: Callable[[Path], Scores]  # of an export
    floor: Callable[[], Scores]
    baseline: str  # what the floor is


# ---------------------------------------------------------------- images and captions
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def image_text(name: str, asked: argparse.Namespace) -> Task:
    folder = asked.folder
    data = emoji(folder, asked.tune)
    test = str(data / "test")
    classes = Samples([test]).manifests[0].manifest.classes
    described = json.loads((data / "descriptions.json").read_text())
    texts = [described[each] for each in classes]

    def score(export: Path) -> Scores:
        settings = {"zeroshot": {"names": texts, "templates": ["{}"]}}
        rows = evaluate(export, ["zeroshot"], [], [test], options=settings, cache=folder / "features", device="cpu")
        return {"zeroshot": next(row["value"] for row in rows if row["metric"] == "accuracy")}

    options = [f"data.train={data / 'train'}", f"data.tokenizer={data / 'tokenizer.json'}", "data.captions=captions"]
    options += ["data.length=24", "model.patch_size=8", "objective.crop_scale=0.6", "objective.flip=0.5"]
    options += ["objective.text.depth=1", "data.batch=64"]
    options += ["optim.lr.value=1.5e-3", "optim.beta2=0.98", "optim.weight_decay=0.5"]
    options += ["objective.temperature=0.2"] if name == "clip" else []
    floor = f"bag of colours; chance {1 / len(classes):.4f}"
    return Task(options, score, lambda: {"zeroshot": colours(data / "pictures", described, classes)}, floor)


def colours(pictures: Path, described: dict[str, str], classes: list[str]) -> float:
    """The accuracy, at the best ridge, of a linear map from the colours of a picture to the words of its description."""
    rows = [json.loads(line) for line in (pictures / "train" / "list.jsonl").read_text().splitlines()]
    vocabulary = sorted({word for row in rows for word in words_of(row["text"])})
    index = {word: n for n, word in enumerate(vocabulary)}

    def bags(texts: Iterable[str]) -> np.ndarray:
        out = np.zeros((len(texts := list(texts)), len(index)))
        for row, text in zip(out, texts, strict=True):
            row[[index[word] for word in words_of(text) if word in index]] = 1
        return out

    known = bags(row["text"] for row in rows)
    rarity = np.log(len(known) / known.sum(0))
    known, wanted = (
        x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-9)
        for x in (known * rarity, bags(described[name] for name in classes) * rarity)
    )
    files = [(path, n) for n, name in enumerate(classes) for path in sorted((pictures / "test" / name).iterdir())]
    x = np.stack([histogram(pictures / "train" / row["image"]) for row in rows])
    asked, truth = np.stack([histogram(path) for path, _ in files]), np.array([n for _, n in files])
    centre, middle = x.mean(0), known.mean(0)
    best = 0.0
    for ridge in RIDGES:
        weights = np.linalg.solve(
            (x - centre).T @ (x - centre) + ridge * np.eye(x.shape[1]), (x - centre).T @ (known - middle)
        )
        predicted = ((asked - centre) @ weights @ (wanted - middle).T).argmax(1)
        best = max(best, float((predicted == truth).mean()))
    return best


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def histogram(path: Path) -> np.ndarray:
    """The square roots of the shares of 64 colours, [64]."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).astype(int) // 64
    counts = np.bincount(pixels @ [16, 4, 1], minlength=64)
    return np.sqrt(counts / counts.sum())


# ---------------------------------------------------------------- audio
def audio(name: str, asked: argparse.Namespace) -> Task:
    folder = asked.folder
    known, unseen = spoken(folder)

    def score(model: Path | str) -> Scores:
        rows = evaluate(
            model, ["knn", "logistic"], [str(known)], [str(unseen)], cache=folder / "features", device="cpu"
        )
        by = {row["protocol"]: row["value"] for row in rows if row["metric"] == "accuracy"}
        return {"knn": by["knn"], "linear": by["logistic"]}

    return Task(
        [f"data.train={known}"], score, lambda: score("log_mel"), f"log-mel statistics; chance {1 / len(WORDS):.3f}"
    )


# ---------------------------------------------------------------- video
MOTION: dict[str, dict[str, Any]] = {"logistic": {}, "fewshot": {"shots": [25], "penalty": 100.0}, "knn": {}}
METRIC = {"logistic": "linear"}  # where it is not the name of the protocol


def video(name: str, asked: argparse.Namespace) -> Task:
    folder = asked.folder
    data = walls(folder)  # a flip would exchange directions
    options = [f"data.train={data / 'train'}", "objective.flip=0", "objective.crop_scale=1", f"data.fps={RATE}"]
    if name == "videomae":  # 16 clips of 4 videos, which are decoded once
        options += ["data.batch=4", "objective.clips_per_video=4", "objective.mask_ratio=0.5"]
    floor = functools.partial(single_frames, folder, asked.seconds)
    return Task(
        options, lambda export: directions(export, folder), floor, f"mae on single frames; chance {1 / DIRECTIONS}"
    )


def directions(model: Path, folder: Path, kind: str = "") -> Scores:
    """The accuracy for the direction, of a model of clips or (kind "frames_") of frames."""
    sets = [[str(folder / "walls" / (kind + split))] for split in ("train", "test")]
    rows = evaluate(model, list(MOTION), *sets, options=MOTION, cache=folder / "features", device="cpu")
    return {METRIC.get(row["protocol"], row["protocol"]): row["value"] for row in rows if row["metric"] == "accuracy"}


@functools.cache  # both methods have this floor
def single_frames(folder: Path, seconds: float) -> Scores:
    options = [
        f"data.train={folder / 'walls' / 'frames_train'}",
        "model.patch_size=8",
        "objective=mae",
        *SMALL_DECODER,
    ]
    steps = steps_in(seconds, "mae", folder, options)
    exports, _ = trained("mae", 0, steps, folder, options)
    return directions(exports / str(steps), folder, "frames_")


SMALL_DECODER = ["objective.decoder_dim=48", "objective.decoder_depth=2", "objective.decoder_heads=3"]
TASKS: dict[str, Callable[[str, argparse.Namespace], Task]] = {
    **{"clip": image_text, "siglip": image_text},
    **{"bestrq": audio, "audio_mae": audio},
    **{"videomae": video, "vjepa2": video},
}


# ---------------------------------------------------------------- all
def recipe_of(name: str, steps: int, folder: Path, options: list[str]) -> Recipe:
    own = [f"steps={steps}", f"checkpoint={steps}", f"export={steps}", f"run={folder}"]
    return load("demo" if name == "mae" else f"{name}_cpu", [*options, *CPU, *own])


def steps_in(seconds: float, name: str, folder: Path, options: list[str]) -> int:
    """The number of steps of a recipe that fit into so many CPU seconds."""
    return max(20, round(seconds / seconds_of_a_step(recipe_of(name, 100, folder, options))))


def trained(name: str, seed: int, steps: int, folder: Path, options: list[str]) -> tuple[Path, float]:
    """Run a recipe. Returns (the folder of its exports, CPU seconds)."""
    start = time.process_time()
    run = folder / "runs" / f"{name}-{steps}-{seed}"
    exports = train(recipe_of(name, steps, run, [*options, f"seed={seed}"])) / "export"
    return exports, time.process_time() - start


def show(name: str, task: Task, asked: argparse.Namespace) -> None:
    """Train with each seed, and print the figures."""
    found, untrained, spent = list[Scores](), list[Scores](), list[float]()
    folder, options = asked.folder, [*task.options, *asked.set]
    steps = asked.steps or steps_in(asked.seconds, name, folder, options)
    for seed in range(asked.seeds):
        exports, used = trained(name, seed, steps, folder, options)
        spent.append(used)
        found.append(task.score(exports / str(steps)))
        untrained.append(task.score(exports / "0"))
        print(f"{name}, seed {seed}: {found[-1]}, untrained {untrained[-1]}", file=sys.stderr, flush=True)
    floor = task.floor()
    emit_means(f"multimodal.{name}", found, f"{steps} steps, {mean(spent):.0f} CPU s")
    for metric in found[0]:
        before = mean(scores[metric] for scores in untrained)
        emit(f"multimodal.{name}.{metric}.untrained", before, "accuracy", "step 0")
        emit(f"multimodal.{name}.{metric}.floor", floor[metric], "accuracy", task.baseline)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--objectives", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seconds", type=float, default=240, help="CPU seconds of each training")
    parser.add_argument("--steps", type=int, help="steps of each training, in place of --seconds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], help="options of the recipes, such as optim.lr.value=1e-3")
    parser.add_argument("--tune", action="store_true", help="clip, siglip: other concepts, to choose options by")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.tune and (others := [name for name in asked.objectives if TASKS[name] is not image_text]):
        parser.error(f"--tune: {others[0]} has no data to choose options by; write --objectives clip siglip")
    if any(TASKS[name] is video for name in asked.objectives):
        emit("multimodal.walls.flow", flow_accuracy(asked.folder), "accuracy", f"chance {1 / DIRECTIONS}")
    for name in asked.objectives:
        show(name, TASKS[name](name, asked), asked)


if __name__ == "__main__":
    main()
