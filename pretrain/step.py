"""One training step: forward and backward of the micro-batches, the update of the weights, and the work after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pretrain.objectives.base import Batch
from pretrain.optim.groups import thaw
from pretrain.optim.skip_steps import Guard
from pretrain.parallel.engine import Engine


def one_step(
    engine: Engine,
    guard: Guard,
    batches: Iterable[Batch],
    step: int,
    lr: float,
    weight_decay: float,
    change: Callable[[Tensor], Tensor] = lambda loss: loss,
    after_micro: Callable[[], None] = lambda: None,
    after_update: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Forward, backward and update of one step, as every trainer, test and benchmark of steps has it. Returns "loss",
    the objective's logged values and "grad_norm": means over this rank's micro-batches, scalars on the device.

    `batches`: the micro-batches, on the device. `change` gets each loss before its backward. `after_micro` is called
    after each micro-batch, `after_update` between the update and the work after it; an exception that it raises leaves
    that out.
    """
    guard.before()
    rows: list[dict[str, Tensor]] = []  # losses and logged values of the micro-batches
    for micro, batch in enumerate(engine.micro_batches(batches)):
        with engine.microbatch(last=micro + 1 == engine.accumulate):
            loss, logs = engine.forward(batch, step)
            loss = change(loss)
            engine.backward(loss)
        rows.append({"loss": loss.detach(), **logs})
        after_micro()
    means = {key: torch.stack([row[key].float() for row in rows]).mean() for key in rows[0]}
    thaw(engine.optimizer, step)
    norm = engine.step(lr, weight_decay, lambda norm: guard.judge(means["loss"], norm))
    after_update()
    guard.after()
    engine.objective.after_step(step)
    return {**means, "grad_norm": norm}
