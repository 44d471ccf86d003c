"""The statistics and thumbnails of `shards stats`, and splits that do not change when samples are added."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from common.errors import DataError
from data_pipeline.build import contact_sheet, stats
from data_pipeline.build.split import split
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.samples import Samples
from tests.data.building import quiet, samples_of
from tests.parity.test_decode import tiff
from tests.tars import jpeg, write_tar


def test_stats_and_sheet(tmp_path: Path):
    wide = io.BytesIO()
    Image.new("L", (300, 100), 90).save(wide, "PNG")
    images = [(f"{i:03d}.jpg", jpeg(i, 32 + i)) for i in range(30)]
    (tmp_path / "x").mkdir()
    write_tar(
        tmp_path / "x" / "a.tar",
        [*images, ("a.txt", b"only words"), ("b.png", wide.getvalue()), ("c.jpg", jpeg()[:999])],
    )
    found = stats.gather(tmp_path / "x")
    assert (found.samples, found.shards, found.members) == (33, 1, {"jpg": 31, "png": 1, "txt": 1})
    assert found.sizes.tolist() == [*(len(d) for _, d in images), 10, len(wide.getvalue()), 999]
    assert len(found.images) == 31 and (300, 100, "L") in found.images and [k for k, _ in found.damaged] == ["c"]
    said = "\n".join(stats.describe(found))
    assert "33 samples" in said and "32 images decoded, evenly spread over the set: 1 damaged" in said
    assert "modes: RGB 30, L 1" in said and "width: 32 to 300 pixels" in said and "█" in said
    assert len(stats.gather(tmp_path / "x", 5).images) == 5
    picture = Image.open(contact_sheet.sheet(tmp_path / "x", tmp_path / "new" / "sheet.png"))
    assert picture.size == (8 * 136 + 8, 5 * 164 + 8) and picture.getpixel((8 * 0 + 8 + 3, 8 + 3)) != (255, 255, 255)
    assert picture.getpixel((8 + 2, 8 + 4 * 164 + 126)) == (244, 190, 190)  # the damaged image is the last one
    with pytest.raises(DataError, match=r"write a name that ends in .png"):
        contact_sheet.sheet(tmp_path / "x", tmp_path / "sheet.tar")


def test_images_of_other_channels_are_not_damaged(tmp_path: Path):
    """A TIFF of four bands, and an array of two channels beside a text."""
    blue, two = np.zeros((8, 8, 4), np.uint8), io.BytesIO()
    blue[..., 2:] = 255
    np.save(two, np.full((8, 8, 2), 51, np.uint8))
    for name, ending, data, mean, color in (
        ("bands", "tif", tiff(blue, 2), "0.0000,0.0000,1.0000,1.0000", (0, 0, 255)),
        ("array", "npy", two.getvalue(), "0.2000,0.2000", (51, 51, 51)),
    ):
        write_tar(tmp_path / f"{name}.tar", [(f"0.{ending}", data), ("0.cls", b"0")])
        found = stats.gather(tmp_path / f"{name}.tar")
        assert not found.damaged and len(found.images) == 1
        assert f"data.mean=[{mean}] data.std=[{mean.replace('1', '0').replace('2', '0')}]" in "\n".join(
            stats.describe(found)
        )
        picture = Image.open(contact_sheet.sheet(tmp_path / f"{name}.tar", tmp_path / f"{name}.png"))
        assert picture.getpixel((8 + 64, 8 + 64)) == color


def test_captions_are_counted_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    members = [(f"{i}.{e}", data) for i in range(3) for e, data in (("jpg", jpeg(i)), ("txt", b"a red fox" * (i + 1)))]
    write_tar(tmp_path / "a.tar", [*members, ("3.txt", b"no caption")])
    assert "3 captions (.txt) of 9 to 27 characters, median 18" in stats.describe(stats.gather(tmp_path / "a.tar"))
    drawn = []
    monkeypatch.setattr(contact_sheet.Font, "draw", lambda font, page, place, lines: drawn.append(lines))
    picture = Image.open(contact_sheet.sheet(tmp_path / "a.tar", tmp_path / "sheet.png"))
    assert picture.size == (8 * 136 + 8, 164 + 3 * 14 + 8)
    assert ["2", "a red foxa red foxa", "red fox"] in drawn


@pytest.mark.parametrize("name", ["sheet.png", "sheet.jpg"])
def test_a_sheet_replaces_no_file_but_a_sheet(name: str, tmp_path: Path):
    (file := tmp_path / name).write_bytes(jpeg())
    page = Image.new("RGB", (8, 8), "red")
    with pytest.raises(DataError, match=f"{name}: exists already, and this command has not written it"):
        contact_sheet.save_sheet(page, file)
    assert file.read_bytes() == jpeg()
    Image.new("RGB", (8, 8)).save(tmp_path / "own.png")
    with pytest.raises(DataError, match="exists already"):
        contact_sheet.save_sheet(page, tmp_path / "own.png")
    for color in ("red", "blue"):
        contact_sheet.save_sheet(Image.new("RGB", (8, 8), color), tmp_path / "new.png")
    assert Image.open(tmp_path / "new.png").getpixel((0, 0)) == (0, 0, 255)


def test_glyphs_that_no_font_has_are_drawn_as_code_points(monkeypatch: pytest.MonkeyPatch):
    def drawn(text: str) -> bytes:
        page = Image.new("L", (120, 40), "white")
        contact_sheet.Font().draw(ImageDraw.Draw(page), (0, 0), ["plain", text])
        return page.tobytes()

    monkeypatch.setattr(contact_sheet, "FONTS", ())
    assert drawn("a日é") == drawn("a<65E5>é")
    assert drawn("é") != drawn("e")
    monkeypatch.setattr(contact_sheet, "FONTS", ("DejaVuSans.ttf",))
    if len(contact_sheet.Font().fonts) == 2:
        assert drawn("Жж") != drawn("<416><436>")


def test_the_summary_of_text_shards_mentions_no_images(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [(f"{i}.txt", b"words") for i in range(3)])
    samples = Samples([str(tmp_path / "a.tar")])
    assert stats.summarize(samples) == [f"{tmp_path / 'a.tar'}: 3 samples with 3 .txt; no class names"]


def test_split_by_key_is_stable(photos: Path, shards: Path, tmp_path: Path):
    quietly = {"workers": 1, "say": quiet}
    out = split(shards, tmp_path / "out", 0.25, 0.25, **quietly)
    sides = {side: {s["__key__"]: s for s in samples_of(tmp_path / "out" / side)} for side in ("train", "val", "test")}
    whole = {s["__key__"]: s for s in samples_of(shards)}
    assert sum(map(len, sides.values())) == len(whole) == sum(summary["samples"] for summary in out.values())
    for samples in sides.values():
        assert all(
            {k: v for k, v in whole[key].items() if k[:2] != "__"} == {k: v for k, v in s.items() if k[:2] != "__"}
            for key, s in samples.items()
        )
    assert load_manifest(str(tmp_path / "out" / "val")).classes == ["china", "flower"]
    more = tmp_path / "more"
    more.mkdir()
    write_tar(more / "0.tar", [(f"new{i}.jpg", jpeg(i)) for i in range(40)])
    (more / "1.tar").write_bytes((shards / "000000.tar").read_bytes())
    split(more, tmp_path / "larger", 0.25, 0.25, **quietly)
    for side, samples in sides.items():
        again = {s["__key__"] for s in samples_of(tmp_path / "larger" / side)}
        assert {key for key in again if not key.startswith("new")} == set(samples) and len(again) > len(samples)
    assert "nothing was done" in split(shards, tmp_path / "out", 0.25, 0.25, **quietly)["val"]["notes"][-1]
    wider = split(shards, tmp_path / "wider", 0.4, **quietly)
    assert set(sides["val"]) <= {s["__key__"] for s in samples_of(tmp_path / "wider" / "val")} and set(wider) == {
        "train",
        "val",
    }
    for val, test in ((0, 0.1), (0.6, 0.4), (-1, 0)):
        with pytest.raises(DataError, match="write shares of the samples"):
            split(shards, tmp_path / "x", val, test, **quietly)
    with pytest.raises(DataError, match="none of its keys is in this share of the hashes"):
        split(shards, tmp_path / "tiny", 0.0001, **quietly)


def test_samples_that_a_split_leaves_out_are_listed(tmp_path: Path):
    (tmp_path / "in").mkdir()
    for name in ("a.tar", "b.tar"):  # both number their samples from 0
        write_tar(
            tmp_path / "in" / name, [(f"{i:03d}.txt", f"{name} {i}".encode()) for i in range(9)] + [("../x.txt", b"y")]
        )
    out = split(tmp_path / "in", tmp_path / "out", 0.5, workers=1, say=quiet)
    reasons = [row["reason"] for summary in out.values() for row in summary["bad"]]
    assert sum(summary["samples"] for summary in out.values()) == 9 and len(reasons) == 11
    assert sum("another sample of the same shard has the key" in reason for reason in reasons) == 9
