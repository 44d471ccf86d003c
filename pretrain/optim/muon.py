"""Muon (K. Jordan 2024; arXiv 2502.16982): orthogonalised momentum for matrices inside blocks; AdamW for all other
parameters.

    b ← μ b + (1 − μ) g;   u = (1 − μ) g + μ b;   w ← (1 − lr·wd) w − lr · 0.2 √max(r, c) · NS(u)        for w [r, c]

NS, the Newton–Schulz iteration, brings all singular values of u near 1. The factor 0.2 √max(r, c) makes an update about
as large as AdamW's, so that both use the same learning rate and weight decay.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigError
from pretrain.ops.matrix_exchange import Layout, Round, Shape, assign, rounds_of
from pretrain.ops.parameter_shards import local
from pretrain.optim.adamw import AdamW
from pretrain.optim.skippable_optimizer import Skippable
from pretrain.recipes.sections import Optim

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """U S' Vᵀ for matrices U S Vᵀ of shape [..., r, c], with singular values S' between about 0.7 and 1.2: the
    Newton–Schulz iteration in the dtype of the matrices."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix  # [..., short, long]
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT  # [..., short, short]
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class MuonAdamW(Skippable):
    """One optimizer: Muon for the groups with `muon: true`, fused AdamW for the others.

    A Muon group has `parts`, the numbers of rows (r₁, r₂, …) of the matrices that are stacked in each of its parameters
    (queries, keys, values), or () for a single matrix. Each matrix is orthogonalised separately. The matrices are
    distributed over the ranks, stacked by shape, and sent in the dtype of the iteration: bf16 on a GPU, and fp32 on a
    CPU, where it is faster than bf16 (`pretrain/ops/matrix_exchange.py`).
    """

    state_names = (
        "momentum_buffer",
        *AdamW.state_names,
    )  # Muon matrices have only the first, other parameters the rest
    unsupported = {
        "zero": "Muon needs whole matrices, and DeepSpeed flattens them",
        "offload": "Muon computes on the device, and offloading keeps the matrices in main memory",
    }

    def __init__(self, groups: list[dict[str, Any]], momentum: float, betas: tuple[float, float], eps: float):
        self.momentum = momentum
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        rest = [g for g in self.param_groups if not g["muon"]]
        self.adamw = AdamW(rest, lr=0.0, betas=betas, eps=eps, fused=True) if rest else None

    @staticmethod
    def options(rows: tuple[int, ...] | None) -> dict[str, Any]:
        return {"muon": False} if rows is None else {"muon": True, "parts": rows}

    def begin(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a Muon matrix before its first step."""
        return {"momentum_buffer": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        if self.adamw is not None:  # load_state_dict replaces groups and state by new dictionaries
            self.adamw.param_groups = [g for g in self.param_groups if not g["muon"]]
            self.adamw.state = self.state
            self.adamw.found_inf = self.found_inf
            self.adamw.step()
        groups = [g for g in self.param_groups if g["muon"]]
        if matrices := [(p, group) for group in groups for p in group["params"] if p.grad is not None]:
            self._update(matrices)

    def _update(self, matrices: list[tuple[Tensor, dict]]) -> None:
        """Update all Muon matrices. While a stack is orthogonalised, the next stack is sent to this rank, and the
        previous one is sent back to the other ranks. Collective."""
        shapes = [(p.shape[0], p.shape[1]) for p, _ in matrices]
        kinds = [(shape, group["parts"]) for shape, (_, group) in zip(shapes, matrices, strict=True)]
        layout = Layout.of(matrices[0][0])
        assigned = assign([_cost(*kind) for kind in kinds], layout.owners)
        sizes = [p.numel() for p, _ in matrices]
        rounds = [Round(layout, stacks, shapes) for stacks in rounds_of(assigned, kinds, sizes)]
        wait_for_stack: Callable[[], Tensor] | None = self._send(rounds[0], matrices)
        wait_for_updates: Callable[[], dict[int, Tensor]] = dict  # none before the first round has been sent back
        for round, next_round in zip_longest(rounds, rounds[1:]):
            stack = wait_for_stack()  # type: ignore[misc]
            wait_for_stack = self._send(next_round, matrices) if next_round else None
            if round.mine:
                stack = _orthogonal_parts(stack, matrices[round.mine[0]][1]["parts"])
            self._apply(wait_for_updates(), matrices)
            wait_for_updates = round.from_owners(stack)
        self._apply(wait_for_updates(), matrices)

    def _send(self, round: Round, matrices: list[tuple[Tensor, dict]]) -> Callable[[], Tensor]:
        """Update the momentum of this rank's rows of a round's matrices, and send the rows of u to their owners."""
        pieces = {}
        for index in (i for stack in round.stacks for i in stack):
            pieces[index] = self._direction(matrices[index][0])
        return round.to_owners(pieces)

    def _direction(self, p: Tensor) -> Tensor:
        """Update the momentum of this rank's rows, and return their u in the dtype of the iteration."""
        state = self.state[p]
        if not state:
            state.update(self.begin(p))
        assert p.grad is not None
        g, buffer = local(p.grad), local(state["momentum_buffer"])
        if self.found_inf is None:
            buffer.lerp_(g, 1 - self.momentum)
        else:
            is_taken = self._is_taken(g)
            g = torch.where(is_taken > 0, g, 0.0)
            buffer.lerp_(g, ((1 - self.momentum) * is_taken).to(g.dtype))
        return g.lerp(buffer, self.momentum).to(torch.bfloat16 if g.device.type == "cuda" else g.dtype)

    def _apply(self, updates: dict[int, Tensor], matrices: list[tuple[Tensor, dict]]) -> None:
        for index, update in updates.items():
            p, group = matrices[index]
            weight = local(p)
            is_taken = self._is_taken(weight)
            weight.mul_(1 - group["lr"] * group["weight_decay"] * is_taken)
            weight.add_(update.to(weight.dtype) * (-group["lr"] * is_taken))

    def _is_taken(self, like: Tensor) -> Tensor | float:
        """0.0 if this step is skipped, otherwise 1.0, on the device of `like`."""
        return 1.0 if self.found_inf is None else 1.0 - self.found_inf.to(like.device)


def _cost(shape: Shape, parts: tuple[int, ...]) -> float:
    """The number of multiplications of one Newton–Schulz step for a parameter of `shape`, in which matrices with the
    numbers of rows `parts` are stacked."""
    sides = [sorted((rows, shape[1])) for rows in parts or shape[:1]]
    return float(sum(2 * short**2 * long + short**3 for short, long in sides))


def _orthogonal_parts(stack: Tensor, parts: tuple[int, ...]) -> Tensor:
    """Orthogonalise and scale each of the matrices that are stacked along r in [n, r, c]. Matrices of equal shape are
    computed together."""
    rows = list(parts) or [stack.shape[1]]
    pieces = list(stack.split(rows, 1))  # [n, rows[k], c]
    for size in dict.fromkeys(rows):
        of_size = [k for k, piece_rows in enumerate(rows) if piece_rows == size]
        batch = torch.cat([pieces[k] for k in of_size])  # [len(of_size)·n, size, c]
        batch = orthogonalise(batch) * (0.2 * max(batch.shape[1:]) ** 0.5)
        for k, piece in zip(of_size, batch.chunk(len(of_size)), strict=True):
            pieces[k] = piece
    return torch.cat(pieces, 1)


def build(groups: list[dict[str, Any]], cfg: Optim) -> MuonAdamW:
    if not any(group["muon"] for group in groups):
        raise ConfigError("optim.name = muon: this model's blocks have no trained matrices; write optim.name=adamw")
    return MuonAdamW(groups, cfg.momentum, (cfg.beta1, cfg.beta2), cfg.eps)
