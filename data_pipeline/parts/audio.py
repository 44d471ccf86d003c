"""A recording: decoded to 16-bit samples in the data worker, and converted to log-mel features on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError
from data_pipeline.formats.av_files import need_av
from data_pipeline.formats.waveforms import Recording
from data_pipeline.parts.part import About, Part
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.members import AUDIO
from data_pipeline.views import log_mel
from data_pipeline.views.log_mel import Constants

SHORTEST = 0.1  # seconds; a shorter recording counts as damaged


@dataclass
class Audio(Part):
    """A recording is decoded to a `Recording`, of which `cut` makes waveforms of one length, int16. On the device they
    become log-mel features, normalised in each band over the recording (`data_pipeline/views/log_mel.py`)."""

    sample_rate: int = 16000  # Hz
    seconds: float = 10.0  # length of a cut
    mels: int = 80  # mel bands
    # {device: constants}, made when the first tensor is placed on the device
    _constants: dict[torch.device, Constants] = field(default_factory=dict, init=False, repr=False, compare=False)
    extensions = AUDIO

    @property
    def noun(self) -> str:
        return "recording"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_constants": {}}  # a data worker, which gets a copy, has no device

    def configured(self, data: Any, model: Any) -> Self:
        need_av()
        if data.seconds < SHORTEST:
            raise ConfigError(f"data.seconds = {data.seconds:g}: write {SHORTEST:g} or more")
        return dataclasses.replace(self, sample_rate=data.sample_rate, seconds=data.seconds, mels=model.mels)

    @property
    def samples(self) -> int:
        """The samples of a cut."""
        return round(self.seconds * self.sample_rate)

    @property
    def frames(self) -> int:
        """The log-mel frames of a cut."""
        return log_mel.frame_count(self.samples, self.sample_rate)

    def about(self, datasets: Sequence[Dataset] | None, model: Any) -> dict[str, Any]:
        return {"sample_rate": self.sample_rate, "samples": self.samples, "mels": self.mels}

    def facts(self) -> dict[str, Any]:
        return {"audio": {"sample_rate": self.sample_rate, "seconds": self.seconds, "mels": self.mels}}

    def decode(self, members: dict[str, bytes], known: dict[str, Any]) -> Recording:
        return Recording(members[next(e for e in AUDIO if e in members)], self.sample_rate, SHORTEST)

    def stand_in(self, name: str, rng: np.random.Generator, about: About) -> dict[str, Any]:
        length = int(rng.integers(self.samples // 2, 2 * self.samples))
        return {name: rng.normal(0, 3000, length).astype(np.int16)}

    def placed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return *shape[:-1], log_mel.frame_count(shape[-1], self.sample_rate), self.mels

    def place(self, tensor: Tensor, device: torch.device, **extras: Tensor) -> Tensor:
        """Waveforms int16 [B, S] → log-mel features fp32 [B, T, M], normalised.

        extras["frames"] [B]: the number of frames of each recording; the frames after these are padding, and become 0.
        Without it, all frames count.
        """
        features = self.features(tensor, device)
        if "frames" not in extras:
            return log_mel.normalized(features, torch.full((len(features),), features.shape[1], device=device))
        return log_mel.normalized(features, extras["frames"].to(device, non_blocking=True))

    def features(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Waveforms int16 [B, S] → log-mel features fp32 [B, T, M], as they are."""
        if device not in self._constants:
            self._constants[device] = log_mel.constants(self.sample_rate, self.mels, device)
        return log_mel.log_mel(tensor.to(device, non_blocking=True), self._constants[device])


@dataclass
class Spectrogram(Audio):
    """A recording whose log-mel features become an image of one channel, normalised by the mean and the standard
    deviation of the training data (`data.mean`, `data.std`). Its sides are multiples of the patch of the model."""

    mels: int = 128
    patch: int = 16  # frames and mel bands
    mean: float = 0.0
    std: float = 1.0

    def configured(self, data: Any, model: Any) -> Self:
        part = super().configured(data, model)
        for key, values in (("mean", data.mean), ("std", data.std)):
            if len(values) != 1:
                raise ConfigError(
                    f"data.{key} = {values}: a spectrogram has one channel, so write one value: that of the log-mel"
                    " features of the training data"
                )
        part = dataclasses.replace(part, patch=model.patch_size, mean=data.mean[0], std=data.std[0])
        if part.frames == 0:
            raise ConfigError(f"data.seconds = {data.seconds:g}: is shorter than a patch of the model")
        return part

    @property
    def frames(self) -> int:
        return super().frames // self.patch * self.patch

    def facts(self) -> dict[str, Any]:
        audio = super().facts()["audio"]
        return {"audio": audio | {"mean": [self.mean], "std": [self.std]}}

    def placed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return *shape[:-1], 1, self.mels, self.frames

    def place(self, tensor: Tensor, device: torch.device, **extras: Tensor) -> Tensor:
        """Waveforms int16 [B, S] → (log-mel features − mean) / std, fp32 [B, 1, M, T], with time from left to right.

        extras["frames"] [B]: the number of frames of each recording; the frames after these are padding, and become 0,
        because the logarithm of silence is far from all others (−15.9). Without it, all frames count.
        """
        features = (self.features(tensor, device)[:, : self.frames] - self.mean) / self.std
        if "frames" in extras:
            frames = extras["frames"].to(device, non_blocking=True).view(-1, 1, 1)
            features = features.masked_fill(torch.arange(self.frames, device=device).view(1, -1, 1) >= frames, 0)
        return features.transpose(1, 2).unsqueeze(1)


def waveform(recording: Recording | np.ndarray) -> np.ndarray:
    """The samples of a recording, int16 [T]. A stand-in for a recording is an array."""
    return recording if isinstance(recording, np.ndarray) else recording.samples()


def cut(recording: Recording | np.ndarray, length: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """(int16 [length], the number of samples that are no padding): a piece of a recording from a uniformly drawn place,
    or, if it is shorter, the whole recording with zeros after it. Raises `Damaged`."""
    samples = waveform(recording)
    first = int(rng.integers(0, max(0, len(samples) - length) + 1))
    return padded(samples[first : first + length], length), min(length, len(samples))


def cut_length(sample: dict[str, Any], about: About) -> int:
    """The length of the cuts of a sample's batch: `about.samples`, or what a batch by budget states in seconds."""
    return round(sample["seconds"] * about.sample_rate) if "seconds" in sample else about.samples


def padded(samples: np.ndarray, length: int) -> np.ndarray:
    """The samples with zeros after them: int16 [length]."""
    return np.pad(samples, (0, length - len(samples)))
