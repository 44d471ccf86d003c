"""What the data pipeline adds to the decoding of audio.

python benchmarks/audio.py

multimodal.audio.share_of_decode       recordings per CPU second of the worker's work (decode, resample, cut, mask)
                                       / those of PyAV alone, which decodes and resamples; one thread, interleaved
multimodal.audio.realtime              seconds of audio per CPU second of that work
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from steps import emit

from data_pipeline.formats.waveforms import decode, flac
from data_pipeline.parts.audio import Audio
from data_pipeline.parts.part import About
from pretrain.objectives import bestrq


def pyav_alone(data: bytes) -> None:
    """Decode a recording and resample it, with nothing else."""
    import io

    import av

    with av.open(io.BytesIO(data)) as file:
        stream = file.streams.audio[0]
        stream.codec_context.thread_count = 1
        resampler = av.AudioResampler(format="s16", layout="mono", rate=16000)
        for frame in file.decode(stream):
            for each in resampler.resample(frame):
                each.to_ndarray()


def decoding(rounds: int = 15, count: int = 8, seconds: float = 15.0) -> None:
    rng, rate = np.random.default_rng(0), 44100
    time_ = np.arange(int(seconds * rate)) / rate
    sounds = [3000 * np.sin(2 * np.pi * 300 * (1 + n) * time_) + rng.normal(0, 500, len(time_)) for n in range(count)]
    files = [flac(sound.astype(np.int16), rate) for sound in sounds]
    part = Audio(seconds=10)
    view = bestrq.BESTRQ.views(bestrq.Config(), About(**part.about(None, None), stack=4))
    assert len(decode(files[0], 16000)) == seconds * 16000
    times: dict[str, list[float]] = {"ours": [], "alone": []}
    for _ in range(rounds):
        start = time.process_time()
        for n, data in enumerate(files):
            view({"audio": part.decode({"flac": data}, {})}, lambda k, n=n: np.random.default_rng([n, k]))
        middle = time.process_time()
        for data in files:
            pyav_alone(data)
        times["ours"].append(middle - start)
        times["alone"].append(time.process_time() - middle)
    ours, alone = (float(np.median(times[name])) for name in ("ours", "alone"))
    emit("multimodal.audio.share_of_decode", alone / ours, "ratio", "PyAV alone; 15 s of FLAC at 44.1 kHz")
    emit("multimodal.audio.realtime", count * seconds / ours, "s/s", "")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    decoding()
