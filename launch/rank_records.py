"""The records that the ranks of an attempt write to its folder: on which node a rank runs (rank-R.json), and with which
exit code it has ended (rank-R.end.json). They show which rank caused the failure of an attempt. This module does not
import torch."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from common.child_signals import signal_name
from common.untrusted import loads, read_text
from pretrain.signals import EXIT_STOPPED, EXIT_UNSCORED

END = ".end.json"
Rank = dict[str, Any]  # "rank", "node", "step", "pid"; once it has ended, "code" and "ended"


def record(path: Path, **values: Any) -> None:
    """Write a JSON file atomically."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(values))
    temporary.replace(path)


def read_record(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object; {} if there is none, or it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        values = loads(read_text(path))
        if isinstance(values, dict):
            return values
    return {}


def read_new_ends(folder: Path, known: dict[str, Rank]) -> None:
    """Add to `known`, {file name: record}, the records of ranks that have ended since the last call. Each file is read
    only once. If the file system does not answer, the next call reads them."""
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = os.listdir(folder)
    for name in names:
        if name.endswith(END) and name not in known and (rank := read_record(folder / name)):
            known[name] = rank


def ranks_of(folder: Path) -> dict[int, Rank]:
    """The records of the ranks of an attempt, by rank."""
    out: dict[int, Rank] = {}
    for path in folder.glob("rank-*.json"):
        if rank := read_record(path):
            out[rank["rank"]] = out.get(rank["rank"], {}) | rank
    return dict(sorted(out.items()))


def has_failed(code: int) -> bool:
    """Whether the exit code of a trainer means a failure, not that it has finished or was asked to stop."""
    return code not in (0, EXIT_STOPPED, EXIT_UNSCORED)


def cause(ranks: dict[int, Rank]) -> Rank:
    """The rank that caused the end of an attempt: the one that failed first, unless it may only have timed out (code 1)
    while it waited for a rank that did not end; then that rank."""
    failed = [rank for rank in ranks.values() if has_failed(rank.get("code", 0))]
    not_ended = [rank for rank in ranks.values() if "code" not in rank]
    first = min(failed, key=lambda rank: rank["ended"], default=None)
    if first is None or (not_ended and first["code"] == 1):
        return not_ended[0] if not_ended else next(iter(ranks.values()))
    return first


def described(rank: Rank) -> str:
    """What happened to a rank and on which node, as text."""
    code = rank.get("code")
    how = f"ended with code {code}"
    if code is None:
        how = "did not end by itself, so it hung or its node was lost," if "pid" in rank else "never started,"
    elif code < 0:
        how = f"was killed by {signal_name(-code)}"
    return f"rank {rank['rank']} on {rank['node']} {how}"
