"""Decoded pixels equal Pillow's in every format; damaged files raise Damaged, and nothing large is decoded before
its header was checked."""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps, PngImagePlugin

from common.errors import Damaged
from data_pipeline.formats import pillow_images, tiff_images
from data_pipeline.formats.decode import Encoded, decode_image, inspect
from data_pipeline.formats.image_formats import IMAGES, MAX_PIXELS


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    from sklearn.datasets import load_sample_image

    return np.array(load_sample_image("china.jpg")[100:300, 200:501])  # [200, 301, 3]


def saved(image: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def npy(array: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return int(np.abs(a.astype(int) - b.astype(int)).max())


LOSSLESS = [
    ("png", "PNG", {}),
    ("webp", "WEBP", {"lossless": True}),
    ("bmp", "BMP", {}),
    ("tiff", "TIFF", {}),
    ("tif", "TIFF", {"compression": "tiff_lzw"}),
    ("tif", "TIFF", {"compression": "tiff_adobe_deflate"}),
]


# ---------------------------------------------------------------- pixels
@pytest.mark.parametrize("extension, kind, options", LOSSLESS)
def test_lossless_formats(photo: np.ndarray, extension: str, kind: str, options: dict):
    data = saved(photo, kind, **options)
    assert Encoded(data, extension).shape == (200, 301)
    assert np.array_equal(decode_image(data, extension), photo)
    assert np.array_equal(decode_image(data, "PNG"), photo)  # the bytes say what it is, not the name
    gray = decode_image(data, extension, channels=1)
    assert gray.shape == (200, 301, 1) and difference(gray[..., 0], np.array(Image.fromarray(photo).convert("L"))) == 0


@pytest.mark.parametrize("subsampling", ["420", "422", "444"])
def test_jpeg_equals_pillow(photo: np.ndarray, subsampling: str):
    data = simplejpeg.encode_jpeg(photo, 90, colorsubsampling=subsampling)
    expected = np.array(Image.open(io.BytesIO(data)))
    assert difference(decode_image(data, "jpg"), expected) == 0 == difference(decode_image(data, "JPEG"), expected)
    luma = np.array(Image.open(io.BytesIO(data)).convert("L"))
    ours = decode_image(data, "jpg", 1)[..., 0].astype(
        int
    )  # the file's own luma, which differs where its RGB is clipped
    inside = ((expected > 0) & (expected < 255)).all(2)
    assert np.abs(ours - luma)[inside].max() <= 2 and np.abs(ours - luma).mean() < 0.5


def test_other_jpegs(photo: np.ndarray):
    """Grey, stored as RGB, progressive, CMYK and YCCK; each result is writable and has memory of its own."""
    picture = Image.fromarray(photo)
    for image, options in [(picture.convert("L"), {}), (picture, {"keep_rgb": True}), (picture, {"progressive": True})]:
        data = saved(image, "JPEG", quality=92, **options)
        expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        assert difference(decode_image(data, "jpg"), expected) == 0
        assert decode_image(data, "jpg", 1).shape == (200, 301, 1) and decode_image(data, "jpg").flags.writeable
    cmyk = saved(picture.convert("CMYK"), "JPEG", quality=95)
    assert Encoded(cmyk, "jpg").shape == (200, 301)
    assert np.abs(decode_image(cmyk, "jpg").astype(int) - photo).mean() < 5
    assert decode_image(cmyk, "jpg", 4).shape == (200, 301, 4)
    adobe = cmyk.index(b"Adobe")
    ycck = bytearray(cmyk)
    ycck[adobe + 11] = 2
    assert difference(decode_image(bytes(ycck), "jpg"), np.array(Image.open(io.BytesIO(ycck)).convert("RGB"))) == 0


@pytest.mark.parametrize("turn", range(1, 9))
def test_an_orientation_is_applied_unless_the_set_says_not(photo: np.ndarray, turn: int):
    exif = Image.Exif()
    exif[0x0112] = turn
    exif[0x010F] = "a camera"
    kinds: list[tuple[str, str, dict]] = [("JPEG", "jpg", {}), ("PNG", "png", {}), ("WEBP", "webp", {"lossless": True})]
    kinds += [("TIFF", "tif", {}), ("TIFF", "tif", {"compression": "tiff_lzw"})]
    for kind, extension, options in kinds:
        data = saved(photo, kind, exif=exif, **options)
        with Image.open(io.BytesIO(data)) as opened:
            seen = np.array(ImageOps.exif_transpose(opened))
        assert Encoded(data, extension).shape == seen.shape[:2] == ((301, 200) if turn >= 5 else (200, 301))
        assert np.array_equal(decode_image(data, extension), seen)
        stored = decode_image(saved(photo, kind, **options), extension)
        assert Encoded(data, extension, as_stored=True).shape == (200, 301)
        assert np.array_equal(decode_image(data, extension, as_stored=True), stored)
        assert ("turned by EXIF" in inspect(data, extension).remarks) == (turn > 1)
    jpeg = saved(photo, "JPEG", exif=exif)
    small, plain = Encoded(jpeg, "jpg").pixels(2.0), Encoded(saved(photo, "JPEG"), "jpg").pixels(2.0)
    assert small.shape[:2] == ((151, 100) if turn >= 5 else (100, 151)) and small.flags.c_contiguous
    assert turn != 6 or np.array_equal(small, np.rot90(plain, -1))
    gray = saved(Image.fromarray(photo).convert("CMYK"), "JPEG", exif=exif)
    assert decode_image(gray, "jpg").shape[:2] == ((301, 200) if turn >= 5 else (200, 301))
    broken = jpeg.replace(b"MM\0*", b"MM\0+")  # an EXIF block that is damaged turns nothing
    assert Encoded(broken, "jpg").shape == (200, 301)


def test_16_bits_are_rounded():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.round(values / 257).astype(np.uint8)
    for kind, extension in (("PNG", "png"), ("TIFF", "tif")):
        data = saved(Image.fromarray(values), kind)
        assert np.array_equal(decode_image(data, extension, 1)[..., 0], expected)
        assert np.array_equal(decode_image(data, extension), expected[..., None].repeat(3, 2))
    for array in (values, values.astype(">u2"), values[..., None]):
        assert np.array_equal(decode_image(npy(array), "npy", 1)[..., 0], expected)


def test_transparency_lies_on_white():
    red = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    for image, options, expected in [
        (red, {}, (255, 127, 127)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), {}, (255, 255, 255)),
        (Image.new("LA", (4, 4), (0, 0)), {}, (255, 255, 255)),
        (palette, {}, (10, 20, 30)),
        (palette, {"transparency": 1}, (255, 255, 255)),
        (Image.new("RGB", (4, 4), (1, 2, 3)), {"transparency": (1, 2, 3)}, (255, 255, 255)),
        (Image.new("1", (4, 4), 1), {}, (255, 255, 255)),
    ]:
        assert np.array_equal(decode_image(saved(image, "PNG", **options), "png"), np.full((4, 4, 3), expected)), image
    assert difference(decode_image(saved(red, "PNG"), "png", 1), np.full((4, 4, 1), 165, np.uint8)) <= 1
    assert np.array_equal(decode_image(saved(red, "PNG"), "png", 4), np.array(red))


def test_the_first_picture_of_an_animation():
    frames = [Image.new("RGB", (6, 5), (40 * i, 0, 0)) for i in range(1, 4)]
    for kind, extension, options in (("GIF", "gif", {}), ("WEBP", "webp", {"lossless": True})):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(decode_image(data, extension), np.array(frames[0])), kind
        assert "animation, first picture" in inspect(data, extension).remarks


def tiff(
    array: np.ndarray, photometric: int = 1, extra: int | None = None, bits: int = 0, pages: tuple = (0,)
) -> bytes:
    """An uncompressed TIFF of [H, W, bands], as scientific tools write it; `pages`: the NewSubfileType of each page."""
    height, width, bands = array.shape
    kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    out, links = b"II*\0", 4
    out += bytes(4)
    for page in pages:
        pixels, deep = len(out), len(out) + array.nbytes
        out += array.tobytes() + struct.pack(f"<{bands}H", *[bits or 8 * array.itemsize] * bands)
        tags = [(254, 4, 1, page), (256, 4, 1, width), (257, 4, 1, height), (258, 3, bands, deep), (259, 3, 1, 1)]
        tags += [(262, 3, 1, photometric), (273, 4, 1, pixels), (277, 3, 1, bands), (278, 4, 1, height)]
        tags += [(279, 4, 1, array.nbytes), (339, 3, 1, kind)] + ([(338, 3, 1, extra)] if extra is not None else [])
        tags[3] = (258, 3, bands, (bits or 8 * array.itemsize)) if bands == 1 else tags[3]
        out = out[:links] + struct.pack("<I", len(out)) + out[links + 4 :]
        out += struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
        links, out = len(out), out + bytes(4)
    return out


def test_a_tiff_is_read_faithfully_or_refused(photo: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    gray16 = np.arange(0, 65536, 13, dtype=np.uint16)[:5000].reshape(50, 100, 1)
    assert np.array_equal(decode_image(tiff(gray16), "tif", 1), np.round(gray16 / 257).astype(np.uint8))
    assert np.array_equal(decode_image(tiff(gray16, photometric=0), "tif", 1), 255 - np.round(gray16 / 257))
    assert np.array_equal(decode_image(tiff(photo, 2), "tif"), photo)
    four = np.dstack([photo, photo[..., :1]])
    assert np.array_equal(decode_image(tiff(four, 2), "tif", 4), four)  # four bands for a model of four channels
    with_tifffile = [
        (tiff(gray16.astype(np.int32)), "a TIFF of int32 numbers, but uint8, uint16, int16"),
        (tiff(gray16.astype(np.int16)), "int16 pixels, whose range of values is not known, but uint8 is requested"),
        (tiff(gray16.astype(np.float32)), "float32 pixels, whose range of values is not known"),
    ]
    for data, reason in with_tifffile:
        with pytest.raises(Damaged, match=reason):
            decode_image(data, "tif")
    monkeypatch.setattr(tiff_images, "import_tifffile", lambda: None)
    for data, reason in [
        (tiff(gray16.astype(np.int32)), "32-bit or signed numbers"),
        (tiff(gray16.astype(np.uint32)), "32-bit or signed numbers"),
        (tiff(gray16.astype(np.int16)), "32-bit or signed numbers"),
        (tiff(gray16.astype(np.float32)), "floating-point"),
        (tiff(four, 2), "holds 4 channels, but 3 are requested"),
        (tiff(four, 2, extra=0), "4 bands, but Pillow reads only 3 of them"),
        (tiff(photo, 2, pages=(0, 0)), "several pages; write each page to a file of its own"),
        (tiff(photo, 2, pages=(0, 1, 0)), "several pages; write each page to a file of its own"),
    ]:
        advice = "" if "channels" in reason else ".*npy" if "pages" in reason else ".*unlabeled.tiff.*npy"
        with pytest.raises(Damaged, match=f"{reason}{advice}"):
            decode_image(data, "tif")
    copies = tiff(photo, 2, pages=(0, 1, 4))  # a smaller copy and a mask are no pages of their own
    assert np.array_equal(decode_image(copies, "tif"), photo)
    assert inspect(tiff(four, 2), "tif").kind == "TIFF, 8 bits, 4 channels"
    assert decode_image(saved(Image.fromarray(photo).convert("RGBA"), "TIFF"), "tif").shape == (200, 301, 3)


def test_twelve_bits_of_sixteen():
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    exact = np.round(values / 4095 * 255).astype(np.uint8)
    for data, extension in [(saved(Image.fromarray(values), "PNG"), "png"), (npy(values), "npy")]:
        assert inspect(data, extension)[:3] == (f"{extension.upper()}, 16 bits, 1 channel", 0, 4095)
        assert decode_image(data, extension, 1).max() == 16  # as 16 bits, and so `inspect` has to say the range
        assert np.array_equal(decode_image(data, extension, 1, bits=12)[..., 0], exact)
        assert np.array_equal(decode_image(data, extension, bits=12), exact[..., None].repeat(3, 2))
        with pytest.raises(Damaged, match="numbers up to 4095, but the 10 bits of this set end at 1023"):
            decode_image(data, extension, bits=10)
    packed = np.array([[0x00, 0x0F, 0xFF], [0x80, 0x07, 0xFF]], np.uint8).tobytes()  # 0, 4095; 2048, 2047
    data = tiff(np.zeros((2, 2, 1), np.uint8), bits=12)
    data = data[:8] + packed[:4] + data[12:]
    assert decode_image(data, "tif", 1)[0].ravel().tolist() == [0, 255]  # the file says that it has 12 bits


@pytest.mark.parametrize("extension", ["jpg", "png", "npy"])
def test_reasons_name_no_object(extension: str):
    with pytest.raises(Damaged, match=r"^is empty: 0 bytes$"):
        decode_image(b"", extension)
    if extension != "npy":
        with pytest.raises(Damaged, match=r"^is not in one of the image formats that are read: JPEG, PNG"):
            decode_image(b"no image at all", extension)


def test_channels_must_be_those_of_the_file(photo: np.ndarray):
    picture = Image.fromarray(photo)
    for mode, extension, kind, held in [
        ("RGB", "png", "PNG", 3),
        ("RGBA", "png", "PNG", 4),
        ("LA", "png", "PNG", 2),
        ("RGBA", "tif", "TIFF", 4),
        ("CMYK", "tif", "TIFF", 4),
        ("RGB", "jpg", "JPEG", 3),
        ("L", "jpg", "JPEG", 1),
    ]:
        image = picture.convert(mode)
        data = saved(image, kind)
        if held in (2, 4):
            assert np.array_equal(decode_image(data, extension, held), np.array(image))
        with pytest.raises(Damaged, match=f"holds {held} channels, but 5 are requested"):
            decode_image(data, extension, 5)
        assert decode_image(data, extension, 3).shape == (200, 301, 3)
        assert decode_image(data, extension, 1).shape == (200, 301, 1)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays(channels: int, order: str):
    array = np.asarray(np.random.default_rng(0).integers(0, 256, (7, 9, channels), dtype=np.uint8), order=order)
    out = decode_image(npy(array), "npy", channels)
    assert np.array_equal(out, array) and out.flags.c_contiguous and out.flags.writeable
    assert Encoded(npy(array), "npy", channels).shape == (7, 9)
    if channels not in (1, 3):
        for wrong in (1, 3, channels + 1):
            with pytest.raises(Damaged, match=f"holds {channels} channels, but {wrong} are requested"):
                decode_image(npy(array), "npy", wrong)
    elif channels == 3:
        assert np.array_equal(decode_image(npy(array), "npy", 1)[..., 0], np.array(Image.fromarray(array).convert("L")))
    else:
        assert np.array_equal(decode_image(npy(array), "npy", 3), array.repeat(3, 2))
        assert np.array_equal(decode_image(npy(array[..., 0]), "npy", 1), array)


# ---------------------------------------------------------------- the size
def test_shape_needs_the_header_only(photo: np.ndarray):
    for kind, extension in (("JPEG", "jpg"), ("PNG", "png"), ("TIFF", "tif"), ("GIF", "gif"), ("BMP", "bmp")):
        data = saved(photo, kind)
        head = data if kind == "TIFF" else data[: 20 + data.index(b"\xff\xda") if kind == "JPEG" else 2000]
        assert Encoded(data, extension).shape == (200, 301) == Encoded(head, extension).shape


@pytest.mark.parametrize("height, width", [(200, 301), (64, 48), (17, 93), (3, 500)])
def test_scaled_decoding_is_the_smallest_that_fits(photo: np.ndarray, height: int, width: int):
    image = np.ascontiguousarray(np.tile(photo, (1, 2, 1))[:height, :width])
    for subsampling in ("420", "444"):
        encoded = Encoded(simplejpeg.encode_jpeg(image, 90, colorsubsampling=subsampling), "jpg")
        for shrink in (0.5, 1.0, 1.05, 1.3, 1.59, 1.6, 1.9, 2.0, 2.5, 2.67, 3.9, 4.0, 7.9, 8.0, 50.0):
            out = encoded.pixels(shrink)
            assert shrink < 1 or (out.shape[0] >= height / shrink and out.shape[1] >= width / shrink)
            eighths = math.ceil(8 / shrink) if shrink >= 1.6 else 8
            assert out.shape[:2] == (math.ceil(height * eighths / 8), math.ceil(width * eighths / 8)), shrink
            assert height < 48 or np.abs(out.mean((0, 1)) - image.mean((0, 1))).max() < 6
    gray = Encoded(simplejpeg.encode_jpeg(image, 90), "jpg", 1).pixels(2.0)
    assert gray.shape == (math.ceil(height / 2), math.ceil(width / 2), 1)


def test_only_jpeg_is_scaled(photo: np.ndarray):
    for kind, extension in (("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")):
        assert Encoded(saved(photo, kind), extension).pixels(4.0).shape == (200, 301, 3)
    assert Encoded(npy(photo), "npy").pixels(4.0).shape == (200, 301, 3)


# ---------------------------------------------------------------- damage
@pytest.mark.parametrize("shrink", [1.0, 2.0, 8.0])
def test_a_jpeg_cut_off_anywhere(photo: np.ndarray, shrink: float):
    for options in ({"quality": 80}, {"quality": 60, "progressive": True}):
        data = saved(photo, "JPEG", **options)
        for end in [*range(0, 700, 53), *range(700, len(data), 997), len(data) - 2, len(data) - 1]:
            with pytest.raises(Damaged):
                Encoded(data[:end], "jpg").pixels(shrink)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_hole_in_a_jpeg(photo: np.ndarray, mode: str):
    """64 zero bytes at almost any position of a file of high quality. If the codes become valid again behind them,
    the damage cannot be detected, because JPEG has no checksum."""
    data = saved(Image.fromarray(photo).convert(mode), "JPEG", quality=97)
    start = data.index(b"\xff\xda") + 20
    places = range(start, len(data) - 100, (len(data) - start) // 60)
    seen = 0
    for place in places:
        hole = bytearray(data)
        hole[place : place + 64] = bytes(64)
        try:
            decode_image(bytes(hole), "jpg")
        except Damaged:
            seen += 1
    assert seen > (0.6 if mode == "CMYK" else 0.85) * len(places)  # an empty channel has few codes


def test_a_png_with_any_byte_changed_or_cut_off(photo: np.ndarray):
    data = saved(photo, "PNG")
    rng = np.random.default_rng(0)
    for place in [*range(60), *rng.integers(60, len(data), 100).tolist(), *range(len(data) - 12, len(data))]:
        changed = bytearray(data)
        changed[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(Damaged):
            decode_image(bytes(changed), "png")
        with pytest.raises(Damaged):
            decode_image(data[:place], "png")
    assert np.array_equal(decode_image(data + b"trailing", "png"), photo)


@pytest.mark.parametrize("extension, kind, options", [*LOSSLESS[1:], ("webp", "WEBP", {}), ("gif", "GIF", {})])
def test_other_formats_cut_off_anywhere(photo: np.ndarray, extension: str, kind: str, options: dict):
    data = saved(photo, kind, **options)
    for end in [*range(0, 200, 17), *np.linspace(200, len(data) - 3, 40).astype(int).tolist()]:
        with pytest.raises(Damaged):
            decode_image(data[:end], extension)


def test_arrays_that_are_refused(photo: np.ndarray):
    whole = npy(photo)
    for data, reason in [
        (npy(np.array([[{}]], dtype=object), allow_pickle=True), r"holds object \[1, 1\]"),
        (
            npy(photo.astype(np.complex64)),
            r"holds complex64 \[200, 301, 3\], but \[H, W, C\] of uint8, uint16, int16, float16",
        ),
        (npy(photo.astype(np.int32)), "holds int32"),
        (npy(photo.astype(np.int16)), "int16 pixels, whose range of values is not known, but uint8 is requested"),
        (npy(np.zeros(5, np.uint8)), r"holds uint8 \[5\]"),
        (npy(np.zeros((0, 5, 3), np.uint8)), "5×0 pixels"),
        (whole[:-1], "holds 180599 bytes of uint8"),
        (whole + b"x", "holds 180601 bytes of uint8"),
        (whole[:40], "."),
        (b"", "."),
        (b"\x93NUMPY\x09\x00" + whole[8:], "version 9.0"),
        (b"\x80\x04K\x01.", "magic"),
    ]:
        with pytest.raises(Damaged, match=reason):
            decode_image(data, "npy")


@pytest.mark.slow
def test_pixel_bombs_are_refused_by_their_header(monkeypatch: pytest.MonkeyPatch, photo: np.ndarray):
    """Nothing is decoded, in any format."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded before the size was looked at")

    jpeg = bytearray(simplejpeg.encode_jpeg(photo, 90))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 20_000, 20_000)
    bombs = {"png": saved(Image.new("1", (12_000, 12_000)), "PNG"), "jpg": bytes(jpeg)}
    bombs["gif"] = b"GIF89a" + struct.pack("<HH", 12_000, 12_000) + saved(Image.new("L", (4, 4)), "GIF")[10:]
    bmp = bytearray(saved(photo, "BMP"))
    bmp[18:26] = struct.pack("<ii", 12_000, 12_000)
    tiff = saved(Image.new("1", (12_000, 12_000)), "TIFF", compression="group4")
    bombs |= {"bmp": bytes(bmp), "tif": tiff}
    bombs["npy"] = npy(np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (12_000, 12_000, 1), (0, 0, 0)))[:200]
    webp = bytearray(saved(photo, "WEBP", lossless=True))
    webp[21:25] = struct.pack("<I", 16_383 | 16_383 << 14)
    bombs["webp"] = bytes(webp)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", never)
    for plugin in (
        "ImageFile.ImageFile",
        "TiffImagePlugin.TiffImageFile",
        "GifImagePlugin.GifImageFile",
        "WebPImagePlugin.WebPImageFile",
    ):
        monkeypatch.setattr(f"PIL.{plugin}.load", never)
    for extension, data in bombs.items():
        with pytest.raises(Damaged, match="pixels"):
            decode_image(data, extension)
        with pytest.raises(Damaged, match="pixels"):
            _ = Encoded(data, extension).shape


def test_the_limit_is_of_pixels():
    assert MAX_PIXELS == 100_000_000
    wide = npy(np.zeros((1, 5, 3), np.uint8))
    for size, fits in ((MAX_PIXELS, True), (MAX_PIXELS + 1, False)):
        data = wide.replace(b"(1, 5, 3), }" + b" " * 12, f"(1, {size}, 3), }}".encode().ljust(24))
        if fits:
            assert Encoded(data, "npy").shape == (1, size)
        else:
            with pytest.raises(Damaged, match=r"×1 pixels, but 1 to 100000000 are allowed; data\.max_pixels"):
                _ = Encoded(data, "npy").shape
            assert Encoded(data, "npy", max_pixels=size).shape == (1, size)


def test_another_limit(photo: np.ndarray):
    small = saved(photo, "PNG")
    head = struct.pack(">II", 20_000, 20_000) + small[24:29]  # more than Pillow takes by itself
    huge = small[:16] + head + struct.pack(">I", zlib.crc32(b"IHDR" + head)) + small[33:]
    assert Encoded(huge, "png", max_pixels=400_000_000).shape == (20_000, 20_000)
    for read in (Encoded(huge, "png").pixels, lambda: inspect(huge, "png"), lambda: Encoded(b"", "png").shape):
        with pytest.raises(Damaged, match=r"20000×20000 pixels, but 1 to 100000000|0 bytes"):
            read()
    assert inspect(small, "png", max_pixels=200 * 301).kind.startswith("PNG")
    with pytest.raises(Damaged, match="301×200 pixels, but 1 to 60199 are allowed"):
        inspect(small, "png", max_pixels=200 * 301 - 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "I;16", "I;16B"])
def test_strips_change_no_pixel(photo: np.ndarray, mode: str, monkeypatch: pytest.MonkeyPatch):
    if mode.startswith("I;16"):
        gray = photo[..., 0].astype(np.uint16) * 256 + photo[..., 1]
        image = Image.fromarray(gray.astype(">u2") if mode == "I;16B" else gray)
        assert image.mode == mode
    else:
        image = Image.fromarray(photo).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(photo[..., 2]))
    kinds = {"CMYK": ["TIFF"], "I;16B": ["TIFF"], "RGB": ["PNG", "TIFF", "WEBP"]}.get(mode, ["PNG", "TIFF"])
    files = [(saved(image, kind), kind.lower()) for kind in kinds]
    files += [(saved(image, kind, transparency=3), kind.lower()) for kind in ("PNG", "GIF") if mode == "P"]
    for data, extension in files:
        for channels in (1, 3, len(image.getbands())):
            monkeypatch.undo()
            whole = decode_image(data, extension, channels)
            monkeypatch.setattr(pillow_images, "STRIP_PIXELS", 301 * 7)
            assert np.array_equal(decode_image(data, extension, channels), whole), (extension, channels)


def test_bytes_that_decoding_holds(photo: np.ndarray):
    """Bytes per pixel: the copy of a view, Pillow's copy, and the coefficients of a JPEG with several scans."""
    jpeg = saved(photo, "JPEG")
    cmyk = saved(Image.fromarray(photo).convert("CMYK"), "JPEG")
    for data, extension, channels, shrink, expected in (
        (jpeg, "jpg", 3, 1.0, 6),
        (jpeg, "jpg", 1, 1.0, 2),
        (jpeg, "jpg", 3, 2.0, 6 / 4),
        (jpeg, "jpg", 3, 8.0, 6 / 64),
        (saved(photo, "JPEG", progressive=True), "jpg", 3, 1.0, 9),
        (saved(photo, "JPEG", progressive=True), "jpg", 3, 8.0, 6 + 3 / 64),
        (cmyk, "jpg", 3, 4.0, 7),
        (saved(photo, "PNG"), "png", 3, 4.0, 7),
        (saved(photo, "WEBP"), "webp", 3, 4.0, 19),
        (npy(photo), "npy", 3, 4.0, 6),
        (npy(photo.astype(np.uint16)), "npy", 3, 4.0, 6),
    ):
        encoded, taken = Encoded(data, extension, channels), list[int]()
        assert encoded.decode_bytes(shrink) == round(200 * 301 * expected), (extension, channels, shrink)
        encoded.reserve = taken.append
        encoded.pixels(shrink)
        assert taken == [encoded.decode_bytes(shrink)]


def test_a_damaged_cmyk_jpeg_is_seen(photo: np.ndarray):
    data = saved(Image.fromarray(photo).convert("CMYK"), "JPEG")
    assert decode_image(data, "jpg").shape == (200, 301, 3)
    for end in (len(data) // 2, len(data) - 200):
        with pytest.raises(Damaged):
            decode_image(data[:end], "jpg")


def test_what_is_no_image(photo: np.ndarray):
    for extension in (*IMAGES, "npy"):
        for data in (b"", b"\xff\xd8", b"not an image at all" * 9, b"\x89PNG\r\n\x1a\n", bytes(100)):
            with pytest.raises(Damaged, match=r"\w"):
                decode_image(data, extension)
    with pytest.raises(Damaged, match=r"\.exe is not the extension of an image"):
        decode_image(saved(photo, "PNG"), "exe")
    for kind in ("EPS", "PPM", "PDF"):  # what Pillow would open, in part with other programs
        with pytest.raises(Damaged):
            decode_image(saved(photo, kind), "png")
    with pytest.raises(Damaged, match="float32 pixels, whose range of values is not known"):
        decode_image(saved(Image.fromarray(photo[..., 0].astype(np.float32)), "TIFF"), "tif")
    comments = PngImagePlugin.PngInfo()
    comments.add_text("bomb", "x" * 20_000_000, zip=True)  # a text of 20 MB in 20 kB
    with pytest.raises(Damaged):
        decode_image(saved(Image.fromarray(photo), "PNG", pnginfo=comments), "png")


@pytest.mark.parametrize(
    "place", ["decode.oriented", "decode.orientation", "pillow_images._convert", "pillow_images._check_png"]
)
def test_a_bug_of_ours_does_not_look_like_damage(place: str, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    def wrong(*_: object) -> None:
        raise TypeError("a mistake in our code")

    monkeypatch.setattr(f"data_pipeline.formats.{place}", wrong)
    with pytest.raises(TypeError, match="a mistake in our code"):
        inspect(saved(photo, "PNG"), "png")


@pytest.mark.parametrize(("shape", "says"), [((4, 4, 0), "holds uint8"), ((-4, -4, 3), "holds uint8")])
def test_sizes_of_an_array_that_cannot_be(shape: tuple[int, ...], says: str):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(48)
    with pytest.raises(Damaged, match=says):
        decode_image(data, "npy")


def test_a_tag_of_a_tiff_that_holds_no_number(photo: np.ndarray):
    data = bytearray(saved(photo, "TIFF", tiffinfo={274: 1}))
    place = data.index(struct.pack("<HH", 274, 3))
    data[place + 2] = 2  # the orientation's type becomes text
    with pytest.raises(Damaged, match="TIFF tag 274"):
        decode_image(bytes(data), "tiff", as_stored=True)
