"""A contact sheet: thumbnails of samples of a shard set with their keys, labels and captions."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from common.errors import Damaged, DataError
from common.untrusted import open_binary
from data_pipeline.build import audio_stats
from data_pipeline.build.stats import caption_of, spread_over
from data_pipeline.formats.decode import Encoded
from data_pipeline.formats.image_formats import ARRAY, IMAGE_MEMBERS, WrongChannels
from data_pipeline.formats.pixels import picture
from data_pipeline.formats.videos import EncodedVideo
from data_pipeline.shards.members import AUDIO, VIDEOS
from data_pipeline.shards.samples import Samples

FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc")  # used if they are installed
TILE, GAP = 128, 8  # pixels of a thumbnail, and between thumbnails
LINES, LINE_HEIGHT = 2, 14  # lines of text below a thumbnail, and pixels of each
CAPTION_LINES = 3  # further ones if samples have captions
COLUMNS, ROWS = 8, 6  # of the sheet of thumbnails
STRIP = 4  # frames of a video in its thumbnail
SOFTWARE = "unlabeled"  # in the metadata of the PNGs that are drawn, so that a later command may replace them


def sheet(url: str | Path, target: str | Path) -> Path:
    """Write an image with thumbnails of up to COLUMNS × ROWS samples, evenly spread over the set: images, four
    frames of videos, spectrograms, or beginnings of texts, with key, label and caption.

    If a sample cannot be decoded, its thumbnail is the reason on red. The extension of `target` determines the format.
    """
    samples, target = Samples([str(url)]), Path(target)
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise DataError(f"--sheet {target}: write a name that ends in .png, .jpg or .webp")
    font = Font()
    numbers = spread_over(len(samples), COLUMNS * ROWS)
    captions = [caption_of(samples, number) for number in numbers]
    height = TILE + (LINES + CAPTION_LINES * any(captions)) * LINE_HEIGHT + GAP
    rows = -(-len(numbers) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, rows * height + GAP), "white")
    draw = ImageDraw.Draw(page)
    for position, number in enumerate(numbers):
        left, top = GAP + position % COLUMNS * (TILE + GAP), GAP + position // COLUMNS * height
        page.paste(_tile(samples, number, font), (left, top))
        lines = textwrap.wrap(samples.name(number)[1].rpartition("/")[2], 20, max_lines=1, placeholder="…")
        lines += textwrap.wrap(_label(samples, number), 20, max_lines=1, placeholder="…")
        lines += textwrap.wrap(captions[position], 20, max_lines=CAPTION_LINES, placeholder="…")
        font.draw(draw, (left, top + TILE + 1), lines)
    save_sheet(page, target)
    return target


def save_sheet(page: Image.Image, target: Path) -> None:
    """Write a drawn image to a file. Raises DataError, also if a file of that name was not written by this function."""
    text = PngInfo()
    text.add_text("Software", SOFTWARE)
    more: dict[str, Any] = {"pnginfo": text} if target.suffix.lower() == ".png" else {}
    try:
        if target.exists() and not _is_sheet(target):
            raise DataError(f"{target}: exists already, and this command has not written it; name another file")
        target.parent.mkdir(parents=True, exist_ok=True)
        page.save(target, **more)
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise DataError(f"{target}: cannot be written ({reason}); write a name that ends in .png") from None


def _is_sheet(path: Path) -> bool:
    """Whether a file is an image that `save_sheet` has written. Of formats other than PNG this is not known: False."""
    try:
        with open_binary(path) as file, Image.open(file, formats=("PNG",)) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, ValueError, SyntaxError):
        return False


def _label(samples: Samples, number: int) -> str:
    """The label of a sample; "" if it has none."""
    try:
        return samples.label(number)
    except (DataError, Damaged, ValueError):
        return ""


def _tile(samples: Samples, number: int, font: Font) -> Image.Image:
    """The thumbnail of a sample, TILE × TILE pixels."""
    try:
        members = samples.read(number)
        for extension, data in sorted(members.items(), key=lambda member: member[0] == ARRAY):
            if extension in (*IMAGE_MEMBERS, *VIDEOS, *AUDIO):
                if extension in AUDIO:
                    pixels = audio_stats.spectrogram(data)
                elif extension in IMAGE_MEMBERS:
                    pixels = _colors(samples.encoded(number, data, extension))
                else:
                    pixels = _strip(data)
                picture = Image.fromarray(pixels)
                picture.thumbnail((TILE, TILE))
                out = Image.new("RGB", (TILE, TILE), (238, 238, 238))
                out.paste(picture, ((TILE - picture.width) // 2, (TILE - picture.height) // 2))
                return out
        text = members["txt"].decode(errors="replace") if "txt" in members else ", ".join(f".{e}" for e in members)
        return _text_tile(text, font, (246, 246, 240))
    except (Damaged, DataError) as problem:
        return _text_tile(str(problem), font, (244, 190, 190))


def _colors(image: Encoded) -> np.ndarray:
    """The pixels of an image, uint8 [H, W, 3]; of one with other channels the first three, or the first one."""
    image.dtype = image.stored_dtype
    try:
        return picture(image.pixels(shrink=max(image.shape) / (2 * TILE)))
    except WrongChannels as error:
        image.channels = error.stored
        return picture(image.pixels())


def _strip(data: bytes) -> np.ndarray:
    """STRIP frames of a video as one picture [H, W, 3]: two rows, in the order of reading, at equal distances in time."""
    (frames,) = EncodedVideo(data).frames_at(lambda seconds: [[seconds * n / STRIP for n in range(STRIP)]])
    rows = [np.concatenate(frames[first : first + STRIP // 2], axis=1) for first in (0, STRIP // 2)]
    return np.concatenate(rows)


def _text_tile(text: str, font: Font, background: tuple[int, int, int]) -> Image.Image:
    out = Image.new("RGB", (TILE, TILE), background)
    lines = textwrap.wrap(text, 20, max_lines=8, placeholder="…")
    font.draw(ImageDraw.Draw(out), (4, 4), lines)
    return out


class Font:
    """Draws text with Pillow's built-in font. For a line with glyphs that this font lacks, it uses the installed font
    that lacks the fewest, and draws the code points of missing glyphs.
    """

    def __init__(self) -> None:
        self.fonts: list[Any] = [ImageFont.load_default(11)]
        for name in FONTS:
            try:
                self.fonts.append(ImageFont.truetype(name, 11))
            except OSError:
                continue

    def draw(self, draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: list[str]) -> None:
        """Draw lines of text, one below the other. `place`: (left, top) in pixels."""
        for n, line in enumerate(lines):
            font = min(self.fonts, key=lambda font: len(_missing_glyphs(font, line)))
            missing = _missing_glyphs(font, line)
            drawable = "".join(f"<{ord(c):X}>" if c in missing else c for c in line)
            draw.text((place[0], place[1] + LINE_HEIGHT * n), drawable, "black", font)


def _missing_glyphs(font: Any, line: str) -> set[str]:
    """The characters of a line for which a font has no glyph: it draws them like a code point that does not exist."""
    missing = bytes(font.getmask("\U0010ffff"))
    return {c for c in set(line) if not c.isspace() and not c.isascii() and bytes(font.getmask(c)) == missing}
