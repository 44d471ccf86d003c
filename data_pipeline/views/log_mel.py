"""Log-mel features of waveforms on the device, as in Kaldi's `fbank` without dither: windows of 25 ms every 10 ms, each
without its mean, pre-emphasised (0.97), weighted by a Povey window and Fourier-transformed; the power is summed by
triangular filters on the mel scale from 20 Hz to half the sample rate, and the natural logarithm taken.

transformers' `SeamlessM4TFeatureExtractor`, which also prepares the input of w2v-BERT 2.0, computes the same.

Shapes: B recordings of S samples, T frames, M mel bands, W samples of a window, F frequencies.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, HOP = 0.025, 0.01  # seconds
PREEMPHASIS = 0.97
LOWEST_HERTZ = 20.0
FLOOR = float(np.finfo(np.float32).eps)  # the smallest power whose logarithm is taken
EPSILON = 1e-7  # added to the variance of a band


class Constants(NamedTuple):
    """What `log_mel` needs on a device, made once."""

    window: Tensor  # [W]
    filters: Tensor  # [F, M]
    hop: int  # samples


def frame_count(samples: int, rate: int) -> int:
    """T: the number of whole windows in a waveform."""
    window, hop = round(WINDOW * rate), round(HOP * rate)
    return max(0, 1 + (samples - window) // hop)


def mel(hertz: np.ndarray) -> np.ndarray:
    """Frequencies on the mel scale of Kaldi."""
    return 1127.0 * np.log1p(np.asarray(hertz, np.float64) / 700.0)


def filter_bank(rate: int, bands: int, bins: int) -> np.ndarray:
    """Triangular filters, equally spaced and linear on the mel scale: float64 [bins, bands], for the frequencies 0 to
    rate / 2 of a Fourier transform."""
    low, high = mel(LOWEST_HERTZ), mel(rate / 2)
    edges = np.linspace(low, high, bands + 2)
    frequencies = mel(np.linspace(0, rate / 2, bins))[:, None]
    width = edges[1] - edges[0]
    rising, falling = (frequencies - edges[:-2]) / width, (edges[2:] - frequencies) / width
    return np.maximum(0, np.minimum(rising, falling))


def constants(rate: int, bands: int, device: torch.device) -> Constants:
    """The window and the filters for waveforms of `rate` Hz and `bands` mel bands."""
    size = round(WINDOW * rate)
    bins = (1 << (size - 1).bit_length()) // 2 + 1  # of a transform of the next power of two
    window, filters = np.hanning(size) ** 0.85, filter_bank(rate, bands, bins)
    return Constants(_placed(window, device), _placed(filters, device), round(HOP * rate))


def _placed(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).float().to(device)


def log_mel(waveforms: Tensor, made: Constants) -> Tensor:
    """[B, S], in the range of 16-bit numbers → fp32 [B, T, M]."""
    frames = waveforms.float().unfold(-1, len(made.window), made.hop)  # [B, T, W]
    frames = frames - frames.mean(-1, keepdim=True)
    before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    frames = (frames - PREEMPHASIS * before) * made.window
    spectrum = torch.fft.rfft(frames, n=2 * (len(made.filters) - 1))  # [B, T, F]
    power = spectrum.real.square() + spectrum.imag.square()
    return (power @ made.filters).clamp_min(FLOOR).log()


def normalized(features: Tensor, frames: Tensor) -> Tensor:
    """Features [B, T, M] with mean 0 and variance 1 in each band over the first `frames` [B] of each recording; 0 in
    the frames after these, which are padding."""
    valid = torch.arange(features.shape[1], device=features.device) < frames.unsqueeze(1)  # [B, T]
    valid = valid.unsqueeze(-1)
    count = frames.view(-1, 1, 1)
    mean = torch.where(valid, features, 0).sum(1, keepdim=True) / count.clamp_min(1)
    centred = torch.where(valid, features - mean, 0)
    variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)
    return centred / (variance + EPSILON).sqrt()


def stacked(features: Tensor, frames: int) -> Tensor:
    """Groups of consecutive frames, one after the other: [B, T, M] → [B, U, frames · M] with U = (T + 1) // frames.

    A last group that lacks one frame is filled with zeros, as `SeamlessM4TFeatureExtractor` does.
    """
    groups = group_count(features.shape[1], frames)
    missing = groups * frames - features.shape[1]
    padded = F.pad(features, (0, 0, 0, max(0, missing)))[:, : groups * frames]
    return padded.reshape(len(features), groups, -1)


def group_count(count: int, frames: int) -> int:
    """U: the number of groups of `frames` that `stacked` makes of `count` frames."""
    return (count + 1) // frames
