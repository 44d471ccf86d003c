"""`data.train=FOLDER` with plain images: shards are built once in the cache, the run names them, and the folder is
only read."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from common import config
from common.errors import DataError, UserError
from data_pipeline.build import folder_cache
from data_pipeline.storage.urls import find_shards
from launch.local import environments, wait
from pretrain import image_folders
from pretrain.recipes.recipe import load
from pretrain.train import train
from tests.conftest import _trainer, tiny_recipe, unlabeled
from tests.forked import Forked


@pytest.fixture
def mine(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 48 images in two classes, with a damaged image and a text file; and a separate cache."""
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(photos, tmp_path / "my [photos]" / "holiday é")
    (folder / "notes.txt").write_text("not an image")
    (folder / "china" / "broken.jpg").write_bytes(b"\xff\xd8 this is no JPEG")
    return folder


def everything(folder: Path) -> list[tuple[str, int, int, bytes]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns, p.read_bytes()) for p in files]


def recipe_file(tmp_path: Path, *overrides: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(config.dump(tiny_recipe("mae", tmp_path / "none", tmp_path / "run", "steps=2", *overrides)))
    return path


@pytest.mark.slow
def test_train_on_a_folder_of_images(mine: Path, tmp_path: Path):
    mine = mine.rename(tmp_path / "holiday é")  # in the other name "[" stands for a pattern
    before = everything(mine)
    recipe = recipe_file(tmp_path)
    scored = [f"eval.{key}={mine}" for key in ("gallery", "val")]
    done = unlabeled("train", recipe, f"data.train={mine}", *scored)
    assert done.returncode == 0, done.stderr
    assert "48 images; 2 labels from its sub-folders; 1 damaged or too large, left out" in done.stdout
    assert "not images, ignored: 1 .txt" in done.stdout and "built once" in done.stdout
    assert everything(mine) == before
    stored = load(tmp_path / "run")
    (shards,) = stored.data.train
    assert Path(shards).parent == tmp_path / "cache" / "folder-shards" and shards in done.stdout
    assert stored.eval.gallery == stored.eval.val == [shards]
    again = unlabeled("train", recipe, f"data.train={mine}", *scored, "steps=4")
    assert again.returncode == 0, again.stderr
    assert "built before" in again.stdout and "built once" not in again.stdout and "from step 2" in again.stdout
    train(load(recipe, [f"data.train={mine}", f"run={tmp_path / 'whole'}", "steps=4"]))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")

    (mine / "china" / "00.jpg").unlink()
    changed = unlabeled("train", recipe, f"data.train={mine}", *scored, "steps=4")
    assert changed.returncode == 2 and "its files have changed" in changed.stdout and "47 images" in changed.stdout
    assert "is not the data that this run was started on: " in changed.stderr
    finished = unlabeled("train", tmp_path / "run", "steps=5")  # the run has its own shards, which stay
    assert finished.returncode == 0, finished.stderr


def losses(run: Path) -> list[float]:
    from pretrain.run_folder.jsonl_rows import read_rows

    return [row["loss"] for row in read_rows(run / "metrics.jsonl")]


@pytest.mark.slow
def test_preview_and_eval_take_a_folder_of_images(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))
    shown = unlabeled(
        "shards", "preview", recipe_file(tmp_path), f"data.train={photos}", "--out", tmp_path / "p.png", "--rows", 2
    )
    assert shown.returncode == 0 and (tmp_path / "p.png").is_file(), shown.stderr
    scored = unlabeled("eval", "pixels", "knn", f"gallery={photos}", f"query={photos}", "image_size=32")
    assert scored.returncode == 0 and "accuracy" in scored.stdout, scored.stderr
    assert "built before" in scored.stdout


@pytest.mark.slow
def test_several_processes_build_once(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Processes as torchrun starts them, without a launcher that has built the shards before."""
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))
    words = [str(recipe_file(tmp_path)), f"data.train={photos}", "parallel.mode=ddp"]
    output = (str(tmp_path / "out"), str(tmp_path / "err"))
    code = wait([Forked(_trainer, words, env=env, output=output) for env in environments(2)])  # type: ignore[misc]
    assert code == 0, (tmp_path / "err").read_text()
    assert len([path for path in (tmp_path / "cache" / "folder-shards").iterdir() if path.is_dir()]) == 1
    assert (tmp_path / "out").read_text().count("48 images") == 1  # process 0 alone says it
    assert len(losses(tmp_path / "run")) == 2


def test_two_at_once_build_once(mine: Path):
    lines: list[str] = []
    ask = {"target": folder_cache.shards_of, "args": (str(mine),), "kwargs": {"say": lines.append}}
    threads = [threading.Thread(**ask), threading.Thread(**ask)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum("built once" in line for line in lines) == sum("built before" in line for line in lines) == 1


def test_what_counts_as_a_folder_of_images(photos: Path, shards: Path, tmp_path: Path):
    assert folder_cache.is_image_folder(str(photos)) and folder_cache.is_image_folder(f"file://{photos}")
    assert not folder_cache.is_image_folder(str(shards)) and not folder_cache.is_image_folder(str(shards.parent))
    assert not folder_cache.is_image_folder("s3://bucket/photos") and not folder_cache.is_image_folder(
        str(photos / "*")
    )
    (tmp_path / "other").mkdir()
    assert not folder_cache.is_image_folder(str(tmp_path / "other"))
    with pytest.raises(DataError, match="is an empty folder"):
        find_shards([str(tmp_path / "other")])
    (tmp_path / "other" / "a.xyz").write_text("x")
    with pytest.raises(DataError, match=r"holds neither shards \(.tar\) nor images, but 1 .xyz"):
        find_shards([str(tmp_path / "other")])


def test_a_change_of_a_file_makes_other_shards(mine: Path, tmp_path: Path):
    first = folder_cache.shards_of(str(mine), say=lambda line: None)
    assert folder_cache.shards_of(str(mine), say=lambda line: None) == first
    os.utime(mine / "china" / "00.jpg", ns=(1, 1))
    second = folder_cache.shards_of(str(mine), say=lambda line: None)
    assert second != first and first.is_dir()
    assert [p.read_bytes() for p in sorted(first.glob("*.tar"))] == [
        p.read_bytes() for p in sorted(second.glob("*.tar"))
    ]
    shutil.rmtree(first)
    with pytest.raises(
        DataError, match=r"no such file or folder; shards that were made from a folder of images.*data.train=FOLDER"
    ):
        find_shards([str(first)])


def test_no_room_in_the_cache(mine: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"has 0\.0 GB free; set UNLABELED_CACHE=FOLDER"):
        folder_cache.shards_of(str(mine))


def test_a_run_inside_of_the_folder_is_refused(photos: Path, tmp_path: Path):
    before = everything(photos)
    with pytest.raises(UserError, match="that is only read; write run=FOLDER, outside of it"):
        image_folders.use_shards(tiny_recipe("mae", photos, photos / "runs" / "mine"))
    assert everything(photos) == before and not (photos / "runs").exists()


@pytest.mark.slow
def test_from_python(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))
    run = train(tiny_recipe("mae", photos, tmp_path / "run", "steps=2"))
    assert load(run).data.train[0].startswith(str(tmp_path / "cache"))
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(DataError, match=r"write data\.train=FOLDER again"):
        train(load(run, ["steps=3"]))
    train(load(run, ["steps=3", f"data.train={photos}"]))  # the same shards at the same place
    assert len(losses(run)) == 3
