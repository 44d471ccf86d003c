"""Speed and memory of evaluation: k-NN beside a plain matrix product, the grid of linear probes beside one probe, the
memory of an extraction for two sizes of a set, and features of ImageNet's size.

    python benchmarks/eval_speed.py FOLDER [--only knn linear features imagenet]

FOLDER holds what is written meanwhile: 5.3 GB for `imagenet`, whose features are deleted at its end. CPU seconds are
measured in one process and one thread, interleaved; memory is the largest resident size of a process of its own, less
that of the same process before the first image or feature was read.

    eval.knn.versus_matmul              CPU seconds of `knn.classify`, from a feature file, relative to a loop over
                                        blocks of `query @ gallery.T` and `topk` on features in memory
    eval.linear_grid.versus_one_head    CPU seconds of extraction and training of the default grid of `linear` (9 rates,
                                        5 inputs) relative to one rate and one input: ViT-S/16 at 224 pixels, 1,000
                                        classes, 10 visits of each image, as in DINOv2 (12,500 steps of 1,024 images)
    eval.linear_grid.training_only      the same without the extraction
    eval.features.peak_mb               of the extraction of IMAGES images, and of four times as many
    eval.imagenet_scale.NAME.seconds    wall seconds of a protocol on 1,281,167 features of width 1,024, 1,000 classes,
                                        which are read by memory map: `knn` for 500 queries, `fewshot` as it is, and
                                        `linear` for 50 steps of its 9 rates. All three together: eval.imagenet_scale.seconds
    eval.imagenet_scale.peak_mb         of this process; it includes the pages of the feature file that are in memory
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image
from steps import emit

from eval import fewshot, knn, linear
from eval.feature_cache import Labelled
from eval.feature_rows import FeatureRows
from eval.features import Encoder
from pretrain.models import presets
from pretrain.models.build import build_model

GALLERY, QUERIES, WIDTH = 1 << 17, 2048, 384  # of the figure of k-NN
ROUNDS = 3
VISITS = 10  # of each image by the linear probes
IMAGES = 2048
IMAGENET = 1_281_167, 500, 1024, 1000  # features, queries, width, classes
LIMIT = 300  # seconds that the protocols may take together at ImageNet's size
PROTOCOLS = {"knn": (knn, {}), "fewshot": (fewshot, {}), "linear": (linear, {"steps": 50})}


def write_features(path: Path, count: int, width: int, classes: int, seed: int) -> FeatureRows:
    """Write random features [count, width] around a random centre for each class; row n is of class n % classes."""
    centres = np.random.default_rng(0).standard_normal((classes, width), np.float32)
    rng = np.random.default_rng([1, seed])
    table = np.lib.format.open_memmap(path, "w+", np.float32, (count, width))
    for first in range(0, count, 1 << 14):
        rows = min(1 << 14, count - first)
        noise = rng.standard_normal((rows, width), np.float32)
        table[first : first + rows] = centres[(first + np.arange(rows)) % classes] + 4 * noise
    table.flush()
    return FeatureRows(path, np.arange(count))


def write_images(folder: Path, count: int, size: int) -> str:
    """Write a shard of random JPEGs, of which one in 64 is new, with 10 classes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "000000.tar", "w") as tar:
        for n in range(count):
            if n % 64 == 0:
                out = BytesIO()
                Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(out, "JPEG")
            for ending, data in (("jpg", out.getvalue()), ("cls", str(n % 10).encode())):
                info = tarfile.TarInfo(f"{n:07d}.{ending}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    return str(folder)


def interleaved(first: Callable[[], Any], second: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """The median over rounds of the CPU seconds of `first`, divided by those of `second`."""
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for of_task, task in zip(seconds, (first, second), strict=True):
            start = time.process_time()
            task()
            of_task.append(time.process_time() - start)
    return statistics.median(a / b for a, b in zip(*seconds, strict=True))


def measure_knn(folder: Path) -> None:
    gallery = write_features(folder / "gallery.npy", GALLERY, WIDTH, 1000, seed=0)
    query = write_features(folder / "query.npy", QUERIES, WIDTH, 1000, seed=1)
    classes = torch.arange(GALLERY) % 1000
    known, asked = gallery[:], query[:]
    blocks = lambda: [(part @ known.T).topk(10) for part in asked.split(256)]  # noqa: E731
    ratio = interleaved(lambda: knn.classify(gallery, classes, query, 10, 0.07), blocks)
    emit("eval.knn.versus_matmul", ratio, "ratio", f"matmul and topk, {QUERIES} × {GALLERY} × {WIDTH}, fp32")


def encoder_of(name: str, cache: Path) -> Encoder:
    torch.manual_seed(0)
    cls, options = presets.choose(name)
    backbone = build_model(cls(**options))
    encoder = Encoder(backbone, name, backbone.image_size, [0.5] * 3, [0.5] * 3, device="cpu")
    encoder.cache = cache
    return encoder


def measure_linear(folder: Path, images: int = 128) -> None:
    shards = write_images(folder / "photos", images, 256)
    classes = torch.randint(1000, (images,), generator=torch.Generator().manual_seed(0))
    whole = linear.Config(steps=VISITS * images // linear.Config().batch)
    single = whole.replace(rates=[0.1], layers=[1], pooling=["cls"])
    stored: dict[str, tuple[Encoder, Any]] = {}

    def extract(name: str, cfg: linear.Config) -> None:
        shutil.rmtree(folder / name, ignore_errors=True)
        encoder = encoder_of("vit_small", folder / name)
        encoder.layers = linear.layers(cfg)
        stored[name] = encoder, encoder.labelled([shards]).stored()

    def train(name: str, cfg: linear.Config) -> None:
        encoder, rows = stored[name]
        linear.fit(rows, classes, 1000, cfg, "cpu", linear.inputs_of(encoder, cfg))

    both = [lambda a=a: (extract(*a), train(*a)) for a in (("grid", whole), ("single", single))]
    what = "one rate and one input, ViT-S/16 at 224 px, 1,000 classes, 10 visits of each image"
    emit("eval.linear_grid.versus_one_head", interleaved(*both), "ratio", f"{what}, with the extraction")
    alone = [lambda a=a: train(*a) for a in (("grid", whole), ("single", single))]
    emit("eval.linear_grid.training_only", interleaved(*alone), "ratio", what)


def extract_features(folder: str, images: str) -> dict[str, float]:
    """The memory of an extraction; call it in a new process."""
    encoder = encoder_of("vit_micro", Path(folder) / f"features-{images}")
    encoder.pooled(np.zeros((encoder.batch, 3, 32, 32), np.uint8))  # the libraries are loaded
    before = reset_peak()
    found = encoder.labelled([str(Path(folder) / images)])
    return {"peak_mb": resident_mb("VmHWM") - before, "images": len(found)}


def measure_features(folder: Path) -> None:
    for count in (IMAGES, 4 * IMAGES):
        write_images(folder / str(count), count, 64)
        found = in_new_process("extract_features", str(folder), str(count))
        emit("eval.features.peak_mb", found["peak_mb"], "MB", f"{found['images']} images of 64 px, vit_micro")


def score_imagenet(folder: str) -> dict[str, float]:
    """Seconds of each protocol and memory at ImageNet's size; call it in a new process."""
    count, queries, _, classes = IMAGENET
    names = [f"{n:04d}" for n in range(classes)]
    sets = {
        name: Labelled(
            FeatureRows(Path(folder) / f"{name}.npy", np.arange(rows)),
            torch.arange(rows) % classes,
            names,
            *(0, 0, 0, 0),
            np.zeros(0, np.uint64),
            Path(folder),
        )
        for name, rows in (("gallery", count), ("query", queries))
    }
    encoder: Any = SimpleNamespace(labelled=lambda specs: sets[specs[0]], device=torch.device("cpu"))
    out, before = {}, reset_peak()
    for name, (protocol, options) in PROTOCOLS.items():
        start = time.perf_counter()
        scores = protocol.run(encoder, ["gallery"], ["query"], protocol.Config(**options))
        out |= {f"{name}.seconds": time.perf_counter() - start, f"{name}.accuracy": scores["accuracy"]}
    return out | {"peak_mb": resident_mb("VmHWM") - before}


def measure_imagenet(folder: Path) -> None:
    count, queries, width, classes = IMAGENET
    write_features(folder / "gallery.npy", count, width, classes, seed=0)
    write_features(folder / "query.npy", queries, width, classes, seed=1)
    found = in_new_process("score_imagenet", str(folder))
    what = f"{count:,} × {width} fp32, {classes} classes, {queries} queries, one thread"
    for name, (_, options) in PROTOCOLS.items():
        chosen = "".join(f", {key}={value}" for key, value in options.items())
        accuracy = f"accuracy {found[f'{name}.accuracy']:.3f}"
        emit(f"eval.imagenet_scale.{name}.seconds", found[f"{name}.seconds"], "s", f"{what}{chosen}; {accuracy}")
    emit("eval.imagenet_scale.seconds", sum(found[f"{n}.seconds"] for n in PROTOCOLS), "s", f"limit {LIMIT} s; {what}")
    emit("eval.imagenet_scale.peak_mb", found["peak_mb"], "MB", f"the file has {4 * count * width / 1e6:,.0f} MB")


def resident_mb(key: str = "VmRSS") -> float:
    """The resident size of this process; of the key VmHWM: the largest one since `reset_peak`. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024 / 1e6


def reset_peak() -> float:
    """Begin to measure the largest resident size; returns the present one in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mb()


def in_new_process(function: str, *arguments: str) -> dict[str, float]:
    """What a function of this file returns in a new process."""
    words = [sys.executable, __file__, "--call", function, *arguments]
    return json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


MEASURES = {
    "knn": measure_knn,
    "linear": measure_linear,
    "features": measure_features,
    "imagenet": measure_imagenet,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--call", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.call:
        function = {"extract_features": extract_features, "score_imagenet": score_imagenet}[options.call[0]]
        print(json.dumps(function(*options.call[1:])))
        return
    if options.folder is None:
        parser.error("name a folder, in which features are written")
    for name in options.only:
        folder = options.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            MEASURES[name](folder)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
