"""Checkpoint: weights, teacher, optimizer, position in the data and recipe, in a folder that appears under its name only when it is whole.

`Saver.save` writes at once or beside the training (`checkpoint.mode`), tries again what fails, and moves `latest` when all bytes are durable; `load`
compares every byte that it uses with its digest and executes nothing that it reads. Dropout and drop path are drawn from (seed, step), masks and crops
from (seed, sample), so there is no state of random generators to keep. What a folder looks like: `checkpoint_store`.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from data_pipeline.stream import Stream
from pretrain import config
from pretrain.checkpoint_format import Reader, Writer, differences, fill, read_metadata
from pretrain.checkpoint_store import Damaged, Disk, Files, Store, digest_of, name_of, open_folder
from pretrain.errors import UserError
from pretrain.parallel import processes, timeouts
from pretrain.parallel.engine import Engine
from pretrain.recipe import Recipe
from pretrain.run_folder import write_recipe

FORMAT = 2


def store_of(run: Path, recipe: Recipe) -> Store:
    """Where a run keeps its checkpoints."""
    return open_folder(recipe.checkpoint.folder or run / "checkpoints", recipe.checkpoint.retry_seconds)


def all_of(run: Path) -> list[Path]:
    """The whole checkpoints of a run that keeps them in its own folder."""
    return [run / "checkpoints" / name for name in Disk(str(run / "checkpoints")).whole()]


# ---------------------------------------------------------------- saving
class Saver:
    """Writes a run's checkpoints. With several processes all of them call each method at the same step."""

    def __init__(self, run: Path, recipe: Recipe, say: Callable[[str], None]):
        self.run, self.recipe, self.say, self.cfg = run, recipe, say, recipe.checkpoint
        self.store = store_of(run, recipe)
        # its own group: the thread's messages must not mix with the training's, and NCCL carries no objects
        self.group = timeouts.patient_group() if dist.is_initialized() else None
        self.rank = dist.get_rank() if self.group else 0
        self.world = dist.get_world_size() if self.group else 1
        self.thread = ThreadPoolExecutor(1, "checkpoint") if self.cfg.mode == "async" else None
        self.pending: Future[str | None] | None = None
        self.stager: DefaultStager | None = None
        self._probe()

    def save(self, step: int, engine: Engine, stream: Stream, last: bool = False, **parts: dict[str, Any]) -> None:
        """Write a checkpoint of engine, stream and further parts. With mode async it returns when the tensors are copied, unless it is the `last`.

        Raises UserError where it cannot be written and `checkpoint.on_error` is stop, or it is the last.
        """
        self.wait()
        name = name_of(step)
        if self.agree(lambda: self._is_latest(name)):
            return
        state = {**engine.state_dict(), **parts}
        about = {
            "format": FORMAT,
            "step": step,
            "stream": stream.state_dict(),
            "data": [{"shards": s.names, "samples": len(s), "id": s.id} for s in stream.samples],
            "recipe": config.to_dict(self.recipe),
            "versions": versions(),
            "processes": self.world,
        }
        if self.thread is None or last:
            self._judge(self._persist(name, state, about), last)
        else:
            self.pending = self.thread.submit(self._persist, name, self._stage(state), about)

    def wait(self) -> None:
        """Let a save that goes on beside the training end; what save raises comes here."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self._judge(pending.result())

    def check(self) -> None:
        """Raise at once what a save beside the training has met; with several processes they would not agree on the step, so that waits."""
        if self.pending is not None and self.pending.done() and self.group is None:
            self.wait()

    def close(self) -> None:
        self.wait()
        if self.thread is not None:
            self.thread.shutdown()
        if self.stager is not None:
            self.stager.close()

    def _judge(self, problem: str | None, last: bool = False) -> None:
        if problem and (last or self.cfg.on_error == "stop"):
            raise processes.common(UserError(problem))

    def _probe(self) -> None:
        """Say before any step is trained that the folder cannot be written."""
        problem = self.agree(self._write_probe)
        if problem and self.cfg.on_error == "stop":
            raise processes.common(UserError(problem))
        if problem:
            self.say(f"{problem}; checkpoint.on_error is continue, so the training goes on without")

    def _write_probe(self) -> str | None:
        try:
            self.store.put(".probe", b"")
            self.store.drop(".probe")
        except (OSError, UserError) as error:
            return f"checkpoint.folder: {self._reason(error)}: no checkpoint can be written there"
        return None

    def _stage(self, state: dict[str, Any]) -> dict[str, Any]:
        """A copy in main memory that the training does not change; its memory is used again for the next one."""
        if self.stager is None:
            gpu = torch.cuda.is_available()
            self.stager = DefaultStager(StagingOptions(gpu, False, False, gpu))
        return self.stager.stage(state)  # type: ignore[return-value]

    def _persist(self, name: str, state: dict[str, Any], about: dict[str, Any]) -> str | None:
        """Write, publish and prune; what went wrong for good, or None."""
        deadline, tries = time.monotonic() + self.cfg.retry_seconds, 0
        while True:
            problem = self._attempt(name, state, about)
            tries += 1
            if problem is None:
                self._prune(name)
                return None
            over = self.agree(lambda: time.monotonic() >= deadline)
            kept = "the one before it is kept"
            if over:
                problem = f"{self.store.path(name)}: cannot write the checkpoint ({problem}); {kept}"
                if self.rank == 0:
                    self.say(f"{problem}; tried {tries} times")
                return problem
            if self.rank == 0 and tries == 1:
                self.say(f"{self.store.path(name)}: cannot write the checkpoint ({problem}); trying again; {kept}")
            time.sleep(min(10.0, 0.2 * 2**tries))

    def _attempt(self, name: str, state: dict[str, Any], about: dict[str, Any]) -> str | None:
        begun: tuple[str, str | None] = self.agree(lambda: self._begin(name))
        place, problem = begun
        if problem:
            return problem
        writer = Writer(self.store, place)
        try:
            dcp.save(state, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
        except (Exception, CheckpointException) as error:  # DCP's own is no Exception
            problem = self._reason(error)
        found = self._gather((problem, writer.files))
        problem = next((p for p, _ in found if p), None)
        if problem:
            return problem
        files = {file: entry for _, part in found for file, entry in part.items()}
        return self.agree(lambda: self._publish(place, name, {**about, "files": files}))

    def _begin(self, name: str) -> tuple[str, str | None]:
        try:
            return self.store.begin(name), None
        except (OSError, UserError) as error:
            return "", self._reason(error)

    def _publish(self, place: str, name: str, about: dict[str, Any]) -> str | None:
        try:
            for file, (size, _) in about["files"].items():
                if self.store.size(place, file) != size:
                    return f"{file} is not where process 0 looks for it: checkpoint.folder must be one that all share"
            about["digest"] = digest_of(about)
            self.store.publish(place, name, json.dumps(about, indent=1).encode())
            self.store.point(name)
            if self.cfg.resume != "latest":  # it went on from there, and from now on from here
                self.cfg.resume = "latest"
                write_recipe(self.recipe, self.run)
        except (OSError, UserError) as error:
            return self._reason(error)
        return None

    def _prune(self, name: str) -> None:
        """Delete what is neither among the newest `keep` nor a multiple of `keep_every`; checkpoints from beyond this step are of another attempt."""
        if self.rank:
            return
        try:
            past = [other for other in self.store.whole() if other <= name]
            for old in past[: -self.cfg.keep]:
                if self.cfg.keep_every is None or int(old) % self.cfg.keep_every:
                    self.store.remove(old)
        except (OSError, UserError) as error:  # the new one is safe
            self.say(f"{self.store.url}: an old checkpoint cannot be deleted ({self._reason(error)})")

    def _reason(self, error: BaseException) -> str:
        failures = getattr(error, "failures", None)
        rank = ""
        if failures:  # the first that failed, with its process
            number, (error, _) = min(failures.items())
            rank = f"process {number}: " if self.world > 1 else ""
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        return rank + where + (" ".join(text.split()) or type(error).__name__)

    def _is_latest(self, name: str) -> bool:
        try:
            return name == self.store.latest()
        except (OSError, UserError):  # damaged, or out of reach: the save itself will tell
            return False

    # ------------------------------------------------ agreement
    def agree(self, ask: Callable[[], Any]) -> Any:
        """What process 0 finds, on all processes."""
        if self.group is None:
            return ask()
        box = [ask() if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def _gather(self, mine: Any) -> list[Any]:
        if self.group is None:
            return [mine]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, mine, group=self.group)
        return out


def versions() -> dict[str, str]:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {"python": sys.version.split()[0]} | {p: version(p) for p in ("unlabeled", "torch", "numpy", "deepspeed")}


# ---------------------------------------------------------------- loading
def find_for_all(store: Store, wanted: int | str) -> tuple[Store, str] | None:
    """`find`, asked by process 0 for all."""
    found = processes.first(lambda: None if (it := find(store, wanted)) is None else (it[0].url, it[1]))
    return None if found is None else (open_folder(found[0], store.seconds), found[1])


def find(store: Store, wanted: int | str) -> tuple[Store, str] | None:
    """(store, name) of the checkpoint that `checkpoint.resume` means: latest, none, a step of this store, or a path or URL; None for none."""
    if wanted == "none":
        return None
    if wanted == "latest":
        name = store.latest()
        return None if name is None else (store, name)
    folder, _, name = str(wanted).rstrip("/").rpartition("/")
    if not folder and not name.isdigit():
        folder = "."
    there = open_folder(folder, store.seconds) if folder else store
    name = name_of(int(name)) if name.isdigit() else name
    if there.size(name, "run.json") is None:
        has = ", ".join(str(int(n)) for n in there.whole()) or "none"
        raise UserError(f"checkpoint.resume = {wanted}: no complete checkpoint there; {there.url} has: {has}")
    return there, name


def load(store: Store, name: str, engine: Engine, stream: Stream, **parts: Any) -> int:
    """Restore engine, stream, and further parts (with state_dict and load_state_dict); the step to go on with.

    Raises UserError (Damaged) that names the file, where one is not as it was written, or the checkpoint is of another model.
    """
    about = store.about(name)
    metadata = read_metadata(store, name, about["files"])
    state = {**engine.state_dict(), **{key: part.state_dict() for key, part in parts.items()}}
    unlike = differences(state, metadata)
    if unlike:
        more = f" and {len(unlike) - 3} more" if len(unlike) > 3 else ""
        raise UserError(f"{store.path(name)}: is a checkpoint of another model: {'; '.join(unlike[:3])}{more}")
    stream.load_state_dict(about["stream"])  # refuses other data before anything is changed
    _read(store, name, about["files"], metadata, state)
    engine.load_state_dict(state)
    for key, part in parts.items():
        part.load_state_dict(state[key])
    return about["step"]


def load_model(store: Store, name: str, module: torch.nn.Module) -> None:
    """Restore an objective's weights alone."""
    files = store.about(name)["files"]
    state = {"model": module.state_dict()}
    _read(store, name, files, read_metadata(store, name, files), state)
    module.load_state_dict(state["model"])


def _read(store: Store, name: str, files: Files, metadata: Any, state: dict[str, Any]) -> None:
    """Fill `state` from the checkpoint's files."""
    fill(state, Reader(store, name, files, metadata), store.path(name), alone=not dist.is_initialized())


__all__ = ["Damaged", "Saver", "all_of", "find", "load", "load_model", "name_of", "store_of"]
