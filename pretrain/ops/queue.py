"""A queue of features of earlier batches, as MoCo (arXiv 1911.05722) uses for negatives and SwAV for its assignments.

    self.queue = Queue(size=65536, dim=128)     # in __init__
    self.queue.hold(keys, step)                 # in forward, once per micro-batch; self.queue.rows are the negatives
    self.queue.push(step, self.skipped)         # in after_step

The rows and the position of the oldest row are buffers, so they are saved in checkpoints. They are equal on all ranks,
and do not depend on the number of ranks and micro-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import ConfigError
from pretrain.ops.gather import gather, world


class Queue(nn.Module):
    """`rows` [size, dim] are random unit vectors at first; the rows of each step replace the oldest ones.

    `size` must be a multiple of the number of rows that a global batch adds. `per_sample`: the number of rows that each
    sample adds.
    """

    rows: Tensor
    position: Tensor  # int64 scalar: the index of the oldest row

    def __init__(self, size: int, dim: int, per_sample: int = 1):
        super().__init__()
        self.per_sample = per_sample
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.held: list[Tensor] = []  # the rows of this rank's micro-batches in step `step`, until they are pushed
        self.step = -1

    def check_batch(self, samples: int) -> None:
        """Raise ConfigError if the size is not a multiple of the number of rows that a global batch of `samples` adds.

        `build_objective` calls this for every batch size of the recipe, so that a run fails before its first step.
        """
        self._check_rows(samples * self.per_sample)

    def _check_rows(self, batch: int) -> None:
        size = len(self.rows)
        if size % batch:
            raise ConfigError(
                f"a queue of {size} rows: the size must be a multiple of the {batch} rows that a global batch adds;"
                f" write {max(1, round(size / batch)) * batch}"
            )

    def hold(self, rows: Tensor, step: int) -> None:
        """Keep the rows [B, dim] of a micro-batch until `push`. Rows that are still held from another step are dropped;
        a validation or a step that was abandoned leaves such rows."""
        if step != self.step:
            self.held, self.step = [], step
        self.held.append(rows.detach())

    @torch.no_grad()
    def push(self, step: int, skipped: Tensor | None = None) -> None:
        """Write the rows of a step, in the order of the global batch. Collective: every rank must call it.

        `skipped` is `Objective.skipped`, a scalar on the device: if it is 1, the step is skipped, and rows and position
        keep their values. Raises ConfigError if the size is not a multiple of the number of new rows, and RuntimeError
        if `hold` was not called in this step.
        """
        if not self.held or step != self.step:
            raise RuntimeError(
                f"push({step}) without a hold(rows, {step}) before it; call hold in the objective's forward"
            )
        new = gather(torch.cat(self.held).to(self.rows.dtype))
        self.held = []
        size, batch = len(self.rows), len(new)
        try:
            self._check_rows(batch)
        except ConfigError as error:
            error.printed_by_rank_0 = world()[0] > 0  # every rank raises this error, but only rank 0 prints it
            raise
        places = (self.position + torch.arange(batch, device=new.device)) % size
        after = (self.position + batch) % size
        if skipped is not None:
            new = torch.where(skipped > 0, self.rows[places], new)
            after = torch.where(skipped > 0, self.position, after)
        self.rows.index_copy_(0, places, new)
        self.position.copy_(after)
