"""Train heads on the frozen features of an encoder that runs in every step: for probes whose features are too large to
be stored, and that see augmented images.

Everything is a function of the step: the samples and their augmentation, the learning rate, and dropout. The state is
saved from time to time, so a probe that was interrupted continues, with the same result. Memory: the heads, one batch,
and the next one, which threads read in the meantime.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from common.config import Section, to_dict
from common.errors import Damaged, DataError
from data_pipeline.shards.samples import Samples
from data_pipeline.storage.urls import cache_folder
from data_pipeline.views.augmentations import Rng, generators
from eval.feature_cache import read_batches
from eval.feature_files import write_whole
from eval.features import Encoder

SAVE_STEPS = 500  # steps between two states
FOLDER = "probes"  # of the states, in the cache of features


class Order:
    """The order in which samples are read for training: a random permutation of them for each epoch.

    `order(position)` is the number of the sample, for positions 0, 1, 2, ….
    """

    def __init__(self, numbers: Sequence[int] | np.ndarray, seed: int):
        self.numbers, self.seed = np.asarray(numbers), seed
        self._epoch: tuple[int, np.ndarray] = (-1, self.numbers)

    def __call__(self, position: int) -> int:
        number, at = divmod(position, len(self.numbers))
        epoch, permuted = self._epoch
        if epoch != number:
            permuted = np.random.default_rng([self.seed, number]).permutation(self.numbers)
            self._epoch = number, permuted
        return int(permuted[at])


def batches(
    read: Callable[[int, Rng], Any], order: Order, batch: int, first: int, steps: int
) -> Iterator[tuple[int, list[Any]]]:
    """(step, what `read(number, rng)` returns for each of its samples) for the steps from `first`. `rng`: the random
    generators of this sample in this epoch. A damaged sample is left out of its batch."""

    def prepare(position: int) -> Any:
        try:
            return read(order(position), generators((order.seed, position)))
        except Damaged as reason:
            return reason

    for positions, found in read_batches(prepare, range(first * batch, steps * batch), batch):
        usable = [one for one in found if not isinstance(one, Damaged)]
        if not usable:
            raise DataError(f"none of the {batch} samples of a batch can be read: {found[0]}")
        yield positions[0] // batch, usable


def train(
    heads: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batches_from: Callable[[int], Iterator[tuple[int, list[Any]]]],
    schedule: Callable[[int], None],
    loss: Callable[[int, list[Any]], Tensor],
    state: Path | None = None,
    max_norm: float = math.inf,
) -> None:
    """Train heads for a number of steps, from the state that an interrupted call has left, if there is one.

    `batches_from(step)` yields (step, samples); `schedule(step)` sets the options of the optimizer for a step;
    `loss(step, samples)` is the loss, whose gradients are clipped to `max_norm`.
    """
    first = _restore(heads, optimizer, state)
    heads.train()
    for step, samples in batches_from(first):
        schedule(step)
        optimizer.zero_grad(set_to_none=True)
        loss(step, samples).backward()
        if math.isfinite(max_norm):
            nn.utils.clip_grad_norm_(heads.parameters(), max_norm)
        optimizer.step()
        if state is not None and (step + 1) % SAVE_STEPS == 0 and step + 1 < steps:
            _save(heads, optimizer, step + 1, state)
    heads.eval()
    if state is not None:
        state.unlink(missing_ok=True)


def _save(heads: nn.Module, optimizer: torch.optim.Optimizer, step: int, path: Path) -> None:
    file = io.BytesIO()
    torch.save({"step": step, "heads": heads.state_dict(), "optimizer": optimizer.state_dict()}, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, file.getbuffer())


def _restore(heads: nn.Module, optimizer: torch.optim.Optimizer, path: Path | None) -> int:
    """Load a state, and return its step; 0 if there is none."""
    if path is None or not path.is_file():
        return 0
    saved = torch.load(path, map_location="cpu", weights_only=True)
    heads.load_state_dict(saved["heads"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


def state_path(encoder: Encoder, samples: Samples, protocol: str, version: int, cfg: Section) -> Path:
    """The file for the state of a probe: in the cache of features, under a hash of all that determines the result."""
    folder = encoder.cache or cache_folder("features")
    text = f"{protocol} {version} {samples.id} {encoder.fingerprint(samples)} {to_dict(cfg)}"
    return Path(folder) / FOLDER / f"{xxhash.xxh3_128_hexdigest(text.encode())}.pt"


def cosine(step: int, steps: int, warmup: int = 0, start: float = 0.0) -> float:
    """The factor of a learning rate: it rises linearly from `start` to 1 in `warmup` steps, and then falls to 0 along a
    cosine."""
    if step < warmup:
        return start + (1 - start) * step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def tokens_of(
    encoder: Encoder, images: np.ndarray, layers: int = 1, class_token: bool = False
) -> tuple[Tensor, tuple[int, ...]]:
    """(patch features [B, N, layers · D] in fp32 on the device, their grid) of images [B, C, H, W], as tensors
    that a head can be trained on. With `class_token`, the class tokens of the same layers follow the features of each
    patch: [B, N, 2 · layers · D]."""
    placed = encoder.part.place(torch.from_numpy(images), encoder.device)
    with torch.inference_mode():
        features = encoder.backbone(placed, layers=layers) if layers > 1 else encoder.backbone(placed)
        tokens = features.tokens.float()
        if class_token:
            cls = features.cls.float().unsqueeze(1).expand(-1, tokens.shape[1], -1)  # [B, N, layers · D]
            tokens = torch.cat([tokens, cls], dim=2)
    return tokens.clone(), tuple(features.grid)  # an inference tensor takes no part in autograd


def dropped_channels(shape: tuple[int, int], rate: float, seed: tuple[int, int], device: torch.device) -> Tensor:
    """The factors [B, D, 1, 1] of dropout of whole channels (dropout2d): 0 with probability `rate`, else 1 / (1 − rate).
    `seed`: (seed, step)."""
    keep = np.random.default_rng(seed).random(shape) >= rate
    return torch.from_numpy((keep / (1 - rate)).astype(np.float32))[..., None, None].to(device)
