"""AdamW (arXiv 1711.05101), Adam with weight decay decoupled from the gradient: torch's fused implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.optim.skippable_optimizer import Skippable
from pretrain.recipes.sections import Optim


class AdamW(torch.optim.AdamW, Skippable):
    state_names = ("exp_avg", "exp_avg_sq")

    def begin(self, parameter: Tensor) -> dict[str, Tensor]:
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"step": step, **super().begin(parameter)}


def build(groups: list[dict[str, Any]], cfg: Optim) -> AdamW:
    return AdamW(groups, lr=0.0, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
