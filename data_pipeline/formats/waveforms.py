"""Decode recordings (FLAC, WAV, Opus, Ogg, MP3) to mono 16-bit samples of a given rate.

FFmpeg, through PyAV, decodes, mixes channels and resamples. A mono 16-bit file of the wanted rate is returned bit for
bit. A damaged file raises `Damaged` with the reason. FLAC has checksums, and the header of a WAV file states its
length; that an MP3 or Ogg file ends too early may remain undetected here, but the index of the shards, which has a hash
of every member, detects it.
"""

from __future__ import annotations

import numpy as np

from common.errors import Damaged
from data_pipeline.formats.av_files import need_av, open_av

MAX_SECONDS = 3600.0  # longest recording that is decoded, which takes 2 bytes for each sample
UNKNOWN_WAV_SIZE = 0x7FFF0000  # programs that write a WAV file to a pipe state this size or a larger one


class Recording:
    """A recording that is decoded when `samples` is called, to int16 [T] at `rate` Hz."""

    def __init__(self, data: bytes, rate: int, shortest: float = 0.0):
        self.data, self.rate, self.shortest = data, rate, shortest

    def samples(self) -> np.ndarray:
        """Raises `Damaged` if it cannot be decoded, or is shorter than `shortest` seconds."""
        samples = decode(self.data, self.rate)
        if (seconds := len(samples) / self.rate) < self.shortest:
            raise Damaged(f"lasts {seconds:.3f} s; a recording must last {self.shortest:g} s or more")
        return samples


def decode(data: bytes, rate: int) -> np.ndarray:
    """The samples of a recording, mixed to mono and resampled to `rate` Hz: int16 [T]. Raises `Damaged`."""
    av = need_av()
    if data[:4] == b"RIFF":
        stated = int.from_bytes(data[4:8], "little")
        if len(data) < stated + 8 < UNKNOWN_WAV_SIZE:
            raise Damaged(f"ends after {len(data)} bytes, but its header states {stated + 8}")
    parts, count = [], 0
    with open_av(data) as file:
        if not file.streams.audio:
            raise Damaged("holds no audio stream")
        stream = file.streams.audio[0]
        if stream.codec_context is None:
            raise Damaged("has a codec that PyAV does not know")
        stream.codec_context.thread_count = 1
        resampler = av.AudioResampler(format="s16", layout="mono", rate=rate)

        def keep(frame: object) -> None:
            nonlocal count
            for resampled in resampler.resample(frame):
                parts.append(resampled.to_ndarray()[0])
                count += len(parts[-1])
            if count > MAX_SECONDS * rate:
                raise Damaged(
                    f"is longer than {MAX_SECONDS:g} s; `unlabeled shards build --kind audio` cuts recordings into"
                    " pieces"
                )

        for frame in file.decode(stream):
            keep(frame)
        if parts:
            keep(None)  # what the resampler still holds
    if not count:
        raise Damaged("holds no samples")
    return np.concatenate(parts)
