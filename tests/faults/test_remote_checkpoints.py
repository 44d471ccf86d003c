"""Checkpoints in a store are streamed: no file is kept as a whole in memory or on a disk, and a rank reads only the
ranges that it needs."""

from __future__ import annotations

import io
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from launch.local import wait
from pretrain.checkpoint import integrity, remote_store
from pretrain.checkpoint.integrity import CHUNK_BYTES, Damaged, HashingWriter
from pretrain.checkpoint.open_store import open_checkpoint_store
from pretrain.checkpoint.tools import consolidate, verify
from pretrain.train import train
from tests.conftest import tiny_recipe
from tests.faults.test_kill import rows
from tests.faults.test_processes import errors, ranks, recipe_file
from tests.services import FaultProxy, ObjectStore

NAME, FILE = "000000001", "__0_0.distcp"
MB = 1 << 20


def block(number: int) -> bytes:
    """A megabyte of bytes that depend on the number."""
    return np.random.default_rng(number).bytes(MB)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], float]]:
    """The largest memory, in MB, that Python has allocated since the last call. There is no disk for temporary
    files."""
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    tracemalloc.start()

    def peak() -> float:
        found = tracemalloc.get_traced_memory()[1] / MB
        tracemalloc.reset_peak()
        return found

    yield peak
    tracemalloc.stop()


@pytest.mark.slow
def test_a_large_file_is_streamed_both_ways(
    proxy: FaultProxy, measured: Callable[[], float], monkeypatch: pytest.MonkeyPatch
):
    """In spite of errors of the store, after which a part and not the whole file is repeated."""
    monkeypatch.setattr(remote_store, "UPLOAD_PART_BYTES", 5 * MB)  # the least that S3 takes
    store, count = open_checkpoint_store("s3://data/streamed"), 72
    proxy.set(error_rate=0.1)
    measured()
    with store.write(NAME, FILE) as target:
        writer = HashingWriter(target)
        for number in range(count):
            writer.write(block(number))
    assert measured() < count  # the store's client and the proxy of the test hold copies of a part, too
    proxy.set()
    files = {FILE: writer.digests.entry()}
    assert store.size(NAME, FILE) == count * MB and store.wrong_sizes(NAME, files) == []

    with store.read_verified(NAME, FILE, files) as source:
        for number in range(count):
            assert source.read(MB) == block(number)
    assert measured() < count
    proxy.bytes = 0
    with store.read_verified(NAME, FILE, files) as source:
        source.seek(40 * MB)
        assert source.read(MB) == block(40)
    assert proxy.bytes < 2 * CHUNK_BYTES


@pytest.mark.slow
def test_a_changed_byte_is_found_where_it_is_read(store: ObjectStore, proxy: FaultProxy):
    there, data = open_checkpoint_store("s3://data/changed"), bytearray(block(0) * 20)
    files = {FILE: integrity.hash_stream(io.BytesIO(bytes(data)))}
    data[12 * MB] ^= 1  # in the second chunk
    store.put(f"changed/{NAME}/{FILE}", bytes(data))
    with pytest.raises(Damaged, match="its bytes do not match"), there.read_verified(NAME, FILE, files) as source:
        assert source.read(MB) == block(0)
        source.seek(11 * MB)
        source.read(1)
    older = {FILE: files[FILE][:2]}  # without digests of chunks: the whole file counts
    with pytest.raises(Damaged, match="its bytes do not match"), there.read_verified(NAME, FILE, older):
        pass
    data[12 * MB] ^= 1
    store.put(f"changed/{NAME}/{FILE}", bytes(data))
    with there.read_verified(NAME, FILE, older) as source:
        source.seek(19 * MB)
        assert source.read() == block(0)
    wrong = {FILE: [7, "", ""]}
    with pytest.raises(Damaged, match=r"has .* bytes where 7"), there.read_verified(NAME, FILE, wrong):
        pass


@pytest.mark.slow
def test_an_upload_that_cannot_be_completed_is_an_error(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote_store, "UPLOAD_PART_BYTES", 5 * MB)
    store = open_checkpoint_store("s3://data/cut", retry_seconds=1.0)
    with pytest.raises(DataError, match="s3://data/cut"), store.write(NAME, FILE) as target:
        target.write(block(0) * 6)
        proxy.set(reset_rate=1.0)
        target.write(block(1) * 6)
    proxy.set()
    assert store.size(NAME, FILE) is None


@pytest.mark.slow
def test_only_what_is_needed_is_read(shards: Path, tmp_path: Path, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch):
    """The model is read without the two moments of the optimizer, which are in the same file."""
    monkeypatch.setattr(integrity, "CHUNK_BYTES", 4096)
    url = "s3://data/needed"
    train(tiny_recipe("mae", shards, tmp_path / "run", "steps=2", "model.dim=128", f"checkpoint.folder={url}"))
    there = open_checkpoint_store(url)
    size = there.size("000000002", FILE)
    assert size is not None and size > 50 * 4096 and verify(f"{url}/000000002") == []
    proxy.bytes = 0
    consolidate(f"{url}/000000002", str(tmp_path / "model.safetensors"))
    assert proxy.bytes < 0.6 * size


@pytest.mark.slow
def test_another_number_of_processes_resumes_from_a_store(shards: Path, tmp_path: Path, proxy: FaultProxy):
    """Two ranks write their shards, through errors of the store; one process reads both."""
    url, common = "s3://data/elastic", ("steps=4", "optim.lr.kind=constant")
    whole, run = tmp_path / "whole", tmp_path / "run"
    path = recipe_file("mae", shards, whole, *common)
    assert wait(ranks(path, 1)) == 0, errors(path)
    path = recipe_file("mae", shards, run, *common, f"checkpoint.folder={url}")
    proxy.set(error_rate=0.05)
    assert wait(ranks(path, 2, "parallel.mode=fsdp2", "steps=2")) == 0, errors(path)
    there = open_checkpoint_store(url)
    assert all(there.size("000000002", f"__{rank}_0.distcp") for rank in range(2))
    assert wait(ranks(path, 1)) == 0, errors(path)
    losses = [[(row["step"], row["loss"]) for row in rows(folder)] for folder in (run, whole)]
    assert [step for step, _ in losses[0]] == [0, 1, 2, 3]
    assert dict(losses[0]) == pytest.approx(dict(losses[1]), rel=3e-5)
