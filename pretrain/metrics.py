"""Metrics: every step has its row in metrics.jsonl, but values stay on the device until `log.every` steps are read at once."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.stream import Stream
from pretrain.errors import UserError
from pretrain.parallel import processes
from pretrain.progress import Progress
from pretrain.run_folder import read_rows


class Clock:
    """Where the loop's time goes: seconds by part since the last `take`."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.began = self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Book the time since the last lap on `part`."""
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last
        self.last = now

    def take(self) -> tuple[float, dict[str, float]]:
        """(seconds in all, seconds by part), and start again."""
        now = time.perf_counter()
        out = (now - self.began, self.parts)
        self.parts, self.began, self.last = {}, now, now
        return out


class Writer:
    """Process 0 writes metrics.jsonl and TensorBoard, and shows the progress line; the others take part in what is averaged.

    Rows at or after `step` are dropped: a resumed run writes them anew. `flops` of a step, over the global batch, and the `peak` FLOP/s of all
    devices together give the model FLOP/s and their share of the peak (MFU).
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
    ):
        self.run, self.every, self.stream, self.path = run, every, stream, run / "metrics.jsonl"
        self.device, self.flops, self.peak = device, flops, peak
        self.waiting: list[tuple[int, dict[str, Any]]] = []
        self.clock = Clock()
        self.writes = processes.rank() == 0
        if self.writes:
            from torch.utils.tensorboard import SummaryWriter

            kept = [row for row in read_rows(self.path) if row["step"] < step]
            self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))
            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step)
            self.progress = Progress("train", steps, step)
            self.file = self.path.open("a")
        self.readers: list[
            Callable[[list[dict[str, Any]]], None]
        ] = []  # see rows when they reach the host, before they are written

    def add(self, step: int, **values: Tensor | float) -> None:
        """One step's scalars, on whatever device they are; written when `every` rows wait."""
        self.waiting.append((step, values))
        if (step + 1) % self.every == 0:
            self.flush()

    def flush(self) -> None:
        """Read all waiting values with one copy from the device, averaged over processes, and write them. All processes call it at the same step."""
        if not self.waiting:
            return
        rows = self._rows()
        self._measure(rows)
        problem = self._consult(rows)
        if self.writes:
            self._write(rows)
        self.waiting = []
        if problem:
            raise problem

    def _rows(self) -> list[dict[str, Any]]:
        tensors = [
            v.detach().float().reshape(()) for _, row in self.waiting for v in row.values() if isinstance(v, Tensor)
        ]
        numbers = iter(processes.mean(torch.stack(tensors)).tolist() if tensors else [])
        return [
            {"step": step} | {k: next(numbers) if isinstance(v, Tensor) else v for k, v in row.items()}
            for step, row in self.waiting
        ]

    def _measure(self, rows: list[dict[str, Any]]) -> None:
        """Add to the last row what these steps took."""
        total, parts = self.clock.take()
        total -= parts.get("save", 0.0)
        last = rows[-1]
        samples = sum(self.stream.plan.batch(row["step"]) for row in rows)
        last["samples_per_second"] = round(samples / total, 2)
        if self.flops:
            done = self.flops * samples / self.stream.plan.batch(0)
            last["flops_per_second"] = round(done / total)
            last["mfu"] = round(done / total / self.peak, 4)
        for part in ("data", "loop"):  # shares of the time: waiting for batches; the loop itself
            last[f"{part}_share"] = round(parts.get(part, 0.0) / total, 4)
        last["memory_gb"] = round(peak_memory(self.device) / 1e9, 3)
        figures, last["stage"] = self._streams(last["step"])
        last |= {f"stream/{key}": value for key, value in figures.items()}
        last["stream/damaged"] = len(self.stream.ledger.bad)
        epochs = self.stream.epochs
        last |= {f"epoch/{n}" if len(epochs) > 1 else "epoch": round(value, 4) for n, value in enumerate(epochs)}

    def _streams(self, step: int) -> tuple[dict[str, float], str]:
        """The figures of the process that waits longest for its data; those of all go to streams.jsonl."""
        everyone = processes.gather(self.stream.meter.take(self.stream.workers))
        if len(everyone) == 1:
            return everyone[0]
        if self.writes:
            with (self.run / "streams.jsonl").open("a") as file:
                row = {"step": step, "processes": [{**figures, "stage": stage} for figures, stage in everyone]}
                file.write(json.dumps(row) + "\n")
        slowest = max(range(len(everyone)), key=lambda n: everyone[n][0]["wait_ms_p50"])
        figures, stage = everyone[slowest]
        return {**figures, "process": slowest}, stage

    def _write(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        last = rows[-1]
        for key in last:
            if key == "stage":
                self.board.add_text("stage", last[key], last["step"])
            elif key != "step":
                values = [row[key] for row in rows if key in row]
                self.board.add_scalar(f"train/{key}", sum(values) / len(values), last["step"])
        self._show(last)

    def _consult(self, rows: list[dict[str, Any]]) -> UserError | None:
        """Let the readers see the rows; an error of theirs, to be raised when the rows are written."""
        try:
            for reader in self.readers:
                reader(rows)
        except UserError as error:
            return error
        return None

    def _show(self, row: dict[str, Any]) -> None:
        text = f"loss {row['loss']:.4f}  {row['samples_per_second']:.0f} samples/s  data wait {row['data_share']:.0%}"
        scores = read_rows(self.run / "results.jsonl")
        knn = [
            s
            for s in scores
            if s["protocol"] == "knn"
            and s.get("split") == "val"
            and s["metric"] == "accuracy"
            and s["model"] != "pixels"
        ]
        if knn:
            text += f"  k-NN so far {knn[-1]['value']:.1%} (step {knn[-1]['step']})"
        final = sum(
            {
                (s["model"], s["step"], s["protocol"]): s["seconds"]
                for s in scores
                if s.get("split") == "test" and s["step"] == 0
            }.values()
        )
        self.progress.update(row["step"] + 1, text, extra=final)  # the last export will be scored as the first was

    def close(self) -> None:
        self.flush()
        if self.writes:
            self.progress.close()
            self.board.close()
            self.file.close()


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: of the GPU where it is one, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
