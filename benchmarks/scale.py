"""The cost of 1.7 billion samples in 170,000 shards for one of 2,048 ranks: time to start and to resume, memory, and
CPU time per sample.

The manifest is complete and is read over HTTP, but the shards do not exist. Each figure is measured in a new process
that does what a rank does. A second part computes the load of the store and the memory of a node from the plan.
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from data_pipeline.order.schedule import Phase
from data_pipeline.shards.dataset import make_plan
from data_pipeline.shards.manifest import Manifest, dataset_id, render_manifest
from data_pipeline.shards.samples import Samples

SHARDS, SAMPLES_PER_SHARD, SAMPLE_BYTES = 170_000, 10_000, 75_000
RANKS, RANKS_PER_NODE, BATCH = 2048, 8, 65_536


def write_manifest(folder: Path) -> None:
    """Write the manifest.json of shards that do not exist."""
    rng = np.random.default_rng(0)
    names = [f"part-{n // 1000:03d}/{n:06d}.tar" for n in range(SHARDS)]
    counts = SAMPLES_PER_SHARD + rng.integers(-500, 501, SHARDS)
    hashes = [f"{value:032x}" for value in rng.integers(0, 2**63, SHARDS).tolist()]
    columns = (names, (counts * SAMPLE_BYTES).tolist(), counts.tolist(), hashes)
    manifest = Manifest.of_shards(
        list(zip(*columns, strict=True)),
        ["jpg"],
        {"source": "paper"},
        folder=str(folder),
        index="index.bin",
        index_hash="0" * 32,
        id=dataset_id(*columns),
    )
    (folder / "manifest.json").write_text(render_manifest(manifest))


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def rank(url: str, step: int) -> dict[str, float]:
    """Figures of one rank that starts at a step and computes the samples of many steps. Call it in a new process."""
    samples = Samples([url])
    plan = make_plan([samples], [Phase(0, BATCH)], 0, True)
    plan.slots_of_steps(step, 1, 1234, RANKS)
    started = time.time() - psutil.Process().create_time()  # includes the start of Python and all imports
    cpu = time.process_time()
    drawn = 0
    for k in range(8):
        _, slots = plan.slots_of_steps(step + 128 * k, 128, 1234, RANKS)
        drawn += len(slots.global_index)
    state = {"step": step, "data": samples.id[:8], "order": plan.constants()}
    return {
        "startup_seconds": started,
        "us_per_sample": 1e6 * (time.process_time() - cpu) / drawn,
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "state_bytes": len(json.dumps(state)),
    }


def cluster(url: str, steps: int = 64) -> dict[str, float]:
    """Requests per second in total and for the busiest prefix of the store, and memory of a node, at 2 steps per
    second."""
    samples = Samples([url])
    plan = make_plan([samples], [Phase(0, BATCH)], 0, True)
    order = plan.orders[0]
    ranks = range(0, RANKS, 32)
    chunks, prefixes = 0, Counter()

    def chunks_of(step: int, rank: int) -> np.ndarray:
        _, slots = plan.slots_of_steps(step, steps, rank, RANKS)
        return np.unique(slots.global_index // order.chunk)

    for rank in ranks:
        new = np.setdiff1d(chunks_of(1_000_000, rank), chunks_of(1_000_000 - steps, rank))  # chunks that are requested
        chunks += len(new)
        for number in new.tolist():
            prefixes[samples.locate(number * order.chunk % len(samples))[0] // 1000] += 1
    share = len(ranks) / RANKS
    requests = chunks / share / steps * 2  # per second
    lanes_per_node = RANKS_PER_NODE * max(1.0, plan.lanes / RANKS)
    return {
        "requests_per_second": requests,
        "busiest_prefix_requests_per_second": max(prefixes.values()) / share / steps * 2,
        "read_amplification": chunks / share * order.chunk / (steps * BATCH),
        "node_ram_gb": lanes_per_node * order.block * order.chunk * SAMPLE_BYTES / 1e9,
    }


def emit(key: str, value: float, unit: str, versus: str) -> None:
    print(json.dumps({"name": f"scale.{key}", "value": round(value, 3), "unit": unit, "versus": versus}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", nargs=2, metavar=("URL", "STEP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        print(json.dumps(rank(args.rank[0], int(args.rank[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder))
        handler = partial(QuietHandler, directory=folder)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        runs = []
        for step in (0, 0, 3_000_000, 3_000_000, 0):
            command = [sys.executable, __file__, "--rank", url, str(step)]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            runs.append(json.loads(done.stdout.splitlines()[-1]))
        units = {"startup_seconds": "s", "rss_mb": "MB", "us_per_sample": "µs of CPU", "state_bytes": "bytes"}
        for key, unit in units.items():
            values = [run[key] for run in runs]
            value = float(np.median(values[:2] + values[4:])) if key == "startup_seconds" else max(values)
            emit(key, value, unit, "one of 2,048 ranks")
        resume = float(np.median([run["startup_seconds"] for run in runs[2:4]]))
        emit("resume_seconds", resume, "s", "step 3,000,000")
        for key, value in cluster(url).items():
            emit(key, value, "simulated", "2 steps/s of 65,536")


if __name__ == "__main__":
    main()
