"""The supervisor of a Slurm job: it trains a run as one `srun` step after another, on the first node of the job, until
the run has finished. No torch here.

Asked to stop (USR2: time limit or preemption), it lets all ranks save at a step boundary, and requeues the job. When a
rank dies or hangs or a node is lost, it says which, ends the step, and starts the next one on the nodes that pass the
check. Its state is JOB/NUMBER/state.json; the records and logs of ranks are beside it.
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

POLL = 0.5  # seconds between two looks at the ranks
GRACE = 5.0  # seconds that the other ranks have to end by themselves, once one has failed
CHECK_SECONDS = 30.0  # that a node has to answer the check
CONTAINER_SECONDS = 600.0  # the same with a container, whose image may have to be fetched first
SLURM_SECONDS = 300.0  # for which a request is repeated while Slurm's controller does not answer
REQUEUE_SECONDS = 120.0  # that Slurm has to end a job that is requeued
REFUSED = 2  # exit code of a trainer whose user has to change something
LINES = 6  # of the log of the rank that failed, in the message about it
STOP = "stop"  # file in the job's folder by which `unlabeled stop` says that the job must not be requeued
Rank = dict[str, Any]  # as launch.slurm_rank records it
T = TypeVar("T")


def supervise(folder: str, number: int) -> None:
    """Train run NUMBER of a job's folder. submitit calls this in the batch script."""
    sys.exit(run_main(Supervisor(Path(folder), number).supervise))


class Supervisor:
    """Trains one run of a job. The order of its methods is the order in which things happen."""

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
        self.asked: list[int] = []  # signals that asked this job to stop
        self.fault: float | None = None  # when a rank failed, until a step is trained again
        self.lost: set[str] = set()  # nodes that failed the check

    def say(self, line: str) -> None:
        """A line in the job's log and in the run's."""
        say(line)
        self.log.add(printable(f"{time.strftime('%Y-%m-%d %H:%M:%S')} job {self.job}: {line}") + "\n")

    def keep(self, **values: Any) -> None:
        self.state |= values
        record(self.folder / "state.json", **self.state)

    # ---------------------------------------------------------------- the loop
    def supervise(self) -> int:
        """Train until the run has ended, or the job has to be started again. Returns the exit code of the job."""
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, lambda number, frame: self.asked.append(number))
        if changed := [name for name, known in self.methods.items() if hash_of(name) != known]:
            self.say(f"{changed[0]} has changed since the job was submitted, so the job ends; submit it again")
            self.keep(ended=f"failed: {changed[0]} has changed")
            return 1
        while not self.is_asked():
            nodes = self.nodes()
            if self.is_asked():
                break
            ranks = self.attempt(nodes) if nodes else {}
            codes = [rank.get("code") for rank in ranks.values()]
            if nodes and all(code in (0, EXIT_UNSCORED) for code in codes):
                self.keep(ended="finished")
                return max(map(int, codes))
            if nodes and all(code == EXIT_STOPPED for code in codes):
                break
            if not (self.recovers(ranks) if nodes else self.waits_for_nodes()):
                return 1
            if not nodes:
                return self.requeue()
        return self.stopped()

    def is_asked(self) -> bool:
        """Whether a signal or `unlabeled stop` has asked this job to stop. The signal of `unlabeled stop` is lost if it
        comes before this process handles signals; its file is not."""
        return bool(self.asked) or (self.folder / STOP).exists()

    def nodes(self) -> list[str]:
        """The nodes for the next attempt: those of the job that pass the check, as many as the batch divides by."""
        listed = slurm_client.ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
        wrong = self.check(listed)
        for node, reason in wrong.items():
            self.say(f"{node} is left out: {reason}")
        good = [node for node in listed if node not in wrong]
        if good:  # what all nodes have is not a fault of theirs
            self.lost |= wrong.keys()
        recipe = load(self.recipe)
        for count in range(min(len(good), self.cluster.most_nodes), self.cluster.least_nodes - 1, -1):
            with contextlib.suppress(UserError):
                check_world(recipe, count * self.cluster.processes_per_node)
                return good[:count]
        self.say(f"{len(good)} of {len(listed)} nodes can be used, which is too few for nodes: {self.cluster.nodes}")
        return []

    def check(self, nodes: list[str]) -> dict[str, str]:
        """{node: why it cannot be used}: each node is looked at by a step of its own, at the same time."""
        began, asked_at = time.monotonic(), time.time()
        seconds = CONTAINER_SECONDS if self.cluster.container else CHECK_SECONDS
        words = [self.python, "-P", "-m", "launch.node_check", str(self.run), str(self.cluster.gpus)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        asked = {node: subprocess.Popen([*self.srun([node], 1, 1), *words], **pipes) for node in nodes}  # type: ignore[call-overload]
        reports, wrong = {}, {}
        for node, process in asked.items():
            errors = ""
            try:
                out, errors = process.communicate(timeout=max(0.1, began + seconds - time.monotonic()))
                reports[node] = json.loads(out)
            except subprocess.TimeoutExpired:
                process.kill()
                wrong[node] = f"did not answer in {seconds:g} s"
            except ValueError:  # no report
                wrong[node] = "; ".join(errors.split("\n")[-3:]).strip("; ") or "the check failed"
        return wrong | node_check.problems(reports, self.cluster.gpus, asked_at, time.time())

    # ---------------------------------------------------------------- one step of srun
    @property
    def python(self) -> str:
        return self.cluster.python or ("python" if self.cluster.container else sys.executable)

    def srun(self, nodes: list[str], per_node: int, cores: int) -> list[str]:
        """`srun` with options for a step on these nodes, with so many processes on each and cores for each of them.

        A step may overlap with one that a lost node still holds, and one failed rank does not end the others: the
        supervisor does that, once they had time to say what they know.
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
        """Train in one step until all ranks have ended, or one has failed and the others are ended. Returns what is
        known of each rank; one without "code" did not end by itself."""
        self.keep(attempts=self.state["attempts"] + 1)
        folder, per_node = self.folder / f"attempt-{self.state['attempts']}", self.cluster.processes_per_node
        folder.mkdir()
        world = len(nodes) * per_node
        self.say(f"attempt {self.state['attempts']}: {world} processes on {', '.join(nodes)}")
        cores = self.cluster.cpus or max(1, cores_of_job() // per_node)
        words = [*self.srun(nodes, per_node, cores), f"--output={self.folder}/rank-%t.log", "--open-mode=append"]
        port = random.randrange(20000, 32000)  # below those that systems give to clients
        env = {**os.environ, "MASTER_ADDR": address(nodes[0]), "MASTER_PORT": str(port)}
        step = subprocess.Popen([*words, self.python, "-P", "-m", "launch.slurm_rank", folder, self.recipe], env=env)
        told, deadline, seen = False, None, last_step(self.run)
        ended: dict[str, Rank] = {}
        while step.poll() is None:
            if self.asked and not told:
                step.send_signal(signal.SIGUSR2)  # srun passes it on to all ranks
                told = True
            new_ends(folder, ended)
            if deadline is None and any(map(has_failed, ended.values())):
                deadline = time.monotonic() + GRACE
            if deadline is not None and time.monotonic() > deadline:
                self.end(step, folder)
                break
            if self.fault is not None:
                seen = self.measure(seen)
            time.sleep(POLL)
        if self.fault is not None:
            self.measure(seen)
        found = ranks_of(folder)
        return {n: found.get(n, {"rank": n, "node": nodes[n // per_node]}) for n in range(world)}

    def end(self, step: subprocess.Popen, folder: Path) -> None:
        """End all ranks of a step at once, also those that are stopped, and `srun` itself, which waits for lost nodes."""
        if name := next((rank["step"] for rank in ranks_of(folder).values()), None):
            with contextlib.suppress(UserError):
                slurm_client.ask("scancel", "--signal=KILL", f"{self.job}.{name}")
        try:
            step.wait(GRACE)
        except subprocess.TimeoutExpired:
            step.kill()
            step.wait()

    def measure(self, seen: int) -> int:
        """Say how long it took from a fault to the next step that was trained. `seen`: steps at the last look."""
        done = last_step(self.run)
        if self.fault is not None and done > seen:
            self.say(f"trains again {time.time() - self.fault:.1f} s after the fault: {done} steps are done")
            self.fault = None
        return done

    # ---------------------------------------------------------------- after it
    def recovers(self, ranks: dict[int, Rank]) -> bool:
        """Say what has failed. Returns whether another attempt may help."""
        done = last_step(self.run)
        culprit = cause(ranks)
        self.fault = self.fault or culprit.get("ended") or time.time()
        lines = tail(self.folder / f"rank-{culprit['rank']}.log", LINES)
        self.say(f"{described(culprit)} after {done} steps; the last lines of its log: {' | '.join(lines) or 'none'}")
        further = done > self.state["reached"]
        in_a_row = 0 if further else self.state["in_a_row"] + 1
        self.keep(reached=max(done, self.state["reached"]), in_a_row=in_a_row, restarts=self.state["restarts"] + 1)
        if culprit.get("code") == REFUSED and not further:
            self.keep(ended="failed: it was refused")
            self.say("the trainer refuses to start, so the job ends; the log says what to change")
            return False
        if in_a_row > self.cluster.max_restarts:
            self.keep(ended=f"failed: {in_a_row} attempts without a further step")
            self.say(
                f"the job ends: {in_a_row} attempts in a row without a further step (max_restarts: {self.cluster.max_restarts})"
            )
            return False
        return True

    def waits_for_nodes(self) -> bool:
        """Whether the job should go back to the queue because too few of its nodes can be used."""
        in_a_row = self.state["in_a_row"] + 1
        self.keep(in_a_row=in_a_row, restarts=self.state["restarts"] + 1)
        if in_a_row <= self.cluster.max_restarts:
            return True
        self.keep(ended="failed: too few nodes pass the check")
        self.say(
            f"the job ends: {in_a_row} attempts in a row without a further step (max_restarts: {self.cluster.max_restarts})"
        )
        return False

    def stopped(self) -> int:
        """End or requeue the job, as a signal or `unlabeled stop` has asked. If ranks ran, they have saved."""
        if (self.folder / STOP).exists():
            self.keep(ended="stopped")
            self.say("stopped as asked; `unlabeled launch` with the same recipe goes on")
            return 0
        if signal.SIGTERM in self.asked:  # Slurm ends the job itself, and requeues it if that is what it is ended for
            return 0
        return self.requeue()

    def requeue(self) -> int:
        """Put the job back into the queue, without the nodes that failed the check. Slurm ends this process."""
        self.say(f"requeues itself after {last_step(self.run)} steps")
        queued = self.repeated(lambda: slurm_client.jobs([self.name])).get(self.name)
        if queued is not None and queued.state != "RUNNING":
            return 0  # cancelled or preempted: Slurm knows what to do with it
        self.repeated(lambda: slurm_client.ask("scontrol", "requeue", self.job))
        if self.lost:
            excluded = ",".join(filter(None, (self.cluster.exclude, *sorted(self.lost))))
            with contextlib.suppress(UserError):
                slurm_client.ask("scontrol", "update", f"JobId={self.job}", f"ExcNodeList={excluded}")
        heard, deadline = len(self.asked), time.monotonic() + REQUEUE_SECONDS
        while len(self.asked) == heard and time.monotonic() < deadline:
            time.sleep(POLL)
        return EXIT_STOPPED

    def repeated(self, request: Callable[[], T]) -> T:
        """The answer to a request to Slurm, which is repeated if it fails: the controller may be restarting. Raises the
        UserError of the last one."""
        deadline = time.monotonic() + SLURM_SECONDS
        while True:
            try:
                return request()
            except UserError as error:
                if time.monotonic() > deadline:
                    raise
                self.say(f"{error}; asking again")
                time.sleep(10.0)

    @property
    def name(self) -> str:
        """The job's id as `squeue --array` shows it."""
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else self.job


def check_world(recipe: Recipe, processes: int) -> None:
    """Raises ConfigError if a recipe cannot run on so many processes."""
    parallel_checks.check(recipe, processes)
    micro, batch = recipe.parallel.micro_batch, recipe.data.batch
    if micro is not None and batch % (micro * processes):
        raise ConfigError(
            f"parallel.micro_batch = {micro}: data.batch = {batch} does not divide into micro-batches of {processes}"
            " processes; write parallel.micro_batch=null, or one that divides it"
        )


def hash_of(objective: str) -> str:
    """A hash of an objective's file if it is a user's own, which the copy of the code does not hold; otherwise ""."""
    if not finder.is_file(objective):
        return ""
    try:
        return hashlib.sha256(Path(objective).read_bytes()).hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def cores_of_job() -> int:
    """The cores that the job has on the node where it has least, from a text such as "96(x2),64"."""
    return min(int(part.partition("(")[0]) for part in os.environ["SLURM_JOB_CPUS_PER_NODE"].split(","))


def new_ends(folder: Path, known: dict[str, Rank]) -> None:
    """Add the records of ranks that have ended since the last look, by the names of their files, each read once."""
    for name in os.listdir(folder):
        if name.endswith(END) and name not in known:
            with contextlib.suppress(OSError, ValueError):
                known[name] = json.loads((folder / name).read_text())


def ranks_of(folder: Path) -> dict[int, Rank]:
    """What the ranks of an attempt have recorded, by rank."""
    out: dict[int, Rank] = {}
    for path in folder.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError):
            rank = json.loads(path.read_text())
            out[rank["rank"]] = out.get(rank["rank"], {}) | rank
    return dict(sorted(out.items()))


def has_failed(rank: Rank) -> bool:
    return rank.get("code", 0) not in (0, EXIT_STOPPED, EXIT_UNSCORED)


def cause(ranks: dict[int, Rank]) -> Rank:
    """The rank that failed first. If the others only timed out on ranks that did not end, one of those."""
    ended = [rank for rank in ranks.values() if has_failed(rank)]
    silent = [rank for rank in ranks.values() if "code" not in rank]
    first = min(ended, key=lambda rank: rank["ended"], default=None)
    if first is None or (silent and first["code"] == 1):
        return silent[0] if silent else next(iter(ranks.values()))
    return first


def described(rank: Rank) -> str:
    """What happened to a rank, and where."""
    code = rank.get("code")
    how = f"ended with code {code}"
    if code is None:
        how = "did not end by itself, so it hung or its node was lost," if "pid" in rank else "never started,"
    elif code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    return f"rank {rank['rank']} on {rank['node']} {how}"


def address(node: str) -> str:
    """Where the others find a node: its name if that resolves, else what Slurm has as its address."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        words = slurm_client.ask("scontrol", "--oneliner", "show", "node", node).split()
        return next((word.partition("=")[2] for word in words if word.startswith("NodeAddr=")), node)
