"""Guard: a step with a non-finite loss or gradient on any process changes nothing, and the host does not wait to find out.

The verdict is a scalar on the device: 1.0 skips. Fused optimizers take it as `found_inf`, an objective's teacher as `Objective.skipped`, and buffers
that the forward has changed (running means) are put back by `torch.where`. The host reads it with the other metrics, every `log.every` steps.
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

from data_pipeline.stream import Stream
from pretrain.errors import UserError
from pretrain.parallel import processes
from pretrain.recipe import Skip

WINDOW = 128  # losses that `skip.sigma` compares with
NAMED = 8  # samples that an error names; all are in skipped.jsonl


class Guard:
    """`before` a step's first forward, `judge` between gradients and update, `after` the update; `read` when metrics reach the host."""

    def __init__(self, objective: nn.Module, cfg: Skip, device: torch.device):
        self.objective, self.most, self.sigma = objective, cfg.most, cfg.sigma
        self.state = {
            "losses": torch.zeros(WINDOW, device=device),  # a ring of the last finite ones
            "count": torch.zeros((), dtype=torch.int64, device=device),
        }
        self.saved: list[Tensor] = []
        self.skipped = torch.zeros((), device=device)  # the verdict on this step
        self.in_a_row = 0

    def before(self) -> None:
        """Keep a copy of all buffers: which ones a step changes cannot be seen (batch norm does not count up their version)."""
        self.saved = [b.clone() for b in self.objective.buffers()]

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 where the step is to be skipped, else 0.0: the same on all processes. `loss`, `norm`: this process's, on the device.

        One number crosses processes: the loss, made NaN where the gradient norm is not finite. Its sum is finite only if all are.
        """
        value = loss.detach().float() + 0 * norm.detach().float()
        world = 1
        if dist.is_initialized():
            dist.all_reduce(value)
            world = dist.get_world_size()
        value = value / world
        finite = value.isfinite()
        losses, count = self.state["losses"], self.state["count"]
        bad = ~finite
        if self.sigma is not None:
            bad = bad | ((count >= WINDOW) & (value > losses.mean() + self.sigma * losses.std()))
        place = (count % WINDOW).view(1)
        losses.index_copy_(0, place, torch.where(finite, value, losses[place].view(())).view(1))
        count += finite
        self.skipped = bad.float()
        return self.skipped

    def after(self) -> None:
        """Put back what the forward of a skipped step has changed, and tell the objective, before its own `after_step`."""
        skipped = self.skipped.bool()
        for buffer, saved in zip(self.objective.buffers(), self.saved, strict=True):
            buffer.copy_(torch.where(skipped, saved, buffer))
        self.saved = []
        self.objective.skipped = self.skipped  # type: ignore[assignment]

    def read(self, rows: list[dict[str, Any]], run: Path, stream: Stream, say: Callable[[str], None]) -> None:
        """Tell of skipped steps among rows of metrics, with their samples in RUN/skipped.jsonl. Raises UserError after too many in a row."""
        for row in rows:
            skipped = row.pop("skipped", 0.0)
            if not skipped:
                self.in_a_row = 0
                continue
            row["skipped"] = 1
            self.in_a_row += 1
            terms = blame(row)
            names = samples_of(stream, row["step"])
            entry = {"step": row["step"], "terms": terms, "loss": repr(row["loss"]), "samples": names}
            if processes.rank() == 0:
                with (run / "skipped.jsonl").open("a") as file:
                    file.write(json.dumps(entry) + "\n")
            say(f"step {row['step']} changed nothing: {terms}; its samples are in {run / 'skipped.jsonl'}")
            if self.in_a_row > self.most:
                shown = ", ".join(f"{key} in {shard}" for shard, key in names[:NAMED])
                raise processes.common(
                    UserError(
                        f"{self.in_a_row} steps in a row were skipped (skip.most = {self.most}), the last is step {row['step']}: {terms};"
                        f" its samples: {shown}{' …' if len(names) > NAMED else ''} (all: {run / 'skipped.jsonl'});"
                        " lower optim.lr, set optim.clip, or go on from an earlier checkpoint with checkpoint.resume=STEP"
                    )
                )

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for key, value in self.state.items():
            value.copy_(state[key])


def blame(row: dict[str, Any]) -> str:
    """What is wrong with a skipped step's row: "ibot = nan, grad_norm = nan", or that its loss is an outlier."""
    wrong = [f"{k} = {v}" for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
    return ", ".join(wrong) or f"loss = {row['loss']:.4g} is far above the losses before it (skip.sigma)"


def samples_of(stream: Stream, step: int) -> list[tuple[str, str]]:
    """(shard, key) of every sample of a step's global batch."""
    (pairs,) = stream.plan.micro_batches(np.array([step]), 1, 0, 1).values()
    return [stream.samples[d].name(virtual % len(stream.samples[d])) for d, virtual in pairs]
