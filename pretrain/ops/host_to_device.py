"""Copies from the host to the device without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a host tensor on the device. On a GPU it goes through pinned memory, so that the host does not wait.

    For values that the host computes in every step. Constants should be created once and kept on the device.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
