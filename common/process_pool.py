"""A pool of worker processes. Each worker is an ordinary command that reads one line of JSON per task from standard
input and writes its answers as lines of JSON to standard output; nothing is forked or pickled.

A worker ends soon after the process that started it has ended, so that no worker of a killed build continues to write.
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

from common.errors import DataError, UserError

Report = Callable[[int], None]  # called with the number of rows that have been finished since the last call
Work = Callable[[dict[str, Any], dict[str, Any], Report], dict[str, Any]]  # (settings, task, report) → result, all JSON
MIN_REPORT_SECONDS = 0.2  # between two reports of a worker


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    work: Work, settings: dict[str, Any], tasks: Sequence[dict[str, Any]], processes: int, report: Report
) -> Iterator[dict[str, Any]]:
    """Run `work` for all tasks, and yield the results in the order in which the tasks are finished.

    `processes` worker processes share the tasks. With one process or one task, `work` runs in this process. The workers
    run the module that defines `work` as a command, so its `if __name__ == "__main__":` has to call `serve(work)`.
    Raises DataError if a task raises a UserError, or if a worker is killed, and RuntimeError if a worker fails
    otherwise.
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
    pool = [_Worker(work.__module__, settings, waiting, answers) for _ in range(processes)]
    try:
        unfinished = len(tasks)
        while unfinished:
            answer = answers.get()
            if "rows" in answer:
                report(answer["rows"])
            elif "error" in answer:
                raise DataError(answer["error"])
            elif "bug" in answer:
                raise RuntimeError(answer["bug"])
            else:
                unfinished -= 1
                yield answer["answer"]
    finally:
        for worker in pool:
            worker.stop()


class _Worker:
    """A worker process and the thread that sends tasks to it."""

    def __init__(self, module: str, settings: dict, waiting: queue.SimpleQueue, answers: queue.SimpleQueue):
        self.waiting, self.answers = waiting, answers
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by stop)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        # -P: do not import modules from the current folder, which may hold a torch.py or eval.py of the user
        command = [sys.executable, "-P", "-m", module]
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.stderr, text=True, env=environment
        )
        self.thread = threading.Thread(
            target=self._send_tasks, args=({**settings, "parent": os.getpid()},), daemon=True
        )
        self.thread.start()

    def _send_tasks(self, settings: dict[str, Any]) -> None:
        """Send the settings and then task after task, and put the worker's answers into `answers`. Runs in a thread."""
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
                    raise BrokenPipeError  # the worker has ended without an answer to the task
        except queue.Empty:
            self.process.stdin.close()
        except (OSError, ValueError):
            self.answers.put(self._failure())

    def _send(self, message: dict[str, Any]) -> None:
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def _failure(self) -> dict[str, str]:
        code = self.process.wait()
        if code < 0:
            return {
                "error": f"a worker process was killed by signal {-code}; the usual cause is a lack of memory. Run"
                " the same command again to continue; --workers 1 needs less memory"
            }
        self.stderr.seek(0)
        return {"bug": f"a worker process ended with exit status {code}:\n{self.stderr.read()[-4000:]}"}

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.thread.join()
        self.process.stdout.close()
        self.stderr.close()


def serve(work: Work) -> None:
    """The main function of a worker process: read tasks from standard input and write answers to standard output."""
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not be mixed with the answers
    settings = json.loads(sys.stdin.readline())
    parent, rows, reported_at = settings.pop("parent"), 0, time.monotonic()

    def send(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    def report(count: int) -> None:
        nonlocal rows, reported_at
        if os.getppid() != parent:  # the process that started this worker has ended
            os._exit(1)
        rows += count
        if time.monotonic() - reported_at > MIN_REPORT_SECONDS:
            send({"rows": rows})
            rows, reported_at = 0, time.monotonic()

    for line in sys.stdin:
        try:
            answer = work(settings, json.loads(line), report)
        except UserError as error:
            send({"error": str(error)})
            continue
        send({"rows": rows})
        rows = 0
        send({"answer": answer})
