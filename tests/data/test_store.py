"""Streams from a real S3 server behind a proxy that injects faults: no wrong byte, no lost or repeated sample, and the
same order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from common.errors import DataError
from data_pipeline.shards import index
from data_pipeline.shards.samples import Samples
from data_pipeline.stream.damage_log import DamageLog
from data_pipeline.stream.stream import Reading, Stream
from tests.conftest import forget_connections
from tests.services import BUCKET, FaultProxy, ObjectStore, environment
from tests.tars import jpeg, write_tar

pytestmark = pytest.mark.slow
COUNT, BATCH, STEPS = 240, 8, 60  # two epochs


def raw(sample, rng):
    """The encoded bytes, so that a single wrong bit is detected."""
    out = np.zeros(16384, np.uint8)
    data = sample["image"].data
    out[: len(data)] = np.frombuffer(data, np.uint8)
    return {"bytes": out, "draw": rng(3).random(2)}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    for shard in range(6):
        write_tar(folder / f"{shard:03d}.tar", [(f"{shard}-{i:03d}.jpg", jpeg(100 * shard + i)) for i in range(40)])
    index.write(folder)
    return folder


@pytest.fixture(scope="module")
def expected(local: Path) -> list[dict]:
    stream = Stream(Samples([str(local)]), raw, BATCH, workers=0)
    return [next(stream) for _ in range(STEPS)]


@pytest.fixture(scope="module")
def remote(store: ObjectStore, local: Path) -> str:
    return store.put_folder(local, "clean")


def same(stream: Stream, expected: list[dict]) -> None:
    for step, there in enumerate(expected):
        here = next(stream)
        for key, value in there.items():
            assert np.array_equal(here[key], value), (step, key, stream.damage_log.bad)


def reading(**changes) -> Reading:
    return Reading(**{"workers": 1, "ahead_mb": 1.0, "attempt_seconds": 2.0, "retry_seconds": 60.0, **changes})


@pytest.mark.parametrize("backend", ["obstore", "fsspec"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_as_from_disk(
    remote: str, proxy: FaultProxy, expected: list[dict], backend: str, workers: int, monkeypatch, tmp_path: Path
):
    if backend == "fsspec":  # as if obstore were not installed
        (tmp_path / "obstore").mkdir()
        (tmp_path / "obstore" / "__init__.py").write_text("raise ImportError('not here')")
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path.cwd()}")
    samples = Samples([remote])
    stream = Stream(samples, raw, BATCH, reading=reading(workers=workers))
    same(stream, expected)
    figures, _ = stream.stats.take(workers)
    gets = [r for r in proxy.requests if r.startswith("GET") and ".tar" in r]
    chunk = stream.plan.orders[0].chunk
    used = STEPS * BATCH * 1.5  # chunks that were read ahead count, too
    order, size = stream.plan.orders[0], samples.total_bytes / COUNT / 1e6
    window = stream.plan.lanes * (order.block + 1) * order.chunk
    assert (
        figures["held_mb"] <= size * (window + 4 * workers * BATCH) + 1.0 + 0.5
    )  # the shuffle window, requests in flight, ahead_mb
    assert figures["retries"] == 0 and figures["mb"] > 1 and len(gets) <= used / chunk * 2 + 50
    stream.close()


@pytest.mark.parametrize(
    "faults",
    [
        {"latency": 0.03},
        {"error_rate": 0.2},
        {"reset_rate": 0.15},
        {"cut_rate": 0.3},
        {"short_rate": 0.3},  # for a short answer, another loader returned the last bytes of a range as the first
        {"flip_rate": 0.2},
        {"slow_rate": 0.05, "slow": 1.5},
        {"error_rate": 0.1, "reset_rate": 0.1, "cut_rate": 0.1, "flip_rate": 0.1, "slow_rate": 0.02},
    ],
    ids=lambda faults: "+".join(faults),
)
def test_faults_in_transit_do_not_change_batches(remote: str, proxy: FaultProxy, expected: list[dict], faults: dict):
    samples = Samples([remote])
    samples.pieces(0, 1)  # copies the index before the faults begin
    proxy.set(**faults)
    stream = Stream(samples, raw, BATCH, reading=reading())
    same(stream, expected)
    figures, _ = stream.stats.take(1)
    assert stream.damage_log.bad == {}
    if faults.keys() & {"error_rate", "reset_rate", "cut_rate", "short_rate"}:
        assert figures["retries"] > 0
    if faults.keys() == {"slow_rate", "slow"}:
        assert figures["hedges"] > 0
    stream.close()


def test_an_index_damaged_in_transit_is_read_again(remote: str, proxy: FaultProxy, tmp_path: Path, monkeypatch):
    *samples, last = [Samples([remote]) for _ in range(7)]
    proxy.set(flip_rate=0.4)
    counts = []
    for n, some in enumerate(samples):
        monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / f"cache{n}"))
        some.pieces(0, 1)
        counts.append(some.reader.counts["requests"])
    assert set(counts) > {1}
    proxy.set(flip_rate=1.0)
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"index-.*bin: is not the index that belongs to the manifest"):
        last.pieces(0, 1)


def test_a_store_that_restarts_during_a_run(store: ObjectStore, remote: str, proxy: FaultProxy, expected):
    stream = Stream(Samples([remote]), raw, BATCH, reading=reading(ahead_mb=0.1))
    same(stream, expected[:5])
    store.kill()
    timer = threading.Timer(2.0, store.start)
    timer.start()
    for there in expected[5:]:
        assert np.array_equal(next(stream)["bytes"], there["bytes"])
    timer.join()
    stream.close()


def test_a_store_that_stays_away_ends_the_run_with_an_error(remote: str, proxy: FaultProxy):
    samples = Samples([remote])
    stream = Stream(samples, raw, BATCH, reading=reading(retry_seconds=2.0))
    next(stream)
    proxy.set(refuse=1.0, error_rate=1.0)
    with pytest.raises(DataError, match=r"s3://data/clean/00\d.tar: no answer in 2 seconds and \d+ tries"):
        for _ in range(STEPS):
            next(stream)
    stream.close()


def test_wrong_credentials_are_an_error_at_once(remote: str, proxy: FaultProxy, monkeypatch):
    samples = Samples([remote])
    samples.pieces(0, 1)
    for name, value in environment(proxy.port, secret="wrong").items():
        monkeypatch.setenv(name, value)
    forget_connections()
    began = time.monotonic()
    with pytest.raises(DataError, match=r"refuses these credentials .*; set AWS_ACCESS_KEY_ID") as error:
        Samples([remote])
    stream = Stream(samples, raw, BATCH, reading=reading())
    with pytest.raises(DataError, match=r"refuses these credentials .*; set AWS_ACCESS_KEY_ID") as later:
        next(stream)
    stream.close()
    assert time.monotonic() - began < 15
    assert "wrong" not in str(error.value) and "testsecret" not in str(later.value)


def test_samples_damaged_in_the_store_are_logged_and_replaced(
    store: ObjectStore, local: Path, proxy: FaultProxy, expected, tmp_path: Path
):
    store.put_folder(local, "rotten")
    samples = Samples([str(local)])
    damaged, data = [7, 45, 46], {}
    for number in damaged:
        (piece,) = samples.pieces(number, 1)
        shard = Path(piece.url)
        body = data.setdefault(shard.name, bytearray(shard.read_bytes()))
        body[int(piece.records[0][0]["offset"]) + 1000] ^= 1
    for name, body in data.items():
        store.put(f"rotten/{name}", bytes(body))
    stream = Stream(
        Samples([f"s3://{BUCKET}/rotten"]), raw, BATCH, reading=reading(), damage_log=DamageLog(tmp_path / "bad")
    )
    chunk = stream.plan.orders[0].chunk
    for step, there in enumerate(expected):
        here = next(stream)
        for slot, number in enumerate(there["id"].tolist()):
            if number not in damaged:
                assert int(here["id"][slot]) == number and np.array_equal(here["bytes"][slot], there["bytes"][slot])
                continue
            assert int(here["id"][slot]) not in damaged
            global_index = int(stream.plan.slots(step, slot, slot + 1).global_index[0])
            if any(
                v % COUNT not in damaged
                for v in range(global_index // chunk * chunk, global_index // chunk * chunk + chunk)
            ):
                assert (
                    abs(int(here["id"][slot]) - number) % COUNT < chunk or chunk == 1
                )  # a neighbour in the same chunk
    assert sorted(key for _, key in stream.damage_log.bad) == sorted(samples.name(n)[1] for n in damaged)
    assert all("not those that were indexed" in reason for reason in stream.damage_log.bad.values())
    assert len((tmp_path / "bad" / "damaged-0.jsonl").read_text().splitlines()) == 3
    stream.close()


def test_a_server_without_range_requests_is_an_error_at_once(local: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(local)]
    server = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        port = server.stdout.readline().split("port ")[1].split()[0]
        samples = Samples([f"http://127.0.0.1:{port}"])
        assert len(samples) == COUNT
        with pytest.raises(DataError, match="it does not support byte ranges; copy the shards"):
            for number in range(0, COUNT, 7):
                samples.read(number)
    finally:
        server.kill()


def test_a_missing_shard_is_named(store: ObjectStore, local: Path, proxy: FaultProxy):
    store.put_folder(local, "holes")
    store.client().delete_object(Bucket=BUCKET, Key="holes/003.tar")
    stream = Stream(Samples([f"s3://{BUCKET}/holes"]), raw, BATCH, reading=reading())
    with pytest.raises(DataError, match=r"s3://data/holes/003.tar: no such file"):
        for _ in range(STEPS):
            next(stream)
    stream.close()


def test_a_damaged_index_is_refused(store: ObjectStore, local: Path, proxy: FaultProxy):
    store.put_folder(local, "badindex")
    name = next(local.glob("index-*.bin"))
    body = bytearray(name.read_bytes())
    body[50] ^= 1
    store.put(f"badindex/{name.name}", bytes(body))
    with pytest.raises(DataError, match="is not the index that belongs to the manifest"):
        Samples([f"s3://{BUCKET}/badindex"]).read(0)


def test_shards_without_a_manifest_are_indexed_into_the_cache(
    store: ObjectStore, local: Path, proxy: FaultProxy, expected
):
    for path in local.glob("*.tar"):
        store.put(f"plain/{path.name}", path.read_bytes())
    said: list[str] = []
    samples = Samples([f"s3://{BUCKET}/plain"], say=said.append)
    assert said == [
        "indexing 6 shards that have no manifest, once; `unlabeled shards index FOLDER` stores the index beside them"
    ]
    Samples([f"s3://{BUCKET}/plain"], say=said.append)
    assert len(said) == 1
    stream = Stream(samples, raw, BATCH, reading=reading())
    same(stream, expected[:5])
    stream.close()


def test_the_cache_serves_the_second_epoch_and_the_next_start(remote: str, proxy: FaultProxy, expected, tmp_path: Path):
    def run(limit_gb: float) -> dict:
        proxy.requests.clear()
        stream = Stream(Samples([remote]), raw, BATCH, reading=reading(cache=str(tmp_path / "ssd"), cache_gb=limit_gb))
        same(stream, expected)
        figures, _ = stream.stats.take(1)
        stream.close()
        return figures | {"gets": sum(".tar" in r for r in proxy.requests)}

    first = run(1.0)
    files = [p for p in (tmp_path / "ssd").rglob("*") if p.is_file()]
    assert first["hits"] > 0 and files and all("unlabeled-cache" in str(p) for p in files)
    for path in files[:6]:  # damage some files of the cache, delete others
        path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    for path in files[6:12]:
        path.unlink()
    second = run(1.0)
    assert 0 < second["gets"] < first["gets"] and second["hits"] > 0
    assert run(1.0)["gets"] <= 6  # everything is cached, except samples that were read one by one
    small = 300_000
    run(small / 2**30)
    assert sum(p.stat().st_size for p in (tmp_path / "ssd").rglob("*") if p.is_file()) <= small


def test_a_killed_prefetch_server_is_reported_and_the_next_start_resumes_exactly(
    remote: str, proxy: FaultProxy, expected
):
    samples, done = Samples([remote]), 0
    for kill_at in (3, 9, 20, STEPS):  # several times in a row
        stream = Stream(samples, raw, BATCH, reading=reading(workers=2, ahead_mb=0.2))
        stream.load_state_dict({**stream.state_dict(), "step": done})
        same(stream, expected[done:kill_at])
        done = stream.state_dict()["step"]
        if kill_at < STEPS:
            assert stream._server is not None
            stream._server.process.kill()
            with pytest.raises(DataError, match="the prefetch server, which reads the shards, has ended"):
                for _ in range(STEPS):
                    next(stream)
        stream.close()


def test_a_killed_trainer_leaves_no_processes(remote: str, proxy: FaultProxy):
    code = f"""
from tests.data.test_store import *
stream = Stream(Samples([{remote!r}]), raw, BATCH, reading=reading(workers=2))
next(stream)
print(os.getpid(), stream._server.process.pid, *(w.pid for w in stream._iterator._workers), flush=True)
time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = [int(p) for p in child.stdout.readline().split()]
    assert len(pids) == 4 and all(psutil.pid_exists(p) for p in pids)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    end = time.monotonic() + 20
    while any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids):
        assert time.monotonic() < end, "a process is left"
        time.sleep(0.1)


def test_the_watchdog_writes_the_stacks_of_all_processes(remote: str, proxy: FaultProxy, capfd):
    stream = Stream(
        Samples([remote]), raw, BATCH, reading=reading(stall_seconds=1.0, attempt_seconds=4.0, ahead_mb=0.1)
    )
    next(stream)
    proxy.set(hang=1.0)
    timer = threading.Timer(4.0, lambda: proxy.set())
    timer.start()
    for _ in range(30):
        next(stream)
    timer.join()
    stream.close()
    err = capfd.readouterr().err
    assert "no batch for 1 seconds before step" in err
    assert err.count("Current thread") + err.count("most recent call first") >= 3  # trainer, worker, prefetch server
    assert "_request" in err and "plan_ahead" in err
