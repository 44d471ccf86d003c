"""How often a store would send each chunk if every data worker read it from the store, without a prefetch server.

The figures are computed from the plan, so they are exact and need no store: a data set of the size of ImageNet-1k, one
trainer process, and W data workers that make its batches in turn (`data_pipeline/stream/worker.py`).

    byte_path.W_workers.held       how often a chunk is read if each worker keeps its chunks until their last use
    byte_path.W_workers.bounded    the same if all workers together keep the 512 MB of chunks that they used last

The prefetch server reads a chunk once, so these are also the ratios of requests and of bytes. A chunk has 16 samples: a
worker that reads sample by sample sends 16 requests instead of one, and each byte is sent once.
`docs/negative_results.md` has measurements with a store.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.stream import emit
from data_pipeline.order.schedule import Phase, Plan

COUNT, BATCH, SAMPLE_BYTES, KEPT_MB = 1_281_167, 1024, 110_000, 512
BLOCKS = 3  # blocks of each lane; chunks that are used only in part, at the beginning and at the end, are not counted


def reads_per_chunk(chunks: list[np.ndarray], workers: int, capacity: int | None) -> float:
    """How often a chunk is read, on average, by `workers` that make the batches in turn. `chunks`: [batch] for each
    step.

    `capacity`: the number of chunks that each worker keeps, the most recently used ones; None: all, until their last
    use.
    """
    kept: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(workers)]
    reads, uses = Counter[int](), Counter[int]()
    for step, numbers in enumerate(chunks):
        of_worker = kept[step % workers]
        for number in numbers.tolist():
            uses[number] += 1
            if number not in of_worker:
                reads[number] += 1
            of_worker[number] = None
            of_worker.move_to_end(number)
            if capacity is not None and len(of_worker) > capacity:
                of_worker.popitem(last=False)
    completely_used = [number for number, count in uses.items() if count == max(uses.values())]
    return sum(reads[number] for number in completely_used) / len(completely_used)


def main() -> None:
    plan = Plan([COUNT], [Phase(0, BATCH)], sample_bytes=[SAMPLE_BYTES])
    order = plan.orders[0]
    steps = BLOCKS * order.block * order.chunk * plan.lanes // BATCH
    chunks = [plan.slots(step, 0, BATCH).global_index // order.chunk for step in range(steps)]
    kept_chunks = KEPT_MB * 2**20 // (order.chunk * SAMPLE_BYTES)
    for workers in (1, 2, 4, 8):
        for name, capacity in (("held", None), ("bounded", kept_chunks // workers)):
            value = reads_per_chunk(chunks, workers, capacity)
            emit(f"byte_path.{workers}_workers.{name}", value, "reads of a chunk", "prefetch server: 1")


if __name__ == "__main__":
    main()
