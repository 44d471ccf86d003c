"""Check a node before a run starts on it. `python -m launch.node_check RUN GPUS` runs on each node and prints a report
as one line of JSON; the supervisor, which also sets a time limit, finds problems in the reports of all nodes
(`problems`). This module does not import torch.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.output import say
from launch import code_snapshot

MB = 16  # size of the test file that is written to the run folder and read again
MIN_MB_PER_SECOND = 2.0  # speed of writing and reading the test file; a healthy file system is far faster
MIN_FREE_GB = 0.5  # free space on the file systems of the run folder and of temporary files
MAX_CLOCK_DIFFERENCE = 30.0  # seconds between the clocks of a node and of the supervisor
EQUAL_ENTRIES = ("python", "torch", "numpy", "code")  # entries of a report that must be equal on all nodes
Report = Mapping[str, Any]


def make_report(run: Path, gpus: int) -> dict[str, Any]:
    """A report on this node: versions, a hash of the code, clock, GPUs, and speed and free space of the run folder."""
    out: dict[str, Any] = {"clock": time.time(), "python": platform.python_version(), "code": code_snapshot.code_hash()}
    out |= {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = [path.name for path in Path("/dev").glob("nvidia[0-9]*")]
        out["gpus"] = min(len(devices), len(visible.split(","))) if visible else len(devices)
    out |= {"free_gb": 0.0, "mb_per_second": 0.0, "disk": ""}
    try:
        out["free_gb"] = min(shutil.disk_usage(folder).free for folder in (run, tempfile.gettempdir())) / 1e9
        began = time.perf_counter()
        with tempfile.TemporaryFile(dir=run) as file:
            file.write(bytes(MB << 20))
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            is_complete = len(file.read()) == MB << 20
    except OSError as error:
        return out | {"disk": error.strerror or str(error)}
    return out | {
        "disk": "" if is_complete else "a file had fewer bytes than were written",
        "mb_per_second": MB / (time.perf_counter() - began),
    }


def problems(reports: Mapping[str, Report], gpus: int, started: float, received: float) -> dict[str, str]:
    """{node: its problems} for the nodes on which the run should not start.

    `reports`: the result of `make_report` on each node that has answered. If versions differ, the nodes with the rarer
    version have the problem. `started`, `received`: this machine's clock before the checks were started and after the
    last report was received; a report may have been made at any time between the two.
    """
    most_frequent = {
        key: Counter(report[key] for report in reports.values()).most_common(1)[0][0]
        for key in EQUAL_ENTRIES
        if reports
    }
    out: dict[str, str] = {}
    for node, report in reports.items():
        found = [
            f"{key} is {report[key]}, but {most_frequent[key]} on most nodes"
            for key in EQUAL_ENTRIES
            if report[key] != most_frequent[key]
        ]
        if gpus and report["gpus"] < gpus:
            found.append(f"has {report['gpus']} GPUs, but {gpus} are needed")
        if report["disk"]:
            found.append(f"cannot write to the run folder ({report['disk']})")
        elif report["free_gb"] < MIN_FREE_GB:
            found.append(f"has {report['free_gb']:.1f} GB of free disk space, less than {MIN_FREE_GB}")
        elif report["mb_per_second"] < MIN_MB_PER_SECOND:
            found.append(
                f"writes to and reads from the run folder at {report['mb_per_second']:.1f} MB/s, less than"
                f" {MIN_MB_PER_SECOND:g}"
            )
        difference = report["clock"] - min(max(report["clock"], started), received)
        if abs(difference) > MAX_CLOCK_DIFFERENCE:
            found.append(f"its clock differs by {difference:.0f} s from that of the supervisor")
        if found:
            out[node] = "; ".join(found)
    return out


if __name__ == "__main__":
    say(json.dumps(make_report(Path(sys.argv[1]), int(sys.argv[2]))))
