"""Writes the metrics of a run: a row per step in metrics.jsonl, TensorBoard, and the progress line. Values are copied
from the device once per `log.every` steps."""

from __future__ import annotations

import contextlib
import json
import resource
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.appended_lines import LineFile
from common.errors import UserError
from common.progress import Progress
from data_pipeline.storage.urls import write_atomically
from data_pipeline.stream.stream import Stream
from pretrain.parallel import processes
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.run_folder.scalars import BASELINES, scalars


class Clock:
    """Measures how much time the loop spends in each of its parts: data, model, loop, save."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}  # {part: seconds since the last `take`}
        self.start = self.last_lap = time.perf_counter()

    def lap(self, part: str) -> None:
        """Add the time since the last lap to `part`."""
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last_lap
        self.last_lap = now

    def take(self) -> tuple[float, dict[str, float]]:
        """(total seconds, {part: seconds}) since the last call. Restarts the clock."""
        now = time.perf_counter()
        measured = (now - self.start, self.parts)
        self.parts, self.start, self.last_lap = {}, now, now
        return measured


class Writer:
    """Averages values over ranks; rank 0 writes metrics.jsonl and TensorBoard, and prints the progress line.

    Rows of steps from `step` on are deleted, because a resumed run writes them again. `flops` is the number of FLOPs of
    a step with the first global batch, and `peak` the peak FLOP/s of all devices together; 0 if they are not known.
    `length`: tokens per row of text; 0 for images.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        steps: int,
        every: int,
        stream: Stream,
        device: torch.device,
        flops: float = 0.0,
        peak: float = 0.0,
        length: int = 0,
    ):
        self.run, self.every, self.stream, self.path = run, every, stream, run / "metrics.jsonl"
        self.device, self.flops, self.peak = device, flops, peak
        self.length = length
        self.trained_rows = sum(map(stream.plan.batch, range(step))) if length else 0  # rows of text until now
        self.last_val_loss: float | None = None
        self.pending: list[tuple[int, dict[str, Any]]] = []  # (step, its values), still on the device
        self.clock = Clock()
        self.writes = processes.rank() == 0
        if self.writes:
            rows = [row for row in read_rows(self.path) if row["step"] < step]
            write_atomically(str(self.path), ["".join(json.dumps(row) + "\n" for row in rows).encode()])
            self.board = Board(run / "tensorboard", step)
            self.progress = Progress("train", steps, step)
            self.lines, self.streams = LineFile(self.path), LineFile(run / "streams.jsonl")
        # Called with the rows once they are on the host, before they are written.
        self.readers: list[Callable[[list[dict[str, Any]]], None]] = []

    def add(self, step: int, **values: Tensor | float) -> None:
        """Add the scalars of a step, on any device. They are written once there are `every` rows."""
        self.pending.append((step, values))
        if (step + 1) % self.every == 0:
            self.flush()

    def flush(self) -> None:
        """Average all pending values over ranks, copy them from the device in one transfer, and write them.

        Collective: every rank must call it at the same step.
        """
        if not self.pending:
            return
        rows = self._averaged_rows()
        self._add_measurements(rows)
        problem = self._call_readers(rows)
        if self.writes:
            self._write(rows)
        self.pending = []
        if problem:
            raise problem

    def _averaged_rows(self) -> list[dict[str, Any]]:
        """The pending values as rows on the host; tensors are averaged over ranks."""
        tensors = [
            v.detach().float().reshape(()) for _, row in self.pending for v in row.values() if isinstance(v, Tensor)
        ]
        means = iter(processes.mean(torch.stack(tensors)).tolist() if tensors else [])
        return [
            {"step": step} | {k: next(means) if isinstance(v, Tensor) else v for k, v in row.items()}
            for step, row in self.pending
        ]

    def _add_measurements(self, rows: list[dict[str, Any]]) -> None:
        """Add speed, time shares, memory and stream statistics of these steps to the last row."""
        seconds, parts = self.clock.take()
        seconds -= parts.get("save", 0.0)
        last = rows[-1]
        samples = sum(self.stream.plan.batch(row["step"]) for row in rows)
        last["samples_per_second"] = round(samples / seconds, 2)
        if self.stream.budget is not None:
            last["samples"] = samples
        if self.length:
            self.trained_rows += samples
            last["tokens_per_second"] = round(samples * self.length / seconds, 1)
            last["tokens"] = self.trained_rows * self.length
        if self.flops:
            flops_per_second = self.flops * sum(self.stream.plan.work(row["step"]) for row in rows) / seconds
            last["flops_per_second"] = round(flops_per_second)
            last["mfu"] = round(flops_per_second / self.peak, 4)
        for part in ("data", "loop"):  # shares of the time: waiting for batches; the loop itself
            last[f"{part}_share"] = round(parts.get(part, 0.0) / seconds, 4)
        last["memory_gb"] = round(peak_memory(self.device) / 1e9, 3)
        figures, last["stage"] = self._stream_statistics(last["step"])
        last |= {f"stream/{key}": value for key, value in figures.items()}
        last["stream/damaged"] = len(self.stream.damage_log.bad)
        epochs = self.stream.epochs
        last |= {f"epoch/{n}" if len(epochs) > 1 else "epoch": round(value, 4) for n, value in enumerate(epochs)}

    def _stream_statistics(self, step: int) -> tuple[dict[str, float], str]:
        """(statistics, slowest stage) of the stream on the rank that waits longest for data. The statistics of all
        ranks are written to streams.jsonl."""
        per_rank = processes.gather(self.stream.stats.take(self.stream.workers))
        if len(per_rank) == 1:
            return per_rank[0]
        if self.writes:
            row = {"step": step, "processes": [{**figures, "stage": stage} for figures, stage in per_rank]}
            self.streams.add(json.dumps(row) + "\n")
        slowest = max(range(len(per_rank)), key=lambda n: per_rank[n][0]["wait_ms_p50"])
        figures, stage = per_rank[slowest]
        return {**figures, "process": slowest}, stage

    def _write(self, rows: list[dict[str, Any]]) -> None:
        last = rows[-1]
        for row in rows:
            self.last_val_loss = row.get("val_loss", self.last_val_loss)

        def add_to_board(board: Any) -> None:
            board.add_text("stage", last["stage"], last["step"])
            for step, values in scalars(rows).items():
                for name, value in values.items():
                    board.add_scalar(name, value, step)

        disk_has_room = self.lines.add("".join(json.dumps(row) + "\n" for row in rows))
        self.board.add(add_to_board, disk_has_room)
        self._update_progress(last)

    def _call_readers(self, rows: list[dict[str, Any]]) -> UserError | None:
        """Call the readers with the rows. Returns a UserError of theirs, which `flush` raises after writing the
        rows."""
        try:
            for reader in self.readers:
                reader(rows)
        except UserError as error:
            return error
        return None

    def _update_progress(self, row: dict[str, Any]) -> None:
        speed = f"{row['samples_per_second']:.0f} samples/s"
        if self.length:
            speed = f"{short(row['tokens_per_second'])} tokens/s  {short(row['tokens'])} tokens"
        loss = f"loss {row['loss']:.4f}"
        if self.last_val_loss is not None:
            loss += f" val {self.last_val_loss:.4f}"
        scores = read_rows(self.run / "results.jsonl")
        text = f"{loss}  {speed}  data wait {row['data_share']:.0%}{_knn_so_far(scores)}"
        # Scoring the last export on the test split will take as long as scoring the first export did.
        seconds = {
            (s["model"], s["step"], s["protocol"]): s.get("seconds", 0.0)
            for s in scores
            if s.get("split") == "test" and s["step"] == 0
        }
        self.progress.update(row["step"] + 1, text, extra=sum(seconds.values()))

    def close(self) -> str:
        """Write all pending rows and close the files. Returns a message about rows that could not be written, or ""."""
        self.flush()
        if not self.writes:
            return ""
        self.progress.close()
        all_written = self.lines.add()
        self.board.close()
        if all_written:
            return ""
        count = self.lines.waiting.count(b"\n")
        return f"{self.path}: {count} rows of metrics could not be written; make room on that disk for the next run"


class Board:
    """TensorBoard's event file. If the disk is full, entries are kept in memory, and written to a new file later.

    TensorBoard ignores the entries of steps from `step` on in earlier files of the folder; with None, none of them.
    """

    def __init__(self, folder: Path, step: int | None = None):
        self.folder = folder
        self.purge_step = step
        self.pending: list[Callable[[Any], None]] = []
        self.writer: Any = None

    def add(self, entry: Callable[[Any], None], disk_has_room: bool = True) -> None:
        """Let `entry` write to a SummaryWriter: now if the disk has room, else later."""
        self.pending.append(entry)
        if disk_has_room:
            with _quiet_thread():
                self._write()

    def _write(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.writer = self.writer or SummaryWriter(str(self.folder), purge_step=self.purge_step)
            for entry in self.pending:
                entry(self.writer)
            self.writer.flush()
            self.pending, self.purge_step = [], None  # a later file of this process must not hide these entries
        except OSError:  # the full disk has been reported by `LineFile` already
            self._end()

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            if self.writer is not None:
                self.writer.close()
        self.writer = None

    def close(self) -> None:
        with _quiet_thread():
            if self.pending:
                self._write()
            self._end()


@contextlib.contextmanager
def _quiet_thread() -> Iterator[None]:
    """Suppress the traceback that TensorBoard's thread prints for an OSError, which is also raised in the caller."""
    former_hook = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else former_hook(args)
    try:
        yield
    finally:
        threading.excepthook = former_hook


def _knn_so_far(scores: list[dict[str, Any]]) -> str:
    """The newest k-NN accuracy on val, as text for the progress line. If several models are exported, the accuracies of
    all, with their names. "" without scores."""
    knn = [
        s
        for s in scores
        if s["protocol"] == "knn"
        and s.get("split") == "val"
        and s["metric"] == "accuracy"
        and s["model"] not in BASELINES
    ]
    if not knn:
        return ""
    newest = {"" if s["model"] in ("untrained", "pretrained") else s["model"]: s["value"] for s in knn}
    text = f"{knn[-1]['value']:.1%}"
    if len(newest) > 1:
        each = (f"{textwrap.shorten(name or 'pretrained', 24)} {value:.1%}" for name, value in newest.items())
        text = ", ".join(each)
    return f"  k-NN so far {text} (step {knn[-1]['step']}{', with a note' if 'note' in knn[-1] else ''})"


def short(count: float) -> str:
    """A count with three significant digits, such as "12.3k" for 12345."""
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{name}"
    return f"{count:.0f}"


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes, on the GPU if `device` is one, otherwise on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
