"""Image bytes to pixels, strictly: a damaged file raises `Damaged` with the reason and never gives half an image."""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image

JPEG = ("jpg", "jpeg")
IMAGES = (*JPEG, "png", "webp", "bmp", "tif", "tiff", "gif")
MAX_PIXELS = 100_000_000  # a larger image is taken for damage or an attack


class Damaged(Exception):
    """A sample that cannot be used, and why."""


def decode_image(data: bytes, extension: str) -> np.ndarray:
    """RGB uint8 [H, W, 3]. Transparency lies on white, 16-bit grey is scaled to 8. Raises `Damaged`."""
    try:
        if extension.lower() in JPEG and data[:2] == b"\xff\xd8":
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(height, width)
            if space in ("RGB", "YCbCr", "Gray"):
                return simplejpeg.decode_jpeg(data, "RGB", strict=True)
        return _decode_with_pillow(data)
    except Damaged:
        raise
    except Exception as error:  # decoders raise everything from OSError to SyntaxError on damage
        raise Damaged(" ".join(str(error).split()) or type(error).__name__) from None


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS or height < 1 or width < 1:
        raise Damaged(f"{width}×{height} pixels, but 1 to {MAX_PIXELS} are allowed")


def _decode_with_pillow(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_check_size` is the cap
        image: Image.Image = Image.open(io.BytesIO(data))
        _check_size(image.height, image.width)
        image.load()
    if image.mode.startswith("I"):
        gray = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))
