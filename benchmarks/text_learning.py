"""How well our language models learn from real text, compared with a plain GPT-2 loop, with AdamW, and with token
frequencies.

    python benchmarks/text_learning.py FOLDER [--parts gpt muon bert t5]

The text is the State of the Union addresses with a byte-level BPE of 4,096 tokens (texts, token sets and runs go to
FOLDER). All trainings use `train`, with recipes changed by overrides, on one thread.

    text_learning.gpt.bpb_versus_gpt2       bits per byte on test, our decoder / transformers' GPT2LMHeadModel
    text_learning.muon.tokens_versus_adamw  tokens that Muon with AdamW needs to reach AdamW's final value / AdamW's tokens
    text_learning.{bert,t5}.versus_unigram  loss on held-out text / entropy of the frequencies of its targets

gpt: our `gpt` (RoPE, RMSNorm, QK-norm, relu², tied head, 4 blocks of width 128) with AdamW, against GPT-2 with the same
blocks in a loop like nanoGPT's: the same batches in the same order, AdamW (0.9, 0.95; weight decay 0.1 on matrices),
gradients clipped at 1, 20 steps of warm-up and a cosine to a tenth, GPT-2's own initial weights, no dropout. The
numbers of parameters differ by less than 5 %. Both use the best of the same learning rates by their value on val; test
is used once. muon: complete runs, each with its own cosine, for several shares of AdamW's steps; the figure is the
share at which their values on val cross AdamW's, by linear interpolation. Muon's learning rate is tuned among the same
values at the largest share; AdamW's is that of gpt.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import torch.nn.functional as F
from steps import emit
from torch import Tensor, nn

from common.schedules import Schedule
from data_pipeline.build import demo_text
from data_pipeline.build.tokenize_text import tokenize
from data_pipeline.shards.token_rows import IGNORED, Rows
from eval.bits_per_byte import batch as rows_of
from eval.run import evaluate
from pretrain.build import build_objective, build_stream, open_samples
from pretrain.recipes.recipe import Recipe, load
from pretrain.train import train

VOCABULARY, CONTEXT, DIM, DEPTH, HEADS, BATCH = 4096, 256, 128, 4, 4, 8
LRS = (1e-3, 2e-3, 4e-3)
SHARES = (0.4, 0.6, 0.8)  # of AdamW's steps, for Muon
WARMUP, DECAY, BETAS, CLIP = 20, 0.1, (0.9, 0.95), 1.0
SIZE = [f"model.vocab_size={VOCABULARY}", f"model.context={CONTEXT}", f"model.dim={DIM}", f"model.depth={DEPTH}"]
SIZE += [f"model.heads={HEADS}"]
COMMON = [f"data.batch={BATCH}", "data.workers=0", "threads=1", "precision=fp32", "device=cpu", "overwrite=true"]
COMMON += ["parallel.micro_batch=null", "checkpoint=100000", "export=100000", "log={every: 50, flops: false}"]
COMMON += [f"optim.weight_decay={DECAY}", f"optim.beta1={BETAS[0]}", f"optim.beta2={BETAS[1]}", f"optim.clip={CLIP}"]
MODELS = {
    "gpt": ["model=gpt", "model.mlp=relu2", "model.tied=true", "data.document_mask=false"],
    "bert": ["model=bert_base"],
    "t5": ["model=t5_v1_1_small", "model.head_dim=32", "model.mlp_width=256", "data.document_mask=false"],
}
OWN_STEPS, OWN_LR = {"bert": 4000, "t5": 1000}, {"bert": 1e-3, "t5": 2e-3}


def recipe(name: str, folder: Path, run: str, steps: int, lr: float, *more: str) -> Recipe:
    tokens = folder / ("sentinels" if name == "t5" else "text")
    schedule = f"optim.lr={{kind: cosine, value: {lr}, final: {lr / 10}, warmup: {WARMUP}}}"
    own = [f"objective={name}", *MODELS[name], *SIZE, f"steps={steps}", f"run={folder / 'runs' / run}", schedule]
    return load("gpt2_124m", [*own, *COMMON, f"data.train={tokens / 'train'}", "optim.name=adamw", *more])


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- bits per byte
@functools.cache
def ours(folder: Path, run: str, steps: int, lr: float, *more: str) -> Callable[[str], float]:
    """Train our decoder. Returns a function that computes its bits per byte on a split."""
    start = time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        out = train(recipe("gpt", folder, run, steps, lr, *more)) / "export" / str(steps)
    seconds = time.process_time() - start

    @functools.cache
    def score(split: str) -> float:
        rows = evaluate(out, ["bits_per_byte"], [], [str(folder / "text" / split)], split)
        return next(row["value"] for row in rows if row["metric"] == "bits_per_byte")

    say(f"{run}: {steps} steps, lr {lr:g}, val {score('val'):.4f} bits per byte, {seconds:.0f} CPU s")
    return score


def gpt2(folder: Path, steps: int, lr: float) -> tuple[Callable[[str], float], int]:
    """Train GPT2LMHeadModel in a plain loop: (a function that computes its bits per byte on a split, its number of
    parameters)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    start = time.process_time()
    torch.manual_seed(0)
    sizes = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=DIM, n_layer=DEPTH, n_head=HEADS)
    sizes.attn_pdrop = sizes.resid_pdrop = sizes.embd_pdrop = 0.0
    model = GPT2LMHeadModel(sizes)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)
    schedule = Schedule(lr, kind="cosine", final=lr / 10, warmup=WARMUP, steps=steps)
    for step, batch in zip(range(steps), batches(recipe("gpt", folder, "unused", steps, lr)), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        logits = model(batch["tokens"]).logits
        F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORED).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.process_time() - start
    model.eval()

    @functools.cache
    @torch.inference_mode()
    def score(split: str) -> float:
        rows, bits, size = Rows([str(folder / "text" / split)], CONTEXT), 0.0, 0
        for first in range(0, len(rows), 16):
            tokens, _, targets = rows_of(rows, range(first, min(first + 16, len(rows))))
            logits = model(tokens[:, :-1]).logits
            bits += F.cross_entropy(logits.mT, targets, ignore_index=IGNORED, reduction="sum").item() / math.log(2)
            size += int(rows.vocabulary.token_bytes[targets[targets != IGNORED].numpy()].sum())
        return bits / size

    say(f"gpt2: {steps} steps, lr {lr:g}, val {score('val'):.4f} bits per byte, {seconds:.0f} CPU s")
    return score, sum(p.numel() for p in model.parameters())


def batches(cfg: Recipe, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """The batches of a run of the recipe."""
    cfg.seed = seed
    stream = build_stream(cfg, build_objective(cfg), open_samples(cfg))
    while True:
        yield {key: value.clone() for key, value in next(stream).items()}


def versus_gpt2(folder: Path, steps: int, lrs: Sequence[float]) -> None:
    our_scores = {lr: ours(folder, f"adamw-{lr:g}", steps, lr) for lr in lrs}
    gpt2_scores = {lr: gpt2(folder, steps, lr) for lr in lrs}
    our_lr = min(lrs, key=lambda lr: our_scores[lr]("val"))
    gpt2_lr = min(lrs, key=lambda lr: gpt2_scores[lr][0]("val"))
    our_size, gpt2_size = parameters(recipe("gpt", folder, "unused", steps, our_lr)), gpt2_scores[gpt2_lr][1]
    our_bits, gpt2_bits = our_scores[our_lr]("test"), gpt2_scores[gpt2_lr][0]("test")
    say(
        f"test: ours {our_bits:.4f} bits per byte at lr {our_lr:g}, {our_size:,} parameters; GPT-2 {gpt2_bits:.4f} at lr"
        f" {gpt2_lr:g}, {gpt2_size:,} parameters; {steps * BATCH * CONTEXT:,} tokens each"
    )
    assert abs(our_size / gpt2_size - 1) < 0.05
    emit(
        "text_learning.gpt.bpb_versus_gpt2",
        our_bits / gpt2_bits,
        "ratio",
        "GPT2LMHeadModel, same size, tokens and AdamW",
    )


def parameters(cfg: Recipe) -> int:
    return sum(p.numel() for p in build_objective(cfg).parameters())


def muon_versus_adamw(folder: Path, steps: int, lrs: Sequence[float]) -> None:
    adamw = min(ours(folder, f"adamw-{lr:g}", steps, lr)("val") for lr in lrs)

    def value(share: float, lr: float) -> float:
        return ours(folder, f"muon-{share:g}-{lr:g}", round(share * steps), lr, "optim.name=muon")("val")

    tried = {lr: value(SHARES[-1], lr) for lr in lrs}
    lr = min(lrs, key=tried.__getitem__)
    values = [*(value(share, lr) for share in SHARES[:-1]), tried[lr]]
    say(
        f"AdamW ends at {adamw:.4f}; Muon at lr {lr:g}: "
        + ", ".join(f"{v:.4f} ({s:g})" for s, v in zip(SHARES, values, strict=True))
    )
    # np.interp needs increasing positions. If the smallest share is already enough, it returns that share.
    emit(
        "text_learning.muon.tokens_versus_adamw",
        float(np.interp(-adamw, [-v for v in values], SHARES)),
        "ratio",
        "AdamW's final bits per byte on val",
    )
    if values[-1] > adamw:
        say(f"Muon does not reach AdamW's value with {SHARES[-1]:g} of the tokens")


# ---------------------------------------------------------------- losses
def versus_unigram(name: str, folder: Path, steps: int, lr: float) -> None:
    start = time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        run = train(recipe(name, folder, name, steps, lr))
    seconds = time.process_time() - start
    held_out = folder / ("sentinels" if name == "t5" else "text") / "val"
    cfg = recipe(name, folder, name, steps, lr, f"data.train={held_out}", f"init={run / 'export' / str(steps)}")
    objective = build_objective(cfg, start=True).eval()
    total, counts = 0.0, np.zeros(VOCABULARY, np.int64)
    with torch.inference_mode():
        for _, batch in zip(range(100), batches(cfg), strict=False):
            total += float(objective(batch, 0)[0]) * int(objective.count(batch))
            counts += np.bincount(batch["targets"][batch["targets"] != IGNORED].numpy(), minlength=VOCABULARY)
    loss, shares = total / counts.sum(), counts[counts > 0] / counts.sum()
    entropy = -(shares * np.log(shares)).sum()
    say(
        f"{name}: {steps} steps, loss {loss:.3f} nats on {counts.sum():,} held-out targets, unigram entropy {entropy:.3f}, {seconds:.0f} CPU s"
    )
    emit(
        f"text_learning.{name}.versus_unigram",
        loss / entropy,
        "ratio",
        "entropy of the targets' frequencies, nats / nats",
    )


def corpus(folder: Path) -> None:
    """Make the token sets, for T5 with sentinels."""
    demo_text.make(folder / "text", source="speeches", vocab=VOCABULARY, workers=1, say=say)
    texts = folder / "text" / "shards"
    with_sentinels = folder / "sentinels"
    tokenize(texts / "train", with_sentinels / "train", vocab=VOCABULARY, specials=("sentinels",), workers=1, say=say)
    tokenizer = with_sentinels / "train" / "tokenizer.json"
    tokenize(texts / "val", with_sentinels / "val", tokenizer, workers=1, say=say)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--parts", nargs="+", default=["gpt", "muon", "bert", "t5"], choices=["gpt", "muon", "bert", "t5"]
    )
    parser.add_argument("--steps", type=int, default=500, help="number of steps of a decoder with AdamW")
    parser.add_argument("--lrs", type=float, nargs="+", default=list(LRS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for figures
        corpus(options.folder)
    for part in options.parts:
        if part == "gpt":
            versus_gpt2(options.folder, options.steps, options.lrs)
        elif part == "muon":
            muon_versus_adamw(options.folder, options.steps, options.lrs)
        else:
            versus_unigram(part, options.folder, OWN_STEPS[part], OWN_LR[part])


if __name__ == "__main__":
    main()
