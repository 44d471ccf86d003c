"""Dynamic loss scaling for fp16 (arXiv 1710.03740 §3.2). It is computed on the device, so it needs no host sync."""

from __future__ import annotations

import torch
from torch import Tensor

INITIAL_FACTOR = 2.0**14
GROWTH_STEPS = 2000  # steps without an overflow after which the factor is doubled


class LossScale:
    """Multiplies the loss by a factor before backward, and divides the gradients by it afterwards, so that small
    gradients do not underflow in fp16. The factor is halved when gradients overflow, and doubled after GROWTH_STEPS
    steps without an overflow. If `on` is False, nothing is scaled."""

    def __init__(self, device: torch.device, on: bool):
        self.on = on
        self.factor = torch.full((1,), INITIAL_FACTOR, device=device)
        self.good = torch.zeros(1, dtype=torch.int32, device=device)  # steps since the last overflow or growth

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss multiplied by the factor."""
        return loss * self.factor[0] if self.on else loss

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide the gradients by the factor, in place."""
        if self.on:  # `to`: with offload, the gradients are on the CPU
            torch._foreach_mul_(gradients, self.factor[0].reciprocal().to(gradients[0].device))

    def adapt(self, norm: Tensor) -> None:
        """Update the factor after a step whose global gradient norm was `norm`. The factor remains equal on all ranks,
        because the norm is."""
        if self.on:
            self.before = {key: value.clone() for key, value in self.state_dict().items()}
            overflow = 1.0 - norm.isfinite().float().view(1)
            torch._amp_update_scale_(self.factor, self.good, overflow, 2.0, 0.5, GROWTH_STEPS)

    def undo(self) -> None:
        """Restore the state from before the last call of `adapt`."""
        if self.on:
            self.load_state_dict(self.before)

    def state_dict(self) -> dict[str, Tensor]:
        return {"factor": self.factor, "good": self.good}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.factor.copy_(state["factor"])
        self.good.copy_(state["good"])
