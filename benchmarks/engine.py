"""The time that the training loop and checkpoints take, on one CPU thread with ViT-S/16 at 224 pixels.

    engine.loop_overhead.X     share of a step of objective X outside of forward, backward and the optimizer's step:
                               waiting for data, the check for non-finite steps, metrics, signals, the teacher's average
    engine.loop_overhead       the largest of these
    engine.async_save_stall    time that an asynchronous save stops the training / time of a synchronous save
    engine.async_save_wait     the same for a second save that begins while the first is still being written

The training is `pretrain.train` on real shards, with the methods of its engine timed from outside. The first save of
each kind is not counted, because it allocates memory.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image

from data_pipeline.build.build_shards import build
from data_pipeline.stream.stream import Stream
from pretrain.build import build_objective, open_samples, views
from pretrain.checkpoint.save import Saver
from pretrain.parallel.device import keep_freed_memory
from pretrain.parallel.engine import Engine
from pretrain.recipes.recipe import Recipe, load
from pretrain.run_folder.recipe_file import write_recipe
from pretrain.train import train

OBJECTIVES = {"mae": ["parallel.micro_batch=null"], "simclr": [], "dinov2": ["objective.prototypes=4096"]}


def recipe(name: str, shards: Path, run: Path, *more: str) -> Recipe:
    common = [f"data.train={shards}", "data.batch=8", "device=cpu", "precision=fp32", "threads=1", "data.workers=1"]
    common += ["steps=14", f"run={run}", "checkpoint=1000", "export=1000", "log=5"]
    return load(f"{name}_vits16", [*common, *OBJECTIVES[name], *more])


def photos(folder: Path, count: int = 64) -> Path:
    """Shards of noise of a photograph's size; its JPEGs are slower to decode than a photograph."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for n in range(count):
        coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(
            folder / "images" / f"{n}.jpg", quality=90
        )
    build(folder / "images", folder / "shards")
    return folder / "shards"


def overhead(cfg: Recipe) -> float:
    """Train, and return the share of the wall time of steps 3 and later outside of the engine's forward, backward and
    step."""
    inside, marks = 0.0, []  # seconds inside the engine's methods; (time, inside) after each step

    def timed(method: Callable) -> Callable:
        def wrapper(self: Engine, *args: Any) -> Any:
            nonlocal inside
            began = time.perf_counter()
            if method.__name__ == "step":  # it calls the check for non-finite steps, which is a part of the loop
                lr, decay, judge = args

                def judged(norm: torch.Tensor) -> torch.Tensor:
                    nonlocal inside
                    before = time.perf_counter()
                    out = judge(norm)
                    inside -= time.perf_counter() - before
                    return out

                out = method(self, lr, decay, judged)
            else:
                out = method(self, *args)
            inside += time.perf_counter() - began
            if method.__name__ == "step":
                marks.append((time.perf_counter(), inside))
            return out

        return wrapper

    originals = {name: getattr(Engine, name) for name in ("forward", "backward", "step")}
    for name, method in originals.items():
        setattr(Engine, name, timed(method))
    try:
        train(cfg)
    finally:
        for name, method in originals.items():
            setattr(Engine, name, method)
    (start, before), (end, after) = marks[2], marks[-1]
    return 1 - (after - before) / (end - start)


def saves(shards: Path, folder: Path, rounds: int) -> tuple[float, float, float]:
    """The seconds for which a save stops the training: a synchronous one, an asynchronous one, and an asynchronous one
    that begins immediately after another."""
    parts = {}
    for mode in ("sync", "async"):
        cfg = recipe("mae", shards, folder / mode, f"checkpoint.mode={mode}", "checkpoint.keep=1")
        Path(cfg.run).mkdir(parents=True)
        write_recipe(cfg, Path(cfg.run))
        engine = Engine(build_objective(cfg), cfg, torch.device("cpu"))
        for parameter in engine.parameters:  # so that the optimizer has its state
            parameter.grad = torch.zeros_like(parameter)
        engine.step(0.0, 0.0)
        samples = open_samples(cfg)
        stream = Stream(samples, views(cfg, engine.objective, samples), 8, workers=0)
        parts[mode] = (Saver(Path(cfg.run), cfg, print), engine, stream)
    times: dict[str, list[float]] = {"sync": [], "async": [], "behind": []}
    for n in range(1, rounds + 2):
        for mode, (saver, engine, stream) in parts.items():
            for name in (mode, "behind") if mode == "async" else (mode,):
                began = time.perf_counter()
                saver.save(2 * n + (name == "behind"), engine, stream)
                times[name].append(time.perf_counter() - began)
            saver.wait()
    for saver, *_ in parts.values():
        saver.close()
    sync, stall, behind = (median(times[name][1:]) for name in ("sync", "async", "behind"))
    return sync, stall, behind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()

    def emit(name: str, value: float, unit: str, versus: str) -> None:
        print(json.dumps({"name": name, "value": round(value, 4), "unit": unit, "versus": versus}), flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = photos(folder)
        shares = {key: overhead(recipe(key, shards, folder / key)) for key in OBJECTIVES}
        for key, share in shares.items():
            emit(f"engine.loop_overhead.{key}", share, "share", "a ViT-S/16 step of 8 images")
        emit("engine.loop_overhead", max(shares.values()), "share", "a ViT-S/16 step of 8 images")
        sync, stall, behind = saves(shards, folder, args.rounds)
        emit("engine.sync_save_seconds", sync, "s", "MAE of a ViT-S/16, with its optimizer")
        emit("engine.async_save_stall", stall / sync, "share", "the sync save")
        emit("engine.async_save_wait", behind / sync, "share", "the sync save")


if __name__ == "__main__":
    main()
