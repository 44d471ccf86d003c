"""Random numbers that do not depend on how many numbers other code has drawn."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def named_generator(name: str) -> Iterator[None]:
    """Within the context, torch's generators are seeded from the seed that was set last and `name`. After the context
    their states are restored."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    seed = torch.initial_seed()
    with torch.random.fork_rng(devices):
        torch.manual_seed((seed ^ (zlib.crc32(name.encode()) << 20)) & (2**63 - 1))
        yield
