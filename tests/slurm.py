"""A real Slurm cluster on loopback: munged, slurmctld and one slurmd per node, from Debian's packages, in one folder.
`python -m tests.slurm` installs them.

    with SlurmCluster(folder, nodes=2) as cluster:
        cluster.run("sbatch", "--wrap", "hostname")
        cluster.kill_node("n2"); cluster.start_node("n2")  # as if its power had failed, and back

All nodes share the machine's network and host name; SLURMD_NODENAME tells a task where it runs. Clients find the
cluster by SLURM_CONF, so that several clusters can run side by side and nothing is written to /etc.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.hosts import TwoHosts

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
CONFIGURATION = """
ClusterName=local
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
# cred_expire is also the time that a requeued job waits: 120 s by default, at least 5
AuthInfo=socket={root}/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=256
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# nodes may state more cores and memory than the machine has
SlurmdParameters=config_overrides
SlurmdTimeout={slurmd_timeout}
SlurmctldTimeout=10
MessageTimeout=10
KillWait=5
MinJobAge=3600
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=2
"""


def missing() -> str:
    """Why no cluster can be started here, or ""."""
    if os.geteuid() != 0:
        return "a slurmd has to run as root"
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError as error:
        return f"this machine's name does not resolve ({error})"
    if not address.startswith("127."):
        return f"this machine's name resolves to {address}, and a cluster of tests listens on loopback only"
    return "" if _installed() else "Slurm's programs are not installed; on Debian, as root, `make slurm` installs them"


def install() -> None:
    """Install Debian's packages, and say so; only say what is missing where that cannot be."""
    if not _installed():
        install_packages(PACKAGES, "tests of `unlabeled launch`")
    if reason := missing():
        print(f"tests of `unlabeled launch` on a real Slurm will be SKIPPED: {reason}", flush=True)


def install_packages(packages: Sequence[str], purpose: str) -> None:
    """Install Debian's packages, and say so, where that can be."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return
    print(f"installing {' '.join(packages)} with apt-get, for {purpose}", flush=True)
    settings = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
        with contextlib.suppress(subprocess.TimeoutExpired):  # no mirror answers
            subprocess.run(["apt-get", *words], env=settings, stdout=subprocess.DEVNULL, timeout=300)


def _installed() -> bool:
    return all(shutil.which(name, path=PATH) for name in PROGRAMS)


class SlurmCluster:
    """`main` is the default partition, whose jobs are preempted by those of `high` after `grace` seconds. For Slurm, the
    last node has two GPUs. With `hosts`, each node is on one of them, slurmctld and the clients are on the first one;
    otherwise all of them are on this machine."""

    def __init__(
        self,
        root: Path,
        nodes: int = 2,
        cpus: int = 4,
        grace: int = 20,
        slurmd_timeout: int = 10,
        hosts: TwoHosts | None = None,
    ):
        self.root, self.cpus, self.grace, self.slurmd_timeout = Path(root), cpus, grace, slurmd_timeout
        self.hosts = hosts
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.daemons: dict[str, subprocess.Popen] = {}

    @property
    def environment(self) -> dict[str, str]:
        """What clients of this cluster have to find in their environment."""
        return {"SLURM_CONF": str(self.root / "slurm.conf"), "PATH": PATH}

    # ---------------------------------------------------------------- start and stop
    def __enter__(self) -> SlurmCluster:
        for name in ("munge", "state", "log", *(f"spool/{node}" for node in self.nodes)):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        (self.root / "munge").chmod(0o755)
        self._configure()
        try:
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-f", self.root / "slurm.conf")
            self.wait(lambda: self.run("sinfo", check=False).returncode == 0, "slurmctld answers")
            for node in self.nodes:
                self.start_node(node)
            self.wait_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False, timeout=20)
            self.run("scancel", "--user=root", check=False, timeout=20)
        for node in self.nodes:
            self.kill_node(node)
        for process in reversed(self.daemons.values()):
            process.kill()
            process.wait()

    def _configure(self) -> None:
        with contextlib.ExitStack() as held:
            sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in (0, *self.nodes)]
            port, *ports = [one.getsockname()[1] for one in sockets]
        here = [(socket.gethostname().split(".")[0], "127.0.0.1")] * len(self.nodes)
        places = here if self.hosts is None else [*zip(self.hosts.NAMES, self.hosts.ADDRESSES, strict=True)]
        first = {"host": places[0][0], "address": places[0][1]}
        text = CONFIGURATION.format(**first, port=port, root=self.root, slurmd_timeout=self.slurmd_timeout)
        for node, own, (host, address) in zip(self.nodes, ports, places, strict=True):
            text += f"NodeName={node} NodeHostname={host} NodeAddr={address} Port={own} CPUs={self.cpus}"
            text += f" RealMemory=8000 State=UNKNOWN{' Gres=gpu:2' * (node == self.nodes[-1])}\n"
        everywhere = f"Nodes={','.join(self.nodes)} MaxTime=INFINITE State=UP"
        text += f"PartitionName=main {everywhere} Default=YES PriorityTier=1 PreemptMode=REQUEUE"
        text += f" GraceTime={self.grace}\nPartitionName=high {everywhere} PriorityTier=10 PreemptMode=OFF\n"
        (self.root / "slurm.conf").write_text(text)
        gpus = (f"NodeName={self.nodes[-1]} Name=gpu File={path}\n" for path in ("/dev/null", "/dev/zero"))
        (self.root / "gres.conf").write_text("".join(gpus))
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")

    def _start_munge(self) -> None:
        munge = self.root / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o600)
        files = [f"--{name}={munge / file}" for name, file in (("key-file", "key"), ("socket", "socket"))]
        files += [f"--{name}-file={munge / name}" for name in ("pid", "log", "seed")]
        self._start("munged", "munged", "--foreground", "--force", "--num-threads=2", *files)
        self.wait((munge / "socket").exists, "munged has a socket")

    def _start(self, name: str, *command: str | Path) -> None:
        program = shutil.which(command[0], path=PATH) or command[0]
        words = self._on_host(self.nodes.index(name) if name in self.nodes else 0, program, *command[1:])
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                words,
                **{"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "cwd": self.root},
                **{"env": {**os.environ, **self.environment}, "start_new_session": True},  # type: ignore[arg-type]
            )

    def _on_host(self, number: int, *words: object) -> list[str]:
        """The words of a command on one of the hosts."""
        return [*map(str, words)] if self.hosts is None else self.hosts.words(number, *words)

    # ---------------------------------------------------------------- clients
    def run(self, *words: object, **more: Any) -> subprocess.CompletedProcess:
        """Run a client of Slurm; its output is text."""
        options: dict[str, Any] = {"check": True, "text": True, "capture_output": True, "timeout": 60, **more}
        return subprocess.run(self._on_host(0, *words), env={**os.environ, **self.environment}, **options)

    def state(self, job: str) -> str:
        """What squeue says of a job, such as RUNNING; "" for one that it does not know."""
        out = self.run("squeue", "--noheader", "--states=all", "--jobs", job, "--format=%T", check=False).stdout
        return out.strip()

    def wait_for(self, job: str, *states: str, seconds: float = 120) -> str:
        """Wait until a job has one of these states."""
        self.wait(lambda: self.state(job) in states, f"job {job} is {' or '.join(states)}", seconds)
        return self.state(job)

    def wait_idle(self, seconds: float = 60) -> None:
        """Wait until no node has a job and all are up."""
        everyone = lambda: self.run("sinfo", "--noheader", "--Node", "--format=%T", "--partition=main")  # noqa: E731
        self.wait(lambda: everyone().stdout.split() == ["idle"] * len(self.nodes), "all nodes are idle", seconds)

    def wait(self, done: Any, what: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                tail = (self.root / "log" / "slurmctld.log").read_text(errors="replace")[-3000:]
                raise TimeoutError(f"after {seconds:g} s it is not true that {what}\n{tail}")
            time.sleep(0.1)

    # ---------------------------------------------------------------- nodes
    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-f", self.root / "slurm.conf", "-N", node)

    def kill_node(self, node: str) -> None:
        """End everything on a node at once, as if its power had failed."""
        for pid in self.processes(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, node: str) -> list[int]:
        """A node's slurmd, the slurmstepd of its steps, and all their descendants."""
        daemon = self.daemons.get(node)
        found = {daemon.pid} if daemon is not None and daemon.poll() is None else set()
        parents = dict(_parents())
        mark = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.root / 'slurm.conf'}".encode()}
        for pid in parents:
            with contextlib.suppress(OSError):
                if mark <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                    found |= {pid, *([parents[pid]] if _is_step(parents[pid]) else [])}
        while more := {child for child, parent in parents.items() if parent in found} - found:
            found |= more
        return sorted(found)


def _parents() -> Iterator[tuple[int, int]]:
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            yield int(name), int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])


def _is_step(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().startswith("slurmstepd")
    return False


if __name__ == "__main__":
    install()
