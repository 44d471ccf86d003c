"""Files of other origin: FIFOs, devices, endless lines, malicious tars, JSON and indexes are an error of one line, or
are listed as left out."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from common import untrusted
from common.errors import Damaged, DataError, is_bug, nearest
from data_pipeline.build.sources import tables, text_files
from data_pipeline.build.sources.source_files import as_data_error
from data_pipeline.shards import index
from data_pipeline.shards.manifest import parse_manifest
from data_pipeline.shards.samples import Samples
from data_pipeline.shards.tar_scan import RECORD
from data_pipeline.shards.vocabulary import Vocabulary
from data_pipeline.storage.ranges import with_retries
from data_pipeline.storage.urls import cache_folder
from tests.data.building import make, quiet, reasons
from tests.tars import jpeg, write_tar


def test_fifos_devices_and_sockets_are_left_out(tmp_path: Path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "good.jpg").write_bytes(jpeg())
    os.mkfifo(source / "fifo.jpg")  # opening it waits for a process that writes to it
    (source / "endless.jpg").symlink_to("/dev/zero")  # its stated size is 0 bytes
    left = reasons(make(source, tmp_path / "out"))
    assert left == {"fifo.jpg": "is a FIFO, not a regular file", "endless.jpg": "is a device, not a regular file"}


def test_a_fifo_among_shards_is_an_error(tmp_path: Path):
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(DataError, match=r"0.tar: cannot be read .is a FIFO, not a regular file"):
        index.write(tmp_path, quiet)


def test_the_limit_applies_to_the_bytes_that_are_read(tmp_path: Path):
    assert untrusted.read_binary("/proc/self/status", 1 << 20)  # its stated size is 0
    with pytest.raises(OSError, match=r"more than the 10 bytes"):
        untrusted.read_binary("/proc/self/status", 10)


def test_cyclic_links_are_not_followed_for_ever(tmp_path: Path):
    for here, there in (("a", "b"), ("b", "a")):
        (tmp_path / "in" / here).mkdir(parents=True)
        (tmp_path / "in" / here / "x.jpg").write_bytes(jpeg(ord(here)))
        (tmp_path / "in" / here / "link").symlink_to(tmp_path / "in" / there)
    (tmp_path / "in" / "root").symlink_to("/")  # a folder that contains this one
    assert make(tmp_path / "in", tmp_path / "out")["samples"] == 4  # a/x a/link/x b/x b/link/x


# ---------------------------------------------------------------- tars
def header(name: str, size: int = 0, kind: bytes = b"0") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(records: bytes) -> bytes:
    return header("pax", len(records), b"x") + records.ljust(-(-len(records) // 512) * 512, b"\0")


GOOD = header("0.jpg", 3) + b"abc".ljust(512, b"\0")
END = bytes(1024)


@pytest.mark.parametrize(
    "data",
    [
        pax(b"11 path=a\n\n") * 3000 + GOOD,
        pax(b"11 size=-5\n\n") + GOOD,
        GOOD + header("1.jpg", -512),
        pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n25 GNU.sparse.name=a.jpg\n")
        + header("1.jpg", 512)
        + b"x" * 512,
        pax(b"30 GNU.sparse.map=0,1,x,9999\n\n") + GOOD,
        header("././@LongLink", 1 << 33, b"L") + GOOD,
        pax(b"9" * 5000 + b" path=x\n") + GOOD,
    ],
    ids=["chain", "pax-size", "size", "sparse-header", "sparse-map", "long-name", "length"],
)
def test_invalid_tar_headers_are_an_error_of_one_line(data: bytes, tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(data + END)
    with pytest.raises(DataError, match=r"is not a complete tar file .*header|is not a complete tar file .*member of"):
        index.write(tmp_path / "in", quiet)
    (tmp_path / "in" / "1.tar").write_bytes(header("1.txt", 3) + GOOD[512:] + END)
    assert make(tmp_path / "in", tmp_path / "out")["samples"] == 1  # a build continues with the other tars


def test_a_damaged_header_inside_a_tar_is_an_error(tmp_path: Path):
    write_tar(tmp_path / "0.tar", [(f"{n}.jpg", jpeg(n)) for n in range(3)])
    data = bytearray((tmp_path / "0.tar").read_bytes())
    with tarfile.open(tmp_path / "0.tar") as tar:
        place = tar.getmember("1.jpg").offset
    data[place] ^= 1
    (tmp_path / "0.tar").write_bytes(data)
    with pytest.raises(DataError, match=rf"is not a complete tar file .bad checksum at byte {place}"):
        index.write(tmp_path, quiet)


def test_sparse_members_are_reported(tmp_path: Path):
    sparse = header("1.jpg", 512, b"S")
    (tmp_path / "0.tar").write_bytes(GOOD + sparse + bytes(512) + END)
    said: list[str] = []
    assert index.write(tmp_path, said.append).samples == 1
    assert any("1.jpg: is a sparse file" in line for line in said)


@pytest.mark.parametrize(
    ("label", "name"), [("²", "²"), ("9" * 5000, "9" * 5000), ("1", "dog"), ("٣", "٣"), ("2", "2")]
)
def test_labels_that_are_not_numbers(label: str, name: str, tmp_path: Path):
    write_tar(tmp_path / "0.tar", [("0.jpg", jpeg()), ("0.cls", label.encode())])
    index.write(tmp_path, quiet, {"classes": ["cat", "dog"]})
    assert Samples([str(tmp_path)]).label(0) == name


# ---------------------------------------------------------------- lines
def test_a_line_without_an_end_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_files, "MAX_MEMBER_BYTES", 100)
    (tmp_path / "in").mkdir()
    rows = [json.dumps({"text": word}) for word in ("one", "x" * 5000, "three")]
    (tmp_path / "in" / "t.jsonl").write_text("\n".join(rows) + "\n")
    summary = make(tmp_path / "in", tmp_path / "out")
    assert summary["samples"] == 2 and reasons(summary) == {
        "t.jsonl:2": "holds 5013 bytes, but at most 100 are allowed"
    }
    with untrusted.open_binary(tmp_path / "in" / "t.jsonl") as file:
        assert [size for _, size in untrusted.lines(file, 100)] == [len(row) + 1 for row in rows]


def test_a_list_without_lines_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tables, "FIELD_BYTES", 100)
    (tmp_path / "l.csv").write_text("image,text\n" + "x" * 500)
    with pytest.raises(DataError, match=r"line 2 is longer than 100 characters"):
        make(tmp_path / "l.csv", tmp_path / "out", kind="image-text")


# ---------------------------------------------------------------- JSON
def test_deeply_nested_json():
    assert untrusted.loads("[" * 99 + "]" * 99)
    for text_ in ("[" * 500 + "]" * 500, '{"a":' * 100_000, "[" * 100_000, "9" * 5000):
        with pytest.raises(ValueError):
            untrusted.loads(text_)


@pytest.mark.parametrize(
    ("value", "shape", "said"),
    [
        ({"a": 1}, {"a": int}, ""),
        ({"a": True}, {"a": int}, "a is True, not int"),
        ({"a": 1 << 63}, {"a": int}, f"a is {1 << 63}, not int"),
        ({"a": float("nan")}, {"a": float}, "a is nan, not float"),
        ({}, {"a": int}, "a is missing"),
        ({}, {"?a": int}, ""),
        ([{"b": "x"}], [{"b": int}], "[0].b is 'x', not int"),
        ({"x": None}, {...: (str, None)}, ""),
        ({"x": 1}, {...: (str, None)}, "x is 1, not str"),
        (3, {"a": int}, "it is int, not an object"),
    ],
)
def test_schema_errors_name_the_value(value: object, shape: object, said: str):
    assert untrusted.schema_error(value, shape) == said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shards", [["0.tar", -1, 1, "x"]]),
        ("shards", [["../../0.tar", 9, 1, "x"]]),
        ("shards", [["0.tar", 9, 1]]),
        ("shards", [[0, 9, 1, "x"]]),
        ("shards", {}),
        ("extensions", ["jpg", "jpg"]),
        ("extensions", ["a/b"]),
        ("index", "../i.bin"),
        ("classes", 3),
        ("tokens", {"dtype": "\ud800"}),
        ("dataset", None),
    ],
)
def test_manifests_with_invalid_values(key: str, value: object, shards: Path):
    content = json.loads((shards / "manifest.json").read_text()) | {key: value}
    with pytest.raises(DataError, match=r"m: is not a valid shard manifest .*run `unlabeled shards index` again"):
        parse_manifest(json.dumps(content), "f", "m")


def test_an_index_with_invalid_offsets(tmp_path: Path):
    write_tar(tmp_path / "0.tar", [("0.jpg", jpeg()), ("1.jpg", jpeg(1)), ("2.jpg", jpeg(2))])
    held = index.write(tmp_path, quiet)
    records = np.fromfile(held.index, RECORD)
    records["offset"][:2], records["size"][0] = (1 << 63, 1 << 50), (1 << 32) - 1
    records.tofile(held.index)
    samples = Samples([str(tmp_path)])
    for number in (0, 1):
        with pytest.raises(Damaged, match=r"0 of .* bytes could be read"):
            samples.read(number)
    assert samples.read(2) == {"jpg": jpeg(2)}


TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": {"type": "BPE", "vocab": {"a": 10**12}}}, "the numbers 1000000000000 to 1000000000000"),
        ({"model": {"vocab": {"a": -1}}}, "the numbers -1 to -1"),
        ({"model": {"vocab": {}}}, "the numbers"),
        ({"model": {"vocab": {"a": "0"}}}, "model.vocab.a is '0', not int"),
        ({"added_tokens": [{"id": 0}]}, "added_tokens.* content is missing|added_tokens"),
        ({"model": {"vocab": {"\ud800": 0}}}, "surrogates"),
        ({"pre_tokenizer": 3}, "pre_tokenizer is int"),
        ({"x": json.loads("[" * 200 + "]" * 200)}, "nested more than 100 deep"),
    ],
)
def test_tokenizers_with_invalid_values(change: dict, says: str):
    with pytest.raises(DataError, match=rf"t: is not a valid tokenizer.json .*({says})"):
        Vocabulary.parse(json.dumps(TOKENIZER | change), source="t")
    with pytest.raises(DataError, match=r"is not a valid tokenizer.json \(tokenizer_config.json.bos_token is \[\]"):
        Vocabulary.parse(json.dumps(TOKENIZER), json.dumps({"bos_token": []}), "t")


# ---------------------------------------------------------------- local files and homes
def test_permanent_errors_of_local_files_are_not_retried(tmp_path: Path):
    """The error is raised at once, for example if a folder is expected and a file exists."""
    (tmp_path / "file").write_text("x")
    calls = []

    def read() -> bytes:
        calls.append(1)
        return (tmp_path / "file" / "manifest.json").read_bytes()

    with pytest.raises(DataError, match=r"no such file"):
        with_retries(str(tmp_path / "file" / "manifest.json"), read)
    with pytest.raises(DataError, match=r"cannot be read .Is a directory"):
        with_retries(str(tmp_path), tmp_path.read_bytes)
    assert len(calls) == 1
    with pytest.raises(DataError, match=r"file: is not a complete tar file"):
        Samples([str(tmp_path / "file")])


def test_without_a_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("UNLABELED_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(DataError, match=r"the home folder is not known; set UNLABELED_CACHE=FOLDER"):
        cache_folder("index")
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be made .Not a directory.; set UNLABELED_CACHE"):
        cache_folder("index")


@pytest.mark.parametrize("mode", ["r:", "r|", "r|*"])
def test_a_member_larger_than_its_tar_is_an_error_at_once(mode: str):
    """This is also true for a stream, whose end is not known before it is read."""
    info = tarfile.TarInfo("0.jpg")
    info.size = 1 << 62
    data = io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(20_000))
    tar = untrusted.open_tar(data, mode)
    began = time.monotonic()
    with pytest.raises(tarfile.ReadError, match="unexpected end of data"):
        list(untrusted.tar_members(tar))
    assert time.monotonic() - began < 5


def test_a_bug_in_our_code_is_not_retried_as_an_error_of_the_store():
    """Exceptions of libraries have no common base class, so all of them count as errors of the store, but those of our
    code do not."""
    tries = []

    def bug() -> None:
        tries.append(nearest(None, None))  # type: ignore[arg-type]

    def library() -> None:
        tries.append(json.loads(None))  # type: ignore[arg-type]

    for call in (bug, library):
        with pytest.raises(TypeError) as caught:
            call()
        assert is_bug(caught.value) == (call is bug)
    with pytest.raises(TypeError, match="not iterable"):
        with_retries("s3://bucket/key", bug, seconds=0.0)
    with pytest.raises(TypeError, match="not iterable"), as_data_error("s3://bucket/key"):
        bug()
    with pytest.raises(DataError, match="no answer in 0 seconds and 1 tries"):
        with_retries("s3://bucket/key", library, seconds=0.0, bounded=True)
