"""The speed of making DINO's ten views of a JPEG on one core, compared with torchvision's transforms on Pillow images,
and whether both make the same views.

Figures, for 2 × 224 and 8 × 96 pixels with the whole recipe (flip, jitter, grey, blur, solarize), for photographs of
500×375 and 1024×768 pixels (S):

    views.S.exact_f32.ratio   CPU seconds of the reference / ours, with exact colours and normalised float32 output, as
                              the reference gives
    views.S.exact_u8.ratio    the same with uint8 views, as data workers make them: the device normalises
    views.S.fused_u8.ratio    the same with fused colours;   views.S.device_u8.ratio without colours, for the device
    views.S.X.images_per_second  per core
    views.S.fused_u8.share_of_floor  CPU seconds of only the decoding and the ten antialiased resizes / all of ours
    views.1024x768.scaled_decode  share of the images that fused views decode below their full size, and the share of
                              their views' gradient energy that remains
    views.S.ks.V.X.p          smallest p over six statistics of views from X against views from the reference (two-sample
                              Kolmogorov-Smirnov), for the second global and a local view; a line with all six is
                              printed to stderr. X = reference is a second sample of the reference: the smallest of six
                              uniform numbers is below 0.05 in one of four cases. X = aliased, resizing without
                              antialiasing, shows the power of the test, and must be small. X = fused at 1024x768 may be
                              small, too, because it decodes at a smaller scale

The reference is the published pipeline of DINOv2 and v3: Pillow decodes, torchvision's v2 transforms follow, all on one
thread. Blur has probability 1, 0.1 and 0.5 on both sides. The photographs are windows of the textures that the demo
uses (or of two pictures of scikit-learn, if these cannot be downloaded), saved with the JPEG quality whose mean size is
closest to 75 kB and 237 kB. All pipelines alternate on groups of eight images; each figure is the median of the rounds'
ratios.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
import time
import zipfile
from collections.abc import Callable
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms import v2

from common.errors import DataError
from data_pipeline.build.demo_images import textures_file
from data_pipeline.formats.decode import Encoded
from data_pipeline.views import augmentations as engine
from data_pipeline.views import device_color
from data_pipeline.views.augmentations import Augment, center, crops, generators, random_box, resize
from data_pipeline.views.colors import LUMA
from pretrain.parallel.device import keep_freed_memory

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CONSTANTS = device_color.constants(MEAN, STD, torch.device("cpu"))
JITTER = (0.4, 0.4, 0.2, 0.1)
BLUR = (1.0, 0.1, 0.5)
WIDE, SMALL = (0.32, 1.0), (0.05, 0.32)
SIZES = {"500x375": (500, 375, 75_000), "1024x768": (1024, 768, 237_000)}  # width, height, mean bytes
GLOBALS = [
    Augment(224, WIDE, jitter=JITTER, gray=0.2, blur=BLUR[0]),
    Augment(224, WIDE, jitter=JITTER, gray=0.2, blur=BLUR[1], solarize=0.2),
]
LOCAL = Augment(96, SMALL, jitter=JITTER, gray=0.2, blur=BLUR[2])
VIEWS = {"global": GLOBALS, "local": [LOCAL] * 8}


# ---------------------------------------------------------------- photographs
def photographs() -> list[np.ndarray]:
    """Pictures of at least 1024×768, uint8 [H, W, 3]."""
    try:
        path = textures_file(lambda line: print(line, file=sys.stderr))
    except DataError as error:
        print(f"{error}; using scikit-learn's two pictures, mirrored to 1024 pixels", file=sys.stderr)
        from sklearn.datasets import load_sample_images

        return [np.pad(picture, ((0, 427), (0, 640), (0, 0)), "symmetric") for picture in load_sample_images().images]
    pictures = []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith((".jpg", ".png")) and not re.search(r"_(nm|sm|gm|rm|norm|glow)\.", name):
                picture = Image.open(io.BytesIO(archive.read(name)))
                if min(picture.size) >= 1024:
                    pictures.append(np.array(picture.convert("RGB")))
    return pictures


def jpegs(pictures: list[np.ndarray], size: str, count: int) -> list[bytes]:
    """Random windows of the pictures, those of 500×375 at half to full scale, as 4:2:0 JPEGs."""
    width, height, goal = SIZES[size]
    rng = np.random.default_rng(0)
    windows = []
    for i in range(count):
        picture = pictures[i % len(pictures)]
        scale = rng.uniform(1.0, min(2.0, picture.shape[0] / height, picture.shape[1] / width))
        h, w = int(height * scale), int(width * scale)
        top, left = rng.integers(0, picture.shape[0] - h + 1), rng.integers(0, picture.shape[1] - w + 1)
        windows.append(resize(picture[top : top + h, left : left + w], (height, width)))

    def encode(quality: int, some: list[np.ndarray]) -> list[bytes]:
        return [simplejpeg.encode_jpeg(np.ascontiguousarray(x), quality, "RGB", "420") for x in some]

    def size_error(quality: int) -> float:
        return abs(float(np.mean([len(data) for data in encode(quality, windows[:32])])) - goal)

    quality = min(range(60, 99, 2), key=size_error)
    files = encode(quality, windows)
    sizes = np.percentile([len(data) for data in files], [10, 90]) / 1000
    mean = np.mean([len(data) for data in files]) / 1000
    note = f"mean {mean:.0f} kB, 10th and 90th percentile {sizes[0]:.0f} and {sizes[1]:.0f}"
    print(f"{size}: {count} windows of {len(pictures)} pictures, JPEG quality {quality}, {note}", file=sys.stderr)
    return files


# ---------------------------------------------------------------- the pipelines
def reference_view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> v2.Transform:
    jitter = v2.RandomApply([v2.ColorJitter(*JITTER)], p=0.8)
    steps = [
        v2.RandomResizedCrop(size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(0.5),
        jitter,
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], p=blur),
    ]
    if solarize:
        steps.append(v2.RandomSolarize(128, p=solarize))
    return v2.Compose([*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


REFERENCE = [
    reference_view(224, WIDE, BLUR[0], 0.0),
    reference_view(224, WIDE, BLUR[1], 0.2),
    *[reference_view(96, SMALL, BLUR[2], 0.0)] * 8,
]


def reference(data: bytes, number: int) -> list[Tensor]:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return [view(image) for view in REFERENCE]


def ours(color: str) -> Callable[[bytes, int], dict[str, np.ndarray]]:
    def run(data: bytes, number: int) -> dict[str, np.ndarray]:
        return crops({"image": Encoded(data, "jpg"), "color": color}, VIEWS, generators((0, number)))

    return run


def exact_f32(data: bytes, number: int) -> dict[str, Tensor]:
    arrays = crops({"image": Encoded(data, "jpg")}, VIEWS, generators((0, number)))
    return {name: device_color.normalize(torch.from_numpy(array), CONSTANTS) for name, array in arrays.items()}


def floor(data: bytes, number: int) -> list[np.ndarray]:
    """Only the decoding and ten antialiased resizes, with boxes that are distributed as the recipe's."""
    pixels = Encoded(data, "jpg").pixels()
    boxes = BOXES[number % len(BOXES)]
    return [resize(pixels[t : t + h, x : x + w], (size, size)) for size, (t, x, h, w) in boxes]


def floor_boxes() -> list[list[tuple[int, tuple[int, int, int, int]]]]:
    rng = np.random.default_rng(1)
    augments = [*GLOBALS, *[LOCAL] * 8]
    return [[(a.size, random_box((375, 500), a.scale, rng)) for a in augments] for _ in range(512)]


BOXES = floor_boxes()
PIPELINES: dict[str, Callable[[bytes, int], Any]] = {
    "reference": reference,
    "exact_f32": exact_f32,
    "exact_u8": ours("exact"),
    "fused_u8": ours("fused"),
    "device_u8": ours("device"),
}


# ---------------------------------------------------------------- measuring
def emit(name: str, value: float, unit: str, versus: str) -> None:
    print(json.dumps({"name": name, "value": float(f"{value:.3g}"), "unit": unit, "versus": versus}), flush=True)


def one_round(pipelines: dict[str, Callable], files: list[bytes], first: int) -> dict[str, float]:
    """CPU seconds per image of every pipeline, which take turns on groups of eight files."""
    seconds = dict.fromkeys(pipelines, 0.0)
    for start in range(0, len(files), 8):
        for name, run in pipelines.items():
            begin = time.process_time()
            for i, data in enumerate(files[start : start + 8]):
                run(data, first + start + i)
            seconds[name] += time.process_time() - begin
    return {name: value / len(files) for name, value in seconds.items()}


def speed(size: str, files: list[bytes], rounds: int) -> None:
    pipelines = PIPELINES | ({"floor": floor} if size == "500x375" else {})
    one_round(pipelines, files[:8], 0)
    times = [one_round(pipelines, files, 1000 * r) for r in range(rounds)]
    for name in pipelines:
        print(f"{size} {name}: {1000 * median(t[name] for t in times):.2f} CPU ms per image", file=sys.stderr)
    versus = "torchvision v2 on PIL, CPU seconds, interleaved"
    for name in PIPELINES:
        emit(f"views.{size}.{name}.images_per_second", median(1 / t[name] for t in times), "1/s", "one core")
        if name != "reference":
            emit(f"views.{size}.{name}.ratio", median(t["reference"] / t[name] for t in times), "ratio", versus)
    if "floor" in pipelines:
        share = median(t["floor"] / t["fused_u8"] for t in times)
        emit(f"views.{size}.fused_u8.share_of_floor", share, "ratio", "decode and ten antialiased resizes alone")


# ---------------------------------------------------------------- test whether the views are equally distributed
STATISTICS = ("luma", "luma spread", "gradient energy", "fine to coarse gradient", "saturation", "red less blue")


def statistics(view: np.ndarray) -> list[float]:
    """Six numbers of a uint8 view [3, H, W]."""
    x = view.astype(np.float64)
    luma = np.tensordot(LUMA, x, 1)
    fine = np.square(np.diff(luma, axis=1)).mean() + np.square(np.diff(luma, axis=0)).mean()
    coarse = np.square(luma[:, 4:] - luma[:, :-4]).mean() + np.square(luma[4:] - luma[:-4]).mean()
    spread = (x.max(0) - x.min(0)).mean()
    return [luma.mean(), luma.std(), np.log(fine + 1), np.log((fine + 1) / (coarse + 1)), spread, (x[0] - x[2]).mean()]


def whole_statistics(files: list[bytes], size: int) -> np.ndarray:
    """The statistics [files, 6] of every whole photograph. They are subtracted from those of its views, so that these
    vary less between photographs, and the test is more powerful."""
    return np.array([statistics(center(Encoded(data, "jpg").pixels(), size)) for data in files])


def to_levels(view: Tensor) -> np.ndarray:
    scaled = view * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    return (scaled * 255).round().to(torch.uint8).numpy()


def aliased(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    tensor = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)
    return F.interpolate(tensor, size=size, mode="bilinear")[0].permute(1, 2, 0).contiguous().numpy()


def sample_ours(files: list[bytes], color: str, seed: int) -> dict[str, np.ndarray]:
    """The statistics {name: [files, 6]} of our second global and first local view of each file."""
    out: dict[str, list[list[float]]] = {"global": [], "local": []}
    for number, data in enumerate(files):
        made = crops({"image": Encoded(data, "jpg"), "color": color}, VIEWS, generators((seed, number)))
        for name, view in (("global", made["global"][1]), ("local", made["local"][0])):
            out[name].append(statistics(view))
    return {name: np.array(values) for name, values in out.items()}


def sample_reference(files: list[bytes]) -> dict[str, np.ndarray]:
    """The same statistics of the reference's views."""
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    views = {"global": REFERENCE[1], "local": REFERENCE[2]}
    return {name: np.array([statistics(to_levels(view(image))) for image in images]) for name, view in views.items()}


def equivalence(size: str, files: list[bytes], repeats: int) -> None:
    whole = {
        name: np.tile(whole_statistics(files, side), (repeats, 1)) for name, side in (("global", 224), ("local", 96))
    }
    files = files * repeats
    torch.manual_seed(0)
    first = sample_reference(files)
    samples = {"reference": sample_reference(files)}
    samples["exact"] = sample_ours(files, "exact", 10_000)
    samples["fused"] = sample_ours(files, "fused", 20_000)
    original, engine.resize = engine.resize, aliased
    samples["aliased"] = sample_ours(files, "exact", 30_000)
    engine.resize = original
    for key, values in samples.items():
        for name in whole:
            pairs = zip((first[name] - whole[name]).T, (values[name] - whole[name]).T, strict=True)
            p = [ks_2samp(a, b).pvalue for a, b in pairs]
            listed = ", ".join(f"{label} {value:.2g}" for label, value in zip(STATISTICS, p, strict=True))
            print(f"KS {size} {name} {key}: {listed}", file=sys.stderr, flush=True)
            emit(f"views.{size}.ks.{name}.{key}.p", min(p), "p", f"smallest of 6, reference, n = {len(files)}")


def scaled_decoding(files: list[bytes]) -> None:
    """The share of the larger photographs that are decoded at a smaller scale, and the share of detail that their views
    keep."""
    energy: dict[str, list[float]] = {"global": [], "local": []}
    scaled = 0
    for number, data in enumerate(files):
        plain = {name: [Augment(a.size, a.scale) for a in augments] for name, augments in VIEWS.items()}
        ours = crops({"image": Encoded(data, "jpg"), "color": "fused"}, plain, generators((0, number)))
        full = crops({"image": Encoded(data, "jpg").pixels()}, plain, generators((0, number)))
        if any(not np.array_equal(ours[name], full[name]) for name in plain):
            scaled += 1
            for name in plain:
                pair = [np.square(np.diff(x[name].astype(np.float32))).mean((1, 2, 3)) for x in (ours, full)]
                energy[name] += (pair[0] / pair[1]).tolist()
    emit("views.1024x768.scaled_decode.share", scaled / len(files), "ratio", "all images")
    for name, ratios in energy.items():
        emit(f"views.1024x768.scaled_decode.{name}.detail", median(ratios), "ratio", "gradient energy, full decode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="photographs of each size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=12, help="views of each photograph in the test of equivalence")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as pretrain/train.py does, for both sides
    cv2.setNumThreads(0)
    pictures = photographs()
    files = {size: jpegs(pictures, size, options.images) for size in SIZES}
    for size in SIZES:
        speed(size, files[size], options.rounds)
    scaled_decoding(files["1024x768"])
    for size in SIZES:
        equivalence(size, files[size], options.repeats)


if __name__ == "__main__":
    main()
