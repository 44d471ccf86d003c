"""Recordings, from their files to log-mel features on the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import SeamlessM4TFeatureExtractor

from common.errors import ConfigError, Damaged
from data_pipeline.formats import waveforms
from data_pipeline.formats.waveforms import Recording, decode
from data_pipeline.parts.audio import Audio, Spectrogram, cut
from data_pipeline.parts.part import About
from data_pipeline.stream.stream import to_device
from data_pipeline.views import log_mel
from pretrain.recipes.recipe import load
from tests.data.sounds import CODECS, encoded, tone, wav

CPU = torch.device("cpu")


def error(decoded: np.ndarray, hertz: float = 440) -> float:
    """The largest difference from a tone, relative to its amplitude, away from the ends."""
    expected = tone(hertz, len(decoded) / 16000)
    return float(np.abs(decoded.astype(int) - expected)[1000:-1000].max() / 8000)


def test_sixteen_bit_samples_are_decoded_bit_for_bit():
    samples = np.random.default_rng(0).integers(-32768, 32768, 5000).astype(np.int16)
    assert np.array_equal(decode(wav(samples), 16000), samples)
    assert np.array_equal(decode(encoded("flac"), 16000), tone())


@pytest.mark.parametrize("extension", CODECS)
def test_every_format_is_decoded(extension: str):
    samples = decode(encoded(extension, seconds=2), 16000)
    assert samples.dtype == np.int16 and len(samples) == pytest.approx(32000, abs=1200)
    assert extension == "mp3" or error(samples) < 0.02
    spectrum = np.abs(np.fft.rfft(samples[4000:20000] / 8000))
    assert spectrum.argmax() == 440 and spectrum[440] > 7500  # a second: bin n is n Hz


def test_channels_are_mixed_and_samples_resampled():
    stereo = np.stack([tone(), 0 * tone()], 1)
    assert np.abs(decode(wav(stereo), 16000) - tone(amplitude=4000)).max() <= 1
    for rate in (8000, 44100, 48000):
        assert error(decode(wav(tone(rate=rate), rate), 16000)) < 2e-3
    above = decode(wav(tone(12000, rate=48000), 48000), 16000)  # no alias of what the new rate cannot hold
    assert np.abs(above[1000:-1000]).max() < 8


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"", "is empty"), (b"no recording at all " * 40, "Invalid data"),
     (wav(tone())[:20000], r"ends after 20000 bytes, but its header states 32044"),
     (wav(tone()[:0]), "holds no samples"), (encoded("flac")[:9000], "Invalid data")],
    ids=["empty", "text", "cut wav", "no samples", "cut flac"],
)  # fmt: skip
def test_a_recording_that_cannot_be_decoded_is_damaged(data: bytes, says: str):
    with pytest.raises(Damaged, match=says):
        Recording(data, 16000).samples()


def test_the_length_of_recordings_is_limited(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(Damaged, match=r"lasts 0\.050 s; a recording must last 0\.1 s or more"):
        Audio().decode({"wav": wav(tone(seconds=0.05))}, {}).samples()
    monkeypatch.setattr(waveforms, "MAX_SECONDS", 0.5)
    with pytest.raises(Damaged, match=r"is longer than 0\.5 s"):
        decode(wav(tone()), 16000)
    with pytest.raises(ConfigError, match=r"data\.seconds = 0\.05: write 0\.1 or more"):
        cfg = load("demo", ["model=conformer_micro", "objective=bestrq", "data.seconds=0.05"])
        Audio().configured(cfg.data, cfg.model)
    streamed = bytearray(wav(tone()))
    streamed[4:8] = (0xFFFFFFFF).to_bytes(4, "little")  # as ffmpeg writes to a pipe
    monkeypatch.undo()
    assert np.array_equal(decode(bytes(streamed), 16000), tone())


def test_cuts_lie_anywhere_in_a_recording_and_short_ones_are_padded():
    samples = np.arange(100, dtype=np.int16)
    starts = set()
    for seed in range(300):
        piece, length = cut(samples, 90, np.random.default_rng(seed))
        assert length == 90 and np.array_equal(piece, np.arange(piece[0], piece[0] + 90))
        starts.add(int(piece[0]))
    assert starts == set(range(11))
    piece, length = cut(samples, 120, np.random.default_rng(0))
    assert length == 100 and np.array_equal(piece, np.pad(samples, (0, 20))) and piece.dtype == np.int16


@pytest.mark.parametrize(("bands", "stack", "length"), [(80, 2, 16000), (80, 4, 9999), (40, 4, 12345), (80, 1, 7777)])
def test_features_equal_those_of_transformers(bands: int, stack: int, length: int):
    """Also of a recording with padding after it, and with a last group that lacks a frame."""
    extractor = SeamlessM4TFeatureExtractor(feature_size=bands, num_mel_bins=bands, stride=stack)
    samples = np.random.default_rng(0).normal(0, 2000, length) + tone(700, length / 16000)
    samples = samples.astype(np.int16)
    expected = extractor(samples / 32768, sampling_rate=16000, return_tensors="pt")["input_features"]
    part = Audio(seconds=1.5, mels=bands)
    frames = log_mel.frame_count(length, 16000)
    batch = {
        "audio": torch.from_numpy(np.pad(samples, (0, 24000 - length)))[None],
        "audio.frames": torch.tensor([frames]),
    }
    out = to_device(batch, CPU, {"audio": part})["audio"]
    assert out.shape == (1, part.frames, bands) and not out[:, frames:].any()
    whole = to_device({"audio": torch.from_numpy(samples)[None]}, CPU, {"audio": part})["audio"]
    assert torch.allclose(whole, out[:, :frames], atol=1e-5)
    ours = log_mel.stacked(out, stack)[:, : log_mel.group_count(frames, stack)]
    assert ours.shape == expected.shape and torch.allclose(ours, expected, atol=2e-3)


def test_features_of_several_rates():
    """A pure tone has its largest power in the band at its frequency, whatever the rate is."""
    for rate in (8000, 16000, 44100):
        features = Audio(sample_rate=rate, seconds=1, mels=64).features(
            torch.from_numpy(tone(1000, 1, rate))[None], CPU
        )
        centres = np.linspace(log_mel.mel(np.array(20.0)), log_mel.mel(np.array(rate / 2)), 66)[1:-1]
        nearest = int(np.abs(centres - log_mel.mel(np.array(1000.0))).argmin())
        assert features.shape[1] == pytest.approx(98, abs=1) and set(features[0].argmax(1).tolist()) == {nearest}


def test_audio_states_its_sizes_and_stands_in(tmp_path: Path):
    part = Audio(sample_rate=8000, seconds=2, mels=20)
    about = About(**part.about(None, None))
    assert (about.sample_rate, about.samples, about.mels, part.frames) == (8000, 16000, 20, 198)
    assert part.placed_shape((16000,)) == (198, 20)
    image = Spectrogram(sample_rate=8000, seconds=2, mels=24, patch=8)
    placed = image.place(torch.zeros(3, 16000, dtype=torch.int16), CPU)
    assert image.placed_shape((16000,)) == placed.shape[1:] == (1, 24, 192)
    sound = torch.from_numpy(np.random.default_rng(0).normal(0, 3000, (2, 16000)).astype(np.int16))
    whole, cut_off = image.place(sound, CPU), image.place(sound, CPU, frames=torch.tensor([198, 50]))
    assert torch.equal(cut_off[0], whole[0]) and torch.equal(cut_off[1, :, :, :50], whole[1, :, :, :50])
    assert not cut_off[1, :, :, 50:].any() and whole[1, :, :, 50:].all()
    made = part.stand_in("audio", np.random.default_rng(0), about)["audio"]
    assert made.dtype == np.int16 and 8000 <= len(made) < 32000
