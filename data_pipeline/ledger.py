"""The ledger of damaged samples: one line each, written before training goes on, and a quota that ends the run.

Every process appends to a file of its own and then reads the files of all, so the process whose line is one too many sees it: the quota holds
for any number of processes, without a collective.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.storage import DataError

if TYPE_CHECKING:
    from data_pipeline.rows import Rows
    from data_pipeline.shards import Samples

ALWAYS = 10  # this many damaged samples never end a run, however small the data is


class Ledger:
    """Damaged samples by (shard, key) with the reason. `folder` None: kept in memory only.

    The run ends when more than max(10, `share` · samples) are damaged in all, or max(10, `shard_share` · its samples) in one shard.
    """

    def __init__(self, folder: Path | None, rank: int = 0, share: float = 1e-4, shard_share: float = 0.01):
        self.folder, self.share, self.shard_share = folder, share, shard_share
        self.path = folder / f"damaged-{rank}.jsonl" if folder else None
        self.bad: dict[tuple[str, str], str] = {}
        self._unreported: list[tuple[str, str, str]] = []
        self._counts: dict[str, int] = {}
        self._total = 0
        self._read_all()

    def watch(self, samples: Sequence[Samples | Rows]) -> None:
        """The data that the shares are of."""
        self._total = sum(len(s) for s in samples)
        self._samples = samples

    def add(self, step: int, found: list[tuple[str, str, str]]) -> None:
        """Write down (shard, key, reason) of what is new. Raises DataError when there are too many."""
        for shard, key, reason in found:
            if (shard, key) in self.bad:
                continue
            self.bad[shard, key] = reason
            self._unreported.append((shard, key, reason))
            if self.path:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(json.dumps({"step": step, "shard": shard, "key": key, "reason": reason}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            self._read_all()
            self._check(shard)

    def new(self) -> list[tuple[str, str, str]]:
        """(shard, key, reason) of the samples that were added since the last call."""
        new, self._unreported = self._unreported, []
        return new

    def _read_all(self) -> None:
        for path in sorted(self.folder.glob("damaged-*.jsonl")) if self.folder else []:
            for line in path.read_text(errors="replace").splitlines():
                try:
                    row = json.loads(line)
                    self.bad.setdefault((row["shard"], row["key"]), row["reason"])
                except (ValueError, KeyError):
                    continue  # half of a line, from a process that was killed

    def _check(self, shard: str) -> None:
        where = f"; all are listed in {self.folder}/damaged-*.jsonl" if self.folder else ""
        allowed = max(ALWAYS, math.ceil(self.share * self._total))
        if len(self.bad) > allowed:
            raise DataError(
                f"{len(self.bad)} damaged samples, but data.bad_share = {self.share:g} of {self._total} allows {allowed}; {self._last()}{where}"
            )
        here = sum(url == shard for url, _ in self.bad)
        allowed = max(ALWAYS, math.ceil(self.shard_share * self._in_shard(shard)))
        if here > allowed:
            raise DataError(
                f"{shard}: {here} damaged samples, but data.bad_shard_share = {self.shard_share:g} allows {allowed}; {self._last()}{where}"
            )

    def _in_shard(self, url: str) -> int:
        for samples in self._samples:
            for shard in range(len(samples.first) - 1):
                if samples.url(shard) == url:
                    return int(samples.first[shard + 1] - samples.first[shard])
        return 0

    def _last(self) -> str:
        (shard, key), reason = next(reversed(self.bad.items()))
        return f"the last: {key} in {shard}: {reason}"
