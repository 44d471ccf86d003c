"""Every kind of source, from files to samples; rows that cannot be used are listed."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import Damaged, DataError
from data_pipeline.build import contact_sheet, stats
from data_pipeline.build.build_shards import describe
from data_pipeline.build.sources import text_files, video_frames
from data_pipeline.build.sources.source import MAX_NAME_BYTES, Options, safe_name, to_json
from data_pipeline.build.sources.source_files import Tree
from data_pipeline.build.sources.text_files import Text
from data_pipeline.formats.pixel_maps import MASKS, read_map
from data_pipeline.formats.videos import EncodedVideo
from data_pipeline.shards import index
from data_pipeline.shards.members import MEMBER_NAME
from data_pipeline.shards.samples import Samples
from tests.data.building import make, reasons, samples_of
from tests.tars import jpeg, write_tar


# ---------------------------------------------------------------- names and labels
def test_names_are_keys(tmp_path: Path):
    names = [
        "a/same.jpg",
        "b/same.jpg",
        "b/with.dots. and spaces.JPG",
        "b/größe 猫.jpg",
        "b/" + "long" * 50 + ".jpg",
        "b/-.jpg",
    ]
    for i, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(jpeg(i))
    (tmp_path / "in" / "b" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / ".hidden.jpg").write_bytes(b"not looked at")
    assert make(tmp_path / "in", tmp_path / "out")["samples"] == len(names)
    read = samples_of(tmp_path / "out")
    assert {json.loads(s["json"])["path"]: s["jpg"] for s in read} == {n: jpeg(i) for i, n in enumerate(names)}
    keys = [s["__key__"].partition("-")[2] for s in read]
    assert keys.count("same") == 2 and "with_dots_and_spaces" in keys and "größe_猫" in keys
    assert len(max(keys, key=len)) == MAX_NAME_BYTES and len(Samples([str(tmp_path / "out")])) == len(names)


@given(st.text(st.characters(codec=None)))
def test_any_text_gives_a_safe_name(text: str):
    name = safe_name(text)
    assert name and 0 < len(name.encode()) <= MAX_NAME_BYTES and re.fullmatch(r"[\w-]+", name)
    match = MEMBER_NAME.match(f"0000001-{name}.jpg")
    assert match and match.groups() == (f"0000001-{name}", "jpg")


def test_json_is_strict():
    written = to_json({"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": b"x", 1: None}, "e": "猫\udcff"})
    assert json.loads(written, parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.5, None],
        "c": {"1": None},
        "e": "猫\udcff",
    }


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_labels_from_a_list(tmp_path: Path, kind: str):
    source, labels = tmp_path / "in", tmp_path / f"labels.{kind}"
    rows = [("x/a, b.jpg", 'cat "small"'), ("x/ü.jpg", "狗"), ("d.jpg", "狗"), ("missing.jpg", "狗")]
    for i, name in enumerate(["x/a, b.jpg", "x/ü.jpg", "x/c.jpg", "x/d.jpg"]):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(jpeg(i))
    with labels.open("w", newline="", encoding="utf-8-sig" if kind == "csv" else "utf-8") as file:
        if kind == "jsonl":
            file.writelines(json.dumps({"key": p.removesuffix(".jpg"), "class": c}) + "\n" for p, c in rows)
        else:
            csv.writer(file, delimiter="\t" if kind == "tsv" else ",").writerows([("path", "label"), *rows])
    summary = make(source, tmp_path / "out", labels=str(labels))
    assert summary["classes"] == ['cat "small"', "狗"]
    got = {json.loads(s["json"])["path"]: s.get("cls") for s in samples_of(tmp_path / "out")}
    assert got == {"x/a, b.jpg": b"0", "x/ü.jpg": b"1", "x/d.jpg": b"1", "x/c.jpg": None}
    (missing,) = summary["bad"]
    assert missing["path"].startswith("missing") and "does not exist" in missing["reason"]
    assert summary["notes"] == [f"1 files have no row in {labels} and get no label: x/c.jpg"]


@pytest.mark.parametrize("options", [{}, {"tile": 32}], ids=["images", "tiles"])
def test_other_columns_of_a_list_of_labels_are_fields(tmp_path: Path, options: dict[str, Any]):
    """Patients and sites come into the .json member, from which the protocol `group` reads them; empty cells do not."""
    (tmp_path / "in").mkdir()
    for i, name in enumerate(("a", "b", "c")):
        (tmp_path / "in" / f"{name}.jpg").write_bytes(jpeg(i, 48))
    rows = ["path,label,patient,site,top", "a.jpg,cat,7,north,x", "b.jpg,dog,,south,x"]
    (tmp_path / "l.csv").write_text("\n".join(rows))
    make(tmp_path / "in", tmp_path / "out", labels=str(tmp_path / "l.csv"), **options)
    facts = {"left": 0, "top": 0} if options else {}
    got = [(json.loads(s["json"]), s.get("cls")) for s in samples_of(tmp_path / "out")]
    assert got == [
        ({"patient": "7", "site": "north", "top": "x", "path": "a.jpg"} | facts, b"0"),
        ({"site": "south", "top": "x", "path": "b.jpg"} | facts, b"1"),
        ({"path": "c.jpg"} | facts, None),
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("l.csv", b"path,label\na.jpg,x,y\n", "line 2 has 3 fields, but the first line names 2"),
        ("l.csv", b"path,label\na.jpg,\n", "line 2 has no label"),
        ("l.csv", b"path,label\na.jpg,1\na.jpg,2\n", "line 3 gives a.jpg the label 2, but it has 1"),
        ("l.csv", b"path,species\na.jpg,1\n", "has no field for the label .*; its fields: path, species. Name one with --label-field"),
        ("l.csv", b'path,label\n"a.jpg,1\n', "line 2 is not valid CSV"),
        ("l.csv", b"path,label\n\xff\xfe,1\n", "is not UTF-8"),
        ("l.csv", b"path,path\na,b\n", "names a column twice"),
        ("l.csv", b"path,label\nz.jpg,1\n", "names none of the 1 files, for example a.jpg; its own names are like z.jpg"),
        ("l.csv", b"", "is an empty list"),
        ("l.jsonl", b"{}\n[1]\n", "has no field for the path"),
        ("l.jsonl", b'{"path": \n', "line 1 is not valid JSON"),
        ("l.xml", b"", "is not a list"),
    ],
)  # fmt: skip
def test_unreadable_lists(tmp_path: Path, name: str, content: bytes, says: str):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(jpeg())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        make(tmp_path / "in", tmp_path / "out", labels=str(tmp_path / name))
    assert "\n" not in str(error.value) and name in str(error.value) and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- text
def test_text_from_jsonl(tmp_path: Path):
    rows = [
        '{"text": "one", "id": 7, "score": NaN}', "", '{"text": "zwei ü\\n猫"}', "{broken", "[1]",
        '{"text": "  "}', '{"title": 3}', '{"text": 4}', '{"text": "\\ud800"}',
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_bytes("\n".join(rows).encode() + b"\n\xff\xff")
    summary = make(tmp_path / "rows.jsonl", tmp_path / "out")
    read = samples_of(tmp_path / "out")
    assert [s["txt"].decode() for s in read] == ["one", "zwei ü\n猫"]
    assert json.loads(read[0]["json"]) == {"id": 7, "score": None} and "json" not in read[1]
    bad = reasons(summary)
    assert set(bad) == {f"rows.jsonl:{n}" for n in (4, 5, 6, 7, 8, 9, 10)}
    assert "is not valid JSON" in bad["rows.jsonl:4"] and "is not UTF-8" in bad["rows.jsonl:10"]
    assert bad["rows.jsonl:6"] == "its text is empty" and bad["rows.jsonl:8"] == "its text is int"
    with pytest.raises(
        DataError, match=r"has no field 'body'; its fields: text, id, score, title. Name one with --text-field"
    ):
        make(tmp_path / "rows.jsonl", tmp_path / "out2", text_field="body")


def test_the_field_of_the_text_is_chosen_per_file_and_reported(tmp_path: Path):
    lines = [
        '{"id": 1}',
        '{"title": "T", "content": "one"}',
        '{"title": "only a title"}',
        '{"title": "U", "content": "two"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    summary = make(tmp_path / "a.jsonl", tmp_path / "out")
    read = samples_of(tmp_path / "out")
    assert [(s["txt"], json.loads(s["json"])) for s in read] == [(b"one", {"title": "T"}), (b"two", {"title": "U"})]
    assert summary["notes"] == ["the text is the field content (of 1 files); --text-field NAME chooses another"]
    assert reasons(summary) == {"a.jsonl:1": "its text is missing", "a.jsonl:3": "its text is missing"}
    (tmp_path / "b.jsonl").write_text('{"n": 0}\n{"data": {"text": "in", "n": 1}}\n')
    with pytest.raises(DataError, match=r"Name one with --text-field, for example --text-field data\.text$"):
        make(tmp_path / "b.jsonl", tmp_path / "nested")
    make(tmp_path / "b.jsonl", tmp_path / "nested", text_field="data.text")
    (one,) = samples_of(tmp_path / "nested")
    assert (one["txt"], json.loads(one["json"])) == (b"in", {"data": {"n": 1}})
    parquet(tmp_path / "c.parquet", {"data": [{"text": "in", "n": 1}]})
    make(tmp_path / "c.parquet", tmp_path / "columns", text_field="data.text")
    assert [s["txt"] for s in samples_of(tmp_path / "columns")] == [b"in"]
    with pytest.raises(DataError, match=r"has no field 'data.words'; its fields: n"):
        make(tmp_path / "b.jsonl", tmp_path / "x", text_field="data.words")


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "json", "lines.json", "json.gz", "txt.gz"])
def test_packed_text_and_json(tmp_path: Path, ending: str):
    import pyarrow

    texts = [f"text {i} ü" for i in range(40)]
    lines = "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)).encode()
    if ending in ("json", "json.gz"):
        lines = json.dumps([{"text": text, "n": i} for i, text in enumerate(texts)] + [3], indent=1).encode()
    if ending.startswith("txt"):
        lines = "\n".join(texts).encode()
    if ending.endswith("gz"):
        lines = gzip.compress(lines)
    if ending.endswith("zst"):
        lines = pyarrow.Codec("zstd").compress(lines, asbytes=True)
    (tmp_path / f"in.{ending}").write_bytes(lines)
    options = {"lines": True} if ending.startswith("txt") else {}
    summary = make(tmp_path / f"in.{ending}", tmp_path / "out", 0.04, **options)  # with several pieces
    assert summary["shards"] > 1 and [s["txt"].decode() for s in samples_of(tmp_path / "out")] == texts
    if ending == "json":
        assert reasons(summary) == {"in.json:41": "holds int, not a JSON object"}
        (tmp_path / "in.json").write_text('{\n "a": [1]\n}')
        with pytest.raises(DataError, match="holds neither an array nor an object per line; `jq -c"):
            make(tmp_path / "in.json", tmp_path / "x")
    if ending == "jsonl.gz":
        (tmp_path / f"in.{ending}").write_bytes(lines[:-20])
        with pytest.raises(DataError, match="none of its 1 samples can be used"):
            make(tmp_path / f"in.{ending}", tmp_path / "x")


def test_any_text_file_with_kind_text(tmp_path: Path):
    for name, data in (
        ("a.md", b"# one"),
        ("b.py", b"two = 2"),
        ("README", b"three"),
        ("c.jpg", jpeg()),
        ("d.bin", b"\xff\xfe"),
    ):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    summary = make(tmp_path / "in", tmp_path / "out", kind="text")
    assert [s["txt"] for s in samples_of(tmp_path / "out")] == [b"three", b"# one", b"two = 2"]
    assert list(reasons(summary)) == ["d.bin"] and summary["unread"] == {"jpg": 1}
    (tmp_path / "in" / "c.jpg").unlink()
    with pytest.raises(DataError, match=r"holds no source of shards .* --kind text takes any text file"):
        make(tmp_path / "in", tmp_path / "x")


def test_errors_name_a_command_that_works(tmp_path: Path):
    source = tmp_path / "in"
    for name in ("x/a.jpg", "y/a.jpg"):
        (source / name).parent.mkdir(parents=True)
        (source / name).write_bytes(jpeg())
    (tmp_path / "l.csv").write_text("path,label\na.jpg,cat\n")
    with pytest.raises(
        DataError, match=r"names a.jpg, but y/a.jpg and one in x are both files with this name; write paths below"
    ):
        make(source, tmp_path / "x", labels=str(tmp_path / "l.csv"))
    write_tar(tmp_path / "t.tar", [("0.jpg", jpeg())])
    (tmp_path / "t.tar.gz").write_bytes(gzip.compress((tmp_path / "t.tar").read_bytes()))
    for call in (lambda: make(tmp_path / "t.tar.gz", tmp_path / "x"), lambda: Samples([str(tmp_path / "t.tar.gz")])):
        with pytest.raises(DataError, match=r"unpack it first, `gunzip .*t.tar.gz`"):
            call()


def test_text_from_files_and_lines(tmp_path: Path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.txt").write_text("first\n\nsecond ü\n", encoding="utf-8-sig")
    (source / "b.txt").write_bytes(b"caf\xe9")
    summary = make(source, tmp_path / "whole")
    assert [s["txt"].decode() for s in samples_of(tmp_path / "whole")] == ["first\n\nsecond ü\n"]
    assert reasons(summary) == {"b.txt": "is not UTF-8 (unexpected end of data at byte 3)"}
    summary = make(source, tmp_path / "lines", lines=True)
    read = samples_of(tmp_path / "lines")
    assert [(s["__key__"], s["txt"].decode()) for s in read] == [("0000000-a", "first"), ("0000002-a", "second ü")]
    assert list(reasons(summary)) == ["b.txt:1"]


def test_text_between_separators_and_other_encodings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tmp_path / "in"
    source.mkdir()
    documents = ["one\ntwo ü", "three <|end", "x" * 5000, "four"]
    (source / "a.txt").write_text("\n<|endoftext|>\n".join(documents) + "<|endoftext|>\n", encoding="utf-8-sig")
    for chunk in (7, 1 << 20):
        monkeypatch.setattr(text_files, "READ_BYTES", chunk)
        held = Text(Tree(str(source)), Options(separator="<|endoftext|>"), 2000)
        survey = held.survey("a.txt")
        assert len(survey["blocks"]) > 1  # cut between documents
        entries = [entry for block in held.blocks({"a.txt": survey}) for entry in held.entries(block.piece)]
        read = [entry.members["txt"].decode() for entry in entries if entry]
        assert read == documents and len(entries) == sum(block.rows for block in held.blocks({"a.txt": survey}))
    monkeypatch.setattr(text_files, "MAX_MEMBER_BYTES", 4000)
    monkeypatch.setattr(text_files, "READ_BYTES", 1000)
    assert "no separator in 49" in held.survey("a.txt")["bad"][0][1]
    (source / "a.txt").unlink()
    for name, encoding in (("b", "utf-16"), ("c", "utf-32"), ("d", "utf-8-sig")):
        (source / f"{name}.txt").write_text("naïve 語\n", encoding=encoding)
    assert make(source, tmp_path / "out")["samples"] == 3
    assert {s["txt"].decode() for s in samples_of(tmp_path / "out")} == {"naïve 語\n"}
    assert (
        "is UTF-16; write it as UTF-8: iconv -f UTF-16"
        in reasons(make(source, tmp_path / "lines", lines=True))["b.txt:1"]
    )
    with pytest.raises(DataError, match="--lines and --separator: write only one"):
        make(source, tmp_path / "never", lines=True, separator="x")


def test_errors_for_other_formats_name_a_command_that_converts_them(tmp_path: Path):
    import pyarrow as pa

    def command(source: Path) -> str:
        with pytest.raises(DataError) as error:
            make(source, tmp_path / "never")
        return str(error.value)

    for name in ("chat", "turns", "arrow", "wet"):
        (tmp_path / name).mkdir()
    chat = [{"messages": [{"role": "user", "content": "Ahoi?"}, {"role": "assistant", "content": "Ahoi."}]}]
    (tmp_path / "chat" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    turns = [{"conversations": [{"from": "human", "value": "Ahoi?"}, {"from": "gpt", "value": "Ahoi."}]}]
    (tmp_path / "turns" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    table = pa.table({"text": ["Ahoi?"]})
    with pa.OSFile(str(tmp_path / "arrow" / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "wet" / "a.wet.gz").write_bytes(b"")
    for name, expected in (
        ("chat", "user: Ahoi?\nassistant: Ahoi."),
        ("turns", "human: Ahoi?\ngpt: Ahoi."),
        ("arrow", "Ahoi?"),
    ):
        line = command(tmp_path / name)
        told = line.partition("and then build ")[2].partition(": ")[0]  # the folder holds the chats still
        line = line[line.index("python -c") :].replace("python", sys.executable, 1)
        subprocess.run(line, shell=True, check=True)
        made = next(path for path in (tmp_path / name).iterdir() if path.name.count(".") == 2)
        assert told == ("" if name == "arrow" else str(made))
        assert make(made, tmp_path / f"{name}-shards")["samples"] == 1
        assert samples_of(tmp_path / f"{name}-shards")[0]["txt"].decode() == expected
    wet = command(tmp_path / "wet")
    assert f"holds .wet files, which this command converts to text: zcat {tmp_path}/wet/a.wet.gz | python -c" in wet
    compile(wet.split('"')[1], "wet", "exec")


def parquet(path: Path, columns: dict[str, Any], group: int = 1000, metadata: dict | None = None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=group)


def test_text_from_parquet(tmp_path: Path):
    texts = [f"text {i} ü" for i in range(100)]
    parquet(tmp_path / "in" / "a.parquet", {"content": [*texts[:60], None], "n": [*range(60), 0]}, group=7)
    parquet(tmp_path / "in" / "b.parquet", {"content": texts[60:], "n": list(range(60, 100))}, group=100)
    (tmp_path / "in" / "c.parquet").write_bytes((tmp_path / "in" / "a.parquet").read_bytes()[:-9])
    summary = make(tmp_path / "in", tmp_path / "out", 0.1)
    read = samples_of(tmp_path / "out")
    assert [(s["txt"].decode(), json.loads(s["json"])["n"]) for s in read] == list(zip(texts, range(100), strict=True))
    assert reasons(summary)["a.parquet:60"] == "its text is missing" and summary["shards"] > 2
    assert "is not a complete parquet file" in reasons(summary)["c.parquet"]
    with pytest.raises(DataError, match="has no field 'text'; its fields: content, n"):
        make(tmp_path / "in", tmp_path / "out2", text_field="text")


# ---------------------------------------------------------------- parquet with images
def test_images_from_parquet(tmp_path: Path):
    png = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(png, "PNG")
    held = [{"bytes": jpeg(i), "path": f"dir/{i}.x.jpeg"} for i in range(20)]
    held += [
        {"bytes": png.getvalue(), "path": None},
        {"bytes": None, "path": "gone.jpg"},
        {"bytes": b"what?", "path": ""},
    ]
    held += [{"bytes": jpeg()[:900], "path": "half.jpg"}]
    labels, url = [*(i % 2 for i in range(20)), 1, 0, 0, 0], [f"http://x/{i}" for i in range(24)]
    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    columns = {"image": held, "label": labels, "url": url}
    parquet(tmp_path / "in" / "a.parquet", columns, 10, {"huggingface": json.dumps(names)})
    summary = make(tmp_path / "in", tmp_path / "out", 0.05)
    assert summary["kind"] == "parquet" and summary["classes"] == ["cat", "dog"] and summary["shards"] > 2
    read = samples_of(tmp_path / "out")
    assert [s["jpg"] for s in read[:20]] == [row["bytes"] for row in held[:20]] and read[20]["png"] == png.getvalue()
    assert [int(s["cls"]) for s in read] == labels[:21] and read[3]["__key__"] == "0000003-3_x"
    assert json.loads(read[3]["json"]) == {"path": "dir/3.x.jpeg", "url": "http://x/3"}
    bad = reasons(summary)
    assert set(bad) == {"a.parquet:21", "a.parquet:22", "a.parquet:23"}
    assert bad["a.parquet:21"] == "holds no image bytes" and "not of an image format" in bad["a.parquet:22"]
    assert Samples([str(tmp_path / "out")]).label(1) == "dog"


def test_parquet_with_label_names_and_captions(tmp_path: Path):
    columns = {"jpg": [jpeg(i) for i in range(4)], "class": ["b", "a", None, "b"], "alt": ["u", "v", "w", ""]}
    parquet(tmp_path / "a.parquet", columns)
    summary = make(tmp_path / "a.parquet", tmp_path / "out", text_field="alt")
    read = samples_of(tmp_path / "out")
    assert summary["classes"] == ["a", "b"] and [s.get("cls") for s in read] == [b"1", b"0", None]
    assert [s["txt"] for s in read] == [b"u", b"v", b"w"] and list(reasons(summary)) == ["a.parquet:3"]
    parquet(tmp_path / "n.parquet", {"jpg": [jpeg(i) for i in range(3)], "label": [None] * 3})
    parquet(tmp_path / "f.parquet", {"jpg": [jpeg(i) for i in range(3)], "label": [1.0, float("nan"), 0.5]})
    make(tmp_path / "n.parquet", tmp_path / "nulls")
    assert [s.get("cls") for s in samples_of(tmp_path / "nulls")] == [None] * 3
    summary = make(tmp_path / "f.parquet", tmp_path / "floats")
    assert [s.get("cls") for s in samples_of(tmp_path / "floats")] == [b"1", None]
    assert reasons(summary) == {"f.parquet:2": "its label is 0.5, but labels are whole numbers or strings"}
    parquet(tmp_path / "t.parquet", {"text": [b"one", "zwei ü".encode(), b"\xff"]})
    summary = make(tmp_path / "t.parquet", tmp_path / "bytes")
    assert summary["kind"] == "text" and [s["txt"].decode() for s in samples_of(tmp_path / "bytes")] == [
        "one",
        "zwei ü",
    ]
    assert "its text is not UTF-8" in reasons(summary)["t.parquet:2"]
    with pytest.raises(DataError, match="has no field 'img'; its fields: jpg"):
        make(tmp_path / "a.parquet", tmp_path / "out2", image_field="img")
    with pytest.raises(DataError, match="has no column of image bytes; its columns are n"):
        parquet(tmp_path / "b.parquet", {"n": [1]})
        make(tmp_path / "b.parquet", tmp_path / "out2", kind="parquet")
    with pytest.raises(DataError, match="no field for the text"):
        make(tmp_path / "b.parquet", tmp_path / "out2")


# ---------------------------------------------------------------- image and text
def test_image_text_lists(tmp_path: Path):
    (tmp_path / "in" / "p").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "in" / "p" / f"{i}.jpg").write_bytes(jpeg(i))
    captions = ['a "quoted", comma', "zwei\nlines", "猫", "gone", "", "no image"]
    paths = ["p/0.jpg", "p/1.jpg", "p/2.jpg", "p/none.jpg", "p/0.jpg", "list.csv"]
    with (tmp_path / "in" / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption", "n"), *zip(paths, captions, range(6), strict=True)])
    with (tmp_path / "in" / "list.jsonl").open("w") as file:
        rows = [{"image": p, "caption": c, "n": n} for n, (p, c) in enumerate(zip(paths, captions, strict=True))]
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for name in ("list.csv", "list.jsonl"):
        summary = make(tmp_path / "in" / name, tmp_path / f"out-{name}")
        read = samples_of(tmp_path / f"out-{name}")
        assert summary["kind"] == "image-text" and [s["jpg"] for s in read] == [jpeg(i) for i in range(3)]
        assert [s["txt"].decode() for s in read] == captions[:3] and int(json.loads(read[2]["json"])["n"]) == 2
        bad = list(reasons(summary).values())
        assert bad[:2] == ["No such file or directory", "its text is empty"] and "not an image by its name" in bad[2]
    with pytest.raises(DataError, match=r"no field 'words'; its fields: image, caption, n. Name one with --text-field"):
        make(tmp_path / "in" / "list.csv", tmp_path / "out", text_field="words")


# ---------------------------------------------------------------- videos
def test_a_list_of_labels_is_not_a_list_of_captions(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "in" / "labels.csv").write_text("path,label\na.jpg,cat\n")
    with pytest.raises(DataError, match=r"has labels of images \(label\) and no texts; .* --labels .*labels.csv"):
        make(tmp_path / "in" / "labels.csv", tmp_path / "out")
    make(tmp_path / "in", tmp_path / "out", labels=str(tmp_path / "in" / "labels.csv"))
    assert Samples([str(tmp_path / "out")]).label(0) == "cat"


def film(path: Path, frames: int = 5, codec: str = "mpeg4", **options: str) -> None:
    """A video of 64 × 48 pixels with ten frames per second, whose upper half becomes darker."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(frames):
            picture = np.full((48, 64, 3), (250 - 240 // max(24, frames) * i, 10, 10), np.uint8)
            picture[24:] = picture[24:] if codec == "mpeg4" else 10
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(stream.encode())


def test_videos(tmp_path: Path):
    for name in ("run/a.mp4", "jump/b.mkv", "jump/c.avi", "jump/d.mov"):
        film(tmp_path / "in" / name)
    (tmp_path / "in" / "e.mp4").write_bytes((tmp_path / "in" / "run" / "a.mp4").read_bytes()[:200])
    (tmp_path / "in" / "f.avi").write_text("#EXTM3U\n#EXTINF:1,\nrun/a.mp4\n")  # a playlist is not a video
    summary = make(tmp_path / "in", tmp_path / "out")
    assert summary["kind"] == "videos" and set(reasons(summary)) == {"e.mp4", "f.avi"}
    read = samples_of(tmp_path / "out")
    assert [s["__key__"].partition("-")[2] for s in read] == ["b", "c", "d", "a"]
    assert read[3]["mp4"] == (tmp_path / "in" / "run" / "a.mp4").read_bytes() and read[3]["cls"] == b"1"
    assert json.loads(read[3]["json"]) == {"path": "run/a.mp4", "width": 64, "height": 48, "seconds": 0.5}
    picture = Image.open(contact_sheet.sheet(tmp_path / "out", tmp_path / "sheet.png"))
    assert picture.getpixel((8 + 64, 8 + 64))[0] > 200 > 60 > picture.getpixel((8 + 64, 8 + 64))[1]


def test_folders_of_frames_are_videos(tmp_path: Path):
    """The frames of a clip are the files, unchanged, at their times; 2.jpg is before 10.jpg."""

    def frame(grey: int, size: tuple[int, int], form: str) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", size, (grey, grey, grey)).save(out, form, quality=95)
        return out.getvalue()

    for name, form in (("run/a", "JPEG"), ("jump/b", "PNG"), ("jump/odd", "JPEG"), ("jump/bad", "JPEG")):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(12):
            size = (64, 48) if name != "jump/odd" or i < 9 else (48, 64)
            ending = "png" if form == "PNG" else "jpg"
            (tmp_path / "in" / name / f"{i}.{ending}").write_bytes(frame(20 * i, size, form))
    (tmp_path / "in" / "jump" / "bad" / "7.jpg").write_bytes(jpeg(0)[:300])
    (tmp_path / "in" / "notes.txt").write_text("no frame")
    with pytest.raises(DataError, match="frames do not state their times; write --fps N"):
        make(tmp_path / "in", tmp_path / "out", kind="frame-folders")
    with pytest.raises(DataError, match="--fps 0: write the number of frames in a second"):
        make(tmp_path / "in", tmp_path / "out", fps=0.0)
    summary = make(tmp_path / "in", tmp_path / "out", fps=10.0)
    assert summary["kind"] == "frame-folders" and summary["unread"] == {"txt": 1}
    assert reasons(summary).keys() == {"jump/odd", "jump/bad"}
    assert "9.jpg is a mjpeg of 48×64 pixels, but the first frame is a mjpeg of 64×48" in reasons(summary)["jump/odd"]
    read = samples_of(tmp_path / "out")
    assert [(s["__key__"].partition("-")[2], s["cls"]) for s in read] == [("b", b"0"), ("a", b"1")]
    assert json.loads(read[1]["json"]) == {"path": "run/a", "width": 64, "height": 48, "seconds": 1.2}
    for sample in read:
        (clip,) = EncodedVideo(sample["mov"]).frames_at(lambda seconds: [[0.0, 0.19, 0.2, 1.0, seconds]])
        assert [round(float(pixels.mean()) / 20) for pixels in clip] == [0, 1, 2, 10, 11]
    assert frame(20 * 5, (64, 48), "JPEG") in read[1]["mov"]
    make(tmp_path / "in", tmp_path / "again", fps=10.0)
    assert [s["mov"] for s in samples_of(tmp_path / "again")] == [s["mov"] for s in read]


def reds(data: bytes) -> list[int]:
    """The red values of the upper left, upper right, lower left and lower right quarters of a frame."""
    pixels = np.asarray(Image.open(io.BytesIO(data)))[..., 0]
    return [round(float(np.median(part))) for half in np.array_split(pixels, 2) for part in np.array_split(half, 2, 1)]


def test_frames_of_videos_are_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, x264 = tmp_path / "in", {"codec": "libx264", "g": "12", "bf": "3", "crf": "1", "x264-params": "open-gop=1"}
    for name in ("jump/a.mkv", "run/a.mp4"):
        film(source / name, 48, **x264)
    film(source / "run" / "old.avi", 12)
    film(source / "run" / "g.webm", 11, codec="libvpx-vp9")
    summary = make(source, tmp_path / "out", kind="images")
    assert summary["kind"] == "frames" and not summary["bad"] and summary["classes"] == ["jump", "run"]
    assert (
        "the first frame of every 1 s of a video becomes a JPEG of quality 95; --frames-every SECONDS"
        in summary["notes"][0]
    )
    read = samples_of(tmp_path / "out")
    keys = [re.sub("-[0-9a-f]{8}/", "/", sample["__key__"]) for sample in read]
    lengths = {"jump_a": 5, "run_a": 5, "run_g": 2, "run_old": 2}
    assert keys == [f"{name}/{1000 * k:09d}" for name in lengths for k in range(lengths[name])]
    assert [sample["cls"] for sample in read] == [b"0"] * 5 + [b"1"] * 9
    assert json.loads(read[3]["json"]) == {"path": "jump/a.mkv", "seconds": 3.0}
    for k in range(5):  # the frame at that time: consecutive frames differ by five levels of red
        red, _, low, _ = reds(read[k]["jpg"])
        assert abs(red - (250 - 50 * k)) <= 2 and low < 20, k
    every = make(
        source, tmp_path / "some", 0.02, frames_every=0.3, workers=1
    )  # pieces that begin in the middle of a video
    assert every["shards"] > 5 and every["samples"] == 16 + 16 + 4 + 4
    some = {sample["__key__"]: sample["jpg"] for sample in samples_of(tmp_path / "some")}
    assert (
        some[read[3]["__key__"]] == read[3]["jpg"] and some[read[8]["__key__"]] == read[8]["jpg"]
    )  # a key contains the time
    with monkeypatch.context() as patch:  # a video without seeking: decoded from its beginning, with the same result
        patch.setattr(video_frames, "_frames_from", lambda *_: (_ for _ in ()).throw(Damaged("no")))
        make(source, tmp_path / "slow", 0.02, frames_every=0.3)
    assert {sample["__key__"]: sample["jpg"] for sample in samples_of(tmp_path / "slow")} == some
    plain = tmp_path / "plain"  # without labels: shards that we built do not get labels from the folders in their keys
    for name in ("a.mp4", "b.mp4"):
        film(plain / name, 2)
    (plain / "a.mask.png").write_bytes(b"no mask of a video")  # frames have no masks
    assert not any("mask" in note for note in make(plain, tmp_path / "bare", frames_every=0.1)["notes"])
    assert make(tmp_path / "bare", tmp_path / "copy")["classes"] == [] and len(samples_of(tmp_path / "copy")) == 4


@pytest.mark.slow
def test_frames_are_the_same_for_any_number_of_processes_and_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("a.mp4", "b.mkv"):
        film(tmp_path / "in" / name, 40, codec="libx264", g="12")
    make(tmp_path / "in", tmp_path / "one", 0.02, frames_every=0.3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "data_pipeline.build.build_shards.index.write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt())
        )
        make(tmp_path / "in", tmp_path / "two", 0.02, workers=2, frames_every=0.3)
    for number in ("000001", "000003"):  # as if the build had been stopped earlier
        (tmp_path / "two.partial" / f"{number}.json").unlink()
    make(tmp_path / "in", tmp_path / "two", 0.02, frames_every=0.3)
    shards = sorted((tmp_path / "one").glob("*.tar"))
    assert len(shards) > 4
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "two" / shard.name).read_bytes()
    assert "nothing was done" in make(tmp_path / "in", tmp_path / "two", 0.02, frames_every=0.3)["notes"][-1]


def test_damaged_and_turned_videos_as_frames(tmp_path: Path):
    film(tmp_path / "good.mp4", 48, codec="libx264", g="12")
    data, source = bytearray((tmp_path / "good.mp4").read_bytes()), tmp_path / "in"
    source.mkdir()
    (source / "a-cut.mp4").write_bytes(data[:200])
    (source / "b-list.avi").write_text("#EXTM3U\n#EXTINF:1,\n../good.mp4\n")
    (source / "c-empty.mov").write_bytes(b"")
    (source / "d-gone.mp4").symlink_to(source / "nowhere.mp4")
    film(tmp_path / "good.mkv", 48, codec="libx264", g="12")
    whole = (tmp_path / "good.mkv").read_bytes()
    (source / "e-short.mkv").write_bytes(whole[: len(whole) * 6 // 10])
    matrix = data.index(b"tkhd") + 44  # as of a telephone held upright: rotated by 90° to the right
    turned = [0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30]
    data[matrix : matrix + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in turned)
    (source / "f-turned.mp4").write_bytes(data)
    holes = bytearray((tmp_path / "good.mp4").read_bytes())
    middle = holes.index(b"mdat") + (len(holes) - holes.index(b"mdat")) // 3
    holes[middle : middle + 60] = bytes(60)
    (source / "g-holes.mp4").write_bytes(holes)
    (source / "h-codec.mp4").write_bytes((tmp_path / "good.mp4").read_bytes().replace(b"avc1", b"zzzz"))
    summary = make(source, tmp_path / "out", frames_every=1.0)
    text = reasons(summary)
    assert set(text) == {
        "a-cut.mp4",
        "b-list.avi",
        "c-empty.mov",
        "d-gone.mp4",
        "e-short.mkv",
        "g-holes.mp4",
        "h-codec.mp4",
    }
    assert text["c-empty.mov"] == "is empty: 0 bytes" and text["d-gone.mp4"] == "No such file or directory"
    assert re.search(
        r"frames up to the damage are used: it ends after \d\.\d s, but its header states 4\.8 s", text["e-short.mkv"]
    )
    assert text["h-codec.mp4"] == "has a codec that PyAV does not know"
    with pytest.raises(DataError, match=r"h-codec.mp4: has a codec that PyAV does not know"):
        make(source / "h-codec.mp4", tmp_path / "x")
    assert re.search(r"^[1-4] of 5 frames are left out: ", text["g-holes.mp4"])
    read = {s["__key__"][0] + s["__key__"][-5:-3]: s["jpg"] for s in samples_of(tmp_path / "out")}
    assert len([key for key in read if key[0] == "f"]) == 5 and "g00" in read and "e00" in read
    assert Image.open(io.BytesIO(read["f00"])).size == (48, 64)
    left, right, low, _ = reds(read["f00"])
    assert right > 200 > 60 > left and low < 60  # the upper part is on the right
    kept = make(source / "f-turned.mp4", tmp_path / "kept", frames_every=9.0, as_stored=True)
    assert kept["samples"] == 1 and reds(samples_of(tmp_path / "kept")[0]["jpg"])[0] > 200
    with pytest.raises(DataError, match=r"none of its 1 samples can be used .*a-cut.mp4: Invalid data"):
        make(source / "a-cut.mp4", tmp_path / "x", kind="frames")
    for every in (0.0, -1.0, float("nan")):
        with pytest.raises(
            DataError, match=f"--frames-every {every:g}: write the interval between two frames in seconds"
        ):
            make(source, tmp_path / "x", frames_every=every)
    (tmp_path / "none").mkdir()
    with pytest.raises(
        DataError, match="holds nothing for a folder of videos, whose frames become images; it holds nothing"
    ):
        make(tmp_path / "none", tmp_path / "x", frames_every=1.0)


@pytest.mark.parametrize(("module", "extra", "name"), [("av", "video", "a.mp4"), ("pyarrow", "parquet", "a.parquet")])
def test_missing_packages_are_named(tmp_path: Path, monkeypatch, module: str, extra: str, name: str):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(b"x")
    for held in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, held)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"is not installed; pip install 'unlabeled\[{extra}\]'"):
        make(tmp_path / "in", tmp_path / "out")


# ---------------------------------------------------------------- tars
def test_tars_of_another_tool(tmp_path: Path):
    source = tmp_path / "in"
    (source / "sub").mkdir(parents=True)
    write_tar(
        source / "a.tar",
        [(f"d/{i}.{e}", d) for i in range(6) for e, d in (("JPG", jpeg(i)), ("cls", b"1"), ("pkl", b"x"))],
    )
    write_tar(
        source / "sub" / "b.tar",
        [("0.jpg", jpeg(7)), ("0.seg.png", b""), ("1.exe", b"x"), ("0.txt", b"late"), ("2.jpg", jpeg()[:500])],
    )
    whole = (source / "a.tar").read_bytes()
    with tarfile.open(source / "a.tar") as tar:
        end = tar.getmembers()[-1].offset_data + 512
    (source / "cut.tar").write_bytes(whole[: whole.index(jpeg(3)) + 1000])
    (source / "no-end.tar").write_bytes(whole[:end])
    (source / "none.tar").write_bytes(b"this is not a tar file" * 100)
    summary = make(source, tmp_path / "out", 0.03)
    read = samples_of(tmp_path / "out")
    assert summary["kind"] == "webdataset" and summary["shards"] > 3
    assert summary["dropped"] == {"exe": 1, "pkl": 6 + 3 + 6, "seg.png": 1}
    images = [s["jpg"] for s in read]
    assert images == [*map(jpeg, range(6)), *map(jpeg, range(3)), *map(jpeg, range(5)), jpeg(7)]
    assert all(s["cls"] == b"1" for s in read[:14]) and read[2]["__key__"] == "0000002-d_2"
    bad = reasons(summary)
    assert "breaks off" in bad["cut.tar/d/3"] and "may be incomplete" in bad["no-end.tar/d/5"] and bad["none.tar"]
    assert bad["sub/b.tar/1"] == "holds no member that shards can hold" and "sub/b.tar/2" in bad
    assert bad["sub/b.tar/0"] == "the key 0 occurs twice in this tar; the first one is used"
    assert len(bad) == 6


def test_tars_of_class_folders_keep_their_labels(tmp_path: Path):
    source = tmp_path / "in"
    source.mkdir()
    write_tar(source / "a.tar", [(f"./set/cat/{i}.0.jpg", jpeg(i)) for i in range(2)] + [("./set/x.jpg", jpeg(9))])
    write_tar(source / "b.tar", [(f"set/dog/{i}.jpg", jpeg(i)) for i in range(2)])
    summary = make(source, tmp_path / "out")
    read = samples_of(tmp_path / "out")
    assert summary["classes"] == ["cat", "dog"] and [s.get("cls") for s in read] == [b"0", b"0", None, b"1", b"1"]
    assert summary["notes"] == ["no sample has a .cls member: the labels are the folders of the samples"]
    assert Samples([str(tmp_path / "out")]).label(4) == "dog" and [s["jpg"] for s in read[:2]] == [jpeg(0), jpeg(1)]
    write_tar(source / "b.tar", [("set/dog/0.jpg", jpeg(1)), ("set/dog/0.cls", b"5")])  # these labels are used
    assert [s.get("cls") for s in (make(source, tmp_path / "own"), samples_of(tmp_path / "own"))[1]][3:] == [b"5"]
    write_tar(source / "b.tar", [(f"{side}/dog/0.jpg", jpeg(1)) for side in ("train", "val")])
    (source / "a.tar").unlink()
    summary = make(source, tmp_path / "sides")
    assert summary["classes"] == [] and "train, val: parts of a data set, and not labels" in summary["notes"][0]


def test_an_index_of_class_folders_says_that_there_are_no_labels(tmp_path: Path):
    """Only a build makes labels of the folders in tars: indexed as they are, they have none, and no score can
    be taken."""
    members = [(f"{kind}/{n}.jpg", jpeg(n)) for kind in ("cat", "dog") for n in range(2)]
    write_tar(tmp_path / "a.tar", members)
    said: list[str] = []
    index.write(tmp_path, said.append)
    assert (
        len(said) == 1
        and "no sample has a .cls member" in said[0]
        and "the 2 folders in the tars (cat, dog)" in said[0]
    )
    with pytest.raises(
        DataError, match=r"cat/0 has no \.cls member.*`unlabeled shards build` makes labels of the folders"
    ):
        Samples([str(tmp_path)]).label(0)
    for others in ([("cat/9.jpg", jpeg()), ("cat/9.cls", b"0")], [(f"bird/{n}.jpg", jpeg(n)) for n in range(2)]):
        write_tar(tmp_path / "a.tar", [*others, *(members if others[-1][0].endswith("cls") else [])])
        said.clear()
        index.write(tmp_path, said.append)
        assert not said  # there are labels; or there is one folder alone


def test_samples_of_a_tar_without_an_image_are_reported(tmp_path: Path):
    write_tar(
        tmp_path / "a.tar",
        [
            ("0.jpg", jpeg()),
            ("1.txt", b"x"),
            ("2.x.jpg", b""),
            ("2.y.jpg", b""),
            ("3.npy", b"what?"),
            ("4.jfif", jpeg(4)),
        ],
    )
    summary = make(tmp_path / "a.tar", tmp_path / "out")
    assert summary["members"] == {"jpg": 2, "txt": 1} and summary["bare"] == [1, "a.tar/1"]
    assert "1 samples hold no image, for example a.tar/1; training on images skips them" in describe(summary, "out")
    bad = reasons(summary)
    assert "several dots in the name" in bad["a.tar/2"] and "unpack the tars" in bad["a.tar/2"] and "a.tar/3" in bad


def test_masks_beside_images_are_members_of_their_samples(tmp_path: Path):
    """And no images themselves, unless they have no image beside them."""
    for n in range(3):
        (tmp_path / "in" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "a" / f"{n}.jpg").write_bytes(jpeg(n))
        Image.fromarray(np.full((64, 64), n, np.uint8)).save(tmp_path / "in" / "a" / f"{n}.mask.png")
    np.save(tmp_path / "in" / "a" / "0.depth.npy", np.ones((64, 64), np.float32))
    Image.new("RGB", (64, 64)).save(tmp_path / "in" / "a" / "2.mask.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "in" / "a" / "alone.mask.png")
    summary = make(tmp_path / "in", tmp_path / "out")
    assert summary["samples"] == 3 and summary["members"] == {
        "cls": 3,
        "depth.npy": 1,
        "jpg": 2,
        "json": 3,
        "mask.png": 2,
        "png": 1,
    }
    assert "its map is a picture of RGB" in reasons(summary)["a/2.jpg"] and not summary["unread"]
    samples = Samples([str(tmp_path / "out")], further=MASKS)
    masks = [read_map(samples.read(n)["mask.png"], "mask.png") for n in range(2)]
    assert [int(mask.max()) for mask in masks] == [0, 1] and "mask.png" in samples.extensions
    assert [json.loads(samples.read(n)["json"])["path"] for n in range(3)] == ["a/0.jpg", "a/1.jpg", "a/alone.mask.png"]
    assert make(tmp_path / "in", tmp_path / "out")["notes"][-1].endswith("nothing was done")
    Image.fromarray(np.full((64, 64), 9, np.uint8)).save(tmp_path / "in" / "a" / "0.mask.png", compress_level=0)
    with pytest.raises(DataError):  # another source than that of the shards
        make(tmp_path / "in", tmp_path / "out")


def test_a_folder_of_arrays(tmp_path: Path):
    """Images of seven channels: their labels, what cannot be an image, means and deviations; beside images, arrays are not
    samples."""
    rng, images = np.random.default_rng(0), []
    for n in range(4):
        images.append(rng.integers(0, 4096, (6, 8, 7), dtype=np.uint16))
        file = tmp_path / "in" / ("water" if n % 2 else "forest") / f"{n}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, images[-1])
    np.save(tmp_path / "in" / "water" / "features.npy", np.zeros(5, np.float32))
    summary = make(tmp_path / "in", tmp_path / "out", bits=12)
    assert summary["samples"] == 4 and summary["classes"] == ["forest", "water"]
    assert "holds float32 [5], but [H, W, C] of uint8, uint16, int16" in reasons(summary)["water/features.npy"]
    samples = Samples([str(tmp_path / "out")])
    pixels = np.stack([samples.image(n, 7) for n in range(4)])
    expected = np.round(np.stack([images[n] for n in (0, 2, 1, 3)]) / 4095 * 255)
    assert np.abs(pixels - expected).max() <= 1 and [samples.label(n) for n in (0, 3)] == ["forest", "water"]
    lines = stats.describe(stats.gather(tmp_path / "out"))
    (line,) = [line for line in lines if line.startswith("mean and deviation of 7 channels")]
    numbers = [[float(x) for x in found.split(",")] for found in re.findall(r"\[(.*?)\]", line)]
    every = np.stack(images).reshape(-1, 7) / 4095  # of all 12 bits
    np.testing.assert_allclose(numbers, [every.mean(0), every.std(0)], atol=5.1e-5)
    (tmp_path / "in" / "a.jpg").write_bytes(jpeg())
    assert make(tmp_path / "in", tmp_path / "beside")["samples"] == 1


def test_long_names(tmp_path: Path):
    long = "long" * 60
    for name, form in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        write_tar(tmp_path / f"{name}.tar", [(f"{long}{i}/猫.jpg", jpeg(i)) for i in range(4)], form)
        make(tmp_path / f"{name}.tar", tmp_path / name, 0.02)
        assert [s["jpg"] for s in samples_of(tmp_path / name)] == [jpeg(i) for i in range(4)]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_truncated_tar_gives_complete_samples_or_reports_the_last_one(data: st.DataObject):
    with tempfile.TemporaryDirectory() as folder:
        (tmp_path := Path(folder, "in")).mkdir()
        original = {f"{i}": {"txt": bytes([65 + i]) * (300 * i + 1), "cls": b"%d" % i} for i in range(5)}
        write_tar(tmp_path / "a.tar", [(f"{k}.{e}", d) for k, s in original.items() for e, d in s.items()])
        whole = (tmp_path / "a.tar").read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        limit = data.draw(st.sampled_from([0.003, 0.02, 1.0]))
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        write_tar(tmp_path / "z.tar", [("0.txt", b"whole")])
        summary = make(tmp_path, Path(folder, "out"), limit)
        read = samples_of(Path(folder, "out"))
        got = {s["__key__"].partition("-")[2]: {e: s[e] for e in ("txt", "cls") if e in s} for s in read[:-1]}
        assert read[-1]["txt"] == b"whole" and got == {k: original[k] for k in list(original)[: len(got)]}
        assert len(got) == 5 or summary["bad"], (cut, got)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"])), min_size=1),
    st.floats(0.003, 0.1),
    st.booleans(),
)
def test_lines_are_cut_without_loss(lines: list[str], shard_mb: float, ends: bool):
    with tempfile.TemporaryDirectory() as folder:
        text = "\n".join(["first", *lines]) + "\n" * ends
        Path(folder, "in.txt").write_bytes(text.encode())
        summary = make(Path(folder, "in.txt"), Path(folder, "out"), shard_mb, lines=True)
        read = [s["txt"].decode() for s in samples_of(Path(folder, "out"))]
        assert read == [line for line in ["first", *lines] if line.strip()]
        assert all(row["reason"] == "its text is empty" for row in summary["bad"])
