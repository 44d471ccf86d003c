"""Shards from folders of images, read back by webdataset and tarfile; killed builds, the same bytes for any number of
processes, and object stores."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from data_pipeline.build import build_folder, stats
from data_pipeline.build.build_folder import BAD, BuildFolder, task_name
from data_pipeline.build.build_shards import describe
from data_pipeline.build.sources import Options, find_source
from data_pipeline.build.split import split
from data_pipeline.parts import image as parts
from data_pipeline.shards import index
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.samples import Samples
from tests.data.building import make, quiet, reasons, samples_of
from tests.tars import jpeg


# ---------------------------------------------------------------- images
def test_built_shards_are_read_by_webdataset_and_tarfile(photos: Path, shards: Path):
    manifest = load_manifest(str(shards))
    assert (manifest.samples, manifest.classes, len(manifest.names)) == (48, ["china", "flower"], 1)
    assert manifest.details["build"]["samples"] == 48 and manifest.details["source"] == "images"
    ours, theirs = Samples([str(shards)]), samples_of(shards)
    assert len(ours) == len(theirs) == 48
    for i, sample in enumerate(theirs):
        assert ours.name(i)[1] == sample["__key__"]
        assert ours.read(i, ("jpg", "cls")) == {"jpg": sample["jpg"], "cls": sample["cls"]}
        path = photos / json.loads(sample["json"])["path"]
        assert path.read_bytes() == sample["jpg"] and ours.label(i) == path.parent.name


def test_build_leaves_out_and_lists_unusable_files(tmp_path: Path):
    source = tmp_path / "images"
    source.mkdir()
    (source / "good.jpg").write_bytes(jpeg())
    (source / "half.jpg").write_bytes(jpeg()[:3000])
    (source / "text.png").write_text("no image")
    (source / "empty.webp").write_bytes(b"")
    (source / "gone.jpg").symlink_to(source / "nowhere.jpg")
    damaged = bytearray(jpeg(1))
    damaged[2000:2064] = bytes(64)  # in the middle: most decoders return garbage without an error
    (source / "holes.jpg").write_bytes(damaged)
    (source / "notes.txt").write_text("not an image by its name")
    summary = make(source, tmp_path / "out")
    bad = {"half.jpg", "text.png", "empty.webp", "holes.jpg", "gone.jpg"}
    assert summary["samples"] == 1 and set(reasons(summary)) == bad and all(reasons(summary).values())
    listed = [json.loads(line) for line in (tmp_path / "out" / BAD).read_text().splitlines()]
    assert listed == summary["bad"] and summary["unread"] == {"txt": 1}
    text = "\n".join(describe(summary, "out"))
    assert "left out: gone.jpg: No such file or directory" in text and "not part of the source: 1 .txt" in text
    assert "out: 1 samples" in text and summary["sample_bytes"]["median"] == summary["bytes"]


def test_invalid_sources_targets_and_options_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no such file or folder"):
        make(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"file: holds no source of shards \(its files have no extension"):
        make(tmp_path / "file", tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="is an empty folder"):
        make(empty, tmp_path / "out")
    (empty / "bad.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"none of its 1 samples can be used \(folder of images\); bad.jpg: "):
        make(empty, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial*"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(DataError, match="exists already"):
        make(empty, tmp_path / "full")
    with pytest.raises(
        DataError,
        match="--kind xyz: no such kind of source; known: arrays, audio, frame-folders, frames, image-text",
    ):
        make(empty, tmp_path / "out", kind="xyz")
    with pytest.raises(
        DataError, match="--lines has no effect on a folder of images, only on sources of the kinds text"
    ):
        make(empty, tmp_path / "out", lines=True)
    with pytest.raises(DataError, match=r"holds nothing for a folder of videos; it holds 1 .jpg"):
        make(empty, tmp_path / "out", kind="videos")
    with pytest.raises(DataError, match="lies inside the source"):
        make(empty, empty / "out")
    (empty / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="1 files for images and 1 files for text; write --kind images or --kind text"):
        make(empty, tmp_path / "out")
    with pytest.raises(DataError, match="--shard-mb 0"):
        make(empty, tmp_path / "out", 0)


def picture(array: np.ndarray, kind: str = "PNG", turn: int = 0) -> bytes:
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(array).save(out, kind, **({"exif": exif} if turn else {}))
    return out.getvalue()


def test_the_summary_of_a_build(tmp_path: Path):
    source = tmp_path / "in"
    deep = (np.arange(64 * 64, dtype=np.uint16) % 4096).reshape(64, 64)
    wide = np.zeros((8, 24, 3), np.uint8)
    files = {"a/x.jpg": jpeg(), "a/y.png": picture(deep), "b/z.jfif": picture(wide, "JPEG", 6), "b/notes.md": b"x"}
    for name, data in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    summary = make(source, tmp_path / "out", workers=2)
    text = "\n".join(describe(summary, "out"))
    assert summary["pixels"]["PNG, 16 bits, 1 channel"] == [1, 0, 4095] and summary["members"]["jpg"] == 2
    assert "images: 1 × PNG, 16 bits, 1 channel, values from 0 to 4095" in text
    assert "have values up to 4095 of 65535, so that a model sees 0.0625 of the range from 0 to 1; --bits 12" in text
    assert "images: 1 turned by EXIF, for example b/z.jfif" in text and "2 classes: a, b" in text
    assert "not part of the source: 1 .md (b/notes.md)" in text
    samples = Samples([str(tmp_path / "out")])
    assert samples.image(2).shape == (24, 8, 3) and samples.image(1, 1).max() == 16
    make(source, tmp_path / "scaled", bits=12, as_stored=True)  # the set says how it is read, wherever that is
    again = index.write(tmp_path / "scaled", quiet)
    assert (
        again.pixels == {"bits": 12, "as_stored": True} and "bits" not in load_manifest(str(tmp_path / "out")).details
    )
    samples = Samples([str(tmp_path / "scaled")])
    assert samples.image(2).shape == (8, 24, 3) and samples.image(1, 1).max() == 255
    look = samples.sample(1, {samples.extensions.index("png"): samples.read(1)["png"]}, {"image": parts.Image()})
    assert look["image"].pixels().max() == 255
    lines = stats.summarize(samples)
    assert "3 samples with 2 .jpg, 1 .png, 3 .cls, 3 .json; 2 classes: a, b" in lines[0]
    assert any("PNG, 16 bits, 1 channel, values from 0 to 4095" in line for line in lines) and "--bits" not in str(
        lines
    )
    split(tmp_path / "scaled", tmp_path / "sides", 0.4, workers=1, say=quiet)  # and so do copies of it
    assert all(load_manifest(str(tmp_path / "sides" / side)).pixels == again.pixels for side in ("train", "val"))
    with pytest.raises(DataError, match="--bits 20: write 8 to 16"):
        make(source, tmp_path / "x", bits=20)
    summary = make(source, tmp_path / "small", max_pixels=8 * 24)
    assert summary["samples"] == 1 and "1 to 192 are allowed" in reasons(summary)["a/y.png"]
    assert "max_pixels" not in load_manifest(str(tmp_path / "small")).details
    with pytest.raises(DataError, match="--max-pixels 0: write 1 to 1073741824"):
        make(source, tmp_path / "x", max_pixels=0)


@pytest.mark.parametrize("names", [["train", "val"], ["Train2017", "val2017", "test-set"], ["train"]])
def test_splits_are_not_labels(tmp_path: Path, names: list[str]):
    source = tmp_path / "in"
    for name in names:
        (source / name / "cat").mkdir(parents=True)
        (source / name / "cat" / "a.jpg").write_bytes(jpeg())
    with pytest.raises(DataError, match=f"{names[0]}.*: parts of a data set, not labels; build each") as error:
        make(source, tmp_path / "out")
    for name in names:  # the commands that it says are the ones that work
        assert f"`unlabeled shards build {source}/{name} DST/{name}`" in str(error.value)
        assert make(source / name, tmp_path / name)["classes"] == ["cat"]
    (source / "bus").mkdir()
    (source / "bus" / "b.jpg").write_bytes(jpeg())
    assert make(source, tmp_path / "vehicles")["classes"] == sorted(["bus", *names])  # a train can be a vehicle


# ---------------------------------------------------------------- processes, kills
def same_files(a: Path, b: Path) -> bool:
    names = {f.name for f in a.iterdir()}
    return names == {f.name for f in b.iterdir()} and all((a / n).read_bytes() == (b / n).read_bytes() for n in names)


@pytest.mark.slow
def test_the_same_bytes_for_any_number_of_processes(photos: Path, tmp_path: Path):
    one = make(photos, tmp_path / "one", 0.05)
    three = make(photos, tmp_path / "three", 0.05, workers=3)
    assert one == three and one["shards"] > 3 and same_files(tmp_path / "one", tmp_path / "three")
    assert max(f.stat().st_size for f in (tmp_path / "one").glob("*.tar")) <= 50_000
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(500)))
    for workers in (1, 3):
        make(tmp_path / "t", tmp_path / f"t{workers}", 0.1, workers=workers)
    assert same_files(tmp_path / "t1", tmp_path / "t3") and len(samples_of(tmp_path / "t1")) == 500


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_is_resumed(photos: Path, tmp_path: Path, workers: int):
    source = tmp_path / "in"
    source.mkdir()
    for path in photos.rglob("*.jpg"):
        for i in range(40):
            (source / f"{path.parent.name}{path.stem}{i}.jpg").write_bytes(path.read_bytes())
    target, state = tmp_path / "out", tmp_path / "out.partial"
    command = [
        sys.executable,
        "-m",
        "launch.cli",
        "shards",
        "build",
        source,
        target,
        "--shard-mb",
        "0.15",
        "--workers",
        workers,
    ]
    running = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)
    while len(list(state.glob("0*.json"))) < 4:
        assert running.poll() is None
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not target.exists()
    done = {
        f.name: f.stat().st_mtime_ns for f in (state / "shards").glob("*.tar") if (state / f"{f.stem}.json").exists()
    }
    total = len(list(_tasks_of(source, 0.15)))
    assert 4 <= len(done) < total
    with pytest.raises(
        DataError, match=r"out.partial: holds the parts of another build \(shard_mb was 0.15, now it is 1\)"
    ):
        make(source, target, 1)
    again = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and f"{target}: 1920 samples" in again.stdout, again.stderr
    assert not state.exists() and {n: (target / n).stat().st_mtime_ns for n in done} == done
    make(source, tmp_path / "straight", 0.15)
    assert all((target / f.name).read_bytes() == f.read_bytes() for f in (tmp_path / "straight").glob("*.tar"))
    assert index.verify(target, quiet) == [] and len(samples_of(target)) == 1920


def test_damaged_state_of_a_stopped_build_is_replaced_or_an_error(tmp_path: Path):
    place = BuildFolder(str(tmp_path / "out"))
    assert place.claim({"source": "a"}) is None
    for number, text in enumerate(('{"samples": 1}', "{", "[1]", "[" * 100_000, "\udcff")):
        (tmp_path / "out.partial" / f"{task_name(number)}.json").write_bytes(text.encode(errors="surrogateescape"))
        (tmp_path / "out.partial" / "shards" / f"{task_name(number)}.tar").write_bytes(b"")
    assert place.done() == {0: {"samples": 1}}
    for plan in ("{", "[]", "{}", "[" * 100_000, '{"about": 1, "plan": 1}'):
        (tmp_path / "out.partial" / "plan.json").write_text(plan)
        with pytest.raises(DataError, match=r"out.partial/plan.json: is not a valid plan \(.*; delete"):
            place._read_plan()


def _tasks_of(source: Path, shard_mb: float) -> list[dict]:
    from data_pipeline.build.build_shards import _tasks

    held = find_source("", str(source), Options(), int(shard_mb * 1e6))
    held.begin()
    return list(_tasks(held.blocks({}), int(shard_mb * 1e6)))


def test_a_changed_source_is_not_mixed_with_old_parts(photos: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(jpeg(i))
    stop = "data_pipeline.build.build_shards.index.write"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stop, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        make(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "4.jpg").write_bytes(jpeg(4))
    with pytest.raises(DataError, match="the files of the source have changed since"):
        make(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "4.jpg").unlink()
    first = make(tmp_path / "in", tmp_path / "out")
    assert first["samples"] == 4
    second = make(tmp_path / "in", tmp_path / "out")  # the same command once more: it is all there
    assert "nothing was done" in second["notes"][0] and {**second, "notes": []} == first
    with pytest.raises(DataError, match="exists already"):
        make(tmp_path / "in", tmp_path / "out", 1)


def test_a_build_that_an_older_version_finished_is_recognised(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(jpeg())
    (tmp_path / "in" / "b.jpg").write_bytes(b"nothing")
    now = make(tmp_path / "in", tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    options = ("labels", "image_field", "text_field", "label_field", "lines", "low", "high")  # that it knew
    before = {key: manifest["build"]["from"][key] for key in ("kind", "source", "shard_mb", *options, "files")}
    told = ("kind", "samples", "bytes", "sample_bytes", "shards", "members", "dropped", "unread", "notes", "bad")
    manifest["build"] = {**{key: manifest["build"][key] for key in told}, "from": {"format": 1, **before}}
    path.write_text(json.dumps(manifest))
    again = make(tmp_path / "in", tmp_path / "out")
    assert "nothing was done" in again["notes"][0] and again["bad"] == now["bad"]
    assert "out: 1 samples" in "\n".join(describe(again, "out")) and json.loads(path.read_text()) == manifest
    with pytest.raises(DataError, match="exists already"):  # and an option that differs is another build
        make(tmp_path / "in", tmp_path / "out", as_stored=True)


def test_two_builds_at_once(tmp_path: Path, monkeypatch):
    import fcntl

    monkeypatch.setattr("data_pipeline.build.build_folder.CLAIM_SECONDS", 0.1)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(jpeg())
    (tmp_path / "out.partial").mkdir()
    held = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process is building it"):
        make(tmp_path / "in", tmp_path / "out")
    os.close(held)
    assert make(tmp_path / "in", tmp_path / "out")["samples"] == 1


def test_other_files_in_the_folders_of_a_build_are_not_deleted(photos: Path, tmp_path: Path, monkeypatch):
    """DST.partial is recognised by its plan. Files that the build did not write are not deleted, even if they end in
    .partial."""
    target, state = tmp_path / "out", tmp_path / "out.partial"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "data_pipeline.build.build_shards.index.write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt())
        )
        make(photos, target, 0.05)
    mine = {"notes.txt": state, "film.mkv.partial": state, "film.tar.partial": state / "shards"}
    for name, folder in mine.items():
        (folder / name).write_text("mine")
    for name in ("plan.json.7-8.partial", "000000.json.7-8.partial", "shards/000001.tar.7.partial"):
        (state / name).write_text("of a process that was killed")
    (state / "²²²²²².json").write_text("no part")  # `isdigit` takes it for a number
    tar = state / "shards" / "²²²²²².tar"
    tar.write_text("no shard")
    assert len(build_folder.BuildFolder(str(target)).done()) == 7
    tar.unlink()
    assert make(photos, target, 0.05)["samples"] == 48
    assert sorted(path.name for path in state.iterdir()) == ["film.mkv.partial", "notes.txt", "²²²²²².json"]
    left = {path.name for path in target.iterdir()}
    assert "film.tar.partial" in left and "000001.tar.7.partial" not in left

    other = tmp_path / "other.partial"  # which no build has made
    other.mkdir()
    (other / "film.mkv.partial").write_text("mine")
    with pytest.raises(DataError, match="holds other files; delete or rename it"):
        make(photos, tmp_path / "other")
    assert (other / "film.mkv.partial").read_text() == "mine"


def test_indexing_deletes_only_its_older_index(photos: Path, tmp_path: Path):
    make(photos, tmp_path / "out", 0.05)
    (tmp_path / "out" / "index-faiss.bin").write_text("mine")
    (own,) = (path for path in (tmp_path / "out").glob("index-*.bin") if path.name != "index-faiss.bin")
    next((tmp_path / "out").glob("*.tar")).unlink()
    index.write(tmp_path / "out", quiet)
    assert not own.exists() and (tmp_path / "out" / "index-faiss.bin").read_text() == "mine"


# ---------------------------------------------------------------- stores
def test_to_and_from_an_object_store(photos: Path, tmp_path: Path, monkeypatch):
    fs = fsspec.filesystem("memory")
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))
    target = f"memory://{tmp_path.name}/out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "data_pipeline.build.build_shards.index.write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt())
        )
        make(photos, target, 0.05)
    written = {f: fs.created(f) for f in fs.glob(f"/{tmp_path.name}/out/*.tar")}
    assert len(written) > 3 and not fs.exists(f"{target}/manifest.json")
    fs.pipe_file(f"{target}/build/notes.txt", b"mine")
    summary = make(photos, target, 0.05)
    assert {f: fs.created(f) for f in fs.glob(f"/{tmp_path.name}/out/*.tar")} == written
    assert fs.cat_file(f"{target}/build/notes.txt") == b"mine"
    fs.rm_file(f"{target}/build/notes.txt")
    names = {f.rpartition("/")[2] for f in fs.find(f"/{tmp_path.name}/out")}
    assert {"manifest.json", BAD} < names and "plan.json" not in names and summary["samples"] == 48
    make(photos, tmp_path / "local", 0.05)
    for tar in (tmp_path / "local").glob("*.tar"):
        assert fs.cat_file(f"{target}/{tar.name}") == tar.read_bytes()
    with pytest.raises(DataError, match="exists already"):
        make(photos, target, 1)
    assert make(target, tmp_path / "back")["samples"] == 48
    assert [s["jpg"] for s in samples_of(tmp_path / "back")] == [s["jpg"] for s in samples_of(tmp_path / "local")]
    fs.pipe_file(f"/{tmp_path.name}/in/x/a.jpg", jpeg())
    assert make(f"memory://{tmp_path.name}/in", tmp_path / "images")["classes"] == ["x"]


def test_a_store_that_cannot_be_reached(photos: Path, tmp_path: Path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no credentials\nanywhere")

    store = type(fsspec.filesystem("memory"))
    for name, source, target in (("isdir", "memory://x", tmp_path / "out"), ("put_file", photos, "memory://no/out")):
        with monkeypatch.context() as patch, pytest.raises(DataError) as error:
            patch.setattr(store, name, fail)
            make(source, target)
        assert "cannot be reached (RuntimeError: no credentials anywhere)" in str(error.value)
