"""The cache on disk: it is bounded, deletes first what is needed last, tolerates damaged files, and deletes only files
that it wrote."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from data_pipeline.shards.samples import Samples
from data_pipeline.storage.cache import SUBFOLDER, Cache
from data_pipeline.stream.stream import Reading, Stream
from tests.tars import jpeg, write_tar


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_other_files_in_the_folder_are_not_deleted(tmp_path: Path):
    """Another loader's cache deleted a local source in the cache folder."""
    write_tar(tmp_path / "a.tar", [("0.jpg", jpeg(0))])
    (tmp_path / "0-16").write_bytes(b"named like one of ours")
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    cache = Cache(tmp_path, 1000)
    for n in range(50):
        cache.write("set", 16 * n, 16, bytes(100), next_use=n)
    cache.drop("set", 0)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert all(name.startswith(SUBFOLDER) for name in files(tmp_path) - before.keys())


def test_files_that_are_needed_last_are_deleted_first(tmp_path: Path):
    cache, rng = Cache(tmp_path, 1000), np.random.default_rng(0)
    uses = rng.permutation(40)
    for n, use in enumerate(uses):
        cache.write("set", 10 * n, 10, bytes(100), int(use))
        assert cache.used <= 1000 and sum(p.stat().st_size for p in tmp_path.rglob("*-10")) == cache.used
    kept = {int(p.name.split("-")[0]) // 10 for p in tmp_path.rglob("*-10")}
    assert sorted(uses[n] for n in kept) == list(range(10))  # the ten that are needed next
    soon = min(kept, key=lambda n: uses[n])
    cache.set_next_use("set", 10 * soon, 10_000)
    cache.write("set", 9990, 10, bytes(100), 5)
    assert cache.covers("set", 10 * soon, 1) == [] and cache.covers("set", 9990, 1) == [(9990, 10)]
    cache.write("set", 99990, 10, bytes(2000), 0)  # larger than the limit
    assert cache.used == 1000


def test_a_range_may_span_several_files_but_no_gap(tmp_path: Path):
    cache = Cache(tmp_path, 10_000)
    cache.write("set", 0, 16, b"a", 0)
    cache.write("set", 16, 4, b"b", 0)
    cache.write("set", 24, 8, b"c", 0)
    assert cache.covers("set", 10, 10) == [(0, 16), (16, 4)]
    assert cache.covers("set", 18, 4) == [] and cache.covers("other", 0, 1) == []
    assert cache.covers("set", 24, 8) == [(24, 8)] and cache.covers("set", 24, 9) == []
    assert cache.read("set", 16, 4) == b"b" and cache.read("set", 99, 1) is None


def test_a_folder_is_locked_by_one_process_and_reused_by_the_next(tmp_path: Path):
    code = f"""
from data_pipeline.storage.cache import Cache
cache = Cache({str(tmp_path)!r}, 10_000)
cache.write("set", 0, 16, b"x" * 50, 0)
print(cache.folder.name, flush=True)
input()
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline().strip() == "0"
    assert Cache(tmp_path, 10_000).folder.name == "1"
    child.kill()
    child.wait()
    (tmp_path / SUBFOLDER / "0" / "set" / "16-16.123.partial").write_bytes(b"half")
    taken = Cache(tmp_path, 10_000)
    assert taken.folder.name == "0" and taken.read("set", 0, 16) == b"x" * 50 and taken.used == 50
    assert not list(tmp_path.rglob("*.partial"))
    small = Cache(tmp_path, 40)  # the folder of this process's other cache may be free again or not
    assert small.used <= 40


def test_a_full_disk_does_not_stop_the_run(tmp_path: Path):
    mount = tmp_path / "small"
    mount.mkdir()
    if os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", mount]).returncode == 0:
        try:
            cache = Cache(mount, 1 << 30)
            for n in range(40):
                cache.write("set", 16 * n, 16, bytes(8192), n)
            held = [n for n in range(40) if cache.covers("set", 16 * n, 16)]
            assert 0 < len(held) < 10
            assert all(cache.read("set", 16 * n, 16) == bytes(8192) for n in held)
            os.close(cache._lock_fd)
        finally:
            subprocess.run(["umount", mount], check=True)
    with pytest.raises(
        DataError, match=r"data.fetch.cache = '/proc/x': cannot be used .*; name a folder on a local disk"
    ):
        Cache("/proc/x", 1000)


def test_a_disk_that_becomes_read_only(shards: Path, tmp_path: Path):
    """The bytes are read from the store. (If the stream waited for ever, the test would time out.)"""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30k", "tmpfs", str(disk)], check=True)
    try:
        reading = Reading(workers=0, ahead_mb=0.01, cache=str(disk), cache_gb=1)
        held = Stream(
            Samples([str(shards)]), lambda sample, rng: {"slot": np.int64(sample["slot"])}, 12, reading=reading
        )
        plain = Stream(Samples([str(shards)]), lambda sample, rng: {"slot": np.int64(sample["slot"])}, 12, workers=0)
        for step in range(20):
            if step == 3:
                while subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True).returncode:
                    time.sleep(0.05)  # a file is being written
            assert np.array_equal(next(held)["id"], next(plain)["id"])
        held.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
