"""Features are extracted once, by any number of processes that may be killed, and are read in bounded memory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import Damaged, DataError
from data_pipeline.build.build_shards import build
from eval import feature_cache, feature_files, feature_rows, knn, linear
from eval.feature_cache import Labelled
from eval.feature_rows import FeatureRows
from eval.features import Encoder, open_encoder
from eval.run import evaluate
from pretrain.interchange import export
from pretrain.models import families
from pretrain.models.build import build_model
from pretrain.models.layers import Features
from tests.forked import Forked
from tests.tars import jpeg, write_tar

PIECE = 8  # samples, in these tests


class Recorder:
    """Mean and spread of an image's colours as its features. Appends the number of images of each call to a file."""

    def __init__(self, log: Path, die_at: int = 0, seconds: float = 0.0):
        self.log, self.die_at, self.seconds = log, die_at, seconds

    def __call__(self, images: torch.Tensor) -> Features:
        with self.log.open("a") as file:
            file.write(f"{len(images)}\n")
        if len(self.log.read_text().split()) == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        vector = torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)  # [B, 6]
        return Features(vector, vector[:, None], vector[:, None, :0], (1, 1))


def extract(
    data: str, folder: Path, log: Path, die_at: int = 0, seconds: float = 0.0, wait_for: Path | None = None
) -> Labelled:
    """Extract features with small batches and pieces. `wait_for`: begin when this file exists, after writing
    log.ready."""
    feature_cache.PIECE = PIECE
    while wait_for is not None and not wait_for.exists():
        log.with_suffix(".ready").touch()
        time.sleep(0.02)
    encoder = Encoder(Recorder(log, die_at, seconds), "recorder", 16, [0.5] * 3, [0.5] * 3)
    encoder.batch, encoder.cache = 4, folder
    return encoder.labelled([data])


def process(*args: Any) -> Forked:
    """A process that extracts."""
    return Forked(extract_only, *args)


def extract_only(*args: Any) -> None:
    extract(*args)


@pytest.fixture
def data(images: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(feature_cache, "PIECE", PIECE)
    return str(images)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 samples in two shards: 33 images of three classes, two of which are damaged, and three samples without an
    image. All tests share them, because their index takes seconds."""
    folder = tmp_path_factory.mktemp("data")
    for shard in range(2):
        members = []
        for n in range(18):
            label = (f"{n:02d}.cls", b"abc"[n % 3 :][:1])
            image = jpeg(18 * shard + n, 24)
            missing = n == 5 or (shard and n == 9)
            members += [label] if missing else [(f"{n:02d}.jpg", image[: 200 if n == 7 else None]), label]
        write_tar(folder / f"{shard}.tar", members)
    return folder


def test_the_pixels_of_images_of_other_channels(tmp_path: Path):
    """The baseline takes the channels that the images have."""
    images, members = [np.random.default_rng(n).integers(0, 256, (40, 32, 7), dtype=np.uint8) for n in range(3)], []
    for n, image in enumerate(images):
        file = io.BytesIO()
        np.save(file, image)
        members += [(f"{n}.npy", file.getvalue()), (f"{n}.cls", b"a")]
    write_tar(tmp_path / "a.tar", [("broken.npy", b"?"), ("broken.cls", b"a"), *members])
    encoder, _ = open_encoder("pixels", device="cpu")
    encoder.cache = tmp_path / "features"
    found = encoder.labelled([str(tmp_path / "a.tar")])
    assert (len(found), found.left_out) == (3, 1)
    expected = (images[1][4:36].transpose(2, 0, 1).reshape(-1) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(found.features[1:2][0].numpy(), expected, atol=1e-5)


def test_each_feature_is_that_of_its_image_and_is_extracted_once(data: str, tmp_path: Path):
    found = extract(data, tmp_path / "cache", tmp_path / "log")
    assert (len(found), found.left_out, found.passed_over, found.unlabelled) == (31, 2, 3, 0)
    assert sum(map(int, (tmp_path / "log").read_text().split())) == 31
    encoder = Encoder(Recorder(tmp_path / "other"), "x", 16, [0.5] * 3, [0.5] * 3)
    samples = encoder.check([data])
    kept = [n for n in range(36) if n % 18 not in (5, 7) and n != 27]
    expected = torch.cat([encoder.pooled([encoder.read(samples, n)]) for n in kept])
    torch.testing.assert_close(found.features[:], expected)
    assert [found.names[c] for c in found.classes] == ["abc"[n % 18 % 3] for n in kept]
    chosen = torch.tensor([30, 0, 7, 7])
    assert torch.equal(found.features[chosen], found.features[:][chosen])
    assert torch.equal(found.features[6:9], found.features[:][6:9])

    again = extract(data, tmp_path / "cache", tmp_path / "log")  # another encoder, as in another process
    assert torch.equal(again.features[:], found.features[:]) and torch.equal(again.classes, found.classes)
    assert (again.left_out, again.passed_over) == (2, 3)
    assert sum(map(int, (tmp_path / "log").read_text().split())) == 31  # nothing was encoded again


def test_a_killed_extraction_continues(data: str, tmp_path: Path):
    assert process(data, tmp_path / "cache", tmp_path / "log", 6).wait(60) == -signal.SIGKILL
    (target,) = (tmp_path / "cache").iterdir()
    finished = sorted(path.name for path in target.glob("*.json"))
    assert finished == ["0.json", "1.json"]
    with (target / "features.npy").open("r+b") as file:  # a part of the next piece, half of which was written
        file.seek(-16 - 20 * 24 + 12, os.SEEK_END)  # before the id
        file.write(b"\xff" * 12)
    for piece in (1, 2):
        (target / f".{piece}.json.77.partial").write_text('{"numbers": [')
    found = extract(data, tmp_path / "cache", tmp_path / "log2")
    whole = extract(data, tmp_path / "cache2", tmp_path / "log3")
    assert torch.equal(found.features[:], whole.features[:]) and torch.equal(found.classes, whole.classes)
    assert [path.name for path in target.glob(".*.partial")] == [".1.json.77.partial"]
    first = sum(len(json.loads((target / name).read_text())["numbers"]) for name in finished)
    assert sum(map(int, (tmp_path / "log2").read_text().split())) == 31 - first


def test_processes_share_the_pieces_of_a_set(data: str, tmp_path: Path):
    logs = [tmp_path / f"log{n}" for n in range(2)]
    open_encoder("pixels")[0].check([data])  # stores the index of the shards
    started = [process(data, tmp_path / "cache", log, 0, 0.1, tmp_path / "go") for log in logs]
    while not all(log.with_suffix(".ready").exists() for log in logs):
        time.sleep(0.02)
    (tmp_path / "go").touch()
    assert [one.wait(60) for one in started] == [0, 0]
    encoded = [sum(map(int, log.read_text().split())) for log in logs]
    assert sum(encoded) == 31 and min(encoded) > 0, encoded
    found = extract(data, tmp_path / "cache", tmp_path / "log")
    assert not (tmp_path / "log").exists()
    assert torch.equal(found.features[:], extract(data, tmp_path / "alone", tmp_path / "log").features[:])


@pytest.mark.slow
def test_what_determines_the_features_is_in_the_key(data: str, tmp_path: Path, shards: Path):
    cfg = families.ViT(image_size=16, patch_size=8, dim=16, depth=1, heads=2)
    cfg.name = "vit"
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        about = {"step": 1, "objective": "mae", "pool": "cls"}
        export.write(tmp_path / f"model{seed}", build_model(cfg), about, [0.5] * 3, [0.25] * 3)
        models.append(str(tmp_path / f"model{seed}"))
    shutil.copytree(models[0], tmp_path / "copy")

    def key(model: str, size: int = 16, data: str = data, **changes: str) -> str:
        encoder, _ = open_encoder(model, size)
        for name, value in changes.items():
            setattr(encoder, name, value)
        encoder.cache = tmp_path / "keys"
        before = set(encoder.cache.iterdir()) if encoder.cache.is_dir() else set()
        encoder.labelled([data])
        return next((path.name for path in set(encoder.cache.iterdir()) - before), "known")

    assert key(models[0]) != "known" and key(str(tmp_path / "copy")) == "known"
    assert "known" not in (
        key(models[1]),
        key(models[0], 32),
        key(models[0], pool="mean"),
        key(models[0], 16, str(shards)),
    )
    moved = shutil.copytree(data, tmp_path / "moved")
    assert key(models[0], data=str(moved)) == "known"


def test_rows_of_a_lost_file_are_extracted_again(data: str, tmp_path: Path):
    first = extract(data, tmp_path / "cache", tmp_path / "log").features[:].clone()
    (target,) = (tmp_path / "cache").iterdir()
    (target / "features.npy").unlink()  # by a cleaner of old files; the records are still there
    (target / "4.json").unlink()
    assert torch.equal(extract(data, tmp_path / "cache", tmp_path / "log").features[:], first)

    replaced = Recorder(tmp_path / "log2")
    plain, deleted = feature_cache.write_whole, []

    def delete_before_the_record(path: Path, content: bytes) -> None:
        if not deleted:
            deleted.append(path)
            (path.parent / "features.npy").unlink()
        plain(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_cache, "write_whole", delete_before_the_record)
        encoder = Encoder(replaced, "recorder", 16, [0.5] * 3, [0.5] * 3)
        encoder.cache = tmp_path / "other"
        assert torch.equal(encoder.labelled([data]).features[:], first) and deleted


def test_samples_that_could_not_be_read_once_are_read_again(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read = Encoder.read

    def failing(self: Encoder, samples: Any, number: int) -> np.ndarray:
        if number == 20:
            raise Damaged("an error of the storage")
        return read(self, samples, number)

    monkeypatch.setattr(Encoder, "read", failing)
    found = extract(data, tmp_path / "cache", tmp_path / "log")
    assert (len(found), found.left_out) == (30, 3)
    monkeypatch.setattr(Encoder, "read", read)
    again = extract(data, tmp_path / "cache", tmp_path / "log2")
    assert (len(again), again.left_out) == (31, 2)
    assert sum(map(int, (tmp_path / "log2").read_text().split())) == 7  # of one piece
    assert torch.equal(again.features[:], extract(data, tmp_path / "whole", tmp_path / "log3").features[:])


@pytest.fixture
def sets(tmp_path: Path) -> list[Path]:
    """Four sets of 40 kB, the oldest one last."""
    sets = [tmp_path / "sets" / f"{n:032x}" for n in range(4)]
    for age, folder in enumerate(sets):
        folder.mkdir(parents=True)
        (folder / "features.npy").write_bytes(b"x" * 40_000)
        (folder / ".lock").touch()
        if age == 3:
            (folder / "mine.txt").write_text("a file of the user")
        os.utime(folder, (1000 - age, 1000 - age))
    (tmp_path / "sets" / "mine").mkdir()
    return sets


def test_unused_sets_are_deleted_when_the_cache_is_full(sets: list[Path]):
    own = sets[0]
    holder = Forked(use_set, sets[3], own.parent / "ready")
    while not (own.parent / "ready").exists():
        time.sleep(0.02)
    os.utime(sets[3], (900, 900))
    feature_files.make_room(own, 40_000, 0, 161_000)
    assert all((folder / "features.npy").exists() for folder in sets)
    feature_files.make_room(own, 80_000, 0, 161_000)  # the new set counts
    assert (sets[3] / "features.npy").exists() and not sets[2].exists()  # the oldest one is being used
    holder.kill()
    holder.wait(10)
    feature_files.make_room(own, 40_000, 0, 81_000)
    assert [path.name for path in sets[3].iterdir()] == ["mine.txt"]
    assert all((folder / "features.npy").exists() for folder in sets[:2]) and (own.parent / "mine").exists()


def use_set(folder: Path, ready: Path) -> None:
    use = feature_files.Use(folder)
    ready.touch()
    time.sleep(60)
    del use


def test_unused_sets_are_deleted_before_the_disk_is_full(sets: list[Path], monkeypatch: pytest.MonkeyPatch):
    def usage(path: Path) -> Any:
        used = sum(file.stat().st_size for file in sets[0].parent.glob("*/features.npy"))
        return shutil._ntuple_diskusage(1_000_000, 760_000 + used, 240_000 - used)

    monkeypatch.setattr(feature_files.shutil, "disk_usage", usage)  # 80,000 bytes are free; the reserve is 50,000
    feature_files.make_room(sets[0], 70_000, 30_000, 1_000_000)
    assert all(folder.exists() for folder in sets)
    feature_files.make_room(sets[0], 80_000, 40_000, 1_000_000)
    assert [(folder / "features.npy").exists() for folder in sets] == [True, True, True, False]
    feature_files.make_room(sets[0], 200_000, 0, 1_000_000)  # all sets may take 250,000 bytes, a quarter of the disk
    assert [(folder / "features.npy").exists() for folder in sets] == [True, True, False, False]


def test_a_file_system_without_locks(sets: list[Path], monkeypatch: pytest.MonkeyPatch):
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(feature_files.fcntl, "flock", fail)
    use = feature_files.Use(sets[3])
    os.utime(sets[2])
    assert not feature_files.delete_set(sets[2]) and feature_files.delete_set(sets[1])  # by the time of their last use
    del use


def test_a_set_is_not_deleted_while_it_is_used(data: str, tmp_path: Path):
    found = extract(data, tmp_path / "cache", tmp_path / "log")
    assert not feature_files.delete_set(found.folder) and (found.folder / "features.npy").exists()
    sets = {(data,): found}
    feature_cache.delete(sets)
    assert not sets
    assert not found.folder.exists()
    assert not feature_files.delete_set(found.folder)  # another process has deleted it


def test_a_set_can_be_opened_while_it_is_deleted(tmp_path: Path):
    folder = tmp_path / f"{7:032x}"
    folder.mkdir()
    deleter = os.open(folder / ".use", os.O_RDWR | os.O_CREAT)
    fcntl.flock(deleter, fcntl.LOCK_EX)
    inode, uses = os.fstat(deleter).st_ino, []
    thread = threading.Thread(target=lambda: uses.append(feature_files.Use(folder)))
    thread.start()
    while sum(is_inode(int(file), inode) for file in os.listdir("/proc/self/fd")) < 2:  # it waits for the lock
        time.sleep(0.01)
    (folder / ".use").unlink()
    folder.rmdir()
    os.close(deleter)
    thread.join(60)
    assert not feature_files.delete_set(folder)
    uses.clear()
    assert feature_files.delete_set(folder) and not folder.exists()


def is_inode(file: int, inode: int) -> bool:
    with contextlib.suppress(OSError):  # closed since
        return os.fstat(file).st_ino == inode
    return False


def test_a_complete_set_may_be_read_only(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    extract(data, tmp_path / "cache", tmp_path / "log")
    plain = os.open

    def refuse(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    def only_read(path: Any, flags: int, *args: Any) -> int:
        return refuse() if flags & os.O_ACCMODE else plain(path, flags, *args)

    monkeypatch.setattr(os, "utime", refuse)  # the tests may run as root, who may write everywhere
    monkeypatch.setattr(feature_files.os, "open", only_read)
    assert len(extract(data, tmp_path / "cache", tmp_path / "log")) == 31


def extract_to_full_disk(data: str, folder: Path, said: Path) -> None:
    """With a limit for the size of a file, which has the effect of a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))  # bytes; the file of features has 1,008
    try:
        extract(data, folder, said.with_suffix(".log"))
    except DataError as error:
        said.write_text(str(error))


def test_errors(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    open_encoder("pixels")[0].check([data])  # stores the index of the shards
    assert Forked(extract_to_full_disk, data, tmp_path / "full", tmp_path / "said").wait(60) == 0
    assert "features cannot be kept there (File too large); delete that folder, or set UNLABELED_CACHE=FOLDER" in (
        (tmp_path / "said").read_text()
    )
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"features cannot be kept there \(Not a directory\)"):
        extract(data, tmp_path / "file", tmp_path / "log")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(DataError, match=r"the features need 0\.0 GB, but 0\.0 GB are free there"):
        extract(data, tmp_path / "small", tmp_path / "log")
    monkeypatch.undo()
    found = extract(data, tmp_path / "cache", tmp_path / "log")
    assert len(found) == 31
    (target,) = (tmp_path / "cache").iterdir()
    (target / "1.json").write_text("{")
    with pytest.raises(DataError, match=r"features cannot be kept there \(Expecting property name"):
        extract(data, tmp_path / "cache", tmp_path / "log")


def test_a_null_label_is_no_class(tmp_path: Path):
    rows = [{"text": f"{word} {n}", "label": label} for n in range(6) for word, label in (("sea", "s"), ("wind", "w"))]
    rows[3]["label"] = rows[7]["label"] = None
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build(tmp_path / "rows.jsonl", tmp_path / "shards")
    found = open_encoder("bytes")[0].labelled([str(tmp_path / "shards")])
    assert (found.names, len(found), found.unlabelled, found.left_out) == (["s", "w"], 10, 2, 0)
    scores = evaluate("bytes", ["knn"], [str(tmp_path / "shards")], [str(tmp_path / "shards")])
    assert scores[0]["unlabelled"] == 4 and scores[0]["count"] == 10
    (tmp_path / "null.jsonl").write_text("\n".join(json.dumps(row | {"label": None}) for row in rows))
    build(tmp_path / "null.jsonl", tmp_path / "null")
    with pytest.raises(DataError, match="12 of them have no label"):
        evaluate("bytes", ["knn"], [str(tmp_path / "shards")], [str(tmp_path / "null")])


def test_an_image_without_a_label_is_left_out_if_others_have_one(tmp_path: Path):
    members = [(f"{n}.jpg", jpeg(n)) for n in range(4)]
    write_tar(
        tmp_path / "some.tar", [each for n, image in enumerate(members) for each in (image, (f"{n}.cls", b"a"))][:-1]
    )
    found = open_encoder("pixels")[0].labelled([str(tmp_path / "some.tar")])
    assert (len(found), found.unlabelled, found.left_out) == (3, 1, 0)
    write_tar(tmp_path / "none.tar", members)
    with pytest.raises(DataError, match=r"none.tar: 0 has no .cls member, so it has no label to score with"):
        open_encoder("pixels")[0].labelled([str(tmp_path / "none.tar")])


# ---------------------------------------------------------------- memory
def test_at_most_two_batches_are_in_memory():
    lock, waiting, most = threading.Lock(), 0, 0

    def read(number: int) -> int:
        nonlocal waiting, most
        with lock:
            waiting += 1
            most = max(most, waiting)
        return number

    seen: list[int] = []
    for numbers, found in feature_cache.read_batches(read, range(100), 8):
        assert list(numbers) == found
        time.sleep(0.01)
        seen += found
        with lock:
            waiting -= len(found)
    assert seen == list(range(100)) and most <= 16


@contextlib.contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Yields a list that afterwards holds the largest growth of this process's own memory in MB. Pages of mapped files
    do not count, because the system can drop them."""

    def own() -> float:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon"))

    ended, out, begin, peak = threading.Event(), [], own(), 0.0

    def look() -> None:
        nonlocal peak
        while not ended.wait(0.001):
            peak = max(peak, own())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield out
    finally:
        ended.set()
        thread.join()
        out.append(peak - begin)


ROWS, DIM, CLASSES = 40_000, 512, 40  # ImageNet's 1,281,167 × 1,024 × 1,000, with 1/64 of the bytes of its features


def score_in_bounded_memory(folder: Path) -> None:
    """k-NN and linear probe of features of 82 MB, with chunks that are 1/64 as large as the default."""
    rng = np.random.default_rng(0)
    classes = torch.arange(ROWS) % CLASSES
    table = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, (ROWS, DIM))
    centers = rng.normal(size=(CLASSES, DIM)).astype(np.float32)
    for first in range(0, ROWS, 4096):
        part = classes[first : first + 4096].numpy()
        table[first : first + 4096] = centers[part] + rng.normal(size=(len(part), DIM))
    del table
    rows = FeatureRows(folder / "features.npy", np.arange(ROWS))
    query = FeatureRows(folder / "features.npy", np.arange(0, ROWS, 80))
    linear.CHUNK, feature_rows.CHUNK = 128, 1024
    cfg = linear.Config(steps=20, batch=64, rates=[0.01, 0.1])
    knn.classify(rows[:64], classes[:64], query[:9], 5, 0.07)  # what libraries allocate once
    with peak_memory() as of_knn:
        assert torch.equal(knn.classify(rows, classes, query, 10, 0.07, 128, 1024), classes[::80])
    with peak_memory() as of_linear:
        predicted, *_ = linear.classify(rows, classes, query, CLASSES, cfg)
    assert (predicted == classes[::80]).float().mean() > 0.9
    (folder / "peaks").write_text(json.dumps([of_knn[0], of_linear[0]]))


@pytest.mark.slow
def test_scores_take_bounded_memory(tmp_path: Path):
    assert Forked(score_in_bounded_memory, tmp_path).wait(120) == 0
    of_knn, of_linear = json.loads((tmp_path / "peaks").read_text())
    assert of_knn < 12 and of_linear < 24, (of_knn, of_linear)  # MB; the features have 82
