"""The protocol between data workers and the prefetch server: one socket pair per worker, headers of fixed size, no
pickle.

A request is HEAD followed by (dataset, global index) pairs. The answer is REPLY, a JSON text, and for each sample its
index records and the bytes of its members, so that the worker can check every hash itself. A global index is epoch · N
+ sample (see data_pipeline/order/permutation.py).
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

from common import child_signals
from common.errors import Damaged, DataError
from data_pipeline.shards.samples import verified
from data_pipeline.shards.tar_scan import RECORD

HEAD = struct.Struct("<BIq")  # request: kind, number of (dataset, global index) pairs that follow, step
REPLY = struct.Struct("<BQQ")  # answer: 0 or 1 (an error), size of the JSON text, size of the data
# Kinds of requests: the bytes of samples; the same, but read from the store and not from any cache; (shard, key) of
# samples.
READ, REREAD, NAME = 0, 1, 2


class PrefetchClient:
    """The data workers' side of the connection to the prefetch server.

    `sockets`: one for each worker. For each dataset, `columns` are the index columns that are read, and `widths` is the
    number of all its columns.
    """

    def __init__(self, sockets: list[socket.socket], columns: list[list[int]], widths: list[int]):
        self.sockets, self.columns, self.widths = sockets, columns, widths

    def read(self, worker: int, step: int, pairs: np.ndarray, kind: int = READ) -> tuple[list[dict], dict[str, int]]:
        """([{column: bytes, or Damaged}] for `pairs` of (dataset, global index) [n, 2], counts since the last answer).

        Raises DataError. `kind`: READ, or REREAD for a sample whose hash was wrong.
        """
        head, data = self._request(worker, step, pairs, kind)
        return self._unpack(pairs, head["sizes"], data), head["counts"]

    def name(self, worker: int, dataset: int, global_index: int) -> tuple[str, str]:
        """(shard, key) of a sample."""
        head, _ = self._request(worker, 0, np.array([[dataset, global_index]]), NAME)
        return tuple(head["names"][0])  # type: ignore[return-value]

    def _request(self, worker: int, step: int, pairs: np.ndarray, kind: int) -> tuple[dict[str, Any], memoryview]:
        connection = self.sockets[worker]
        try:
            connection.sendall(HEAD.pack(kind, len(pairs), step) + pairs.astype("<i8").tobytes())
            error, head_size, size = REPLY.unpack(receive(connection, REPLY.size))
            head = json.loads(bytes(receive(connection, head_size)))
            data = receive(connection, size)
        except OSError:
            raise DataError(
                "the prefetch server, which reads the shards, has ended; its error message is above"
            ) from None
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
                    # Token blocks have hash 0 in the index, because `Rows.checked` verifies each of their pages.
                    members[column] = verified(member, size, digest) if digest else member
                except Damaged as reason:
                    members[column] = reason
                at += length
            out.append(members)
        return out


def receive(connection: socket.socket, size: int) -> memoryview:
    """Receive exactly `size` bytes. Raises OSError when the other end is closed."""
    out = memoryview(bytearray(size))
    got = 0
    while got < size:
        n = connection.recv_into(out[got:])
        if n == 0:
            raise OSError("closed")
        got += n
    return out


class ServerProcess:
    """Starts the prefetch server as a process and keeps the workers' ends of its sockets.

    `close` ends it; it also ends when this process does.
    """

    def __init__(self, config: dict[str, Any], workers: int):
        pairs = [socket.socketpair() for _ in range(max(1, workers))]
        server_ends = [b.fileno() for _, b in pairs]
        self.sockets = [a for a, _ in pairs]
        with child_signals.signals_blocked():
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "data_pipeline.stream.prefetch_server"],
                stdin=subprocess.PIPE,
                pass_fds=server_ends,
                text=True,
            )
        assert self.process.stdin
        self.process.stdin.write(json.dumps({**config, "sockets": server_ends, "parent": os.getpid()}))
        self.process.stdin.close()
        for _, b in pairs:
            b.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for connection in self.sockets:
            connection.close()
