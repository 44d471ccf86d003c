"""Copies from the host to the device for which the host does not wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor on the host; on a GPU by way of pinned memory, so that the host goes on at once.

    For what is drawn on the host in every step. Make constants once, and keep them on the device.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
