"""TIFFs that are read with tifffile: what is read of them, and that damaged and hostile ones are refused at once."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile

from common.errors import Damaged
from data_pipeline.formats import tiff_images
from data_pipeline.formats.decode import Encoded, decode_image, inspect
from data_pipeline.formats.row_reader import open_rows
from tests.parity.test_decode import npy, tiff


def written(*pages: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        for page in pages:
            writer.write(page, **({"metadata": None} | options))
    return out.getvalue()


def numbers(dtype: str, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def with_tag(data: bytes, changes: dict[int, int]) -> bytes:
    """A little-endian TIFF with other values of tags of its first page."""
    out = bytearray(data)
    (start,) = struct.unpack_from("<I", out, 4)
    (count,) = struct.unpack_from("<H", out, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        (tag,) = struct.unpack_from("<H", out, entry)
        if tag in changes:
            struct.pack_into("<HHII", out, entry, tag, 4, 1, changes.pop(tag))
    assert not changes
    return bytes(out)


def chain(length: int, last: int) -> bytes:
    """`length` pages of 4×4 pixels, each of which names the next; the last one names the page at byte `last`."""
    tags = [(256, 4, 1, 4), (257, 4, 1, 4), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    tags += [(277, 3, 1, 3), (278, 4, 1, 4), (279, 4, 1, 96)]
    page = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    out = b"II*\0" + struct.pack("<I", 8)
    for number in range(length):
        out += page + struct.pack("<I", last if number + 1 == length else len(out) + len(page) + 4)
    return out + bytes(96)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("bands", [2, 3, 4, 5])
def test_bands_of_eight_bits_that_are_no_colours(bands: int, planar: str):
    """As GDAL writes them: without a photometric interpretation, or as RGB with a further band."""
    pixels = numbers("uint8", 20, 30, bands)
    stored = pixels if planar == "contig" else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    data = written(stored, photometric="minisblack", planarconfig=planar)
    assert np.array_equal(decode_image(data, "tif", bands), pixels)
    assert inspect(data, "tif").kind == f"TIFF, 8 bits, {bands} channels"
    if bands == 4:
        data = written(stored, photometric="rgb", planarconfig=planar, extrasamples=["unspecified"])
        assert np.array_equal(decode_image(data, "tif", 4), pixels)
        with pytest.raises(Damaged, match="holds 4 channels, but 3 are requested"):
            decode_image(data, "tif")


@pytest.mark.parametrize("compression", ["jpeg2000", "lerc", "png", "zstd", "packbits"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("bands", [1, 3, 4])
def test_compressions_without_loss(compression: str, dtype: str, bands: int):
    pixels = numbers(dtype, 20, 30, bands)
    alpha = {"extrasamples": ["unassalpha"]} if bands == 4 else {}
    options = {"photometric": "rgb", "planarconfig": "contig"} if bands > 1 else {"photometric": "minisblack"}
    data = written(pixels.squeeze(), compression=compression, **options, **alpha)
    assert Encoded(data, "tif").stored_dtype == dtype
    assert np.array_equal(decode_image(data, "tif", bands, dtype=dtype), pixels)
    if bands == 4:
        share = pixels[..., 3:] / np.iinfo(dtype).max
        on_white = pixels[..., :3] * share + np.iinfo(dtype).max * (1 - share)
        assert np.abs(decode_image(data, "tif", dtype=dtype) - on_white).max() <= 2


@pytest.mark.parametrize(("bands", "colors"), [(4, 3), (2, 1)])
def test_transparency_of_sixteen_bits_is_drawn_on_white(bands: int, colors: int):
    pixels = numbers("uint16", 20, 30, bands)
    share = pixels[..., -1:] / 65535
    options = {"photometric": "rgb" if colors == 3 else "minisblack", "planarconfig": "contig"}
    for kind, front in (("unassalpha", pixels[..., :-1] * share), ("assocalpha", pixels[..., :-1])):
        data = written(pixels, extrasamples=[kind], **options)
        expected = np.rint(front + 65535 * (1 - share)).clip(0, 65535)
        assert np.array_equal(decode_image(data, "tif", colors, dtype="uint16"), expected)
        assert np.abs(decode_image(data, "tif", 3) - expected / 257).max() <= 0.5  # grey as three channels
        assert np.array_equal(decode_image(data, "tif", bands, dtype="uint16"), pixels)
    eight = written((pixels >> 8).astype(np.uint8), extrasamples=["unassalpha"], **options)
    assert np.abs(decode_image(eight, "tif", colors) - (pixels[..., :-1] / 257 * share + 255 * (1 - share))).max() < 2.5


def test_without_tifffile_no_bit_is_lost_unseen(monkeypatch: pytest.MonkeyPatch):
    rgb = numbers("uint16", 20, 30, 3)
    data = written(rgb, photometric="rgb")
    monkeypatch.setattr(tiff_images, "import_tifffile", lambda: None)
    assert Encoded(data, "tif").stored_dtype == "uint16"
    assert np.abs(decode_image(data, "tif") - rgb / 257).max() <= 1
    for options in ({"dtype": "uint16"}, {"dtype": "float32"}, {"bits": 12}):
        with pytest.raises(
            Damaged, match=r"16-bit colours, of which Pillow keeps only 8 bits; `pip install 'unlabeled"
        ):
            decode_image(data, "tif", **options)
    with pytest.raises(Damaged, match=r"a kind that is not read; `pip install 'unlabeled\[tiff\]'` makes it readable"):
        decode_image(written(numbers("uint8", 9, 9, 4), photometric="minisblack", planarconfig="contig"), "tif", 4)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_second_image_is_not_left_out(dtype: str):
    large = numbers("uint16", 20, 30, 3).astype(dtype)
    for further in (large, large[:9], large[..., 0]):
        with pytest.raises(Damaged, match=r"write each (page|image) to a file of its own"):
            decode_image(written(large, further, photometric=None), "tif", dtype=dtype)
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:  # a smaller copy of the image
        writer.write(large, photometric="rgb", metadata=None)
        writer.write(large[::2, ::2].copy(), photometric="rgb", subfiletype=1, metadata=None)
    assert np.array_equal(decode_image(out.getvalue(), "tif", dtype=dtype), large)


def test_chains_of_pages_end():
    for length in (1, 2, 99, 150):
        with pytest.raises(Damaged, match="pages form a loop"):
            inspect(chain(length, 8), "tif")
    long = chain(5000, 0)
    began = time.monotonic()
    with pytest.raises(Damaged, match="more than 4096 pages"):
        inspect(long, "tif")
    assert time.monotonic() - began < 2
    with pytest.raises(Damaged, match=r"the axes IYXS \[150, 4, 4, 3\]"):
        inspect(chain(150, 0), "tif")
    assert decode_image(chain(1, 0), "tif", dtype="uint16").shape == (4, 4, 3)
    out = {}
    for options in ({"bigtiff": True}, {"byteorder": ">"}, {"bigtiff": True, "byteorder": ">"}):
        file = io.BytesIO()
        tifffile.imwrite(file, numbers("uint16", 4, 4, 3), photometric="rgb", metadata=None, **options)
        assert decode_image(file.getvalue(), "tif").shape == (4, 4, 3)
        out[len(options), *options] = file.getvalue()
    big = out[1, "bigtiff"]
    (start,) = struct.unpack_from("<Q", big, 8)
    link = start + 8 + 20 * struct.unpack_from("<Q", big, start)[0]
    with pytest.raises(Damaged, match="pages form a loop"):
        inspect(big[:link] + struct.pack("<Q", start) + big[link + 8 :], "tif")


@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
def test_missing_strips_and_tiles_are_damage(compression: str | None):
    pixels = numbers("uint16", 64, 48, 3)
    strips = written(pixels, photometric="rgb", compression=compression)
    tiles = written(pixels, photometric="rgb", compression=compression, tile=(16, 16))
    for data in (strips, tiles):
        assert np.array_equal(decode_image(data, "tif", dtype="uint16"), pixels)
        for changes in ({257: 10_000}, {257: 128}, {257: 65}, {256: 4800}):
            with pytest.raises(Damaged, match=r"pixels are cut off|failed to read|corrupted strip"):
                decode_image(with_tag(data, dict(changes)), "tif", dtype="uint16")
    with pytest.raises(Damaged, match=r"cut off: it has 12 of 1875 strips or tiles"):
        decode_image(with_tag(tiles, {257: 10_000}), "tif")


def test_strips_that_are_empty_or_outside_of_the_file_are_damage():
    data = written(numbers("uint16", 64, 48, 3), photometric="rgb", compression="zlib", tile=(16, 16))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tags = {name: file.pages[0].tags[name] for name in ("TileByteCounts", "TileOffsets")}
    for name, value in (("TileByteCounts", 0), ("TileOffsets", len(data) - 1)):
        size = {3: "<H", 4: "<I"}[int(tags[name].dtype)]
        at = tags[name].valueoffset
        changed = data[:at] + struct.pack(size, value) + data[at + struct.calcsize(size) :]
        with pytest.raises(Damaged, match=f"pixels are cut off: it has {len(data)} bytes"):
            decode_image(changed, "tif", dtype="uint16")


def test_readers_of_rows_refuse_them_too():
    tiles = written(numbers("uint16", 64, 48, 3), photometric="rgb", compression="zlib", tile=(16, 16))
    with open_rows(io.BytesIO(tiles), "tif") as rows:
        assert rows.read(16, 16).shape == (16, 48, 3)
    few = io.BytesIO(with_tag(tiles, {257: 10_000}))
    with open_rows(few, "tif") as rows, pytest.raises(Damaged, match="cut off: it has 12 of 1875 strips or tiles"):
        rows.read(0, 16)
    with pytest.raises(Damaged, match="pages form a loop"), open_rows(io.BytesIO(chain(150, 8)), "tif"):
        pass


def test_few_bytes_that_state_many_numbers():
    tiles = written(numbers("uint16", 64, 48, 3), photometric="rgb", compression="zlib", tile=(16, 16))
    strip = zlib.compress(bytes(1 << 20), 9)
    tags = [(256, 4, 1, 1000), (257, 4, 1, 1000), (258, 3, 1, 16), (259, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 146)]
    tags += [(277, 3, 1, 60_000), (278, 4, 1, 1000), (279, 4, 1, len(strip)), (284, 3, 1, 1), (339, 3, 1, 1)]
    bands = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    tracemalloc.start()
    for data in (bands + bytes(4) + strip, with_tag(tiles, {322: 1 << 20, 323: 1 << 20})):
        with pytest.raises(Damaged, match=r"in strips or tiles of up to \d+ numbers, but 400000000 are allowed"):
            inspect(data, "tif")
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_planes_in_other_files_are_not_made_up():
    description = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1">'
        '<Image ID="Image:0"><Pixels ID="P:0" DimensionOrder="XYCZT" Type="float" SizeX="8" SizeY="8" SizeC="2"'
        ' SizeZ="1" SizeT="1"><Channel ID="a"/><Channel ID="b"/><TiffData FirstC="0" IFD="0" PlaneCount="1"/>'
        "</Pixels></Image></OME>"
    )
    page = np.ones((8, 8), np.float32)
    with pytest.raises(Damaged, match=r"states the axes CYX \[2, 8, 8\], but some of its pages are not in the file"):
        inspect(written(page, description=description), "tif")


def test_bytes_that_decoding_holds():
    """No decoder uses much more than its estimate, by which threads share the memory."""
    deep = numbers("uint16", 1000, 1000, 5) >> 4
    _, png = cv2.imencode(".png", deep[..., :3])
    _, clear = cv2.imencode(".png", deep[..., :4])
    bands = {"photometric": "minisblack", "planarconfig": "contig"}
    cases = [(written(deep.astype(kind), **bands), "tif", 5) for kind in ("uint16", "int16", "float32", "float64")]
    cases += [(written(deep[..., :4], photometric="rgb", extrasamples=["unassalpha"]), "tif", c) for c in (1, 3, 4)]
    cases += [(npy(deep[..., :3]), "npy", c) for c in (1, 3)] + [(npy(deep.astype(np.float64)), "npy", 5)]
    cases += [(each.tobytes(), "png", c) for each in (png, clear) for c in (1, 3)]
    for data, extension, channels in cases:
        for dtype in ("uint16", "float32"):
            for bits in (12, 16):
                if Encoded(data, extension).stored_dtype == "float32" and dtype == "uint16":
                    continue
                encoded = Encoded(data, extension, channels, bits, dtype=dtype)
                tracemalloc.start()
                encoded.pixels()
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                estimate = encoded.decode_bytes()
                assert peak < 1.1 * estimate + 8e6, (extension, channels, dtype, bits, peak / 1e6, estimate / 1e6)


def test_a_damaged_orientation_is_none():
    pixels = numbers("uint16", 4, 6, 3)
    data = written(pixels, photometric="rgb", extratags=[(274, "H", 1, 77, True)])
    assert np.array_equal(decode_image(data, "tif", dtype="uint16"), pixels)
    assert np.array_equal(decode_image(tiff(pixels, 2), "tif", dtype="uint16"), pixels)
