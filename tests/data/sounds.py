"""Small recordings for tests: tones that numpy makes, as WAV files, or encoded by PyAV."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import av
import numpy as np

from tests.tars import write_tar

CODECS = {"flac": ("flac", "flac", 16000), "opus": ("ogg", "libopus", 48000), "mp3": ("mp3", "libmp3lame", 16000)}


def tone(hertz: float = 440, seconds: float = 1.0, rate: int = 16000, amplitude: float = 8000) -> np.ndarray:
    """A sine, int16 [seconds · rate]."""
    return np.rint(amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.int16)


def wav(samples: np.ndarray, rate: int = 16000) -> bytes:
    """A 16-bit WAV file of samples [T], or of several channels [T, channels]."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1 if samples.ndim == 1 else samples.shape[1], 2, rate, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    return out.getvalue()


def encoded(extension: str, hertz: float = 440, seconds: float = 1.0) -> bytes:
    """A tone as a file of that format, at the rate in CODECS."""
    kind, codec, rate = CODECS[extension]
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(hertz, seconds, rate)[None], format="s16", layout="mono")
        frame.sample_rate = rate
        size = stream.codec_context.frame_size
        resampler = av.AudioResampler(format=stream.format.name, layout="mono", rate=rate, frame_size=size or None)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(piece))
        file.mux(stream.encode(None))
    return out.getvalue()


def recordings(folder: Path) -> Path:
    """Shards of 48 recordings of two classes: rising and falling chirps in noise, some longer and some shorter than a
    second."""
    target = folder / "recordings"
    if target.is_dir():
        return target
    target.mkdir()
    rng, members = np.random.default_rng(0), []
    for n in range(48):
        time = np.arange(int(rng.uniform(0.3, 1.5) * 16000)) / 16000
        low, falls = rng.uniform(200, 1000), n % 2
        hertz = low * 2 ** (2 * (time[::-1] if falls else time) % 1)
        sound = 6000 * np.sin(2 * np.pi * np.cumsum(hertz) / 16000) + rng.normal(0, 300, len(time))
        members += [(f"{n:02d}.wav", wav(sound.astype(np.int16))), (f"{n:02d}.cls", str(falls).encode())]
    write_tar(target / "a.tar", members)
    return target
