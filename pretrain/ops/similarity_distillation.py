"""Distillation of the similarities between samples (SEED, arXiv 2101.04731). The features of student and teacher may
have different widths, without a head between them."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.ops.gather import gather, world
from pretrain.ops.precision import unit


def relation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over this rank's rows i of KL(p_i ‖ q_i), in fp32 or wider.

    p_i and q_i are the teacher's and the student's softmax over cosine similarities / temperature of row i with all
    other rows of all ranks. student [R, D], teacher [R, D'] are features of the same R crops of this rank. Gradients
    also flow to the rows of other ranks.
    """

    def log_softmax(x: Tensor) -> Tensor:
        x = unit(x)
        all_rows, first = gather(x), len(x) * world()[0]
        # without autocast: bf16 would round similarities to 1/256, before the temperature
        with torch.autocast(x.device.type, enabled=False):
            logits = x @ all_rows.T / temperature  # [R, W·R]
        own_column = torch.arange(first, first + len(x), device=x.device).unsqueeze(1)  # [R, 1]
        columns = torch.arange(len(all_rows) - 1, device=x.device)
        columns = columns + (columns >= own_column)  # [R, W·R − 1]: all columns but that of the row itself
        return logits.gather(1, columns).log_softmax(1)

    with torch.no_grad():
        target = log_softmax(teacher)
    return (target.exp() * (target - log_softmax(student))).sum(1).mean()
