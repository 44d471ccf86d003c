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
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from common import build_config
from common.errors import ConfigError, UserError, run_main
from common.line_file import LineFile
from common.output import printable, say
from launch import node_check, slurm_client
from launch.clusters import Cluster
from launch.run_tail import last_step, tail
from launch.slurm_rank import END, record
from pretrain.objectives import finder
from pretrain.recipes import parallel_checks
from pretrain.recipes.recipe import Recipe, load
from pretrain.signals import EXIT_STOPPED, EXIT_UNSCORED

POLL_SECONDS = 0.5  # time between two checks of the ranks
GRACE_SECONDS = 5.0  # time in which the other ranks may end after one has failed; then they are killed
CHECK_SECONDS = 30.0  # time limit of the check of a node
CONTAINER_CHECK_SECONDS = 600.0  # the same with a container, whose image may have to be fetched first
SLURM_SECONDS = 300.0  # time for which a request is repeated while Slurm's controller does not answer
REQUEUE_SECONDS = 120.0  # time that Slurm has to end a job that is requeued
EXIT_REFUSED = 2  # exit code of a trainer that refuses to start until the user changes something
LOG_LINES = 6  # number of lines from the log of a failed rank in the message about it
STOP = "stop"  # name of the file in the job's folder with which `unlabeled stop` prevents that the job is requeued
Rank = dict[str, Any]  # the records of a rank, which launch.slurm_rank writes
T = TypeVar("T")


def supervise(folder: str, number: int) -> None:
    """Train the run with this number in a job's folder. submitit calls this function in the batch script."""
    sys.exit(run_main(Supervisor(Path(folder), number).supervise))


class Supervisor:
    """Trains one run of a job. Its methods are in the order in which they are called."""

    def __init__(self, folder: Path, number: int):
        job = json.loads((folder / "job.json").read_text())
        self.cluster: Cluster = build_config.build(Cluster, job["cluster"], {})
        self.methods: dict[str, str] = job["methods"]
        self.run, self.recipe = Path(job["runs"][number]), folder / f"{number}.yaml"
        self.folder, self.job = folder / str(number), os.environ["SLURM_JOB_ID"]
        self.folder.mkdir(exist_ok=True)
        self.log = LineFile(self.run / "log.txt")
        self.state: dict[str, Any] = {"attempts": 0, "restarts": 0, "in_a_row": 0, "reached": 0, "ended": ""}
        with contextlib.suppress(OSError, ValueError):
            self.state |= json.loads((self.folder / "state.json").read_text())
        self.signals: list[int] = []  # signals that have asked this job to stop
        self.failed_at: float | None = None  # time at which a rank failed; None when a step has been trained since
        self.bad_nodes: set[str] = set()  # nodes that failed the check

    def say(self, line: str) -> None:
        """Write a line to the log of the job and to that of the run."""
        say(line)
        self.log.add(printable(f"{time.strftime('%Y-%m-%d %H:%M:%S')} job {self.job}: {line}") + "\n")

    def update_state(self, **values: Any) -> None:
        """Change entries of the state, and write it to state.json."""
        self.state |= values
        record(self.folder / "state.json", **self.state)

    # ---------------------------------------------------------------- the loop
    def supervise(self) -> int:
        """Train until the run has ended or the job has to be started again. Returns the exit code of the job."""
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, lambda number, frame: self.signals.append(number))
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
            if not self.may_retry(ranks):
                return 1
        return self.stop()

    def should_stop(self) -> bool:
        """Whether a signal or `unlabeled stop` has asked this job to stop. `unlabeled stop` sends a signal and writes a
        file, because a signal is lost if it comes before this process handles signals."""
        return bool(self.signals) or (self.folder / STOP).exists()

    def nodes(self) -> list[str]:
        """The nodes for the next attempt: those that pass the check, in the largest number that divides the batch; []
        if they are too few."""
        listed = slurm_client.ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
        bad = self.check(listed)
        for node, reason in bad.items():
            self.say(f"{node} is left out: {reason}")
        good = [node for node in listed if node not in bad]
        if good:  # a problem of all nodes is not the fault of a node
            self.bad_nodes |= bad.keys()
        recipe = load(self.recipe)
        for count in range(min(len(good), self.cluster.max_nodes), self.cluster.min_nodes - 1, -1):
            with contextlib.suppress(UserError):
                check_world(recipe, count * self.cluster.processes_per_node)
                return good[:count]
        self.say(f"{len(good)} of {len(listed)} nodes can be used, which is too few for nodes: {self.cluster.nodes}")
        return []

    def check(self, nodes: list[str]) -> dict[str, str]:
        """{node: reason} for the nodes that cannot be used. All nodes are checked at the same time, each by a separate
        step of `srun`."""
        began, started = time.monotonic(), time.time()
        seconds = CONTAINER_CHECK_SECONDS if self.cluster.container else CHECK_SECONDS
        words = [self.python, "-P", "-m", "launch.node_check", str(self.run), str(self.cluster.gpus)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        checks = {node: subprocess.Popen([*self.srun([node], 1, 1), *words], **pipes) for node in nodes}  # type: ignore[call-overload]
        reports, bad = {}, {}
        for node, process in checks.items():
            errors = ""
            try:
                out, errors = process.communicate(timeout=max(0.1, began + seconds - time.monotonic()))
                reports[node] = json.loads(out)
            except subprocess.TimeoutExpired:
                process.kill()
                bad[node] = f"did not answer in {seconds:g} s"
            except ValueError:  # the output is not a report
                bad[node] = "; ".join(errors.split("\n")[-3:]).strip("; ") or "the check failed"
        return bad | node_check.problems(reports, self.cluster.gpus, started, time.time())

    # ---------------------------------------------------------------- one step of srun
    @property
    def python(self) -> str:
        return self.cluster.python or ("python" if self.cluster.container else sys.executable)

    def srun(self, nodes: list[str], per_node: int, cores: int) -> list[str]:
        """The words of an `srun` command for a step on these nodes, with `per_node` processes on each node and `cores`
        for each process.

        A step may overlap with an earlier one that Slurm still counts on a lost node. srun must not end the other ranks
        when one fails: the supervisor ends them, after they had time to write why they fail.
        """
        words = ["srun", "--overlap", "--unbuffered", "--no-kill", "--kill-on-bad-exit=0", "--wait=0"]
        words += [f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}"]
        words += [
            f"--ntasks={len(nodes) * per_node}",
            f"--ntasks-per-node={per_node}",
            "--distribution=block",
            f"--cpus-per-task={cores}",
        ]
        words += [f"--container-image={self.cluster.container}"] if self.cluster.container else []
        words += [f"--container-mounts={','.join(self.cluster.mounts)}"] if self.cluster.mounts else []
        return words

    def attempt(self, nodes: list[str]) -> dict[int, Rank]:
        """Train in one step of `srun` until all ranks have ended; if one fails, end the others. Returns the records of
        each rank; a rank that was ended or lost has no "code"."""
        self.update_state(attempts=self.state["attempts"] + 1)
        folder, per_node = self.folder / f"attempt-{self.state['attempts']}", self.cluster.processes_per_node
        folder.mkdir()
        world = len(nodes) * per_node
        self.say(f"attempt {self.state['attempts']}: {world} processes on {', '.join(nodes)}")
        cores = self.cluster.cpus or max(1, cores_of_job() // per_node)
        words = [*self.srun(nodes, per_node, cores), f"--output={self.folder}/rank-%t.log", "--open-mode=append"]
        port = random.randrange(20000, 32000)  # below the ports that operating systems assign to clients
        env = {**os.environ, "MASTER_ADDR": address(nodes[0]), "MASTER_PORT": str(port)}
        step = subprocess.Popen([*words, self.python, "-P", "-m", "launch.slurm_rank", folder, self.recipe], env=env)
        signalled, deadline, steps_before = False, None, last_step(self.run)
        ended: dict[str, Rank] = {}
        while step.poll() is None:
            if self.signals and not signalled:
                step.send_signal(signal.SIGUSR2)  # srun passes it on to all ranks
                signalled = True
            read_new_ends(folder, ended)
            if deadline is None and any(map(has_failed, ended.values())):
                deadline = time.monotonic() + GRACE_SECONDS
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
        if name := next((rank["step"] for rank in ranks_of(folder).values()), None):
            with contextlib.suppress(UserError):
                slurm_client.ask("scancel", "--signal=KILL", f"{self.job}.{name}")
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
        queued = self.repeated(lambda: slurm_client.jobs([self.name])).get(self.name)
        if queued is not None and queued.state != "RUNNING":
            return 0  # Slurm has cancelled or preempted the job, and requeues it if necessary
        self.repeated(lambda: slurm_client.ask("scontrol", "requeue", self.job))
        if self.bad_nodes:
            excluded = ",".join(filter(None, (self.cluster.exclude, *sorted(self.bad_nodes))))
            with contextlib.suppress(UserError):
                slurm_client.ask("scontrol", "update", f"JobId={self.job}", f"ExcNodeList={excluded}")
        received, deadline = len(self.signals), time.monotonic() + REQUEUE_SECONDS
        while len(self.signals) == received and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return EXIT_STOPPED

    def repeated(self, request: Callable[[], T]) -> T:
        """The result of a request to Slurm, which is repeated for SLURM_SECONDS if it fails, because the controller may
        be restarting. Raises the UserError of the last request."""
        deadline = time.monotonic() + SLURM_SECONDS
        while True:
            try:
                return request()
            except UserError as error:
                if time.monotonic() > deadline:
                    raise
                self.say(f"{error}; trying again")
                time.sleep(10.0)

    @property
    def name(self) -> str:
        """The id of the job in the output of `squeue --array`."""
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else self.job


def check_world(recipe: Recipe, processes: int) -> None:
    """Raises ConfigError if a recipe cannot run on this number of processes."""
    parallel_checks.check(recipe, processes)
    micro, batch = recipe.parallel.micro_batch, recipe.data.batch
    if micro is not None and batch % (micro * processes):
        raise ConfigError(
            f"parallel.micro_batch = {micro}: data.batch = {batch} does not divide into micro-batches of {processes}"
            " processes; write parallel.micro_batch=null, or one that divides it"
        )


def hash_of(objective: str) -> str:
    """A hash of the file of an objective that the user has written, which the copy of the code does not contain; "" for
    an objective of the project."""
    if not finder.is_file(objective):
        return ""
    try:
        return hashlib.sha256(Path(objective).read_bytes()).hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def cores_of_job() -> int:
    """The smallest number of cores that the job has on a node, from a text such as "96(x2),64"."""
    return min(int(part.partition("(")[0]) for part in os.environ["SLURM_JOB_CPUS_PER_NODE"].split(","))


def read_new_ends(folder: Path, known: dict[str, Rank]) -> None:
    """Add to `known`, {file name: record}, the records of ranks that have ended since the last call. Each file is read
    only once."""
    for name in os.listdir(folder):
        if name.endswith(END) and name not in known:
            with contextlib.suppress(OSError, ValueError):
                known[name] = json.loads((folder / name).read_text())


def ranks_of(folder: Path) -> dict[int, Rank]:
    """The records of the ranks of an attempt, by rank."""
    out: dict[int, Rank] = {}
    for path in folder.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError):
            rank = json.loads(path.read_text())
            out[rank["rank"]] = out.get(rank["rank"], {}) | rank
    return dict(sorted(out.items()))


def has_failed(rank: Rank) -> bool:
    return rank.get("code", 0) not in (0, EXIT_STOPPED, EXIT_UNSCORED)


def cause(ranks: dict[int, Rank]) -> Rank:
    """The rank that caused the end of an attempt: the one that failed first, unless it may only have timed out (code 1)
    while it waited for a rank that did not end; then that rank."""
    failed = [rank for rank in ranks.values() if has_failed(rank)]
    not_ended = [rank for rank in ranks.values() if "code" not in rank]
    first = min(failed, key=lambda rank: rank["ended"], default=None)
    if first is None or (not_ended and first["code"] == 1):
        return not_ended[0] if not_ended else next(iter(ranks.values()))
    return first


def described(rank: Rank) -> str:
    """What happened to a rank and on which node, as text."""
    code = rank.get("code")
    how = f"ended with code {code}"
    if code is None:
        how = "did not end by itself, so it hung or its node was lost," if "pid" in rank else "never started,"
    elif code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    return f"rank {rank['rank']} on {rank['node']} {how}"


def address(node: str) -> str:
    """The address of a node for the other nodes: its name if that can be resolved, otherwise its address in Slurm."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        words = slurm_client.ask("scontrol", "--oneliner", "show", "node", node).split()
        return next((word.partition("=")[2] for word in words if word.startswith("NodeAddr=")), node)
