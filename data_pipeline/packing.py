"""Rows of a window of tokens: cut as they lie (`split`), or documents laid whole into rows where they fit (`best_fit`).

A window is consecutive tokens of one block, at most ROWS · T of them and the one after; it becomes exactly ceil(tokens / T) rows of T + 1 either way, so
the number of rows is known before any token is read. Each token but a document's first is a target once: what is cut goes on with the last
token repeated, in the next row or in whichever the rest is laid into.
"""

from __future__ import annotations

import bisect
import itertools

import numpy as np

ROWS = 64  # of a window, all read to make one row of `best_fit`; more would cut fewer documents

Part = tuple[int, int]  # (first token, how many) of a piece of a document, inside the block


def best_fit(first: int, last: int, starts: np.ndarray, length: int) -> list[list[Part]]:
    """Rows of pieces, for the tokens first..last (both included) of a block in which documents begin at `starts` (sorted), `length` = T.

    Longest first, each piece into the fullest row that has room for all of it; what finds none is cut over the emptiest rows. Rows hold up to
    T + 1 tokens, their pieces in the order of the text, and stand in the order of their first pieces.
    """
    count = -(-(last - first) // length)
    bounds = [first, *starts[np.searchsorted(starts, first, "right") : np.searchsorted(starts, last, "right")].tolist()]
    if bounds[-1] != last:  # else the last token begins a document that the next window has
        bounds.append(last + 1)
    pieces = []
    for a, b in itertools.pairwise(bounds):
        while b - a > length + 1:  # more than a row: whole rows first
            pieces.append((a, length + 1))
            a += length
        if b - a > 1:  # a token alone is no target
            pieces.append((a, b - a))
    pieces.sort(key=lambda piece: -piece[1])
    rows: list[list[Part]] = [[] for _ in range(count)]
    room = [(length + 1, n) for n in range(count)]  # (free places, row), sorted
    over = []
    for start, size in pieces:
        at = bisect.bisect_left(room, (size, -1))
        if at == len(room):
            over.append((start, size))
            continue
        free, n = room.pop(at)
        rows[n].append((start, size))
        bisect.insort(room, (free - size, n))
    for start, size in over:
        while size > 1:
            at = bisect.bisect_left(room, (size, -1))
            free, n = room.pop(min(at, len(room) - 1))
            taken = min(size, free)
            rows[n].append((start, taken))
            bisect.insort(room, (free - taken, n))
            start, size = start + taken - 1, size - taken + 1
    return sorted(sorted(row) for row in rows)
