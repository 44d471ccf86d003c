"""Audio-MAE: a masked autoencoder of log-mel spectrograms (arXiv 2207.06405).

    image = (log-mel features of a cut − mean) / std, mel bands × time; 0 after the end of a shorter recording
    keep, encoder, decoder and loss as in MAE (`mae.py`), with a higher mask ratio; patches are masked at random

The decoder attends to all patches, as in the first row of the paper's comparison of decoders; the paper's best decoder
attends within local windows. Shapes: B recordings of S samples, N = rows × columns patches, K kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from common.config import option
from data_pipeline.parts.audio import Spectrogram, cut
from data_pipeline.parts.part import About
from data_pipeline.views.augmentations import MASKS, Rng
from data_pipeline.views.log_mel import frame_count
from pretrain.objectives import mae
from pretrain.objectives.base import Sample, View
from pretrain.objectives.options import MaskedAutoencoder


@dataclass
class Config(MaskedAutoencoder):
    mask_ratio: float = option(0.8, above=0, below=1)  # share of the patches that the encoder does not see

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        sizes = {"model.dim": 32, "model.depth": 2, "model.heads": 2, "model.image_size": 16, "model.patch_size": 8}
        data = {"data.seconds": 0.4, "data.mean": [13.0], "data.std": [6.0]}
        return [{"model": "spectrogram_vit", **sizes, **data, **super().tiny()[0]}]


class AudioMAE(mae.MAE):
    parts = {"audio": Spectrogram()}
    part_of = {"image": "audio"}

    @staticmethod
    def views(cfg: Config, about: About) -> View:  # type: ignore[override]
        columns = frame_count(about.samples, about.sample_rate) // about.patch_size
        patches = columns * (about.mels // about.patch_size)
        kept = max(1, int(patches * (1 - cfg.mask_ratio)))

        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            waveform, length = cut(sample["audio"], about.samples, rng(0))
            return {
                "image": waveform,  # int16 [S]
                "image.frames": np.array(frame_count(length, about.sample_rate)),
                "keep": rng(MASKS).random(patches).argsort()[:kept],  # [K]
            }

        return view
