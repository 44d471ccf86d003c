"""One step of the training loop: its data, its signals and its metrics; `pretrain/step.py` has the training itself."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

from torch import Tensor

from data_pipeline.stream.stream import Stream
from pretrain.build import placed
from pretrain.metrics import Clock
from pretrain.objectives.base import Batch
from pretrain.optim.skip_steps import Guard
from pretrain.parallel import processes
from pretrain.parallel.engine import Engine
from pretrain.recipes.recipe import Recipe
from pretrain.signals import Stop, Stopped
from pretrain.step import one_step

# The answers that the ranks exchange in each step. STOP: a signal has come, so the run ends after this step. NO_DATA: a
# signal has come while the rank waited for data, so the run ends without this step.
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

    Raises Stopped if a signal came while a rank waited for data. Other ranks may already wait for this rank in a
    collective. Therefore it finishes the step with an earlier batch and a loss of NaN, so that the guard skips the
    update on all ranks, and answers NO_DATA; then all ranks raise Stopped.
    """
    waiting = contextlib.nullcontext if stream.workers else stop.interruptible
    stream.while_waiting = stop.check
    has_data = True

    def batches() -> Iterator[Batch]:
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

    def check() -> None:
        if agreement.answer() == NO_DATA:
            engine.scale.undo()
            raise Stopped(stop.number)

    lr = cfg.optim.lr(step)
    values = one_step(
        engine,
        guard,
        batches(),
        step,
        lr,
        cfg.optim.weight_decay(step),
        change=lambda loss: loss if has_data else loss * math.nan,
        after_micro=lambda: clock.lap("model"),
        after_update=check,
    )
    clock.lap("model")
    return {**values, "lr": lr, "skipped": guard.skipped}
