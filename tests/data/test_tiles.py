"""Images that are cut into tiles: every number, place and label is that of the image, whose size memory does not limit."""

from __future__ import annotations

import hashlib
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import tifffile
from PIL import Image

from common.errors import DataError
from data_pipeline.build.build_shards import describe
from data_pipeline.build.sources.image_tiles import Tiles
from data_pipeline.build.sources.source import Options
from data_pipeline.build.sources.source_files import Tree
from data_pipeline.formats import row_reader
from data_pipeline.formats.pixel_maps import read_map
from data_pipeline.formats.pixels import stored_as
from data_pipeline.shards.samples import Samples
from tests.data.building import make, reasons

SIDE = 32


def scene(dtype: str, bands: int, height: int = 150, width: int = 110, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "u":
        return rng.integers(0, np.iinfo(dtype).max, (height, width, bands), dtype, endpoint=True)
    return (rng.standard_normal((height, width, bands)) * 1000).astype(dtype)


def write_tiff(path: Path, pixels: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colors = pixels.shape[-1] == 3 and "metadata" not in options and options.get("planarconfig") != "separate"
    if pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    elif not colors and "metadata" not in options:
        options = {"planarconfig": "contig", **options}
    tifffile.imwrite(path, pixels, **{"photometric": "rgb" if colors else "minisblack", **options})


def assert_tiles(shards: Path, images: dict[str, np.ndarray], side: int = SIDE) -> None:
    """The tiles of the shards are those of the images, each of them once."""
    samples, left = Samples([str(shards)]), set()
    for path, pixels in images.items():
        rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
        left |= {(path, x * side, y * side) for x in range(columns) for y in range(rows)}
    for n in range(len(samples)):
        about = json.loads(samples.read(n, ["json"])["json"])
        path, x, y = about["path"], about["left"], about["top"]
        left.remove((path, x, y))
        image = images[path]
        found = samples.image(n, image.shape[2], dtype=stored_as(image.dtype))
        assert np.array_equal(found, image[y : y + side, x : x + side]), (path, x, y)
        assert samples.name(n)[1].endswith(f"-{x}-{y}")
        if "/" in path:
            assert samples.label(n) == path.partition("/")[0]
    assert not left


def test_tiles_of_every_layout_are_those_of_the_image(tmp_path: Path):
    eight, deep, many = scene("uint8", 3), scene("uint16", 1), scene("uint16", 7)
    floats, signed = scene("float32", 4), scene("int16", 1)
    a, images = tmp_path / "in" / "a", dict[str, np.ndarray]()
    for name, pixels, options in [
        ("tiled.svs", eight, {"tile": (48, 64), "compression": "deflate"}),
        ("strips.tif", eight, {"rowsperstrip": 7, "compression": "lzw", "predictor": True}),
        ("one_strip.tiff", deep, {}),
        ("bands.tif", many, {"tile": (16, 32), "compression": "zlib"}),
        ("floats.tif", floats, {"rowsperstrip": 150}),
        ("signed.tif", signed, {"tile": (64, 64)}),
        ("big.btf", deep, {"bigtiff": True, "tile": (16, 16)}),
        ("swapped.tif", deep, {"byteorder": ">", "rowsperstrip": 33}),
    ]:
        write_tiff(a / name, pixels, **options)
        images[f"a/{name}"] = pixels
    write_tiff(a / "planes.tif", many.transpose(2, 0, 1), planarconfig="separate", tile=(32, 48))
    images["a/planes.tif"] = many
    three = scene("uint16", 3)
    write_tiff(a / "channels.tif", three.transpose(2, 0, 1), imagej=True, metadata={"axes": "CYX"})
    images["a/channels.tif"] = three
    write_tiff(a / "jpeg.svs", eight, tile=(48, 64), compression="jpeg")
    images["a/jpeg.svs"] = tifffile.imread(a / "jpeg.svs")
    write_tiff(a / "inverted.tif", deep, photometric="miniswhite")
    images["a/inverted.tif"] = 65535 - deep
    with tifffile.TiffWriter(a / "levels.tif") as writer:  # a pyramid, of which the largest level is read
        writer.write(eight, tile=(32, 32), photometric="rgb", subifds=1)
        writer.write(eight[::2, ::2], tile=(32, 32), photometric="rgb", subfiletype=1)
    images["a/levels.tif"] = eight
    with pytest.raises(DataError, match="holds 1 slides; --tile 256 cuts them into tiles"):
        make(a / "tiled.svs", tmp_path / "x")
    summary = make(a / "levels.tif", tmp_path / "second", tile=SIDE, tile_level=1)
    assert_tiles(tmp_path / "second", {"levels.tif": eight[::2, ::2]})
    assert json.loads(Samples([str(tmp_path / "second")]).read(0, ["json"])["json"])["level"] == 1
    with pytest.raises(DataError, match="has the levels 0 to 1, but level 2 is requested"):
        make(a / "levels.tif", tmp_path / "x", tile=SIDE, tile_level=2)
    (tmp_path / "in" / "b").mkdir()
    Image.fromarray(eight).save(tmp_path / "in" / "b" / "whole.png")
    images["b/whole.png"] = eight
    palette = Image.fromarray(eight).quantize(64)
    palette.save(tmp_path / "in" / "b" / "palette.tif")
    images["b/palette.tif"] = np.asarray(palette.convert("RGB"))
    summary = make(tmp_path / "in", tmp_path / "out", tile=SIDE, workers=2)
    assert summary["kind"] == "tiles" and summary["classes"] == ["a", "b"] and not summary["bad"]
    assert_tiles(tmp_path / "out", images)
    assert "cut into tiles of 32×32 pixels; what remains at its right and lower edge is left out" in "\n".join(
        describe(summary, "out")
    )
    make(tmp_path / "in", tmp_path / "one", 0.05, tile=SIDE)  # in small shards, by one process
    assert_tiles(tmp_path / "one", images)
    make(tmp_path / "in", tmp_path / "two", 0.05, tile=SIDE, workers=2)
    digests = [{f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in (tmp_path / side).glob("*.tar")} for side in ("one", "two")]  # fmt: skip
    assert digests[0] == digests[1] and len(digests[0]) > 5


def test_tiles_of_arrays(tmp_path: Path):
    images = {}
    for n, (dtype, bands) in enumerate([("uint16", 7), (">u2", 2), ("float32", 1), ("uint8", 3)]):
        path = tmp_path / "in" / f"{n}.npy"
        path.parent.mkdir(exist_ok=True)
        images[path.name] = scene(np.dtype(dtype).newbyteorder("=").name, bands, 70 + n, 65, n)
        np.save(path, images[path.name].astype(dtype))
    np.save(tmp_path / "in" / "columns.npy", np.asfortranarray(scene("uint8", 3)))
    (tmp_path / "in" / "cut.npy").write_bytes((tmp_path / "in" / "3.npy").read_bytes()[:-3000])
    summary = make(tmp_path / "in", tmp_path / "out", tile=SIDE)
    found = reasons(summary)
    assert "stored column by column" in found.pop("columns.npy")
    assert found == dict.fromkeys(["cut.npy at 0,32", "cut.npy at 32,32"], ".npy is cut off in the rows 32 to 63")
    samples = Samples([str(tmp_path / "out")])
    upper = [n for n in range(len(samples)) if json.loads(samples.read(n, ["json"])["json"])["path"] == "cut.npy"]
    assert len(upper) == 2 and np.array_equal(samples.image(upper[0]), images["3.npy"][:SIDE, :SIDE])
    (tmp_path / "in" / "cut.npy").unlink()
    make(tmp_path / "in", tmp_path / "whole", tile=SIDE)
    assert_tiles(tmp_path / "whole", images)


def test_masks_are_cut_with_their_image(tmp_path: Path):
    pixels, mask = scene("uint8", 3), np.arange(150 * 110).reshape(150, 110)
    depth = np.linspace(0.5, 9, 150 * 110, dtype=np.float32).reshape(150, 110)
    (tmp_path / "in").mkdir()
    for name in ("x", "y", "z"):
        write_tiff(tmp_path / "in" / f"{name}.tif", pixels)
    Image.fromarray((mask % 251).astype(np.uint8)).save(tmp_path / "in" / "x.mask.png")
    np.save(tmp_path / "in" / "x.depth.npy", depth)
    Image.fromarray((mask[:99] % 251).astype(np.uint8)).save(tmp_path / "in" / "y.mask.png")
    (tmp_path / "in" / "z.mask.png").write_bytes(b"no picture")
    summary = make(tmp_path / "in", tmp_path / "out", tile=SIDE)
    assert len(summary["bad"]) == 24
    assert reasons(summary)["z.tif at 0,0"].startswith("its .mask.png is not in one of the image formats")
    assert reasons(summary)["y.tif at 64,32"] == "its .mask.png has 110×99 pixels, but it has 110×150"
    samples = Samples([str(tmp_path / "out")])
    assert_tiles(tmp_path / "out", {"x.tif": pixels})
    for n in range(len(samples)):
        members = samples.read(n, ["json", "mask.png", "depth.npy"])
        about = json.loads(members["json"])
        part = np.s_[about["top"] : about["top"] + SIDE, about["left"] : about["left"] + SIDE]
        assert np.array_equal(read_map(members["mask.png"], "mask.png"), mask[part] % 251)
        assert np.array_equal(read_map(members["depth.npy"], "depth.npy"), depth[part])


def test_empty_tiles_and_jpegs(tmp_path: Path):
    pixels = np.full((96, 96, 3), (250, 240, 245), np.uint8)  # background
    pixels[32:64, 32:64] = scene("uint8", 3, 32, 32) // 16 + 100  # a deviation of 4.6 levels: 0.018
    write_tiff(tmp_path / "in" / "slide.tif", pixels)
    for limit, kept in ((0.0, 9), (0.001, 1), (0.017, 1)):
        assert make(tmp_path / "in", tmp_path / f"{limit}", tile=SIDE, tile_min_std=limit)["samples"] == kept
    with pytest.raises(DataError, match=r"holds no rows"):
        make(tmp_path / "in", tmp_path / "none", tile=SIDE, tile_min_std=0.02)
    summary = make(tmp_path / "in", tmp_path / "jpeg", tile=SIDE, tile_jpeg=90)
    assert summary["members"]["jpg"] == 9
    found = Samples([str(tmp_path / "jpeg")]).image(0).astype(int)
    assert np.abs(found - (250, 240, 245)).max() <= 3  # red is red


def test_what_cannot_be_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pixels = scene("uint8", 3)
    write_tiff(tmp_path / "in" / "good.tif", pixels)
    write_tiff(tmp_path / "in" / "small.tif", pixels[:31])
    write_tiff(tmp_path / "in" / "turned.tif", pixels, extratags=[(274, "H", 1, 6, True)])
    tifffile.imwrite(
        tmp_path / "in" / "times.tif", scene("uint8", 5).transpose(2, 0, 1), imagej=True, metadata={"axes": "TYX"}
    )
    whole = io.BytesIO()
    tifffile.imwrite(whole, pixels, rowsperstrip=10, photometric="rgb")
    (tmp_path / "in" / "cut.tif").write_bytes(whole.getvalue()[:-20000])
    (tmp_path / "in" / "text.svs").write_bytes(b"no slide at all" * 50)
    summary = make(tmp_path / "in", tmp_path / "out", tile=SIDE)
    found = reasons(summary)
    assert found.pop("small.tif") == "has 110×31 pixels, less than a tile of 32×32"
    assert found.pop("turned.tif") == "has the orientation 6; write --as-stored to read it as it is stored"
    assert "the axes TYX [5, 150, 110], but one image is read" in found.pop("times.tif")
    assert found.pop("text.svs")
    assert {name.partition(" at ")[0] for name in found} == {"cut.tif"} and len(found) < 12
    turned = make(tmp_path / "in", tmp_path / "stored", tile=SIDE, as_stored=True)
    assert "turned.tif" not in reasons(turned)
    with pytest.raises(DataError, match="has rows of 110 pixels and 3 channels, too many for 32 rows at a time"):
        make(tmp_path / "in", tmp_path / "narrow", tile=SIDE, max_pixels=2639)
    write_tiff(tmp_path / "in" / "strip.tif", pixels, rowsperstrip=150, compression="zlib")
    coarse = reasons(make(tmp_path / "in", tmp_path / "coarse", tile=SIDE, max_pixels=2640))
    assert coarse["strip.tif"].startswith(
        "is a TIFF with strips or tiles of 49500 numbers, but at most 10560 are decoded"
    )
    assert not any(name.startswith("good.tif") for name in coarse)  # without compression, rows are read
    (tmp_path / "in" / "strip.tif").unlink()
    with pytest.raises(DataError, match="--tile 8: write the side of a tile in pixels, at least 16"):
        make(tmp_path / "in", tmp_path / "x", tile=8)
    with pytest.raises(DataError, match="--tile-jpeg 101: write a quality from 1 to 100"):
        make(tmp_path / "in", tmp_path / "x", tile=SIDE, tile_jpeg=101)
    with pytest.raises(DataError, match="--tile-min-std -1: write a standard deviation"):
        make(tmp_path / "in", tmp_path / "x", tile=SIDE, tile_min_std=-1.0)
    with pytest.raises(DataError, match="--tile-jpeg is an option of --tile SIDE, which is not given"):
        make(tmp_path / "in", tmp_path / "x", tile_jpeg=90)
    with pytest.raises(DataError, match="--tile-level is an option of --tile SIDE, which is not given"):
        make(tmp_path / "in", tmp_path / "x", tile_level=1)
    with pytest.raises(DataError, match="--kind tiles needs --tile SIDE"):
        make(tmp_path / "in", tmp_path / "x", kind="tiles")
    with pytest.raises(
        DataError, match="--tile has no effect on a folder of videos, only on sources of the kinds tiles"
    ):
        make(tmp_path / "in", tmp_path / "x", kind="videos", tile=SIDE)
    monkeypatch.setattr(row_reader, "import_tifffile", lambda: None)
    assert "pip install 'unlabeled[tiff]'" in reasons(make(tmp_path / "in", tmp_path / "bare", tile=SIDE))["text.svs"]


def test_tiles_of_a_remote_slide(tmp_path: Path):
    pixels = scene("uint8", 3)
    out = io.BytesIO()
    tifffile.imwrite(out, pixels, tile=(64, 64), photometric="rgb")
    fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/in/slide.svs", out.getvalue())
    make(f"memory://{tmp_path.name}/in", tmp_path / "out", tile=SIDE)
    assert_tiles(tmp_path / "out", {"slide.svs": pixels})


@pytest.mark.parametrize("ending", ["tif", "plain.tif", "npy"])
def test_memory_is_that_of_a_row_of_tiles(tmp_path: Path, ending: str):
    """An image of 61 MB is cut with less than 8 MB."""
    pixels = np.arange(20_000 * 1024 * 3, dtype=np.uint32).astype(np.uint8).reshape(20_000, 1024, 3)
    path = tmp_path / f"long.{ending}"
    if ending == "npy":
        np.save(path, pixels)
    elif ending == "plain.tif":
        tifffile.imwrite(path, pixels, photometric="rgb", rowsperstrip=20_000)
    else:
        tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", compression="zlib")
    source = Tiles(Tree(str(path)), Options(tile=256), limit=1 << 30)
    source.begin()
    blocks = list(source.blocks({path.name: source.survey(path.name)}))
    tracemalloc.start()
    count = sum(
        1 for block in blocks for entry in source.entries(block.piece) if entry is not None and not entry.reason
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 78 * 4 and peak < 8e6
