"""Pictures of furniture, from the 3-D models of Debian's `sweethome3d-furniture` (CC0 and CC-BY 3.0).

A model becomes coloured points on its surface, which are painted from far to near, seen from random sides.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from package_data import debian, fraction
from PIL import Image

PACKAGE, LIBRARIES = "sweethome3d-furniture", "usr/share/sweethome3d/furniture"
LARGEST = 150_000  # bytes of a model; larger ones take long to read
POINTS, VIEWS, VIEW = 20_000, 4, 96  # of a model; pixels of a view
SPLITS = ("train", "test")
HELD_OUT = 0.3  # share of the objects for tests

Picture = Image.Image


@dataclass
class Mesh:
    """Triangles of a Wavefront .obj file: corners float [T, 3, 3], texture coordinates [T, 3, 2], material of each."""

    corners: np.ndarray
    coordinates: np.ndarray
    materials: list[str]
    colors: dict[str, np.ndarray] = field(default_factory=dict)  # material: RGB uint8 [H, W, 3]


def models(libraries: Path) -> Iterator[tuple[Path, str]]:
    """(archive, path of a model in it)."""
    for path in sorted(libraries.glob("*.sh3f")):
        with zipfile.ZipFile(path) as archive:
            catalog = archive.read("PluginFurnitureCatalog.properties").decode("latin-1")
            for name in sorted(set(re.findall(r"^model#\d+=/?(.*\.obj)\s*$", catalog, re.MULTILINE))):
                if archive.getinfo(name).file_size < LARGEST:
                    yield path, name


def read_mesh(archive: zipfile.ZipFile, name: str) -> Mesh:
    places, textures, current = list[list[float]](), [[0.0, 0.0]], ""
    corners, coordinates, materials = list[list[int]](), list[list[int]](), list[str]()
    colors: dict[str, np.ndarray] = {}
    folder = name.rpartition("/")[0] + "/"
    for line in archive.read(name).decode("latin-1").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "v":
            places.append([float(x) for x in rest.split()[:3]])
        elif word == "vt":
            textures.append([float(x) for x in rest.split()[:2]])
        elif word == "usemtl":
            current = rest.strip()
        elif word == "mtllib" and folder + rest.strip() in archive.namelist():
            colors |= read_materials(archive, folder, rest.strip())
        elif word == "f":
            parts = [[int(number or 0) for number in each.split("/")] for each in rest.split()]
            place = [part[0] - 1 if part[0] > 0 else len(places) + part[0] for part in parts]
            texture = [part[1] if len(part) > 1 else 0 for part in parts]
            texture = [number if number >= 0 else len(textures) + number for number in texture]
            for k in range(1, len(parts) - 1):  # a fan of triangles
                corners.append([place[0], place[k], place[k + 1]])
                coordinates.append([texture[0], texture[k], texture[k + 1]])
                materials.append(current)
    return Mesh(np.array(places)[np.array(corners)], np.array(textures)[np.array(coordinates)], materials, colors)


def read_materials(archive: zipfile.ZipFile, folder: str, name: str) -> dict[str, np.ndarray]:
    """{material: its texture, or its colour as one pixel}."""
    colors, current = dict[str, np.ndarray](), ""
    for line in archive.read(folder + name).decode("latin-1").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "newmtl":
            current = rest.strip()
        elif word == "Kd" and current not in colors:
            colors[current] = np.array([[[float(x) for x in rest.split()[:3]]]]).clip(0, 1) * 255
        elif word == "map_Kd" and folder + rest.strip() in archive.namelist():
            image = Image.open(io.BytesIO(archive.read(folder + rest.strip()))).convert("RGB")
            image.thumbnail((256, 256))
            colors[current] = np.asarray(image)
    return colors


def surface(mesh: Mesh, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random points of a surface, in a sphere of radius 1, and their colours with shade: float [P, 3], [P, 3]."""
    a, b, c = mesh.corners.transpose(1, 0, 2)
    normals = np.cross(b - a, c - a)
    area = np.linalg.norm(normals, axis=1)
    chosen = rng.choice(len(area), POINTS, p=area / area.sum())
    u, v = np.sqrt(rng.random(POINTS))[:, None], rng.random(POINTS)[:, None]
    weights = np.stack([1 - u, u * (1 - v), u * v], 1)  # [P, 3, 1]
    points = (weights * mesh.corners[chosen]).sum(1)
    texture = (weights * mesh.coordinates[chosen]).sum(1)  # [P, 2]
    colors = np.full((POINTS, 3), 200.0)
    names = np.array(mesh.materials)[chosen]
    for name in set(names.tolist()) & set(mesh.colors):
        pixels, rows = mesh.colors[name], np.flatnonzero(names == name)
        height, width = pixels.shape[:2]
        x, y = (texture[rows, 0] % 1 * width).astype(int), ((1 - texture[rows, 1]) % 1 * height).astype(int)
        colors[rows] = pixels[y % height, x % width]
    light = np.array([0.5, 0.8, 0.3]) / np.linalg.norm([0.5, 0.8, 0.3])
    shade = 0.5 + 0.5 * np.abs(normals[chosen] @ light) / area[chosen]
    points -= (points.max(0) + points.min(0)) / 2
    return points / np.linalg.norm(points, axis=1).max(), colors * shade[:, None]


def views(points: np.ndarray, colors: np.ndarray, rng: np.random.Generator) -> list[Picture]:
    """An object from VIEWS random sides, seen from slightly above."""
    found = []
    for angle, elevation in zip(rng.uniform(0, 2 * np.pi, VIEWS), np.radians(rng.uniform(0, 25, VIEWS)), strict=True):
        x = np.cos(angle) * points[:, 0] + np.sin(angle) * points[:, 2]
        z = np.cos(angle) * points[:, 2] - np.sin(angle) * points[:, 0]
        y = np.cos(elevation) * points[:, 1] - np.sin(elevation) * z
        z = np.sin(elevation) * points[:, 1] + np.cos(elevation) * z
        order, scale = np.argsort(z), 0.45 * VIEW * 3 / (3 - z)  # a camera at the distance 3
        column, row = (VIEW / 2 + scale * x).astype(int), (VIEW / 2 - scale * y).astype(int)
        picture = np.zeros((VIEW, VIEW, 4))
        for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):  # a point covers four pixels
            place = (row + down).clip(0, VIEW - 1)[order], (column + right).clip(0, VIEW - 1)[order]
            picture[*place, :3], picture[*place, 3] = colors[order], 255
        image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
        found.append(image.crop(image.getbbox()))
    return found


def pictures_of(model: tuple[Path, str]) -> tuple[str, list[Picture]]:
    """(train or test, the views of a model); none if it has no surface."""
    path, name = model
    key = f"{path.stem}-{name.rpartition('/')[2].removesuffix('.obj')}"
    rng, split = np.random.default_rng(int(2**32 * fraction(key))), "test" if fraction(key) < HELD_OUT else "train"
    try:
        with zipfile.ZipFile(path) as archive:
            return split, views(*surface(read_mesh(archive, name), rng), rng)
    except (ValueError, IndexError):  # a file without faces, or with faces of missing corners
        return split, []


def pictures(folder: Path, processes: int = 1) -> dict[str, list[Picture]]:
    """{"train", "test": views of different objects}."""
    with Pool(processes) as pool:
        found = pool.map(pictures_of, models(debian(PACKAGE, folder) / LIBRARIES), chunksize=8)
    return {split: [view for side, views_of_one in found if side == split for view in views_of_one] for split in SPLITS}
