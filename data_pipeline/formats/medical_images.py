"""Slices of medical images, [H, W, C]: the frames of a DICOM file, and the axial slices of a NIfTI volume. They are read with
pydicom and nibabel, which `pip install 'unlabeled[radiology]'` installs.

Numbers become those that the file states, such as Hounsfield units of a CT (the modality transform of DICOM PS3.3
C.11.1; slope and intercept of NIfTI): int16 if all of a slice are whole and fit, otherwise float32. Unsigned numbers
without such a transform are levels of grey: uint8, or uint16 on a scale on which 65,535 is the highest number of the
file's BitsStored; 0 is black. `window` cuts numbers off at both ends, and makes them such levels.
"""

from __future__ import annotations

import functools
import gzip
import importlib
import io
import math
import warnings
import zlib
from collections.abc import Iterator
from typing import IO, Any, Protocol

import numpy as np

from common.errors import Damaged, DataError
from data_pipeline.formats.image_formats import errors_as_damage
from data_pipeline.formats.pixels import converted

MAX_VOLUME_BYTES = 2 << 30  # of a file, and of the numbers of a volume
NIFTI = (".nii", ".nii.gz")  # endings of names; all other files are DICOM
_GREY = ("MONOCHROME1", "MONOCHROME2")
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # transfer syntax
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
Window = tuple[float, float]  # the lowest and the highest number


class Slices(Protocol):
    """A file of slices of one size."""

    count: int
    shape: tuple[int, int, int]  # of a slice: H, W, C

    def read(self, first: int, count: int) -> Iterator[np.ndarray]:
        """Slices as they are stored: uint8, uint16, int16 or float32 [H, W, C]. Raises `Damaged`."""


def open_slices(file: IO[bytes], path: str, size: int, max_pixels: int, window: Window | None = None) -> Slices:
    """Open a DICOM or a NIfTI file of `size` bytes. Raises `Damaged`, also for slices of more than `max_pixels`."""
    if size > MAX_VOLUME_BYTES:
        raise Damaged(f"has {size} bytes, but at most {MAX_VOLUME_BYTES} are read; divide it into smaller files")
    with errors_as_damage():
        data = file.read(size + 1)
    found = Nifti(data, window) if path.lower().endswith(NIFTI) else Dicom(data, window)
    height, width, _ = found.shape
    if height * width > max_pixels:
        raise Damaged(f"has slices of {width}×{height} pixels, more than the {max_pixels} that are allowed")
    return found


class Dicom:
    """A DICOM file. Frames of colours become RGB."""

    def __init__(self, data: bytes, window: Window | None = None):
        pydicom, self.window = need("pydicom"), window
        warnings.filterwarnings("ignore", category=UserWarning, module="pydicom")  # of values that are not used
        if data[128:132] != b"DICM":
            raise Damaged("is no DICOM file: it lacks the letters DICM at byte 128")
        _check_deflated(data)
        with errors_as_damage():
            self.header = header = pydicom.dcmread(io.BytesIO(data))
            if not any(name in header for name in _PIXELS):
                raise Damaged("is a DICOM file without an image")
            self.count = int(header.get("NumberOfFrames") or 1)
            self.color = header.PhotometricInterpretation not in _GREY
            height, width = int(header.Rows), int(header.Columns)
            syntax = header.file_meta.TransferSyntaxUID
            if syntax.is_encapsulated:
                least, stored = 8, len(data)  # bytes of a frame: the header of a fragment
            else:
                least = height * width * int(header.BitsAllocated) // 8
                stored = max(len(header[name].value) for name in _PIXELS if name in header)
        self.shape = (height, width, 3 if self.color else 1)
        if min(height, width, self.count) < 1 or self.count * least > stored:
            raise Damaged(f"holds {stored} bytes, but states {self.count} frames of {width}×{height} pixels")

    def read(self, first: int, count: int) -> Iterator[np.ndarray]:
        from data_pipeline.formats import dicom_codecs

        with errors_as_damage():
            frames = dicom_codecs.frames(self.header, first, count)
        for number in range(first, first + count):
            with errors_as_damage():
                pixels = np.array(next(frames))
                pixels = self._rgb(pixels) if self.color else self._grey(pixels, number)
            if pixels.shape != self.shape:
                raise Damaged(f"holds a frame of {list(pixels.shape)}, but its header states {list(self.shape)}")
            yield pixels

    def _rgb(self, pixels: np.ndarray) -> np.ndarray:
        if self.header.PhotometricInterpretation == "PALETTE COLOR":
            from pydicom.pixels import apply_color_lut

            pixels = apply_color_lut(pixels, self.header)[..., :3]
            return converted(pixels, 16, "uint8") if pixels.dtype.itemsize > 1 else pixels
        return _levels(pixels, int(self.header.BitsStored))

    def _grey(self, pixels: np.ndarray, number: int) -> np.ndarray:
        """Numbers, or levels of which 0 is black, from the stored numbers [H, W] of a frame."""
        pixels, header = pixels[..., None], self.header
        slope, intercept = self._transform(number)
        if "ModalityLUTSequence" in header:
            from pydicom.pixels import apply_modality_lut

            out = _numbers(apply_modality_lut(pixels, header), self.window)
        elif (slope, intercept) != (1, 0):
            out = _numbers(pixels * slope + intercept, self.window)
        elif pixels.dtype.kind != "u" or pixels.dtype.itemsize > 2 or self.window:
            out = _numbers(pixels, self.window)
        else:
            out = _levels(pixels, int(header.BitsStored))
        are_inverted = out.dtype.kind == "u" and header.PhotometricInterpretation == "MONOCHROME1"
        return np.iinfo(out.dtype).max - out if are_inverted else out

    def _transform(self, number: int) -> tuple[float, float]:
        """The slope and the intercept of a frame: its own, those of all frames, or those of an image of one frame."""
        groups = [*self.header.get("PerFrameFunctionalGroupsSequence", [])[number : number + 1]]
        groups += [*self.header.get("SharedFunctionalGroupsSequence", [])]
        for group in groups:
            for values in group.get("PixelValueTransformationSequence", []):
                return float(values.RescaleSlope), float(values.RescaleIntercept)
        stated = (self.header.get("RescaleSlope"), self.header.get("RescaleIntercept"))
        return (float(1 if stated[0] is None else stated[0]), float(stated[1] or 0))

    def fields(self, names: list[str]) -> dict[str, Any]:
        """{keyword: value} of attributes, without those that the file lacks: numbers, texts, and lists of them."""
        with errors_as_damage():
            values = {name: self.header.get(name) for name in names}
            return {name: _plain(value) for name, value in values.items() if value is not None}


class Nifti:
    """A NIfTI volume, oriented as the frames of a CT are: rows from anterior to posterior, columns from the patient's right
    to the left, slices from the feet to the head. Volumes of several times are as many volumes."""

    def __init__(self, data: bytes, window: Window | None = None):
        nibabel, self.window = need("nibabel"), window
        with errors_as_damage():
            if data[:2] == b"\x1f\x8b":
                with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                    data = file.read(MAX_VOLUME_BYTES + 1)
            if len(data) > MAX_VOLUME_BYTES:
                raise Damaged(f"has more than {MAX_VOLUME_BYTES} bytes when it is decompressed; divide it")
            second = int.from_bytes(data[:4], "little") == 540 or int.from_bytes(data[:4], "big") == 540
            image = (nibabel.Nifti2Image if second else nibabel.Nifti1Image).from_bytes(data)
            shape, dtype = image.shape, image.get_data_dtype()
        needed = math.prod(shape) * dtype.itemsize
        if dtype.kind not in "iuf" or len(shape) < 3 or min(shape) < 1:
            raise Damaged(f"holds {dtype} {list(shape)}, but volumes [X, Y, Z] of whole or float numbers are read")
        if needed > len(data):
            raise Damaged(f"has {len(data)} bytes, but states {needed} bytes of numbers {list(shape)}")
        with errors_as_damage():
            self.slope, self.intercept = image.dataobj.slope, image.dataobj.inter
            axes = nibabel.io_orientation(image.affine)
            # x, y and z grow to the right, to the front and to the head
            self.numbers = nibabel.apply_orientation(image.dataobj.get_unscaled(), axes)
        width, height, *others = self.numbers.shape
        self.count, self.shape = math.prod(others), (height, width, 1)

    def read(self, first: int, count: int) -> Iterator[np.ndarray]:
        volume = self.numbers.reshape(*self.numbers.shape[:2], -1, order="F")
        for number in range(first, first + count):
            values = np.array(volume[::-1, ::-1, number].T)[..., None]
            if (self.slope, self.intercept) != (1, 0):
                values = values * self.slope + self.intercept
            elif values.dtype.kind == "u" and values.dtype.itemsize <= 2 and not self.window:
                yield _levels(values, 8 * values.dtype.itemsize)
                continue
            yield _numbers(values, self.window)

    def fields(self, names: list[str]) -> dict[str, Any]:
        return {}


def _check_deflated(data: bytes) -> None:
    """Raise `Damaged` for a deflated DICOM file that pydicom would inflate to more than MAX_VOLUME_BYTES."""
    start = 144 + int.from_bytes(data[140:144], "little")  # behind the elements of group 2, whose length stands there
    if _DEFLATED in data[144:start]:
        with errors_as_damage():
            inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[start:], MAX_VOLUME_BYTES + 1)
        if len(inflated) > MAX_VOLUME_BYTES:
            raise Damaged(f"has more than {MAX_VOLUME_BYTES} bytes when it is inflated; divide it")


def _levels(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned numbers of `bits` bits as levels: uint8, or uint16 whose highest level is 65,535."""
    native = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if native.dtype.kind != "u" or native.dtype.itemsize > 2:
        raise Damaged(f"holds {native.dtype} levels, but unsigned ones of 8 and 16 bits are read")
    if bits <= 8:
        if native.max(initial=0) >= 1 << bits:
            raise Damaged(f"holds levels up to {native.max()}, but states {bits} bits")
        return converted(native.astype(np.uint8), 8, "uint8") if bits == 8 else _stretched(native, bits)
    return converted(native.astype(np.uint16), bits, "uint16")


def _stretched(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Levels of fewer than 8 bits as uint8 whose highest level is 255."""
    return (pixels.astype(np.float64) * (255 / ((1 << bits) - 1))).round().astype(np.uint8)


def _numbers(values: np.ndarray, window: Window | None) -> np.ndarray:
    """Numbers in the unit of the file as int16 or float32; with a window, as levels of uint16."""
    if not np.isfinite(values).all():
        raise Damaged("holds NaN or infinity")
    if window:
        low, high = window
        return ((values.clip(low, high) - low) * (65535 / (high - low))).round().astype(np.uint16)
    limits = np.iinfo(np.int16)
    fits = limits.min <= values.min() and values.max() <= limits.max
    return values.astype(np.int16) if fits and (values == np.rint(values)).all() else values.astype(np.float32)


def _plain(value: Any) -> Any:
    """An attribute's value as JSON has it."""
    if isinstance(value, str | int | float):
        return value
    return [_plain(each) for each in value] if type(value).__name__ == "MultiValue" else str(value)


def check_fields(names: list[str]) -> None:
    """Raise DataError for a name that is no keyword of an attribute of DICOM with texts or numbers."""
    need("pydicom")
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    for name in names:
        tag = tag_for_keyword(name)
        if tag is None or dictionary_VR(tag) in ("SQ", "OB", "OW", "OF", "OD", "OL", "OV", "UN", "OB or OW"):
            raise DataError(
                f"--dicom-fields {name}: no keyword of a text or a number in DICOM; write keywords as in PS3.6, for example"
                " PatientID,SeriesInstanceUID,Modality"
            )


@functools.cache
def need(name: str) -> Any:
    """A package that reads medical images. Raises DataError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(
            f"the package {name}, which reads medical images, is not installed; run pip install 'unlabeled[radiology]'"
        ) from None
