"""Optimizer and parameter groups."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pretrain.recipe import Optim


def decays(name: str, parameter: Tensor) -> bool:
    """Weight decay falls on matrices and kernels: not on vectors (biases, norms, scales), tokens and position tables."""
    return parameter.ndim > 1 and not name.endswith(("_token", "registers", "pos_embed"))


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]]) -> list[dict]:
    """Two groups with the factors by which the step's lr and weight decay are multiplied; frozen parameters are left out."""
    groups: dict[bool, list] = {True: [], False: []}
    for name, parameter in named:
        if parameter.requires_grad:
            groups[decays(name, parameter)].append(parameter)
    return [{"params": p, "lr_scale": 1.0, "wd_scale": float(decay)} for decay, p in groups.items() if p]


def make_optimizer(module: nn.Module, cfg: Optim) -> torch.optim.Optimizer:
    """Fused AdamW; `Engine.step` sets lr and weight decay each step."""
    groups = parameter_groups(module.named_parameters())
    return torch.optim.AdamW(groups, lr=0.0, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
