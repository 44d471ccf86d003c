"""Best-fit packing of a window of tokens into rows. Documents are placed as a whole where possible; a document is cut
only if no row has enough room for it.

A window consists of consecutive tokens of one block: at most WINDOW_ROWS · T targets, plus one token. It is packed into
exactly ceil(targets / T) rows of T + 1 tokens. This is the number of rows without packing (`split`), so it is known
before any token is read. Each token except the first of a document is a target exactly once: after a cut, the next part
of the document begins with the last token of the part before it.
"""

from __future__ import annotations

import bisect
import itertools

import numpy as np

# Rows of a window. The whole window is read for each of its rows. A larger window would cut fewer documents.
WINDOW_ROWS = 64

Part = tuple[int, int]  # a part of a document: (its first token, counted within the block; its number of tokens)


def best_fit(first: int, last: int, starts: np.ndarray, length: int, joined: bool = False) -> list[list[Part]]:
    """The parts of documents in each row, for the tokens first..last (both included) of a block whose documents begin
    at `starts` (sorted). `length` = T.

    Parts are placed from the longest to the shortest, each into the fullest row that has room for all of it. A part for
    which no row has room is cut and spread over the emptiest rows. A row holds up to T + 1 tokens, and its parts are in
    the order of the text; the rows are ordered by their first parts.

    `joined`: whether a single token both ends a document and begins the next. If so, the target of every token of a
    part is the token after it in the block. Therefore rows hold T tokens, and a cut repeats no token.

    Example: two documents of 5 and 4 tokens: best_fit(0, 8, np.array([0, 5]), 4) == [[(0, 5)], [(5, 4)]].
    """
    count = -(-(last - first) // length)
    capacity = length if joined else length + 1  # tokens of a row
    repeated = 0 if joined else 1  # tokens that a cut repeats
    bounds = [first, *starts[np.searchsorted(starts, first, "right") : np.searchsorted(starts, last, "right")].tolist()]
    if bounds[-1] != last:  # otherwise the last token begins a document of the next window
        bounds.append(last + repeated)
    parts = []
    for begin, end in itertools.pairwise(bounds):
        while end - begin > capacity:  # the document is longer than a row: cut off parts that fill a row
            parts.append((begin, capacity))
            begin += capacity - repeated
        if end - begin > repeated:  # a single token without a target is dropped
            parts.append((begin, end - begin))
    parts.sort(key=lambda part: -part[1])
    rows: list[list[Part]] = [[] for _ in range(count)]
    free_rows = [(capacity, n) for n in range(count)]  # (free tokens, row), sorted
    unplaced = []
    for start, size in parts:
        fullest = bisect.bisect_left(free_rows, (size, -1))  # the fullest row that has room for the part
        if fullest == len(free_rows):
            unplaced.append((start, size))
            continue
        free, n = free_rows.pop(fullest)
        rows[n].append((start, size))
        bisect.insort(free_rows, (free - size, n))
    for start, size in unplaced:
        while size > repeated:
            fullest = bisect.bisect_left(free_rows, (size, -1))
            free, n = free_rows.pop(min(fullest, len(free_rows) - 1))  # or the emptiest row
            taken = min(size, free)
            rows[n].append((start, taken))
            bisect.insort(free_rows, (free - taken, n))
            start, size = start + taken - repeated, size - taken + repeated
    return sorted(sorted(row) for row in rows)
