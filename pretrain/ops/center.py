"""The centre of DINO's teacher outputs (arXiv 2104.14294, eq. 4): a moving average of their mean over the global batch.

    self.center = Center(prototypes)                  # in __init__
    self.center.hold(outputs, step)                   # in forward, once per micro-batch; self.center.mean is the centre
    self.center.update(step, momentum, self.skipped)  # in after_step

The centre is a buffer, so it is saved in checkpoints. It is equal on all ranks, and does not depend on the number of
ranks and micro-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.ops.gather import sum_over_world, world


class Center(nn.Module):
    """`mean` [K], zeros at first."""

    mean: Tensor

    def __init__(self, outputs: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(outputs))
        self.held: list[Tensor] = []  # the mean output of each of this rank's micro-batches in step `step`
        self.step = -1

    def hold(self, outputs: Tensor, step: int) -> None:
        """Keep the mean of the outputs [B, K] of a micro-batch until `update`. Means that are still held from another
        step are dropped."""
        if step != self.step:
            self.held, self.step = [], step
        self.held.append(outputs.detach().to(self.mean.dtype).mean(0))

    @torch.no_grad()
    def update(self, step: int, momentum: float, skipped: Tensor | None = None) -> None:
        """mean ← momentum · mean + (1 − momentum) · (mean output of step `step`). Collective: every rank must call it.

        `skipped` is `Objective.skipped`, a scalar on the device: if it is 1, nothing changes. Raises RuntimeError if
        `hold` was not called in this step.
        """
        if not self.held or step != self.step:
            raise RuntimeError(
                f"update({step}) without a hold(outputs, {step}) before it; call hold in the objective's forward"
            )
        batch = sum_over_world(torch.stack(self.held).mean(0)) / world()[1]
        self.held = []
        new = momentum * self.mean + (1 - momentum) * batch
        self.mean.copy_(new if skipped is None else torch.where(skipped > 0, self.mean, new))
