"""Compare the memory that `unlabeled plan` predicts for a step with the memory that real steps need.

Figures, for every objective in a separate process on the CPU:

    plan.memory.versus_measured    predicted peak / largest growth of the resident set during training; one line for
                                   each objective
    plan.memory.M.versus_measured  the same for DINOv2 on two processes with parallel.mode M, for the first process
    plan.memory.O.heap             largest growth of the resident set with the allocator of a training / with a memory
                                   mapping for each tensor

With a memory mapping for each tensor (glibc's MALLOC_MMAP_THRESHOLD_), freed tensors are returned to the system, so
that the resident set is the memory in use. The first figures are measured in this way. A training keeps freed memory
for later tensors, which is faster, but leaves gaps that no tensor fits; the last figure shows the difference. Before
memory is measured, a small model of the same objective is trained, so that libraries and their buffers are loaded. The
largest resident set since then is Linux's VmHWM.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from pretrain.parallel.modes import build_engine

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from pretrain.build import build_objective, noise_batch, placed
from pretrain.estimate import plan
from pretrain.interchange import export
from pretrain.models.build import build_model
from pretrain.objectives import finder
from pretrain.objectives.base import Objective
from pretrain.parallel import processes
from pretrain.parallel.device import keep_freed_memory
from pretrain.recipes.recipe import Recipe, load

CPU = torch.device("cpu")
# settings of glibc with which each tensor has a memory mapping
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MODEL = ["model.dim=512", "model.depth=6", "model.heads=8", "parallel.micro_batch=null"]
SMALL = ["model.dim=64", "model.depth=1", "model.heads=2", "parallel.micro_batch=null", "data.batch=2"]
BACKBONES = {"gpt": "gpt_micro", "bert": "bert_micro", "t5": "t5_micro"}  # vit for other objectives
BATCH = {"mae": 16, "dinov2": 4}  # images; 8 for other objectives
PROCESSES = {"single": 1, "ddp": 2, "fsdp2": 2}
OPTIONS = {"dinov2": ["objective.prototypes=4096"]}
SMALL_OPTIONS = {
    "mae": ["objective.decoder_depth=1"],
    "dinov2": ["objective.prototypes=64", "objective.head_hidden=64"],
}


def recipe(name: str, mode: str, precision: str, *more: str) -> Recipe:
    common = [
        f"objective={name}",
        f"model={BACKBONES.get(name, 'vit')}",
        "device=cpu",
        f"parallel.mode={mode}",
        f"precision={precision}",
    ]
    if name == "distillation":
        common += ["objective.loss=features", f"objective.teacher={teacher()}"]
    if name == "t5":
        common += ["data.document_mask=false"]
    return load("demo", [*common, *more])


@functools.cache
def teacher() -> Path:
    """Export an untrained network, the teacher of a distillation."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    export.write(
        Path(folder.name) / "teacher",
        build_model(load("demo", ["model=vit", *MODEL]).model),
        {"pool": "cls"},
        [0.5] * 3,
        [0.25] * 3,
    )
    return Path(folder.name) / "teacher"


def batch_of(cfg: Recipe, model: Objective) -> dict[str, Tensor]:
    return noise_batch(cfg, model, cfg.data.batch // processes.world())


def train(cfg: Recipe, steps: int) -> None:
    engine = build_engine(build_objective(cfg), cfg, CPU)
    arrays = batch_of(cfg, engine.objective)
    for step in range(steps):
        batch = placed(engine.objective, arrays, CPU)
        with engine.microbatch(last=True):
            loss, _ = engine.forward(batch, step)
            engine.backward(loss)
        engine.step(lr=1e-4, weight_decay=0.05)
        engine.objective.after_step(step)


def resident(key: str) -> int:
    """The size in bytes of the resident set of this process: VmRSS, the present one, or VmHWM, the largest."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def measure(name: str, mode: str, precision: str, heap: bool) -> int:
    """The largest growth of the resident set of this process in bytes. `heap`: keep freed memory, as a training
    does."""
    torch.set_num_threads(1)
    processes.start(mode, CPU)
    train(recipe(name, mode, precision, *SMALL, *SMALL_OPTIONS.get(name, [])), steps=2)
    gc.collect()
    if heap:
        keep_freed_memory()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    train(full_recipe(name, mode, precision), steps=3)
    return resident("VmHWM") - before


def full_recipe(name: str, mode: str, precision: str) -> Recipe:
    return recipe(name, mode, precision, *MODEL, *OPTIONS.get(name, []), f"data.batch={BATCH.get(name, 8)}")


def measured(name: str, mode: str, precision: str, heap: bool = False) -> int:
    """`measure` in a new process, or in the first of two."""
    command = [sys.executable, "-W", "ignore", __file__, "--measure", name, "--modes", mode, "--precision", precision]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(PROCESSES[mode]):
        group = {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES[mode])}
        group |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        env = os.environ | group | ({} if heap else MAPPED)
        ranks.append(subprocess.Popen([*command, *(["--heap"] * heap)], env=env, stdout=subprocess.PIPE))
    answers = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit(f"{name} with {mode} did not train; its error is above")
    return int(answers[0].split()[-1])


def emit(name: str, value: float, unit: str, versus: str) -> None:
    print(
        json.dumps({"name": name, "value": float(f"{value:.3g}"), "unit": unit, "versus": versus}, ensure_ascii=False),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=finder.names(), choices=finder.names())
    parser.add_argument("--modes", nargs="+", default=list(PROCESSES), choices=list(PROCESSES))
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--heap", action="store_true", help="also measure with the allocator of a training")
    parser.add_argument("--measure", metavar="OBJECTIVE", help="print the bytes of this process only (used internally)")
    options = parser.parse_args()
    if options.measure:
        print(measure(options.measure, options.modes[0], options.precision, options.heap))
        return
    for mode in options.modes:
        for name in options.objectives if mode == "single" else ["dinov2"]:
            compare(name, mode, options.precision, options.heap)


def compare(name: str, mode: str, precision: str, heap: bool) -> None:
    planned = plan.trace(full_recipe(name, mode, precision), PROCESSES[mode]).peak
    used = measured(name, mode, precision)
    line = f"{name} {mode} {precision}: {planned / 2**20:.0f} MiB planned, {used / 2**20:.0f} MiB measured"
    print(line, file=sys.stderr, flush=True)
    what = f"resident set, {name}, {precision}, batch {BATCH.get(name, 8)}, {mode} on {PROCESSES[mode]} CPU processes"
    emit("plan.memory." + ("" if mode == "single" else f"{mode}.") + "versus_measured", planned / used, "×", what)
    if heap and mode == "single":
        heap_used = measured(name, mode, precision, heap=True)
        emit(f"plan.memory.{name}.heap", heap_used / used, "×", "the same with a memory mapping for each tensor")


if __name__ == "__main__":
    main()
