"""The image formats that are read: the extensions of their members, and limits. This module imports no decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import Damaged

JPEG = ("jpg", "jpeg")
IMAGES = (*JPEG, "png", "webp", "bmp", "tif", "tiff", "gif", "jfif", "jpe")
ARRAY = "npy"
IMAGE_MEMBERS = (*IMAGES, ARRAY)  # extensions of members that can be a sample's image
MAX_PIXELS = 100_000_000  # default limit; a larger image counts as damaged, or as an attack
MAX_PIXELS_LIMIT = 1 << 30  # the largest limit that a caller may set

JPEG_START, PNG_START = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"  # the first bytes of a file
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
# the advice in messages, of a TIFF
WRITE_ARRAY = "`pip install 'unlabeled[tiff]'` makes it readable; or write it as a .npy array [H, W, C]"


@contextmanager
def errors_as_damage() -> Iterator[None]:
    """Convert any exception of the context to `Damaged`: for damaged files, decoders raise OSError, KeyError and more.

    Use it only for calls of simplejpeg, Pillow and numpy's header reader. With code of our own in the context, a bug
    would look like a damaged file.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise Damaged(" ".join(str(error).split()) or type(error).__name__) from None


class Unsuitable(Damaged):
    """An image that can be read, but not as requested. If its neighbours are like it, the recipe is wrong, not the data.
    `advice`: what the recipe has to state.
    """

    def __init__(self, reason: str, advice: str):
        super().__init__(reason)
        self.advice = advice


class WrongChannels(Unsuitable):
    """An image with another number of channels than requested."""

    def __init__(self, stored: int, wanted: int):
        super().__init__(
            f"holds {stored} channels, but {wanted} are requested",
            f"write model.in_channels={stored}, and {stored} values each for data.mean and data.std",
        )
        self.stored, self.wanted = stored, wanted
