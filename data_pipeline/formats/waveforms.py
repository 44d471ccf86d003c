"""Decode recordings (FLAC, WAV, Opus, Ogg, MP3) to mono 16-bit samples of a given rate.

FFmpeg, through PyAV, decodes, mixes channels and resamples. A mono 16-bit file of the wanted rate is returned bit for
bit. A damaged file raises `Damaged` with the reason. FLAC has checksums, and the header of a WAV file states its
length; that an MP3 or Ogg file ends too early may remain undetected here, but the index of the shards, which has a hash
of every member, detects it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import IO

import numpy as np

from common.errors import Damaged
from data_pipeline.formats.av_files import need_av, open_av

MAX_SECONDS = 3600.0  # longest recording that is decoded, which takes 2 bytes for each sample
EXACT_HEADERS = ("flac", "wav")  # formats whose header states the number of samples
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
    parts, count = [], 0
    for _, samples in pieces(data, rate):
        parts.append(samples)
        count += len(samples)
        if count > MAX_SECONDS * rate:
            raise Damaged(
                f"is longer than {MAX_SECONDS:g} s; `unlabeled shards build --kind audio --seconds N` cuts recordings"
                " into pieces"
            )
    return np.concatenate(parts)


def seconds_of(data: bytes) -> float:
    """The length of a recording in seconds, from the header or the packets of its file, without decoding. Of MP3 and
    Opus it may be up to 0.1 s more than what is decoded. Raises `Damaged`."""
    with open_av(data) as file:
        if not file.streams.audio:
            raise Damaged("holds no audio stream")
        stream = file.streams.audio[0]
        if stream.duration and file.format.name in EXACT_HEADERS:
            return float(stream.duration * stream.time_base)
        return float(sum(packet.duration or 0 for packet in file.demux(stream)) * stream.time_base)


def pieces(source: bytes | IO[bytes], rate: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """(rate, samples int16 [t]) of consecutive pieces of a recording, mixed to mono and resampled to `rate` Hz; 0: the
    rate of the file. Raises `Damaged`, also if there are no samples."""
    av = need_av()
    _check_wav_size(source)
    count = 0
    with open_av(source) as file:
        if not file.streams.audio:
            raise Damaged("holds no audio stream")
        stream = file.streams.audio[0]
        if stream.codec_context is None:
            raise Damaged("has a codec that PyAV does not know")
        stream.codec_context.thread_count = 1
        rate = rate or stream.codec_context.sample_rate
        resampler = av.AudioResampler(format="s16", layout="mono", rate=rate)
        for frame in file.decode(stream):
            for resampled in resampler.resample(frame):
                count += resampled.samples
                yield rate, resampled.to_ndarray()[0]
        if count:
            for resampled in resampler.resample(None):  # what the resampler still holds
                yield rate, resampled.to_ndarray()[0]
    if not count:
        raise Damaged("holds no samples")


def _check_wav_size(source: bytes | IO[bytes]) -> None:
    """Raises `Damaged` for a WAV file that is shorter than its header states, which FFmpeg accepts."""
    if isinstance(source, bytes):
        head, size = source[:8], len(source)
    else:
        head, size = source.read(8), source.seek(0, io.SEEK_END)
        source.seek(0)
    stated = int.from_bytes(head[4:8], "little") + 8
    if head[:4] == b"RIFF" and size < stated < UNKNOWN_WAV_SIZE:
        raise Damaged(f"ends after {size} bytes, but its header states {stated}")


def flac(samples: np.ndarray, rate: int) -> bytes:
    """The samples int16 [T] as a FLAC file, without loss."""
    av, out = need_av(), io.BytesIO()
    with av.open(out, "w", format="flac") as file:
        stream = file.add_stream("flac", rate=rate, layout="mono")
        stream.codec_context.format = "s16"
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler("s16", "mono", rate, frame_size=stream.codec_context.frame_size)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    return out.getvalue()
