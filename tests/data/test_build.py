"""Shards from folders of images, read back by webdataset and tarfile; kills, restarts, equal bytes for any number of processes, object stores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from data_pipeline import index
from data_pipeline.build import describe
from data_pipeline.shards import Samples
from data_pipeline.sources import Options, find_source
from data_pipeline.storage import DataError
from data_pipeline.workplace import BAD
from tests.data.building import make, quiet, reasons, samples_of
from tests.tars import jpeg


# ---------------------------------------------------------------- images
def test_build_reads_back_the_same_as_webdataset_and_tar(photos: Path, shards: Path):
    manifest = index.load(str(shards))
    assert (manifest.samples, manifest.classes, len(manifest.names)) == (48, ["china", "flower"], 1)
    assert manifest.about["build"]["samples"] == 48 and manifest.about["source"] == "images"
    ours, theirs = Samples([str(shards)]), samples_of(shards)
    assert len(ours) == len(theirs) == 48
    for i, sample in enumerate(theirs):
        assert ours.name(i)[1] == sample["__key__"]
        assert ours.read(i, ("jpg", "cls")) == {"jpg": sample["jpg"], "cls": sample["cls"]}
        path = photos / json.loads(sample["json"])["path"]
        assert path.read_bytes() == sample["jpg"] and ours.label(i) == path.parent.name


def test_build_leaves_out_and_names_bad_files(tmp_path: Path):
    source = tmp_path / "images"
    source.mkdir()
    (source / "good.jpg").write_bytes(jpeg())
    (source / "half.jpg").write_bytes(jpeg()[:3000])
    (source / "text.png").write_text("no image")
    (source / "empty.webp").write_bytes(b"")
    (source / "gone.jpg").symlink_to(source / "nowhere.jpg")
    damaged = bytearray(jpeg(1))
    damaged[2000:2064] = bytes(64)  # in the middle: most decoders make garbage of it without a word
    (source / "holes.jpg").write_bytes(damaged)
    (source / "notes.txt").write_text("not an image by its name")
    summary = make(source, tmp_path / "out")
    bad = {"half.jpg", "text.png", "empty.webp", "holes.jpg", "gone.jpg"}
    assert summary["samples"] == 1 and set(reasons(summary)) == bad and all(reasons(summary).values())
    listed = [json.loads(line) for line in (tmp_path / "out" / BAD).read_text().splitlines()]
    assert listed == summary["bad"] and summary["unread"] == {"txt": 1}
    said = "\n".join(describe(summary, "out"))
    assert "left out: gone.jpg: No such file or directory" in said and "not part of the source: 1 .txt" in said
    assert "out: 1 samples" in said and summary["sample_bytes"]["median"] == summary["bytes"]


def test_build_refuses_what_it_cannot_do(tmp_path: Path):
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
    with pytest.raises(DataError, match="--kind pictures: no such kind of source; known: image-text, images"):
        make(empty, tmp_path / "out", kind="pictures")
    with pytest.raises(DataError, match="--lines is not for a folder of images, but for the kinds text"):
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
def test_a_killed_build_goes_on(photos: Path, tmp_path: Path, workers: int):
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


def _tasks_of(source: Path, shard_mb: float) -> list[dict]:
    from data_pipeline.build import _tasks

    held = find_source("", str(source), Options(), int(shard_mb * 1e6))
    held.begin()
    return list(_tasks(held.blocks({}), int(shard_mb * 1e6)))


def test_a_changed_source_is_not_mixed_with_old_parts(photos: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(jpeg(i))
    stop = "data_pipeline.build.index.write"
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


def test_two_builds_at_once(tmp_path: Path, monkeypatch):
    import fcntl

    monkeypatch.setattr("data_pipeline.workplace.CLAIM_SECONDS", 0.1)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(jpeg())
    (tmp_path / "out.partial").mkdir()
    held = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process is building it"):
        make(tmp_path / "in", tmp_path / "out")
    os.close(held)
    assert make(tmp_path / "in", tmp_path / "out")["samples"] == 1


# ---------------------------------------------------------------- stores
def test_to_and_from_an_object_store(photos: Path, tmp_path: Path, monkeypatch):
    fs = fsspec.filesystem("memory")
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))
    target = f"memory://{tmp_path.name}/out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data_pipeline.build.index.write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        make(photos, target, 0.05)
    written = {f: fs.created(f) for f in fs.glob(f"/{tmp_path.name}/out/*.tar")}
    assert len(written) > 3 and not fs.exists(f"{target}/manifest.json")
    summary = make(photos, target, 0.05)
    assert {f: fs.created(f) for f in fs.glob(f"/{tmp_path.name}/out/*.tar")} == written
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
