"""Every kind of source end to end: what is read back, and what is named because it cannot be used."""

from __future__ import annotations

import csv
import io
import json
import re
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

from data_pipeline import index, stats
from data_pipeline.shards import Samples
from data_pipeline.sources.base import NAME_BYTES, safe_name, to_json
from data_pipeline.storage import DataError
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
    assert len(max(keys, key=len)) == NAME_BYTES and len(Samples([str(tmp_path / "out")])) == len(names)


@given(st.text(st.characters(codec=None)))
def test_any_text_gives_a_safe_name(text: str):
    name = safe_name(text)
    assert name and 0 < len(name.encode()) <= NAME_BYTES and re.fullmatch(r"[\w-]+", name)
    match = index.MEMBER_NAME.match(f"0000001-{name}.jpg")
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
    assert missing["path"].startswith("missing") and "is not there" in missing["reason"]
    assert summary["notes"] == [f"1 files have no row in {labels} and get no label: x/c.jpg"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("l.csv", b"path,label\na.jpg,x,y\n", "line 2 has 3 fields, but the first line names 2"),
        ("l.csv", b"path,label\na.jpg,\n", "line 2 has no label"),
        ("l.csv", b"path,label\na.jpg,1\na.jpg,2\n", "line 3 gives a.jpg the label 2, but it has 1"),
        ("l.csv", b"path,species\na.jpg,1\n", "has no field for the label .*; its fields: path, species. Name one with --label-field"),
        ("l.csv", b'path,label\n"a.jpg,1\n', "line 2 is no CSV"),
        ("l.csv", b"path,label\n\xff\xfe,1\n", "is not UTF-8"),
        ("l.csv", b"path,path\na,b\n", "names a column twice"),
        ("l.csv", b"path,label\nz.jpg,1\n", "names none of the 1 files, which are like a.jpg; it says z.jpg"),
        ("l.csv", b"", "lists nothing"),
        ("l.jsonl", b"{}\n[1]\n", "has no field for the path"),
        ("l.jsonl", b'{"path": \n', "line 1 is no JSON"),
        ("l.xml", b"", "is no list"),
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
    assert "is no JSON" in bad["rows.jsonl:4"] and "is not UTF-8" in bad["rows.jsonl:10"]
    assert bad["rows.jsonl:6"] == "its text is empty" and bad["rows.jsonl:8"] == "its text is int"
    with pytest.raises(
        DataError, match=r"has no field 'body'; its fields: text, id, score. Name one with --text-field"
    ):
        make(tmp_path / "rows.jsonl", tmp_path / "out2", text_field="body")


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
    assert "is no whole parquet file" in reasons(summary)["c.parquet"]
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
    assert bad["a.parquet:21"] == "holds no image bytes" and "no image format" in bad["a.parquet:22"]
    assert Samples([str(tmp_path / "out")]).label(1) == "dog"


def test_parquet_with_label_names_and_captions(tmp_path: Path):
    columns = {"jpg": [jpeg(i) for i in range(4)], "class": ["b", "a", None, "b"], "alt": ["u", "v", "w", ""]}
    parquet(tmp_path / "a.parquet", columns)
    summary = make(tmp_path / "a.parquet", tmp_path / "out", text_field="alt")
    read = samples_of(tmp_path / "out")
    assert summary["classes"] == ["a", "b"] and [s.get("cls") for s in read] == [b"1", b"0", None]
    assert [s["txt"] for s in read] == [b"u", b"v", b"w"] and list(reasons(summary)) == ["a.parquet:3"]
    with pytest.raises(DataError, match="has no field 'img'; its fields: jpg"):
        make(tmp_path / "a.parquet", tmp_path / "out2", image_field="img")
    with pytest.raises(DataError, match="has no column of image bytes; its columns: n"):
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
        assert bad[:2] == ["No such file or directory", "its text is empty"] and "no image by its name" in bad[2]
    with pytest.raises(DataError, match=r"no field 'words'; its fields: image, caption, n. Name one with --text-field"):
        make(tmp_path / "in" / "list.csv", tmp_path / "out", text_field="words")


# ---------------------------------------------------------------- videos
def film(path: Path, frames: int = 5) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(frames):
            picture = np.full((48, 64, 3), (250 - 10 * i, 10, 10), np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(stream.encode())


def test_videos(tmp_path: Path):
    for name in ("run/a.mp4", "jump/b.mkv", "jump/c.avi", "jump/d.mov"):
        film(tmp_path / "in" / name)
    (tmp_path / "in" / "e.mp4").write_bytes((tmp_path / "in" / "run" / "a.mp4").read_bytes()[:200])
    (tmp_path / "in" / "f.avi").write_text("#EXTM3U\n#EXTINF:1,\nrun/a.mp4\n")  # a playlist is no video
    summary = make(tmp_path / "in", tmp_path / "out")
    assert summary["kind"] == "videos" and set(reasons(summary)) == {"e.mp4", "f.avi"}
    read = samples_of(tmp_path / "out")
    assert [s["__key__"].partition("-")[2] for s in read] == ["b", "c", "d", "a"]
    assert read[3]["mp4"] == (tmp_path / "in" / "run" / "a.mp4").read_bytes() and read[3]["cls"] == b"1"
    assert json.loads(read[3]["json"]) == {"path": "run/a.mp4", "width": 64, "height": 48, "seconds": 0.5}
    picture = Image.open(stats.sheet(tmp_path / "out", tmp_path / "sheet.png"))
    assert picture.getpixel((8 + 64, 8 + 64))[0] > 200 > 60 > picture.getpixel((8 + 64, 8 + 64))[1]


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
def test_another_webdataset(tmp_path: Path):
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
    assert "breaks off" in bad["cut.tar/d/3"] and "half of one" in bad["no-end.tar/d/5"] and bad["none.tar"]
    assert bad["sub/b.tar/1"] == "holds no member that shards keep" and "sub/b.tar/2" in bad
    assert bad["sub/b.tar/0"] == "the key 0 stands in this tar twice; the first is taken"
    assert len(bad) == 6


def test_long_names_pass(tmp_path: Path):
    long = "long" * 60
    for name, form in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        write_tar(tmp_path / f"{name}.tar", [(f"{long}{i}/猫.jpg", jpeg(i)) for i in range(4)], form)
        make(tmp_path / f"{name}.tar", tmp_path / name, 0.02)
        assert [s["jpg"] for s in samples_of(tmp_path / name)] == [jpeg(i) for i in range(4)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_tar_cut_anywhere_gives_whole_samples_or_says_so(data: st.DataObject):
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
