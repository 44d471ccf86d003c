"""Writes a run's checkpoints: weights, teacher, optimizer state, position in the data, and recipe.

`Saver.save` writes while the training waits or while it continues (`checkpoint.mode`), tries a failed write again, and
updates `latest` once all bytes are durable. The states of random generators are not stored, because dropout and drop
path are drawn from (seed, step), and masks and crops from (seed, sample). `store.py` describes the folder of a
checkpoint.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from common import config
from common.errors import UserError
from data_pipeline.stream.stream import Stream
from pretrain.checkpoint.dcp_format import Writer
from pretrain.checkpoint.integrity import run_json_digest
from pretrain.checkpoint.open_store import run_store
from pretrain.checkpoint.store import checkpoint_name
from pretrain.parallel import processes, timeouts
from pretrain.parallel.engine import Engine
from pretrain.recipes.recipe import Recipe
from pretrain.run_folder.marker import run_identity, update_marker
from pretrain.run_folder.recipe_file import write_recipe

FORMAT = 2  # version of run.json


class Saver:
    """Writes a run's checkpoints. Collective: every rank must call each method at the same step.

    A method whose name begins with "_try" returns an error message, or None if it has succeeded.
    """

    def __init__(self, run: Path, recipe: Recipe, say: Callable[[str], None]):
        self.run, self.recipe, self.say, self.cfg = run, recipe, say, recipe.checkpoint
        self.store = run_store(run, recipe)
        # A separate gloo group: the messages of the thread that saves must not mix with those of the training, and NCCL
        # cannot send objects.
        self.group = timeouts.patient_group() if dist.is_initialized() else None
        self.rank = dist.get_rank() if self.group else 0
        self.world = dist.get_world_size() if self.group else 1
        self.thread = ThreadPoolExecutor(1, "checkpoint") if self.cfg.mode == "async" else None
        self.pending: Future[str | None] | None = None
        self.stager: DefaultStager | None = None
        self.identity: dict[str, str] = self._on_rank_0(lambda: run_identity(run))
        self.newest = ""  # name of the checkpoint that this process has written last, or has resumed from
        self.remembered = ""  # the folder of which `_remember_folder` has stored that it holds a checkpoint
        self._take_ownership()

    def save(self, step: int, engine: Engine, stream: Stream, last: bool = False, **parts: dict[str, Any]) -> None:
        """Write a checkpoint of engine, stream, and further parts (state dicts). With `checkpoint.mode: async` the call
        returns as soon as the tensors have been copied to host memory, except for the `last` checkpoint.

        Raises UserError if the checkpoint cannot be written and it is the last one or `checkpoint.on_error` is stop.
        """
        self.wait()
        name = checkpoint_name(step)
        if name == self.newest:
            return
        state = {**engine.state_dict(), **parts}
        run_json = {
            "format": FORMAT,
            "run": self.identity,
            "step": step,
            "encoder": engine.objective.encoder_path(),
            "stream": stream.state_dict(),
            "data": [{"shards": s.names, "samples": len(s), "id": s.id} for s in stream.samples],
            "recipe": config.to_dict(self.recipe),
            "versions": versions(),
            "processes": self.world,
        }
        if self.thread is None or last:
            self._raise_if(self._try_with_retries(name, state, run_json), last)
        else:
            copy = self._copy_to_host(state, engine.device.type == "cuda")
            self.pending = self.thread.submit(self._try_with_retries, name, copy, run_json)

    def wait(self) -> None:
        """Wait until a checkpoint that is written in the background is complete. Raises the error if that failed."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self._raise_if(pending.result())

    def check(self) -> None:
        """Raise the error of a checkpoint that failed in the background. With several ranks only `wait` raises it,
        because here they would not raise it at the same step."""
        if self.pending is not None and self.pending.done() and self.group is None:
            self.wait()

    def close(self) -> None:
        self.wait()
        if self.thread is not None:
            self.thread.shutdown()
        if self.stager is not None:
            self.stager.close()

    def _raise_if(self, problem: str | None, last: bool = False) -> None:
        if problem and (last or self.cfg.on_error == "stop"):
            raise processes.raised_by_all(UserError(problem))

    def _copy_to_host(self, state: dict[str, Any], gpu: bool) -> dict[str, Any]:
        """A copy in host memory that the training does not change. The next call overwrites it."""
        if self.stager is None:
            self.stager = DefaultStager(StagingOptions(gpu, False, False, gpu))
        return self.stager.stage(state)  # type: ignore[return-value]

    # ------------------------------------------------ ownership of the folder
    def _take_ownership(self) -> None:
        """Write owner.json. If the folder cannot be written, this fails before the first step."""
        problem = self._on_rank_0(self._try_to_set_owner)
        if problem and self.cfg.on_error == "stop":
            raise processes.raised_by_all(UserError(problem))
        if problem:
            self.say(f"{problem}; checkpoint.on_error is continue, so the run trains without checkpoints")

    def _try_to_set_owner(self) -> str | None:
        try:
            self.store.set_owner(self.identity)
        except (OSError, UserError) as error:
            return f"checkpoint.folder: {self._reason(error)}: no checkpoint can be written there"
        return None

    # ------------------------------------------------ writing
    def _try_with_retries(self, name: str, state: dict[str, Any], run_json: dict[str, Any]) -> str | None:
        """Write and publish a checkpoint, and then delete old ones. A failed attempt is repeated until
        `checkpoint.retry_seconds` have passed since the first failure."""
        first_failure, tries = 0.0, 0
        while True:
            problem = self._try_once(name, state, run_json)
            tries += 1
            if problem is None:
                self.newest = name
                self._delete_old(name)
                return None
            problem = f"{self.store.path(name)}: cannot write the checkpoint ({problem}); the one before it is kept"
            now = self._on_rank_0(time.monotonic)
            first_failure = first_failure or now
            if now >= first_failure + self.cfg.retry_seconds:
                if self.rank == 0:
                    self.say(f"{problem}; tried {tries} times")
                    with contextlib.suppress(OSError):  # half a checkpoint would keep the disk full
                        self.store.abandon(name)
                return problem
            if self.rank == 0 and tries == 1:
                self.say(f"{problem}; trying again for {self.cfg.retry_seconds:g} s")
            time.sleep(min(10.0, 0.2 * 2**tries))

    def _try_once(self, name: str, state: dict[str, Any], run_json: dict[str, Any]) -> str | None:
        begun: tuple[str, str | None] = self._on_rank_0(lambda: self._begin(name))
        folder, problem = begun
        if problem:
            return problem
        writer = Writer(self.store, folder)
        try:
            dcp.save(state, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
        except (Exception, CheckpointException) as error:  # CheckpointException is a BaseException
            problem = self._reason(error)
        results = self._all_gather((problem, writer.files))
        problem = next((problem for problem, _ in results if problem), None)
        if problem:
            return problem
        files = {file: entry for _, written in results for file, entry in written.items()}
        return self._on_rank_0(lambda: self._try_to_publish(folder, name, {**run_json, "files": files}))

    def _begin(self, name: str) -> tuple[str, str | None]:
        """(folder to write to, None), or ("", error message)."""
        try:
            owner = self.store.owner()
            if owner is not None and owner["id"] not in ("", self.identity["id"]):
                other = owner["folder"]
                return "", f"the folder has been taken by another run, {other}, which started at the same time"
            return self.store.begin(name), None
        except (OSError, UserError) as error:
            return "", self._reason(error)

    def _try_to_publish(self, folder: str, name: str, run_json: dict[str, Any]) -> str | None:
        try:
            for file, (size, *_) in run_json["files"].items():
                if self.store.size(folder, file) != size:
                    return (
                        f"rank 0 does not find {file}, which another rank has written; set checkpoint.folder to a"
                        " folder that all ranks share"
                    )
            run_json["digest"] = run_json_digest(run_json)
            self.store.publish(folder, name, json.dumps(run_json, indent=1).encode())
            self.store.set_latest(name)
            self._remember_folder()
            if self.cfg.resume != "latest":  # the run began at another checkpoint; from now on it resumes from its own
                update_marker(self.run, resumed_from=str(self.cfg.resume))
                self.cfg.resume = "latest"
                write_recipe(self.recipe, self.run)
        except (OSError, UserError) as error:
            return self._reason(error)
        return None

    def _remember_folder(self) -> None:
        """Store in the run folder where the run has saved a checkpoint. If the disk is full, the next call does."""
        with contextlib.suppress(UserError):
            if self.remembered != self.store.location():
                update_marker(self.run, saved_in=self.store.location())
                self.remembered = self.store.location()

    def _delete_old(self, name: str) -> None:
        """Delete the checkpoints up to `name`, except for the newest `keep`, those whose step is a multiple of
        `keep_every`, and those of other runs that somebody has copied to this folder. Checkpoints of later steps, which
        an earlier attempt has written, are kept."""
        if self.rank:
            return
        try:
            up_to_this = [other for other in self.store.complete_names() if other <= name]
            for old in up_to_this[: -self.cfg.keep]:
                due = self.cfg.keep_every is None or int(old) % self.cfg.keep_every
                if due and not self.store.is_of_another_run(old, (self.identity["id"],)):
                    self.store.delete(old)
        except (OSError, UserError) as error:  # the new checkpoint is safe
            self.say(f"{self.store.url}: an old checkpoint cannot be deleted ({self._reason(error)})")

    def _reason(self, error: BaseException) -> str:
        """An error in one line. For an error of DCP, that of the failed rank with the lowest number."""
        failures = getattr(error, "failures", None)
        rank = ""
        if failures:
            number, (error, _) = min(failures.items())
            rank = f"rank {number}: " if self.world > 1 else ""
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        file = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        return rank + file + (" ".join(text.split()) or type(error).__name__)

    # ------------------------------------------------ collectives
    def _on_rank_0(self, ask: Callable[[], Any]) -> Any:
        """Run `ask` on rank 0 and broadcast the result."""
        if self.group is None:
            return ask()
        box = [ask() if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def _all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in the order of ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values


def versions() -> dict[str, str]:
    """{"python" or a package: its version}, which run.json stores."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {"python": sys.version.split()[0]} | {p: version(p) for p in ("unlabeled", "torch", "numpy", "deepspeed")}
