"""Samples that are read from shards equal those that tar and webdataset read, or they are reported as damaged."""

from __future__ import annotations

import io
import json
import os
import re
import string
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import Damaged, DataError
from data_pipeline.shards import index, tar_scan
from data_pipeline.shards.dataset import store_manifests
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.members import INDEXED_EXTENSIONS
from data_pipeline.shards.samples import Samples
from data_pipeline.shards.tar_scan import scan
from data_pipeline.storage.urls import find_shards
from launch.local import wait
from tests.data.building import quiet
from tests.forked import Forked
from tests.tars import jpeg, write_tar

anywhere = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def contents(samples: Samples) -> dict[str, dict[str, bytes]]:
    return {samples.name(i)[1]: samples.read(i) for i in range(len(samples))}


def test_errors_of_find_shards(tmp_path: Path, photos: Path, shards: Path):
    with pytest.raises(DataError, match="no such file or folder"):
        find_shards([str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is an empty folder"):
        find_shards([str(tmp_path / "empty")])
    with pytest.raises(DataError, match="holds images but no shards; make them with `unlabeled shards build"):
        find_shards([str(photos)])
    with pytest.raises(DataError, match="matches no file"):
        find_shards([str(tmp_path / "*.tar")])
    with pytest.raises(DataError, match="shards only in sub-folders"):
        find_shards([str(shards.parent)])
    with pytest.raises(DataError, match="cannot be opened"):
        find_shards(["nostore://bucket/x"])
    image = next(photos.rglob("*.jpg"))
    for spec, named in ((image, image.name), (image.parent / "*.jpg", r".*\.jpg"), (shards / "*", "bad.jsonl")):
        with pytest.raises(DataError, match=rf": {named} is no tar; name tars, or a folder of shards or of images"):
            find_shards([str(spec)])
    assert find_shards([str(shards), str(shards / "*.tar")]) == [str(shards / "000000.tar")]


def read_with_others(folder: str, target: str, count: int) -> None:
    """Open the tars of a folder at the same time as `count` - 1 other processes, and write the result and the messages
    to a file."""
    Path(target).with_suffix(".ready").touch()
    while len(list(Path(target).parent.glob("*.ready"))) < count:
        time.sleep(0.001)
    lines: list[str] = []
    samples = Samples([folder], say=lines.append)
    Path(target).write_text(json.dumps([lines, samples.id, samples.read(len(samples) - 1)["txt"].decode()]))


def test_four_ranks_index_shards_once(tmp_path: Path):
    """The ranks of a run open shards without a manifest at the same time, with one cache folder. Only one reads the
    shards."""
    folder, found = tmp_path / "tars", tmp_path / "found"
    folder.mkdir()
    found.mkdir()
    for shard in range(8):
        write_tar(folder / f"{shard}.tar", [(f"{shard}-{n}.txt", f"text {shard} {n}".encode()) for n in range(40)])
    env = {"UNLABELED_CACHE": str(tmp_path / "cache")}
    ranks = [Forked(read_with_others, str(folder), str(found / f"{n}.json"), 4, env=env) for n in range(4)]
    assert wait(ranks) == 0
    lines, ids, texts = zip(*(json.loads((found / f"{n}.json").read_text()) for n in range(4)), strict=True)
    assert len(set(ids)) == 1 and set(texts) == {"text 7 39"}
    assert sum("indexing 8 shards" in line for own in lines for line in own) == 1


def test_scans_may_be_deleted_by_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A process that indexes some of the same shards, as part of another set, deletes its scan files at the end."""
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", [(f"{shard}.txt", b"text")])
    scan_all = index._scan_all

    def scan_and_lose(urls: list[str], *more: Any) -> None:
        scan_all(urls, *more)
        index.index_in_cache(urls[:2], quiet)

    with monkeypatch.context() as patch:
        patch.setattr(index, "_scan_all", lambda *args: (patch.undo(), scan_and_lose(*args))[1])
        samples = Samples([str(tmp_path / "*.tar")], say=quiet)
    assert len(samples) == 3 and samples.read(2) == {"txt": b"text"}


def test_a_file_that_is_not_a_tar(tmp_path: Path, shards: Path):
    bad = tmp_path / "bad.tar"
    bad.write_bytes(b"this is not a tar file" * 100)
    with pytest.raises(DataError, match=r"bad.tar: is not a complete tar file"):
        scan(str(bad))
    bad.write_bytes((shards / "000000.tar").read_bytes()[:20_000])
    with pytest.raises(DataError, match=r"bad.tar: is not a complete tar file"):
        scan(str(bad))
    write_tar(bad, [("a.exe", b"x"), ("b.pkl", b"x")])
    with pytest.raises(DataError, match="no samples; members are read whose names end in"):
        Samples([str(bad)])


def test_samples_without_label_or_image(tmp_path: Path):
    write_tar(tmp_path / "x.tar", [("a/one.jpg", jpeg()), ("a/two.txt", b"words")])
    samples = Samples([str(tmp_path / "x.tar")])
    assert samples.image(0).shape == (64, 64, 3)
    with pytest.raises(DataError, match=r"a/one has no .cls member"):
        samples.label(0)
    with pytest.raises(Damaged, match="holds no image member"):
        samples.image(1)


# ---------------------------------------------------------------- comparison with tar and webdataset
KEYS = st.text(string.ascii_letters + string.digits + "_- äß/", min_size=1, max_size=12).map(
    lambda k: "k" + k.strip("/ ")
)
LONG = st.sampled_from(["", "x" * 90 + "/", "deep/" * 60])
EXTENSIONS = st.sampled_from(["jpg", "cls", "json", "txt", "JPG", "seg.png", "pkl", "png"])


@given(
    samples=st.dictionaries(
        st.tuples(LONG, KEYS).map("".join),
        st.dictionaries(EXTENSIONS, st.binary(max_size=1500), min_size=1, max_size=4),
        max_size=8,
    ),
    format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    padding=st.integers(0, 3),
)
@anywhere
def test_reads_what_webdataset_and_tarfile_read(samples, format, padding, tmp_path_factory):
    folder = tmp_path_factory.mktemp("same")
    members = []
    for key, parts in samples.items():
        lowered = {e.lower(): (e, data) for e, data in parts.items()}  # "jpg" and "JPG" are the same extension
        members += [(f"{key}.{e}", data) for e, data in lowered.values()]
    write_tar(folder / "a.tar", members, format)
    with (folder / "a.tar").open("ab") as file:
        file.write(bytes(10240 * padding))
    expected = {
        sample["__key__"]: {e: data for e, data in sample.items() if e in INDEXED_EXTENSIONS}
        for sample in webdataset.WebDataset(str(folder / "a.tar"), shardshuffle=False, empty_check=False)
    }
    for sample in webdataset.WebDataset(str(folder / "a.tar"), shardshuffle=False, empty_check=False):
        if "seg.png" in sample and not {"jpg", "png", "txt"} & sample.keys():  # it can only be the sample's image
            expected[sample["__key__"]]["png"] = sample["seg.png"]
    expected = {key: parts for key, parts in expected.items() if parts}
    if not expected:
        with pytest.raises(DataError, match="no samples"):
            Samples([str(folder / "a.tar")])
        return
    ours = Samples([str(folder / "a.tar")])
    assert contents(ours) == expected
    with tarfile.open(folder / "a.tar") as tar:
        by_tar = {m.name: tar.extractfile(m).read() for m in tar if m.isreg()}
    assert all(data in by_tar.values() for parts in expected.values() for data in parts.values())


def test_names_with_several_dots_are_indexed_or_reported(tmp_path: Path):
    """Members whose names webdataset splits in another way than intended are reported."""
    write_tar(
        tmp_path / "a.tar",
        [("00.05.jpg", b"a"), ("00.05.cls", b"1"), ("01.05.jpg", b"b"), ("x.input.jpg", b"c"), ("x.json", b"{}")],
    )
    samples = Samples([str(tmp_path / "a.tar")])
    assert [samples.read(n) for n in range(3)] == [
        {"jpg": b"a", "cls": b"1"},
        {"jpg": b"b"},
        {"jpg": b"c", "json": b"{}"},
    ]
    folder = tmp_path / "b"
    folder.mkdir()
    mixed = [("y.input.jpg", b"d"), ("y.target.jpg", b"e"), ("z.jpg", b"f"), ("z.seg.png", b"g"), ("z.pkl", b"h")]
    write_tar(folder / "b.tar", [*mixed, ("LICENSE", b"i"), ("._z.jpg", b"j")])
    said: list[str] = []
    held = index.write(folder, said.append)
    assert held.samples == 1 and Samples([str(folder)]).read(0) == {"jpg": b"f"}
    dots = "several dots in the name, and other members beside it"
    assert held.left_out == load_manifest(str(folder)).left_out == {
        dots: [3, "b.tar/y.input.jpg"],
        ".pkl is not an ending that is read": [1, "b.tar/z.pkl"],
        "its name has no key or no ending": [2, "b.tar/LICENSE"],
    }  # fmt: skip
    assert f"{folder}: left out: 3 members, for example b.tar/y.input.jpg: {dots}" in said
    assert any("unpack the tars and run `unlabeled shards build`" in line for line in said)
    assert "left_out" in (folder / "manifest.json").read_text()
    write_tar(folder / "b.tar", mixed[:2])
    with pytest.raises(DataError, match=r"no samples; .* left out: 2 members like b.tar/y.input.jpg \(several dots"):
        index.write(folder, quiet)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no samples; .* left out: 2 members like .*b.tar/y.input.jpg"):
        Samples([str(folder)])
    write_tar(folder / "b.tar", mixed[2:3])
    index.write(folder, quiet)
    assert "left_out" not in (folder / "manifest.json").read_text()  # the key is written only if members are left out
    write_tar(folder / "b.tar", [("z.jpg", b"f"), ("\udc80.p\udcff", b"g")])  # bytes that are not UTF-8
    assert index.write(folder, quiet).left_out == load_manifest(str(folder)).left_out == {
        ".p\\udcff is not an ending that is read": [1, "b.tar/\\udc80.p\\udcff"]
    }  # fmt: skip


def test_tars_of_other_tools(tmp_path: Path):
    """The output of GNU tar, with folders, links and a file that is not a member of a sample."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("a.jpg", "a.txt", "sub/b.jpg", "notes"):
        (tmp_path / "in" / name).write_bytes(name.encode() * 200)
    (tmp_path / "in" / "c.jpg").symlink_to("a.jpg")
    subprocess.run(["tar", "-cf", tmp_path / "t.tar", "--sort=name", "-C", tmp_path / "in", "."], check=True)
    assert {
        key.removeprefix("./"): sorted(parts) for key, parts in contents(Samples([str(tmp_path / "t.tar")])).items()
    } == {
        "a": ["jpg", "txt"],
        "sub/b": ["jpg"],
    }


# ---------------------------------------------------------------- damage
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@anywhere
def test_any_flipped_bit_of_a_sample_is_detected(at: float, bit: int, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flip")
    write_tar(folder / "a.tar", [(f"{i}.{e}", jpeg(i, 16) + e.encode()) for i in range(4) for e in ("jpg", "txt")])
    manifest = index.write(folder)
    before = contents(Samples([str(folder)]))
    data = bytearray((folder / "a.tar").read_bytes())
    data[int(at * len(data))] ^= 1 << bit
    (folder / "a.tar").write_bytes(data)
    samples, damaged = Samples([str(folder)]), 0
    for i in range(4):
        try:
            assert samples.read(i) == before[str(i)]
        except Damaged as reason:
            damaged += 1
            assert "not those that were indexed" in str(reason)
    assert damaged <= 1
    assert len(index.verify(folder)) == 1  # also in a header or in the padding
    assert manifest.samples == 4


@given(keep=st.floats(0, 1, exclude_max=True))
@anywhere
def test_a_truncated_shard_is_refused_by_the_index_and_damaged_for_the_reader(keep: float, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    write_tar(folder / "a.tar", [(f"{i}.jpg", jpeg(i, 16)) for i in range(6)])
    index.write(folder)
    before = contents(Samples([str(folder)]))
    open_before = Samples([str(folder)])
    whole = (folder / "a.tar").read_bytes()
    size = int(keep * len(whole.rstrip(b"\0")))  # the rest is padding
    (folder / "a.tar").write_bytes(whole[:size])
    with pytest.raises(DataError, match="has another size since the manifest was written; run `unlabeled shards index"):
        Samples([str(folder)])
    for i in range(6):  # as in a run that has already opened the shards
        try:
            assert open_before.read(i) == before[str(i)]
        except Damaged as reason:
            assert "bytes could be read" in str(reason)
    with pytest.raises(DataError, match="is not a complete tar file"):
        scan(str(folder / "a.tar"))


def test_no_incomplete_or_mixed_samples(tmp_path: Path):
    """For a truncated shard, webdataset gives an incomplete sample, and if the next shard begins with the same key, the
    label of one sample with the image of the other."""
    write_tar(tmp_path / "a.tar", [("x.cls", b"1"), ("x.jpg", b"A" * 3000)])
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:2500])
    write_tar(tmp_path / "b.tar", [("x.jpg", b"B" * 3000)])
    urls = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False, handler=webdataset.ignore_and_continue))
    assert {"cls": b"1", "jpg": b"B" * 3000}.items() <= theirs[0].items()  # the error of webdataset
    with pytest.raises(DataError, match=r"a.tar: is not a complete tar file"):
        Samples(urls)


def test_damaged_bytes_are_refused_at_every_start(tmp_path: Path):
    """streaming raises once for a wrong checksum, and reads the same file without a check at the next start."""
    write_tar(tmp_path / "a.tar", [("0.jpg", jpeg(0)), ("1.jpg", jpeg(1))])
    index.write(tmp_path)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[1500] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    for _ in range(3):
        samples = Samples([str(tmp_path)])
        with pytest.raises(Damaged, match="not those that were indexed"):
            samples.read(0)
        assert samples.read(1)["jpg"] == jpeg(1)


def test_repeated_keys_and_members(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [("0.jpg", b"a"), ("0.jpg", b"b"), ("1.jpg", b"c"), ("0.txt", b"d")])
    shard = scan(str(tmp_path / "a.tar"))
    assert shard.keys == ["0", "1"]
    assert shard.problems == [
        "0.jpg: occurs twice in the sample; the first one is used",
        "0.txt: the key 0 occurs twice in the shard; left out",
    ]
    said: list[str] = []
    index.write(tmp_path, say=said.append)
    assert len(said) == 2 and Samples([str(tmp_path)]).read(0) == {"jpg": b"a"}


# ---------------------------------------------------------------- manifest
def test_the_content_of_a_manifest(tmp_path: Path):
    for name in ("b", "a"):
        write_tar(
            tmp_path / f"{name}.tar", [(f"{name}{i}.jpg", jpeg(i, 16)) for i in range(3)] + [(f"{name}2.cls", b"1")]
        )
    manifest = index.write(tmp_path, extra={"classes": ["cat", "dog"]})
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert (content["samples"], content["extensions"], content["classes"]) == (6, ["jpg", "cls"], ["cat", "dog"])
    assert [row[0] for row in content["shards"]] == manifest.names == ["a.tar", "b.tar"]
    assert content["bytes"] == sum(p.stat().st_size for p in tmp_path.glob("*.tar"))
    samples = Samples([str(tmp_path)])
    assert [samples.name(i)[1] for i in range(6)] == ["a0", "a1", "a2", "b0", "b1", "b2"] and samples.label(5) == "dog"
    some = Samples([str(tmp_path / "b.tar")])
    assert len(some) == 3 and some.id != samples.id and some.name(0)[1] == "b0" and some.label(2) == "dog"
    assert index.verify(tmp_path) == []
    again = index.write(tmp_path)
    assert again.id == manifest.id and again.classes == ["cat", "dog"]
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for path in tmp_path.glob("*.*"):
        (copy / path.name).write_bytes(path.read_bytes())
    assert Samples([str(copy)]).id == samples.id  # for any location of the shards


def test_new_missing_and_changed_shards_are_errors(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [("0.jpg", jpeg(0))])
    index.write(tmp_path)
    write_tar(tmp_path / "b.tar", [("1.jpg", jpeg(1))])
    with pytest.raises(DataError, match=r"b.tar is new since the manifest was written; run `unlabeled shards index"):
        Samples([str(tmp_path)])
    with pytest.raises(DataError, match=r"b.tar is new since the manifest was written"):
        Samples([f"local://{tmp_path}"])
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path), f"/{tmp_path.name}-new", recursive=True)
    with pytest.raises(
        DataError, match=r"b.tar is new since the manifest was written; run `unlabeled shards index mem"
    ):
        Samples([f"memory://{tmp_path.name}-new/*.tar"])
    index.write(tmp_path)
    samples = Samples([str(tmp_path)])
    assert len(samples) == 2 and [samples.read(n)["jpg"] for n in range(2)] == [jpeg(0), jpeg(1)]
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DataError, match=r"a.tar is gone since"):
        Samples([str(tmp_path)])


def test_an_invalid_manifest(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [("0.jpg", jpeg(0))])
    for content in ("not json", "{}", '{"format": 99}', "[]", '{"format": 2, "photos": ["a"]}'):  # of somebody else
        (tmp_path / "manifest.json").write_text(content)
        for read in (lambda: Samples([str(tmp_path)]), lambda: index.write(tmp_path)):
            with pytest.raises(
                DataError, match=r"manifest\.json: was not written by `unlabeled shards index`; move it"
            ):
                read()
        assert (tmp_path / "manifest.json").read_text() == content and not list(tmp_path.glob("index-*"))
    (tmp_path / "manifest.json").unlink()
    index.write(tmp_path)
    whole = (tmp_path / "manifest.json").read_text()
    no_hash = re.sub(r'"index_hash": "\w+"', '"index_hash": "../../x"', whole)  # it becomes a name in the cache
    assert no_hash != whole
    # of ours, or of another version
    for content in ("", whole[:60], no_hash, whole.replace('"format": 1', '"format": 99')):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(DataError, match="run `unlabeled shards index` again"):
            Samples([str(tmp_path)])
        index.write(tmp_path)
        assert (tmp_path / "manifest.json").read_text() == whole
    next(tmp_path.glob("index-*.bin")).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"holds 1 bytes instead of 20; run `unlabeled shards index {tmp_path}` again"):
        Samples([str(tmp_path)]).read(0)


def test_an_index_that_is_truncated_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """For a memory-mapped file, this would be a SIGBUS. The advice depends on where the index is."""
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))
    write_tar(tmp_path / "a.tar", [(f"{n}.jpg", jpeg(n)) for n in range(3)])
    cached = Samples([str(tmp_path / "a.tar")])
    index.write(tmp_path)
    own = Samples([str(tmp_path)])
    (copy,) = (tmp_path / "cache" / "index").glob("*/index-*.bin")
    (file,) = tmp_path.glob("index-*.bin")
    todo = {
        copy: f"delete {copy.parent}, which the next start creates again",
        file: f"run `unlabeled shards index {tmp_path}` again",
    }
    for samples, path in ((cached, copy), (own, file)):
        assert samples.read(2)
        os.truncate(path, 30)
        with pytest.raises(DataError, match=f"{path}: holds 30 bytes instead of 60; {todo[path]}"):
            samples.read(2)


def test_a_stopped_index_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))
    for n in range(4):
        write_tar(tmp_path / f"{n}.tar", [(f"{n}.jpg", jpeg(n))])
    (tmp_path / "3.tar").write_bytes((tmp_path / "3.tar").read_bytes()[:5000])
    with pytest.raises(DataError, match=r"3.tar: is not a complete tar file"):
        index.write(tmp_path, workers=2)
    assert not (tmp_path / "manifest.json").exists()
    assert len(list((tmp_path / "cache" / "scans").glob("*.npz"))) == 3
    (tmp_path / "3.tar").unlink()
    scanned = []
    monkeypatch.setattr(tar_scan, "scan", lambda url, further: scanned.append(url))
    assert index.write(tmp_path).samples == 3 and scanned == []


@pytest.mark.slow
def test_a_run_refuses_other_data_and_names_the_difference(tmp_path: Path):
    def samples(*shards: tuple[str, int]) -> list[Samples]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, count in shards:
            write_tar(folder / name, [(f"{name[0]}{i}.jpg", jpeg(i, 16)) for i in range(count)])
        index.write(folder)
        return [Samples([str(folder)])]

    run = tmp_path / "run"
    store_manifests(samples(("a.tar", 3), ("b.tar", 2)), run)
    store_manifests(samples(("a.tar", 3), ("b.tar", 2)), run)  # the same shards in another folder
    for other, difference in [
        ([("a.tar", 3)], r"0/b.tar does not exist any more \(2 shards before, 1 now\)"),
        ([("a.tar", 3), ("b.tar", 1)], r"0/b.tar had 2 samples in \d+ bytes, now 1 samples in"),
        ([("a.tar", 3), ("b.tar", 2), ("c.tar", 1)], r"0/c.tar is new"),
    ]:
        with pytest.raises(DataError, match=difference):
            store_manifests(samples(*other), run)


def test_nothing_is_unpickled(tmp_path: Path):
    """A member that would execute code when it is unpickled is not read."""
    evil = b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR."
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    write_tar(tmp_path / "a.tar", [("0.pkl", evil), ("0.pyd", evil), ("1.npy", buffer.getvalue()), ("1.pth", evil)])
    samples = Samples([str(tmp_path / "a.tar")])
    assert samples.extensions == ["npy"] and len(samples) == 1
    with pytest.raises(Damaged):
        samples.image(0)
    assert not (tmp_path / "owned").exists()
    listed = subprocess.run(
        [
            "grep",
            "-rnE",
            r"import pickle|pickle\.load|allow_pickle=True|shell=True|os\.system|popen\(",
            "data_pipeline",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert listed.stdout == ""


def test_keys_are_not_used_as_paths(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [("../../etc/evil.jpg", jpeg(0)), ("/abs/olute.jpg", jpeg(1))])
    samples = Samples([str(tmp_path / "a.tar")])
    assert {samples.name(i)[1] for i in range(len(samples))} <= {"../../etc/evil", "/abs/olute"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]


def test_importing_the_index_needs_no_torch():
    code = "import sys, data_pipeline.stream.prefetch_server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
