"""Videos of furniture on a turntable, from the 3-D models of Debian's `sweethome3d-furniture` (CC0 and CC-BY 3.0).

A model becomes coloured points on its surface, which are painted from far to near for each frame. Each object has a
video of one turn to the left, and the same frames in the opposite order: a turn to the right. Every frame is encoded by
itself. So a single frame says nothing about the direction.
"""

from __future__ import annotations

import io
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import av
import numpy as np
from package_data import debian, fraction
from PIL import Image

from data_pipeline.build.build_shards import Options, build

PACKAGE, LIBRARIES = "sweethome3d-furniture", "usr/share/sweethome3d/furniture"
LARGEST = 4_000_000  # bytes of a model; larger ones take long to read
POINTS, SIDE, FRAMES, RATE = 40_000, 64, 36, 12  # of a model; pixels; frames of a turn; frames per second
HELD_OUT = 0.3  # share of the objects for tests


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


def turn(points: np.ndarray, colors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One turn to the left, seen by a camera at a random height: uint8 [FRAMES, SIDE, SIDE, 3]."""
    side, elevation = 2 * SIDE, np.radians(rng.uniform(10, 40))
    background = np.linspace(*rng.uniform(60, 220, (2, 3)), side)[:, None].repeat(side, 1)  # [side, side, 3]
    frames = []
    for angle in rng.uniform(0, 2 * np.pi) + np.arange(FRAMES) * 2 * np.pi / FRAMES:
        x = np.cos(angle) * points[:, 0] + np.sin(angle) * points[:, 2]
        z = np.cos(angle) * points[:, 2] - np.sin(angle) * points[:, 0]
        y, z = (
            np.cos(elevation) * points[:, 1] - np.sin(elevation) * z,
            np.sin(elevation) * points[:, 1] + np.cos(elevation) * z,
        )
        order, scale = np.argsort(z), 0.45 * side * 3 / (3 - z)  # a camera at the distance 3
        column, row = (side / 2 + scale * x).astype(int), (side / 2 - scale * y).astype(int)
        frame = background.copy()
        for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):  # a point covers four pixels
            frame[(row + down).clip(0, side - 1)[order], (column + right).clip(0, side - 1)[order]] = colors[order]
        frames.append(frame.reshape(SIDE, 2, SIDE, 2, 3).mean((1, 3)).clip(0, 255).astype(np.uint8))
    return np.stack(frames)


def write_video(path: Path, frames: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"g": "1", "crf": "18"})  # all frames are key frames
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        out.mux(stream.encode())


def film(out: Path, model: tuple[Path, str]) -> bool:
    """Write both videos of a model; False if it has no surface."""
    path, name = model
    key = f"{path.stem}-{name.rpartition('/')[2].removesuffix('.obj')}"
    rng = np.random.default_rng(int(2**32 * fraction(key)))
    try:
        with zipfile.ZipFile(path) as archive:
            points, colors = surface(read_mesh(archive, name), rng)
    except (ValueError, IndexError):  # a file without faces, or with faces of missing corners
        return False
    frames, split = turn(points, colors, rng), "test" if fraction(key) < HELD_OUT else "train"
    write_video(out / split / "left" / f"{key}.mp4", frames)
    write_video(out / split / "right" / f"{key}.mp4", frames[::-1])
    return True


def turntables(folder: Path, processes: int = 1) -> Path:
    """A folder that holds the shards `train` and `test`, of different objects, labelled by direction, `frames_train` and
    `frames_test`, with a frame of each video, and the videos."""
    out = folder / "turntables"
    if not out.is_dir():
        made = folder / "turntables.partial"
        shutil.rmtree(made, ignore_errors=True)
        with Pool(processes) as pool:
            listed = models(debian(PACKAGE, folder) / LIBRARIES)
            pool.map(partial(film, made / "videos"), listed, chunksize=8)
        for split in ("train", "test"):
            build(made / "videos" / split, made / split)
            every = Options(frames_every=FRAMES / RATE)  # the first frame of each video
            build(made / "videos" / split, made / f"frames_{split}", kind="frames", options=every)
        made.rename(out)
    return out


def flow_accuracy(folder: Path) -> float:
    """The accuracy for the direction of the test objects, from the sign of the motion in the lowest quarter of 8 frames
    in the middle of each video: that of Σ ∂I/∂t · ∂I/∂x, which is negative where the picture moves to the right. The
    nearest part of an object is there, and moves to the right in a turn to the left. This shows that clips of this
    length and size hold the label."""
    correct, count = 0, 0
    for direction in ("left", "right"):
        for path in sorted((turntables(folder) / "videos" / "test" / direction).iterdir()):
            with av.open(str(path)) as video:
                frames = np.stack([frame.to_ndarray(format="gray") for frame in video.decode(video=0)]).astype(float)
            middle = frames[FRAMES // 2 - 4 : FRAMES // 2 + 4, -SIDE // 4 :]  # [8, SIDE / 4, SIDE]
            change = np.diff(middle, axis=0)[:, :, 1:-1]
            slope = np.gradient((middle[1:] + middle[:-1]) / 2, axis=2)[:, :, 1:-1]
            correct += ("left" if (change * slope).sum() < 0 else "right") == direction
            count += 1
    return correct / count
