"""Cut a long text into pieces that can be tokenized one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

CHARACTERS_AT_ONCE = 1 << 20  # characters of text that are tokenized in one call
# Characters on each side of a cut that are tokenized with and without the cut, to check that the tokens do not change.
CUT_CONTEXT = 1 << 12
MAX_CUT_ATTEMPTS = 64  # positions of each kind (see `pieces`) that are tried before the piece is made longer
SEARCHED_CHARACTERS = 1 << 16  # characters before the desired cut in which a position is searched


def pieces(text: str, encoder: Any, size: int = CHARACTERS_AT_ONCE) -> Iterator[str]:
    """Cut a long text into pieces of about `size` characters whose tokens, concatenated, are those of the whole text.

    A cut must not change the tokens. It is accepted if the text around it, CUT_CONTEXT characters on each side, has the
    same tokens as a whole and when its two halves are tokenized separately. Three kinds of positions are tried in turn:
    spaces between letters (also without the space, for tokenizers that add one before every text), ends of lines, and
    any position. If no cut is accepted, the piece becomes longer; a single word of megabytes remains one piece.
    """
    first = 0
    while len(text) - first > size:
        cut, length = None, size
        while cut is None and len(text) - first > length:
            cut = _safe_cut(text, first + length // 2, first + length, encoder)
            length *= 2
        if cut is None:
            break
        yield text[first : cut[0]]
        first = cut[1]
    yield text[first:]


def _safe_cut(text: str, low: int, high: int, encoder: Any) -> tuple[int, int] | None:
    """A safe cut between the characters `low` and `high`, as near to `high` as possible: (end of a piece, beginning of
    the next one). None if none of the positions that were tried is safe.
    """
    positions = range(high, max(low, high - SEARCHED_CHARACTERS), -1)
    spaces = [p for p in positions if text[p] == " " and text[p - 1].isalpha() and text[p + 1 : p + 2].isalpha()]
    line_ends = [p for p in positions if text[p - 1] == "\n" and not text[p].isspace()]
    candidates = [(p, p + skipped) for p in spaces[:MAX_CUT_ATTEMPTS] for skipped in (0, 1)]
    candidates += [(p, p) for p in (*line_ends[:MAX_CUT_ATTEMPTS], *positions[:MAX_CUT_ATTEMPTS])]

    def tokens(part: str) -> list[int]:
        return encoder.encode(part, add_special_tokens=False).ids

    for end, following in candidates:
        begin, context_end = end - CUT_CONTEXT, end + CUT_CONTEXT
        if tokens(text[begin:context_end]) == tokens(text[begin:end]) + tokens(text[following:context_end]):
            return end, following
    return None
