"""LARS (arXiv 1708.03888) as used by SimCLR (arXiv 2002.05709) and BYOL (arXiv 2006.07733): SGD with momentum and a
learning rate that is adapted to each tensor.

    u = g + wd·w;   λ = trust · ‖w‖ / ‖u‖, or 1 where either norm is 0;   v ← μ v + lr·λ·u;   w ← w − v

g is the gradient, wd the weight decay, μ the momentum, and w and u are whole tensors. Parameters without weight decay
(biases and norms; tokens and position tables unless `optim.decay_tokens` is true) have λ = 1. Published values for a ResNet-50: SimCLR has lr = 0.3 · batch /
256, momentum 0.9, weight decay 1e-6 and trust 0.001; BYOL has lr = 0.2 · batch / 256 and weight decay 1.5e-6. Both have
10 epochs of warm-up, followed by a cosine decay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from pretrain.ops.parameter_shards import local
from pretrain.optim.skippable_optimizer import Skippable
from pretrain.recipes.sections import Optim


class LARS(Skippable):
    """LARS with norms of full tensors. With FSDP2, one all-reduce per step sums the squared norms of the shards."""

    state_names = ("momentum_buffer",)
    unsupported = {"zero": "LARS needs the norm of each tensor, and DeepSpeed flattens the tensors"}

    def __init__(self, groups: list[dict[str, Any]], momentum: float, trust: float):
        self.momentum, self.trust = momentum, trust
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        trained = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        adapted = [(p, group) for p, group in trained if group["wd_scale"]]
        ratios = dict(zip([p for p, _ in adapted], self._trust_ratios(adapted), strict=True)) if adapted else {}
        for p, group in trained:
            state = self.state[p]
            if not state:
                state.update(self.begin(p))
            weight, velocity = local(p), local(state["momentum_buffer"])
            new_velocity = self.momentum * velocity + (group["lr"] * ratios.get(p, 1.0)) * _update(p, group)
            if self.found_inf is None:
                weight.sub_(velocity.copy_(new_velocity))
            else:
                skip = self.found_inf.to(weight.device) > 0
                velocity.copy_(torch.where(skip, velocity, new_velocity))
                weight.sub_(torch.where(skip, 0.0, new_velocity))

    def _trust_ratios(self, adapted: list[tuple[Tensor, dict[str, Any]]]) -> Tensor:
        """λ of each parameter, [n], in fp64. Collective if the parameters are sharded: every rank must call it."""
        norms = [torch.stack(torch._foreach_norm([local(p), _update(p, group)])) for p, group in adapted]
        squares = torch.stack(norms).double().square()  # [n, 2]: of the weights and of the updates
        first = adapted[0][0]
        if isinstance(first, DTensor):  # all parameters are sharded over the last dimension of the same mesh
            mesh = first.device_mesh
            dist.all_reduce(squares, group=mesh.get_group(mesh.ndim - 1))
        weight_norms, update_norms = squares.sqrt().unbind(1)
        ratios = self.trust * weight_norms / update_norms
        return torch.where((weight_norms > 0) & (update_norms > 0), ratios, 1.0)


def _update(p: Tensor, group: dict[str, Any]) -> Tensor:
    """u = g + wd·w for this rank's shard."""
    assert p.grad is not None
    return local(p.grad).add(local(p), alpha=group["weight_decay"])


def build(groups: list[dict[str, Any]], cfg: Optim) -> LARS:
    return LARS(groups, cfg.momentum, cfg.trust)
