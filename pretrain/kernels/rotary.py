"""Rotary positions of queries and keys in one kernel. Eager PyTorch uses about ten kernels, with copies in fp32 between
them."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.models.layers import Rotary, Rotation

_compiled = torch.compile(Rotary().forward, dynamic=True)


class CompiledRotary(Rotary):
    """Compiled by inductor, forward and backward, for any number of tokens."""

    def forward(self, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        return _compiled(q, k, rotation)


def trial(device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference between compiled and plain rotation on a small example, outputs and gradients."""
    draw = torch.Generator(device).manual_seed(0)
    q, k = (torch.randn(40, 2, 64, generator=draw, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    angles = torch.randn(40, 1, 32, generator=draw, device=device)
    results = []
    for module in (Rotary(), CompiledRotary()):
        out = torch.cat(module(q, k, (angles.cos(), angles.sin())))
        results.append([out, *torch.autograd.grad(out, [q, k], torch.ones_like(out))])
    return max(float((one - other).abs().max()) for one, other in zip(*results, strict=True))
