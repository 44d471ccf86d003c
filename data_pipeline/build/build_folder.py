"""The folder of an unfinished build. One process at a time locks it, a killed build is resumed from it, and the target
has its name only when the build is complete.

A local target DST is built in DST.partial/shards, which is renamed to DST at the end; the state of the build is in
DST.partial. In an object store, each shard is uploaded to its final place, the state of the build is in DST/build, and
manifest.json, which makes the folder a shard set, is written last.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from common import process_pool
from common.errors import DataError
from common.process_pool import Work
from common.progress import Progress
from common.untrusted import is_number, loads, schema_error
from data_pipeline.build.sources.source_files import as_data_error
from data_pipeline.shards.manifest import MANIFEST, Manifest, load_manifest
from data_pipeline.storage.urls import is_local, open_store, write_atomically

BAD = "bad.jsonl"
MAX_LISTED = 20  # left-out samples that `left_out` lists
# The names of the files, complete or partial, that a build writes in its state folder and in its shard folder. A build
# deletes no other files.
_PARTIAL = r"(\.\d+-\d+\.partial)?"
STATE = re.compile(rf"(plan|\d{{6,}})\.json{_PARTIAL}|tokenizer/tokenizer(_config)?\.json{_PARTIAL}")
SHARDS = re.compile(
    r"\d{6,}\.tar(\.\d+\.partial)?"
    rf"|(manifest\.json|bad\.jsonl|tokenizer(_config)?\.json|(index|seconds)-[0-9a-f]+\.bin){_PARTIAL}"
)
CLAIM_SECONDS = 10  # time to wait until the workers of a killed build have ended


def state_folder(target: str) -> str:
    """The folder with the state of an unfinished build."""
    return f"{target}.partial" if is_local(target) else f"{target}/build"


def shard_folder(target: str) -> str:
    """The folder in which shards are written before the build is finished."""
    return f"{target}.partial/shards" if is_local(target) else target


def normalized(target: str) -> str:
    """The target as a URL or an absolute path, without a trailing slash."""
    target = target.removeprefix("file://")
    return os.path.abspath(os.path.expanduser(target)) if is_local(target) else target.rstrip("/")


class BuildFolder:
    """The operations of the planning process on the folder of a build. `target` is a result of `normalized`."""

    def __init__(self, target: str):
        self.target, self.local = target, is_local(target)
        self.state, self.shards = state_folder(target), shard_folder(target)
        self._lock: int | None = None

    def claim(self, inputs: dict[str, Any], defaults: dict[str, Any] | None = None) -> Any:
        """Lock the folder. Returns the plan of a stopped build, None for a new build. Raises DataError if the folder
        holds anything else.

        `inputs`: everything that the plan depends on. `defaults`: the values of options that older versions did not
        store.
        """
        if self.local:
            self._claim_folder()
        plan = self._read_plan()
        if plan is None:
            if not self.local and self._occupied(self.target):
                raise DataError(f"{self.target}: exists already; name another folder, or delete it to build again")
            return None
        before = {**(defaults or {}), **plan["about"]}
        for key, value in inputs.items():
            if before.get(key) != value:
                difference = f"{key} was {before.get(key)!r}, now it is {value!r}"
                if key == "files":
                    difference = "the files of the source have changed since"
                raise DataError(
                    f"{self.state}: holds the parts of another build ({difference}); delete that folder to start again,"
                    " or repeat the earlier command"
                )
        return plan["plan"]

    def _claim_folder(self) -> None:
        """Create and lock the folder of a local target, and delete partial files of a killed process."""
        target, state = Path(self.target), Path(self.state)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise DataError(f"{target}: exists already; name another folder, or delete it to build again")
        if state.exists() and any(state.iterdir()) and not (state / "plan.json").is_file():
            foreign = [f.name for f in state.iterdir() if f.name != "shards" and not STATE.fullmatch(f.name)]
            if foreign:
                raise DataError(f"{state}: is needed to build {target}, but holds other files; delete or rename it")
        try:
            Path(self.shards).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.target}: cannot be created ({error.strerror})") from None
        self._take_lock()
        for folder, our_names in ((state, STATE), (Path(self.shards), SHARDS)):
            for stale in folder.glob("*.partial"):
                if our_names.fullmatch(stale.name):
                    stale.unlink(missing_ok=True)

    def _take_lock(self) -> None:
        """Lock the state folder. Raises DataError if another process holds the lock for CLAIM_SECONDS."""
        import fcntl

        self._lock = os.open(self.state, os.O_RDONLY)
        until = time.monotonic() + CLAIM_SECONDS
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise DataError(f"{self.target}: another process is building it; wait for it, or stop it") from None
                time.sleep(0.1)
            except OSError:
                return None  # the file system has no locks

    def _read_plan(self) -> Any:
        fs, path = open_store(f"{self.state}/plan.json")
        with as_data_error(self.target):
            try:
                plan = loads(fs.cat_file(path))
            except FileNotFoundError:
                return None
            except ValueError as error:
                raise DataError(f"{self.state}/plan.json: is not a valid plan ({error}); delete {self.state}") from None
        if wrong := schema_error(plan, {"about": dict, "plan": object}):
            raise DataError(f"{self.state}/plan.json: is not a valid plan ({wrong}); delete {self.state}")
        return plan

    def _occupied(self, url: str) -> bool:
        """Whether a folder of a store holds files."""
        fs, path = open_store(url)
        with as_data_error(url):
            return bool(fs.exists(f"{path}/{MANIFEST}") or (fs.isdir(path) and fs.ls(path)))

    def begin(self, inputs: dict[str, Any], plan: Any) -> None:
        """Store the plan, before the first task."""
        write_atomically(f"{self.state}/plan.json", [json.dumps({"about": inputs, "plan": plan}).encode()])

    def done(self) -> dict[int, dict[str, Any]]:
        """The results of finished tasks, by number.

        A task whose result is damaged, or whose shard is missing, is not finished.
        """
        fs, path = open_store(self.state)
        _, shards = open_store(self.shards)
        tars = {file.rpartition("/")[2] for file in fs.glob(f"{shards}/*.tar")}
        out: dict[int, dict[str, Any]] = {}
        for file in fs.glob(f"{path}/*.json"):
            name = file.rpartition("/")[2].removesuffix(".json")
            if not is_number(name) or f"{name}.tar" not in tars:
                continue
            with contextlib.suppress(ValueError):
                result = loads(fs.cat_file(file))
                if isinstance(result, dict):
                    out[int(name)] = result
        return out

    def publish(self) -> None:
        """Rename the finished shards to the target, and remove the state of the build."""
        if self.local:
            target = Path(self.target)
            if target.exists():
                target.rmdir()
            os.rename(self.shards, target)
        self.remove()

    def remove_leftovers(self) -> None:
        """Remove the state of a build that was stopped after its shards were published."""
        fs, path = open_store(f"{self.state}/plan.json")
        if fs.exists(path) and not (self.local and os.path.exists(self.shards)):
            self.remove()

    def remove(self) -> None:
        """Remove the files of a build, including the unpublished shards of a local target.

        Other files, and folders with other files, are not removed.
        """
        if self.local:
            for folder, our_names in ((Path(self.shards), SHARDS), (Path(self.state), STATE)):
                for path in [*folder.glob("*"), *folder.glob("tokenizer/*")]:
                    if our_names.fullmatch(str(path.relative_to(folder))):
                        path.unlink(missing_ok=True)
                for empty in (folder / "tokenizer", folder):
                    with contextlib.suppress(OSError):  # it does not exist, or is not empty
                        empty.rmdir()
        else:
            fs, root = open_store(self.state)
            for file in fs.find(root):
                if STATE.fullmatch(file.removeprefix(root).lstrip("/")):
                    fs.rm_file(file)
        self.release()

    def release(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def task_name(number: int) -> str:
    """The name of a task's shard and of its result, without extension."""
    return f"{number:06d}"


def write_shard(target: str, number: int, write: Callable[[IO[bytes]], dict[str, Any]]) -> dict[str, Any]:
    """Write the shard of a task with `write`, which gets an open file, and give it its name when it is complete. Then
    store the result of `write`, which marks the task as finished.
    """
    shard = f"{shard_folder(target)}/{task_name(number)}.tar"
    try:
        if is_local(target):
            temporary = Path(f"{shard}.{os.getpid()}.partial")
            with temporary.open("wb") as file:
                result = write(file)
            temporary.replace(shard)
        else:
            fs, path = open_store(shard)
            with tempfile.NamedTemporaryFile(suffix=".tar") as file:
                result = write(file)
                file.flush()
                with as_data_error(shard):
                    fs.put_file(file.name, path)
    except OSError as error:
        raise DataError(f"{shard}: cannot be written ({error.strerror or error})") from None
    write_atomically(f"{state_folder(target)}/{task_name(number)}.json", [json.dumps(result).encode()])
    return result


def run_tasks(
    folder: BuildFolder,
    work: Work,
    settings: dict[str, Any],
    tasks: list[dict[str, Any]],
    workers: int,
    title: str,
    unit: str,
) -> list[dict[str, Any]]:
    """Run the tasks that are not finished yet in the process pool. Returns the results of all tasks, in order.

    `unit`: the key of a task whose value measures its progress.
    """
    results = folder.done()
    remaining = [task for task in tasks if task["number"] not in results]
    total = sum(task[unit] for task in tasks)
    done = total - sum(task[unit] for task in remaining)
    progress = Progress(title, total, done)

    def report(count: int) -> None:
        nonlocal done
        done += count
        if done < total:
            progress.update(done, f"{len(results)} of {len(tasks)} shards")

    for answer in process_pool.run(work, settings, remaining, workers, report):
        results[answer["number"]] = answer["part"]
    progress.update(total, f"{len(tasks)} shards")
    progress.close()
    return [results[number] for number in sorted(results)]


# ---------------------------------------------------------------- left-out samples, and finished builds
def write_bad_list(folder: BuildFolder, bad: list[dict[str, str]]) -> None:
    """Write bad.jsonl beside the shards: one line, with path and reason, for each sample that was left out."""
    write_atomically(f"{folder.shards}/{BAD}", (json.dumps(row).encode() + b"\n" for row in bad))


def left_out(bad: list[dict[str, str]], target: str) -> list[str]:
    """Lines to print: the first samples that were left out, with the reasons."""
    out = [f"left out: {row['path']}: {row['reason']}" for row in bad[:MAX_LISTED]]
    if len(bad) > MAX_LISTED:
        out.append(f"left out: … and {len(bad) - MAX_LISTED} more, all in {target}/{BAD}")
    return out


def find_finished(
    target: str, inputs: dict[str, Any], defaults: dict[str, Any] | None = None
) -> tuple[Manifest, dict[str, Any]] | None:
    """(manifest, summary) of a target that the same command has already built; None if it has not.

    An older version may have built it: the format of its plan is ignored, and options that it did not store have the
    values in `defaults`.
    """
    try:
        manifest = load_manifest(target)
        if manifest is None:
            return None
        stored = manifest.details.get("build", {}).get("from")
        if not isinstance(stored, dict) or {**(defaults or {}), **stored, "format": inputs["format"]} != inputs:
            return None
        fs, path = open_store(f"{target}/{BAD}")
        bad = [loads(line) for line in fs.cat_file(path).splitlines()]
        if schema_error(bad, [{"path": str, "reason": str}]):
            return None
    except (DataError, OSError, ValueError):
        return None
    BuildFolder(target).remove_leftovers()
    return manifest, {k: v for k, v in manifest.details["build"].items() if k != "from"} | {"bad": bad}
