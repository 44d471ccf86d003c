"""Tasks spread over processes: each is a plain command that reads a line of JSON per task and answers in lines of JSON (no fork, no pickle).

A worker ends as soon as the process that started it is gone, so that a killed build leaves nobody behind who still writes.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from data_pipeline.storage import DataError
from pretrain.errors import UserError

Report = Callable[[int], None]  # takes the number of rows that were done since the last call
Work = Callable[[dict[str, Any], dict[str, Any], Report], dict[str, Any]]  # (settings, task, report) → answer, all JSON
REPORT_SECONDS = 0.2


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    work: Work, settings: dict[str, Any], tasks: Sequence[dict[str, Any]], processes: int, report: Report
) -> Iterator[dict[str, Any]]:
    """The answers of `work` to all tasks, in the order in which they come. With one process or one task, it runs in this one.

    `work` lives in a module whose `__main__` part calls `serve(work)`. Raises DataError where a task does, or a process is killed.
    """
    processes = min(processes, len(tasks))
    if processes <= 1:
        for task in tasks:
            yield work(settings, task, report)
        return
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    answers: queue.SimpleQueue = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    crew = [_Worker(work.__module__, settings, waiting, answers) for _ in range(processes)]
    try:
        left = len(tasks)
        while left:
            answer = answers.get()
            if "rows" in answer:
                report(answer["rows"])
            elif "error" in answer:
                raise DataError(answer["error"])
            elif "bug" in answer:
                raise RuntimeError(answer["bug"])
            else:
                left -= 1
                yield answer["answer"]
    finally:
        for worker in crew:
            worker.stop()


class _Worker:
    """A process and the thread that feeds it."""

    def __init__(self, module: str, settings: dict, waiting: queue.SimpleQueue, answers: queue.SimpleQueue):
        self.waiting, self.answers = waiting, answers
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by stop)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", module]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.said, text=True, env=environment)
        self.thread = threading.Thread(target=self._feed, args=({**settings, "parent": os.getpid()},), daemon=True)
        self.thread.start()

    def _feed(self, settings: dict[str, Any]) -> None:
        try:
            self._send(settings)
            while True:
                self._send(self.waiting.get_nowait())
                for line in self.process.stdout:
                    answer = json.loads(line)
                    self.answers.put(answer)
                    if "rows" not in answer:
                        break
                else:
                    raise BrokenPipeError
        except queue.Empty:
            self.process.stdin.close()
        except (OSError, ValueError):
            self.answers.put(self._end())

    def _send(self, message: dict[str, Any]) -> None:
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def _end(self) -> dict[str, str]:
        code = self.process.wait()
        if code < 0:
            return {
                "error": f"a worker process was killed by signal {-code}, most often for lack of memory; "
                "the same command goes on, with --workers 1 in less memory"
            }
        self.said.seek(0)
        return {"bug": f"a worker process ended with code {code}:\n{self.said.read()[-4000:]}"}

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.thread.join()
        self.process.stdout.close()
        self.said.close()


def serve(work: Work) -> None:
    """The worker process: tasks come in on standard input, answers go out on what was standard output."""
    out, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not stand between the answers
    settings = json.loads(sys.stdin.readline())
    parent, rows, told = settings.pop("parent"), 0, time.monotonic()

    def send(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    def report(count: int) -> None:
        nonlocal rows, told
        if os.getppid() != parent:
            os._exit(1)
        rows += count
        if time.monotonic() - told > REPORT_SECONDS:
            send({"rows": rows})
            rows, told = 0, time.monotonic()

    for line in sys.stdin:
        try:
            answer = work(settings, json.loads(line), report)
        except UserError as error:
            send({"error": str(error)})
            continue
        send({"rows": rows})
        rows = 0
        send({"answer": answer})
