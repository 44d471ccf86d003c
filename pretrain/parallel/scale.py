"""Loss scaling for fp16 (arXiv 1710.03740 §3.2), decided on the device: the host never waits for it."""

from __future__ import annotations

import torch
from torch import Tensor

INITIAL, GROWTH_STEPS = 2.0**14, 2000


class LossScale:
    """The loss is multiplied before backward, gradients are divided after; the factor halves where they overflow, and doubles after 2000 steps without."""

    def __init__(self, device: torch.device, on: bool):
        self.on = on
        self.factor = torch.full((1,), INITIAL, device=device)
        self.good = torch.zeros(1, dtype=torch.int32, device=device)

    def up(self, loss: Tensor) -> Tensor:
        return loss * self.factor[0] if self.on else loss

    def down(self, gradients: list[Tensor]) -> None:
        if self.on:
            torch._foreach_mul_(
                gradients, self.factor[0].reciprocal().to(gradients[0].device)
            )  # offloaded ones are elsewhere

    def adapt(self, norm: Tensor) -> None:
        """After a step whose gradients had this norm: the same on all processes, as the norm is."""
        if self.on:
            overflow = 1.0 - norm.isfinite().float().view(1)
            torch._amp_update_scale_(self.factor, self.good, overflow, 2.0, 0.5, GROWTH_STEPS)

    def state_dict(self) -> dict[str, Tensor]:
        return {"factor": self.factor, "good": self.good}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.factor.copy_(state["factor"])
        self.good.copy_(state["good"])
