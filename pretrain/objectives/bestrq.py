"""BEST-RQ: an encoder predicts the codes of masked spans of speech, from a quantizer that is random (arXiv 2202.01855).

    x = groups of log-mel frames, with mean 0 and variance 1 in each band
    code_t = argmin_v ‖ P x_t / ‖P x_t‖ − c_v ‖,   P and the codes c (‖c_v‖ = 1) random and never trained    (§3.1, eq. 2)
    masked: spans of `mask_frames` frames that begin at any frame with probability `mask_probability`; the encoder gets
            noise from N(0, noise_std²) in their place                                                       (§3.3)
    loss = −1/m Σ log p(code_t | masked x),   over the m masked groups of the global batch

With several codebooks, as in Google USM (2303.01037), the loss is the mean over the heads, one for each codebook. Spans
consist of whole groups, and every recording has at least one. Shapes: B recordings of T frames with M mel bands, U
groups of F = stack · M numbers, C codebooks of V codes with K numbers, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.config import option
from common.errors import Damaged
from data_pipeline.parts.audio import Audio, cut, cut_length
from data_pipeline.parts.part import About
from data_pipeline.views.augmentations import MASKS, Rng
from data_pipeline.views.log_mel import frame_count, group_count, stacked
from pretrain.models.text_layers import Head, initialise
from pretrain.objectives.base import Batch, Builder, Exported, Objective, Sample, View
from pretrain.objectives.options import Options
from pretrain.ops.codebook import nearest
from pretrain.ops.cross_entropy import IGNORED
from pretrain.ops.precision import unit, wide


@dataclass
class Config(Options):
    codebooks: int = option(1, low=1)  # number of quantizers, each with a head that predicts its codes
    codebook_size: int = option(8192, low=2)  # number of codes of a codebook
    code_dim: int = option(16, low=1)  # width of a code
    mask_probability: float = option(0.01, above=0, high=1)  # probability that a masked span begins at a frame
    mask_frames: int = option(40, low=1)  # length of a span in frames of 10 ms
    noise_std: float = option(0.1, low=0)  # standard deviation of the noise in masked spans

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        sizes = {"model.dim": 32, "model.depth": 2, "model.heads": 2, "model.mels": 16, "model.kernel": 7}
        spans = {"objective.codebook_size": 64, "objective.mask_probability": 0.03, "objective.mask_frames": 16}
        return [{"model": "conformer", **sizes, **spans, "data.seconds": 0.64}, {"objective.codebooks": 2}]


class Quantizer(nn.Module):
    """The code of x [..., F] in each of C random codebooks: int64 [..., C]. Its buffers are part of the checkpoint."""

    projection: Tensor
    vectors: Tensor

    def __init__(self, codebooks: int, codes: int, width: int, code_dim: int):
        super().__init__()
        bound = math.sqrt(6 / (width + code_dim))  # Xavier
        self.register_buffer("projection", (2 * torch.rand(codebooks, width, code_dim) - 1) * bound)
        self.register_buffer("vectors", unit(torch.randn(codebooks, codes, code_dim)))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            projected = [unit(wide(x) @ wide(projection)) for projection in self.projection]
        return torch.stack([nearest(z, vectors) for z, vectors in zip(projected, self.vectors, strict=True)], dim=-1)


class BESTRQ(Objective):
    parts = {"audio": Audio()}
    target_name = "targets"
    any_length = True
    backbone: Any

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone()
        self.stack: int = self.backbone.cfg.stack
        width = self.stack * self.backbone.cfg.mels
        self.quantizer = Quantizer(cfg.codebooks, cfg.codebook_size, width, cfg.code_dim)
        self.heads = nn.ModuleList(
            Head(self.backbone.embed_dim, cfg.codebook_size, bias=True) for _ in range(cfg.codebooks)
        )
        initialise(self.heads, 1)

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        span = math.ceil(cfg.mask_frames / about.stack)
        begins = 1 - (1 - cfg.mask_probability) ** about.stack  # probability that a span begins at a group
        if not group_count(frame_count(about.samples, about.sample_rate), about.stack):
            raise ValueError(
                f"data.seconds = {about.samples / about.sample_rate:g}: is shorter than a token of the model"
            )

        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            audio, length = cut(sample["audio"], cut_length(sample, about), rng(0))
            groups = group_count(frame_count(len(audio), about.sample_rate), about.stack)
            frames, generator = frame_count(length, about.sample_rate), rng(MASKS)
            valid = np.arange(groups) < group_count(frames, about.stack)
            if not valid.any():
                raise Damaged(f"lasts {length / about.sample_rate:.3f} s, which is shorter than a token of the model")
            starts = (generator.random(groups) < begins) & valid
            starts[generator.integers(valid.sum())] |= not starts.any()
            masked = (np.convolve(starts, np.ones(span))[:groups] > 0.5) & valid
            noise = np.zeros((groups, about.stack * about.mels), np.float16)
            noise[masked] = cfg.noise_std * generator.standard_normal((masked.sum(), noise.shape[1]), np.float32)
            return {
                "audio": audio,  # int16 [S]
                "audio.frames": np.array(frames),
                "valid": valid,  # [U]
                "noise": noise,  # [U, F]
                "targets": np.where(masked, 0, IGNORED),  # [U]: the quantizer sets the codes of masked groups
            }

        return view

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        x, masked = stacked(batch["audio"], self.stack), batch["targets"] != IGNORED  # [B, U, F], [B, U]
        noisy = torch.where(masked.unsqueeze(-1), batch["noise"].to(x.dtype), x)
        hidden = self.backbone(noisy, valid=batch["valid"]).tokens  # [B, U, D]
        codes = torch.where(masked.unsqueeze(-1), self.quantizer(x), IGNORED)  # [B, U, C]
        losses = [head(hidden, codes[..., c]) for c, head in enumerate(self.heads)]
        return self.mean(torch.stack(losses).mean(), batch), {}

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone, "cls")}  # the mean of the tokens that are no padding
