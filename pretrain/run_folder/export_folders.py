"""Finds the exports of a run: RUN/export/STEP for the recipe's model, and RUN/export/STUDENT/STEP for each further
student of a distillation."""

from __future__ import annotations

import itertools
from pathlib import Path

from common.untrusted import is_number


def exports(run: Path, student: str = "") -> dict[int, Path]:
    """{step: folder} of the exports of the recipe's model or, if it is given, of a further `student`, in the order of
    the steps."""
    folders = (run / "export" / student).glob("*")
    found = {int(p.name): p for p in folders if is_number(p.name) and (p / "config.json").is_file()}
    return dict(sorted(found.items()))


def student_exports(run: Path) -> dict[str, dict[int, Path]]:
    """{student: {step: folder}} of the students that a distillation trains in addition to the recipe's model."""
    names = sorted(
        p.name for p in (run / "export").glob("*") if p.is_dir() and p.name[0] != "." and not is_number(p.name)
    )
    return {name: found for name in names if (found := exports(run, name))}


def run_of(export: str | Path) -> Path | None:
    """The run that an exported folder belongs to; None if its path is not that of an export in a run folder."""
    folder = Path(export).resolve()
    parents = folder.parents[:3]
    if not is_number(folder.name):
        return None
    runs = (run for inside, run in itertools.pairwise(parents) if inside.name == "export")
    return next((run for run in runs if (run / "recipe.yaml").is_file()), None)
