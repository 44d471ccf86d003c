"""Hostile inputs by number: `python -m tests.attack --seconds 60` runs cases from `--seed` on, `--only NUMBER` a single one and leaves its files.

A case makes a folder of hostile files (names, images, tars, tables, YAML, JSON, tensors, whole runs) from its number alone and lets commands read
it: build, index, train, eval, export, report. A command may succeed, or end with code 2 and one line. What fails a case: an exception, an error
of several lines, a hang, memory beyond a bound, a file written outside of what the command was told to write, a program started, code of the
input executed. All cases run in one process, so that torch is imported once; `tests/test_attack.py` starts it and watches it for crashes.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import signal
import socket
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SECONDS = 40.0  # a case that takes longer hangs; this machine may be slow and busy
BYTES = 1 << 30  # that a case may take on top of what the process holds
MOST = 6 << 30  # that the process may have: more is refused to it, so that no case takes the machine down
LINE = 4000  # characters of an error

Argv = list[str]
Case = Callable[["Attack", random.Random, Path], Iterator[Argv]]


class Hung(BaseException):
    """Not an `Exception`, so that no handler of the program treats it as bad input."""


# ---------------------------------------------------------------- hostile values
def deep(rng: random.Random, opening: str, closing: str) -> str:
    depth = rng.choice((50, 500, 5000, 200_000))
    return opening * depth + closing * rng.choice((depth, 0))


TEXTS = (
    "", " ", "²", "٣", "\0", "\x1b[31mred\x1b[0m", "a\nb", "a\r\nerror: b", "../../../escaped", "/etc/passwd", "NaN", "-1", "1e999", "None", "0x10",
    "\ud800", "\U0001f40d" * 50, "x" * 100_000, "%s%n{0}{}", "`touch pwned`", "$(touch pwned)", "<script>alert(1)</script>", "'\"", "~", "*", "[", "\ufeff", "\u202e",
    "s3://", "file://", "http://127.0.0.1:9/x", "con", "true", "auto", "none", "9" * 5000,
)  # fmt: skip
NUMBERS = (0, -1, 1, 2, -(2**31), 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -0.0, 0.5, 1e-320, 1e308)
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"a": {"b": []}},
    float("inf"),
    float("-inf"),
    float("nan"),
)


def value(rng: random.Random) -> Any:
    """A random JSON value, and some values that JSON does not have."""
    kind = rng.randrange(10)
    if kind < 3:
        return rng.choice(TEXTS)
    if kind < 6:
        return rng.choice(NUMBERS)
    if kind < 9:
        return json.loads(json.dumps(rng.choice(OTHERS)))
    out: Any = rng.choice(NUMBERS)
    for _ in range(rng.choice((3, 60, 600))):
        out = [out] if rng.random() < 0.5 else {"a": out}
    return out


def mutate(rng: random.Random, content: Any, times: int = 1, wild: Callable[[random.Random], Any] = value) -> Any:
    """A copy in which some nodes were replaced, removed, duplicated or renamed."""
    content = json.loads(json.dumps(content))
    for _ in range(times):
        places: list[tuple[Any, Any]] = []

        def walk(node: Any, places: list = places) -> None:
            for key in node if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                if isinstance(node[key], (dict, list)) and len(places) < 5000:
                    walk(node[key])

        if not isinstance(content, (dict, list)) or rng.random() < 0.03:
            return wild(rng)
        walk(content)
        if not places:
            return wild(rng)
        node, key = rng.choice(places)
        how = rng.randrange(10)
        if how < 6:
            node[key] = wild(rng)
        elif how == 6:
            del node[key]
        elif how == 7 and isinstance(node, list):
            node.insert(rng.randrange(len(node) + 1), node[key])
        elif how == 7:
            node[rng.choice(TEXTS)] = node[key]
        elif how == 8 and isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
            node[key] = rng.choice(
                (-node[key], node[key] * 1000, node[key] + 1, str(node[key]), float(node[key]), [node[key]])
            )
        else:
            node[key] = [node[key]] if rng.random() < 0.5 else {"x": node[key]}
    return content


def damage(rng: random.Random, data: bytes) -> bytes:
    """The bytes with some changed, removed, inserted or duplicated."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        how, place = (
            rng.randrange(8),
            rng.randrange(len(out) + 1) if rng.random() < 0.5 else min(len(out), rng.randrange(512)),
        )
        if how < 3 and place < len(out):
            out[place] ^= 1 << rng.randrange(8)
        elif how == 3 and place < len(out):
            out[place] = rng.choice((0, 255, 127, 128))
        elif how == 4:
            del out[place:]
        elif how == 5:
            out[place:place] = rng.randbytes(rng.choice((1, 4, 512)))
        elif how == 6:
            del out[place : place + rng.choice((1, 4, 512))]
        else:
            wide = rng.choice((2, 4, 8))
            out[place : place + wide] = rng.choice((b"\xff", b"\0", b"\x7f", b"\x80")) * wide
    return bytes(out)


def broken_json(rng: random.Random, data: bytes, *more: bytes) -> bytes:
    """Bytes for a JSON file: `data` damaged, no JSON, JSON of another form, or one of `more`."""
    nested = deep(rng, *rng.choice((("[", "]"), ('{"a":', "}")))).encode()
    return rng.choice(
        (damage(rng, data), nested, b"", b"{", b"{}", b"[]", b"\xff\xfe", b"NaN", b"null", b"1" * 5000, *more)
    )


def name(rng: random.Random, ending: str) -> bytes:
    """A hostile file name that is valid on a disk."""
    stem = rng.choice(
        (
            b"a", b"a.b", b"a\nb", b"\x1b]0;x\x07", b"\x1b[2J", b"\xff\xfe", b"-rf", b"--help", b" ", b"a" * 240, "é".encode() * 100, b"..a", b"a..b", b"%00", b"$(touch pwned)", b"*", b"?", b"[a]", b"a\\b",
            "\u202e".encode(), b"a=b", b"~", b"nul", b"0" * 200, b"'", b'"', b"a\tb", b"{}", b"a:b", b"#", b"a&b<c>", b"\xed\xa0\x80",
        )
    )  # fmt: skip
    return (stem + (b"." + ending.encode() if rng.random() < 0.9 else b""))[:255]


# ---------------------------------------------------------------- hostile images
def picture(rng: random.Random, width: int = 0, height: int = 0) -> tuple[bytes, str]:
    """(a valid image, its extension)."""
    from PIL import Image

    mode = rng.choice(("RGB", "RGB", "L", "RGBA", "P", "1", "CMYK", "I;16", "I", "F", "LA"))
    width, height = width or rng.choice((1, 7, 40, 64)), height or rng.choice((1, 9, 40, 64))
    image = Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))
    kinds = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tiff", "GIF": "gif"}
    form = rng.choice(list(kinds))
    out = io.BytesIO()
    try:
        image = Image.new("I;16", image.size, rng.randrange(65536)) if mode == "I;16" else image.convert(mode)
        more = [image] * rng.choice((0, 0, 3)) if form in ("TIFF", "GIF", "WEBP") else []
        image.save(out, form, **({"save_all": True, "append_images": more} if more else {}))
    except (OSError, ValueError, KeyError):
        out = io.BytesIO()
        image.convert("RGB").save(out, form)
    return out.getvalue(), kinds[form]


def png(width: int, height: int, depth: int, color: int, rows: bytes, *more: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    body = b"".join(chunk(*part) for part in more) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


def npy(rng: random.Random) -> bytes:
    shape = rng.choice(("(8, 8, 3)", "(8, 8)", "(0, 0, 3)", "(-1, 8, 3)", "(10000000, 10000000, 3)", "(99999, 999, 3)", "(8, 8, 0)", "()", "(8,)", "(1, 1, 1, 3)", "(True, 8, 3)", "(2**40, 1, 3)", "[8, 8, 3]", "(1, 1, 90000000)"))  # fmt: skip
    kind = rng.choice(("'|u1'", "'<u2'", "'>u2'", "'|O'", "'<f4'", "'<U9'", "[('a', '|u1')]", "'|V1000000000'", "__import__('os').system('touch pwned')", "'|u1'"))  # fmt: skip
    text = f"{{'descr': {kind}, 'fortran_order': {rng.choice(('False', 'True', '0', 'None'))}, 'shape': {shape}, }}"
    if rng.random() < 0.1:
        text = deep(rng, "(", ")")
    head = text.encode().ljust(117) + b"\n"
    size = struct.pack("<H", min(len(head), 65535)) if rng.random() < 0.9 else b"\xff\xff"
    return (
        b"\x93NUMPY"
        + rng.choice((b"\1\0", b"\2\0", b"\3\0", b"\1\0"))
        + size
        + head
        + bytes(192 * rng.choice((1, 1, 2)))
    )


def bomb(rng: random.Random) -> tuple[bytes, str]:
    """A small file that expands to a large one, or claims to."""
    how = rng.randrange(9)
    if how == 0:
        side = rng.choice((9_999, 20_000, 2**31 - 1))
        return png(side, side, 8, rng.choice((0, 2, 6)), bytes(1 << 20)), "png"
    if how == 1:  # text chunks that unpack to a gigabyte
        return png(
            4,
            4,
            8,
            2,
            bytes(52),
            (b"zTXt", b"a\0\0" + zlib.compress(bytes(200 << 20), 9)),
            (b"iCCP", b"a\0\0" + zlib.compress(bytes(100 << 20), 9)),
        ), "png"
    if how == 2:
        data, ending = picture(rng)
        while ending != "gif":
            data, ending = picture(rng)
        return data[:6] + struct.pack("<HH", 65535, rng.choice((1500, 65535))) + data[10:], ending
    if how == 3:
        return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, rng.choice((30000, -5, 2**31 - 1)), rng.choice((3000, -3000, -(2**31))), 1, rng.choice((1, 8, 24, 32)), rng.choice((0, 1, 2, 3)), 0, 0, 0, 0, 0) + bytes(100), "bmp"  # fmt: skip
    if how == 4:  # TIFF: entries of odd types and counts
        count = rng.randrange(1, 20)
        entries = b"".join(struct.pack("<HHII", rng.choice((256, 257, 258, 259, 262, 273, 277, 278, 279, 322, 323, 330, 34665, 65000)), rng.randrange(14), rng.choice((1, 2, 3, 2**20, 2**32 - 1)), rng.choice((1, 8, 3000, 30000, 2**32 - 1))) for _ in range(count))  # fmt: skip
        return b"II*\0" + struct.pack("<IH", 8, count) + entries + struct.pack(
            "<I", rng.choice((0, 8, 2**32 - 1))
        ), "tiff"
    if how == 5:
        data, ending = picture(rng)
        while ending != "jpg":
            data, ending = picture(rng)
        place = data.find(b"\xff\xc0")
        return data[: place + 5] + struct.pack(">HH", rng.choice((65500, 9000)), rng.choice((65500, 11000))) + data[
            place + 9 :
        ], ending
    if how == 6:
        return npy(rng), "npy"
    if how == 7:
        return rng.choice((b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF\xff\xff\xff\xffWEBPVP8X\xff\xff\xff\xff", b"II*\0", b"GIF89a", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(pwned) (w) file")), rng.choice(("jpg", "png", "webp", "tif", "gif", "bmp"))  # fmt: skip
    return png(4, 4, rng.choice((1, 2, 4, 8, 16, 3)), rng.choice((0, 2, 3, 4, 6, 7)), bytes(200)), "png"


def image(rng: random.Random) -> tuple[bytes, str]:
    """A valid or damaged image, a bomb, or another format than its name says."""
    how = rng.randrange(6)
    if how == 0:
        return bomb(rng)
    data, ending = picture(rng)
    if how == 1:
        ending = rng.choice(("jpg", "png", "webp", "tif", "gif", "bmp", "npy", "jpeg"))
    return (damage(rng, data) if how > 3 else data), ending


# ---------------------------------------------------------------- hostile tars
def label(rng: random.Random) -> bytes:
    return rng.choice(
        (
            b"0",
            b"1",
            b"0\n",
            " ²".encode(),
            "٣".encode(),
            b"-1",
            b"",
            b"9" * 5000,
            b"99999999999",
            b"1e3",
            b"\xff",
            b"\0",
            b"0x1",
            b"cat",
            b"1.0",
            b"\x1b[2J",
            b"a\nb",
            rng.randbytes(8),
        )
    )


def member(rng: random.Random) -> tuple[bytes, str]:
    """(content, extension) of a member of a tar."""
    how = rng.randrange(12)
    if how < 6:
        return image(rng)
    if how == 6:
        return label(rng), "cls"
    if how == 7:
        return broken_json(
            rng, json.dumps(value(rng)).encode(), json.dumps(value(rng)).encode(), b'{"label": [1]}'
        ), "json"
    if how == 8:
        return rng.choice(
            (b"", b"hello", rng.choice(TEXTS).encode(errors="surrogatepass"), b"\xff\xfe", rng.randbytes(99))
        ), "txt"
    if how == 9:
        return rng.randbytes(rng.choice((0, 16, 64))), rng.choice(("docs", "tokens"))
    if how == 10:
        return npy(rng), "npy"
    return rng.randbytes(rng.choice((0, 40))), rng.choice(
        ("mp4", "py", "pth", "pyd", "tar", "x.jpg", "jpg.", "JPG", "j\npg", "")
    )


def header(rng: random.Random, info: tarfile.TarInfo) -> bytes:
    """The header of a member with some hostile fields, usually with a correct checksum."""
    try:
        block = bytearray(
            info.tobuf(
                rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)), "utf-8", "surrogateescape"
            )
        )
    except (ValueError, UnicodeError):
        info.name = "plain.jpg"
        block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    last = len(block) - 512
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        place, wide = rng.choice(
            ((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155), (386, 96), (483, 12))
        )
        fill = rng.choice(
            (
                b"\0",
                b"7",
                b"\xff",
                b"\x80",
                b" ",
                b"-1",
                b"99999999999",
                b"\x80" + b"\x7f" * 11,
                b"/",
                b"../",
                b"\n",
                b"S",
                b"x",
                b"g",
                b"L",
                b"3",
                b"6",
                b"2",
            )
        )
        block[last + place : last + place + wide] = (fill * wide)[:wide]
    if rng.random() < 0.95:
        block[last + 148 : last + 156] = b" " * 8
        block[last + 148 : last + 156] = b"%06o\0 " % (sum(block[last:]))
    return bytes(block)


def tar(rng: random.Random, root: Path) -> bytes:
    out, number = io.BytesIO(), 0
    for _ in range(rng.choice((1, 3, 8, 30))):
        data, ending = member(rng)
        number += rng.random() < 0.6
        info = tarfile.TarInfo(f"{number:05d}.{ending}")
        how = rng.randrange(14)
        if how == 0:
            info.name = rng.choice(("/", "", ".", "..", "./", "../" * 12 + f"{root}/escaped.jpg"[1:], f"{root}/escaped.jpg", "a/../../escaped.jpg", "a//b.jpg", "a/./b.jpg", ".jpg", "x.", "a\0b.jpg", "C:\\x.jpg", "a" * 300 + ".jpg", "a/" * 200 + "b.jpg", "\udcff.jpg", "00.05.jpg"))  # fmt: skip
        elif how == 1:
            info.name = os.fsdecode(name(rng, ending))
        elif how == 2:
            info.type, info.linkname, data = (
                rng.choice((b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"Z")),
                rng.choice((f"{root}/in/secret", "/etc/passwd", "..", "00001.jpg")),
                b"",
            )
        elif how == 3:  # pax records of all kinds before it
            records = b"".join(
                rng.choice(
                    (
                        b"12 path=a.jpg\n", b"20 size=99999999999\n", b"12 size=-5\n\n", b"30 GNU.sparse.size=99999999999999\n", b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n25 GNU.sparse.name=a.jpg\n30 GNU.sparse.realsize=999999\n",
                        b"30 GNU.sparse.map=0,1,2,x,9999\n", b"99999999999 path=x\n", b"0 path=x\n", b"-1 path=x\n", b"x path=x\n", b"20 path=" + bytes(11) + b"\n", b"11 path=\xff\xff\n\n", b"16 mtime=1e99999\n", b"13 hdrcharset=BINARY\n", b"9" * 5000 + b" path=x\n",
                        b"26 path=" + f"{root}/escaped"[:17].encode() + b"\n", b"25 GNU.sparse.numblocks=9999999\n", b"15 uid=nonsense\n",
                    )
                )
                for _ in range(rng.choice((1, 1, 3)))
            )  # fmt: skip
            for _ in range(rng.choice((1, 1, 1, 50, 3000))):
                pax = tarfile.TarInfo("pax")
                pax.type, pax.size = rng.choice((b"x", b"x", b"g")), len(records)
                out.write(pax.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512))
        elif how == 4:  # a long name, again and again, or without an end
            for _ in range(rng.choice((1, 1, 3000))):
                long = tarfile.TarInfo("././@LongLink")
                content = rng.choice((b"a" * 500 + b".jpg\0", b"", b"\xff" * 600, b"a\nb.jpg\0"))
                long.type, long.size = rng.choice((b"L", b"K")), rng.choice((len(content), 2**33, 10**9))
                out.write(long.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512))
        elif how == 5:
            data = b""
            info.size = rng.choice((10**9, 8**11 - 1, 2**40, 2**62))
            out.write(header(rng, info))
            continue
        info.size = len(data)
        out.write(header(rng, info) + data + bytes(-len(data) % 512))
    data = out.getvalue() + bytes(rng.choice((10240, 10240, 10240, 1024, 512, 0)))
    how = rng.randrange(12)
    if how == 0:
        data = damage(rng, data)
    elif how == 1:
        data += rng.randbytes(2000)
    elif how == 2:
        import gzip

        data = gzip.compress(data)
    return data


# ---------------------------------------------------------------- cases: files in, commands out
def odd_files(attack: Attack, rng: random.Random, root: Path) -> Iterator[Argv]:
    """A folder with hostile file names, entries that are not regular files, and links."""
    kinds = rng.choice(
        (("jpg",), ("jpg", "png"), ("txt",), ("jsonl",), ("csv",), ("jpg", "txt"), ("tar",), ("parquet",))
    )
    folder = root / "out" / "mine" if "tar" in kinds else root / "in"  # an index is written beside tars
    folder.mkdir(exist_ok=True)
    for n in range(rng.choice((1, 4, 12))):
        ending = rng.choice(kinds)
        path = os.path.join(os.fsencode(folder), name(rng, ending))
        if rng.random() < 0.4:
            inside = os.path.join(
                os.fsencode(folder), name(rng, rng.choice(("", "jpg", "d"))).replace(b".", b"") or b"d"
            )
            with contextlib.suppress(OSError):
                os.makedirs(inside, exist_ok=True)
                path = os.path.join(inside, os.path.basename(path))
        how = rng.randrange(14)
        with contextlib.suppress(FileExistsError, IsADirectoryError, NotADirectoryError, OSError):
            if how == 0:
                os.mkfifo(path)
            elif how == 1:
                os.symlink(
                    rng.choice(
                        (
                            b"/dev/zero",
                            b"/dev/urandom",
                            b"/dev/stdin",
                            b"/proc/self/environ",
                            b"/proc/kmsg",
                            b".",
                            b"..",
                            b"/",
                            os.path.basename(path),
                            b"/nowhere",
                            b"/proc/self/mem",
                            b"/dev/tty",
                        )
                    ),
                    path,
                )
            elif how == 2:
                line = socket.socket(socket.AF_UNIX)
                here = os.getcwd()
                os.chdir(os.path.dirname(path))
                line.bind(b"s%d." % n + ending.encode())
                os.chdir(here)
                line.close()
            elif how == 3:
                os.mkdir(path)
            elif how == 4:  # holes of many gigabytes
                with open(path, "wb") as file:
                    file.truncate(rng.choice(((1 << 28) + 1, 1 << 31)))
            else:
                if ending in ("jpg", "png"):
                    data = image(rng)[0]
                else:
                    data = tar(rng, root) if ending == "tar" else table(rng, ending, folder)
                with open(path, "wb") as file:
                    file.write(data)
    kind = (
        ["--kind", rng.choice(("images", "text", "image-text", "webdataset", "parquet", "videos"))]
        if rng.random() < 0.4
        else []
    )
    yield ["shards", "build", str(folder), str(root / "out" / "built"), *kind, "--workers", "1"]
    if "tar" in kinds:
        yield ["shards", "index", str(folder)]
    yield ["shards", "stats", str(folder)]


def images(attack: Attack, rng: random.Random, root: Path) -> Iterator[Argv]:
    for n in range(rng.choice((1, 3, 8))):
        data, ending = image(rng)
        (root / "in" / f"{n}.{ending}").write_bytes(data)
    yield ["shards", "build", str(root / "in"), str(root / "out" / "built"), "--kind", "images", "--workers", "1"]
    if (root / "out" / "built").is_dir():
        yield attack.train(root, f"data.train={root / 'out' / 'built'}", "data.batch=1")
        yield ["shards", "stats", str(root / "out" / "built"), "--sheet", str(root / "out" / "sheet.png")]


def tars(attack: Attack, rng: random.Random, root: Path) -> Iterator[Argv]:
    for n in range(rng.choice((1, 1, 2))):
        (root / "in" / f"{n}.tar").write_bytes(tar(rng, root))
    shards = str(root / "in")
    if rng.random() < 0.5:
        yield ["shards", "build", shards, str(root / "out" / "built"), "--workers", "1"]
    if rng.random() < 0.7:
        shards = shutil.copytree(shards, root / "out" / "mine")
        yield ["shards", "index", str(shards)]
    yield ["shards", "stats", str(shards)]
    yield attack.train(root, f"data.train={shards}", "data.batch=1")
    yield ["eval", "pixels", "knn", f"gallery={shards}", f"query={shards}"]
    if rng.random() < 0.3:
        yield ["shards", "split", str(shards), str(root / "out" / "split"), "--val", "0.5", "--workers", "1"]
        yield ["shards", "tokenize", str(shards), str(root / "out" / "tokens"), "--vocab", "300", "--workers", "1"]


def table(rng: random.Random, ending: str, folder: Path) -> bytes:
    rows: list[Any] = []
    for n in range(rng.choice((1, 3, 20))):
        row: dict[str, Any] = {"text": f"document {n}", "image": f"{n}.jpg", "label": n % 2}
        rows.append(mutate(rng, row, rng.choice((0, 1, 2))))
    if ending == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        out = io.BytesIO()
        columns: dict[str, Any] = {}
        for key in rng.choice((("text",), ("image", "label"), ("image", "text", "label"), ("\x1b[2J\n", "text"))):
            kind = rng.choice(
                (
                    pa.string(),
                    pa.binary(),
                    pa.int64(),
                    pa.float64(),
                    pa.null(),
                    pa.list_(pa.int8()),
                    pa.dictionary(pa.int8(), pa.string()),
                )
            )
            cells = {
                "string": "text",
                "binary": image(rng)[0],
                "int64": rng.choice((0, -1, 2**62)),
                "double": 1.5,
                "list<item: int8>": [1, 2],
                "list<element: int8>": [1],
            }
            cell = cells.get(str(kind), "a" if pa.types.is_dictionary(kind) else None)
            columns[key] = pa.array([cell if rng.random() < 0.8 else None for _ in range(4)], kind)
        schema = pa.table(columns)
        if rng.random() < 0.3:
            schema = schema.replace_schema_metadata(
                {"huggingface": json.dumps(mutate(rng, {"info": {"features": {"label": {"names": ["a", "b"]}}}}))}
            )
        pq.write_table(schema, out)
        return damage(rng, out.getvalue()) if rng.random() < 0.5 else out.getvalue()
    if ending in ("csv", "tsv"):
        mark = "," if ending == "csv" else "\t"
        cells = [
            [
                rng.choice(
                    (*TEXTS, "0.jpg", "1.jpg", "cat", "../../../etc/passwd", str(folder / "0.jpg"), "/dev/zero.jpg")
                )
                for _ in range(3)
            ]
            for _ in range(4)
        ]
        head = rng.choice(
            (
                ["image", "text", "label"],
                ["path", "label", "x"],
                ["path", "path", "label"],
                ["", "", ""],
                ["image", "text"],
            )
        )
        lines = [head, *cells] if rng.random() < 0.5 else [head, ["0.jpg", "a text", "cat"], *cells]
        out_text = "\n".join(mark.join(f'"{c}"' if rng.random() < 0.5 else c for c in line) for line in lines)
    elif ending == "jsonl":
        out_text = "\n".join(
            json.dumps(row)
            if rng.random() < 0.9
            else rng.choice((deep(rng, "[", "]"), deep(rng, '{"text":', "}"), "{", "1" * 9000, "NaN", ""))
            for row in rows
        )
    else:
        out_text = rng.choice((*TEXTS, "a\n" * 500))
    data = out_text.encode(errors="surrogatepass")
    return damage(rng, data) if rng.random() < 0.3 else rng.choice((b"", b"", b"\xef\xbb\xbf")) + data


def tables(attack: Attack, rng: random.Random, root: Path) -> Iterator[Argv]:
    ending = rng.choice(("csv", "tsv", "jsonl", "txt", "parquet", "jsonl", "parquet"))
    folder = root / "in"
    for n in range(rng.choice((1, 2))):
        (folder / f"t{n}.{ending}").write_bytes(table(rng, ending, folder))
    target = str(root / "out" / "built")
    if rng.random() < 0.3:
        for n in range(3):
            (folder / f"{n}.jpg").write_bytes(attack.jpeg)
        (root / "labels").mkdir()
        (folder / f"t0.{ending}").rename(root / "labels" / f"l.{ending}")
        yield [
            "shards",
            "build",
            str(folder),
            target,
            "--kind",
            "images",
            "--labels",
            str(root / "labels" / f"l.{ending}"),
            "--workers",
            "1",
        ]
        return
    options = rng.choice(
        (
            [],
            [],
            ["--text-field", "text"],
            ["--lines"],
            ["--image-field", "image"],
            ["--text-field", "text", "--label-field", "label"],
        )
    )
    kind = rng.choice(([], ["--kind", "text"], ["--kind", "image-text"], ["--kind", "parquet"]))
    yield ["shards", "build", str(folder), target, *kind, *options, "--workers", "1"]
    if (root / "out" / "built").is_dir():
        yield ["shards", "tokenize", target, str(root / "out" / "tokens"), "--vocab", "300", "--workers", "1"]
        yield ["eval", "bytes", "knn", f"gallery={target}", f"query={target}"]


def small(rng: random.Random) -> Any:
    """A value without large numbers, because a recipe may legitimately ask for large amounts."""
    while isinstance(out := value(rng), (dict, list)) and len(repr(out)) > 500:
        pass
    return (
        rng.choice((-1, 0, 1.5, "x", None, [], {})) if isinstance(out, (int, float)) and not -100 < out < 100 else out
    )


def yaml_text(rng: random.Random, content: dict) -> str:
    """The YAML of a recipe, hostile in ways that JSON does not have."""
    import yaml

    text = yaml.safe_dump(content, sort_keys=False)
    how = rng.randrange(10)
    if how == 0:
        text += rng.choice(
            (
                "1: 2\n", "null: 1\n", "true: 1\n", "[1, 2]: 3\n", "{a: b}: 3\n", "? [a]\n: b\n", "2001-01-01: 1\n", "? !!python/tuple [1]\n: 2\n", "data: {1: 2}\n", "optim: {? {a: 1} : 2}\n", "model: {null: 1}\n", "!!binary aGk=: 1\n",
                "seed: !!python/object/apply:os.system ['touch pwned']\n", "seed: !!python/name:os.system\n", "seed: 2001-01-01\n", "seed: !!binary aGk=\n", "seed: !!set {a}\n", "seed: !!omap [a: 1]\n", "<<: 1\n", "<<: [1]\n", "<<: {a: 1}\n", "seed: &a [*a]\n", "seed: &a {b: *a}\n",
                "data: &d {batch: *d}\n", "seed: *nowhere\n", "seed: !x y\n", "seed: 1_0:59\n", "seed: 0o9\n", "seed: 1:2:3\n", "\t\n", "\0\n", "%YAML 9.9\n---\n", "--- 1\n--- 2\n", "steps: 99999999999999999999999999999999\n", f"steps: {'9' * 5000}\n", f"run: {'r' * 300}\n", "run: 'a\n\n  b'\n",
                "objective: ../../evil.py\n", "extends: .\n", "extends: recipe.yaml\n", "extends: [1]\n", "extends: ''\n", "extends: /dev/zero\n", "extends: /\n", "seed: !!float x\n", "seed: !!int x\n", "seed: !!timestamp x\n", "seed: !!null x\n", "seed: !!bool x\n", "seed: 2001-99-99\n", "seed: 9999-12-31T99:99:99Z\n",
            )
        )  # fmt: skip
    elif how == 1:
        text += "x: " + deep(rng, rng.choice(("[", "{a: ", "- ", "? ")), "")
    elif how == 2:  # a billion laughs
        text += (
            "a0: &a0 [x]\n"
            + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
            + "steps: *a9\n"
        )
    elif how == 3:
        text = damage(rng, text.encode()).decode(errors="surrogateescape")
    return text


def recipes(attack: Attack, rng: random.Random, root: Path) -> Iterator[Argv]:
    content = mutate(rng, attack.recipe, rng.choice((0, 1, 1, 2)), small) if rng.random() < 0.8 else attack.recipe
    path = root / "in" / "recipe.yaml"
    path.write_bytes(
        yaml_text(rng, content if isinstance(content, dict) else {"steps": content}).encode(errors="surrogateescape")
    )
    keys = [k for k in attack.keys if rng.random() < 0.02]
    more = [
        f"{rng.choice((key, key + '.x', key + '[0]', '.' + key, key + '..'))}={yaml_value(rng)}" for key in keys[:2]
    ]
    yield ["plan", str(path), *more]
    yield attack.train(root, *more, recipe=path)


def yaml_value(rng: random.Random) -> str:
    out = rng.choice(
        (
            json.dumps(small(rng)),
            "{",
            "[",
            "&a [*a]",
            "!!python/object/apply:os.system ['touch pwned']",
            "{1: 2}",
            "2001-01-01",
            "",
            deep(rng, "[", "]"),
            "~",
        )
    )
    return out.replace("\0", "")


def manifests(attack: Attack, rng: random.Random, root: Path) -> Iterator[Argv]:
    text = rng.random() < 0.4
    folder = Path(shutil.copytree(attack.tokens if text else attack.shards, root / "in" / "set"))
    where = folder / "manifest.json"
    how = rng.randrange(5)
    if how < 3:
        where.write_text(json.dumps(mutate(rng, json.loads(where.read_text()), rng.choice((1, 1, 3)))))
    elif how == 3:
        where.write_bytes(broken_json(rng, where.read_bytes()))
    else:
        (index,) = folder.glob("index-*.bin")
        index.write_bytes(
            damage(rng, index.read_bytes()) if rng.random() < 0.5 else rng.randbytes(index.stat().st_size)
        )
    yield (
        attack.train_text(root, f"data.train={folder}")
        if text
        else attack.train(root, f"data.train={folder}", "data.batch=2")
    )
    yield ["shards", "verify", str(folder)]
    yield ["shards", "stats", str(folder)]
    if not text:
        yield ["eval", "pixels", "knn", f"gallery={folder}", f"query={folder}"]
        yield ["shards", "build", str(folder), str(root / "out" / "built"), "--workers", "1"]
    yield ["shards", "index", str(shutil.copytree(folder, root / "out" / "mine"))]


def tokenizers(attack: Attack, rng: random.Random, root: Path) -> Iterator[Argv]:
    folder = Path(shutil.copytree(attack.tokens, root / "in" / "set"))
    place = folder / rng.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json"))
    how = rng.randrange(6)
    if how < 4:
        place.write_text(json.dumps(mutate(rng, json.loads(place.read_text()), rng.choice((1, 1, 3)))))
    else:
        huge = b'{"model": {"type": "BPE", "vocab": {"a": 999999999999}, "merges": []}}'
        place.write_bytes(broken_json(rng, place.read_bytes(), deep(rng, '{"model":', "}").encode(), huge))
    yield [
        "shards",
        "tokenize",
        str(attack.texts),
        str(root / "out" / "tokens"),
        "--tokenizer",
        str(folder),
        "--workers",
        "1",
    ]
    yield attack.train_text(root, f"data.train={folder}")
    model = Path(shutil.copytree(attack.text_export, root / "in" / "model"))
    shutil.copy(place, model / place.name)
    yield ["generate", str(model), "the sea", "--max-tokens", "2"]
    yield ["eval", str(model), "bits_per_byte", f"query={attack.tokens}"]


def tensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with a hostile header."""
    size = int.from_bytes(data[:8], "little")
    head, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    how = rng.randrange(5)
    if how == 0:
        return damage(rng, data)
    if how == 1:
        return struct.pack("<Q", rng.choice((0, 1, 2**20, 2**62, 2**64 - 1, size - 1, size + 1))) + data[8:]
    text = json.dumps(mutate(rng, head, rng.choice((1, 2)))) if how < 4 else deep(rng, '{"a":', "}")
    return struct.pack("<Q", len(text.encode())) + text.encode() + rest


def exports(attack: Attack, rng: random.Random, root: Path) -> Iterator[Argv]:
    text = rng.random() < 0.3
    source = attack.text_export if text else rng.choice((attack.export, attack.export, attack.timm))
    folder = Path(shutil.copytree(source, root / "in" / "model"))
    how = rng.randrange(8)
    if how < 5:
        place = folder / "config.json"
        content = json.loads(place.read_text())
        if rng.random() < 0.4 and "unlabeled" in content:
            del content["unlabeled"]  # as transformers reads it
        place.write_text(json.dumps(mutate(rng, content, rng.choice((1, 1, 3)))))
    elif how == 5:
        place = folder / "model.safetensors"
        place.write_bytes(tensors(rng, place.read_bytes()))
    elif how == 6:
        place = folder / rng.choice(("config.json", "preprocessor_config.json", "model.safetensors.index.json"))
        before = place.read_bytes() if place.is_file() else b"{}"
        escaping, wrong = b'{"weight_map": {"a": "../../../etc/passwd"}}', b'{"weight_map": 1}'
        place.write_bytes(broken_json(rng, before, escaping, wrong, b'{"image_mean": 1, "image_std": [1e999]}'))
    else:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickled())
    shards = attack.tokens if text else attack.shards
    protocol = "bits_per_byte" if text else "knn"
    yield ["eval", str(folder), protocol, *([] if text else [f"gallery={shards}"]), f"query={shards}"]
    if text:
        yield ["generate", str(folder), "the sea", "--max-tokens", "2"]
    else:
        yield attack.train(root, f"init.backbone={folder}")


def pickled() -> bytes:
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch pwned",)

    return pickle.dumps({"model": Evil()})


def checkpoints(attack: Attack, rng: random.Random, root: Path) -> Iterator[Argv]:
    run = Path(shutil.copytree(attack.run, root / "out" / "run"))
    places = sorted(p for p in (run / "checkpoints").rglob("*") if p.is_file())
    place = rng.choice([*places, run / "recipe.yaml"])
    how = rng.randrange(6)
    if place.name == "run.json" and how < 4:
        from pretrain.checkpoint.integrity import run_json_digest

        about = mutate(
            rng, {k: v for k, v in json.loads(place.read_text()).items() if k != "digest"}, rng.choice((1, 1, 3))
        )
        if isinstance(about, dict) and rng.random() < 0.9:
            with contextlib.suppress(ValueError, RecursionError, UnicodeError):
                about["digest"] = run_json_digest(about)
        place.write_text(json.dumps(about))
    elif place.name == "recipe.yaml":
        import yaml

        content = mutate(rng, yaml.safe_load(place.read_text()), 1, small)
        place.write_bytes(
            yaml_text(rng, content if isinstance(content, dict) else {"steps": 1}).encode(errors="surrogateescape")
        )
    elif place.name in ("owner.json", "latest") and how < 5:
        place.write_bytes(broken_json(rng, place.read_bytes()))
    elif how < 5 or place.name != ".metadata":
        place.write_bytes(damage(rng, place.read_bytes()))
    else:
        place.write_bytes(pickled())
    yield ["export", str(run), str(root / "out" / "exported")]
    yield ["checkpoint", "inspect", str(run)]
    yield ["checkpoint", "verify", str(run)]
    yield attack.train(root, f"init.run={run}")
    yield attack.train(root, recipe=run, run=run)


def runs(attack: Attack, rng: random.Random, root: Path) -> Iterator[Argv]:
    run = Path(shutil.copytree(attack.run, root / "out" / "run"))
    for _ in range(rng.choice((1, 2))):
        place = run / rng.choice(
            (
                "metrics.jsonl",
                "results.jsonl",
                "samples.jsonl",
                "log.txt",
                "recipe.yaml",
                "data/0.json",
                "pictures/reconstructions-000000000.png",
                "export/0/config.json",
                "export/2/config.json",
                "export/2/README.md",
                ".run.json",
                ".run.lock",
                "damaged/damaged-0.jsonl",
                "tokenizer.json",
            )
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        before = place.read_bytes() if place.is_file() else b'{"step": 1, "prompt": "a", "text": "b"}\n'
        if place.suffix == ".jsonl" and rng.random() < 0.8:
            rows = [mutate(rng, json.loads(line), rng.choice((0, 1, 1))) for line in before.splitlines()]
            place.write_text("\n".join(json.dumps(row) for row in rows))
        elif place.name == ".run.lock" and rng.random() < 0.8:
            holder = {"host": "a", "machine": "b", "pid": 1, "started": "1", "since": "1"}
            place.write_text(json.dumps(mutate(rng, {"token": "a", "holders": [holder]})))
        elif place.suffix == ".json" and rng.random() < 0.8:
            place.write_text(json.dumps(mutate(rng, json.loads(before))))
        elif place.suffix == ".png":
            place.write_bytes(image(rng)[0])
        else:
            place.write_bytes(broken_json(rng, before, b"x" * (1 << 20)))
    if rng.random() < 0.2:
        (run / "export" / "99999999999999999999").mkdir()
        shutil.copy(run / "export" / "2" / "config.json", run / "export" / "99999999999999999999")
    yield ["report", str(run)]
    yield ["export", str(run), str(root / "out" / "exported")]
    yield ["eval", str(run / "export" / "2")]
    yield attack.train(root, recipe=run, run=run)


CASES: tuple[Case, ...] = (
    odd_files,
    images,
    tars,
    tars,
    tables,
    recipes,
    manifests,
    tokenizers,
    exports,
    checkpoints,
    runs,
)


# ---------------------------------------------------------------- running them
class Watch:
    """Records what the process does, from Python's audit events: files opened for writing, and programs that are
    started."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] = ()
        self.active, self.broken = False, list[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if not self.active:
            return
        if event == "open":
            path, _, flags = args
            if (
                isinstance(path, (str, bytes))
                and flags
                and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            ):
                self._check(event, path)
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.utime"):
            if isinstance(args[0], (str, bytes)) and not any(
                isinstance(a, int) and a > 2 for a in args[-1:]
            ):  # not by a folder's number, as rmtree does
                self._check(event, args[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._check(event, args[1])
        elif event in ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn"):
            self.broken.append(f"{event} {args}")
        elif event == "subprocess.Popen" and "-m" not in args[1]:
            self.broken.append(f"{event} {args[1]}")
        elif (
            event == "compile"
            and isinstance(args[1], (str, bytes))
            and os.fsdecode(args[1]).startswith(self.allowed[0])
        ):
            self.broken.append(f"code of {args[1]!r} was compiled")

    def _check(self, event: str, path: str | bytes) -> None:
        text = os.path.abspath(os.fsdecode(path))
        whole = os.path.join(os.path.realpath(os.path.dirname(text)), os.path.basename(text))
        if not whole.startswith((*self.allowed[1:], "/dev/null", "/proc/self/", "/dev/shm/")):
            self.broken.append(f"{event} {whole}")


class Attack:
    def __init__(self, folder: Path) -> None:
        from tests.tars import jpeg

        self.folder = folder
        self.jpeg = jpeg(0, 40)
        self.watch = Watch()
        self._prepare()

    def _prepare(self) -> None:
        """Valid inputs for the cases: shards, token sets, runs and their exports."""
        from common import config
        from data_pipeline.build.build_shards import build
        from pretrain.interchange.export_formats import release
        from pretrain.train import train
        from tests.conftest import tiny_recipe
        from tests.data.texts import tokens_of, write_texts
        from tests.tars import jpeg

        for n in range(12):
            place = self.folder / "photos" / f"class{n % 2}" / f"{n}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(jpeg(n, 40))
        self.shards = self.folder / "shards"
        build(self.folder / "photos", self.shards, workers=1, say=lambda _: None)
        self.texts = write_texts(self.folder / "texts", 12, 1, 50)
        self.tokens = tokens_of(self.texts, self.folder / "tokens", vocab=300)
        tiny = [
            "steps=2",
            "data.batch=2",
            "export=2",
            "checkpoint=2",
            f"eval.gallery={self.shards}",
            f"eval.test={self.shards}",
            "eval.final=[knn]",
        ]
        cfg = tiny_recipe("mae", self.shards, self.folder / "run", *tiny)
        self.recipe = {k: v for k, v in config.to_dict(cfg).items() if k != "run"}
        self.keys = sorted(_leaves(self.recipe))
        self.run = train(cfg)
        text = ["steps=2", "data.batch=2", f"data.train={self.tokens}"]
        cfg = tiny_recipe("gpt", self.shards, self.folder / "text_run", *text)
        self.text_recipe = self.folder / "text.yaml"
        self.text_recipe.write_text(config.dump(cfg))
        self.text_export = train(cfg) / "export" / "2"
        self.export = self.run / "export" / "2"
        release(shutil.copytree(self.export, self.folder / "copy"), ["timm"])
        self.timm = next(
            (p.parent for p in (self.folder / "copy").rglob("config.json") if "timm" in str(p.parent)), self.export
        )
        self.run_recipe = self.folder / "mae.yaml"
        self.run_recipe.write_text((self.run / "recipe.yaml").read_text())

    def train(self, root: Path, *overrides: str, recipe: Path | None = None, run: Path | None = None) -> Argv:
        fixed = [
            "steps=1",
            "data.workers=0",
            "threads=1",
            "log.flops=false",
            "device=cpu",
            "precision=fp32",
            "data.fetch.retry_seconds=1",
        ]
        given = [o for o in overrides if o]
        fixed = fixed if run is None else ["data.workers=0", "data.fetch.retry_seconds=1"]
        return ["TRAIN", str(recipe or self.run_recipe), *fixed, *given, f"run={run or root / 'out' / 'trained'}"]

    def train_text(self, root: Path, *overrides: str) -> Argv:
        return self.train(root, "data.batch=1", *overrides, recipe=self.text_recipe)

    def case(self, number: int, keep: bool = False) -> list[str]:
        """Run a case. Returns lines about its failures; [] if there are none."""
        rng = random.Random(number)
        kind = CASES[number % len(CASES)]
        root = self.folder / f"case{number}"
        for part in ("in", "out", "cache", "tmp", "cwd", "home"):
            (root / part).mkdir(parents=True)
        wrong: list[str] = []
        tempfile.tempdir = str(root / "tmp")
        os.environ |= {"UNLABELED_CACHE": str(root / "cache"), "HOME": str(root / "home"), "TMPDIR": str(root / "tmp")}
        os.chdir(root / "cwd")
        self.watch.allowed = (str(root / "in") + "/", *(f"{root / part}" for part in ("out", "cache", "tmp")))
        commands = kind(self, rng, root)
        while True:
            try:
                argv = next(commands)  # not watched: makes the files
            except StopIteration:
                break
            began, memory = time.monotonic(), peak_of_now()
            problem = self._command(argv)
            self.watch.active = False
            spent, grown = time.monotonic() - began, peak() - memory
            problem += [f"{grown >> 20} MB of memory"] if grown > BYTES else []
            problem += [*dict.fromkeys(self.watch.broken)]
            self.watch.broken.clear()
            if os.environ.get("ATTACK_VERBOSE"):
                print(f"  {spent:.1f} s {grown >> 20} MB {self.last}: {' '.join(argv)[:300]!r}", flush=True)
            if problem:
                wrong += [f"{kind.__name__}: unlabeled {' '.join(argv)[:600]!r}", *problem]
        there = {p.name for p in root.iterdir()} - {"in", "out", "cache", "tmp", "cwd", "home", "labels"}
        wrong += [f"{kind.__name__}: {there} appeared"] if there else []
        wrong += [f"{kind.__name__}: {p} appeared" for p in (root / "cwd").iterdir()]
        os.chdir(self.folder)
        if not keep:
            shutil.rmtree(root, ignore_errors=True)
        return wrong

    def _command(self, argv: Argv) -> list[str]:
        """Run one command in this process. Returns a line about a wrong end, or ""."""
        out, err = (
            io.TextIOWrapper(io.BytesIO(), "utf-8"),
            io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace"),
        )
        handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)}

        def hung(number: int, frame: Any) -> None:
            raise Hung

        children = os.open(self.folder / "stderr", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        own = os.dup(2)
        os.dup2(children, 2)  # what processes that the command starts write
        signal.signal(signal.SIGALRM, hung)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        self.watch.active, self.last = True, ""
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = run_command(argv)
        except Hung:
            return [f"hung for {SECONDS:.0f} seconds", *traceback.format_exc().splitlines()[-14:]]
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
            if code not in (2, 75):
                return [f"ended with code {ended.code}"]
        except BaseException:
            return [line[:500] for line in traceback.format_exc().splitlines()[-14:]]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.watch.active = False
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.dup2(own, 2)
            os.close(own)
            os.close(children)
        err.seek(0)
        said = err.read()
        below = (self.folder / "stderr").read_text(errors="replace")
        if "Traceback" in below:
            return ["a process that it started printed a trace", *below.splitlines()[-14:]]
        self.last = f"{code} {said[-300:]!r}"
        if code == 0 or (code == 1 and "verify" in argv):
            return ["a trace was printed", said[-2000:]] if "Traceback" in said else []
        lines = [line for line in said.split("\n") if line.startswith("error: ")]
        last = said.rstrip("\n").rpartition("\n")[2]
        if code != 2 or len(lines) != 1 or last != lines[0] or "Traceback" in said or len(last) > LINE or "\r" in last:
            return [f"code {code}, and not one line of at most {LINE} characters:", said[:500], said[-1500:]]
        return []


def run_command(argv: Argv) -> int:
    """Run a command line in this process; TRAIN stands for `unlabeled train` without further processes."""
    from common.errors import run_main
    from launch import cli

    if argv[0] != "TRAIN":
        sys.argv = ["unlabeled", *argv]
        return cli.main()

    def train() -> int:
        from pretrain.recipes.recipe import load
        from pretrain.train import train

        train(load(argv[1], argv[2:]))
        return 0

    return run_main(train)


def _leaves(content: dict, prefix: str = "") -> Iterator[str]:
    for key, held in content.items():
        yield prefix + key
        if isinstance(held, dict):
            yield from _leaves(held, f"{prefix}{key}.")


def peak_of_now() -> int:
    """Bytes that the process has at present; `peak` is reset to this value."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    return 0


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.attack", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--seconds", type=float, default=60.0, help="start no case after so many")
    parser.add_argument("--only", type=int, help="a single case, whose files stay")
    parser.add_argument("--kind", default="", help="only cases of this kind")
    parser.add_argument("--folder", default="", help="where files are made (default: a temporary folder)")
    args = parser.parse_args()
    sys.dont_write_bytecode = True
    faulthandler.enable(os.dup(2))  # the descriptor 2 itself is another file while a command runs
    resource.setrlimit(resource.RLIMIT_DATA, (MOST, MOST))
    folder = Path(args.folder or tempfile.mkdtemp(prefix="attack-")).resolve()
    os.environ["UNLABELED_CACHE"] = str(folder / "cache")
    import torch

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        attack = Attack(folder)
    began, number, failed, done = time.monotonic(), args.seed if args.only is None else args.only, 0, 0
    while time.monotonic() - began < args.seconds:
        if not args.kind or CASES[number % len(CASES)].__name__ == args.kind:
            print(f"case {number}", flush=True)
            wrong = attack.case(number, keep=args.only is not None)
            done += 1
            if wrong:
                failed += 1
                print(
                    f"FAILED {number}; alone: python -m tests.attack --only {number}", *wrong, sep="\n    ", flush=True
                )
        if args.only is not None:
            break
        number += 1
    print(f"{done} cases, {failed} failed", flush=True)
    if args.only is None and not args.folder:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
