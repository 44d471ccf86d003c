"""Compare the memory that `unlabeled plan` predicts for a step with the memory that real steps need.

Figures, for every objective in a separate process on the CPU:

    plan.memory.versus_measured    predicted peak / largest growth of the resident set during training; one line for
                                   each objective
    plan.memory.M.versus_measured  the same for DINOv2 on two processes with parallel.mode M, for the first process
    plan.memory.O.heap             largest growth of the resident set with the allocator of a training / with a memory
                                   mapping for each tensor

The recipe of an objective is that of its tests (`Config.tiny`) with a larger model (`LARGE`).

With a memory mapping for each tensor (glibc's MALLOC_MMAP_THRESHOLD_), freed tensors are returned to the system, so
that the resident set is the memory in use. The first figures are measured in this way. A training keeps freed memory
for later tensors, which is faster, but leaves gaps that no tensor fits; the last figure shows the difference. Before
memory is measured, the recipe of the tests itself is trained, so that libraries and their buffers are loaded. The
largest resident set since then is Linux's VmHWM.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
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

from data_pipeline.build.build_shards import build
from pretrain import contract
from pretrain.build import build_objective, noise_batch, placed
from pretrain.estimate import plan
from pretrain.objectives import finder
from pretrain.objectives.base import Objective
from pretrain.parallel import processes
from pretrain.parallel.device import keep_freed_memory
from pretrain.recipes.recipe import Recipe, load

CPU = torch.device("cpu")
# settings of glibc with which each tensor has a memory mapping
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# sizes of the model that is measured, as far as its family has these options
LARGE = {"dim": 512, "depth": 6, "heads": 8, "widths": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
BATCH = 32  # samples; the queues of the tests' recipes have as many rows
PROCESSES = {"single": 1, "ddp": 2, "fsdp2": 2}


def recipe_of_tests(name: str) -> list[str]:
    """The overrides with which the tests train an objective."""
    return [f"objective={name}", *contract.tiny(name, folder_of)[0]]


def folder_of(kind: str) -> str:
    """The folder that stands for a placeholder of `Config.tiny`: a small export or run, made as in the tests."""
    from tests import conftest

    with contextlib.redirect_stdout(sys.stderr):
        shards = temporary_folder() / "shards"
        if not shards.is_dir():
            build(conftest.write_photos(temporary_folder() / "photos"), shards)
        return conftest.folder_of(kind, shards)


@functools.cache
def temporary_folder() -> Path:
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


def small(overrides: list[str], mode: str, precision: str) -> Recipe:
    common = ["device=cpu", f"parallel.mode={mode}", f"precision={precision}", f"data.batch={BATCH}"]
    return load("demo", [*overrides, *common])


def large(overrides: list[str], mode: str, precision: str) -> Recipe:
    """The same with a larger model."""
    options = {field.name for field in dataclasses.fields(small(overrides, mode, precision).model)}
    sizes = [f"model.{key}={value}" for key, value in LARGE.items() if key in options]
    return small([*overrides, *sizes], mode, precision)


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


def measure(overrides: list[str], mode: str, precision: str, heap: bool) -> int:
    """The largest growth of the resident set of this process in bytes. `heap`: keep freed memory, as a training
    does."""
    torch.set_num_threads(1)
    processes.start(mode, CPU)
    train(small(overrides, mode, precision), steps=2)
    gc.collect()
    if heap:
        keep_freed_memory()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    train(large(overrides, mode, precision), steps=3)
    return resident("VmHWM") - before


def measured(overrides: list[str], mode: str, precision: str, heap: bool = False) -> int:
    """`measure` in a new process, or in the first of two."""
    command = [sys.executable, "-W", "ignore", __file__, "--modes", mode, "--precision", precision]
    command += [*(["--heap"] * heap), "--measure", *overrides]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(PROCESSES[mode]):
        group = {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES[mode])}
        group |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        env = os.environ | group | ({} if heap else MAPPED)
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE))
    answers = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit(f"{overrides[0]} with {mode} did not train; its error is above")
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
    help_of_measure = "print the bytes of this process for a recipe only (used internally)"
    parser.add_argument("--measure", nargs="+", metavar="OVERRIDE", help=help_of_measure)
    options = parser.parse_args()
    if options.measure:
        print(measure(options.measure, options.modes[0], options.precision, options.heap))
        return
    for mode in options.modes:
        for name in options.objectives if mode == "single" else ["dinov2"]:
            compare(name, mode, options.precision, options.heap)


def compare(name: str, mode: str, precision: str, heap: bool) -> None:
    overrides = recipe_of_tests(name)
    planned = plan.trace(large(overrides, mode, precision), PROCESSES[mode]).peak
    used = measured(overrides, mode, precision)
    line = f"{name} {mode} {precision}: {planned / 2**20:.0f} MiB planned, {used / 2**20:.0f} MiB measured"
    print(line, file=sys.stderr, flush=True)
    what = f"resident set, {name}, {precision}, batch {BATCH}, {mode} on {PROCESSES[mode]} CPU processes"
    emit("plan.memory." + ("" if mode == "single" else f"{mode}.") + "versus_measured", planned / used, "×", what)
    if heap and mode == "single":
        heap_used = measured(overrides, mode, precision, heap=True)
        emit(f"plan.memory.{name}.heap", heap_used / used, "×", "the same with a memory mapping for each tensor")


if __name__ == "__main__":
    main()
