"""The images and the text of the quick start: both sets of images, the .deb reader, and errors without a Debian
mirror."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from data_pipeline.build import demo_images, demo_text
from launch.demo import demo

MEMBER = demo_images.MEMBER


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def quiet(_: str) -> None:
    pass


def tar(files: dict[str, bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return raw.getvalue()


def deb(path: Path, name: str, data: bytes) -> Path:
    """An ar archive as dpkg writes it, with a member of odd size before the data, and another one after it."""
    members = {"debian-binary": b"2.0\n", "control.tar.gz": b"odd", name: data, "_gpgorigin": b"signature"}
    with open(path, "wb") as file:
        file.write(b"!<arch>\n")
        for member, content in members.items():
            file.write(f"{member:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content)
            file.write(b"\n" * (len(content) % 2))
    return path


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """Replace apt-get by a script. PATH has only this script and `cp`; the cache is empty, and the package is not
    installed."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "cp").symlink_to(shutil.which("cp"))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_images, "INSTALLED", tmp_path / "absent" / "0textures.pk3")

    def write(script: str) -> None:
        (folder / "apt-get").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{script}\n')
        (folder / "apt-get").chmod(0o755)

    return write


# ---------------------------------------------------------------- digits
@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "set"
    assert demo_images.fetch(out, "digits", quiet) == "digits"
    return out


@pytest.mark.slow
def test_digits_counts_and_images(digits):
    meta = json.loads((digits / "set.json").read_text())
    assert meta["set"] == "digits" and meta["classes"] == [str(i) for i in range(10)]
    assert set(meta) == {"set", "classes", "counts", "package", "licence"}
    files = {split: list((digits / split).glob("*/*.png")) for split in demo_images.SPLITS}
    assert {split: len(found) for split, found in files.items()} == meta["counts"]
    assert meta["counts"] == {"train": 3234, "val": 180, "test": 539}
    for found in files.values():
        counts = Counter(path.parent.name for path in found)
        assert len(counts) == 10 and max(counts.values()) < 1.15 * min(counts.values())
    for path in files["test"][:20]:
        pixels = np.asarray(Image.open(path))
        assert pixels.shape == (64, 64, 3) and pixels.std() > 10


@pytest.mark.slow
def test_digits_splits_share_no_digit(digits):
    numbers = [{path.name[:4] for path in (digits / split).glob("*/*.png")} for split in demo_images.SPLITS]
    assert sum(map(len, numbers)) == len(set.union(*numbers)) == 1797


@pytest.mark.slow
def test_digits_are_the_same_every_time(digits, tmp_path):
    (tmp_path / "again").mkdir()  # an empty folder may exist
    demo_images.fetch(tmp_path / "again", "digits", quiet)
    assert digest(tmp_path / "again") == digest(digits)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


@pytest.mark.slow
def test_an_existing_set_is_not_written_again(digits, monkeypatch):
    monkeypatch.setattr(demo_images, "_write", lambda *_: pytest.fail("written again"))
    assert demo_images.fetch(digits, "digits", quiet) == demo_images.fetch(digits, "auto", quiet) == "digits"
    with pytest.raises(DataError, match=r'holds "digits", not "materials".*delete'):
        demo_images.fetch(digits, "materials", quiet)


def test_other_folders_are_not_changed(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="not a complete demo set"):
        demo_images.fetch(tmp_path, "digits", quiet)
    with pytest.raises(DataError, match="auto, materials or digits"):
        demo_images.fetch(tmp_path / "new", "cifar", quiet)
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_a_failed_call_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_images, "_draw_digit", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo_images.fetch(tmp_path / "set", "digits", quiet)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the package
@pytest.mark.parametrize(
    ("name", "pack"),
    [("data.tar.xz", lzma.compress), ("data.tar.gz/", gzip.compress), ("data.tar", bytes)],
)
def test_member_of_a_deb(tmp_path, name, pack):
    content = np.random.default_rng(0).bytes(300_001)
    path = deb(tmp_path / "x.deb", name, pack(tar({"./etc/other": b"other", f"./{MEMBER}": content})))
    demo_images.unpack_member(path, MEMBER, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    with pytest.raises(DataError, match="does not hold usr/absent"):
        demo_images.unpack_member(path, "usr/absent", tmp_path / "none")


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_member_of_a_zstandard_deb(tmp_path):
    (tmp_path / "root/DEBIAN").mkdir(parents=True)
    control = "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: nobody <a@b>\nDescription: x\n"
    (tmp_path / "root/DEBIAN/control").write_text(control)
    (tmp_path / "root/a").write_bytes(b"first")
    (tmp_path / "root/b").write_bytes(np.random.default_rng(0).bytes(3_000_000))  # not read from the pipe
    command = ["dpkg-deb", "-Zzstd", "-b", str(tmp_path / "root"), str(tmp_path / "x.deb")]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this dpkg-deb writes no zstandard")
    demo_images.unpack_member(tmp_path / "x.deb", "a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"first"


@pytest.mark.parametrize("data", [b"<html>not found</html>", b"!<arch>\n", b"!<arch>\ndebian-binary"])
def test_a_file_that_is_not_a_deb(tmp_path, data):
    (tmp_path / "x.deb").write_bytes(data)
    with pytest.raises(DataError, match=r"x\.deb: is not a complete Debian package"):
        demo_images.unpack_member(tmp_path / "x.deb", MEMBER, tmp_path / "copy")


def pk3(names: list[str]) -> bytes:
    raw, rng = io.BytesIO(), np.random.default_rng(0)
    with zipfile.ZipFile(raw, "w") as archive:
        for name in names:
            png = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (256, 300, 3), dtype=np.uint8)).save(png, "PNG")
            archive.writestr(f"textures/tex_x/{name}.png", png.getvalue())
    return raw.getvalue()


@pytest.mark.slow
def test_package_after_one_update(tmp_path, apt):
    names = [f"rock{i:02d}" for i in range(12)] + ["wood01a", "wood01b", "rock_door", "rock99_nm", "poster"]
    deb(tmp_path / "good.deb", "data.tar.xz", lzma.compress(tar({f"./{MEMBER}": pk3(names)})))
    apt(f"""case "$*" in
      *update) : > {tmp_path}/updated;;
      *) test -e {tmp_path}/updated && cp {tmp_path}/good.deb x.deb && exit; echo 'E: No packages found' >&2; exit 100;;
    esac""")
    assert demo_images.fetch(tmp_path / "set", "auto", quiet) == "materials"
    calls = [line.split()[4:] for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls == [["download", "ufoai-textures"], ["update"], ["download", "ufoai-textures"]]
    assert list(digest(tmp_path / "cache")) == ["ufoai-textures/0textures.pk3"]  # the .deb is deleted
    meta = json.loads((tmp_path / "set/set.json").read_text())
    assert meta["classes"] == ["rock", "wood"] and sum(meta["counts"].values()) == 14 * 16
    assert (
        len({path.parent.parent for path in (tmp_path / "set").glob("*/wood/*.png")}) == 1
    )  # variants are in the same split
    demo_images.fetch(tmp_path / "again", "materials", quiet)
    assert len((tmp_path / "calls").read_text().splitlines()) == 3  # from the cache
    assert digest(tmp_path / "again") == digest(tmp_path / "set")


# ---------------------------------------------------------------- without a mirror
@pytest.mark.slow
def test_auto_uses_digits_and_prints_why(tmp_path, apt, digits):
    apt("echo 'E: Unable to locate package ufoai-textures' >&2; exit 100")
    said: list[str] = []
    assert demo_images.fetch(tmp_path / "set", "auto", said.append) == "digits"
    line = next(line for line in said if "digits instead" in line)
    assert "Unable to locate package" in line and "\n" not in line
    assert digest(tmp_path / "set") == digest(digits)


def test_unavailable_materials_are_an_error(tmp_path, apt):
    apt("exit 7")
    with pytest.raises(DataError, match=r"ufoai-textures cannot be downloaded: .*ended with 7; run .apt-get update"):
        demo_images.fetch(tmp_path / "set", "materials", quiet)
    assert not (tmp_path / "set").exists() and not digest(tmp_path / "cache")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exec /bin/sleep 60", "more than 0.2 sec"),
        ("/bin/sleep 5", "more than 0.2 sec"),
        (None, "apt-get is not installed"),
    ],
)
def test_apt_get_that_hangs_or_is_missing(tmp_path, apt, monkeypatch, script, reason):
    monkeypatch.setattr(demo_images, "APT_SECONDS", 0.2)
    if script:
        apt(script)
    with pytest.raises(DataError, match=reason):
        demo_images.textures_file(quiet)


def test_cache_that_cannot_be_written(tmp_path, apt):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="UNLABELED_CACHE"):
        demo_images.textures_file(quiet)


@pytest.mark.slow
def test_real_materials(tmp_path):
    """Downloads 336 MB the first time."""
    demo_images.fetch(tmp_path / "set", "materials", quiet)
    meta = json.loads((tmp_path / "set/set.json").read_text())
    assert meta["counts"] == {"train": 4320, "val": 720, "test": 1808}
    assert meta["classes"] == sorted(demo_images.KINDS)
    names = [{path.stem[:-3] for path in (tmp_path / "set" / split).glob("*/*.png")} for split in demo_images.SPLITS]
    assert sum(map(len, names)) == len(set.union(*names)) == 428


@pytest.mark.slow
def test_the_demo_deletes_no_file_that_it_has_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder with the name of the shards, or of the temporary folder of a killed process with the same id, may have
    other content."""
    monkeypatch.chdir(tmp_path)
    mine = [
        tmp_path / "runs" / "demo-data" / "shards-digits" / "train" / "notes.txt",
        tmp_path / f"images.partial-{os.getpid()}" / "notes.txt",
        tmp_path / "texts" / f"text.partial-{os.getpid()}" / "notes.txt",
    ]
    for path in mine:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    monkeypatch.setattr("launch.demo.fetch", lambda *_: "digits")
    (tmp_path / "runs" / "demo-data" / "images" / "train").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "runs" / "demo-data" / "images" / "train" / "a.png")
    with pytest.raises(DataError, match="train: exists already; name another folder, or delete it"):
        demo("digits")
    demo_images._write("digits", iter([]), tmp_path / "images")
    demo_text._write_texts(tmp_path / "texts", "stdlib", print)
    assert all(path.read_text() == "mine" for path in mine)
    assert sorted(path.name for path in tmp_path.glob("images*")) == ["images", mine[1].parent.name]
