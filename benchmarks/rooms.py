"""Pictures of furnished rooms with the kind and the depth of each pixel, from the 3-D models of Debian's
`sweethome3d-furniture` (CC0 and CC-BY 3.0), in the sizes that its catalogue states.

Floor, walls and objects become coloured points, which are painted from far to near. Rooms of tests have other objects
than those of training. Where no point is painted, the mask is 255 and the depth 0.
"""

from __future__ import annotations

import re
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from furniture import HELD_OUT, LARGEST, LIBRARIES, PACKAGE, read_mesh, surface
from package_data import debian, fraction

from data_pipeline.shards import index

WIDTH, HEIGHT = 96, 72  # pixels of a picture
STRIDE = 3  # each n-th model of the catalogue
OBJECT_POINTS, PLANE_POINTS = 12_000, 30_000
WALL = 2.6  # metres
KINDS = {  # kind: words in the English name of a model; the first kind that matches
    "plant": "plant|tree|flower|tulip|ficus|palm|cactus|bonsai|bush",
    "lamp": "lamp|light|lantern|candle|chandelier",
    "bath": "toilet|bath|shower|sink|basin|bidet|towel",
    "bed": "bed|crib|mattress",
    "seat": "chair|sofa|couch|stool|bench|armchair|seat",
    "table": "table|desk",
    "storage": "wardrobe|cabinet|bookcase|shelf|shelves|chest|drawers?|dresser|cupboard|rack|box|basket",
    "appliance": "oven|fridge|refrigerator|stove|cooker|washing|dryer|toaster|microwave|kettle|heater|radiator|fan",
    "device": "tv|phone|laptop|computer|speaker|printer|radio|screen|clock|piano|guitar",
}
CLASSES = ["floor", "wall", *KINDS, "other"]
LEFT_OUT = r"\b(door|window|shutter|blind|curtain|railing|fence|stairs?)\b"  # they belong to walls, or outside


class Thing(NamedTuple):
    points: np.ndarray  # float32 [P, 3] in metres, y up, standing on y = 0
    colors: np.ndarray  # float32 [P, 3]
    kind: int  # an index into CLASSES


def catalogue(libraries: Path) -> Iterator[dict[str, str]]:
    """The entries of all models of furniture: "path" (of the archive), "name", "model", "width", …"""
    for path in sorted(libraries.glob("*.sh3f")):
        with zipfile.ZipFile(path) as archive:
            text = archive.read("PluginFurnitureCatalog.properties").decode("latin-1")
            entries = dict[str, dict[str, str]]()
            for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*?)\s*$", text, re.MULTILINE):
                entries.setdefault(number, {"path": str(path)})[key] = value
            for entry in entries.values():
                model = entry.get("model", "").lstrip("/")
                is_known = model.endswith(".obj") and "modelRotation" not in entry
                if is_known and archive.getinfo(model).file_size < LARGEST and not re.search(LEFT_OUT, name_of(entry)):
                    yield {**entry, "model": model}


def name_of(entry: dict[str, str]) -> str:
    return entry["name"].lower()


def kind_of(name: str) -> int:
    found = (kind for kind, words in KINDS.items() if re.search(rf"\b({words})\b", name))
    return CLASSES.index(next(found, "other"))


def thing(entry: dict[str, str]) -> Thing | None:
    """The surface of a model in its size; None if it has no surface, or does not fit into a room."""
    size = np.array([float(entry[key]) for key in ("width", "height", "depth")]) / 100  # metres
    if not 0.25 < size.max() < 2.6:
        return None
    rng = np.random.default_rng(int(2**32 * fraction(entry["model"])))
    try:
        with zipfile.ZipFile(entry["path"]) as archive:
            points, colors = surface(read_mesh(archive, entry["model"]), rng)
    except (ValueError, IndexError):  # a file without faces, or with faces of missing corners
        return None
    points, colors = points[:OBJECT_POINTS], colors[:OBJECT_POINTS]  # they are in random order
    points = points * size / np.maximum(np.ptp(points, axis=0), 1e-6)
    points[:, 1] -= points[:, 1].min()
    return Thing(points.astype(np.float32), colors.astype(np.float32), kind_of(name_of(entry)))


def plane(corner: list[float], side: list[float], other: list[float], kind: int, rng: np.random.Generator) -> Thing:
    """A rectangle of a random colour, with tiles in a random contrast."""
    places = rng.random((PLANE_POINTS, 2))
    points = np.array(corner) + places[:, :1] * np.array(side) + places[:, 1:] * np.array(other)
    lengths = [np.linalg.norm(side), np.linalg.norm(other)]
    is_odd = np.floor(places * lengths / rng.uniform(0.2, 0.8)).sum(1) % 2
    colors = rng.uniform(80, 220, 3) + rng.uniform(0, 40) * is_odd[:, None] + rng.normal(0, 5, (PLANE_POINTS, 1))
    return Thing(points.astype(np.float32), colors.astype(np.float32), kind)


def room(things: list[Thing], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(picture uint8 [H, W, 3], mask uint8 [H, W], depth float16 [H, W] in metres) of a room of three to eight objects."""
    width, length = rng.uniform(3, 5, 2)
    x, z = width / 2, length / 2
    floor, wall = (CLASSES.index(name) for name in ("floor", "wall"))
    parts = [
        plane([-x, 0, -z], [width, 0, 0], [0, 0, length + 1], floor, rng),
        plane([-x, 0, -z], [width, 0, 0], [0, WALL, 0], wall, rng),
        plane([-x, 0, -z], [0, 0, length + 1], [0, WALL, 0], wall, rng),
        plane([x, 0, -z], [0, 0, length + 1], [0, WALL, 0], wall, rng),
    ]
    taken: list[tuple[float, float, float]] = []
    for _ in range(40):
        one = things[rng.integers(len(things))]
        radius = float(np.abs(one.points[:, [0, 2]]).max())
        if len(taken) == 8 or 2 * radius > min(width, length) - 0.5:
            continue
        at = rng.uniform([radius - x, radius - z], [x - radius, z - radius])
        if any(np.hypot(*(at - other)) < 0.9 * (radius + far) for *other, far in taken):
            continue
        taken.append((*at, radius))
        turn = rng.uniform(0, 2 * np.pi)
        cos, sin = np.cos(turn), np.sin(turn)
        turned = one.points @ np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]], np.float32)
        parts.append(Thing(turned + np.array([at[0], 0, at[1]], np.float32), one.colors, one.kind))
    eye = np.array([rng.uniform(-x / 2, x / 2), rng.uniform(1.1, 1.8), z + rng.uniform(0.2, 1)])
    return picture(parts, eye, np.array([rng.uniform(-0.5, 0.5), rng.uniform(0.3, 0.8), -z / 2]))


def picture(parts: list[Thing], eye: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a camera at `eye` sees that looks at `at`: colours, kinds and depths, painted at twice the size."""
    forward = (at - eye) / np.linalg.norm(at - eye)
    right = np.cross(forward, [0, 1, 0])
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(forward, right), forward])  # x to the right, y down, z forward
    seen = (np.concatenate([part.points for part in parts]) - eye) @ axes.T  # [P, 3]
    colors = np.concatenate([part.colors for part in parts])
    kinds = np.concatenate([np.full(len(part.points), part.kind, np.uint8) for part in parts])
    in_front = np.flatnonzero(seen[:, 2] > 0.2)
    order = in_front[np.argsort(-seen[in_front, 2])]
    (x, y, z), colors, kinds = seen[order].T, colors[order], kinds[order]
    width, height, focal = 2 * WIDTH, 2 * HEIGHT, 1.6 * WIDTH
    column, row = (width / 2 + focal * x / z).astype(int), (height / 2 + focal * y / z).astype(int)
    image, mask = np.zeros((height, width, 3), np.float32), np.full((height, width), 255, np.uint8)
    depth = np.zeros((height, width), np.float32)
    for down in (-1, 0, 1):  # a point covers nine pixels, unless they show something nearer; its own is painted last
        for across in (-1, 1, 0):
            r, c = row + down, column + across
            inside = np.flatnonzero((r >= 0) & (r < height) & (c >= 0) & (c < width))
            r, c = r[inside], c[inside]
            before = depth[r, c]
            farther = (before == 0) | (z[inside] < before)
            chosen = inside[farther]
            r, c = r[farther], c[farther]
            image[r, c], mask[r, c], depth[r, c] = colors[chosen], kinds[chosen], z[chosen]
    small = cv2.resize(image, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
    return small.clip(0, 255).astype(np.uint8), mask[::2, ::2], depth[::2, ::2].astype(np.float16)


def write_room(out: Path, things: list[Thing], number: int) -> None:
    image, mask, depth = room(things, np.random.default_rng(number))
    cv2.imwrite(str(out / f"{number:05d}.jpg"), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    cv2.imwrite(str(out / f"{number:05d}.mask.png"), mask)
    np.save(out / f"{number:05d}.depth.npy", depth)


def rooms(folder: Path, train: int = 500, test: int = 100, processes: int = 1) -> Path:
    """A folder that holds the shards `train` and `test`, with masks and depths."""
    out = folder / "rooms"
    if not out.is_dir():
        made = folder / "rooms.partial"
        shutil.rmtree(made, ignore_errors=True)
        entries = [*catalogue(debian(PACKAGE, folder) / LIBRARIES)][::STRIDE]
        with Pool(processes) as pool:
            found = pool.map(thing, entries, chunksize=8)
        pools: dict[str, list[Any]] = {"train": [], "test": []}
        for entry, one in zip(entries, found, strict=True):
            if one is not None:
                pools["test" if fraction(entry["model"]) < HELD_OUT else "train"].append(one)
        for split, numbers in (("train", range(train)), ("test", range(10**4, 10**4 + test))):
            files = made / "files" / split
            files.mkdir(parents=True)
            with Pool(processes) as pool:
                pool.map(partial(write_room, files, pools[split]), numbers, chunksize=8)
            pack(files, made / split)
        made.rename(out)
    return out


def pack(files: Path, shards: Path) -> None:
    """One tar of the files, by name, and its index with the masks and the depths."""
    shards.mkdir()
    with tarfile.open(shards / "000000.tar", "w") as tar:
        for path in sorted(files.iterdir()):
            tar.add(path, path.name)
    index.write(shards, lambda line: None, further=["mask.png", "depth.npy"])
