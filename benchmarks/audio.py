"""Audio: what the data pipeline adds to decoding, and how well BEST-RQ and Audio-MAE learn words that unseen voices speak.

    python benchmarks/audio.py FOLDER [--parts decode words] [--seeds 3] [--objectives bestrq audio_mae]

    multimodal.audio.share_of_decode       recordings per second of the worker's work (decode, resample, cut, mask) /
                                           those of PyAV alone, which decodes and resamples; one thread, interleaved
    multimodal.audio.realtime              seconds of audio per second of that work
    multimodal.{bestrq,audio_mae}.knn      k-NN accuracy for words of unseen voices, mean over the seeds; beside it
                                           .untrained, and .floor, the log-mel statistics
    multimodal.{bestrq,audio_mae}.linear   the same of logistic regression

Words are spoken by Debian's `espeak-ng` (apt-get install espeak-ng) in English voices that differ in accent, speaker,
pitch and speed; 2 of 3 voices are for training and for the gallery, the others for the query. Recordings and runs go to
FOLDER.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from steps import emit

from data_pipeline.build.build_shards import build
from data_pipeline.formats.waveforms import decode, flac
from data_pipeline.parts.audio import Audio
from data_pipeline.parts.part import About
from eval.run import evaluate
from pretrain.objectives import bestrq
from pretrain.recipes.recipe import load
from pretrain.train import train

WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "yes", "no", "up", "down"),
    *("left", "right", "on", "off", "stop", "go", "river", "window", "garden", "purple", "mountain", "water", "paper"),
    *("music", "letter", "yellow"),
)
ACCENTS = ("en-gb", "en-us", "en-gb-scotland", "en-029")
SPEAKERS = ("m1", "m2", "m3", "m5", "m7", "f1", "f2", "f3", "f4", "klatt", "klatt4", "croak")
RECIPES = {"bestrq": "bestrq_cpu", "audio_mae": "audio_mae_cpu"}


def spoken(folder: Path) -> tuple[Path, Path]:
    """Shards of (known voices, unseen voices)."""
    rng = np.random.default_rng(0)
    for n, voice in enumerate(f"{accent}+{speaker}" for accent in ACCENTS for speaker in SPEAKERS):
        side = "query" if n % 3 == 2 else "gallery"
        for word in WORDS:
            target = folder / "spoken" / side / word / f"{voice}.wav"
            target.parent.mkdir(parents=True, exist_ok=True)
            pitch, speed = str(rng.integers(30, 80)), str(rng.integers(130, 220))
            if not target.is_file():
                subprocess.run(["espeak-ng", "-v", voice, "-p", pitch, "-s", speed, "-w", target, word], check=True)
    for side in ("gallery", "query"):
        if not (folder / side).is_dir():
            build(folder / "spoken" / side, folder / side)
    return folder / "gallery", folder / "query"


def words(folder: Path, seeds: int, objectives: list[str]) -> None:
    gallery, query = spoken(folder)
    sets, protocols = ([str(gallery)], [str(query)]), ["knn", "logistic"]

    def scores(model: str | Path) -> dict[str, float]:
        rows = evaluate(model, protocols, *sets, cache=folder / "features")
        return {row["protocol"]: row["value"] for row in rows if row["metric"] == "accuracy"}

    floor = scores("log_mel")
    for name in objectives:
        found: dict[str, list[dict[str, float]]] = {"pretrained": [], "untrained": []}
        for seed in range(seeds):
            run = folder / "runs" / f"{name}{seed}"
            shutil.rmtree(run, ignore_errors=True)
            options = [f"data.train={gallery}", f"run={run}", f"seed={seed}", "data.workers=0", "threads=1"]
            cfg = load(RECIPES[name], [*options, "precision=fp32", "device=cpu", "log={every: 100, flops: false}"])
            train(cfg)
            found["pretrained"].append(scores(run / "export" / str(cfg.steps)))
            found["untrained"].append(scores(run / "export" / "0"))
        for protocol, metric in (("knn", "knn"), ("logistic", "linear")):
            trained, untrained = ([row[protocol] for row in found[kind]] for kind in ("pretrained", "untrained"))
            versus = f"untrained {np.mean(untrained):.3f}, floor {floor[protocol]:.3f}; {len(trained)} seeds"
            emit(f"multimodal.{name}.{metric}", float(np.mean(trained)), "accuracy", versus)
            emit(f"multimodal.{name}.{metric}.untrained", float(np.mean(untrained)), "accuracy", "")
            emit(f"multimodal.{name}.{metric}.floor", floor[protocol], "accuracy", "")


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
        start = time.perf_counter()
        for n, data in enumerate(files):
            view({"audio": part.decode({"flac": data}, {})}, lambda k, n=n: np.random.default_rng([n, k]))
        middle = time.perf_counter()
        for data in files:
            pyav_alone(data)
        times["ours"].append(middle - start)
        times["alone"].append(time.perf_counter() - middle)
    ours, alone = (float(np.median(times[name])) for name in ("ours", "alone"))
    emit("multimodal.audio.share_of_decode", alone / ours, "ratio", "PyAV alone; 15 s of FLAC at 44.1 kHz")
    emit("multimodal.audio.realtime", count * seconds / ours, "s/s", "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs="+", default=["decode", "words"], choices=["decode", "words"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--objectives", nargs="+", default=list(RECIPES), choices=RECIPES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "decode" in args.parts:
        decoding()
    if "words" in args.parts:
        words(args.folder, args.seeds, args.objectives)
