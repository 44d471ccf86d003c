"""The guards of a Slurm job, which requeue it if the node of its supervisor is lost: one `launch.heartbeat_guard` on each
of a few other nodes. The supervisor starts them, and starts others when they end. This module does not import torch.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launch import batch_script
from launch.clusters import Cluster

GUARDS = 3  # number of nodes with a guard: one is enough, unless its node is lost, too
AGAIN_SECONDS = 30.0  # time after which a guard that has ended is started again on the same node


class Guards:
    """Each guard is a step of `srun` of its own, so that a node that is down does not end the others."""

    def __init__(self, cluster: Cluster, heartbeat: Path, run: Path, say: Callable[[str], None]):
        # they need no container: the Python that submitted the job is used
        self.cluster, self.heartbeat, self.run, self.say = cluster.replace(container="", mounts=[]), heartbeat, run, say
        self.nodes: Sequence[str] = []  # nodes on which guards may run
        self.running: dict[str, tuple[int, subprocess.Popen]] = {}  # {node: (number of the guard, its step)}
        self.ended: dict[str, float] = {}  # {node: time at which its guard was found to have ended}

    def use(self, nodes: Sequence[str]) -> None:
        """Have guards on some of these nodes, and on no others."""
        self.nodes = nodes
        for node in [node for node in self.running if node not in nodes]:
            _, step = self.running.pop(node)
            step.kill()
            step.wait()
        self.renew()

    def renew(self) -> None:
        """Start guards in place of those that have ended, on other nodes if there are any."""
        now = time.monotonic()
        for node, (_, step) in [*self.running.items()]:
            if step.poll() is not None:
                self.say(f"the process on {node} that watches for the loss of this node has ended: {step.returncode}")
                del self.running[node]
                self.ended[node] = now
        free = [
            node
            for node in sorted(self.nodes, key=lambda node: self.ended.get(node, 0.0))
            if node not in self.running and now >= self.ended.get(node, -AGAIN_SECONDS) + AGAIN_SECONDS
        ]
        numbers = [number for number in range(GUARDS) if number not in {taken for taken, _ in self.running.values()}]
        for number, node in zip(numbers, free, strict=False):
            words = [*batch_script.srun(self.cluster, [node], 1, 1), sys.executable, "-P", "-m"]
            words += ["launch.heartbeat_guard", str(self.heartbeat), str(self.run), str(number)]
            self.running[node] = (number, subprocess.Popen(words))
