"""Types and help texts of arguments that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from common.errors import UserError
from launch.command_parser import HomePath

NO_FILE = HomePath("")  # default of an option that names a file
RecipeName = Annotated[str, "the name of a recipe, a .yaml file, or a run folder"]
Overrides = Annotated[
    Sequence[str], "key=value", "values that replace those of the recipe, for example steps=100 optim.lr.value=1e-3"
]
RunFolder = Annotated[str, "a run folder"]
Shards = Annotated[str, "folder or URL of shards"]
ShardMb = Annotated[float, "MB", "approximate size of the largest shard"]
Workers = Annotated[int, "N", "number of processes (default: one per core)"]
ResultsFile = Annotated[HomePath, "FILE.jsonl", "file to which the scores are appended (default: RUN/results.jsonl)"]


def check_file(option: str, name: str, suffix: str) -> None:
    """Raises UserError for the value of an option that names no file with this ending in an existing folder. "" is
    accepted, because it stands for the default."""
    if name and (not name.endswith(suffix) or Path(name).is_dir()):
        raise UserError(f"{option} {name}: write the name of a file that ends in {suffix}")
    if name and not Path(name).absolute().parent.is_dir():
        raise UserError(f"{option} {name}: its folder does not exist; create it, or name another")
