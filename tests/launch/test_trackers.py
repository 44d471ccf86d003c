"""What trackers have stored after a run, read back from the files of the real packages in their local modes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import config
from common.errors import ConfigError, UserError
from eval import results
from launch.local import environments
from pretrain.recipes.recipe import Recipe, load
from pretrain.run_folder.jsonl_rows import NewRows, read_rows
from pretrain.run_folder.prepare import prepare
from pretrain.trackers import sender, trackers, tracking
from pretrain.train import train
from tests.conftest import tiny_recipe
from tests.forked import Forked

TRACKIO = Path(__file__).parents[2] / ".venv" / "trackio"  # `make trackio` installs it there
HAS_TRACKIO = TRACKIO.is_dir()
Values = dict[tuple[str, int], list[float]]  # {(name, step): the values that were logged}


SECRET = "0123456789" * 4  # a key, which must not be found in any file


@contextlib.contextmanager
def proxy(patch: pytest.MonkeyPatch) -> Iterator[list]:
    """A server that counts the connections of processes which obey the usual variables of proxies."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        seen: list = []

        def accept() -> None:
            while True:
                try:
                    seen.append(server.accept()[1])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            for spelled in (name, name.lower()):
                patch.setenv(spelled, f"http://127.0.0.1:{server.getsockname()[1]}")
        for name in ("NO_PROXY", "no_proxy"):
            patch.delenv(name, raising=False)
        yield seen


def train_on_two(recipe: Recipe) -> None:
    """Train on two processes."""
    path, errors = Path(f"{recipe.run}.yaml"), Path(f"{recipe.run}.errors")
    path.write_text(config.dump(recipe))
    output = (os.devnull, str(errors))
    ranks = [Forked(_train, path, env=environment, output=output) for environment in environments(2)]
    assert [rank.wait(600) for rank in ranks] == [0, 0], errors.read_text()


def _train(path: Path) -> None:
    tracking.FINISH_SECONDS = 300.0  # of a busy machine
    train(load(path))


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps on two processes, of which the last 4 were trained a second time, as after a crash, and of which
    there are scores. The environment tells the trackers to send it somewhere, which they must not."""
    run = tmp_path_factory.mktemp("tracked") / "run"
    chosen = ["mlflow", "{name: wandb, project: tiny, run: mine}"] + ["{name: trackio, project: tiny}"] * HAS_TRACKIO
    words = ("parallel.mode=ddp", "log=2", "checkpoint=4", "eval.pixels=false", f"log.trackers=[{', '.join(chosen)}]")
    row = {"model": "untrained", "step": 0, "protocol": "knn", "split": "val", "metric": "accuracy", "value": 0.25}
    with pytest.MonkeyPatch.context() as patch, proxy(patch) as seen:
        for name, value in (("MLFLOW_TRACKING_URI", "http://elsewhere.invalid"), ("WANDB_MODE", "online")):
            patch.setenv(name, value)
        for name in ("WANDB_API_KEY", "HF_TOKEN"):
            patch.setenv(name, SECRET)
        patch.setenv("PYTHONPATH", str(TRACKIO))  # of the processes that send
        patch.setattr(sys, "path", [*sys.path, str(TRACKIO)])  # of the check that packages are installed
        train_on_two(tiny_recipe("mae", shards, run, *words))
        results.append(run / "results.jsonl", [row, row | {"model": "pretrained", "step": 8, "value": 0.5}])
        results.append(run / "results.jsonl", [row | {"model": "pixels", "value": 0.75}])
        shutil.rmtree(run / "checkpoints" / "000000008")
        (run / "checkpoints" / "latest").unlink()
        train_on_two(tiny_recipe("mae", shards, run, *words))
        assert not seen
    assert not any(SECRET.encode() in path.read_bytes() for path in run.rglob("*") if path.is_file())
    return run


def expected(run: Path) -> Values:
    """What the files of the run say."""
    rows = read_rows(run / "metrics.jsonl")
    losses: Values = {
        ("train/loss", b["step"]): [pytest.approx((a["loss"] + b["loss"]) / 2)]
        for a, b in zip(rows[::2], rows[1::2], strict=True)
    }
    assert [step for _, step in losses] == [1, 3, 5, 7]
    return losses | {("val/knn/accuracy", 0): [0.25], ("val/knn/accuracy", 8): [0.5]}


def state(run: Path, tracker: str) -> dict:
    return json.loads((run / "trackers" / tracker / "state.json").read_text())


def mlflow_values(store: Path) -> tuple[Values, dict[str, str]]:
    """(values, {id: name} of the runs) in a database of MLflow."""
    out: Values = {}
    with sqlite3.connect(store) as db:
        for name, step, value in db.execute("select key, step, value from metrics"):
            out.setdefault((name, step), []).append(value)
        return out, dict(db.execute("select run_uuid, name from runs"))


def wandb_records(path: Path) -> Iterator:
    """The records of a .wandb file: blocks of 32 KiB with records of (checksum, length, kind), as in LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(parts)
            parts = b""


def check(values: Values, run: Path) -> None:
    """Each value was stored once; a baseline's scores were not."""
    assert expected(run).items() <= values.items() and max(map(len, values.values())) == 1
    assert len([name for name, _ in values if "knn" in name]) == 2


@pytest.mark.slow
def test_tensorboard_has_each_step_once(run: Path):
    """It is written by rank 0 only: there is one file for each time that the run was started."""
    assert len([*(run / "tensorboard").iterdir()]) == 2
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    values: Values = {}
    for name in board.Tags()["scalars"]:
        for event in board.Scalars(name):
            values.setdefault((name, event.step), []).append(pytest.approx(event.value))
    assert max(map(len, values.values())) == 1
    losses = {key: value for key, value in expected(run).items() if key[0] == "train/loss"}
    assert {key: value for key, value in values.items() if key[0] == "train/loss"} == losses


@pytest.mark.slow
def test_mlflow_has_each_step_once(run: Path):
    store = run / "trackers" / "mlflow" / "mlflow.db"
    values, runs = mlflow_values(store)
    check(values, run)
    assert runs == {state(run, "mlflow")["id"]: "run"}
    with sqlite3.connect(store) as db:
        assert dict(db.execute("select key, value from params"))["objective.name"] == "mae"
        assert db.execute("select status from runs").fetchall() == [("FINISHED",)]


@pytest.mark.slow
def test_wandb_has_each_step_once(run: Path):
    values: Values = {}
    ids, files = set(), sorted((run / "trackers" / "wandb" / "wandb").glob("offline-run-*/*.wandb"))
    for path in files:
        for record in wandb_records(path):
            if record.HasField("run"):
                ids.add((record.run.run_id, record.run.project, record.run.display_name))
            if record.HasField("history"):
                names = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                row = {name: json.loads(value) for name, value in names.items() if not name.startswith("_")}
                step = row.pop("step")
                for name, value in row.items():
                    values.setdefault((name, step), []).append(value)
    check(values, run)
    assert ids == {(state(run, "wandb")["id"], "tiny", "mine")} and len(files) == 2


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRACKIO, reason="NO TRACKIO HERE, SO IT IS NOT TESTED: `make trackio` installs it")
def test_trackio_has_each_step_once(run: Path):
    (store,) = (run / "trackers" / "trackio").glob("tiny*.db")
    values: Values = {}
    with sqlite3.connect(store) as db:
        ids = {pair[0]: pair[1] for pair in db.execute("select run_id, run_name from metrics")}
        for step, text in db.execute("select step, metrics from metrics"):
            for name, value in json.loads(text).items():
                values.setdefault((name, step), []).append(value)
    check(values, run)
    assert ids == {state(run, "trackio")["id"]: "run"}


@pytest.mark.slow
def test_a_tracker_that_hangs_does_not_hold_the_run_up(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    """Its server accepts connections and never answers."""
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 4.0)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        run = tmp_path / "run"
        words = ("eval.pixels=false", f"log.trackers=[{{name: mlflow, server: '{url}'}}]")
        began = time.monotonic()
        train(tiny_recipe("mae", shards, run, *words))
        assert time.monotonic() - began < 60
    assert len(read_rows(run / "metrics.jsonl")) == 8 and [*(run / "tensorboard").iterdir()]
    assert "tracker mlflow: it did not take the rest in time; the same command sends" in capfd.readouterr().err


@pytest.fixture
def tracked(shards: Path, tmp_path: Path) -> Path:
    """A run folder with two writes of metrics, whose tracker does not answer."""
    cfg = tiny_recipe("mae", shards, tmp_path / "run", "log.trackers=[{name: mlflow, server: 'http://127.0.0.1:1'}]")
    run = prepare(cfg)
    write_metrics(run, range(4))
    (run / "trackers" / "mlflow").mkdir(parents=True)
    return run


def write_metrics(run: Path, steps: range) -> None:
    rows = [{"step": n, "loss": n / 10} | ({"samples_per_second": 1.0} if n % 2 else {}) for n in steps]
    (run / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "new.jsonl").rename(run / "metrics.jsonl")


@pytest.mark.slow
def test_errors_are_logged_once_and_nothing_is_lost(tracked: Path, run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "refused")  # a word of the error
    cfg = load(tracked)
    one = sender.Sender(tracked, cfg, cfg.log.trackers[0], tracked / "trackers" / "mlflow", sender.Ending())
    one.read()
    for _ in range(2):
        one.send(now=True)
    lines = (tracked / "log.txt").read_text().splitlines()
    assert len(lines) == 1 and "tracker mlflow: " in lines[0] and "the training goes on" in lines[0]
    assert "refused" not in lines[0] and "***" in lines[0]
    one.options = one.options.replace(server="")
    store = tracked / "trackers" / "mlflow" / "mlflow.db"
    shutil.copy(run / "trackers" / "mlflow" / "mlflow.db", store)  # which other runs use, too
    one.send()  # too early
    assert len(one.waiting) == 2
    one.send(now=True)
    assert not one.waiting and "works again" in (tracked / "log.txt").read_text()
    write_metrics(tracked, range(2))  # the run resumes from step 2 …
    one.read()
    write_metrics(tracked, range(6))  # … and trains further
    one.read()
    one.send()
    one.tracker.log([(5, {"val/acc@5": 0.5})])  # a character that MLflow refuses
    one.ending.outcome = trackers.STOPPED
    assert one.finish() == 0
    with pytest.raises(trackers.UnknownRun, match="does not exist"):
        trackers.find("mlflow").Run(one.options, store.parent, "0" * 32)
    with sqlite3.connect(store) as db:
        assert db.execute("select status from runs where status != 'FINISHED'").fetchall() == [("KILLED",)]
        assert db.execute("select value from metrics where key = 'val/acc_5'").fetchall() == [(0.5,)]
        query = "select step, value from metrics where run_uuid = ? and key = 'train/loss' order by step"
        stored = db.execute(query, [state(tracked, "mlflow")["id"]]).fetchall()
    assert stored == [(1, pytest.approx(0.05)), (3, pytest.approx(0.25)), (5, pytest.approx(0.45))]


@pytest.mark.slow
def test_wandb_opens_a_run_again_after_an_error(tracked: Path):
    """In the same process. Whatever the outcome, what was logged is in its files."""
    module, options = trackers.find("wandb"), load(tracked).log.trackers[0].replace(server="", run="mine")
    first = module.Run(options, tracked, "")
    first.add_settings({"objective.name": "mae"})
    first.log([(1, {"loss": 0.5})])
    second = module.Run(options, tracked, first.id)
    second.log([(2, {"loss": 0.25})])
    second.close(trackers.STOPPED)
    assert second.id == first.id and second.run is not first.run
    records, deadline = [], time.monotonic() + 10
    while sum(record.HasField("exit") for record in records) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)  # a process of W&B writes the end of its files some milliseconds after `finish` has returned
        files = sorted((tracked / "wandb").glob("offline-run-*/*.wandb"))
        records = [record for path in files for record in wandb_records(path)]
    assert sum(record.HasField("history") for record in records) == 2
    (config,) = (record.config for record in records if record.HasField("config"))
    assert [(item.key, item.value_json) for item in config.update] == [("objective.name", '"mae"')]
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0, 1]
    assert sum(record.HasField("preempting") for record in records) == 1


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRACKIO, reason="NO TRACKIO HERE, SO IT IS NOT TESTED: `make trackio` installs it")
def test_trackio_says_that_it_lost_a_run(tracked: Path):
    """Its id is known before a row is stored, so that a killed process leaves an id that Trackio does not know. The
    package is imported in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from pretrain.recipes.recipe import load; from pretrain.trackers import"
        " trackers, trackio; options = load(Path(sys.argv[1])).log.trackers[0].replace(server='', run='mine')\n"
        "try: trackio.Run(options, Path(sys.argv[1]), '0' * 32)\n"
        "except trackers.UnknownRun: print('unknown')"
    )
    path = f"{Path(__file__).parents[2]}:{TRACKIO}"
    out = subprocess.run(
        [sys.executable, "-c", code, str(tracked)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert out.stdout.splitlines()[-1:] == ["unknown"], out.stderr


def test_what_is_refused_before_a_run_starts(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trackers.find("wandb"), "PACKAGES", ("no_such_package",))
    with pytest.raises(UserError, match=r"no_such_package is not installed: pip install 'unlabeled\[wandb\]'"):
        train(tiny_recipe("mae", shards, tmp_path / "run", "log.trackers=[wandb]"))
    with pytest.raises(UserError, match=r"log.trackers\[0\].server = http://\*\*\*@x: holds"):
        train(tiny_recipe("mae", shards, tmp_path / "run", "log.trackers=[{name: wandb, server: 'http://me:pw@x'}]"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"log\.trackers names wandb twice"):
        load("demo", ["log.trackers=[wandb, wandb]"])
    with pytest.raises(ConfigError, match="mlflow, trackio, wandb"):
        load("demo", ["log.trackers=[tensorboard]"])


def test_rows_of_a_file_that_grows(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    rows = NewRows(path)
    assert [*rows.read()] == []
    with path.open("w") as file:
        for text, found in (('{"step": 0}\n{"st', [0]), ('ep": 1}', []), ("\nno row\n", [1]), ("", [])):
            file.write(text)
            file.flush()
            assert [row["step"] for row in rows.read()] == found
    (tmp_path / "new").write_text('{"step": 5}\n')
    (tmp_path / "new").rename(path)
    assert [row["step"] for row in rows.read()] == [5] and rows.replaced
    assert not [*rows.read()] and not rows.replaced
