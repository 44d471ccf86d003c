"""How well each image objective learns in the same CPU time, on real images: k-NN and linear accuracy beside raw pixels
and an untrained network.

    python benchmarks/learning.py FOLDER [--objectives simclr byol …] [--seconds 90] [--seeds 1] [--set materials]

The images are the demo's: photographed textures (`materials`), of whose families none is both in training and in test,
or handwritten digits (`digits`). Each objective trains the same small ViT (3 blocks of width 96, patches of 4 on crops of 32 pixels) in one
process and one thread, by its recipe `NAME_cpu` or the options in RECIPES. First the CPU seconds of a step are
measured, data included; the run then has as many steps as fit into the budget, so that its schedules end with it.

    learning.NAME.{knn,linear}                    accuracy on the test images after the run; `versus`: steps, CPU seconds
    learning.NAME.{knn,linear}.seed_std           standard deviation over seeds, of two or more
    learning.{untrained,pixels}.{knn,linear}      the same for the network at step 0 (of the first seed), and raw pixels
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import mean, stdev

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from steps import emit

from data_pipeline.build.build_shards import build
from data_pipeline.build.demo_images import fetch
from eval.run import evaluate
from pretrain.build import build_objective, build_stream, open_samples, placed
from pretrain.optim.skip_steps import Guard
from pretrain.parallel.engine import Engine
from pretrain.recipes import defaults, recipe
from pretrain.step import one_step
from pretrain.train import train

CROPS = ["local_size=16", "local_crops=2", "global_scale=0.4", "local_scale=0.1", "solarize=0", "blur=[0.5, 0.5, 0.5]"]
CROPS = [f"objective.{option}" for option in [*CROPS, "jitter=[0.24, 0.24, 0.24, 0.06]"]]
HEADS = ["objective.prototypes=auto", "objective.head_hidden=512", "objective.head_bottleneck=128"]
AUTO = ["objective.teacher_temperature=auto", "objective.momentum=auto", "optim.clip=3.0"]
RECIPES: dict[str, list[str]] = {  # options over `demo`, of objectives without a recipe NAME_cpu
    "simclr": [],
    "mae": [
        "objective.decoder_dim=64",
        "objective.decoder_depth=1",
        "objective.decoder_heads=2",
        "optim.lr.value=3e-3",
    ],
    "dinov2": [*CROPS, *HEADS, *AUTO],
    "dinov3": [*CROPS, *HEADS, *AUTO, "objective.unit_prototypes=true"],
}
# {objective: (option, another objective)}: the option is the export of the other objective's last run
AFTER = {"beit": ("objective.visual_tokenizer", "vqvae")}
MODEL = ["model.patch_size=4", "model.image_size=32"]
ENGINE = [
    "data.workers=0",
    "threads=1",
    "precision=fp32",
    "device=cpu",
    "log=50",
    "log.flops=false",
    "eval.image_size=64",
]
MEASURED = 4  # steps that are measured, after two others
SIZE = 64  # pixels that evaluation shows, as in the demo
PROBE = {"linear": {"steps": 500}}
CPU = torch.device("cpu")


def names() -> list[str]:
    return sorted({*RECIPES, *(name.removesuffix("_cpu") for name in recipe.names() if name.endswith("_cpu"))})


def load(name: str, *overrides: str) -> recipe.Recipe:
    own = [f"objective={name}", *RECIPES[name]] if name in RECIPES else []
    return recipe.load("demo" if name in RECIPES else f"{name}_cpu", [*own, *MODEL, *ENGINE, *overrides])


def seconds_of_a_step(cfg: recipe.Recipe) -> float:
    """CPU seconds of a training step, with its data."""
    samples = open_samples(cfg)
    defaults.settle(cfg, sum(map(len, samples)))
    objective = build_objective(cfg, start=True)
    engine, guard = Engine(objective, cfg, CPU), Guard(objective, cfg.skip, CPU)
    stream = build_stream(cfg, objective, samples)
    for step in range(2 + MEASURED):
        if step == 2:
            start = time.process_time()
        one_step(engine, guard, [placed(objective, next(stream), CPU)], step, lr=1e-4, weight_decay=0.05)
    return (time.process_time() - start) / MEASURED


def scores(model: str | Path, known: Path, asked: Path) -> dict[str, float]:
    rows = evaluate(model, ["knn", "linear"], [str(known)], [str(asked)], image_size=SIZE, options=PROBE, device="cpu")
    return {row["protocol"]: row["value"] for row in rows if row["metric"] == "accuracy"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--objectives", nargs="+", choices=names(), default=names())
    parser.add_argument("--seconds", type=float, default=90, help="CPU seconds of each training")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", choices=["materials", "digits"], default="materials")
    options = parser.parse_args()
    for name, (_, other) in AFTER.items():
        if name in options.objectives and other not in options.objectives:
            parser.error(f"{name} needs a run of {other}; write --objectives {other} {name}")
    torch.set_num_threads(1)
    folder: Path = options.folder / options.set
    known, asked = folder / "shards" / "train", folder / "shards" / "test"
    fetch(folder / "images", options.set, lambda line: print(line, file=sys.stderr))
    for split in (known, asked):
        if not split.is_dir():
            build(folder / "images" / split.name, split)

    def show(name: str, found: list[dict[str, float]], versus: str) -> None:
        for protocol in found[0]:
            values = [scored[protocol] for scored in found]
            emit(f"learning.{name}.{protocol}", mean(values), "accuracy", versus)
            if len(values) > 1:
                emit(f"learning.{name}.{protocol}.seed_std", stdev(values), "accuracy", f"{len(values)} seeds")

    show("pixels", [scores("pixels", known, asked)], "raw pixels")
    untrained, exports = None, dict[str, Path]()
    for name in sorted(options.objectives, key=AFTER.__contains__):
        data = [f"data.train={known}"]
        data += [f"{AFTER[name][0]}={exports[AFTER[name][1]]}"] if name in AFTER else []
        steps = max(8, round(options.seconds / seconds_of_a_step(load(name, *data, "steps=100", "run=unused"))))
        found, spent = [], []
        for seed in range(options.seeds):
            run = folder / "runs" / f"{name}-{options.seconds:g}-{seed}"
            own = [f"steps={steps}", f"checkpoint={steps}", f"export={steps}", f"run={run}", "overwrite=true"]
            start = time.process_time()
            train(load(name, *data, *own, f"seed={seed}"))
            spent.append(time.process_time() - start)
            if untrained is None:
                untrained = scores(run / "export" / "0", known, asked)
                show("untrained", [untrained], "step 0")
            exports[name] = run / "export" / str(steps)
            found.append(scores(exports[name], known, asked))
        show(name, found, f"{steps} steps, {mean(spent):.0f} CPU s")


if __name__ == "__main__":
    main()
