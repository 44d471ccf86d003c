"""Shards from folders, what is read back, and what happens to damage: counted, named, left out, never trained on."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.decode import Damaged, decode_image
from data_pipeline.shards import Samples, build, scan
from data_pipeline.storage import DataError, find_shards
from data_pipeline.stream import Stream, to_device


def jpeg(value: int = 0, size: int = 64) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(value).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, "JPEG", quality=95)
    return out.getvalue()


def write_tar(path: Path, samples: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in samples:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_build_reads_back_the_same_as_webdataset_and_tar(photos: Path, shards: Path):
    meta = json.loads((shards / "meta.json").read_text())
    assert (meta["samples"], meta["classes"], meta["bad"], meta["shards"]) == (48, ["china", "flower"], [], 1)
    ours = Samples([str(shards)])
    theirs = list(webdataset.WebDataset(str(shards / "000000.tar"), shardshuffle=False))
    assert len(ours) == len(theirs) == 48
    for i, sample in enumerate(theirs):
        assert ours.name(i)[1] == sample["__key__"]
        assert ours.read(i, ("jpg", "cls")) == {"jpg": sample["jpg"], "cls": sample["cls"]}
        path = photos / json.loads(sample["json"])["path"]
        assert path.read_bytes() == sample["jpg"] and ours.label(i) == path.parent.name


def test_build_leaves_out_and_names_bad_files(tmp_path: Path, capsys):
    source = tmp_path / "images"
    source.mkdir()
    (source / "good.jpg").write_bytes(jpeg())
    (source / "half.jpg").write_bytes(jpeg()[:3000])
    (source / "text.png").write_text("no image")
    (source / "empty.webp").write_bytes(b"")
    damaged = bytearray(jpeg(1))
    damaged[2000:2064] = bytes(64)  # in the middle: most decoders make garbage of it without a word
    (source / "holes.jpg").write_bytes(damaged)
    (source / "notes.txt").write_text("not an image by its name")
    meta = build(source, tmp_path / "out")
    assert meta["samples"] == 1 and {bad["path"] for bad in meta["bad"]} == {
        "half.jpg",
        "text.png",
        "empty.webp",
        "holes.jpg",
    }
    assert all(bad["reason"] for bad in meta["bad"])


def test_build_refuses_what_it_cannot_do(tmp_path: Path):
    with pytest.raises(DataError, match="no such folder"):
        build(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file, not a folder"):
        build(tmp_path / "file", tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"holds no images; files that count end in jpg, jpeg, png"):
        build(empty, tmp_path / "out")
    (empty / "bad.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"none of its 1 images can be read; bad.jpg: "):
        build(empty, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial*"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(DataError, match="exists already"):
        build(empty, tmp_path / "full")


def test_find_shards_says_what_to_do(tmp_path: Path, photos: Path, shards: Path):
    with pytest.raises(DataError, match="no such file or folder"):
        find_shards([str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is an empty folder"):
        find_shards([str(tmp_path / "empty")])
    with pytest.raises(DataError, match="holds images but no shards; make them with `unlabeled shards build"):
        find_shards([str(photos)])
    with pytest.raises(DataError, match="matches no file"):
        find_shards([str(tmp_path / "*.tar")])
    with pytest.raises(DataError, match="shards only in sub-folders"):
        find_shards([str(shards.parent)])
    with pytest.raises(DataError, match="no way to open it"):
        find_shards(["nostore://bucket/x"])
    assert find_shards([str(shards), str(shards / "*.tar")]) == [str(shards / "000000.tar")]


def test_a_file_that_is_no_tar(tmp_path: Path, shards: Path):
    bad = tmp_path / "bad.tar"
    bad.write_bytes(b"this is not a tar file" * 100)
    with pytest.raises(DataError, match=r"bad.tar: is no whole tar file"):
        scan(str(bad))
    bad.write_bytes((shards / "000000.tar").read_bytes()[:20_000])
    with pytest.raises(DataError, match=r"bad.tar: is no whole tar file"):
        scan(str(bad))
    write_tar(bad, [("a.exe", b"x"), ("b.pkl", b"x")])
    with pytest.raises(DataError, match="no samples; the members that count end in"):
        Samples([str(bad)])


def test_samples_without_label_or_image(tmp_path: Path):
    write_tar(tmp_path / "x.tar", [("a/one.jpg", jpeg()), ("a/two.txt", b"words")])
    samples = Samples([str(tmp_path / "x.tar")])
    assert samples.image(0).shape == (64, 64, 3)
    with pytest.raises(DataError, match=r"a/one has no .cls member"):
        samples.label(0)
    with pytest.raises(Damaged, match="holds no image member"):
        samples.image(1)


def test_decoding(tmp_path: Path):
    gray = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    for name, image, expected in [
        ("png", Image.fromarray(gray), (gray >> 8).astype(np.uint8)[..., None].repeat(3, 2)),
        ("png", Image.new("RGBA", (4, 4), (255, 0, 0, 0)), np.full((4, 4, 3), 255)),
        ("png", Image.new("L", (4, 4), 7), np.full((4, 4, 3), 7)),
        ("bmp", Image.new("RGB", (4, 4), (1, 2, 3)), np.full((4, 4, 3), (1, 2, 3))),
        ("tiff", Image.new("RGB", (4, 4), (1, 2, 3)), np.full((4, 4, 3), (1, 2, 3))),
    ]:
        out = io.BytesIO()
        image.save(out, {"tiff": "TIFF", "bmp": "BMP"}.get(name, "PNG"))
        assert np.array_equal(decode_image(out.getvalue(), name), expected), name
    cmyk = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(cmyk, "JPEG")
    assert decode_image(cmyk.getvalue(), "jpg").shape == (8, 8, 3)
    huge = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(huge, "PNG")
    with pytest.raises(Damaged, match="12000×12000 pixels"):
        decode_image(huge.getvalue(), "png")


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Twelve samples, two of them damaged: one cut short, one with a hole."""
    hole = bytearray(jpeg(3))
    hole[2000:2064] = bytes(64)
    images = [jpeg(i) for i in range(12)]
    images[3], images[7] = images[7][:2000], bytes(hole)
    write_tar(tmp_path / "d.tar", [(f"{i:03d}.jpg", image) for i, image in enumerate(images)])
    return tmp_path / "d.tar"


def views(sample, rng):
    return {"image": sample["image"].transpose(2, 0, 1)}


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_samples_are_named_and_replaced_in_place(damaged: Path, workers: int):
    stream = Stream(Samples([str(damaged)]), views, batch=4, workers=workers)
    for step in range(6):
        planned = stream.order.slots(step, 0, 4)[0].tolist()
        assert next(stream)["id"].tolist() == [{3: 4, 7: 8}.get(i, i) for i in planned]  # the neighbour takes the slot
    assert {key for _, key in stream.bad} == {"003", "007"}
    assert sorted(key for _, key, _ in stream.new_bad()) == ["003", "007"] and stream.new_bad() == []


def test_nothing_but_damage_is_an_error(tmp_path: Path):
    write_tar(tmp_path / "x.tar", [(f"{i}.jpg", b"\xff\xd8junk") for i in range(4)])
    with pytest.raises(DataError, match="64 damaged samples in a row"):
        next(Stream(Samples([str(tmp_path / "x.tar")]), views, batch=2, workers=0))


def test_batches_are_the_same_for_any_number_of_processes_workers_and_micro_batches(shards: Path):
    samples = Samples([str(shards)])

    def crop(sample, rng):
        top = int(rng.integers(0, 32))
        return {"image": sample["image"][top : top + 32, :32].transpose(2, 0, 1), "slot": np.int64(sample["slot"])}

    whole = Stream(samples, crop, 12, seed=3, workers=0)
    batches = [next(whole) for _ in range(6)]
    for world, accumulate, workers in [(2, 1, 0), (3, 2, 0), (1, 3, 2), (4, 1, 1)]:
        streams = [
            Stream(samples, crop, 12, seed=3, workers=workers, rank=r, world=world, accumulate=accumulate)
            for r in range(world)
        ]
        for batch in batches:
            parts = [next(s) for s in streams for _ in range(accumulate)]
            for key in batch:
                assert np.array_equal(np.concatenate([p[key] for p in parts]), batch[key]), (world, accumulate, key)


def test_resume_is_one_number(shards: Path):
    samples = Samples([str(shards)])
    stream = Stream(samples, views, 8, workers=1, accumulate=2)
    for _ in range(6):
        next(stream)
    state = stream.state_dict()
    assert state == {"step": 3, "samples": 48, "seed": 0}
    expected = [next(stream)["id"].tolist() for _ in range(4)]
    again = Stream(samples, views, 8, workers=0, accumulate=2)
    again.load_state_dict(state)
    assert [next(again)["id"].tolist() for _ in range(4)] == expected
    with pytest.raises(DataError, match="written with samples = 48, but this run has samples = 12"):
        other = Stream(samples, views, 8)
        other.order = type(other.order)(12, 8)
        other.load_state_dict(state)


def test_batch_larger_than_the_data(shards: Path):
    with pytest.raises(DataError, match=r"data.batch = 64 is more than the 48 samples .*; write data.batch=48 or less"):
        Stream(Samples([str(shards)]), views, 64)
    with pytest.raises(DataError, match="does not divide into 2 processes × 3 micro-batches"):
        Stream(Samples([str(shards)]), views, 16, world=2, accumulate=3)


def test_uint8_is_normalised_on_the_device():
    import torch

    batch = to_device(
        {"image": torch.tensor([[[[0]], [[255]], [[51]]]], dtype=torch.uint8), "keep": torch.tensor([1])},
        torch.device("cpu"),
        [0.5, 0.5, 0],
        [0.5, 0.25, 1],
    )
    assert batch["image"].flatten().tolist() == pytest.approx([-1.0, 2.0, 0.2]) and batch["keep"].dtype == torch.int64
