"""The folder of a build in the making: claimed by one process, gone on with after a kill, seen under its name only when it is whole.

A local target DST is made in DST.partial/shards, which is renamed to DST at the end; what is done stands in DST.partial. In an object store,
shards are uploaded whole to their place, what is done stands in DST/build, and manifest.json, which makes it a shard set, is written last.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from data_pipeline import crew, index
from data_pipeline.crew import Work
from data_pipeline.index import MANIFEST, Manifest
from data_pipeline.sources.base import reachable
from data_pipeline.storage import DataError, is_local, open_store, write_whole
from pretrain.progress import Progress

BAD = "bad.jsonl"
SHOWN = 20  # of what was left out, in a summary
CLAIM_SECONDS = 10  # how long to wait for the workers of a killed build to end


def state_folder(target: str) -> str:
    return f"{target}.partial" if is_local(target) else f"{target}/build"


def shard_folder(target: str) -> str:
    return f"{target}.partial/shards" if is_local(target) else target


def normal(target: str) -> str:
    """The target as one URL or absolute path, without a slash at its end."""
    target = target.removeprefix("file://")
    return os.path.abspath(os.path.expanduser(target)) if is_local(target) else target.rstrip("/")


class Workplace:
    """What the planner does with the folder. `target` is what `normal` gives."""

    def __init__(self, target: str):
        self.target, self.local = target, is_local(target)
        self.state, self.shards = state_folder(target), shard_folder(target)
        self._lock: int | None = None

    def claim(self, about: dict[str, Any]) -> Any:
        """The plan of a build that was stopped, None for a new one. Raises DataError where something else is in the way."""
        if self.local:
            self._claim_folder()
        plan = self._read_plan()
        if plan is None:
            if not self.local and self._occupied(self.target):
                raise DataError(f"{self.target}: exists already; name another folder, or delete it to build again")
            return None
        for key, value in about.items():
            if plan["about"].get(key) != value:
                then, now = plan["about"].get(key), value
                what = f"{key} was {then!r}, now it is {now!r}"
                if key == "files":
                    what = "the files of the source have changed since"
                raise DataError(
                    f"{self.state}: holds the parts of another build ({what}); delete that folder to begin anew, "
                    "or give the command as it was"
                )
        return plan["plan"]

    def _claim_folder(self) -> None:
        target, state = Path(self.target), Path(self.state)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise DataError(f"{target}: exists already; name another folder, or delete it to build again")
        if state.exists() and any(state.iterdir()) and not (state / "plan.json").is_file():
            others = [f.name for f in state.iterdir() if f.name != "shards" and not f.name.endswith(".partial")]
            if others:
                raise DataError(f"{state}: is where {target} is made, but holds other files; delete or rename it")
        try:
            Path(self.shards).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.target}: cannot be made ({error.strerror})") from None
        self._take_lock()
        for stale in [*state.glob("*.partial"), *Path(self.shards).glob("*.partial")]:
            stale.unlink(missing_ok=True)

    def _take_lock(self) -> None:
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
                return None  # a file system without locks

    def _read_plan(self) -> Any:
        fs, path = open_store(f"{self.state}/plan.json")
        with reachable(self.target):
            try:
                return json.loads(fs.cat_file(path))
            except FileNotFoundError:
                return None
            except ValueError as error:
                raise DataError(f"{self.state}/plan.json: is no plan ({error}); delete {self.state}") from None

    def _occupied(self, url: str) -> bool:
        fs, path = open_store(url)
        with reachable(url):
            return bool(fs.exists(f"{path}/{MANIFEST}") or (fs.isdir(path) and fs.ls(path)))

    def begin(self, about: dict[str, Any], plan: Any) -> None:
        """Store the plan, which what is done later belongs to."""
        write_whole(f"{self.state}/plan.json", [json.dumps({"about": about, "plan": plan}).encode()])

    def done(self) -> dict[int, dict[str, Any]]:
        """What finished tasks left, by number."""
        fs, path = open_store(self.state)
        _, shards = open_store(self.shards)
        there = {f.rpartition("/")[2] for f in fs.glob(f"{shards}/*.tar")}
        files = [f for f in fs.glob(f"{path}/*.json") if f.rpartition("/")[2][:-5].isdigit()]
        files = [f for f in files if f"{f.rpartition('/')[2][:-5]}.tar" in there]
        return {int(f.rpartition("/")[2][:-5]): json.loads(fs.cat_file(f)) for f in files}

    def publish(self) -> None:
        """Give the finished shards their name and remove what only the build needed."""
        if self.local:
            target = Path(self.target)
            if target.exists():
                target.rmdir()
            os.rename(self.shards, target)
        self.remove()

    def sweep(self) -> None:
        """Remove what a build that was stopped at its very end left beside its finished shards."""
        fs, path = open_store(f"{self.state}/plan.json")
        if fs.exists(path) and not (self.local and os.path.exists(self.shards)):
            self.remove()

    def remove(self) -> None:
        """Remove the traces of a build; of a local target, its unpublished shards too."""
        if self.local:
            shutil.rmtree(self.state, ignore_errors=True)
        else:
            fs, path = open_store(self.state)
            fs.rm(path, recursive=True)
        self.release()

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def part_name(number: int) -> str:
    return f"{number:06d}"


def put_shard(target: str, number: int, write: Callable[[IO[bytes]], dict[str, Any]]) -> dict[str, Any]:
    """Make one shard with `write`, put it to its place whole, then note what `write` returned: with that, the task is done."""
    place = f"{shard_folder(target)}/{part_name(number)}.tar"
    try:
        if is_local(target):
            temporary = Path(f"{place}.{os.getpid()}.partial")
            with temporary.open("wb") as file:
                part = write(file)
            temporary.replace(place)
        else:
            fs, path = open_store(place)
            with tempfile.NamedTemporaryFile(suffix=".tar") as file:
                part = write(file)
                file.flush()
                with reachable(place):
                    fs.put_file(file.name, path)
    except OSError as error:
        raise DataError(f"{place}: cannot be written ({error.strerror or error})") from None
    write_whole(f"{state_folder(target)}/{part_name(number)}.json", [json.dumps(part).encode()])
    return part


def write_all(
    place: Workplace,
    work: Work,
    settings: dict[str, Any],
    tasks: list[dict[str, Any]],
    workers: int,
    title: str,
    unit: str,
) -> list[dict[str, Any]]:
    """What each task left, in order, with a line of progress in `unit`s of the tasks; those that are done already are not done again."""
    parts = place.done()
    left = [task for task in tasks if task["number"] not in parts]
    total = sum(task[unit] for task in tasks)
    done = total - sum(task[unit] for task in left)
    progress = Progress(title, total, done)

    def report(count: int) -> None:
        nonlocal done
        done += count
        if done < total:
            progress.update(done, f"{len(parts)} of {len(tasks)} shards")

    for answer in crew.run(work, settings, left, workers, report):
        parts[answer["number"]] = answer["part"]
    progress.update(total, f"{len(tasks)} shards")
    progress.close()
    return [parts[number] for number in sorted(parts)]


# ---------------------------------------------------------------- what was left out, and what is there already
def put_bad(place: Workplace, bad: list[dict[str, str]]) -> None:
    """What was left out, beside the shards: a line with path and reason for each."""
    write_whole(f"{place.shards}/{BAD}", (json.dumps(row).encode() + b"\n" for row in bad))


def left_out(bad: list[dict[str, str]], target: str) -> list[str]:
    """Lines to print."""
    out = [f"left out: {row['path']}: {row['reason']}" for row in bad[:SHOWN]]
    return out + ([f"left out: … and {len(bad) - SHOWN} more, all in {target}/{BAD}"] if len(bad) > SHOWN else [])


def finished(target: str, about: dict[str, Any]) -> tuple[Manifest, dict[str, Any]] | None:
    """(manifest, summary) of a target that the very same command has made already, None where there is no such thing."""
    try:
        held = index.load(target)
        if held is None or held.about.get("build", {}).get("from") != about:
            return None
        fs, path = open_store(f"{target}/{BAD}")
        bad = [json.loads(line) for line in fs.cat_file(path).splitlines()]
    except (DataError, OSError, ValueError):
        return None
    Workplace(target).sweep()
    return held, {k: v for k, v in held.about["build"].items() if k != "from"} | {"bad": bad}
