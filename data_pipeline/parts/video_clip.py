"""A clip: some frames of a video at equal distances in time, decoded when the views ask for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from common.errors import ConfigError
from data_pipeline.formats.decode import Encoded
from data_pipeline.formats.image_formats import IMAGE_MEMBERS
from data_pipeline.formats.videos import PIXEL_FORMATS, EncodedVideo
from data_pipeline.parts.image import Image
from data_pipeline.parts.part import About
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.members import VIDEOS

# Duration in seconds -> for each clip the times of its frames in seconds.
Choose = Callable[[float], Sequence[Sequence[float]]]


class Film(Protocol):
    """What clips are cut from."""

    reserve: Callable[[int], None] | None

    def frames_at(self, choose: Choose) -> list[list[np.ndarray]]:
        """See `EncodedVideo.frames_at`."""


@dataclass
class Clips:
    """Clips of one video: `frames` frames at `fps` frames per second, whatever the rate of the video is.

    A clip begins at any time from which it fits into the video. In a video that is too short it begins at 0, and its
    last frames repeat the last frame of the video.
    """

    film: Film
    frames: int
    fps: float
    color: str = "exact"  # how `clip_crops` applies colour operations: see data_pipeline/views/colors.py

    @property
    def reserve(self) -> Callable[[int], None] | None:
        return self.film.reserve

    @reserve.setter
    def reserve(self, take: Callable[[int], None] | None) -> None:
        self.film.reserve = take

    def drawn(self, count: int, rng: np.random.Generator) -> list[list[np.ndarray]]:
        """`count` clips at random times: for each a list of frames, uint8 [H, W, C]. Raises `Damaged`."""
        return self._at(rng.random(count))

    def spread(self, count: int) -> list[list[np.ndarray]]:
        """`count` clips for evaluation, in the middle of equal parts of the video. Raises `Damaged`."""
        return self._at((np.arange(count) + 0.5) / count)

    def _at(self, places: np.ndarray) -> list[list[np.ndarray]]:
        """The clips at `places`, from 0 (the first possible begin) to 1 (the last one)."""
        times = np.arange(self.frames) / self.fps
        last = self.frames / self.fps  # the seconds of a clip
        return self.film.frames_at(lambda seconds: [max(0.0, seconds - last) * place + times for place in places])


@dataclass
class Clip(Image):
    """A clip is decoded to `Clips`, from which `clip_crops` makes uint8 views [T, C, H, W]. On the device they are
    normalised like images.

    A sample that holds an image and no video becomes a clip whose frames are all that image, as V-JEPA 2 does
    (arXiv 2506.09985), so that `data.mix` can mix videos and images.
    """

    frames: int = 16  # T, `model.frames` of the recipe
    fps: float = 4.0  # frames per second of the clip
    extensions = (*VIDEOS, *IMAGE_MEMBERS)

    def configured(self, data: Any, model: Any) -> Self:
        if model.in_channels not in PIXEL_FORMATS:
            raise ConfigError(f"model.in_channels = {model.in_channels}: frames of videos have 1 or 3 channels")
        if data.pixel_dtype not in ("auto", "uint8"):
            raise ConfigError(
                f"data.pixel_dtype = {data.pixel_dtype}: frames of videos are decoded to uint8; remove it"
            )
        return dataclasses.replace(super().configured(data, model), frames=model.frames, fps=data.fps)

    def stored_pixels(self, datasets: Sequence[Dataset]) -> str:
        return "uint8"

    def decode(self, members: dict[str, bytes], known: dict[str, Any]) -> Clips:  # type: ignore[override]
        extension = next((e for e in VIDEOS if e in members), None)
        film: Film
        if extension is None:
            film = StillFilm(super().decode(members, known))
        else:
            as_stored = known.get("pixels", {}).get("as_stored", False)
            film = EncodedVideo(members[extension], self.channels, self.max_pixels, as_stored)
        return Clips(film, self.frames, self.fps, self.color)

    def stand_in(self, name: str, rng: np.random.Generator, about: About) -> dict[str, Any]:
        side = max(64, int(1.2 * about.image_size))
        pixels = rng.integers(0, 256, (2 * self.frames, side, side, self.channels), dtype=np.uint8)
        return {name: Clips(DecodedFilm(pixels, self.fps), self.frames, self.fps)}


class StillFilm:
    """A film that shows one image at all times."""

    def __init__(self, image: Encoded):
        self.image = image

    @property
    def reserve(self) -> Callable[[int], None] | None:
        return self.image.reserve

    @reserve.setter
    def reserve(self, take: Callable[[int], None] | None) -> None:
        self.image.reserve = take

    def frames_at(self, choose: Choose) -> list[list[np.ndarray]]:
        pixels = self.image.pixels()
        return [[pixels] * len(times) for times in choose(0.0)]


class DecodedFilm:
    """A film whose frames uint8 [T, H, W, C] are in memory."""

    reserve: Callable[[int], None] | None = None

    def __init__(self, pixels: np.ndarray, fps: float):
        self.pixels, self.fps = pixels, fps

    def frames_at(self, choose: Choose) -> list[list[np.ndarray]]:
        last = len(self.pixels) - 1
        clips = choose(len(self.pixels) / self.fps)
        return [[self.pixels[min(last, int(time * self.fps + 1e-6))] for time in times] for times in clips]
