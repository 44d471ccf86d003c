"""Checkpoints that are damaged, malicious, foreign, or cannot be written: each is refused by its name, and nothing
else is lost."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import UserError
from data_pipeline.storage.urls import write_atomically
from pretrain.build import build_objective, build_stream, open_samples
from pretrain.checkpoint.disk_store import DiskStore
from pretrain.checkpoint.integrity import Damaged, hash_stream, run_json_digest
from pretrain.checkpoint.load import load
from pretrain.checkpoint.open_store import open_checkpoint_store, run_store
from pretrain.checkpoint.tools import consolidate, locate, verify
from pretrain.interchange import export
from pretrain.parallel.engine import Engine
from pretrain.recipes.recipe import Recipe
from pretrain.train import train
from tests.conftest import sampled, tiny_recipe, unlabeled
from tests.services import FaultProxy, ObjectStore


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]


def restore(cfg: Recipe, name: str) -> int:
    """Load a checkpoint as a run would."""
    objective = build_objective(cfg)
    engine = Engine(objective, cfg, torch.device("cpu"))
    stream = build_stream(cfg, objective, open_samples(cfg))
    from pretrain.optim.skip_steps import Guard

    guard = Guard(objective, cfg.skip, torch.device("cpu"))
    return load(run_store(Path(cfg.run), cfg), name, engine, stream, guard=guard)


@pytest.fixture(scope="session")
def made(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints at 3 and 6."""
    return train(tiny_recipe("mae", shards, tmp_path_factory.mktemp("made") / "run", "steps=6", "checkpoint=3"))


@pytest.fixture
def run(made: Path, shards: Path, tmp_path: Path) -> Recipe:
    """The recipe of a copy of that run."""
    shutil.copytree(made, tmp_path / "run")
    return tiny_recipe("mae", shards, tmp_path / "run", "steps=6", "checkpoint=3")


def folder(cfg: Recipe, step: int) -> Path:
    return Path(cfg.run) / "checkpoints" / f"{step:09d}"


# ---------------------------------------------------------------- damage
FILES = ["run.json", ".metadata", "__0_0.distcp"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("place", [0.1, 0.5, 0.99])
def test_one_flipped_bit_is_named(run: Recipe, file: str, place: float):
    path = folder(run, 6) / file
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)
    with pytest.raises(Damaged, match=rf"{path}: .*checkpoint.resume="):
        restore(run, "000000006")


@pytest.mark.parametrize("file", FILES)
def test_a_missing_or_shortened_file_is_named(run: Recipe, file: str):
    path = folder(run, 6) / file
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(Damaged, match=f"{path}: "):
        restore(run, "000000006")
    path.unlink()
    with pytest.raises(Damaged, match=f"{path}: is missing"):
        restore(run, "000000006")


@pytest.mark.slow
def test_goes_on_from_an_older_one_when_told(run: Recipe, shards: Path):
    whole = losses(Path(run.run))
    (folder(run, 6) / "__0_0.distcp").write_bytes(b"")
    again = lambda *more: train(tiny_recipe("mae", shards, run.run, "steps=6", "checkpoint=3", *more))  # noqa: E731
    with pytest.raises(Damaged):
        again()
    with pytest.raises(UserError, match=r"no complete checkpoint there; .* are: 3, 6"):
        again("checkpoint.resume=5")
    again("checkpoint.resume=3")
    assert "resumes from step 3" in (Path(run.run) / "log.txt").read_text() and losses(Path(run.run)) == whole
    assert restore(run, "000000006") == 6 and DiskStore(f"{run.run}/checkpoints").latest() == "000000006"
    assert "resume: latest" in (Path(run.run) / "recipe.yaml").read_text()  # said once


def test_resume_none_begins_anew(run: Recipe, shards: Path):
    whole = losses(Path(run.run))
    train(tiny_recipe("mae", shards, run.run, "steps=6", "checkpoint=3", "checkpoint.resume=none"))
    assert "resumes from step" not in (Path(run.run) / "log.txt").read_text() and losses(Path(run.run)) == whole


def test_latest_that_names_nothing_is_refused(run: Recipe):
    (folder(run, 6).parent / "latest").write_text("000000005\n")
    with pytest.raises(Damaged, match="latest: names '000000005', which is not a complete checkpoint"):
        DiskStore(f"{run.run}/checkpoints").latest()


# ---------------------------------------------------------------- evil
class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def rewrite(cfg: Recipe, file: str, data: bytes) -> None:
    """Change a file of the newest checkpoint and its digest, as somebody with write access could."""
    path = folder(cfg, 6) / file
    path.write_bytes(data)
    about = json.loads((folder(cfg, 6) / "run.json").read_text())
    about.pop("digest")
    with path.open("rb") as stream:
        about["files"][file] = hash_stream(stream)
    (folder(cfg, 6) / "run.json").write_text(json.dumps({**about, "digest": run_json_digest(about)}))


def test_an_evil_pickle_in_metadata_does_nothing(run: Recipe, tmp_path: Path):
    rewrite(run, ".metadata", pickle.dumps(Evil(tmp_path / "owned")))
    with pytest.raises(Damaged, match=r"\.metadata: was not written by this program \(it uses posix.system"):
        restore(run, "000000006")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "torch.load", "torch.hub.load", "torch.serialization.load", "os.fork"]
)
def test_metadata_may_name_only_what_describes_tensors(run: Recipe, name: str):
    module, _, attribute = name.rpartition(".")
    rewrite(run, ".metadata", f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(Damaged, match=f"it uses {name}"):
        restore(run, "000000006")


def test_an_evil_value_in_the_data_does_nothing(run: Recipe, tmp_path: Path):
    """Values that are not tensors (lr, betas) are pickles, too. DCP would execute this one."""
    import io

    from pretrain.checkpoint.dcp_format import read_metadata

    files = json.loads((folder(run, 6) / "run.json").read_text())["files"]
    metadata = read_metadata(DiskStore(f"{run.run}/checkpoints"), "000000006", files)
    info = next(
        i
        for index, i in metadata.storage_data.items()
        if index.fqn == "optimizer.param_groups.0.lr" or index.fqn.endswith(".lr")
    )
    data = bytearray((folder(run, 6) / info.relative_path).read_bytes())
    evil = io.BytesIO()
    torch.save(Evil(tmp_path / "owned"), evil)
    info.length, info.offset = len(evil.getvalue()), len(data)
    rewrite(run, info.relative_path, bytes(data) + evil.getvalue())
    rewrite(run, ".metadata", pickle.dumps(metadata))
    with pytest.raises(Damaged, match="its pickle uses classes that are not allowed"):
        restore(run, "000000006")
    assert not (tmp_path / "owned").exists()


def test_files_outside_of_the_checkpoint_are_not_read(run: Recipe):
    from pretrain.checkpoint.dcp_format import read_metadata

    files = json.loads((folder(run, 6) / "run.json").read_text())["files"]
    metadata = read_metadata(DiskStore(f"{run.run}/checkpoints"), "000000006", files)
    next(iter(metadata.storage_data.values())).relative_path = "../000000003/__0_0.distcp"
    rewrite(run, ".metadata", pickle.dumps(metadata))
    with pytest.raises(Damaged, match="points to a file that does not belong"):
        restore(run, "000000006")


# ---------------------------------------------------------------- foreign
def test_a_checkpoint_of_another_model_is_refused(run: Recipe, shards: Path, tmp_path: Path):
    for other in (
        tiny_recipe("mae", shards, run.run, "model.dim=48", "model.heads=2"),
        tiny_recipe("mae", shards, run.run, "model.depth=3"),
        tiny_recipe("mae", shards, run.run, "model.depth=1"),
        tiny_recipe("simclr", shards, run.run),
    ):
        with pytest.raises(UserError, match="000000006: is a checkpoint of another model: model"):
            restore(other, "000000006")
    with pytest.raises(UserError, match=r"written with the order"):
        restore(tiny_recipe("mae", shards, run.run, "seed=7"), "000000006")


def test_a_folder_of_something_else_is_refused(run: Recipe, tmp_path: Path):
    (folder(run, 6) / "run.json").write_text("{}")
    with pytest.raises(Damaged, match=r"run.json: is damaged or was not written by this program"):
        restore(run, "000000006")


# ---------------------------------------------------------------- what it holds; sync and async
@pytest.mark.slow
def test_async_equals_sync(shards: Path, tmp_path: Path):
    """The files have the same bytes, although the training changes the tensors while they are written."""
    overrides = ["steps=9", "checkpoint=3", "checkpoint.keep=9"]
    for mode in ("sync", "async"):
        train(tiny_recipe("dinov2", shards, tmp_path / mode, *overrides, f"checkpoint.mode={mode}"))
    stores = [DiskStore(str(tmp_path / mode / "checkpoints")) for mode in ("sync", "async")]
    assert stores[0].complete_names() == stores[1].complete_names() == ["000000003", "000000006", "000000009"]
    for name in stores[0].complete_names():
        a, b = (store.run_json(name) for store in stores)
        assert a["files"]["__0_0.distcp"] == b["files"]["__0_0.distcp"]
        assert a["stream"] == b["stream"] and a["data"] == b["data"] and a["versions"] == b["versions"]
    assert losses(tmp_path / "sync") == losses(tmp_path / "async")


def test_says_what_it_was_made_of(run: Recipe):
    about = DiskStore(f"{run.run}/checkpoints").run_json("000000006")
    assert (
        about["step"] == 6
        and about["recipe"]["steps"] == 6
        and torch.__version__.startswith(about["versions"]["torch"])
    )
    assert about["data"][0]["samples"] == 48 and len(about["data"][0]["id"]) == 32


@pytest.mark.slow
def test_keeps_the_newest_and_every_so_many(shards: Path, tmp_path: Path):
    train(tiny_recipe("mae", shards, tmp_path / "run", "steps=13", "checkpoint=2", "checkpoint.keep_every=6"))
    store = DiskStore(str(tmp_path / "run" / "checkpoints"))
    assert [int(name) for name in store.complete_names()] == [6, 12, 13] and store.latest() == "000000013"


def test_a_run_folder_stands_for_its_checkpoints_elsewhere(shards: Path, tmp_path: Path):
    """For the commands for checkpoints and for `init.run`."""
    there = tmp_path / "there"
    run = train(tiny_recipe("mae", shards, tmp_path / "run", "steps=2", f"checkpoint.folder={there}"))
    store, name = locate(str(run))
    assert store.path(name) == f"{there}/000000002" and verify(f"{run}/") == []
    branch = train(tiny_recipe("mae", shards, tmp_path / "branch", "steps=1", f"init.run={run}"))
    assert (branch / "export" / "1").is_dir()


# ---------------------------------------------------------------- faults of the disk
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(path)]
    if problem := subprocess.run(mount, capture_output=True, text=True).stderr:
        pytest.skip(f"a small disk cannot be mounted by this user: {problem}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def on(disk: Path, *more: str) -> list[str]:
    return ["steps=9", "checkpoint=3", f"checkpoint.folder={disk}", "checkpoint.retry_seconds=0.5", *more]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_full_disk_stops_the_run_and_keeps_the_previous_checkpoint(
    made: Path, shards: Path, tmp_path: Path, small_disk: Path, mode: str
):
    # an attempt takes longer than this, and is repeated nevertheless
    options = on(small_disk, f"checkpoint.mode={mode}", "checkpoint.keep=1", "checkpoint.retry_seconds=0.01")
    whole = train(tiny_recipe("mae", shards, tmp_path / "whole", "steps=9"))
    first = tiny_recipe("mae", shards, tmp_path / "run", *options)
    size = _size_of_a_checkpoint(made)
    (small_disk / "other").write_bytes(bytes((3 << 20) - int(1.5 * size)))  # room for one
    with pytest.raises(
        UserError, match=r"000000006: cannot write the checkpoint \(.*No space left.*the one before it is kept"
    ):
        train(first)
    assert "trying again" in (tmp_path / "run" / "log.txt").read_text()
    assert DiskStore(str(small_disk)).latest() == "000000003"
    (small_disk / "other").unlink()
    train(tiny_recipe("mae", shards, tmp_path / "run", *options))
    assert losses(tmp_path / "run") == losses(whole)


def _size_of_a_checkpoint(made: Path) -> int:
    size = sum(p.stat().st_size for p in (made / "checkpoints" / "000000003").iterdir())
    assert size < 1 << 20
    return size


@pytest.mark.slow
def test_a_full_disk_lets_the_run_go_on_when_told(made: Path, shards: Path, tmp_path: Path, small_disk: Path):
    options = on(small_disk, "checkpoint.on_error=continue", "checkpoint.keep=1")
    size = _size_of_a_checkpoint(made)
    (small_disk / "other").write_bytes(bytes((3 << 20) - int(1.5 * size)))
    with pytest.raises(UserError, match="000000009: cannot write"):  # the last one is not given up in silence
        train(tiny_recipe("mae", shards, tmp_path / "run", *options))
    assert len(losses(tmp_path / "run")) == 9 and DiskStore(str(small_disk)).latest() == "000000003"
    assert sorted(path.name for path in small_disk.iterdir()) == ["000000003", "latest", "other", "owner.json"]


@pytest.mark.slow
def test_a_full_disk_that_is_freed_in_time_loses_nothing(made: Path, shards: Path, tmp_path: Path, small_disk: Path):
    options = on(small_disk, "checkpoint.retry_seconds=30", "checkpoint.keep=1")
    size = _size_of_a_checkpoint(made)
    (small_disk / "other").write_bytes(bytes((3 << 20) - int(1.5 * size)))
    cfg = tiny_recipe("mae", shards, tmp_path / "run", *options)

    def free() -> None:
        while "trying again" not in (
            (tmp_path / "run" / "log.txt").read_text() if (tmp_path / "run" / "log.txt").exists() else ""
        ):
            time.sleep(0.05)
        (small_disk / "other").unlink()

    thread = threading.Thread(target=free)
    thread.start()
    train(cfg)
    thread.join()
    assert DiskStore(str(small_disk)).latest() == "000000009"


def test_a_file_that_a_full_disk_does_not_take_leaves_nothing(small_disk: Path):
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written \(No space left on device\)"):
        write_atomically(str(small_disk / "metrics.jsonl"), [bytes(1 << 20)] * 4)
    assert not list(small_disk.iterdir())


def test_a_read_only_folder_is_said_before_the_first_step(shards: Path, tmp_path: Path, small_disk: Path):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"checkpoint.folder: .*Read-only file system: no checkpoint can be written"):
        train(tiny_recipe("mae", shards, tmp_path / "run", *on(small_disk)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_folder_that_becomes_read_only(shards: Path, tmp_path: Path, small_disk: Path):
    train(tiny_recipe("mae", shards, tmp_path / "run", *on(small_disk, "steps=3")))
    before = DiskStore(str(small_disk)).run_json("000000003")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    longer = on(small_disk, "checkpoint.on_error=continue")
    with pytest.raises(UserError, match=r"another recipe|cannot write"):
        train(tiny_recipe("mae", shards, tmp_path / "run", *longer))
    assert DiskStore(str(small_disk)).run_json("000000003") == before


# ---------------------------------------------------------------- S3
@pytest.mark.slow
@pytest.mark.parametrize("mode", sampled(["sync", "async"], "async"))
def test_s3_with_faults(shards: Path, tmp_path: Path, proxy: FaultProxy, mode: str):
    """Checkpoints are written and read in spite of resets, errors and changed bytes; the resumed run equals the
    uninterrupted one."""
    url = f"s3://data/checkpoints-{mode}"
    whole = losses(train(tiny_recipe("mae", shards, tmp_path / "whole", "steps=12")))
    options = ["checkpoint=4", f"checkpoint.folder={url}", f"checkpoint.mode={mode}", "checkpoint.keep=1"]
    proxy.set(error_rate=0.1, reset_rate=0.1)
    train(tiny_recipe("mae", shards, tmp_path / "run", "steps=12", *options))
    store = open_checkpoint_store(url)
    assert store.complete_names() == ["000000012"] and store.latest() == "000000012"
    about = store.run_json("000000012")
    store.delete("000000012")
    assert store.complete_names() == []
    with pytest.raises(Damaged, match="latest: names '000000012'"):
        train(tiny_recipe("mae", shards, tmp_path / "run", "steps=12", *options))
    train(tiny_recipe("mae", shards, tmp_path / "run", "steps=12", *options, "checkpoint.resume=none"))
    assert losses(tmp_path / "run") == whole
    assert store.run_json("000000012")["files"]["__0_0.distcp"] == about["files"]["__0_0.distcp"]
    proxy.set(error_rate=0.1, reset_rate=0.1, flip_rate=0.2, cut_rate=0.1)
    assert restore(tiny_recipe("mae", shards, tmp_path / "run", "steps=12", *options), "000000012") == 12


@pytest.mark.slow
def test_s3_that_stays_away(shards: Path, tmp_path: Path, proxy: FaultProxy):
    options = ["steps=6", "checkpoint=3", "checkpoint.folder=s3://data/away", "checkpoint.retry_seconds=2"]
    with pytest.raises(UserError, match="s3://data/away"):
        proxy.set(refuse=1)
        train(tiny_recipe("mae", shards, tmp_path / "run", *options))


@pytest.mark.slow
def test_s3_that_takes_and_never_answers(shards: Path, tmp_path: Path, proxy: FaultProxy):
    """The save is abandoned after retry_seconds, although the client of the store would wait longer."""
    options = ["steps=60", "checkpoint=1000", "checkpoint.folder=s3://data/hangs", "checkpoint.retry_seconds=2"]
    began: list[float] = []

    def hang() -> None:
        while not (tmp_path / "run" / "metrics.jsonl").exists() or len(losses(tmp_path / "run")) < 2:
            time.sleep(0.02)
        proxy.set(hang=1)
        began.append(time.monotonic())

    threading.Thread(target=hang).start()
    with pytest.raises(UserError, match=r"000000060: cannot write the checkpoint .*no answer in 2 seconds"):
        train(tiny_recipe("mae", shards, tmp_path / "run", *options))
    assert len(losses(tmp_path / "run")) == 60 and time.monotonic() - began[0] < 60
    with pytest.raises(UserError, match="no answer in 2 seconds"):
        open_checkpoint_store("s3://data/hangs", 2.0).latest()


# ---------------------------------------------------------------- the run folder's disk
@pytest.mark.slow
@pytest.mark.parametrize("freed", [True, False])
def test_a_full_disk_while_logging(
    shards: Path, tmp_path: Path, small_disk: Path, freed: bool, capfd: pytest.CaptureFixture
):
    """Rows are kept in memory until there is room; the checkpoint is written, because its folder is on another disk."""
    run, store = small_disk / "run", tmp_path / "checkpoints"
    options = ["steps=60", "checkpoint=20", f"checkpoint.folder={store}", "export=1000"]

    def fill() -> None:
        while not (run / "metrics.jsonl").exists() or len(losses(run)) < 3:
            time.sleep(0.005)
        with (small_disk / "other").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 12)):
                pass
        while freed and not (store / "000000040").exists():
            time.sleep(0.005)
        if freed:
            (small_disk / "other").unlink()

    thread = threading.Thread(target=fill)
    thread.start()
    if freed:
        train(tiny_recipe("mae", shards, run, *options))
        thread.join()
        assert [step for step, _ in losses(run)] == list(range(60)) and (run / "export" / "60" / "config.json").exists()
        # each file by itself: TensorBoard orders files of the same second by their names, in which 10 is before 9
        files = [EventAccumulator(str(file)).Reload() for file in (run / "tensorboard").iterdir()]
        seen = [file.Scalars("train/loss") for file in files if "train/loss" in file.Tags()["scalars"]]
        assert {event.step for events in seen for event in events} == set(range(60))
    else:
        with pytest.raises(
            UserError, match=r"export/60: cannot be written .*No space left.*then run the same command again"
        ):
            train(tiny_recipe("mae", shards, run, *options))
        thread.join()
    said = capfd.readouterr().err
    assert "metrics.jsonl: cannot be written (No space left on device)" in said and "Traceback" not in said
    assert DiskStore(str(store)).latest() == "000000060"


def test_an_export_is_durable_before_it_has_its_name(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, durable, sync = tmp_path / "export", list[Path](), os.fsync

    def seen(number: int) -> None:
        assert not folder.exists()
        durable.append(Path(os.readlink(f"/proc/self/fd/{number}")))
        sync(number)

    monkeypatch.setattr(os, "fsync", seen)
    body, _ = export.load(made / "export" / "6")
    export.write(folder, body, {"step": 6, "objective": "mae", "pool": "cls"}, [0.5] * 3, [0.25] * 3)
    assert {path.name for path in durable} == {".export.partial", *(path.name for path in folder.iterdir())}


def test_an_export_that_a_full_disk_ends_takes_no_room(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save = export.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path, **options: object) -> None:
        save(tensors, path, **options)
        if path.parent.name == ".2.partial":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "save_file", full)
    run = train(tiny_recipe("mae", shards, tmp_path / "run", "steps=3", "export=2"))
    assert "export/2: cannot be written (Error while" in (run / "log.txt").read_text()
    assert sorted(path.name for path in (run / "export").iterdir()) == ["0", "3"]


@pytest.mark.slow
def test_s3_half_a_checkpoint_is_not_seen(shards: Path, tmp_path: Path, proxy: FaultProxy, store: ObjectStore):
    store.put("half/000000009/__0_0.distcp", b"half")
    options = ["steps=6", "checkpoint=3", "checkpoint.folder=s3://data/half"]
    train(tiny_recipe("mae", shards, tmp_path / "run", *options))
    there = open_checkpoint_store("s3://data/half")
    assert there.names() == ["000000003", "000000006", "000000009"] and there.complete_names() == [
        "000000003",
        "000000006",
    ]


# ---------------------------------------------------------------- the tools
def tool(*args: object) -> subprocess.CompletedProcess:
    return unlabeled("checkpoint", *args)


@pytest.mark.slow
def test_inspect_verify_consolidate(run: Recipe, tmp_path: Path):
    """The commands need neither the recipe nor the objective, which are deleted here."""
    from safetensors.torch import load_file

    (Path(run.run) / "recipe.yaml").unlink()
    there = folder(run, 6)
    seen = tool("inspect", there)
    assert seen.returncode == 0 and "step        6 of 6" in seen.stdout and "mae on vit" in seen.stdout, seen.stderr
    assert tool("inspect", run.run).stdout == seen.stdout
    whole = tool("verify", there)
    assert whole.returncode == 0 and "every byte is as it was written" in whole.stdout, whole.stderr
    assert tool("consolidate", there, tmp_path / "model.safetensors").returncode == 0
    with pytest.raises(UserError, match=r"model\.safetensors: exists already; name another file"):
        consolidate(str(there), str(tmp_path / "model.safetensors"))
    model, state = build_objective(run), load_file(tmp_path / "model.safetensors")
    model.load_state_dict(state)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), build_objective(run).state_dict().values(), strict=True)
    )
    data = bytearray((there / "__0_0.distcp").read_bytes())
    data[1000] ^= 1
    (there / "__0_0.distcp").write_bytes(data)
    bad = tool("verify", there)
    assert bad.returncode == 1 and f"{there}/__0_0.distcp: is damaged" in bad.stdout
    assert tool("consolidate", there, tmp_path / "x").returncode == 2 and not (tmp_path / "x").exists()
    none = tool("inspect", tmp_path)
    assert none.returncode == 2 and "holds no checkpoint" in none.stderr
