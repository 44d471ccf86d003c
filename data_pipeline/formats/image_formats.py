"""The image formats that are read: the extensions of their members, and limits. Light: it imports no decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import Damaged

JPEG = ("jpg", "jpeg")
IMAGES = (*JPEG, "png", "webp", "bmp", "tif", "tiff", "gif", "jfif", "jpe")
ARRAY = "npy"
IMAGE_MEMBERS = (*IMAGES, ARRAY)  # extensions of members that can be a sample's image
MAX_PIXELS = 100_000_000  # default limit; a larger image is taken for damage or an attack
MAX_PIXELS_LIMIT = 1 << 30  # the largest limit that a caller may set

JPEG_START, PNG_START = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"  # the first bytes of a file
WRITE_ARRAY = "write it as a .npy array of uint8 or uint16 [H, W, C]"  # the advice in messages


@contextmanager
def decoder() -> Iterator[None]:
    """Convert any exception to `Damaged`: on damaged files, decoders raise everything from OSError to KeyError.

    Only for calls of simplejpeg, Pillow and numpy's header reader: around code of ours it would make a bug look like a
    damaged file.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise Damaged(" ".join(str(error).split()) or type(error).__name__) from None


class WrongChannels(Damaged):
    """An image with another number of channels than asked for.

    If its neighbours have the same number, an option is wrong, not the data.
    """

    def __init__(self, stored: int, wanted: int):
        super().__init__(f"holds {stored} channels, but {wanted} are asked for")
        self.stored, self.wanted = stored, wanted
