"""Read the EXIF orientation of a JPEG or a PNG, and apply it to the pixels.

An orientation is a number from 1 to 8: 1 leaves the pixels as they are stored, the others mirror or rotate them.
"""

from __future__ import annotations

import struct

import numpy as np

from data_pipeline.formats.image_formats import PNG_START

EXIF = b"Exif\0\0"  # the first bytes of an EXIF segment of a JPEG
ORIENTATION = 274  # the number of the TIFF tag that holds the orientation
INVERSE_ORIENTATION = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}  # orientation → the one that undoes it


def jpeg_exif(data: bytes) -> bytes:
    """The content of the EXIF segment of a JPEG; b"" if there is none. Only segments before the first frame header are
    searched.
    """
    offset = 2  # the first marker of a segment comes after the two bytes that mark a JPEG
    while data[offset : offset + 1] == b"\xff" and data[offset + 1 : offset + 2] >= b"\xe0":
        size = int.from_bytes(data[offset + 2 : offset + 4])
        if data[offset + 1] == 0xE1 and data.startswith(EXIF, offset + 4):  # segment APP1
            return data[offset + 10 : offset + 2 + size]
        offset += 2 + size
    return b""


def png_exif(data: bytes) -> bytes:
    """The content of the eXIf chunk of a PNG, which may come after the pixels; b"" if there is none."""
    offset = len(PNG_START)  # of the current chunk
    last = data.rfind(b"eXIf") - 4  # offset of the last chunk that may be eXIf
    while offset <= last:
        size, kind = struct.unpack_from(">I4s", data, offset)
        if kind == b"eXIf":
            return data[offset + 8 : offset + 8 + size]
        offset += 12 + size  # 4 bytes each of length, type and checksum
    return b""


def orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, that the first directory of EXIF data states.

    Returns 1 if it states none, or if the data is damaged. EXIF data has the layout of a TIFF: a header, and
    directories of entries of 12 bytes.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, directory)
        for entry in range(directory + 2, min(directory + 2 + 12 * count, len(exif) - 11), 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, entry)
            if tag == ORIENTATION:
                return value if kind == 3 and 1 <= value <= 8 else 1  # 3: the type of a 16-bit unsigned integer
    except struct.error:
        pass
    return 1


def oriented(pixels: np.ndarray, number: int) -> np.ndarray:
    """Pixels [H, W, C], mirrored or rotated as the EXIF orientation `number` (1 to 8) says: [H, W, C], or [W, H, C] for
    5 to 8."""
    if number in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if number in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if number in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
