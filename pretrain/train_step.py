"""One step of the training loop: forward and backward of the micro-batches, and the update of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from data_pipeline.stream.stream import Stream
from pretrain.build import placed
from pretrain.metrics import Clock
from pretrain.optim.groups import thaw
from pretrain.optim.skip_steps import Guard
from pretrain.parallel import processes
from pretrain.parallel.engine import Engine
from pretrain.recipes.recipe import Recipe
from pretrain.signals import Stop, Stopped

# What a rank tells the others in each step: CONTINUE; or STOP after this step, because a signal has come; or NO_DATA,
# because a signal has come while it waited for data.
CONTINUE, STOP, NO_DATA = 0, 1, 2


def train_step(
    cfg: Recipe,
    step: int,
    engine: Engine,
    stream: Stream,
    guard: Guard,
    clock: Clock,
    stop: Stop,
    agreement: processes.Agreement,
) -> dict[str, Tensor | float]:
    """Train one step, unless the guard skips its update. Returns scalars to log, on the device.

    Raises Stopped if a signal came while a rank waited for data. Other ranks may already be in a collective of this
    step. Therefore the rank finishes the step with an earlier batch and a loss of NaN, which makes the guard skip the
    update on all ranks, and tells them NO_DATA; then all ranks raise Stopped.
    """
    waiting = contextlib.nullcontext if stream.workers else stop.interruptible
    stream.while_waiting = stop.check
    rows: list[dict[str, Tensor]] = []  # losses and logged values of the micro-batches
    has_data = True
    guard.before()

    def batches() -> Iterator[dict[str, Tensor]]:
        nonlocal has_data
        for micro in range(engine.accumulate):
            if has_data:
                try:
                    with waiting():
                        batch = next(stream)
                except Stopped:
                    if not (agreement.many and stop.has_trained):
                        raise
                    batch, has_data = stream.stand_in(), False
            if micro + 1 == engine.accumulate:
                agreement.tell(NO_DATA if not has_data else STOP if stop.number is not None else CONTINUE)
            clock.lap("data")
            yield placed(engine.objective, batch, engine.device)

    for micro, batch in enumerate(engine.micro_batches(batches())):
        with engine.microbatch(last=micro + 1 == engine.accumulate):
            loss, logs = engine.forward(batch, step)
            loss = loss if has_data else loss * math.nan
            engine.backward(loss)
        rows.append({"loss": loss.detach(), **logs})
        clock.lap("model")
    means = {key: torch.stack([row[key].float() for row in rows]).mean() for key in rows[0]}
    lr = cfg.optim.lr(step)
    thaw(engine.optimizer, step)
    norm = engine.step(lr, cfg.optim.weight_decay(step), lambda norm: guard.judge(means["loss"], norm))
    if agreement.answer() == NO_DATA:
        engine.scale.undo()
        raise Stopped(stop.number)
    guard.after()
    engine.objective.after_step(step)
    clock.lap("model")
    return {**means, "grad_norm": norm, "lr": lr, "skipped": guard.skipped}
