"""The cache on disk: bounded, evicts what is needed last, survives what it finds, and touches nothing but its own files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.cache import MARK, Cache
from data_pipeline.storage import DataError
from tests.tars import jpeg, write_tar


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_a_folder_with_the_only_copy_of_the_data_is_safe(tmp_path: Path):
    """Another loader's eviction deleted a local source that lay in the cache folder."""
    write_tar(tmp_path / "a.tar", [("0.jpg", jpeg(0))])
    (tmp_path / "0-16").write_bytes(b"named like one of ours")
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    cache = Cache(tmp_path, 1000)
    for n in range(50):
        cache.write("set", 16 * n, 16, bytes(100), next_use=n)
    cache.drop("set", 0)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert all(name.startswith(MARK) for name in files(tmp_path) - before.keys())


def test_what_is_needed_last_goes_first_and_the_limit_holds(tmp_path: Path):
    cache, rng = Cache(tmp_path, 1000), np.random.default_rng(0)
    uses = rng.permutation(40)
    for n, use in enumerate(uses):
        cache.write("set", 10 * n, 10, bytes(100), int(use))
        assert cache.used <= 1000 and sum(p.stat().st_size for p in tmp_path.rglob("*-10")) == cache.used
    kept = {int(p.name.split("-")[0]) // 10 for p in tmp_path.rglob("*-10")}
    assert sorted(uses[n] for n in kept) == list(range(10))  # the ten that are needed next
    soon = min(kept, key=lambda n: uses[n])
    cache.used_again("set", 10 * soon, 10_000)
    cache.write("set", 9990, 10, bytes(100), 5)
    assert cache.covers("set", 10 * soon, 1) == [] and cache.covers("set", 9990, 1) == [(9990, 10)]
    cache.write("set", 99990, 10, bytes(2000), 0)  # larger than all
    assert cache.used == 1000


def test_ranges_are_put_together_and_gaps_are_seen(tmp_path: Path):
    cache = Cache(tmp_path, 10_000)
    cache.write("set", 0, 16, b"a", 0)
    cache.write("set", 16, 4, b"b", 0)
    cache.write("set", 24, 8, b"c", 0)
    assert cache.covers("set", 10, 10) == [(0, 16), (16, 4)]
    assert cache.covers("set", 18, 4) == [] and cache.covers("other", 0, 1) == []
    assert cache.covers("set", 24, 8) == [(24, 8)] and cache.covers("set", 24, 9) == []
    assert cache.read("set", 16, 4) == b"b" and cache.read("set", 99, 1) is None


def test_the_next_process_finds_it_and_a_living_one_keeps_it_to_itself(tmp_path: Path):
    code = f"""
from data_pipeline.cache import Cache
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
    (tmp_path / MARK / "0" / "set" / "16-16.123.partial").write_bytes(b"half")
    taken = Cache(tmp_path, 10_000)
    assert taken.folder.name == "0" and taken.read("set", 0, 16) == b"x" * 50 and taken.used == 50
    assert not list(tmp_path.rglob("*.partial"))
    small = Cache(tmp_path, 40)  # the folder of the other cache of this process is free again or not: both are right
    assert small.used <= 40


def test_a_full_disk_costs_the_cache_and_not_the_run(tmp_path: Path):
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
            os.close(cache._held)
        finally:
            subprocess.run(["umount", mount], check=True)
    with pytest.raises(
        DataError, match=r"data.fetch.cache = '/proc/x': cannot be used .*; name a folder on a local disk"
    ):
        Cache("/proc/x", 1000)
