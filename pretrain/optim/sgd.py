"""SGD with momentum, as in MoCo (arXiv 1911.05722), RotNet (arXiv 1803.07728) and DINO with a ResNet-50 (arXiv
2104.14294): that of PyTorch, whose weight decay is part of the gradient.

    u = g + wd·w;   v ← μ v + u;   w ← w − lr·v;   with `optim.nesterov`:  w ← w − lr·(u + μ v)

g is the gradient, wd the weight decay, μ the momentum. Published recipes often decay all parameters; here biases and
norms have no weight decay, as with the other optimizers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pretrain.ops.parameter_shards import local
from pretrain.optim.skippable_optimizer import Skippable
from pretrain.recipes.sections import Optim


class SGD(Skippable):
    state_names = ("momentum_buffer",)

    def __init__(self, groups: list[dict[str, Any]], momentum: float, nesterov: bool):
        self.momentum, self.nesterov = momentum, nesterov
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(self.begin(p))
                weight, velocity = local(p), local(state["momentum_buffer"])
                update = local(p.grad).add(weight, alpha=group["weight_decay"])
                new_velocity = self.momentum * velocity + update
                change = group["lr"] * (update + self.momentum * new_velocity if self.nesterov else new_velocity)
                if self.found_inf is not None:
                    skip = self.found_inf.to(weight.device) > 0
                    new_velocity = torch.where(skip, velocity, new_velocity)
                    change = torch.where(skip, 0.0, change)
                velocity.copy_(new_velocity)
                weight.sub_(change)


def build(groups: list[dict[str, Any]], cfg: Optim) -> SGD:
    return SGD(groups, cfg.momentum, cfg.nesterov)
