"""Stream: an endless iterator of batches whose whole state is the number of the next step.

Data workers compute batch after batch: `Order` says which samples, the objective's views make arrays of them. Batch s comes out the same on any
number of processes and workers. A damaged sample is never trained on: the next sample takes its place, and its name is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipeline.decode import Damaged
from data_pipeline.order import Order, fold
from data_pipeline.shards import Samples
from data_pipeline.storage import DataError

Views = Callable[[dict[str, Any], np.random.Generator], dict[str, np.ndarray]]
TRIES = 64  # damaged samples in a row before the data is given up


class _Batches(Dataset):
    """Item i is micro-batch i of the run, of this process: i = step · accumulate + micro."""

    def __init__(self, samples: Samples, order: Order, views: Views, rank: int, world: int, accumulate: int):
        self.samples, self.order, self.views = samples, order, views
        self.rank, self.world, self.accumulate = rank, world, accumulate

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, micro = divmod(index, self.accumulate)
        size = self.order.batch // (self.world * self.accumulate)
        first = (self.rank * self.accumulate + micro) * size
        ids, epochs = self.order.slots(step, first, first + size)
        bad: list[tuple[str, str, str]] = []
        parts = [
            self._sample(int(i), int(e), step, first + n, bad) for n, (i, e) in enumerate(zip(ids, epochs, strict=True))
        ]
        batch: dict[str, Any] = {key: torch.from_numpy(np.stack([part[key] for part in parts])) for key in parts[0]}
        return batch | {"bad": bad}

    def _sample(self, number: int, epoch: int, step: int, slot: int, bad: list) -> dict[str, Any]:
        for _ in range(TRIES):
            try:
                image = self.samples.image(number)
                break
            except Damaged as reason:
                bad.append((*self.samples.name(number), str(reason)))
                number = (number + 1) % len(self.samples)
        else:
            raise DataError(
                f"{self.samples.names}: {TRIES} damaged samples in a row, the last {bad[-1][1]} of {bad[-1][0]}: {bad[-1][2]}"
            )
        sample = {"image": image, "id": number, "epoch": epoch, "slot": slot, "batch": self.order.batch, "step": step}
        sample["seed"] = self.order.seed
        rng = np.random.Generator(np.random.Philox(key=[fold(self.order.seed, epoch), number]))
        return {"id": np.int64(number), **self.views(sample, rng)}


def _start_worker(_: int) -> None:
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def default_workers(processes: int = 1) -> int:
    """Data workers per trainer process: half of the cores it has for itself, at least one, at most eight."""
    return min(8, max(1, (os.cpu_count() or 1) // processes // 2))


class Stream:
    """Batches for one of `world` processes, from step `state_dict()["step"]` on. `batch` is global; each step gives `accumulate` micro-batches."""

    def __init__(
        self,
        samples: Samples,
        views: Views,
        batch: int,
        seed: int = 0,
        shuffle: bool = True,
        workers: int = 1,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ):
        if batch > len(samples):
            raise DataError(
                f"data.batch = {batch} is more than the {len(samples)} samples in {samples.names}; write data.batch={len(samples)} or less"
            )
        if batch % (world * accumulate):
            raise DataError(f"data.batch = {batch} does not divide into {world} processes × {accumulate} micro-batches")
        self.order = Order(len(samples), batch, seed, shuffle)
        self.batches = _Batches(samples, self.order, views, rank, world, accumulate)
        self.workers, self.accumulate, self.micro = workers, accumulate, 0
        self.bad: dict[tuple[str, str], str] = {}  # (shard, key) -> reason, of every damaged sample met
        self._unreported: list[tuple[str, str, str]] = []
        self._iterator: Iterator | None = None

    def first(self) -> dict[str, Tensor]:
        """Micro-batch 0 of the run, made here and now, whatever the position."""
        batch = self.batches[0]
        batch.pop("bad")
        return batch

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> dict[str, Tensor]:
        if self._iterator is None:
            loader = DataLoader(
                self.batches,
                batch_size=None,
                sampler=range(self.micro, 1 << 62),  # type: ignore[arg-type]
                num_workers=self.workers,
                worker_init_fn=_start_worker,
                prefetch_factor=4 if self.workers else None,
                pin_memory=torch.cuda.is_available(),
            )
            self._iterator = iter(loader)
        batch = next(self._iterator)
        self.micro += 1
        for shard, key, reason in batch.pop("bad"):
            if (shard, key) not in self.bad:
                self.bad[shard, key] = reason
                self._unreported.append((shard, key, reason))
        return batch

    def new_bad(self) -> list[tuple[str, str, str]]:
        """(shard, key, reason) of the damaged samples met since the last call."""
        new, self._unreported = self._unreported, []
        return new

    @property
    def epoch(self) -> float:
        """How many times the data has been gone through."""
        return self.micro // self.accumulate * self.order.batch / self.order.count

    def state_dict(self) -> dict[str, int]:
        return {"step": self.micro // self.accumulate, "samples": self.order.count, "seed": self.order.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a step. Other data or another seed than the state's would give other batches, so they are refused."""
        own = self.state_dict()
        for key in ("samples", "seed"):
            if state[key] != own[key]:
                raise DataError(
                    f"the checkpoint was written with {key} = {state[key]}, but this run has {key} = {own[key]}: it cannot go on exactly"
                )
        self.micro, self._iterator = state["step"] * self.accumulate, None


def to_device(batch: dict[str, Tensor], device: torch.device, mean: list[float], std: list[float]) -> dict[str, Tensor]:
    """The batch on the device, uint8 images [..., C, H, W] as floats (x / 255 − mean) / std."""
    out = {}
    for key, value in batch.items():
        value = value.to(device, non_blocking=True)
        if value.dtype == torch.uint8:
            offset = torch.tensor(mean, device=device).view(-1, 1, 1) * 255
            value = (value - offset) / (torch.tensor(std, device=device).view(-1, 1, 1) * 255)
        out[key] = value
    return out
