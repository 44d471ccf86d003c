"""The prefetch server: a process that reads remote shards ahead of time for the data workers of one trainer process.

It knows the plan of the run, so it requests whole chunks before they are needed: many requests in flight, as far ahead
as `ahead_bytes` allow. A chunk stays in memory from its first to its last use (at most lanes · block · chunk samples in
all) and is sent over one socket pair per worker. So there is no shared memory, no lock file, and nothing to clean up
when a process is killed. Workers check the hash of every sample; when it is wrong they send a REREAD request, and the
range is read from the store again, without the cache. Runs as `python -m data_pipeline.stream.prefetch_server`,
configured by one JSON line on standard input.

In this file `d` is the number of a dataset, and a place is the number of a sample in its lane (see
data_pipeline/order/schedule.py).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import operator
import os
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common import child_signals
from common.errors import DataError
from data_pipeline.order.budget import BatchBudget
from data_pipeline.order.schedule import Phase
from data_pipeline.shards.dataset import Piece, make_plan
from data_pipeline.shards.samples import Samples
from data_pipeline.shards.token_rows import Rows
from data_pipeline.storage.cache import Cache
from data_pipeline.storage.ranges import RangeReader
from data_pipeline.stream.prefetch_client import HEAD, NAME, READ, REPLY, receive

SLOTS_PER_PLANNING = 4096  # slots that are planned in one call


@dataclass
class Chunk:
    """Consecutive samples that are in memory or being read."""

    future: Future
    lane: tuple[int, int]  # (dataset, lane)
    end: int  # the first place of the lane at which the chunk is not needed any more; −1: not known yet
    first_use: int  # step
    last_use: int  # step
    bytes: int  # the expected size until the chunk is read, then the real one


@dataclass
class _Range:
    """Samples [first, first + n) of one shard: their index records, and the bytes of the shard from `begin` on."""

    first: int
    begin: int
    records: np.ndarray  # [n, columns]
    data: bytes


@dataclass
class _Progress:
    """The progress of the workers: the last step that each has requested."""

    steps: list[int]
    changed: threading.Condition = field(default_factory=threading.Condition)

    def update(self, worker: int, step: int) -> None:
        with self.changed:
            self.steps[worker] = max(self.steps[worker], step)
            self.changed.notify_all()


class Server:
    """Plans which chunks are needed, reads them, and answers the workers."""

    def __init__(self, config: dict[str, Any]):
        self.reader = RangeReader(config["inflight"], config["attempt_seconds"], config["retry_seconds"])
        self.samples = [_open(arguments, self.reader) for arguments in config["datasets"]]
        self.columns = [samples.columns(config["extensions"]) for samples in self.samples]
        phases = [Phase(p[0], p[1], tuple(p[2]), tuple(p[3])) for p in config["phases"]]
        budget = BatchBudget(*config["budget"]) if config["budget"] else None
        self.plan = make_plan(self.samples, phases, config["seed"], config["shuffle"], budget)
        self.cache = Cache(config["cache"], int(config["cache_gb"] * 2**30)) if config["cache"] else None
        self.rank, self.world = config["rank"], config["world"]
        self.ahead_bytes = int(config["ahead_mb"] * 2**20)
        self.pool = ThreadPoolExecutor(config["inflight"], "chunk")
        self.chunks: dict[tuple[int, int], Chunk] = {}
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.progress = _Progress([config["step"]] * len(config["sockets"]))
        self.next_step = config["step"]  # the first step that is not planned
        self.planned: dict[tuple[int, int], int] = {}  # (dataset, lane) -> the last place that is planned

    # -- planning
    def plan_ahead(self) -> None:
        """Request chunks in the order of their first use, as far ahead as `ahead_bytes` allow, and free those that are
        not needed any more.
        """
        for step, slots in self._steps():
            with self.progress.changed:
                while not self._may_plan():
                    self.progress.changed.wait(1.0)
            self._free_used_chunks()
            for d, lane, place, global_index in slots:
                self._plan_slot(step, d, lane, place, global_index)
            self.next_step = step + 1

    def _steps(self) -> Iterator[tuple[int, list[tuple[int, int, int, int]]]]:
        """(step, its slots as (dataset, lane, place, global index)) of all steps from `next_step` on.

        Many steps are computed at a time, which is cheaper.
        """
        step = self.next_step
        while True:
            count = max(1, SLOTS_PER_PLANNING * self.world // self.plan.batch(step))
            slot_steps, slots = self.plan.slots_of_steps(step, count, self.rank, self.world)
            rows = np.column_stack([slot_steps, *slots]).tolist()  # (step, dataset, lane, place, global index) each
            for step, group in itertools.groupby(rows, operator.itemgetter(0)):
                yield step, [tuple(row[1:]) for row in group]
            step += 1

    def _may_plan(self) -> bool:
        """Whether the workers need the next step soon, or the chunks that they do not use yet leave room."""
        newest = max(self.progress.steps)
        if self.next_step <= newest + 1:
            return True
        with self.lock:
            return sum(c.bytes for c in self.chunks.values() if c.first_use > newest) < self.ahead_bytes

    def _plan_slot(self, step: int, d: int, lane: int, place: int, global_index: int) -> None:
        """Request the chunk that holds the sample of a slot, and note until when the chunk is needed."""
        order = self.plan.orders[d]
        key = (d, global_index // order.chunk)
        self.planned[d, lane] = max(place, self.planned.get((d, lane), -1))
        with self.lock:
            chunk = self.chunks.get(key)
            if chunk is not None and chunk.end >= 0:
                chunk.last_use = max(chunk.last_use, step)
                return
            end = int(order.block_ends(np.array([lane]), np.array([place]))[0])
            if chunk is None:
                self.chunks[key] = self._request_chunk(key, (d, lane), end, step)
            else:  # a worker requested it before it was planned
                chunk.lane, chunk.end, chunk.last_use = (d, lane), end, max(chunk.last_use, step)

    def _request_chunk(self, key: tuple[int, int], lane: tuple[int, int], end: int, step: int) -> Chunk:
        """Start to read a chunk. `key`: (dataset, number of the chunk)."""
        samples = self.samples[key[0]]
        expected = samples.total_bytes * self.plan.orders[key[0]].chunk // len(samples)
        chunk = Chunk(Future(), lane, end, step, step, expected)
        chunk.future = self.pool.submit(self._read_chunk, chunk, key)
        return chunk

    def _free_used_chunks(self) -> None:
        """Free each chunk that no later slot needs and whose last use lies before the step of every worker."""
        oldest = min(self.progress.steps)
        with self.lock:
            for key, chunk in list(self.chunks.items()):
                all_uses_planned = chunk.end < 0 or chunk.end <= self.planned.get(chunk.lane, -1)
                if all_uses_planned and chunk.last_use < oldest:
                    del self.chunks[key]

    # -- reading
    def _read_chunk(self, chunk: Chunk, key: tuple[int, int]) -> list[_Range]:
        """Read all samples of a chunk. Runs in a thread of the pool."""
        d, number = key
        size, dataset_size = self.plan.orders[d].chunk, len(self.samples[d])
        epoch, first = divmod(number * size, dataset_size)
        until_end = min(size, dataset_size - first)
        ranges = self._read_ranges(d, first, until_end, epoch)
        if until_end < size:  # the chunk continues with the first samples of the next epoch
            ranges += self._read_ranges(d, 0, size - until_end, epoch)
        with self.lock:
            chunk.bytes = sum(len(r.data) for r in ranges)
        return ranges

    def _read_ranges(self, d: int, start: int, count: int, epoch: int) -> list[_Range]:
        """Samples [start, start + count) of a dataset, from the cache or from the store."""
        samples, out = self.samples[d], []
        for piece in samples.pieces(start, count):
            cached = self._from_cache(d, piece.first, len(piece.records), epoch) if self.cache else None
            if cached is not None:
                out += cached
                continue
            begin, data = self._read_piece(d, piece)
            out.append(_Range(piece.first, begin, piece.records, data))
            if self.cache is not None:
                after = self.plan.orders[d].next_use(piece.first, epoch + 1)
                self.cache.write(self._cache_folder(d), piece.first, len(piece.records), data, after)
        return out

    def _read_piece(self, d: int, piece: Piece) -> tuple[int, bytes]:
        """(offset of the first byte in the shard, as the records count it; the bytes of the columns that are read)."""
        begin, ranges = self.samples[d].ranges(piece, self.columns[d])
        return begin, b"".join(self.reader.range(piece.url, *ends) for ends in ranges)

    def _cache_folder(self, d: int) -> str:
        """The name of a dataset's folder in the cache, which depends on the shards and on the members that are read."""
        members = "-".join(self.samples[d].extensions[c] for c in self.columns[d])
        return f"{self.samples[d].id}-{members}"

    def _from_cache(self, d: int, first: int, count: int, epoch: int) -> list[_Range] | None:
        """Samples [first, first + count) from the cache; None if it does not hold all of them."""
        assert self.cache is not None
        out = []
        for start, n in self.cache.covers(self._cache_folder(d), first, count):
            data = self.cache.read(self._cache_folder(d), start, n)
            (piece,) = self.samples[d].pieces(start, n)
            if data is None:
                self.cache.drop(self._cache_folder(d), start)
                return None
            begin, _ = self.samples[d].ranges(piece, self.columns[d])
            out.append(_Range(start, begin, piece.records, data))
            self.cache.set_next_use(self._cache_folder(d), start, self.plan.orders[d].next_use(start, epoch + 1))
        if out:
            with self.lock:
                self.counts["hits"] += 1
        return out or None

    # -- serving
    def serve(self, worker: int, connection: socket.socket) -> None:
        """Answer one worker until it ends.

        An OSError that does not come from the socket ends this process: otherwise the worker would wait for ever.
        """
        while True:
            try:
                kind, count, step = HEAD.unpack(receive(connection, HEAD.size))
                pairs = np.frombuffer(receive(connection, 16 * count), "<i8").reshape(count, 2).tolist()
            except OSError:
                return
            self.progress.update(worker, step)
            head: dict[str, Any]
            try:
                if kind == NAME:
                    head, data = {"names": [self.samples[d].name(v % len(self.samples[d])) for d, v in pairs]}, b""
                else:
                    sizes, data = self._answer(kind, step, pairs)
                    head = {"sizes": sizes, "counts": self._take_counts()}
            except DataError as reason:
                head, data = {"error": str(reason)}, b""
            try:
                _send(connection, head, data)
            except OSError:
                return

    def _answer(self, kind: int, step: int, pairs: list[list[int]]) -> tuple[list[list[int]], bytes]:
        """(sizes of the members of each sample, the samples' records and members as one string of bytes)."""
        sizes, parts = [], []
        if kind == READ:
            # All chunks are requested before the first one is waited for.
            chunks = [self._planned_or_new_chunk(d, global_index, step) for d, global_index in pairs]
        for n, (d, global_index) in enumerate(pairs):
            number = global_index % len(self.samples[d])
            found = _range_of(chunks[n].future.result(), number) if kind == READ else self._reread(d, number)
            records = found.records[number - found.first]
            parts.append(records.tobytes())
            view, lengths = memoryview(found.data), []
            for column in self.columns[d]:
                start = int(records[column]["offset"]) - found.begin
                member = view[start : start + int(records[column]["size"])] if records[column]["offset"] else b""
                lengths.append(len(member))
                parts.append(member)
            sizes.append(lengths)
        return sizes, b"".join(parts)

    def _planned_or_new_chunk(self, d: int, global_index: int, step: int) -> Chunk:
        """The chunk of a sample, which is requested now if it is not in memory."""
        key = (d, global_index // self.plan.orders[d].chunk)
        with self.lock:
            if key not in self.chunks:  # not planned yet, or a neighbour whose chunk has been freed
                self.chunks[key] = self._request_chunk(key, (d, -1), -1, step)
            chunk = self.chunks[key]
            chunk.last_use = max(chunk.last_use, step)
            return chunk

    def _reread(self, d: int, number: int) -> _Range:
        """Read one sample from the store, although it may be in memory, and delete it from the cache."""
        if self.cache is not None:
            for start, _ in self.cache.covers(self._cache_folder(d), number, 1):
                self.cache.drop(self._cache_folder(d), start)
        (piece,) = self.samples[d].pieces(number, 1)
        begin, data = self._read_piece(d, piece)
        return _Range(number, begin, piece.records, data)

    def _take_counts(self) -> dict[str, int]:
        """The counts since the last answer, and the bytes and unfinished chunks in memory now."""
        read_counts = self.reader.new_counts()
        with self.lock:
            out = self.counts + read_counts
            self.counts.clear()
            out["held"] = sum(c.bytes for c in self.chunks.values())
            out["queue"] = sum(not c.future.done() for c in self.chunks.values())
        return dict(out)


def _open(arguments: dict[str, Any], reader: RangeReader) -> Samples | Rows:
    """Open a dataset with the arguments that `Dataset.arguments` returned."""
    return Rows(**arguments, reader=reader) if "length" in arguments else Samples(**arguments, reader=reader)


def _range_of(ranges: list[_Range], number: int) -> _Range:
    return next(r for r in ranges if r.first <= number < r.first + len(r.records))


def refuse(connection: socket.socket, error: str) -> None:
    """Answer every request of one worker with an error."""
    with contextlib.suppress(OSError):
        while True:
            _, count, _ = HEAD.unpack(receive(connection, HEAD.size))
            receive(connection, 16 * count)
            _send(connection, {"error": error}, b"")


def _send(connection: socket.socket, head: dict[str, Any], data: bytes) -> None:
    text = json.dumps(head).encode()
    connection.sendall(REPLY.pack("error" in head, len(text), len(data)) + text)
    connection.sendall(data)


def _exit_with_traceback(args: threading.ExceptHookArgs) -> None:
    """End the process after an unexpected error of a thread.

    That closes the workers' sockets, so that no worker waits for ever.
    """
    traceback.print_exception(args.exc_type, args.exc_value, args.exc_traceback)
    sys.stderr.flush()
    os._exit(1)


def main() -> None:
    """Run the prefetch server until the trainer process ends."""
    threading.excepthook = _exit_with_traceback
    child_signals.ignore()  # it ends when the trainer does
    config = json.loads(sys.stdin.read())
    connections = [socket.socket(fileno=number) for number in config["sockets"]]
    try:
        server = Server(config)
        tasks = [threading.Thread(target=server.plan_ahead, daemon=True)]
        tasks += [threading.Thread(target=server.serve, args=pair, daemon=True) for pair in enumerate(connections)]
    except DataError as error:
        tasks = [threading.Thread(target=refuse, args=(c, str(error)), daemon=True) for c in connections]
    for task in tasks:
        task.start()
    while os.getppid() == config["parent"]:
        time.sleep(1)
    os._exit(0)


if __name__ == "__main__":
    main()
