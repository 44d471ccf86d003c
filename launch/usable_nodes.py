"""Find the nodes of a Slurm job on which a run can be trained: each one is checked by itself (`launch.node_check`), and
then all of them together (`launch.collective_check`). This module does not import torch.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launch import batch_script, collective_check, node_check, rendezvous
from launch.clusters import Cluster

NODE_SECONDS = 30.0  # time limit of the check of a node
START_SECONDS = 120.0  # time in which the processes of the check of all nodes have to import torch
CONTAINER_SECONDS = 600.0  # both limits with a container, whose image may have to be fetched first
GRACE_SECONDS = 5.0  # time in which the processes may end after the check has passed
POLL_SECONDS = 0.2  # time between two looks at the output of the check
FIRST_NODES = 3  # number of nodes that are tried as rank 0, before nodes are left out that are half of all or more

Problems = dict[str, str]  # {node: what is wrong}


class NodeChecks:
    """The checks before an attempt. `folder`: of the run's job, for the output of the check of all nodes. `should_stop`:
    whether the job is asked to end, so that no further check is worth its time."""

    def __init__(
        self, cluster: Cluster, run: Path, folder: Path, say: Callable[[str], None], should_stop: Callable[[], bool]
    ):
        self.cluster, self.run, self.folder, self.say, self.should_stop = cluster, run, folder, say, should_stop

    def problems(self, nodes: Sequence[str]) -> Problems:
        """{node: reason} for the nodes that cannot be used. All nodes are checked at the same time, each by a separate
        step of `srun`; a further step checks that they can compute together. It is repeated with the remaining nodes
        until it passes."""
        together = _CollectiveCheck(self, nodes) if len(nodes) > 1 else None  # now, as it takes longer
        bad = self._problems_of_each(nodes)
        if together is not None and bad:  # they could not join
            together.end()
            together = None
        while len(good := [node for node in nodes if node not in bad]) > 1 and not self.should_stop():
            found = self._problems_together(good, together)
            together = None
            if not found:
                break
            bad |= found
        return bad

    def _problems_of_each(self, nodes: Sequence[str]) -> Problems:
        began, started = time.monotonic(), time.time()
        seconds = CONTAINER_SECONDS if self.cluster.container else NODE_SECONDS
        words = [batch_script.python(self.cluster), "-P", "-m", "launch.node_check"]
        words += [str(self.run), str(self.cluster.gpus)]
        checks = {}
        for node in nodes:
            step = [*batch_script.srun(self.cluster, [node], 1, 1), *words]
            checks[node] = subprocess.Popen(step, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
                bad[node] = batch_script.error_lines(errors) or "the check failed"
        return bad | node_check.problems(reports, self.cluster.gpus, started, time.time())

    def _problems_together(self, nodes: Sequence[str], running: _CollectiveCheck | None) -> Problems:
        """{node: reason} from the check that these nodes can compute together, of which `running` is the first one; {}
        if they can, or if nothing shows which node is the cause.

        If less than half of the nodes are named, they are the cause. If more are, or rank 0 does not answer, the cause
        may be the node of rank 0, and the check is repeated with another one.
        """
        answers: dict[str, Problems | None] = {}  # {node of rank 0: its answer}
        for first in nodes[:FIRST_NODES]:
            answer = (running or _CollectiveCheck(self, nodes, first)).answer()
            running = None
            if answer is not None and 2 * len(answer) < len(nodes):
                if answer or first == nodes[0]:
                    return answer
                if _CollectiveCheck(self, nodes).answer() == {}:  # as in the run, whose rank 0 is on the first node
                    return {}
                return {nodes[0]: f"the other nodes can compute together with {first} as rank 0, but not with this one"}
            answers[first] = answer
            if self.should_stop():
                return {}
        found = _blamed(nodes, answers)
        if not found:
            reason = "; ".join({text for answer in answers.values() for text in (answer or {}).values()})
            reason = reason or self._errors() or "no answer"
            self.say(f"the nodes do not compute together, and it is not known which one is the cause: {reason}")
        return found

    def _errors(self) -> str:
        """The last lines that the check of all nodes has written to standard error."""
        return batch_script.error_lines((self.folder / "collective-check.err").read_text(errors="replace"))


def _blamed(nodes: Sequence[str], answers: Mapping[str, Problems | None]) -> Problems:
    """{node: reason} for the nodes that several checks blame, and none clears. `answers`: {node of rank 0: what it has
    found, or None if it did not answer}. A node that does not answer as rank 0 is blamed by that."""
    reasons: dict[str, list[str]] = {node: [] for node in nodes}
    for first, answer in answers.items():
        for node, reason in ({first: "did not answer as rank 0"} if answer is None else answer).items():
            reasons[node].append(reason)
    known = [answer for answer in answers.values() if answer is not None]
    out = {node: found[0] for node, found in reasons.items() if len(found) > 1 and all(node in one for one in known)}
    if len(nodes) == len(known) == 2 and len(out) != 1:  # both work, but not together: the run may need only one
        return {nodes[1]: f"does not compute together with {nodes[0]}: {next(iter(known[0].values()))}"}
    return out if len(out) < len(nodes) else {}


class _CollectiveCheck:
    """One check that nodes can compute together, which runs in a step of `srun`. Its output goes to files, as a pipe that
    nobody reads while it is full would block it. `first`: the node of rank 0."""

    def __init__(self, checks: NodeChecks, nodes: Sequence[str], first: str = ""):
        cluster, seconds = checks.cluster, checks.cluster.check_seconds
        by_rank = sorted(nodes, key=lambda node: node != (first or nodes[0]))
        words = [*batch_script.srun(cluster, nodes, 1, 1), batch_script.python(cluster), "-P", "-m"]
        words += ["launch.collective_check", str(cluster.gpus), str(seconds)]
        env = rendezvous.environment(by_rank[0]) | {collective_check.NODES: ",".join(by_rank)}
        self.output, self.should_stop = checks.folder / "collective-check.out", checks.should_stop
        with self.output.open("wb") as out, self.output.with_suffix(".err").open("wb") as errors:
            self.step = subprocess.Popen(words, env=env, stdout=out, stderr=errors)
        self.deadline = time.monotonic() + seconds + (CONTAINER_SECONDS if cluster.container else START_SECONDS)

    def answer(self) -> Problems | None:
        """Wait for {node: what is wrong} from rank 0, and end the check; None without an answer."""
        found = None
        while found is None:
            has_ended = self.step.poll() is not None
            found = self._read()
            if has_ended or time.monotonic() > self.deadline or self.should_stop():
                break
            time.sleep(POLL_SECONDS)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.step.wait(GRACE_SECONDS if found == {} else 0)  # srun waits for processes that hang
        self.end()
        return found

    def _read(self) -> Problems | None:
        text = self.output.read_text(errors="replace")  # in which NCCL writes lines, too
        for line in re.findall(f"{re.escape(collective_check.ANSWER)}(.*)\n", text):
            with contextlib.suppress(ValueError):  # output of another process is in between
                return json.loads(line)
        return None

    def end(self) -> None:
        self.step.kill()
        self.step.wait()
