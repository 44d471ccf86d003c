"""Videos of a camera that moves along a wall of furniture in one of eight directions, in strong noise.

A wall is a collage of pictures of objects, of which only the local contrast is kept, in grey: its brightness and colours,
which every frame shows, say nothing. Each wall has a video for each direction, with a random start and speed. Noise is
drawn for each frame, and every frame is encoded by itself. So a single frame says nothing about the direction.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import av
import cv2
import numpy as np
from furniture import SPLITS, Picture, pictures
from PIL import Image

from data_pipeline.build.build_shards import Options, build

SIDE, FRAMES, RATE = 32, 12, 12  # pixels of a frame; frames of a video, and in a second
FINE = 2  # pixels of a wall for one of a frame
AROUND, OBJECTS = 256, 70  # pixels of a wall, whose opposite edges continue each other; objects on it
DIRECTIONS = 8
SPEED, NOISE = (1.0, 3.0), 30.0  # pixels from frame to frame; standard deviation of grey values
BAND, NEAR, CONTRAST = (2.0, 6.0), 12.0, 45.0  # pixels of a wall: sizes that are kept, surroundings; grey values
WALLS = {"train": 150, "test": 60}  # of each there are DIRECTIONS videos


def wall(views: list[Picture], rng: np.random.Generator) -> np.ndarray:
    """The local contrast of a wall with furniture, grey, float [AROUND, AROUND]."""
    room = Image.new("RGBA", (AROUND, AROUND), (128, 128, 128, 255))
    for _ in range(OBJECTS):
        picture = views[rng.integers(len(views))]
        size = rng.uniform(0.4, 0.9) * SIDE * FINE / max(picture.size)
        small = picture.resize((max(1, round(picture.width * size)), max(1, round(picture.height * size))))
        x, y = rng.integers(0, AROUND, 2).tolist()
        for left, top in ((x, y), (x - AROUND, y), (x, y - AROUND), (x - AROUND, y - AROUND)):
            if left + small.width > 0 and top + small.height > 0:
                room.alpha_composite(small, (max(0, left), max(0, top)), (max(0, -left), max(0, -top)))
    grey = np.tile(np.asarray(room.convert("RGB"), np.float32).mean(-1), (3, 3))
    fine, coarse = (cv2.GaussianBlur(grey, (0, 0), sigma) for sigma in BAND)
    power = cv2.GaussianBlur((fine - coarse) ** 2, (0, 0), NEAR)
    return (128 + CONTRAST * (fine - coarse) / (np.sqrt(power) + 2))[AROUND : 2 * AROUND, AROUND : 2 * AROUND]


def look_along(wall: np.ndarray, direction: int, rng: np.random.Generator) -> np.ndarray:
    """What a camera sees that moves in a direction, 0 to the right and 2 down: grey, uint8 [FRAMES, SIDE, SIDE]."""
    angle, speed, start = 2 * np.pi * direction / DIRECTIONS, rng.uniform(*SPEED), rng.uniform(0, AROUND, 2)
    frames = []
    for frame in range(FRAMES):
        top, left = (start + FINE * speed * frame * np.array([np.sin(angle), np.cos(angle)])).astype(int)
        rows, columns = (np.arange(first, first + FINE * SIDE) % AROUND for first in (top, left))
        frames.append(wall[np.ix_(rows, columns)].reshape(SIDE, FINE, SIDE, FINE).mean((1, 3)))
    noise = rng.normal(0, NOISE, (FRAMES, SIDE, SIDE))
    return (np.stack(frames) + noise).clip(0, 255).astype(np.uint8)


def write_video(path: Path, frames: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"g": "1", "crf": "18"})  # all frames are key frames
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "gray")))
        out.mux(stream.encode())


def walls(folder: Path) -> Path:
    """A folder that holds the shards `train` and `test`, of different objects, labelled by direction, `frames_train` and
    `frames_test`, with a frame of each video, and the videos."""
    out = folder / "walls"
    if not out.is_dir():
        made = folder / "walls.partial"
        shutil.rmtree(made, ignore_errors=True)
        views, rng = pictures(folder), np.random.default_rng(0)
        for split in SPLITS:
            for number in range(WALLS[split]):
                background = wall(views[split], rng)
                for direction in range(DIRECTIONS):
                    path = made / "videos" / split / str(direction) / f"{number:04d}.mp4"
                    write_video(path, look_along(background, direction, rng))
            build(made / "videos" / split, made / split)
            every = Options(frames_every=FRAMES / RATE)  # the first frame of each video
            build(made / "videos" / split, made / f"frames_{split}", kind="frames", options=every)
        made.rename(out)
    return out


def flow_accuracy(folder: Path) -> float:
    """The accuracy for the direction of the test videos, from the one motion that explains the changes of all pixels best
    (Lucas and Kanade: Σ ∇I ∇Iᵀ u = −Σ ∇I ∂I/∂t, of smoothed frames). This shows how well the videos hold the label."""
    correct, count = 0, 0
    for path in sorted((walls(folder) / "videos" / "test").glob("*/*.mp4")):
        with av.open(str(path)) as video:
            grey = [frame.to_ndarray(format="gray").astype(np.float32) for frame in video.decode(video=0)]
        smooth = np.stack([cv2.GaussianBlur(frame, (0, 0), 1) for frame in grey])
        down, right = np.gradient((smooth[1:] + smooth[:-1]) / 2, axis=(1, 2))
        slopes, change = np.stack([right.ravel(), down.ravel()]), np.diff(smooth, axis=0).ravel()
        camera = np.linalg.solve(slopes @ slopes.T, slopes @ change)  # it moves against the picture
        angle = np.arctan2(camera[1], camera[0])
        correct += round(angle / (2 * np.pi / DIRECTIONS)) % DIRECTIONS == int(path.parent.name)
        count += 1
    return correct / count
