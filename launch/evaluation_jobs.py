"""Evaluate the exports of runs in Slurm jobs of their own, while the runs train. A profile of the cluster says which
resources these jobs get.

There are three kinds of jobs. The training job trains the runs of a folder. The watcher is a small job beside it, which
`submit_watcher` queues: `watch_job` starts `python -m launch.evaluation_jobs FOLDER` in it. Whenever an evaluation of an
export is due, the watcher submits an evaluation job, which runs `launch.watch`; a job that fails is submitted again, up
to ATTEMPTS times. The watcher ends when the runs have ended and no evaluation is due.

RUN/evaluations/NAME.json records what was submitted and how it ended, so that the watcher can be killed and started
again at any time, on any machine that has sbatch. This module does not import torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import build_config
from common.appended_lines import LineFile
from common.errors import UserError, run_main
from common.output import printable, say
from launch import batch_script, code_snapshot, job_of_run, slurm_client
from launch.changed_lines import ChangedLines
from launch.clusters import Cluster
from launch.due_evaluations import due, name_of
from launch.evaluation_states import WATCHER, cancel_jobs, is_cancelled, record_files
from launch.rank_records import END, read_record, record
from pretrain.recipes.recipe import stored
from pretrain.run_folder.marker import run_identity
from pretrain.run_folder.run_lock import Lock, living_holder
from pretrain.run_folder.written_files import EVALUATION_ENDS, EVALUATIONS, RECIPE
from pretrain.signals import EXIT_STOPPED, EXIT_UNSCORED
from pretrain.trackers.trackers import UNCHANGED
from pretrain.trackers.tracking import Tracking

ATTEMPTS = 3  # of an evaluation, after which it is recorded as failed
POLL = 2.0  # seconds between two looks at the files of the runs
ASK_SECONDS = 15.0  # between two questions to Slurm
REFUSED_SECONDS = 60.0  # between two attempts to submit, after sbatch has refused
MAX_REFUSALS = 10  # in a row, after which an ended run's evaluations are recorded as failed
RESTARTS = 3  # how often a watcher that has died is started again in its job
RESTART_SECONDS = 5.0  # before it is started again, as a file system may need time to recover
GRACE_SECONDS = 5.0  # in which a watcher that is asked to end releases its locks; then it is killed
SMALL = {"nodes": 1, "gpus": 0, "processes": 1, "cpus": 1, "memory_gb": 2.0, "container": "", "mounts": []}  # watcher


# ---------------------------------------------------------------- the watcher's job
def submit_watcher(folder: Path) -> list[str]:
    """Queue a watcher for the runs of a job's folder if their exports are evaluated by jobs, and none is in the queue.
    Returns lines that say what was done."""
    try:
        job = job_of_run.read_folder(folder)
    except UserError as error:
        return [f"exports are not evaluated: {error}"]
    if not job.get("evaluation"):
        return []
    name = read_record(folder / WATCHER).get("id", "")
    if name and (found := slurm_client.jobs([name]).get(name)) is not None and found.state in slurm_client.ACTIVE:
        return []
    for run in job["runs"]:
        _forget_ended(Path(run))
    cluster: Cluster = build_config.build(Cluster, job["evaluation"], {})
    code = code_snapshot.write(folder.parent)
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
    records, ends = record_files(run), record_files(run, EVALUATION_ENDS)
    ended = {path.name.removesuffix(END) for path in ends}
    for path in [*(path for path in records if path.stem in ended or read_record(path).get("failed")), *ends]:
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
            watcher.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                watcher.wait(GRACE_SECONDS)
            watcher.kill()
            watcher.wait()
            slurm_client.repeated(lambda: slurm_client.ask("scontrol", "requeue", os.environ["SLURM_JOB_ID"]), say)
            time.sleep(slurm_client.REQUEUE_SECONDS)  # Slurm ends this process
            sys.exit(EXIT_STOPPED)
        code = watcher.returncode
        if code in (0, 2, EXIT_UNSCORED):
            break
        say(f"the watcher ended with code {code}; it is started again", file=sys.stderr)
        time.sleep(RESTART_SECONDS)
    sys.exit(code if code >= 0 else 128 - code)


# ---------------------------------------------------------------- the watcher
Jobs = dict[str, list[slurm_client.Queued]]  # {name about which Slurm was asked: the jobs of that name}


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
        self.log, self.say_changed = LineFile(run / "log.txt"), ChangedLines(self.say)
        self.identity = ""  # of the run at the first look; a run that overwrites it has another one
        self.lock: Lock | None = None
        self.open: list[Evaluation] = []  # evaluations without rows that have not failed for good
        self.refused_at, self.refusal, self.refusals = float("-inf"), "", 0  # of sbatch, in a row
        self.changed = 0  # modification time of recipe.yaml when `recipe` was read

    def say(self, line: str) -> None:
        say(line)
        self.log.add(printable(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}") + "\n")

    def look(self, training: bool, jobs: Jobs, asked: float) -> bool:
        """Submit what is due, and see to jobs that have ended. Returns whether anything is left to do.

        `training`: whether the run may write further exports. `jobs`: {name: jobs} for `names`, as Slurm knew them at
        the time `asked`.
        """
        if not (self.run / RECIPE).is_file():
            return training
        identity = run_identity(self.run)["id"]
        if identity != (self.identity or identity):
            self.release()  # for the watcher of the new run
            return False
        self.identity = identity
        if is_cancelled(self.run):
            if self.lock is not None:  # a job may have been submitted while the others were cancelled
                cancel_jobs(self.run)
                self.say("evaluations are cancelled; `unlabeled launch` with the same recipe continues them")
            self.open = []
            self.release()
            return False
        if not self._locked():
            return training
        self.open = self._find_open()
        if any(job.state in slurm_client.ACTIVE for found in jobs.values() for job in found):
            self.refusals = 0  # sbatch may accept a job when this one has ended
        is_refused = not training and self.refusals >= MAX_REFUSALS
        if is_refused and not any(self._may_run(one, jobs, asked) for one in self.open):
            for one in self.open:
                self._fail(one, self.refusal)
            return False
        ended = {path.name for path in self.records.iterdir()} if self.open else set()  # looks at the disk anew
        for one in self.open:
            self._see_to(one, f"{one.name}{END}" in ended, jobs, asked)
        return training or bool(self.open)

    def names(self) -> list[str]:
        """The names of the jobs whose end is waited for."""
        attempts = [(one, self._record(one).get("attempt")) for one in self.open]
        return [self._job_name(one, attempt) for one, attempt in attempts if attempt]

    def _locked(self) -> bool:
        """Whether this is the only watcher of the run; another one may have been left by an earlier job."""
        if self.lock is None:
            lock = Lock()
            with contextlib.suppress(UserError):
                self.records.mkdir(exist_ok=True)
                lock.take(self.records)
                self.lock = lock
        return self.lock is not None and not self.lock.taken_over

    def release(self) -> None:
        """Release the lock, if this watcher has it."""
        if self.lock is not None:
            self.lock.release()
        self.lock = None

    def _job_name(self, one: Evaluation, attempt: int) -> str:
        """The name of a job, by which squeue finds it although this process was killed before it recorded the id. It
        tells runs of the same name apart."""
        inode = self.records.stat().st_ino
        return f"{self.run.name}-{one.name}-{inode}-{attempt}".replace(",", "_").replace("|", "_")

    def _find_open(self) -> list[Evaluation]:
        """Evaluations without rows that have not failed for good."""
        changed = (self.run / RECIPE).stat().st_mtime_ns
        if changed != self.changed:
            self.recipe, self.changed = stored(self.run), changed
        found = (Evaluation(*job) for job in due(self.run, self.recipe))
        return [one for one in found if not self._is_over(one)]

    def _is_over(self, one: Evaluation) -> bool:
        """Whether an evaluation has failed for good, or succeeded although it has no rows."""
        return bool(self._record(one).get("failed")) or self._end(one).get("code") == 0

    def _record(self, one: Evaluation) -> dict[str, Any]:
        return read_record(self.records / f"{one.name}.json")

    def _end(self, one: Evaluation) -> dict[str, Any]:
        """What the job of the last attempt has recorded at its end; {} if it has not ended by itself."""
        return read_record(self.records / f"{one.name}{END}")

    def _see_to(self, one: Evaluation, has_end: bool, jobs: Jobs, asked: float) -> None:
        """Submit an evaluation, or judge the job that was submitted for it."""
        known = self._record(one)
        attempt = known.get("attempt", 0)
        if attempt:
            end = self._end(one) if has_end else {}
            if end.get("attempt") != attempt and self._may_run(one, jobs, asked):
                return
            name = self._job_name(one, attempt)
            states = [job.state for job in jobs.get(name, [])]
            if not end and not states and not known.get("id"):
                attempt -= 1  # sbatch has not accepted the job
            else:
                reason = end.get("reason") or f"job {known.get('id', name)} ended as {(states or ['UNKNOWN'])[-1]}"
                if attempt >= ATTEMPTS:
                    return self._fail(one, f"{attempt} attempts failed; the last one: {reason}")
                self.say_changed(
                    one.name, f"evaluation of {one.model} on {one.split} failed and is tried again: {reason}"
                )
        self._submit(one, attempt + 1)

    def _may_run(self, one: Evaluation, jobs: Jobs, asked: float) -> bool:
        """Whether the job of the last attempt may be in the queue: Slurm has said so, or was not asked about it since it
        was submitted."""
        known = self._record(one)
        if not known.get("attempt"):
            return False
        found = jobs.get(self._job_name(one, known["attempt"]))
        if found is None or known.get("submitted", 0.0) + ASK_SECONDS > asked:
            return True
        return any(job.state in slurm_client.ACTIVE for job in found)

    def _submit(self, one: Evaluation, attempt: int) -> None:
        if time.monotonic() < self.refused_at + REFUSED_SECONDS:
            return
        path = self.records / f"{one.name}.json"
        logs = self.folder / EVALUATIONS
        logs.mkdir(exist_ok=True)
        name = self._job_name(one, attempt)
        arguments = (self.folder, self.run, self.identity, one.model, one.step, one.split, attempt)
        try:
            executor = batch_script.executor(
                name, logs, code_snapshot.write(self.folder.parent), of_evaluation(self.cluster)
            )
            (self.records / f"{one.name}{END}").unlink(missing_ok=True)
            record(path, attempt=attempt, submitted=time.time())  # first, so that it is never submitted twice
            (job,) = batch_script.submit(executor, evaluation_job, *([str(value)] for value in arguments))
        except UserError as error:  # the record stays: an sbatch that has timed out may have queued the job
            self.refused_at, self.refusals = time.monotonic(), self.refusals + 1
            self.refusal = str(error)
            self.say_changed("sbatch", f"evaluations wait: {error}")
            return
        self.refusals = 0
        record(path, attempt=attempt, submitted=time.time(), id=job)
        say(f"{one.name}: job {job}, attempt {attempt}")

    def _fail(self, one: Evaluation, reason: str) -> None:
        record(self.records / f"{one.name}.json", failed=reason)
        self.say(f"evaluation of {one.model} on {one.split} failed: {reason}")


def of_evaluation(cluster: Cluster) -> Cluster:
    """The resources of an evaluation's job, which is one process, from a profile."""
    return cluster.replace(nodes=1, processes=1)


def watch(folder: Path) -> int:
    """Watch the runs of a job's folder until they have ended and are evaluated. Returns EXIT_UNSCORED if an evaluation
    failed for good, otherwise 0."""
    job = job_of_run.read_folder(folder)
    if not job.get("evaluation"):
        raise UserError(f"{folder}: has no profile for evaluation jobs; launch the runs with --evaluation NAME")
    cluster: Cluster = build_config.build(Cluster, job["evaluation"], {})
    watchers = [Watcher(Path(run), folder, cluster) for run in job["runs"]]
    asked, training = 0.0, dict.fromkeys((one.run for one in watchers), True)
    jobs: Jobs = {}
    say_changed, left = ChangedLines(say), True
    try:
        while left:
            if time.time() > asked + ASK_SECONDS:
                with contextlib.suppress(UserError, OSError):  # the controller or the file system does not answer
                    now = time.time()
                    queue = job_of_run.in_queue([*training])
                    training = {run: run in queue or living_holder(run) is not None for run in training}
                    jobs = slurm_client.states_of(name for one in watchers for name in one.names())
                    asked = now
            left = False
            for one in watchers:
                try:
                    left |= one.look(training[one.run], jobs, asked)
                except (UserError, OSError) as error:  # the recipe is being written, the disk is full, …
                    say_changed(str(one.run), str(error))
                    left = True
            if left:
                time.sleep(POLL)
    finally:  # also at SIGTERM: the next watcher need not wait until the locks are stale
        for one in watchers:
            one.release()
    for one in watchers:
        with contextlib.suppress(UserError, OSError):  # no recipe: the run has not begun
            _send_scores(one.run)
    return EXIT_UNSCORED if any(failed(one.run) for one in watchers) else 0


def _send_scores(run: Path) -> None:
    """Send to the run's trackers the scores that have come since its training ended."""
    with Tracking(stored(run)) as tracking:
        tracking.start(run)
        tracking.ends_as(UNCHANGED)


def failed(run: Path) -> list[str]:
    """The names of the evaluations of a run that have failed for good."""
    return [path.stem for path in record_files(run) if read_record(path).get("failed")]


# ---------------------------------------------------------------- an evaluation's job
def evaluation_job(folder: str, run: str, identity: str, model: str, step: str, split: str, attempt: str) -> None:
    """Evaluate one export in a job; submitit calls this in the batch script. How it ended is recorded for the watcher;
    a job that Slurm ends, for example to requeue it, records nothing, nor does one whose run was overwritten.

    `identity`: of the run, when the job was submitted.
    """
    one = Evaluation(model, int(step), split)
    job = job_of_run.read_folder(Path(folder))
    cluster: Cluster = build_config.build(Cluster, job["evaluation"], {})
    nodes = slurm_client.ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    words = batch_script.srun(cluster, nodes, 1, batch_script.cores_of_job())
    words += [batch_script.python(cluster), "-P", "-m", "launch.watch", run, model, step, split, identity]
    done = subprocess.run(words, stderr=subprocess.PIPE, text=True, errors="replace")
    say(*done.stderr.splitlines())
    reason = batch_script.error_lines(done.stderr) or f"it ended with code {done.returncode}"
    path = Path(run) / EVALUATIONS / f"{one.name}{END}"
    if run_identity(Path(run))["id"] == identity:
        record(path, attempt=int(attempt), code=done.returncode, reason=reason if done.returncode else "")
    sys.exit(done.returncode)


if __name__ == "__main__":
    from launch.evaluation_jobs import watch as watch_runs  # not of __main__, whose functions no job would find

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(EXIT_STOPPED))
    with batch_script.private_files():  # it may be run by hand
        sys.exit(run_main(lambda: watch_runs(Path(sys.argv[1]))))
