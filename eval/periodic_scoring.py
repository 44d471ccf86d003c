"""Scoring of exports while a run trains: checks the data and the protocols of the recipe's `eval` section before the
run starts, and supervises the process that scores exports (launch/watch.py)."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import build_config
from common.child_signals import signal_name, signals_blocked
from common.errors import Damaged, DataError, UserError
from common.output import say
from data_pipeline.parts.caption import Caption
from data_pipeline.shards.samples import Samples
from data_pipeline.shards.token_rows import Rows
from eval.protocol_finder import CAPTIONS, CLASSES, IMAGES, LABELS, QUERY_LABELS, QUERY_MASKS, TOKENS, needs
from eval.run import refuse_files
from eval.tiers import Task, tasks
from pretrain.objectives import finder
from pretrain.recipes.recipe import Recipe
from pretrain.run_folder.prepare import check_data
from pretrain.run_folder.written_files import BEGUN
from pretrain.signals import EXIT_UNSCORED

NO_GALLERY = (
    QUERY_LABELS,
    QUERY_MASKS,
    CLASSES,
    CAPTIONS,
    TOKENS,
    IMAGES,
)  # what protocols need that only read the query
MAX_RESTARTS = 3  # of a scoring process that has died
SCORED_ELSEWHERE = "UNLABELED_SCORED_ELSEWHERE"  # environment variable: not "" if other jobs score the exports


# ---------------------------------------------------------------- before the run starts
def check(recipe: Recipe) -> None:
    """Raises UserError if an evaluation would fail: for missing shards, for shards without what a protocol needs
    (labels of two classes, masks, depth, captions), for an unknown protocol or one that does not fit the model, or for
    an option that the protocol does not have."""
    check_data(recipe)
    cfg = recipe.eval
    if cfg.health and recipe.model.reads != "image":
        raise UserError(
            f"eval.health = {cfg.health}: measures models of images, but this one reads {recipe.model.reads}"
        )
    if cfg.full.protocols and not (cfg.full.query or cfg.val):
        raise UserError(
            f"eval.full names {', '.join(cfg.full.protocols)}, but no shards; write eval.val=SHARDS, or"
            " eval.full.query=SHARDS"
        )
    for split, task in tasks(recipe).items():
        if split != "train":
            _check_task(recipe, task)


def _check_task(recipe: Recipe, task: Task) -> None:
    """Raises UserError if the protocols of a task do not fit the model of the recipe or the shards."""
    with _errors_about(task.tier):
        needed = {name: needs(name) for name in task.protocols}
        configs = {name: _config(task, name) for name in needed}
        refuse_files([*configs.items()])
    for name, need in needed.items():
        if need == TOKENS:
            _check_tokens(recipe, task.query_key, task.query)
        elif need != LABELS and recipe.model.reads != "image":
            with _errors_about(task.tier):
                raise UserError(f"{name} scores models of images, but this one reads {recipe.model.reads}")
        if need in (CAPTIONS, CLASSES):
            with _errors_about(task.tier):
                _check_dual_encoder(recipe)
        if need not in NO_GALLERY:
            _check_shards(recipe, name, configs[name], "gallery", task.gallery_key, task.gallery)
        if need != TOKENS:
            _check_shards(recipe, name, configs[name], "query", task.query_key, task.query)


def _config(task: Task, name: str) -> Any:
    """The config of one protocol of a task. Raises UserError."""
    cls = importlib.import_module(f"eval.{name}").Config
    options = task.option_values().get(name, {})
    return build_config.build(cls, options, {"": f"{task.tier}.options"}, name + ".")


def _check_shards(recipe: Recipe, name: str, cfg: Any, role: str, key: str, shards: list[str]) -> None:
    """Raises UserError if the gallery or the query (`role`) lacks what a protocol needs. A protocol that needs other
    members than labels has a function `check_shards(shards, role, cfg)`."""
    if needs(name) in (LABELS, QUERY_LABELS, CLASSES):
        _check_labels(recipe, key, shards, 2 if role == "gallery" else 1)
    protocol = importlib.import_module(f"eval.{name}")
    with _errors_about(key):
        if not shards:
            raise DataError(f"is empty, but {name} needs shards; name some")
        if hasattr(protocol, "check_shards"):
            protocol.check_shards(shards, role, cfg)


@contextlib.contextmanager
def _errors_about(key: str) -> Iterator[None]:
    """Add the key of the recipe, and how to train without scores, to the message of a UserError in the context."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}; write eval.val=[] eval.test=[] to train without scores") from None


def _check_labels(recipe: Recipe, key: str, shards: Sequence[str], min_classes: int) -> None:
    """Raises UserError if shards have labels of fewer than `min_classes` classes."""
    from eval import feature_cache
    from eval.text_features import label_of

    with _errors_about(key):
        if not shards:
            raise DataError("is empty, but k-NN and linear probe need labelled shards; name some")
        samples = Samples(shards)
        read_label = label_of if recipe.model.reads == "tokens" else feature_cache.label_of
        if read_label is label_of and "txt" not in samples.extensions:
            raise DataError(f"{samples.names}: holds no .txt, so no labelled texts")
        found: set[str] = set()
        for number in _spread(len(samples)):
            with contextlib.suppress(Damaged):
                found.add(read_label(samples, number))
            if len(found) >= min_classes:
                return
        problem = f"all of its labels are {found.pop()!r}" if found else "none of its labels can be read"
        raise DataError(f"{samples.names}: {problem}, but {min_classes} classes are needed")


def _spread(count: int) -> Iterator[int]:
    """The numbers from 0 to count − 1, in an order in which the first ones are spread over the whole set, because a set
    may be sorted by class."""
    stride = max(1, count // 64)
    for first in range(stride):
        yield from range(first, count, stride)


def _check_tokens(recipe: Recipe, key: str, shards: Sequence[str]) -> None:
    """Raises UserError if shards are not token sets, or were made with another tokenizer than the training data."""
    with _errors_about(key):
        if recipe.model.reads != "tokens":
            raise DataError("bits_per_byte scores language models, but the model of this recipe reads images")
        data = recipe.data
        train_shards = [shard for source in data.mix for shard in source.shards[:1]] or data.train
        scored, trained = Rows(shards, 1), Rows(train_shards[:1], 1)
        if scored.blocks.hash != trained.blocks.hash:
            raise DataError(
                f"{scored.names}: was made with another tokenizer than {trained.names}; tokenize its text with"
                f" --tokenizer {train_shards[0]}/tokenizer.json"
            )


def _check_dual_encoder(recipe: Recipe) -> None:
    """Raises UserError if the recipe trains no model of captions."""
    parts = finder.find(recipe.objective.name).parts.values()
    if not any(isinstance(part, Caption) for part in parts):
        raise DataError(
            f"names a protocol that compares images with texts, but {recipe.objective.name} trains no model of"
            " captions; name protocols of images (knn, linear, …)"
        )


# ---------------------------------------------------------------- during the run
def _yield_to_training() -> None:
    """In the scoring process, before it starts: give the training processes precedence for the CPU, and end this
    process, not them, if the machine runs out of memory."""
    os.nice(10)
    with contextlib.suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text("500")


class Scoring:
    """Runs the process `python -m launch.watch RUN` from `start` until `finish` or `kill`, if the recipe names data for
    scores."""

    def __init__(self, recipe: Recipe):
        self.wanted = bool(tasks(recipe)) and not os.environ.get(SCORED_ELSEWHERE)
        self.problem = ""  # why some exports are not scored
        self._lock = threading.Lock()
        self._finishing = self._killed = False
        self._process: subprocess.Popen | None = None
        self._thread: threading.Thread | None = None

    def start(self, run: Path) -> None:
        """Start the process for a run folder."""
        if self.wanted:
            self.run = run
            (run / BEGUN).unlink(missing_ok=True)
            self._spawn()
            self._thread = threading.Thread(target=self._supervise, daemon=True)
            self._thread.start()

    def finish(self) -> str:
        """Wait until all exports are scored. Call it after the last export was written. Returns a message if some are
        not scored, or ""."""
        if self._thread is None:
            return ""
        with self._lock:
            self._finishing = True
            self._close_stdin()
        self._thread.join()
        return self.problem

    def kill(self) -> None:
        """End the process now."""
        with self._lock:
            self._killed = True
            if self._process is not None:
                self._process.kill()
                self._close_stdin()
        if self._thread is not None:
            self._thread.join()

    def _close_stdin(self) -> None:
        """Make the process end as soon as it has scored the existing exports."""
        assert self._process and self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _spawn(self) -> None:
        with signals_blocked():
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "launch.watch", str(self.run)],
                env={"OMP_WAIT_POLICY": "passive", **os.environ},
                stdin=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=_yield_to_training,
            )

    def _supervise(self) -> None:
        """Wait for the process, and start it again if it dies, at most MAX_RESTARTS times."""
        for restarts_left in reversed(range(MAX_RESTARTS + 1)):
            assert self._process is not None
            code = self._process.wait()
            with self._lock:
                if self._killed or code == 0:
                    return
                if code == EXIT_UNSCORED:
                    self.problem = (
                        f"{self.run}: trained, but evaluations failed; {self.run}/log.txt names them; the same command"
                        " tries again"
                    )
                    return
                end = f"was killed by {signal_name(-code)}" if code < 0 else f"ended with code {code}"
                say(f"the scoring process {end}{'; it is started again' if restarts_left else ''}", file=sys.stderr)
                if restarts_left:
                    self._spawn()
                    if self._finishing:
                        self._close_stdin()
        self.problem = (
            f"{self.run}: trained, but the scoring process died {MAX_RESTARTS + 1} times; the same command tries again"
        )
