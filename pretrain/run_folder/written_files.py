"""The files that the program writes into a run folder. Only these are ever deleted.

The patterns are relative to the run folder. In a pattern, * stands for any characters within one name, # for a number,
and ######### for a number of nine digits. Checkpoints are not among them: pretrain/checkpoint/ writes and deletes
those.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from common.errors import UserError

MARKER, RECIPE, LOCK = ".run.json", "recipe.yaml", ".run.lock"
FLOPS = "flops.json"  # the FLOPs of a step, which were traced for the recipe
FORMER_RECIPE = ".recipe.before.yaml"  # copy of recipe.yaml before a command changed it, see `recipe_file.py`
EVALUATIONS = "evaluations"  # folder with what launch/evaluation_jobs.py has done, one file for each evaluation
SPLITS = ("val", "full", "test", "train")  # of evaluations
EVALUATION_RECORDS = tuple(f"{EVALUATIONS}/*-#-{split}.json" for split in SPLITS)
EVALUATION_ENDS = tuple(f"{EVALUATIONS}/*-#-{split}.end.json" for split in SPLITS)
BEGUN = f"{EVALUATIONS}/begun.json"  # how often each evaluation beside the training has begun without an end
CANCELLED = "cancelled"  # file there: the evaluations are cancelled until the run is launched again
TRACKERS = "trackers"  # folder with a folder for each tracker, see pretrain/trackers/sender.py
TRACKER_STATE = "state.json"  # file there; what trackers store is the user's
JOB = "job.json"  # the job of a cluster that trains the run, see launch/slurm.py

EXPORT_FORMAT_FILES: dict[str, tuple[str, ...]] = {  # {export format: the files that it adds to an export}
    "transformers": (),
    "timm": ("timm/config.json", "timm/model.safetensors"),
    "official": ("official.pth",),
    "torch": ("model.pt2",),
    "onnx": ("model.onnx",),
}
INT8_FILES = ("model.onnx", "model.int8.onnx")  # of the temporary folder in which an int8 model is made
EXPORT_TENSORS = "tensors.safetensors"  # what `Exported.tensors` of an objective names
EXPORT_FILES = (
    *("config.json", "model.safetensors", EXPORT_TENSORS, "README.md", ".README.md", "preprocessor_config.json"),
    "video_preprocessor_config.json",
    *("tokenizer.json", "tokenizer_config.json"),
    *(file for files in EXPORT_FORMAT_FILES.values() for file in files),
    *("model.int8.onnx", "int8.json", "int8.json.#-#.partial", *(f".int8.partial/{file}" for file in INT8_FILES)),
    # a format is written to a temporary folder first
    *(f".{name}.partial/{file}" for name, files in EXPORT_FORMAT_FILES.items() for file in files),
)
RUN_FILES = (
    *(MARKER, RECIPE, FORMER_RECIPE, ".recipe.yaml", LOCK, f"{LOCK}.*", "log.txt", "report.html", ".report.html"),
    *(FLOPS, f"{FLOPS}.#-#.partial"),
    *("metrics.jsonl", "metrics.jsonl.#-#.partial", "streams.jsonl", "skipped.jsonl", "results.jsonl", "samples.jsonl"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.json.#-#.partial", "tokenizer_config.json.#-#.partial"),
    *(JOB, f"{JOB}.#-#.partial"),
    *(EVALUATION_RECORDS + EVALUATION_ENDS),
    *(file.replace(".json", ".partial") for file in EVALUATION_RECORDS + EVALUATION_ENDS),
    *(BEGUN, BEGUN.replace(".json", ".partial")),
    *(f"{EVALUATIONS}/{file}" for file in (LOCK, f"{LOCK}.*", CANCELLED)),
    *(f"{TRACKERS}/*/{file}" for file in (TRACKER_STATE, f"{TRACKER_STATE}.#-#.partial", LOCK, f"{LOCK}.*")),
    *("tensorboard/events.out.tfevents.*", "data/#.json", "data/#.json.#-#.partial"),
    *("damaged/damaged-#.jsonl", "pictures/*-#########.png"),
    *(f"export/{step}/{file}" for step in ("#", ".#.partial", "*/#", "*/.#.partial") for file in EXPORT_FILES),
)


def write_atomically(path: Path, text: str) -> None:
    """Write a file of the run folder to a temporary file, which is renamed when it is durable: otherwise the file may be
    empty after a loss of power. Raises UserError if it cannot be written."""
    temporary = path.with_name(".recipe.yaml")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); make room on that disk, or choose another folder"
            " with run=FOLDER"
        ) from None


def make_empty_folder(folder: Path, files: tuple[str, ...]) -> None:
    """Create a temporary folder in which `files` are going to be written, and delete those that a killed command has
    left in it. Raises UserError if anything else is in it."""
    kept = delete_files(folder, files) if folder.is_dir() and not folder.is_symlink() else []
    if kept or (os.path.lexists(folder) and not folder.is_dir()):
        found = f"holds other files: {', '.join(kept[:3])}" if kept else "is not a folder"
        raise UserError(f"{folder}: is needed as a temporary folder, but {found}; move it away")
    folder.mkdir(parents=True, exist_ok=True)


def delete_folder(folder: Path, files: tuple[str, ...]) -> None:
    """Delete `files` from a folder, and the folder itself if nothing else is in it."""
    with contextlib.suppress(OSError):
        delete_files(folder, files)
        folder.rmdir()


def delete_files(root: Path, patterns: tuple[str, ...]) -> list[str]:
    """Delete the files below `root` that match one of the patterns, and the folders that are empty afterwards. Returns
    the paths, relative to `root`, that were kept; the marker and the lock of a run are not mentioned."""
    return _delete_below(root, Path(), [tuple(pattern.split("/")) for pattern in patterns])


def _delete_below(root: Path, folder: Path, patterns: list[tuple[str, ...]]) -> list[str]:
    """`delete_files` for a folder below `root`; each pattern is split at its slashes."""
    kept = []
    for entry in sorted((root / folder).iterdir()):
        path = folder / entry.name
        depth = len(path.parts)
        matching = [pattern for pattern in patterns if matches(path.parts, pattern[:depth])]
        # A link at the top level (such as tensorboard/ on another disk) is followed; any other link counts as a file.
        if entry.is_dir() and (not entry.is_symlink() or (depth == 1 and matching)):
            kept += _delete_folder_entry(root, path, [pattern for pattern in matching if len(pattern) > depth])
        elif any(len(pattern) == depth for pattern in matching):
            entry.unlink()
        elif path not in (Path(MARKER), Path(LOCK)):
            kept.append(str(path))
    return kept


def _delete_folder_entry(root: Path, path: Path, patterns: list[tuple[str, ...]]) -> list[str]:
    """Delete the matching files in one folder, and then the folder if it is empty and not a link. `patterns`: the
    patterns of files in this folder."""
    folder = root / path
    if not patterns:
        if path == Path("checkpoints") and not any(folder.iterdir()):
            folder.rmdir()
            return []
        return [f"{path}/"]
    kept = _delete_below(root, path, patterns)
    if not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()
    return kept


def matches(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path has as many names as a pattern, and each name matches the pattern's name at the same position."""
    return len(names) == len(pattern) and all(
        re.fullmatch(_regular_expression(wanted), name) for wanted, name in zip(pattern, names, strict=True)
    )


def _regular_expression(pattern: str) -> str:
    """The regular expression for one name of a pattern."""

    def digits(found: re.Match) -> str:
        count = len(found[0])
        return "[0-9]+" if count == 1 else f"[0-9]{{{count}}}"

    return re.sub("#+", digits, re.escape(pattern).replace(r"\*", ".*").replace(r"\#", "#"))
