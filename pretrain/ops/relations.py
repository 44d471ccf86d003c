"""Distillation of how samples relate to each other, which needs no head between student and teacher (SEED, arXiv 2101.04731)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.gather import gather, world


def relation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence from the teacher's to the student's softmax over a row's cosine similarities / temperature with all other rows, mean over own rows.

    student [R, D], teacher [R, D'] of the same R crops on this process; each is compared with the crops of all processes, and gradients flow to theirs.
    In fp32 or wider.
    """

    def log_softmax(x: Tensor) -> Tensor:
        x = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
        everyone, first = gather(x), len(x) * world()[0]
        with torch.autocast(
            x.device.type, enabled=False
        ):  # bf16 would round similarities to 1/256, before the temperature
            logits = x @ everyone.T / temperature  # [R, W·R]
        own = torch.arange(first, first + len(x), device=x.device).unsqueeze(1)
        others = torch.arange(len(everyone), device=x.device) != own
        return logits[others].view(len(x), -1).log_softmax(1)

    with torch.no_grad():
        target = log_softmax(teacher)
    return (target.exp() * (target - log_softmax(student))).sum(1).mean()
