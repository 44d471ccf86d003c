"""The statistics and the thumbnails of recordings in a shard set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from data_pipeline.formats.waveforms import decode, pieces

RATE, MELS = 16000, 64  # of the spectrogram of a thumbnail
CONTRAST = (5, 99.5)  # percentiles of the log power that are drawn black and white


def length_of(data: bytes) -> tuple[float, int]:
    """(seconds, sample rate) of a recording, which is decoded. Raises `Damaged`."""
    count = rate = 0
    for found_rate, samples in pieces(data):
        rate, count = found_rate, count + len(samples)
    return count / rate, rate


def describe(lengths: list[tuple[float, int]]) -> Iterator[str]:
    """Lines about the recordings that `length_of` has decoded, without a histogram."""
    seconds = np.array([length for length, _ in lengths])
    low, middle, high = np.percentile(seconds, [0, 50, 100])
    yield f"{len(lengths)} recordings, {seconds.sum():.1f} s in all: {low:.2f} to {high:.2f} s, median {middle:.2f} s"
    rates = Counter(rate for _, rate in lengths).most_common()
    yield "sample rates: " + ", ".join(f"{count} × {rate} Hz" for rate, count in rates)


def spectrogram(data: bytes) -> np.ndarray:
    """The log-mel spectrogram of a recording as a picture, uint8 [MELS, frames, 3]: time from left to right, and low
    frequencies at the bottom. Raises `Damaged`."""
    import torch  # here, because the planner of a build imports this module

    from data_pipeline.views import log_mel

    samples = decode(data, RATE)
    samples = np.pad(samples, (0, max(0, int(log_mel.WINDOW * RATE) - len(samples))))
    constants = log_mel.constants(RATE, MELS, torch.device("cpu"))
    return picture(log_mel.log_mel(torch.from_numpy(samples)[None], constants)[0].numpy())


def picture(features: np.ndarray) -> np.ndarray:
    """Log-mel features [T, M] as uint8 [M, T, 3]."""
    low, high = np.percentile(features, CONTRAST)
    grey = ((features - low) / max(high - low, 1e-6)).clip(0, 1) * 255
    return np.repeat(grey.T[::-1, :, None], 3, axis=2).astype(np.uint8)
