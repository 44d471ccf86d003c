"""The data workers' way to the feeder: one socket pair per worker, fixed-size heads, no pickle.

A request is HEAD and (dataset, virtual id) pairs; the answer is REPLY, a JSON text and the members' bytes, each sample's index records before
them, so that the worker can check every hash itself.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from typing import Any

import numpy as np

from data_pipeline.decode import Damaged
from data_pipeline.index import RECORD
from data_pipeline.shards import check
from data_pipeline.storage import DataError

HEAD = struct.Struct("<BIq")  # request: kind, how many (dataset, virtual id) pairs follow, step
REPLY = struct.Struct("<BQQ")  # answer: 0 or 1 (an error), bytes of JSON, bytes of data
READ, AGAIN, NAME = 0, 1, 2


class Bytes:
    """What a data worker reads through: `read` for the slots of a batch, `again` for one sample whose hash was wrong."""

    def __init__(self, sockets: list[socket.socket], columns: list[list[int]], widths: list[int]):
        self.sockets, self.columns, self.widths = sockets, columns, widths

    def read(self, worker: int, step: int, pairs: np.ndarray, kind: int = READ) -> tuple[list[dict], dict[str, int]]:
        """([{column: bytes, or Damaged}] for (dataset, virtual id) [n, 2], counts since the last answer). Raises DataError."""
        head, data = self._ask(worker, step, pairs, kind)
        return self._unpack(pairs, head["sizes"], data), head["counts"]

    def name(self, worker: int, dataset: int, virtual: int) -> tuple[str, str]:
        """(shard, key) of a sample."""
        head, _ = self._ask(worker, 0, np.array([[dataset, virtual]]), NAME)
        return tuple(head["names"][0])  # type: ignore[return-value]

    def _ask(self, worker: int, step: int, pairs: np.ndarray, kind: int) -> tuple[dict[str, Any], memoryview]:
        line = self.sockets[worker]
        try:
            line.sendall(HEAD.pack(kind, len(pairs), step) + pairs.astype("<i8").tobytes())
            error, head_size, size = REPLY.unpack(receive(line, REPLY.size))
            head = json.loads(bytes(receive(line, head_size)))
            data = receive(line, size)
        except OSError:
            raise DataError("the process that fetches the shards has ended; its last words are above") from None
        if error:
            raise DataError(head["error"])
        return head, data

    def _unpack(self, pairs: np.ndarray, sizes: list[list[int]], data: memoryview) -> list[dict]:
        out, at = [], 0
        for (dataset, _), lengths in zip(pairs.tolist(), sizes, strict=True):
            width = self.widths[dataset]
            rows = np.frombuffer(data[at : at + width * RECORD.itemsize], RECORD).tolist()
            at += width * RECORD.itemsize
            members: dict[int, bytes | Damaged] = {}
            for column, length in zip(self.columns[dataset], lengths, strict=True):
                offset, size, digest = rows[column]
                if not offset:
                    continue
                try:
                    member = bytes(data[at : at + length])
                    members[column] = check(member, size, digest) if digest else member  # 0: a row's, see rows.py
                except Damaged as reason:
                    members[column] = reason
                at += length
            out.append(members)
        return out


def receive(line: socket.socket, size: int) -> memoryview:
    """Exactly `size` bytes. Raises OSError where the other end is gone."""
    out = memoryview(bytearray(size))
    got = 0
    while got < size:
        n = line.recv_into(out[got:])
        if n == 0:
            raise OSError("closed")
        got += n
    return out


class Feeder:
    """Starts the process and holds the workers' ends of its sockets; `close` ends it. It ends by itself when this process is gone."""

    def __init__(self, config: dict[str, Any], workers: int):
        pairs = [socket.socketpair() for _ in range(max(1, workers))]
        theirs = [b.fileno() for _, b in pairs]
        self.sockets = [a for a, _ in pairs]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "data_pipeline.feeder"], stdin=subprocess.PIPE, pass_fds=theirs, text=True
        )
        assert self.process.stdin
        self.process.stdin.write(json.dumps({**config, "sockets": theirs, "parent": os.getpid()}))
        self.process.stdin.close()
        for _, b in pairs:
            b.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for line in self.sockets:
            line.close()
