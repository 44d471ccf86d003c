"""Measure speed and memory of training a decoder on one CPU thread, in comparison with transformers' LlamaForCausalLM.

The model has 6 blocks of width 384 (6 heads, SwiGLU of width 1024, RoPE, RMSNorm, untied head), and a batch has 8 × 256
tokens. Figures for vocabulary V (50304, 4096), precision P (fp32, bf16) and mode M (eager, compiled):

    text.vV.P.M.versus_llama                  CPU seconds of a step: LlamaForCausalLM / ours
    text.v50304.P.peak_memory_versus_llama    increase of the peak memory of the process by four eager steps: ours /
                                              LlamaForCausalLM. The reference point is the memory after a step of a tiny
                                              model, when all libraries have been loaded.

A step is forward, backward and fused AdamW, as a user of each library would write them: LlamaForCausalLM is called with
`labels=`, our model computes the loss of its head in chunks. bf16 is autocast with fp32 weights for both. Compiled
means `torch.compile(model)` for LlamaForCausalLM, and every block compiled for our model, as `parallel.compile` does.
Each model is measured in a separate process, with the allocator settings that its users have: `pretrain.train` makes
the allocator keep freed memory, and `--same-allocator` does so for LlamaForCausalLM, too. The two processes alternate,
and each ratio of times is the median over the rounds. The script also prints, to stderr, how close each model comes to
the speed of matrix products: FLOPs of the linear layers of a step / its CPU seconds / FLOP/s of a 2048³ product in the
same precision in our process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

from pretrain.models.build import build_model

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

DIM, DEPTH, HEADS, WIDTH, LENGTH, BATCH = 384, 6, 6, 1024, 256, 8
NAMES = ("ours", "llama")


class Model(NamedTuple):
    """A model with a batch: `loss` computes the mean loss of the batch."""

    loss: Callable[[], torch.Tensor]
    parameters: list[torch.nn.Parameter]


def ours(vocabulary: int, compiled: bool) -> Model:
    """Our model, with the loss that `objective: gpt` computes."""
    from pretrain import kernels
    from pretrain.interchange.weight_sources import model_config

    sizes = {"dim": DIM, "depth": DEPTH, "heads": HEADS, "mlp_width": WIDTH, "context": LENGTH}
    model = build_model(model_config("gpt", {**sizes, "vocab_size": vocabulary, "qk_norm": False}, "benchmark"))
    kernels.apply(model, torch.device("cpu"))  # as the engine does before it trains
    tokens = torch.randint(0, vocabulary, (BATCH, LENGTH + 1))
    if compiled:
        for block in model.blocks:  # type: ignore[attr-defined]
            block.compile()
    model.train()

    def loss() -> torch.Tensor:
        hidden = model(tokens[:, :-1]).tokens
        return model.head(hidden, tokens[:, 1:]) / (BATCH * LENGTH)

    return Model(loss, list(model.parameters()))


def llama(vocabulary: int, compiled: bool) -> Model:
    """transformers' LlamaForCausalLM of the same size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=DIM,
        intermediate_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config).train()
    tokens = torch.randint(0, vocabulary, (BATCH, LENGTH))
    forward = torch.compile(model) if compiled else model

    def loss() -> torch.Tensor:
        return forward(input_ids=tokens, labels=tokens).loss

    return Model(loss, list(model.parameters()))


def serve(name: str, vocabulary: int, precision: str, compiled: bool, keep: bool) -> None:
    """The main function of the process of one model. Each line of standard input names a task: "step", "product" or
    "peak". It is run, and one line of JSON is printed with its CPU seconds and the increase of the peak memory in
    bytes.
    """
    from pretrain.parallel.device import keep_freed_memory

    torch.set_num_threads(1)
    if keep:
        keep_freed_memory()
    torch.manual_seed(0)
    build = {"ours": ours, "llama": llama}[name]

    def step_of(model: Model) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters, lr=1e-4, fused=True)

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = model.loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def product() -> float:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = (torch.ones(2048, 2048, dtype=dtype) for _ in range(2))
        out = torch.empty(2048, 2048, dtype=dtype)
        torch.mm(a, b, out=out)
        start = time.process_time()
        torch.mm(a, b, out=out)
        return time.process_time() - start

    step_of(build(64, False))()  # a step of a tiny model, so that all libraries are loaded before memory is measured
    before = resident()
    tasks = {"step": step_of(build(vocabulary, compiled)), "product": product, "peak": lambda: None}
    for line in sys.stdin:
        task = line.strip()
        start = time.process_time()
        seconds = tasks[task]() or time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        print(json.dumps({"seconds": seconds, "peak": peak}), flush=True)


def resident() -> int:
    """The size in bytes of the resident set of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class ModelProcess:
    """The process of one model, which runs `serve`."""

    def __init__(self, name: str, vocabulary: int, precision: str, mode: str, keep: bool):
        words = ["--serve", name, str(vocabulary), precision, mode, "keep" if keep else "plain"]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("VERBOSE") else subprocess.DEVNULL,
            text=True,
        )

    def run(self, task: str) -> dict[str, float]:
        """Run a task of `serve` in the process, and return its result: {"seconds", "peak"}."""
        self.process.stdin.write(task + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def linear_flops(vocabulary: int) -> float:
    """The FLOPs of the linear layers in a step, forward and backward, without the matrix products of attention."""
    block = 4 * DIM * DIM + 3 * DIM * WIDTH
    return 6.0 * BATCH * LENGTH * (DEPTH * block + DIM * vocabulary)


def emit(name: str, value: float, unit: str, versus: str) -> None:
    print(json.dumps({"name": name, "value": float(f"{value:.3g}"), "unit": unit, "versus": versus}), flush=True)


def measure(vocabulary: int, precision: str, mode: str, rounds: int, same_allocator: bool) -> None:
    processes = {
        name: ModelProcess(name, vocabulary, precision, mode, same_allocator or name == "ours") for name in NAMES
    }
    for _ in range(4):  # warm-up: compile, allocate the optimizer state, and reach the peak of memory
        for process in processes.values():
            process.run("step")
    peaks = {name: process.run("peak")["peak"] for name, process in processes.items()}
    ratios = []
    for _ in range(rounds):
        seconds = {name: process.run("step")["seconds"] for name, process in processes.items()}
        ratios.append(seconds["llama"] / seconds["ours"])
        rate = 2 * 2048**3 / median(processes["ours"].run("product")["seconds"] for _ in range(3))
        shares = {name: linear_flops(vocabulary) / s / rate for name, s in seconds.items()}
        listed = ", ".join(f"{n} {seconds[n]:.2f} CPU s ({shares[n]:.0%} of the speed of a product)" for n in NAMES)
        print(
            f"v{vocabulary} {precision} {mode}: {listed}, matrix product {rate / 1e9:.0f} GFLOP/s",
            file=sys.stderr,
            flush=True,
        )
    for process in processes.values():
        process.close()
    emit(
        f"text.v{vocabulary}.{precision}.{mode}.versus_llama", median(ratios), "ratio", "LlamaForCausalLM, interleaved"
    )
    if mode == "eager":
        print(
            f"increase of peak memory: ours {peaks['ours'] / 2**20:.0f} MiB, llama {peaks['llama'] / 2**20:.0f} MiB",
            file=sys.stderr,
        )
        if vocabulary == 50304:
            name = f"text.v{vocabulary}.{precision}.peak_memory_versus_llama"
            emit(name, peaks["ours"] / peaks["llama"], "ratio", "LlamaForCausalLM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[50304, 4096])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--rounds", type=int, default=5, help="number of steps of each model that are timed")
    parser.add_argument(
        "--same-allocator",
        action="store_true",
        help="make the allocator keep freed memory for LlamaForCausalLM, too, as pretrain.train does",
    )
    parser.add_argument("--serve", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        name, vocabulary, precision, mode, keep = options.serve
        serve(name, int(vocabulary), precision, mode == "compiled", keep == "keep")
        return
    for vocabulary in options.vocabularies:
        for precision in options.precisions:
            for mode in options.modes:
                measure(vocabulary, precision, mode, options.rounds, options.same_allocator)


if __name__ == "__main__":
    main()
