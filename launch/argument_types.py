"""Types and help texts of arguments that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

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
