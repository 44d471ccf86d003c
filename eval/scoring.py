"""Scoring beside the training: checks the data and protocols of `eval` before a run starts, and supervises the process
that scores exports (launch/watch.py)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.child_signals import signals_blocked
from common.errors import Damaged, DataError, UserError
from common.output import say
from data_pipeline.shards.rows import Rows
from data_pipeline.shards.samples import Samples
from eval.run import TEXT
from eval.run import check as check_names
from pretrain.recipes.recipe import Recipe
from pretrain.run_folder.prepare import check_data
from pretrain.signals import EXIT_UNSCORED

RESTARTS = 3  # how often a scoring process that has died is started again


# ---------------------------------------------------------------- before the run starts
def check(recipe: Recipe) -> None:
    """Raises UserError if an evaluation would fail: for missing shards, for shards without labels or with only one
    class, and for unknown protocols."""
    check_data(recipe)
    cfg = recipe.eval
    for query, names, key in (("val", cfg.periodic, "periodic"), ("test", cfg.final, "final")):
        if not (shards := getattr(cfg, query)):
            continue
        with _errors_about(f"eval.{key}"):
            check_names(names)
        if any(name in TEXT for name in names):
            _check_tokens(recipe, query, shards)
        if any(name not in TEXT for name in names):
            gallery = "test_gallery" if query == "test" and cfg.test_gallery else "gallery"
            _check_labels(recipe, query, shards, 1)
            _check_labels(recipe, gallery, getattr(cfg, gallery), 2)


@contextlib.contextmanager
def _errors_about(key: str) -> Iterator[None]:
    """Begin the messages of errors with the key of the recipe, and end them with a way to train without scores."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}; write eval.val=[] eval.test=[] to train without scores") from None


def _check_labels(recipe: Recipe, key: str, shards: Sequence[str], min_classes: int) -> None:
    """Raises UserError if shards have labels of fewer than `min_classes` classes."""
    from eval.texts import label_of

    with _errors_about(f"eval.{key}"):
        if not shards:
            raise DataError("is empty, but k-NN and linear probe need labelled shards; name some")
        samples = Samples(shards)
        label = {"image": Samples.label, "tokens": label_of}[recipe.model.reads]
        if label is label_of and "txt" not in samples.extensions:
            raise DataError(f"{samples.names}: holds no .txt, so no labelled texts")
        found: set[str] = set()
        for number in _spread(len(samples)):
            with contextlib.suppress(Damaged):
                found.add(label(samples, number))
            if len(found) >= min_classes:
                return
        seen = f"all of its labels are {found.pop()!r}" if found else "none of its labels can be read"
        raise DataError(f"{samples.names}: {seen}, but {min_classes} classes are needed")


def _spread(count: int) -> Iterator[int]:
    """The numbers from 0 to count − 1 in an order that soon reaches all parts of a set, which may be sorted by
    class."""
    stride = max(1, count // 64)
    return (number for first in range(stride) for number in range(first, count, stride))


def _check_tokens(recipe: Recipe, key: str, shards: Sequence[str]) -> None:
    """Raises UserError if shards are no token sets, or were made with another tokenizer than the training data."""
    with _errors_about(f"eval.{key}"):
        if recipe.model.reads != "tokens":
            raise DataError(f"{', '.join(TEXT)} scores language models, and this recipe's model reads images")
        data = recipe.data
        trained = [shard for source in data.mix for shard in source.shards[:1]] or data.train
        scored, own = Rows(shards, 1), Rows(trained[:1], 1)
        if scored.blocks.hash != own.blocks.hash:
            raise DataError(
                f"{scored.names}: was made with another tokenizer than {own.names}; tokenize its text with --tokenizer"
                f" {trained[0]}/tokenizer.json"
            )


# ---------------------------------------------------------------- during the run
class Scoring:
    """The process `python -m launch.watch RUN`, if the recipe names data to score on. It runs from `start` to `finish`
    or `kill`."""

    def __init__(self, recipe: Recipe):
        self.wanted = bool(recipe.eval.val or recipe.eval.test)
        self.problem = ""
        self._lock = threading.Lock()
        self._closing = self._killed = False
        self._process: subprocess.Popen | None = None
        self._thread: threading.Thread | None = None

    def start(self, run: Path) -> None:
        if self.wanted:
            self.run = run
            self._spawn()
            self._thread = threading.Thread(target=self._supervise, daemon=True)
            self._thread.start()

    def finish(self) -> str:
        """Wait until all exports are scored, after the last one was written. Returns "", or a message if some are
        not."""
        if self._thread is None:
            return ""
        with self._lock:
            self._closing = True
            self._close()
        self._thread.join()
        return self.problem

    def kill(self) -> None:
        with self._lock:
            self._killed = True
            if self._process is not None:
                self._process.kill()
                self._close()
        if self._thread is not None:
            self._thread.join()

    def _close(self) -> None:
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
                preexec_fn=lambda: os.nice(10) and None,
            )

    def _supervise(self) -> None:
        """Wait for the process, and start it again if it dies, at most RESTARTS times."""
        for left in reversed(range(RESTARTS + 1)):
            assert self._process is not None
            code = self._process.wait()
            with self._lock:
                if self._killed or code == 0:
                    return
                if code == EXIT_UNSCORED:
                    self.problem = (
                        f"{self.run}: trained, but evaluations failed; {self.run}/log.txt names them, and the same"
                        " command tries again"
                    )
                    return
                end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
                say(f"the process that scores {end}{'; it is started again' if left else ''}", file=sys.stderr)
                if left:
                    self._spawn()
                    if self._closing:
                        self._close()
        self.problem = (
            f"{self.run}: trained, but the process that scores died {RESTARTS + 1} times; the same command tries again"
        )
