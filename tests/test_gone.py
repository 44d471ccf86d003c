"""Resources that disappear while a command works: the reader of its output, the run folder, shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.shards import index
from tests.tars import jpeg, write_tar


def without_a_reader(*command: str) -> tuple[int, str]:
    """(exit code, standard error) of a command whose output is closed, as after `| head` has ended."""
    reading, writing = os.pipe()
    os.close(reading)
    with subprocess.Popen([sys.executable, *command], stdout=writing, stderr=subprocess.PIPE, text=True) as process:
        os.close(writing)
        _, said = process.communicate()
    return process.returncode, said


def test_a_command_whose_output_nobody_reads_ends_without_a_word():
    assert without_a_reader("-m", "launch.cli", "recipes") == (141, "")
    assert without_a_reader("-m", "launch.cli", "train", "nope")[0] == 2  # an error is one all the same


def test_work_goes_on_where_nobody_reads_its_progress():
    code = "from common.progress import Progress\np = Progress('x', 2)\np.update(1)\np.update(2)\nimport sys; sys.stderr.write('done')"
    assert without_a_reader("-c", code) == (0, "done")


def test_a_run_folder_that_is_gone_is_made_again(tmp_path: Path):
    from pretrain.run_log import Log

    log = Log(tmp_path / "run")
    log("a line")
    shutil.rmtree(tmp_path / "run")
    log("another")
    assert "another" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.slow
def test_shared_memory_that_is_too_small_is_one_line(tmp_path: Path):
    """A container's /dev/shm may have 64 MB, and a write beyond that would end the worker by SIGBUS. The small one
    is mounted in a separate namespace or, without the permission for that, `statvfs` is replaced."""
    command = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True).returncode:
        command = []
    small = "import os\nfull = os.statvfs_result((4096, 4096, 256, 256, 256, 1, 1, 1, 0, 255))\nos.statvfs = lambda path: full\n"
    write_tar(tmp_path / "0.tar", [(f"{n}.jpg", jpeg(n)) for n in range(4)])
    index.write(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(
        ("" if command else small)
        + "import sys\nimport numpy as np\nfrom data_pipeline.shards.samples import Samples\nfrom data_pipeline.storage.urls import DataError\n"
        "from data_pipeline.stream.stream import Stream\n\n\n"
        "def views(sample, rng):\n    return {'x': np.zeros(1 << 20, np.uint8)}\n\n\n"
        "try:\n    next(Stream(Samples([sys.argv[1]]), views, 4, workers=1))\nexcept DataError as error:\n    print(error)\n"
    )
    run = [*command, sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(
        run, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert done.returncode == 0 and "/dev/shm: has 1 MB left, but a batch takes 4 MB" in done.stdout, done.stderr
    assert "--shm-size" in done.stdout and "data.workers=0" in done.stdout
