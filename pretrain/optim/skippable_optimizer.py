"""The base class of every optimizer: a scalar on the device decides whether its step is skipped, so that there is no
host sync."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor


class Skippable(torch.optim.Optimizer):
    """The interface that engines, checkpoints and plans need in addition to `step`.

    `found_inf` is None, or a scalar on the device that is set before each step. If it is 1.0, `step` changes no bit of
    parameters and state, even if gradients are not finite. If it is 0.0, `step` updates them as usual.

    The state of a parameter holds the tensors named in `state_names`, which have the parameter's shape and are sharded
    like it (`torch.zeros_like` of a DTensor is a DTensor). All other entries are scalars that are equal for all
    parameters, such as a step count.

    A group's `lr` and `weight_decay` are set before each step. Groups also have `wd_scale`, 0 for parameters without
    weight decay: biases, norms and, by default, tokens and position tables.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    # Keys: "zero" (DeepSpeed's flat tensors) and "offload"; values: the reason why the optimizer cannot be used with it
    unsupported: ClassVar[dict[str, str]] = {}
    found_inf: Tensor | None = None
    # torch's fused optimizers read this attribute if `found_inf` is set; None, as the engine unscales gradients itself
    grad_scale: Tensor | None = None

    @staticmethod
    def options(rows: tuple[int, ...] | None) -> dict[str, Any]:
        """Additional entries of a parameter's group, with hashable values. Parameters whose entries differ are put into
        different groups.

        `rows`: for the weight of a linear layer inside a block, the rows of each matrix that is stacked in it (queries,
        keys, values), or () for a single matrix; None for every other parameter.
        """
        return {}

    def begin(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        return {name: torch.zeros_like(parameter) for name in self.state_names}
