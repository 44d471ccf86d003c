"""The supervisor of a Slurm job. It runs on the first node of the job and trains a run in attempts until the run has
finished; an attempt is one step of `srun`. This module does not import torch.

When a signal asks it to stop (USR2: time limit or preemption), it lets all ranks save a checkpoint after their current
step, and requeues the job. When a rank dies or hangs or a node is lost, it logs which one, ends the attempt, and starts
the next attempt on the nodes that pass the check. It keeps its state in JOB/NUMBER/state.json; the records and logs of
the ranks are in the same folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import build_config
from common.appended_lines import LineFile
from common.errors import UserError, run_main
from common.output import printable, say
from eval.periodic_scoring import SCORED_ELSEWHERE
from launch import batch_script, job_of_run, rendezvous, slurm_client
from launch.clusters import Cluster
from launch.file_tails import last_step, tail
from launch.guards import Guards
from launch.heartbeat import heartbeat
from launch.rank_records import Rank, cause, described, has_failed, ranks_of, read_new_ends, read_record, record
from launch.usable_nodes import NodeChecks
from pretrain.objectives import finder
from pretrain.recipes import parallel_checks
from pretrain.recipes.recipe import Recipe, load
from pretrain.signals import EXIT_STOPPED, EXIT_UNSCORED

POLL_SECONDS = 0.5  # time between two checks of the ranks
GRACE_SECONDS = 5.0  # time in which the other ranks may end after one has failed; then they are killed
EXIT_REFUSED = 2  # exit code of a trainer that refuses to start until the user changes something
STEP_ENDED = ("Invalid job id", "already completing")  # errors of scancel about a step that has ended
LOG_LINES = 6  # number of lines from the log of a failed rank in the message about it
HEARTBEAT = "heartbeat"  # name of the file that the supervisor writes, in the folder of the attempts
STOP = "stop"  # name of the file in the job's folder with which `unlabeled stop` prevents that the job is requeued
EXCLUDED_SECONDS = 86400.0  # time for which a requeued job excludes a node that failed the check


def supervise(folder: str, number: int) -> None:
    """Train the run with this number in a job's folder. submitit calls this function in the batch script."""
    sys.exit(run_main(Supervisor(Path(folder), number).supervise))


class Supervisor:
    """Trains one run of a job. Its methods are in the order in which they are called."""

    def __init__(self, folder: Path, number: int):
        job = job_of_run.read_folder(folder)
        self.cluster: Cluster = build_config.build(Cluster, job["cluster"], {})
        self.methods: dict[str, str] = job["methods"]
        self.scored_elsewhere = job.get("evaluation") is not None
        self.run, self.recipe = Path(job["runs"][number]), folder / f"{number}.yaml"
        self.folder, self.job = folder / str(number), os.environ["SLURM_JOB_ID"]
        self.folder.mkdir(exist_ok=True)
        self.log = LineFile(self.run / "log.txt")
        self.state: dict[str, Any] = {"attempts": 0, "restarts": 0, "in_a_row": 0, "reached": 0, "ended": ""}
        self.state["bad_nodes"] = {}  # {node that failed the check: time}
        known = read_record(self.folder / "state.json")
        self.state |= {key: known[key] for key, value in self.state.items() if type(known.get(key)) is type(value)}
        begun = [int(path.name.rpartition("-")[2]) for path in self.folder.glob("attempt-*")]
        self.state["attempts"] = max([self.state["attempts"], *begun])  # state.json may have been lost
        self.signals: list[int] = []  # signals that have asked this job to stop
        self.guards = Guards(self.cluster, self.folder / HEARTBEAT, self.run, self.say)
        self.checks = NodeChecks(self.cluster, self.run, self.folder, self.say, self.should_stop)
        self.failed_at: float | None = None  # time at which a rank failed; None when a step has been trained since

    def say(self, line: str) -> None:
        """Write a line to the log of the job and to that of the run."""
        say(line)
        self.log.add(printable(f"{time.strftime('%Y-%m-%d %H:%M:%S')} job {self.job}: {line}") + "\n")

    def update_state(self, **values: Any) -> None:
        """Change entries of the state, and write it to state.json. If that fails, because the disk is full, the next
        call writes them."""
        self.state |= values
        try:
            record(self.folder / "state.json", **self.state)
        except OSError as error:
            self.say(f"{self.folder / 'state.json'}: cannot be written ({error.strerror})")

    # ---------------------------------------------------------------- the loop
    def supervise(self) -> int:
        """Train until the run has ended or the job has to be started again. Returns the exit code of the job."""
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, lambda number, frame: self.signals.append(number))
        with heartbeat(self.folder / HEARTBEAT):
            return self.train()

    def train(self) -> int:
        """The part of `supervise` during which signals are recorded and the heartbeat is written."""
        if changed := [name for name, known in self.methods.items() if hash_of(name) != known]:
            self.say(f"{changed[0]} has changed since the job was submitted, so the job ends; submit it again")
            self.update_state(ended=f"failed: {changed[0]} has changed")
            return 1
        while not self.should_stop():
            nodes = self.nodes()
            if self.should_stop():
                break
            if not nodes:
                return self.requeue() if self.may_wait_for_nodes() else 1
            ranks = self.attempt(nodes)
            codes = [rank.get("code") for rank in ranks.values()]
            if all(code in (0, EXIT_UNSCORED) for code in codes):
                self.update_state(ended="finished")
                return max(map(int, codes))
            if all(code == EXIT_STOPPED for code in codes):
                break
            if self.should_stop():  # not a failure of the run: Slurm kills ranks that take too long to stop
                self.say(f"while the run stopped, {described(cause(ranks))}")
                break
            if not self.may_retry(ranks):
                return 1
        return self.stop()

    def should_stop(self) -> bool:
        """Whether a signal or `unlabeled stop` has asked this job to stop. `unlabeled stop` sends a signal and writes a
        file, because a signal is lost if it comes before this process handles signals."""
        return bool(self.signals) or os.path.exists(self.folder / STOP)  # False if the file system does not answer

    def nodes(self) -> list[str]:
        """The nodes for the next attempt: those that pass the check, in the largest number that divides the batch; []
        if they are too few."""
        listed = slurm_client.ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
        self.guards.use(listed[1:])  # also while the nodes are checked
        bad = self.checks.problems(listed)
        for node, reason in bad.items():
            self.say(f"{node} is left out: {reason}")
        good = [node for node in listed if node not in bad]
        if good:  # a problem of all nodes is not the fault of a node
            self.update_state(bad_nodes=self.state["bad_nodes"] | dict.fromkeys(bad, time.time()))
        self.guards.use([node for node in good if node != listed[0]])
        recipe = load(self.recipe)
        for count in range(min(len(good), self.cluster.max_nodes), self.cluster.min_nodes - 1, -1):
            with contextlib.suppress(UserError):
                check_world(recipe, count * self.cluster.processes_per_node)
                return good[:count]
        self.say(f"{len(good)} of {len(listed)} nodes can be used, which is too few for nodes: {self.cluster.nodes}")
        return []

    # ---------------------------------------------------------------- one step of srun
    def attempt(self, nodes: list[str]) -> dict[int, Rank]:
        """Train in one step of `srun` until all ranks have ended; if one fails, end the others. Returns the records of
        each rank; a rank that was ended or lost has no "code"."""
        self.update_state(attempts=self.state["attempts"] + 1)
        folder, per_node = self.folder / f"attempt-{self.state['attempts']}", self.cluster.processes_per_node
        folder.mkdir()
        world = len(nodes) * per_node
        self.say(f"attempt {self.state['attempts']}: {world} processes on {', '.join(nodes)}")
        cores = self.cluster.cpus or max(1, batch_script.cores_of_job() // per_node)
        words = batch_script.srun(self.cluster, nodes, per_node, cores)
        words += [f"--output={self.folder}/rank-%t.log", "--open-mode=append"]
        words += [batch_script.python(self.cluster), "-P", "-m", "launch.slurm_rank"]
        env = rendezvous.environment(nodes[0]) | {SCORED_ELSEWHERE: "1" if self.scored_elsewhere else ""}
        step = subprocess.Popen([*words, folder, self.recipe], env=env)
        signalled, deadline, steps_before = False, None, last_step(self.run)
        ended: dict[str, Rank] = {}
        while step.poll() is None:
            if self.signals and not signalled:
                step.send_signal(signal.SIGUSR2)  # srun passes it on to all ranks
                signalled = True
            self.guards.renew()
            read_new_ends(folder, ended)
            if deadline is None and any(has_failed(rank["code"]) for rank in ended.values()):
                deadline = time.monotonic() + GRACE_SECONDS
            if deadline is not None and len(ended) == world:  # there is no other rank to wait for
                deadline = 0.0
            if deadline is not None and time.monotonic() > deadline:
                self.end(step, folder)
                break
            if self.failed_at is not None:
                steps_before = self.log_recovery(steps_before)
            time.sleep(POLL_SECONDS)
        if self.failed_at is not None:
            self.log_recovery(steps_before)
        found = ranks_of(folder)
        return {n: found.get(n, {"rank": n, "node": nodes[n // per_node]}) for n in range(world)}

    def end(self, step: subprocess.Popen, folder: Path) -> None:
        """Kill all ranks of a step, even suspended ones, and `srun` itself, which would wait for lost nodes."""
        name = next((rank["step"] for rank in ranks_of(folder).values()), None)

        def kill() -> None:
            try:
                slurm_client.ask("scancel", "--signal=KILL", f"{self.job}.{name}")
            except UserError as error:
                if step.poll() is None and not any(words in str(error) for words in STEP_ENDED):
                    raise

        if name is not None:
            with contextlib.suppress(UserError):
                slurm_client.repeated(kill, self.say)
        try:
            step.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            step.kill()
            step.wait()

    def log_recovery(self, steps_before: int) -> int:
        """When a step has been trained after a failure, log how long that took. `steps_before`: number of trained steps
        at the last call. Returns the current number."""
        done = last_step(self.run)
        if self.failed_at is not None and done > steps_before:
            self.say(f"trains again {time.time() - self.failed_at:.1f} s after the fault: {done} steps are done")
            self.failed_at = None
        return done

    # ---------------------------------------------------------------- after an attempt
    def may_retry(self, ranks: dict[int, Rank]) -> bool:
        """Log which rank has failed. Returns whether another attempt may help."""
        done = last_step(self.run)
        failed = cause(ranks)
        self.failed_at = self.failed_at or failed.get("ended") or time.time()
        lines = tail(self.folder / f"rank-{failed['rank']}.log", LOG_LINES)
        self.say(f"{described(failed)} after {done} steps; the last lines of its log: {' | '.join(lines) or 'none'}")
        has_progressed = done > self.state["reached"]
        in_a_row = 0 if has_progressed else self.state["in_a_row"] + 1
        self.update_state(
            reached=max(done, self.state["reached"]), in_a_row=in_a_row, restarts=self.state["restarts"] + 1
        )
        if failed.get("code") == EXIT_REFUSED and not has_progressed:
            self.update_state(ended="failed: it was refused")
            self.say("the trainer refuses to start, so the job ends; the log says what to change")
            return False
        return self._may_restart(in_a_row, f"failed: {in_a_row} attempts without a further step")

    def may_wait_for_nodes(self) -> bool:
        """Whether the job should go back to the queue, because too few of its nodes can be used."""
        in_a_row = self.state["in_a_row"] + 1
        self.update_state(in_a_row=in_a_row, restarts=self.state["restarts"] + 1)
        return self._may_restart(in_a_row, "failed: too few nodes pass the check")

    def _may_restart(self, in_a_row: int, reason: str) -> bool:
        """Whether the number of attempts without a trained step is within `max_restarts`. If not, log that the job
        ends, with `reason` as its final state."""
        limit = self.cluster.max_restarts
        if in_a_row <= limit:
            return True
        self.update_state(ended=reason)
        self.say(f"the job ends: {in_a_row} attempts in a row without a further step (max_restarts: {limit})")
        return False

    def stop(self) -> int:
        """End or requeue the job after a signal or `unlabeled stop`. All ranks have saved a checkpoint. Returns the
        exit code of the job."""
        if (self.folder / STOP).exists():
            self.update_state(ended="stopped")
            self.say("stopped as asked; `unlabeled launch` with the same recipe continues the run")
            return 0
        if signal.SIGTERM in self.signals:  # Slurm ends the job, and requeues it if that is the purpose of the signal
            return 0
        return self.requeue()

    def requeue(self) -> int:
        """Put the job back into the queue, and exclude the nodes that failed the check. Slurm then ends this
        process."""
        self.say(f"requeues itself after {last_step(self.run)} steps")
        queued = slurm_client.repeated(lambda: slurm_client.jobs([self.name]), self.say).get(self.name)
        if queued is not None and queued.state != "RUNNING":
            return 0  # Slurm has cancelled or preempted the job, and requeues it if necessary
        slurm_client.repeated(lambda: slurm_client.ask("scontrol", "requeue", self.job), self.say)
        earliest = time.time() - EXCLUDED_SECONDS
        if bad_nodes := [node for node, failed_at in self.state["bad_nodes"].items() if failed_at > earliest]:
            excluded = ",".join(filter(None, (self.cluster.exclude, *sorted(bad_nodes))))
            with contextlib.suppress(UserError):
                slurm_client.ask("scontrol", "update", f"JobId={self.job}", f"ExcNodeList={excluded}")
        received, deadline = len(self.signals), time.monotonic() + slurm_client.REQUEUE_SECONDS
        while len(self.signals) == received and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return EXIT_STOPPED

    @property
    def name(self) -> str:
        """The id of the job in the output of `squeue --array`."""
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else self.job


def check_world(recipe: Recipe, processes: int) -> None:
    """Raises ConfigError if a recipe cannot run on this number of processes."""
    parallel_checks.check(recipe, processes)
    parallel_checks.micro_batches(recipe, processes)


def hash_of(objective: str) -> str:
    """A hash of the file of an objective that the user has written, which the copy of the code does not contain; "" for
    an objective of the project."""
    if not finder.is_file(objective):
        return ""
    try:
        return hashlib.sha256(Path(objective).read_bytes()).hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
