"""Evaluate the exports of runs as jobs of their own, with the resources of another profile, while the runs train.

`launch.slurm` queues `watch_job` as a small job beside the training. It starts `python -m launch.evaluation_jobs FOLDER`,
which watches the runs of a job's folder: it submits a job for each evaluation that is due, again if one fails, and ends
when the runs have ended and nothing is due. It keeps what it has done in RUN/evaluations/NAME.json, so that it can be
killed and started again at any time, anywhere where sbatch works. This module does not import torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import build_config
from common.errors import UserError, run_main
from common.line_file import LineFile
from common.output import say
from eval import results
from launch import batch_script, run_jobs, slurm_client, snapshot
from launch.clusters import Cluster
from launch.due_evaluations import due, name_of
from launch.rank_records import END, read_record, record
from pretrain.recipes.recipe import stored
from pretrain.run_folder.run_lock import Lock
from pretrain.run_folder.written_files import EVALUATIONS, RECIPE
from pretrain.signals import EXIT_STOPPED, EXIT_UNSCORED

ATTEMPTS = 3  # of an evaluation, after which it is recorded as failed
POLL = 2.0  # seconds between two looks at the files of the runs
ASK_SECONDS = 15.0  # between two questions to Slurm
REFUSED_SECONDS = 60.0  # between two attempts to submit, after sbatch has refused
RESTARTS = 3  # how often a watcher that has died is started again in its job
REQUEUE_SECONDS = 120.0  # that Slurm has to end a job that is requeued
WATCHER = "watch.json"  # file in the job's folder: the id of the watcher's job
SMALL = {"nodes": 1, "gpus": 0, "processes": 1, "cpus": 1, "memory_gb": 2.0, "container": "", "mounts": []}  # watcher


# ---------------------------------------------------------------- the watcher's job
def submit_watcher(folder: Path) -> list[str]:
    """Queue a watcher for the runs of a job's folder if their exports are evaluated by jobs, and none is in the queue.
    Returns lines that say what was done."""
    job = read_record(folder / "job.json")
    if not job.get("evaluation"):
        return []
    name = read_record(folder / WATCHER).get("id", "")
    if name and (found := slurm_client.jobs([name]).get(name)) is not None and found.state in slurm_client.ACTIVE:
        return []
    for run in job["runs"]:
        _forget_ended(Path(run))
    cluster: Cluster = build_config.build(Cluster, job["evaluation"], {})
    code = snapshot.write(folder.parent)
    try:
        executor = batch_script.executor(f"{folder.name}-watch", folder, code, cluster.replace(**SMALL))
        (name,) = batch_script.submit(executor, watch_job, [str(folder)])
    except UserError as error:
        return [f"exports are not evaluated: {error}; the same command tries again"]
    record(folder / WATCHER, id=name)
    return [f"{folder}: exports are evaluated by jobs, which job {name} submits"]


def _forget_ended(run: Path) -> None:
    """Delete the records of evaluations that have failed, or ended without a row, so that a new watcher starts them
    again."""
    folder = run / EVALUATIONS
    for path in [*folder.glob("*.json")] if folder.is_dir() else []:
        if path.name.endswith(END) or read_record(path).get("failed") or (folder / f"{path.stem}{END}").exists():
            path.unlink(missing_ok=True)


def watch_job(folder: str) -> None:
    """Run the watcher in a job; submitit calls this in the batch script. The job requeues itself at its time limit."""
    asked: list[int] = []
    signal.signal(signal.SIGUSR2, lambda number, frame: asked.append(number))
    code = 0
    for _ in range(RESTARTS + 1):
        watcher = subprocess.Popen([sys.executable, "-P", "-m", "launch.evaluation_jobs", folder])
        while watcher.poll() is None and not asked:
            time.sleep(0.2)
        if asked:
            watcher.kill()
            watcher.wait()
            slurm_client.ask("scontrol", "requeue", os.environ["SLURM_JOB_ID"])
            time.sleep(REQUEUE_SECONDS)  # Slurm ends this process
            sys.exit(EXIT_STOPPED)
        code = watcher.returncode
        if code in (0, 2, EXIT_UNSCORED):
            break
        say(f"the watcher ended with code {code}; it is started again", file=sys.stderr)
    sys.exit(code if code >= 0 else 128 - code)


# ---------------------------------------------------------------- the watcher
@dataclass(frozen=True)
class Evaluation:
    """One export on one split."""

    model: str  # the folder of the export, or the name of a baseline
    step: int
    split: str

    @property
    def name(self) -> str:
        return f"{name_of(self.model)}-{self.step}-{self.split}"


class Watcher:
    """Sees to the evaluations of one run. `folder`: of its job."""

    def __init__(self, run: Path, folder: Path, cluster: Cluster):
        self.run, self.folder, self.cluster = run, folder, cluster
        self.records = run / EVALUATIONS
        self.lock: Lock | None = None
        self.asked = self.refused = float("-inf")  # when Slurm was asked, and when sbatch refused a job
        self.queued: dict[str, list[slurm_client.Queued]] = {}
        self.refusal = ""
        self.changed = 0  # modification time of recipe.yaml when `recipe` was read

    def say(self, line: str) -> None:
        say(line)
        LineFile(self.run / "log.txt").add(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def look(self, training: bool) -> bool:
        """Submit what is due, and see to jobs that have ended. `training`: whether the run may write further exports.
        Returns whether anything is left to do."""
        if not (self.run / RECIPE).is_file() or not self._locked():
            return training
        open_ones = self._open()
        names = [self.job_name(one) for one in open_ones if self._record(one)]
        if names and time.monotonic() > self.asked + ASK_SECONDS:
            self.queued, self.asked = slurm_client.states_of(names), time.monotonic()
        ended = {path.name for path in self.records.iterdir()} if open_ones else set()  # looks at the disk anew
        for one in open_ones:
            self._see_to(one, f"{one.name}{END}" in ended)
        return training or bool(open_ones)

    def _locked(self) -> bool:
        """Whether this is the only watcher of the run; another one may have been left by an earlier job."""
        if self.lock is None:
            lock = Lock()
            with contextlib.suppress(UserError):
                self.records.mkdir(exist_ok=True)
                lock.take(self.records)
                self.lock = lock
        return self.lock is not None

    def job_name(self, one: Evaluation) -> str:
        """The name of an evaluation's job, by which squeue finds it although this process was killed before it noted the
        id. It tells runs of the same name apart."""
        inode = self.records.stat().st_ino
        return f"{self.run.name}-{one.name}-{inode}".replace(",", "_").replace("|", "_")

    def _open(self) -> list[Evaluation]:
        """Evaluations without rows that have not failed for good."""
        changed = (self.run / RECIPE).stat().st_mtime_ns
        if changed != self.changed:
            self.recipe, self.changed = stored(self.run), changed
        known = results.evaluated(self.run / "results.jsonl")
        found = (Evaluation(*job) for job in due(self.run, self.recipe))
        left = [one for one in found if (name_of(one.model), one.step, one.split) not in known]
        return [one for one in left if not self._is_over(one)]

    def _is_over(self, one: Evaluation) -> bool:
        """Whether an evaluation has failed for good, or succeeded although it has no rows."""
        return bool(self._record(one).get("failed")) or self._end(one).get("code") == 0

    def _record(self, one: Evaluation) -> dict[str, Any]:
        return read_record(self.records / f"{one.name}.json")

    def _end(self, one: Evaluation) -> dict[str, Any]:
        """What the job of the last attempt has recorded at its end; {} if it has not ended by itself."""
        return read_record(self.records / f"{one.name}{END}")

    def _see_to(self, one: Evaluation, has_end: bool) -> None:
        """Submit an evaluation, or judge the job that was submitted for it."""
        known = self._record(one)
        attempt = known.get("attempt", 0)
        if attempt:
            end = self._end(one) if has_end else {}
            states = [job.state for job in self.queued.get(self.job_name(one), [])]
            ended = end.get("attempt") == attempt
            if not ended and any(state in slurm_client.ACTIVE for state in states):
                return
            if not ended and known["submitted"] + ASK_SECONDS > time.time() - (time.monotonic() - self.asked):
                return  # Slurm was last asked before, or just when, the job was submitted
            if not ended and not known.get("id") and not states:
                attempt -= 1  # killed before sbatch had accepted it
            else:
                reason = end.get("reason") or f"job {known.get('id')} ended as {(states or ['UNKNOWN'])[-1]}"
                if attempt >= ATTEMPTS:
                    return self._fail(one, f"{attempt} attempts failed; the last one: {reason}")
                self.say(f"evaluation of {one.model} on {one.split} failed and is tried again: {reason}")
        self._submit(one, attempt + 1)

    def _submit(self, one: Evaluation, attempt: int) -> None:
        if time.monotonic() < self.refused + REFUSED_SECONDS:
            return
        path = self.records / f"{one.name}.json"
        logs = self.folder / EVALUATIONS
        logs.mkdir(exist_ok=True)
        executor = batch_script.executor(
            self.job_name(one), logs, snapshot.write(self.folder.parent), self.cluster.replace(nodes=1, processes=1)
        )
        before = self._record(one)
        (self.records / f"{one.name}{END}").unlink(missing_ok=True)
        record(path, attempt=attempt, submitted=time.time())  # first, so that it is never submitted twice
        arguments = (self.folder, self.run, one.model, one.step, one.split, attempt)
        try:
            (name,) = batch_script.submit(executor, evaluation_job, *([str(value)] for value in arguments))
        except UserError as error:
            record(path, **before)
            self.refused = time.monotonic()
            if str(error) != self.refusal:
                self.say(f"evaluation of {one.model} on {one.split} waits: {error}")
            self.refusal = str(error)
            return
        record(path, attempt=attempt, submitted=time.time(), id=name)
        say(f"{one.name}: job {name}, attempt {attempt}")

    def _fail(self, one: Evaluation, reason: str) -> None:
        record(self.records / f"{one.name}.json", failed=reason)
        self.say(f"evaluation of {one.model} on {one.split} failed: {reason}")


def watch(folder: Path) -> int:
    """Watch the runs of a job's folder until they have ended and are evaluated. Returns EXIT_UNSCORED if an evaluation
    failed for good, otherwise 0."""
    job = json.loads((folder / "job.json").read_text())
    cluster: Cluster = build_config.build(Cluster, job["evaluation"], {})
    watchers = [Watcher(Path(run), folder, cluster) for run in job["runs"]]
    asked, training = float("-inf"), dict.fromkeys((one.run for one in watchers), True)
    while True:
        if time.monotonic() > asked + ASK_SECONDS:
            with contextlib.suppress(UserError):  # the controller does not answer
                training = {one.run: run_jobs.is_active(one.run) for one in watchers}
                asked = time.monotonic()
        left = False
        for one in watchers:
            try:
                left |= one.look(training[one.run])
            except UserError as error:  # the controller does not answer, or the recipe is just being written
                say(str(error))
                left = True
        if not left:
            break
        time.sleep(POLL)
    for one in watchers:
        if one.lock is not None:
            one.lock.release()
    return EXIT_UNSCORED if any(failed(one.run) for one in watchers) else 0


def failed(run: Path) -> list[str]:
    """The names of the evaluations of a run that have failed for good."""
    records = (run / EVALUATIONS).glob("*.json")
    return sorted(path.stem for path in records if read_record(path).get("failed"))


# ---------------------------------------------------------------- an evaluation's job
def evaluation_job(folder: str, run: str, model: str, step: str, split: str, attempt: str) -> None:
    """Evaluate one export in a job; submitit calls this in the batch script. How it ended is recorded for the watcher;
    a job that Slurm ends, for example to requeue it, records nothing."""
    one = Evaluation(model, int(step), split)
    job = json.loads((Path(folder) / "job.json").read_text())
    cluster: Cluster = build_config.build(Cluster, job["evaluation"], {})
    nodes = slurm_client.ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    words = batch_script.srun(cluster, nodes, 1, batch_script.cores_of_job())
    words += [batch_script.python(cluster), "-P", "-m", "launch.watch", run, model, step, split]
    done = subprocess.run(words, stderr=subprocess.PIPE, text=True, errors="replace")
    say(*done.stderr.splitlines())
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("srun: ")]
    reason = " | ".join(lines[-3:]) or f"it ended with code {done.returncode}"
    path = Path(run) / EVALUATIONS / f"{one.name}{END}"
    record(path, attempt=int(attempt), code=done.returncode, reason=reason if done.returncode else "")
    sys.exit(done.returncode)


if __name__ == "__main__":
    from launch.evaluation_jobs import watch as watch_runs  # not of __main__, whose functions no job would find

    sys.exit(run_main(lambda: watch_runs(Path(sys.argv[1]))))
