"""Muon (K. Jordan 2024; arXiv 2502.16982): momentum, orthogonalised, for the matrices inside of blocks; AdamW for all that is not one.

    b ← μ b + (1 − μ) g;   u = (1 − μ) g + μ b;   w ← (1 − lr·wd) w − lr · 0.2 √max(r, c) · NS(u)        for w [r, c]

NS brings all singular values of u near 1. With that scale an update is about as long as AdamW's, so both share learning rate and weight decay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pretrain.parallel.shards import local

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """U S' Vᵀ for matrices [..., r, c] = U S Vᵀ, with S' between about 0.7 and 1.2: Newton-Schulz, in the matrices' own precision."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups with `muon: true`, fused AdamW for the others, in one optimizer.

    Such a group has one `parts`, rows (r₁, r₂, …): its parameters are matrices that stand one above the other (queries, keys, values), each of which is
    orthogonalised by itself; () for a single one. A matrix that FSDP2 has cut is gathered once a step, in the precision of the iteration: bf16 on a
    GPU; on a CPU fp32, which is faster there. Every process computes all of them.
    """

    def __init__(self, groups: list[dict], momentum: float, betas: tuple[float, float], eps: float):
        self.momentum = momentum
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None  # 1.0: this step changes nothing
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        rest = [g for g in self.param_groups if not g["muon"]]
        self.adamw = torch.optim.AdamW(rest, lr=0.0, betas=betas, eps=eps, fused=True) if rest else None

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        if self.adamw is not None:  # a loaded state brings other dictionaries
            self.adamw.param_groups = [g for g in self.param_groups if not g["muon"]]
            self.adamw.state = self.state
            self.adamw.grad_scale, self.adamw.found_inf = self.grad_scale, self.found_inf  # type: ignore[attr-defined]
            self.adamw.step()
        for group in self.param_groups:
            for p in group["params"] if group["muon"] else ():
                if p.grad is not None:
                    self._update(p, p.grad, group, self.state[p])

    def _update(self, p: Tensor, gradient: Tensor, group: dict, state: dict[str, Any]) -> None:
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        weight, g, buffer = local(p), local(gradient), local(state["momentum_buffer"])
        go: Tensor | float = 1.0
        if self.found_inf is not None:
            go = 1.0 - self.found_inf.to(g.device)
            g = torch.where(go > 0, g, 0.0)
        buffer.lerp_(g, torch.as_tensor((1 - self.momentum) * go, dtype=g.dtype, device=g.device))
        update = g.lerp(buffer, self.momentum).to(torch.bfloat16 if g.device.type == "cuda" else g.dtype)
        if isinstance(p, DTensor):
            update = _rows(_orthogonal_parts(_gathered(update, p), group["parts"]), p)
        else:
            update = _orthogonal_parts(update, group["parts"])
        weight.mul_(1 - group["lr"] * group["weight_decay"] * go)
        weight.add_(update.to(weight.dtype) * (-group["lr"] * go))


def _orthogonal_parts(update: Tensor, parts: tuple[int, ...]) -> Tensor:
    """Each of the matrices that are stacked in `update` [r, c] orthogonalised and scaled."""
    return torch.cat(
        [orthogonalise(m) * (0.2 * max(m.shape) ** 0.5) for m in update.split(list(parts) or [len(update)])]
    )


def _gathered(piece: Tensor, like: DTensor) -> Tensor:
    """The whole matrix from this process's rows of it."""
    cut = DTensor.from_local(
        piece, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return cut.full_tensor()


def _rows(matrix: Tensor, like: DTensor) -> Tensor:
    """This process's rows of a whole matrix, as FSDP2 cuts it among the last dimension of its mesh."""
    mesh = like.device_mesh
    pieces = matrix.chunk(mesh.size(mesh.ndim - 1))
    own = mesh.get_local_rank(mesh.ndim - 1)
    return pieces[own] if own < len(pieces) else matrix[:0]
