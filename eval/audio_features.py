"""Features of recordings from a frozen encoder. Shapes: N recordings, S samples, T frames, M mel bands, D features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import Absent, ConfigError, DataError
from data_pipeline.formats.waveforms import Recording
from data_pipeline.parts.audio import SHORTEST, Audio, Spectrogram
from data_pipeline.shards.members import AUDIO
from data_pipeline.shards.samples import Samples
from data_pipeline.views.log_mel import frame_count, group_count
from eval import feature_cache
from pretrain.models.layers import Features
from pretrain.parallel.device import pick_device

VERSION = 2  # of the features of recordings; is increased by every change that can affect them
Input = tuple[np.ndarray, int]  # the middle of a recording, int16 [≤ S], and its number of frames


class AudioEncoder(feature_cache.Source):
    """A frozen encoder of log-mel features. `part` makes them, and limits the length: of a longer recording, the middle
    is encoded. `name`: the model's name in result rows. `pool`: the pooled feature ("cls") or the mean of the tokens.

    `encode(features, frames)` returns the `Features` of what `part.place` returns, and of the frames of each recording
    that are no padding; `model` is the network whose weights identify it in the cache, None for a function that `name`
    identifies.
    """

    unit = "recordings"
    batch = 32
    members = AUDIO

    def __init__(
        self,
        encode: Callable[[Tensor, Tensor], Features],
        name: str,
        part: Audio,
        pool: str = "cls",
        model: torch.nn.Module | None = None,
        device: str = "auto",
    ):
        self.encode, self.name, self.part, self.pool, self.backbone = encode, name, part, pool, model
        self.device = pick_device(device, key="eval.device")
        if model is not None:
            model.to(self.device).eval()

    def check(self, specs: Sequence[str]) -> Samples:
        samples = Samples(specs)
        try:
            self.part.check([samples], None)
        except ConfigError as error:
            raise DataError(str(error)) from None
        return samples

    @cached_property
    def model_hash(self) -> str:
        return self.name if self.backbone is None else feature_cache.model_hash(self.backbone)

    def fingerprint(self, samples: Samples) -> str:
        classes = [each.manifest.classes for each in samples.manifests]
        return f"{VERSION} {self.model_hash} {self.pool} {type(self.part).__name__} {self.part.facts()} {classes}"

    def read(self, samples: Samples, number: int) -> Input:
        members = samples.read(number, AUDIO)
        if not members:
            raise Absent(f"holds no audio member ({', '.join(AUDIO)})")
        waveform = Recording(next(iter(members.values())), self.part.sample_rate, SHORTEST).samples()
        first = max(0, len(waveform) - self.part.samples) // 2
        waveform = waveform[first : first + self.part.samples]
        return waveform, frame_count(len(waveform), self.part.sample_rate)

    def stand_in(self) -> Input:
        return np.zeros(self.part.samples, np.int16), self.part.frames

    def label(self, samples: Samples, number: int) -> str:
        return feature_cache.label_of(samples, number)

    @torch.inference_mode()
    def pooled(self, inputs: Sequence[Input]) -> Tensor:
        """One vector for each recording [N, D], fp32, on the CPU. All get the padding that they have in training, so that
        the features of a recording do not depend on the others of its batch."""
        waveforms = np.zeros((len(inputs), self.part.samples), np.int16)  # [N, S]
        for row, (waveform, _) in zip(waveforms, inputs, strict=True):
            row[: len(waveform)] = waveform
        frames = torch.tensor([count for _, count in inputs])
        features = self.part.place(torch.from_numpy(waveforms), self.device, frames=frames)
        out = self.encode(features, frames.to(self.device))
        return (out.cls if self.pool == "cls" else out.tokens.mean(1)).float().cpu()


def open_audio_encoder(backbone: Any, facts: dict[str, Any], name: str, device: str) -> AudioEncoder:
    """The encoder for a backbone that reads audio. `facts`: those of its export."""
    cfg = backbone.cfg
    audio = {"sample_rate": 16000, "seconds": 10.0, **facts.get("audio", {}), "mels": cfg.mels}
    pool = facts.get("pool", "cls")
    if "mean" in audio:
        mean, std = audio.pop("mean")[0], audio.pop("std")[0]
        spectrogram = Spectrogram(**audio, patch=cfg.patch_size, mean=mean, std=std)
        return AudioEncoder(lambda x, frames: backbone(x), name, spectrogram, pool, backbone, device)

    def encode(x: Tensor, frames: Tensor) -> Features:
        groups = torch.arange(group_count(x.shape[1], cfg.stack), device=x.device)
        out = backbone(x, valid=groups < ((frames + 1) // cfg.stack).unsqueeze(1))
        return out._replace(tokens=out.cls.unsqueeze(1))  # the mean of its tokens, without padding

    return AudioEncoder(encode, name, Audio(**audio), pool, backbone, device)


class LogMelPart(Audio):
    """Log-mel features that are not normalised."""

    def place(self, tensor: Tensor, device: torch.device, **extras: Tensor) -> Tensor:
        return self.features(tensor, device)


def log_mel_statistics(x: Tensor, frames: Tensor) -> Features:
    """The mean and the standard deviation of each mel band over a recording, [N, 2·M], from log-mel features
    [N, T, M]: the baseline for features of recordings."""
    valid = (torch.arange(x.shape[1], device=x.device) < frames.unsqueeze(1)).unsqueeze(-1)  # [N, T, 1]
    count = frames.view(-1, 1)
    mean = (x * valid).sum(1) / count
    variance = ((x - mean.unsqueeze(1)).square() * valid).sum(1) / count
    row = torch.cat([mean, variance.sqrt()], 1)
    return Features(row, row.unsqueeze(1), row.unsqueeze(1)[:, :0], (1,))
