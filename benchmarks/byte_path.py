"""What the store would have to send if each data worker fetched for itself, without a prefetch server.

Computed from the plan alone, so it is exact and needs no store: a data set of the size of ImageNet-1k, one trainer
process, W data workers that take turns at its batches (`data_pipeline/stream/worker.py`).

    byte_path.W_workers.held       how often a chunk is fetched if each worker holds its chunks until their last use
    byte_path.W_workers.bounded    the same if all workers together hold the 512 MB of chunks that they used last

Through the prefetch server a chunk is fetched once, so these are also the ratios of requests and of bytes. A chunk has
16 samples: a worker that fetches sample by sample sends 16 requests in place of one, and each byte is sent once.
`docs/negative_results.md` has what was measured with a store.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.stream import emit
from data_pipeline.order.schedule import Phase, Plan

COUNT, BATCH, SAMPLE_BYTES, HELD_MB = 1_281_167, 1024, 110_000, 512
BLOCKS = 3  # of each lane; chunks that are read in part at the beginning or at the end are left out


def fetches(chunks: list[np.ndarray], workers: int, room: int | None) -> float:
    """How often a chunk is fetched, on average, by `workers` that take turns at the steps' `chunks` [batch].

    `room`: chunks that each worker holds, the most recently used ones; None: all, until their last use.
    """
    held: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(workers)]
    fetched, used = dict[int, int](), dict[int, int]()
    for step, numbers in enumerate(chunks):
        own = held[step % workers]
        for number in numbers.tolist():
            used[number] = used.get(number, 0) + 1
            if number not in own:
                fetched[number] = fetched.get(number, 0) + 1
            own[number] = None
            own.move_to_end(number)
            if room is not None and len(own) > room:
                own.popitem(last=False)
    whole = [number for number, uses in used.items() if uses == max(used.values())]
    return sum(fetched[number] for number in whole) / len(whole)


def main() -> None:
    plan = Plan([COUNT], [Phase(0, BATCH)], sample_bytes=[SAMPLE_BYTES])
    order = plan.orders[0]
    steps = BLOCKS * order.block * order.chunk * plan.lanes // BATCH
    chunks = [plan.slots(step, 0, BATCH).global_index // order.chunk for step in range(steps)]
    in_all = HELD_MB * 2**20 // (order.chunk * SAMPLE_BYTES)
    for workers in (1, 2, 4, 8):
        for name, room in (("held", None), ("bounded", in_all // workers)):
            value = fetches(chunks, workers, room)
            emit(f"byte_path.{workers}_workers.{name}", value, "fetches of a chunk", "prefetch server: 1")


if __name__ == "__main__":
    main()
