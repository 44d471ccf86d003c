"""The log of damaged samples, one line for each, and a quota: a run ends when its data holds more damaged samples.

A line is written to disk before training continues. Every process appends to a file of its own and then reads the files
of all processes, so the process whose sample exceeds the quota detects it without a collective operation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.appended_lines import LineFile
from common.errors import DataError
from common.untrusted import loads, schema_error

if TYPE_CHECKING:
    from data_pipeline.shards.samples import Samples
    from data_pipeline.shards.token_rows import Rows

MIN_ALLOWED_DAMAGED = 10  # so many damaged samples are allowed even in a small dataset


class DamageLog:
    """Damaged samples, {(shard, key): reason}. If `folder` is None, the log is kept in memory only.

    The quota is exceeded when more than max(10, `share` · number of samples) samples are damaged, or in one shard more
    than max(10, `shard_share` · number of samples in the shard).
    """

    def __init__(self, folder: Path | None, rank: int = 0, share: float = 1e-4, shard_share: float = 0.01):
        self.folder, self.share, self.shard_share = folder, share, shard_share
        self.lines = LineFile(folder / f"damaged-{rank}.jsonl", durable=True) if folder else None
        self.bad: dict[tuple[str, str], str] = {}
        self._unreported: list[tuple[str, str, str]] = []
        self._counts: dict[str, int] = {}
        self._total = 0
        self._read_all()

    def set_datasets(self, samples: Sequence[Samples | Rows]) -> None:
        """Set the datasets of the run, whose sizes the quota is computed from. Must be called before `add`."""
        self._total = sum(len(s) for s in samples)
        self._samples = samples

    def add(self, step: int, found: list[tuple[str, str, str]]) -> None:
        """Log each (shard, key, reason) that is not in the log yet. Raises DataError when the quota is exceeded."""
        for shard, key, reason in found:
            if (shard, key) in self.bad:
                continue
            self.bad[shard, key] = reason
            self._unreported.append((shard, key, reason))
            if self.lines:
                self.lines.add(json.dumps({"step": step, "shard": shard, "key": key, "reason": reason}) + "\n")
            self._read_all()
            self._check(shard)

    def new(self) -> list[tuple[str, str, str]]:
        """(shard, key, reason) of the samples that this process has logged since the last call."""
        new, self._unreported = self._unreported, []
        return new

    def _read_all(self) -> None:
        for path in sorted(self.folder.glob("damaged-*.jsonl")) if self.folder else []:
            for line in path.read_text(errors="replace").splitlines():
                try:
                    row = loads(line)
                except ValueError:
                    continue  # an incomplete line, from a process that was killed while it wrote
                if not schema_error(row, {"shard": str, "key": str, "reason": str}):
                    self.bad.setdefault((row["shard"], row["key"]), row["reason"])

    def _check(self, shard: str) -> None:
        where = f"; all are listed in {self.folder}/damaged-*.jsonl" if self.folder else ""
        allowed = max(MIN_ALLOWED_DAMAGED, math.ceil(self.share * self._total))
        if len(self.bad) > allowed:
            raise DataError(
                f"{len(self.bad)} damaged samples, but data.bad_share = {self.share:g} of {self._total} samples allows"
                f" {allowed}; replace the damaged shards or raise data.bad_share; {self._last()}{where}"
            )
        in_shard = sum(url == shard for url, _ in self.bad)
        allowed = max(MIN_ALLOWED_DAMAGED, math.ceil(self.shard_share * self._samples_in(shard)))
        if in_shard > allowed:
            raise DataError(
                f"{shard}: {in_shard} damaged samples, but data.bad_shard_share = {self.shard_share:g} allows"
                f" {allowed}; replace the shard or raise data.bad_shard_share; {self._last()}{where}"
            )

    def _samples_in(self, url: str) -> int:
        for samples in self._samples:
            for shard in range(len(samples.first) - 1):
                if samples.url(shard) == url:
                    return int(samples.first[shard + 1] - samples.first[shard])
        return 0

    def _last(self) -> str:
        (shard, key), reason = next(reversed(self.bad.items()))
        return f"the last: {key} in {shard}: {reason}"
