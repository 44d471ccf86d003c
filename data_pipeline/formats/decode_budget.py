"""A limit for the bytes of decoded images that the threads of a process hold at once, in data workers and in
evaluation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

DECODE_MB = 1024.0  # default limit (`data.decode_mb`)


class Budget:
    """A budget of `total` bytes for all threads. It is exceeded only by a lease of more than `total` bytes, which waits
    until it is the only one.

    `used`: bytes in use now; `peak`: the largest `used` so far.
    """

    def __init__(self, total: float = DECODE_MB * 2**20):
        self.total, self.used, self.peak = total, 0, 0
        self._changed = threading.Condition()

    def __reduce__(self) -> tuple[type[Budget], tuple[float]]:
        return Budget, (self.total,)  # another process has its own threads

    @contextmanager
    def lease(self) -> Iterator[Callable[[int], None]]:
        """Yields `take(amount)`, which reserves bytes: it waits until they are free, or until no other lease uses any.
        They are freed when the context ends.

        A lease uses the maximum of the amounts, not their sum: an image that is decoded twice is in memory once. Only
        the first call waits, because two leases that both use some bytes could wait for each other for ever.
        """
        own = 0  # bytes that this lease uses

        def take(amount: int) -> None:
            nonlocal own
            if amount <= own:
                return
            with self._changed:
                self._changed.wait_for(lambda: own or not self.used or self.used + amount <= self.total)
                self.used += amount - own
                self.peak, own = max(self.peak, self.used), amount

        try:
            yield take
        finally:
            if own:
                with self._changed:
                    self.used -= own
                    self._changed.notify_all()
