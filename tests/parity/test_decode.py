"""Pixels equal Pillow's in every format; damage of any kind raises, and nothing large is decoded before its header has been looked at."""

from __future__ import annotations

import io
import math
import struct
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, PngImagePlugin

from data_pipeline.decode import IMAGES, MAX_PIXELS, Damaged, Encoded, decode_image


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
    """Grey, stored as RGB, progressive, CMYK and YCCK; writable memory of one's own each."""
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


def test_an_orientation_is_not_applied(photo: np.ndarray):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for kind, extension in (("JPEG", "jpg"), ("PNG", "png")):
        data = saved(photo, kind, exif=exif)
        assert Encoded(data, extension).shape == (200, 301) == decode_image(data, extension).shape[:2]


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
    for kind, extension, options in (("GIF", "gif", {}), ("TIFF", "tif", {}), ("WEBP", "webp", {"lossless": True})):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(decode_image(data, extension), np.array(frames[0])), kind


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
        with pytest.raises(Damaged, match=f"holds {held} channels, but 5 are asked for"):
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
            with pytest.raises(Damaged, match=f"holds {channels} channels, but {wrong} are asked for"):
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
    """64 zeros in nearly any place of a file of high quality. Where the codes fall into step again, nobody can tell: JPEG has no checksum."""
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
        (npy(photo.astype(np.float32)), r"holds float32 \[200, 301, 3\], but uint8 or uint16"),
        (npy(photo.astype(np.int16)), "holds int16"),
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


def test_pixel_bombs_are_refused_by_their_header(monkeypatch: pytest.MonkeyPatch, photo: np.ndarray):
    """Nothing is decoded, for any of the formats."""

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
            with pytest.raises(Damaged, match="100000001×1 pixels, but 1 to 100000000 are allowed"):
                _ = Encoded(data, "npy").shape


def test_what_is_no_image(photo: np.ndarray):
    for extension in (*IMAGES, "npy"):
        for data in (b"", b"\xff\xd8", b"not an image at all" * 9, b"\x89PNG\r\n\x1a\n", bytes(100)):
            with pytest.raises(Damaged, match=r"\w"):
                decode_image(data, extension)
    with pytest.raises(Damaged, match=r"\.exe is no image"):
        decode_image(saved(photo, "PNG"), "exe")
    for kind in ("EPS", "PPM", "PDF"):  # what Pillow would open, in part with other programs
        with pytest.raises(Damaged):
            decode_image(saved(photo, kind), "png")
    with pytest.raises(Damaged, match="floating-point"):
        decode_image(saved(Image.fromarray(photo[..., 0].astype(np.float32)), "TIFF"), "tif")
    comments = PngImagePlugin.PngInfo()
    comments.add_text("bomb", "x" * 20_000_000, zip=True)  # a text of 20 MB in 20 kB
    with pytest.raises(Damaged):
        decode_image(saved(Image.fromarray(photo), "PNG", pnginfo=comments), "png")
