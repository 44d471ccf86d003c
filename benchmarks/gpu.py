"""Training steps on one GPU: the share of its peak FLOP/s, samples per second, and peak memory compared with the plan.

    python benchmarks/gpu.py [--rungs dinov3_vitl gpt_1b] [--steps 20] [--compile false]

Rungs, in bf16, one process; X is one of them:

    dinov3_vitl        ViT-L/16, 2 × 224 + 8 × 96 pixels, a batch that stays on the device
    dinov3_vits_views  ViT-S/16, the same crops, which data workers make from shards of JPEGs, as in a run
    mae_vitl           ViT-L/16, 75 % masked, 224 pixels, a batch that stays on the device
    gpt_1b             llama_1b, rows of 4,096 tokens, a batch that stays on the device

    gpu.X.mfu                 FLOPs of the step as `unlabeled plan` counts them (without recomputation) / seconds /
                              the peak of the device's data sheet
    gpu.X.samples_per_second
    gpu.X.memory_versus_plan  the planned peak / `torch.cuda.max_memory_allocated` after the steps

All steps after `--warmup` steps are timed together, between two synchronisations with the device. `--tiny --device cpu`
runs the same code in seconds on a machine without a GPU, for its test; the figures are meaningless then.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from engine import photos
from torch import Tensor

from pretrain.build import build_objective, build_stream, noise_batch, open_samples, placed
from pretrain.estimate import plan
from pretrain.estimate.hardware import peak
from pretrain.optim.skip_steps import Guard
from pretrain.parallel.engine import Engine
from pretrain.parallel.modes import build_engine
from pretrain.recipes.recipe import Recipe, load
from pretrain.step import one_step

CROPS = ["objective.local_crops=8", "objective.local_size=96", "model.image_size=224"]
RUNGS: dict[str, tuple[str, list[str]]] = {
    "dinov3_vitl": ("dinov3_vitl16_im1k", [*CROPS, "data.batch=64"]),
    "dinov3_vits_views": ("dinov3_vitl16_im1k", ["model.name=dinov3_vits16", *CROPS, "data.batch=128"]),
    "mae_vitl": ("mae_vits16", ["model.name=vit_large", "data.batch=256", "parallel.micro_batch=null"]),
    "gpt_1b": ("llama_1b", ["data.batch=8", "parallel.micro_batch=null"]),
}
FROM_SHARDS = ("dinov3_vits_views",)
IMAGES = ["model.dim=64", "model.depth=2", "model.heads=2", "model.image_size=64", "data.batch=4"]
DINO = ["objective.local_size=32", "objective.prototypes=64", "objective.koleo_group=4"]
TINY = {
    "dinov3_vitl": [*IMAGES, *DINO],
    "dinov3_vits_views": [*IMAGES, *DINO, "data.workers=1"],
    "mae_vitl": [*IMAGES, "objective.decoder_dim=32", "objective.decoder_depth=1"],
    "gpt_1b": ["model=gpt_micro", "data.length=64", "data.batch=2"],
}


def recipe_of(rung: str, options: argparse.Namespace) -> Recipe:
    name, sizes = RUNGS[rung]
    common = [f"device={options.device}", f"precision={options.precision}", "parallel.mode=single"]
    common += ["parallel.recompute=none", f"parallel.compile={str(options.compile).lower()}"]
    return load(name, [*sizes, *common, *(TINY[rung] if options.tiny else []), *options.overrides])


def constant_batches(cfg: Recipe, engine: Engine) -> Iterator[dict[str, Tensor]]:
    """The same batch of noise, on the device, for every step."""
    batch = placed(engine.objective, noise_batch(cfg, engine.objective, cfg.data.batch), engine.device)
    while True:
        yield batch


def stream_batches(cfg: Recipe, engine: Engine, shards: Path) -> Iterator[dict[str, Tensor]]:
    """Batches of a stream that reads shards, as in a run."""
    cfg = cfg.replace(data=cfg.data.replace(train=[str(shards)]))
    stream = build_stream(cfg, engine.objective, open_samples(cfg), device=engine.device)
    try:
        for batch in stream:
            yield placed(engine.objective, batch, engine.device)
    finally:
        stream.close()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(rung: str, options: argparse.Namespace, emit: Callable[[str, float, str, str], None]) -> None:
    device = torch.device(options.device)
    cfg = recipe_of(rung, options)
    planned = plan.trace(cfg, 1)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    objective = build_objective(cfg)
    engine = build_engine(objective, cfg, device)
    guard = Guard(objective, cfg.skip, device)
    with tempfile.TemporaryDirectory() as folder:
        if rung in FROM_SHARDS:
            batches = stream_batches(cfg, engine, photos(Path(folder), 2 * cfg.data.batch))
        else:
            batches = constant_batches(cfg, engine)

        def train(step: int) -> None:
            one_step(engine, guard, [next(batches)], step, cfg.optim.lr(step), cfg.optim.weight_decay(step))

        for step in range(options.warmup):
            train(step)
        wait(device)
        began = time.perf_counter()
        for step in range(options.warmup, options.warmup + options.steps):
            train(step)
        wait(device)
        seconds = (time.perf_counter() - began) / options.steps
        batches.close()  # type: ignore[attr-defined]
    rate, source = peak(device, cfg.precision)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    what = f"{cfg.model.name}, {cfg.precision}, batch {cfg.data.batch}, one {name}"
    emit(f"gpu.{rung}.mfu", planned.flops / seconds / rate, "share", f"{what}; {rate / 1e12:.3g} TFLOP/s, {source}")
    emit(f"gpu.{rung}.samples_per_second", cfg.data.batch / seconds, "samples/s", what)
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
        emit(f"gpu.{rung}.memory_versus_plan", planned.peak / used, "×", f"{what}: {used / 2**30:.2f} GiB allocated")


def emit(name: str, value: float, unit: str, versus: str) -> None:
    row = {"name": name, "value": float(f"{value:.4g}"), "unit": unit, "versus": versus}
    print(json.dumps(row, ensure_ascii=False), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rungs", nargs="+", default=list(RUNGS), choices=list(RUNGS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--compile", default=True, type=json.loads, metavar="true|false")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="sizes for a test on a CPU")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipes, after --")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no GPU; --tiny --device cpu tries the code without one", file=sys.stderr)
        return 2
    for rung in options.rungs:
        measure(rung, options, emit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
