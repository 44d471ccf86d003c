"""Skip the update of a step whose loss or gradient is not finite on any rank, without a host sync.

The decision is a scalar on the device; 1.0 skips the step. Fused optimizers get it as `found_inf`, and the update of an
objective's teacher gets it as `Objective.skipped`. Buffers that the forward has changed, such as running means, are
restored with `torch.where`. The host reads the decision together with the other metrics, every `log.every` steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.appended_lines import LineFile
from common.errors import UserError
from data_pipeline.stream.stream import Stream
from pretrain.parallel import processes
from pretrain.recipes.sections import Skip

WINDOW = 128  # `skip.sigma` refers to the mean and the standard deviation of this many preceding losses
MAX_NAMED_SAMPLES = 8  # samples that an error message names; skipped.jsonl names all of them


class Guard:
    """Decides in each step whether the update is skipped. Call `before` before the first forward of a step, `judge`
    between the backward and the update, `after` after the update, and `read` with each group of rows of metrics."""

    def __init__(self, objective: nn.Module, cfg: Skip, device: torch.device):
        self.objective, self.max_in_a_row, self.sigma = objective, cfg.most, cfg.sigma
        self.state = {
            "losses": torch.zeros(WINDOW, device=device),  # ring buffer of the last WINDOW finite losses
            "count": torch.zeros((), dtype=torch.int64, device=device),  # number of finite losses so far
        }
        self.saved: list[Tensor] = []  # clones of the objective's buffers, made before this step
        self.skipped = torch.zeros((), device=device)  # the decision for this step
        self.in_a_row = 0  # number of consecutive skipped steps up to the last row that was read
        self.lines: LineFile | None = None  # RUN/skipped.jsonl

    def before(self) -> None:
        """Clone all buffers of the objective. It is not possible to clone only those that a step changes: batch norm
        updates its running statistics without incrementing the version counters of the tensors."""
        self.saved = [b.clone() for b in self.objective.buffers()]

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 if the step is to be skipped, otherwise 0.0, equal on all ranks. `loss` and `norm` are this rank's loss
        and gradient norm, scalars on the device. Collective: every rank must call it.

        Only one number is all-reduced: the loss, or NaN if the gradient norm is not finite. The sum is finite only if
        the values of all ranks are finite.
        """
        value = loss.detach().float() + 0 * norm.detach().float()  # 0 · inf is NaN
        world = 1
        if dist.is_initialized():
            dist.all_reduce(value)
            world = dist.get_world_size()
        value = value / world
        finite = value.isfinite()
        losses, count = self.state["losses"], self.state["count"]
        skip = ~finite
        if self.sigma is not None:
            skip = skip | ((count >= WINDOW) & (value > losses.mean() + self.sigma * losses.std()))
        index = (count % WINDOW).view(1)
        losses.index_copy_(0, index, torch.where(finite, value, losses[index].view(())).view(1))
        count += finite
        self.skipped = skip.float()
        return self.skipped

    def after(self) -> None:
        """Restore the buffers of a skipped step, and set `Objective.skipped`, before the objective's `after_step`."""
        skipped = self.skipped.bool()
        for buffer, saved in zip(self.objective.buffers(), self.saved, strict=True):
            buffer.copy_(torch.where(skipped, saved, buffer))
        self.saved = []
        self.objective.skipped = self.skipped  # type: ignore[assignment]

    def read(self, rows: list[dict[str, Any]], run: Path, stream: Stream, say: Callable[[str], None]) -> None:
        """Report the skipped steps in rows of metrics, and write their samples to RUN/skipped.jsonl. Raises UserError,
        on all ranks, when more than `skip.most` consecutive steps have been skipped."""
        for row in rows:
            skipped = row.pop("skipped", 0.0)
            if not skipped:
                self.in_a_row = 0
                continue
            row["skipped"] = 1
            self.in_a_row += 1
            reason = skip_reason(row)
            samples = samples_of(stream, row["step"])
            if processes.rank() == 0:
                entry = {"step": row["step"], "terms": reason, "loss": repr(row["loss"]), "samples": samples}
                self.lines = self.lines or LineFile(run / "skipped.jsonl")
                self.lines.add(json.dumps(entry) + "\n")
            say(f"step {row['step']} changed nothing: {reason}; its samples are in {run / 'skipped.jsonl'}")
            if self.in_a_row > self.max_in_a_row:
                named = ", ".join(f"number {number} in {shard}" for shard, number in samples[:MAX_NAMED_SAMPLES])
                named += " …" if len(samples) > MAX_NAMED_SAMPLES else ""
                raise processes.raised_by_all(
                    UserError(
                        f"{self.in_a_row} steps in a row were skipped (skip.most = {self.max_in_a_row}), the last is"
                        f" step {row['step']}: {reason}; its samples: {named} (all: {run / 'skipped.jsonl'}); lower"
                        " optim.lr, set optim.clip, or resume from an earlier checkpoint with checkpoint.resume=STEP"
                    )
                )

    def undo(self) -> None:
        """Restore the buffers after a step that was abandoned before its update."""
        for buffer, saved in zip(self.objective.buffers(), self.saved, strict=True):
            buffer.copy_(saved)
        self.saved = []

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for key, value in self.state.items():
            value.copy_(state[key])


def skip_reason(row: dict[str, Any]) -> str:
    """The reason why a step was skipped, as text: the values that are not finite ("ibot = nan, grad_norm = nan"), or
    the loss that is too high."""
    not_finite = [f"{k} = {v}" for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
    return ", ".join(not_finite) or f"loss = {row['loss']:.4g} is far above the losses before it (skip.sigma)"


def samples_of(stream: Stream, step: int) -> list[tuple[str, int]]:
    """(shard, number in the shard, from 0) of every sample in the global batch of a step.

    Samples are identified by number, because only the shards hold their keys, and reading a shard here would delay all
    ranks.
    """
    (pairs,) = stream.plan.micro_batches(np.array([step]), 1, 0, 1).values()
    datasets = stream.samples
    return [datasets[d].location(index % len(datasets[d])) for d, index in pairs]  # the index counts on over all epochs
