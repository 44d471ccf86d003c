"""What a shard set looks like: counts and sizes of every sample from the index, images from a sample of it, and a sheet of pictures."""

from __future__ import annotations

import io
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.decode import IMAGES, Damaged, Encoded
from data_pipeline.index import VIDEOS
from data_pipeline.shards import Samples
from data_pipeline.sources.files import first_frame
from data_pipeline.storage import DataError

LOOKED_AT = 1000  # images that are decoded
AT_ONCE = 1 << 16  # samples whose index is read at a time
BINS = 12
BAR = 40  # characters
TILE, GAP, LINES = 128, 8, 2  # pixels, pixels, lines of text below a picture
COLUMNS, ROWS = 8, 6


@dataclass
class Stats:
    """`sizes` are bytes per sample; `images` are (width, height, mode) of those that were decoded; `damaged` (key, reason) of those that cannot be."""

    samples: int = 0
    shards: int = 0
    bytes: int = 0  # of the tars
    members: dict[str, int] = field(default_factory=dict)
    member_bytes: dict[str, int] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    tokens: list[dict[str, Any]] = field(default_factory=list)  # what the manifests of token sets say
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    images: list[tuple[int, int, str]] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)


def spread_over(total: int, count: int) -> list[int]:
    """At most `count` numbers of 0..total-1 at equal distances."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def gather(url: str | Path, looked_at: int = LOOKED_AT) -> Stats:
    """The stats of a folder or URL of shards."""
    samples = Samples([str(url)])
    manifests = [part.manifest for part in samples.manifests]
    out = Stats(len(samples), sum(len(m.names) for m in manifests), samples.total_bytes)
    out.classes = [name for m in manifests for name in m.classes]
    out.tokens = [m.about["tokens"] for m in manifests if "tokens" in m.about]
    sizes, counts, totals = [], Counter[str](), Counter[str]()
    for first in range(0, len(samples), AT_ONCE):
        for piece in samples.pieces(first, min(AT_ONCE, len(samples) - first)):
            there = piece.records["offset"] > 0
            held = np.where(there, piece.records["size"].astype(np.int64), 0)
            sizes.append(held.sum(1))
            for column, extension in enumerate(samples.extensions):
                counts[extension] += int(there[:, column].sum())
                totals[extension] += int(held[:, column].sum())
    out.sizes = np.concatenate(sizes)
    out.members, out.member_bytes = dict(counts), dict(totals)
    if set(samples.extensions) & set(IMAGES):
        for number in spread_over(len(samples), looked_at):
            _look(samples, number, out)
    return out


def _look(samples: Samples, number: int, out: Stats) -> None:
    try:
        for extension, data in samples.read(number, IMAGES).items():
            image = Encoded(data, extension)
            height, width = image.shape
            image.pixels()
            with Image.open(io.BytesIO(data)) as opened:
                out.images.append((width, height, opened.mode))
    except Damaged as damage:
        out.damaged.append((samples.name(number)[1], str(damage)))


# ---------------------------------------------------------------- in words
def describe(stats: Stats) -> list[str]:
    """Stats in lines to print."""
    out = [
        f"{stats.samples} samples, {stats.bytes / 1e6:.1f} MB in {stats.shards} shards, {len(stats.classes)} classes"
    ]
    for about in stats.tokens:
        ratio = about["bytes"] / max(1, about["tokens"])
        out.append(
            f"{about['documents']} documents, {about['tokens']} tokens of {about['vocabulary']}, {about['bytes'] / 1e6:.1f} MB of text ({ratio:.2f} bytes a token)"
        )
    out += ["", "members"]
    for extension, count in stats.members.items():
        share = f"{100 * count / max(1, stats.samples):.1f} % of the samples"
        mean = stats.member_bytes[extension] / max(1, count)
        out.append(f"  .{extension:<6}{count:>10}  {share}, {_bytes(mean)} each on average")
    out += ["", "bytes per sample", *histogram(stats.sizes, _bytes)]
    if stats.images or stats.damaged:
        out += ["", *_images(stats)]
    return out


def _images(stats: Stats) -> Iterator[str]:
    looked_at = len(stats.images) + len(stats.damaged)
    yield f"{looked_at} images decoded, evenly over the set: {len(stats.damaged)} damaged"
    for key, reason in stats.damaged[:20]:
        yield f"  {key}: {reason}"
    if len(stats.damaged) > 20:
        yield f"  … and {len(stats.damaged) - 20} more"
    if not stats.images:
        return
    widths, heights = (np.array([image[i] for image in stats.images]) for i in (0, 1))
    modes = Counter(mode for _, _, mode in stats.images).most_common()
    yield "modes: " + ", ".join(f"{mode} {count}" for mode, count in modes)
    for name, values in (("width", widths), ("height", heights)):
        low, middle, high = (int(v) for v in np.percentile(values, [0, 50, 100], method="lower"))
        yield f"{name}: {low} to {high} pixels, median {middle}"
    yield from ("shorter side in pixels", *histogram(np.minimum(widths, heights), lambda v: f"{v:.0f}"))
    yield from ("width / height", *histogram(widths / heights, lambda v: f"{v:.2f}"))


def histogram(values: np.ndarray, show) -> list[str]:
    """Bars of text over at most BINS ranges, on a logarithmic scale where the values span more than a factor of ten."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return [f"  {show(low):>9}            {'█' * BAR} {len(values)}"]
    wide = low > 0 and high / low > 10
    edges = np.geomspace(low, high, BINS + 1) if wide else np.linspace(low, high, BINS + 1)
    edges[0], edges[-1] = low, high  # geomspace rounds
    counts, _ = np.histogram(values, edges)
    return [
        f"  {show(a):>9} {show(b):>9}  {'█' * -(-BAR * int(n) // int(counts.max())):<{BAR}} {n}"
        for a, b, n in zip(edges, edges[1:], counts, strict=False)
    ]


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


# ---------------------------------------------------------------- in pictures
def sheet(url: str | Path, target: str | Path) -> Path:
    """Write a picture of up to COLUMNS × ROWS samples, evenly over the set: images, first frames or the beginning of texts, with key and label.

    What cannot be decoded is drawn as its reason on red. The format follows from the target's extension.
    """
    samples, target = Samples([str(url)]), Path(target)
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise DataError(f"--sheet {target}: write a name that ends in .png, .jpg or .webp")
    font = ImageFont.load_default(11)
    numbers = spread_over(len(samples), COLUMNS * ROWS)
    height = TILE + LINES * 14 + GAP
    rows = -(-len(numbers) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, rows * height + GAP), "white")
    draw = ImageDraw.Draw(page)
    for place, number in enumerate(numbers):
        left, top = GAP + place % COLUMNS * (TILE + GAP), GAP + place // COLUMNS * height
        page.paste(_tile(samples, number, font), (left, top))
        lines = textwrap.wrap(samples.name(number)[1].rpartition("/")[2], 20, max_lines=1, placeholder="…")
        lines += textwrap.wrap(_label(samples, number), 20, max_lines=1, placeholder="…")
        draw.multiline_text((left, top + TILE + 1), "\n".join(lines), "black", font, spacing=2)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        page.save(target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror or error})") from None
    return target


def _label(samples: Samples, number: int) -> str:
    try:
        return samples.label(number)
    except (DataError, Damaged, ValueError):
        return ""


def _tile(samples: Samples, number: int, font) -> Image.Image:
    """One sample as TILE × TILE pixels."""
    try:
        members = samples.read(number)
        for extension, data in members.items():
            if extension in (*IMAGES, *VIDEOS):
                pixels = Encoded(data, extension).pixels() if extension in IMAGES else first_frame(data)[0]
                picture = Image.fromarray(pixels)
                picture.thumbnail((TILE, TILE))
                out = Image.new("RGB", (TILE, TILE), (238, 238, 238))
                out.paste(picture, ((TILE - picture.width) // 2, (TILE - picture.height) // 2))
                return out
        text = members["txt"].decode(errors="replace") if "txt" in members else ", ".join(f".{e}" for e in members)
        return _words(text, font, (246, 246, 240))
    except (Damaged, DataError) as problem:
        return _words(str(problem), font, (244, 190, 190))


def _words(text: str, font, ground: tuple[int, int, int]) -> Image.Image:
    out = Image.new("RGB", (TILE, TILE), ground)
    lines = textwrap.wrap(text, 20, max_lines=8, placeholder="…")
    ImageDraw.Draw(out).multiline_text((4, 4), "\n".join(lines), "black", font, spacing=2)
    return out
