"""Statistics of a shard set: numbers and sizes of all samples, from the index; properties of some images, which are
decoded.
"""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.errors import Damaged
from data_pipeline.build import audio_stats
from data_pipeline.formats.array_images import read_array_header
from data_pipeline.formats.decode import Encoded, ImageFacts, inspect
from data_pipeline.formats.image_formats import ARRAY, IMAGE_MEMBERS, IMAGES, WrongChannels
from data_pipeline.formats.pixels import top_level
from data_pipeline.shards.members import AUDIO, VIDEOS, LeftOut
from data_pipeline.shards.samples import Samples

MAX_DECODED_IMAGES = 1000  # of `gather`
MAX_SUMMARY_IMAGES, MAX_SUMMARY_SECONDS = 32, 2.0  # images that `summarize` decodes, and its time for them
MAX_LISTED_CLASSES = 12
MAX_LISTED_DAMAGED = 20
MAX_COUNTED_RECORDS = 1 << 26  # index records that `summarize` counts; a larger index is not read
INDEX_SAMPLES_AT_ONCE = 1 << 16  # samples whose index records are read at a time
MAX_BINS = 12  # of a histogram
BAR_CHARACTERS = 40  # of the longest bar
MEDIA = {*IMAGES, *VIDEOS, *AUDIO}  # members beside which a text is a caption


@dataclass
class Stats:
    """Statistics of a shard set."""

    samples: int = 0
    shards: int = 0
    bytes: int = 0  # of the tars
    members: dict[str, int] = field(default_factory=dict)  # {extension: number of members}
    member_bytes: dict[str, int] = field(default_factory=dict)  # {extension: bytes of all members}
    classes: list[str] = field(default_factory=list)
    tokens: list[dict[str, Any]] = field(default_factory=list)  # the manifest entries of token sets
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # bytes of each sample
    images: list[tuple[int, int, str]] = field(default_factory=list)  # (width, height, mode) of decoded images
    recordings: list[tuple[float, int]] = field(default_factory=list)  # (seconds, sample rate) of decoded recordings
    # {number of channels C: [C, 3], the number of pixels, the sum and the sum of squares of their values}, of arrays and of
    # images that cannot have three channels
    channels: dict[int, np.ndarray] = field(default_factory=dict)
    captions: list[int] = field(default_factory=list)  # characters of the texts beside images, videos and recordings
    # (key, reason) of images and recordings that cannot be decoded
    damaged: list[tuple[str, str]] = field(default_factory=list)


def spread_over(total: int, count: int) -> list[int]:
    """At most `count` of the numbers 0 to total − 1, at equal distances."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def gather(url: str | Path, max_decoded: int = MAX_DECODED_IMAGES) -> Stats:
    """The statistics of a folder or URL of shards. At most `max_decoded` images are decoded."""
    samples = Samples([str(url)])
    manifests = [part.manifest for part in samples.manifests]
    out = Stats(len(samples), sum(len(m.names) for m in manifests), samples.total_bytes)
    out.classes = [name for m in manifests for name in m.classes]
    out.tokens = [m.details["tokens"] for m in manifests if "tokens" in m.details]
    sizes, counts, totals = [], Counter[str](), Counter[str]()
    for first in range(0, len(samples), INDEX_SAMPLES_AT_ONCE):
        for piece in samples.pieces(first, min(INDEX_SAMPLES_AT_ONCE, len(samples) - first)):
            present = piece.records["offset"] > 0
            member_sizes = np.where(present, piece.records["size"].astype(np.int64), 0)
            sizes.append(member_sizes.sum(1))
            for column, extension in enumerate(samples.extensions):
                counts[extension] += int(present[:, column].sum())
                totals[extension] += int(member_sizes[:, column].sum())
    out.sizes = np.concatenate(sizes)
    out.members, out.member_bytes = dict(counts), dict(totals)
    if set(samples.extensions) & {*MEDIA, ARRAY}:
        for number in spread_over(len(samples), max_decoded):
            _inspect_sample(samples, number, out)
    return out


def _inspect_sample(samples: Samples, number: int, out: Stats) -> None:
    """Decode the images and recordings of a sample, and add them to `out.images`, `out.recordings` or `out.damaged`, and
    its caption to `out.captions`."""
    try:
        if caption := caption_of(samples, number):
            out.captions.append(len(caption))
        for data in samples.read(number, AUDIO).values():
            out.recordings.append(audio_stats.length_of(data))
        for extension, data in samples.read(number, IMAGES).items():
            image = samples.encoded(number, data, extension)
            height, width = image.shape
            image.dtype = image.stored_dtype
            try:
                pixels = image.pixels(shrink=8)  # to check that it can be decoded
            except WrongChannels as error:
                _add_channels(image, error.stored, out)
                continue
            if pixels.dtype != np.uint8:
                _add_channels(image, pixels.shape[2], out)
                continue
            with Image.open(io.BytesIO(data)) as opened:
                out.images.append((width, height, opened.mode))
        if not MEDIA & {*samples.extensions}:  # arrays beside images are annotations
            for data in samples.read(number, (ARRAY,)).values():
                _add_channels(samples.encoded(number, data, ARRAY), read_array_header(data).shape[2], out)
    except Damaged as damage:
        out.damaged.append((samples.name(number)[1], str(damage)))


def _add_channels(image: Encoded, channels: int, out: Stats) -> None:
    """Decode an image of any number of channels, and add it to `out.images` and `out.channels`: the mean and the
    deviation of unsigned numbers on a scale from 0 to 1, of others in their own unit."""
    image.channels, image.dtype = channels, image.stored_dtype
    pixels = image.pixels().reshape(-1, channels) / np.float64(top_level(image.dtype))  # [H·W, C]
    deep = "" if image.dtype == "uint8" else f" of {image.dtype}"
    out.images.append((image.shape[1], image.shape[0], f"{channels} channels{deep}"))
    sums = np.stack([np.full(channels, len(pixels)), pixels.sum(0), np.square(pixels).sum(0)], axis=1)
    out.channels[channels] = out.channels.get(channels, 0) + sums


def _number(value: float) -> str:
    """Four decimals, or four digits of a small number, such as the deviation of images that use few of 16 bits."""
    return f"{value:.4g}" if 1e-6 < abs(value) < 0.1 else f"{value:.4f}"


def caption_of(samples: Samples, number: int) -> str:
    """The text of a sample beside its image, video or recording; "" if it has none."""
    if not any(samples.has(number, extension) for extension in MEDIA & {*samples.extensions}):
        return ""
    try:
        return samples.read(number, ("txt",)).get("txt", b"").decode(errors="replace").strip()
    except Damaged:
        return ""


# ---------------------------------------------------------------- pixels
class Pixels(dict[str, list[float]]):
    """Counts of images and ranges of their pixels: {format, bits and channels: [images, lowest value, highest value]}.

    `remarks`: {remark on images: [number of images, example]}.
    """

    def __init__(self, kinds: dict[str, list[float]] | None = None, remarks: dict[str, list[Any]] | None = None):
        super().__init__(kinds or {})
        self.remarks = LeftOut(remarks or {})

    def add(self, facts: ImageFacts, where: str) -> None:
        """Count one image. `where`: its name, for the examples."""
        self.merge({facts.kind: [1, facts.low, facts.high]}, {remark: [1, where] for remark in facts.remarks})

    def merge(self, kinds: dict[str, list[float]], remarks: dict[str, list[Any]]) -> None:
        """Add the content of another `Pixels` and its remarks."""
        for kind, (count, low, high) in kinds.items():
            old = self.get(kind, [0, low, high])
            self[kind] = [old[0] + count, min(old[1], low), max(old[2], high)]
        for remark, (count, where) in remarks.items():
            self.remarks.add(remark, where, count)

    def lines(self, bits: int = 16) -> list[str]:
        """Lines to print. If 16-bit images use only low values, one of them recommends --bits."""
        out = [
            f"images: {n} × {kind}, values from {low:g} to {high:g}" for kind, (n, low, high) in sorted(self.items())
        ]
        out += [f"images: {n} {remark}, for example {where}" for remark, (n, where) in self.remarks.items()]
        highest = max((high for kind, (_, _, high) in self.items() if ", 16 bits, " in kind), default=0)
        if bits == 16 and 0 < highest < 1 << 15:
            share, bits_used = highest / 65535, max(8, int(highest).bit_length())
            out.append(
                f"images of 16 bits have values up to {highest} of 65535, so that a model sees {share:.3g} of the range from"
                f" 0 to 1; --bits {bits_used} (of `shards build` and `shards index`) scales {(1 << bits_used) - 1} to 1"
            )
        return out


def summarize(samples: Samples, left_out: bool = True) -> list[str]:
    """Lines about the images of a run: members, classes, left-out members, samples without an image, and the bits and
    the ranges of some images.
    """
    names, total = samples.names, len(samples)
    manifests = [part.manifest for part in samples.manifests]
    out = []
    if total * len(samples.extensions) <= MAX_COUNTED_RECORDS:
        counts, without_image = _count_members(samples)
        members = ", ".join(f"{count} .{extension}" for extension, count in counts.items())
        classes = classes_line([name for m in manifests for name in m.classes])
        out.append(f"{names}: {total} samples with {members}; {classes}")
        if without_image:
            number, first = without_image
            out.append(
                f"{names}: {number} samples hold no image, for example {samples.name(first)[1]}; other samples replace"
                " them"
            )
    for manifest in {m.id: m for m in manifests}.values() if left_out else ():
        out += [f"{names}: {line}" for line in manifest.left_out.lines()]
    pixels, deadline = Pixels(), time.monotonic() + MAX_SUMMARY_SECONDS
    for number in spread_over(total, MAX_SUMMARY_IMAGES):
        if pixels and time.monotonic() > deadline:
            break
        with contextlib.suppress(Damaged):
            for extension, data in samples.read(number, IMAGE_MEMBERS).items():
                image = samples.encoded(number, data, extension)
                facts = inspect(data, extension, image.bits, image.as_stored, image.max_pixels)
                pixels.add(facts, f"sample {number}")
    bits = {m.pixels.get("bits", 16) for m in manifests}
    return out + [f"{names}: {line}" for line in pixels.lines(min(bits))]


def _count_members(samples: Samples) -> tuple[dict[str, int], tuple[int, int] | None]:
    """({extension: number of members}, (number of samples without an image, the first of them) or None)."""
    counts, without_image, first = Counter[str](), 0, -1
    columns = samples.columns(IMAGE_MEMBERS)
    for begin in range(0, len(samples), INDEX_SAMPLES_AT_ONCE):
        for piece in samples.pieces(begin, min(INDEX_SAMPLES_AT_ONCE, len(samples) - begin)):
            present = piece.records["offset"] > 0
            missing = np.flatnonzero(~present[:, columns].any(1))
            without_image += len(missing)
            if len(missing) and first < 0:
                first = piece.first + int(missing[0])
            for column, extension in enumerate(samples.extensions):
                counts[extension] += int(present[:, column].sum())
    return dict(counts), (without_image, first) if without_image and columns else None


def classes_line(classes: list[str]) -> str:
    """The number of classes, and the names of the first ones."""
    if not classes:
        return "no class names"
    some = ", ".join(classes[:MAX_LISTED_CLASSES]) + (", …" if len(classes) > MAX_LISTED_CLASSES else "")
    return f"{len(classes)} class{'es' * (len(classes) > 1)}: {some}"


# ---------------------------------------------------------------- text output
def describe(stats: Stats) -> list[str]:
    """Statistics as lines to print."""
    out = [
        f"{stats.samples} samples, {stats.bytes / 1e6:.1f} MB in {stats.shards} shards, {len(stats.classes)} classes"
    ]
    for token_set in stats.tokens:
        ratio = token_set["bytes"] / max(1, token_set["tokens"])
        out.append(
            f"{token_set['documents']} documents, {token_set['tokens']} tokens of {token_set['vocabulary']},"
            f" {token_set['bytes'] / 1e6:.1f} MB of text ({ratio:.2f} bytes per token)"
        )
    out += ["", "members"]
    for extension, count in stats.members.items():
        share = f"{100 * count / max(1, stats.samples):.1f} % of the samples"
        mean = stats.member_bytes[extension] / max(1, count)
        out.append(f"  .{extension:<6}{count:>10}  {share}, {_bytes(mean)} each on average")
    out += ["", "bytes per sample", *histogram(stats.sizes, _bytes)]
    if stats.images or stats.damaged:
        out += ["", *_describe_images(stats)]
    if stats.captions:
        characters = np.array(stats.captions)
        low, middle, high = (int(v) for v in np.percentile(characters, [0, 50, 100], method="lower"))
        out += ["", f"{len(characters)} captions (.txt) of {low} to {high} characters, median {middle}"]
    if stats.recordings:
        lengths = np.array([seconds for seconds, _ in stats.recordings])
        out += ["", *audio_stats.describe(stats.recordings), "seconds", *histogram(lengths, lambda v: f"{v:.2f}")]
    return out


def _describe_images(stats: Stats) -> Iterator[str]:
    decoded, noun = len(stats.images) + len(stats.recordings) + len(stats.damaged), "images"
    if stats.recordings:
        noun = "images and recordings" if stats.images else "recordings"
    yield f"{decoded} {noun} decoded, evenly spread over the set: {len(stats.damaged)} damaged"
    for key, reason in stats.damaged[:MAX_LISTED_DAMAGED]:
        yield f"  {key}: {reason}"
    if len(stats.damaged) > MAX_LISTED_DAMAGED:
        yield f"  … and {len(stats.damaged) - MAX_LISTED_DAMAGED} more"
    if not stats.images:
        return
    widths, heights = (np.array([image[i] for image in stats.images]) for i in (0, 1))
    modes = Counter(mode for _, _, mode in stats.images).most_common()
    for count, sums in sorted(stats.channels.items()):
        mean = sums[:, 1] / sums[:, 0]
        std = np.sqrt(np.maximum(sums[:, 2] / sums[:, 0] - mean**2, 0))
        numbers = [",".join(_number(value) for value in values) for values in (mean, std)]
        yield f"mean and deviation of {count} channels, for a recipe: data.mean=[{numbers[0]}] data.std=[{numbers[1]}]"
    yield "modes: " + ", ".join(f"{mode} {count}" for mode, count in modes)
    for name, values in (("width", widths), ("height", heights)):
        low, middle, high = (int(v) for v in np.percentile(values, [0, 50, 100], method="lower"))
        yield f"{name}: {low} to {high} pixels, median {middle}"
    yield from ("shorter side in pixels", *histogram(np.minimum(widths, heights), lambda v: f"{v:.0f}"))
    yield from ("width / height", *histogram(widths / heights, lambda v: f"{v:.2f}"))


def histogram(values: np.ndarray, show: Callable[[float], str]) -> list[str]:
    """A histogram of `values` [n] as lines of text, with at most MAX_BINS bins. The scale is logarithmic if the values
    span more than a factor of ten. `show` converts a value to text.
    """
    low, high = float(values.min()), float(values.max())
    if low == high:
        return [f"  {show(low):>9}            {'█' * BAR_CHARACTERS} {len(values)}"]
    logarithmic = low > 0 and high / low > 10
    edges = np.geomspace(low, high, MAX_BINS + 1) if logarithmic else np.linspace(low, high, MAX_BINS + 1)
    edges[0], edges[-1] = low, high  # geomspace rounds them
    counts = np.histogram(values, edges)[0].tolist()
    lines = []
    for begin, end, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * math.ceil(BAR_CHARACTERS * count / max(counts))
        lines.append(f"  {show(begin):>9} {show(end):>9}  {bar:<{BAR_CHARACTERS}} {count}")
    return lines


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
