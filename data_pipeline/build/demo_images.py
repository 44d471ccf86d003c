"""Folders of real images for the quick start, one folder per class: patches of photographed materials, which are cut
from the textures of a Debian package. If no Debian mirror answers, scikit-learn's handwritten digits on a noisy
background are used. The same request always gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageStat

from common import output
from common.errors import DataError
from common.untrusted import loads

SIZE = 64  # pixels
SPLITS = ("train", "val", "test")
SETS = {
    "materials": {"package": "ufoai-textures (Debian)", "licence": "GPL-2+, CC-BY or CC-BY-SA, by file"},
    "digits": {"package": "scikit-learn (PyPI)", "licence": "CC-BY-4.0 (UCI, E. Alpaydin and C. Kaynak)"},
}
Item = tuple[str, str, str, Image.Image]  # split, class, key, image


def fetch(out: Path, source: str = "auto", say: Callable[[str], None] = output.say) -> str:
    """Write out/{train,val,test}/<class>/<key>.png and out/set.json. Returns the name of the set, "materials" or
    "digits".

    "auto": materials, or digits if the package cannot be downloaded. `out` exists only when it is complete. If it
    already holds the requested set, nothing is done.
    """
    out = Path(out)
    if source not in ("auto", *SETS):
        raise DataError(f'source is "{source}"; it can be auto, {" or ".join(SETS)}')
    if existing := _existing_set(out, source):
        say(f"{out} already holds {existing}")
        return existing
    name, pk3 = source, None
    if source != "digits":
        try:
            name, pk3 = "materials", textures_file(say)
        except DataError as error:
            if source == "materials":
                raise
            say(f"the materials are not available ({error}); using scikit-learn's digits instead")
            name = "digits"
    counts = _write(name, materials(pk3) if pk3 else digits(), out)
    say(f"{out}: {name}, " + ", ".join(f"{counts[split]} {split}" for split in SPLITS) + " images")
    return name


def _existing_set(out: Path, source: str) -> str | None:
    """The set that `out` holds; None if it is empty or does not exist. Raises DataError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        existing = loads((out / "set.json").read_text())["set"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{out}: exists and is not a complete demo set; name another folder, or delete it") from None
    if existing != source and not (source == "auto" and existing in SETS):
        raise DataError(f'{out}: holds "{existing}", not "{source}"; name another folder, or delete it')
    return existing


def _write(name: str, items: Iterator[Item], out: Path) -> dict[str, int]:
    """Write the images and set.json in a temporary folder, which is renamed to `out` at the end. Returns {split: number
    of images}."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial-{uuid.uuid4().hex}")
    partial.mkdir()  # a new folder, so that it can be deleted with all files in it
    counts, classes = dict.fromkeys(SPLITS, 0), set()
    try:
        for split, label, key, image in items:
            folder = partial / split / label
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{key}.png")
            counts[split] += 1
            classes.add(label)
        meta = {"set": name, "classes": sorted(classes), "counts": counts, **SETS[name]}
        (partial / "set.json").write_text(json.dumps(meta, indent=1) + "\n")
        partial.rename(out)  # replaces an empty folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return counts


# ---------------------------------------------------------------- materials
PATCHES_PER_TEXTURE = 16
# {material: a pattern of file names}. A texture has the first material whose pattern matches.
KINDS = {
    "brick": r"brick",
    "wallpaper": r"wallpaper|textil|japwall",
    "carpet": r"carpet|rug",
    "grass": r"grass|hedge|jungle|leaves|potato",
    "snow-ice": r"snow|(^|[^a-z])ice|arctic|cold",
    "sand": r"desert|sand",
    "rock": r"rock|stone|mountain|cliff|gravel",
    "tile": r"tile|teracota|bath|marble",
    "wood": r"wood|plank|bark|parquet|tree_chopped",
    "roof": r"roof|shingle",
    "metal": r"metal|mtl|met_|steel|rust|grate|tin_|iron|alu",
    "concrete": r"conc|crete|cement|plaster|asphalt|pavement|sidewalk",
    "earth": r"dirt|soil|mud|ground|wasted|sp_ground",
}
# Files that are not used: normal and gloss maps, and images of objects instead of surfaces.
NOT_SURFACES = re.compile(
    r"_(nm|sm|gm|rm|norm|glow|blend)\.|way_|sign|door|window|fence|fnce|stripe|lamp|light|glass|dummy"
    r"|tex_(pics|alienb|ufo|tech|lights|vehicles|furniture|doors|shop|anim|common)/"
)


def materials(pk3: Path) -> Iterator[Item]:
    """Patches of every photographic texture in the archive. A texture and its variants are in the same split."""
    with zipfile.ZipFile(pk3) as archive, ThreadPoolExecutor(2) as pool:  # Pillow releases the GIL
        names = [(name, kind) for name in sorted(archive.namelist()) if (kind := _kind(name))]
        ordinal = itertools.count()
        for start in range(0, len(names), 32):  # in groups, so that few decoded textures are in memory
            group = names[start : start + 32]
            images = pool.map(_surface, [archive.read(name) for name, _ in group])
            textures = [
                (name, kind, next(ordinal), image) for (name, kind), image in zip(group, images, strict=True) if image
            ]
            yield from itertools.chain.from_iterable(pool.map(_patches, textures))


def _kind(name: str) -> str | None:
    """The material of a texture file; None for any other file."""
    if not name.endswith((".png", ".jpg")) or NOT_SURFACES.search(name):
        return None
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.rpartition("/")[2])), None)


def _split(name: str) -> str:
    """The split of a texture, by a hash of its name without the last letter, so that wood01a and wood01b are in the
    same split."""
    family = re.sub(r"_?[a-z]$", "", re.sub(r"[a-z]?\.(png|jpg)$", "", name.partition("/")[2]))
    fraction = int(hashlib.sha1(family.encode()).hexdigest()[:8], 16) / 2**32
    return "test" if fraction < 0.3 else "val" if fraction < 0.4 else "train"


def _surface(data: bytes) -> Image.Image | None:
    """The texture, resized to at most 512 pixels; None if it is small, transparent or of a single colour."""
    image: Image.Image = Image.open(io.BytesIO(data))
    if min(image.size) < 256:
        return None
    rgba = image.convert("RGBA")
    image = rgba.convert("RGB")
    if np.min(rgba.getchannel("A").getextrema()) < 250 or np.mean(ImageStat.Stat(image).stddev) < 4:
        return None
    scale = min(1, 512 / max(image.size))
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def _patches(texture: tuple[str, str, int, Image.Image]) -> list[Item]:
    """Random squares of 64 to 128 pixels, seeded by the texture's ordinal."""
    name, kind, ordinal, image = texture
    key = re.sub(r"\W+", "-", name.partition("/")[2].rpartition(".")[0])
    rng = np.random.default_rng(ordinal)
    items = []
    for number in range(PATCHES_PER_TEXTURE):
        side = int(rng.integers(SIZE, min(*image.size, 2 * SIZE) + 1))
        x, y = int(rng.integers(0, image.width - side + 1)), int(rng.integers(0, image.height - side + 1))
        patch = image.crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        items.append((_split(name), kind, f"{key}-{number:02d}", patch))
    return items


# ---------------------------------------------------------------- the Debian package
PACKAGE, MEMBER = "ufoai-textures", "usr/share/games/ufoai/base/0textures.pk3"
INSTALLED = Path("/", MEMBER)
APT_SECONDS = 300


def textures_file(say: Callable[[str], None] = output.say) -> Path:
    """The archive of textures: that of the installed package, or the one in the cache ($UNLABELED_CACHE or
    ~/.cache/unlabeled), into which it is downloaded if necessary."""
    cache = Path(os.environ.get("UNLABELED_CACHE") or Path.home() / ".cache" / "unlabeled", PACKAGE)
    cached = cache / INSTALLED.name
    for path in (INSTALLED, cached):
        if path.exists():
            return path
    say(f"downloading Debian's {PACKAGE} (336 MB) to {cache}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            unpack_member(_download(Path(folder)), MEMBER, Path(folder, "member"))
            os.replace(Path(folder, "member"), cached)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{cache}: {reason}; set UNLABELED_CACHE to a folder with 700 MB free") from None
    return cached


def _download(folder: Path) -> Path:
    """Run `apt-get download` in `folder`. If it fails, run `apt-get update`, because new containers have no package
    lists, and try again. Returns the path of the package. Raises DataError."""
    try:
        problem = _apt(folder, "download", PACKAGE)
        if problem and not _apt(folder, "update"):
            problem = _apt(folder, "download", PACKAGE)
    except FileNotFoundError:
        problem = "apt-get is not installed"
    except subprocess.TimeoutExpired:
        problem = f"apt-get took more than {APT_SECONDS} seconds"
    if problem:
        advice = f"run `apt-get update && apt-get install {PACKAGE}` as root where a mirror is reachable, or use digits"
        raise DataError(f"Debian package {PACKAGE} cannot be downloaded: {problem}; {advice}")
    return next(folder.glob("*.deb"))


def _apt(folder: Path, *words: str) -> str:
    """Run apt-get. Returns "" or the reason why it failed."""
    command = ["apt-get", "-o", "Acquire::http::Timeout=20", "-o", "Acquire::https::Timeout=20", *words]
    # A file instead of a pipe, because apt's child processes keep a pipe open after a time-out has ended apt itself.
    with tempfile.TemporaryFile(dir=folder) as log:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        done = subprocess.run(command, cwd=folder, timeout=APT_SECONDS, env={**os.environ, "LC_ALL": "C"}, **streams)
        log.seek(0)
        errors = [line[3:] for line in log.read().decode(errors="replace").splitlines() if line.startswith("E: ")]
    return "" if done.returncode == 0 else "".join(errors[:1]) or f"apt-get {words[0]} ended with {done.returncode}"


def unpack_member(deb: Path, member: str, target: Path) -> None:
    """Copy one file out of a .deb: an `ar` archive whose data.tar.{xz,gz,zst} holds the files as ./path."""
    with ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(open(deb, "rb"))
        if _seek_data(deb, file).endswith(".zst"):  # Python 3.11 cannot read it; dpkg-deb can, and comes with apt-get
            command = ["dpkg-deb", "--fsys-tarfile", str(deb)]
            pipe = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            file = stack.enter_context(pipe).stdout  # type: ignore[assignment]
        tar = stack.enter_context(tarfile.open(fileobj=file, mode="r|*"))
        for entry in tar:
            if entry.isreg() and entry.name.removeprefix("./") == member:
                with open(target, "wb") as copy:
                    shutil.copyfileobj(tar.extractfile(entry), copy)  # type: ignore[arg-type]
                return
    raise DataError(
        f"{deb.name}: does not hold {member}; it may be another version of the package than 2.5-2; use digits"
    )


def _seek_data(deb: Path, file: IO[bytes]) -> str:
    """Seek to the beginning of data.tar in a .deb file. Returns the name of that member."""
    is_archive = file.read(8) == b"!<arch>\n"
    while is_archive and len(header := file.read(60)) == 60:
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            return name
        file.seek(size + size % 2, os.SEEK_CUR)  # members start at even offsets
    raise DataError(f"{deb.name}: is not a complete Debian package; try again, or use digits")


# ---------------------------------------------------------------- digits
PLACEMENTS = {"train": 3, "val": 1, "test": 1}  # images per handwritten digit


def digits() -> Iterator[Item]:
    """Scikit-learn's digits, each at a random position and size. 60, 10 and 30 % of the digits of each class are in
    train, val and test.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("digits: scikit-learn is not installed; run `pip install scikit-learn`") from None
    data = load_digits()
    for label in range(10):
        members = np.random.default_rng(label).permutation(np.flatnonzero(data.target == label))
        cuts = [round(0.6 * len(members)), round(0.7 * len(members))]
        for split, numbers in zip(SPLITS, np.split(members, cuts), strict=True):
            for number, placement in itertools.product(sorted(numbers.tolist()), range(PLACEMENTS[split])):
                image = _draw_digit(data.images[number], np.random.default_rng([number, placement]))
                yield split, str(label), f"{number:04d}-{placement}", image


def _draw_digit(digit: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A light digit at a random position on a dark background of low contrast, with coarse and fine noise."""
    side = int(rng.integers(28, 57))
    drawn = Image.fromarray((digit * 255 / 16).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    ink = Image.new("L", (SIZE, SIZE))
    ink.paste(drawn, tuple(rng.integers(0, SIZE - side + 1, size=2).tolist()))
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(ink.size, Image.Resampling.BICUBIC)
    background = rng.uniform(30, 110, 3) + (np.asarray(coarse) / 255 - 0.5) * 50 + rng.normal(0, 6, (SIZE, SIZE, 3))
    alpha = np.asarray(ink)[..., None] / 255  # [SIZE, SIZE, 1]
    pixels = background * (1 - alpha) + rng.uniform(170, 250, 3) * alpha
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
