"""Profiles of clusters, batch scripts, and the functions of a job's processes. These tests need no Slurm."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import build_config, config
from common.errors import UserError
from launch import (
    batch_script,
    clusters,
    code_snapshot,
    heartbeat,
    node_check,
    rank_records,
    slurm,
    slurm_client,
    supervisor,
)
from launch.clusters import Cluster
from launch.file_tails import last_step, tail
from launch.slurm_rank import distributed
from pretrain.parallel.engine import accumulation
from pretrain.recipes.recipe import load
from tests import slurm as slurm_of_tests
from tests.conftest import call

TWO = """
small: {partition: debug, hours: 0.5}
large:
  nodes: 2-4
  gpus: 8
  cpus: 12
  memory_gb: 900
  partition: gpu
  qos: normal
  account: me
  constraint: h100
  reservation: week
  exclude: n7
  sbatch: [--mail-type=FAIL, --exclusive]
  setup: [module load cuda]
  environment: ["NCCL_DEBUG=WARN, please"]
"""


BEAT = """
import sys, time, pathlib
from launch import heartbeat
heartbeat.PERIOD = 0.01
with heartbeat.heartbeat(pathlib.Path(sys.argv[1])):
    time.sleep(60)
"""
real_sleep = time.sleep


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file clusters.yaml for this test."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = tmp_path / "unlabeled" / "clusters.yaml"
    path.parent.mkdir()
    path.write_text(TWO)
    assert clusters.file() == path
    return path


# ---------------------------------------------------------------- profiles
def test_options_of_the_command_line_replace_those_of_the_profile(profiles: Path):
    cluster = clusters.find("large", gpus=4, qos=None)
    assert (cluster.gpus, cluster.qos, cluster.min_nodes, cluster.max_nodes) == (4, "normal", 2, 4)
    assert cluster.processes_per_node == 4 and clusters.find("small").processes_per_node == 1
    assert clusters.find("large", gpus=0, processes=3).processes_per_node == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: {gpu: 8}", ["gpu = 8", "no such key", "gpus"]),
        ("a: {nodes: 4-2}", ["nodes = '4-2'", "nodes: 2-4"]),
        ("a: {nodes: 0}", ["nodes = 0", "nodes: 2-4"]),
        ("a: {hours: 0}", ["hours = 0", "above 0"]),
        ("a: {gpus: many}", ["gpus = 'many'", "expected"]),
        ("a: {environment: [PATH]}", ["environment = 'PATH'", "NAME=VALUE"]),
        ("a: {sbatch: [-p x]}", ["sbatch = '-p x'", "--OPTION=VALUE"]),
        ("a: {mounts: [/data]}", ["mounts", "container: IMAGE"]),
        ("a: {environment: ['HTTPS_PROXY=http://joe:hunter@proxy']}", ["http://***@proxy", "only you can read"]),
        ("a: {setup: ['curl https://h/x?token=hunter']}", ["setup = ", "?token=***", "setup: ['. FILE']"]),
        ("a: 8", ["a = 8", "gpus: 8"]),
        ("- a", ["no mapping"]),
        ("a: {sbatch: [--time=5]}", ["sbatch = '--time=5'", "write hours"]),
        ("a: {sbatch: [--nod=2]}", ["--nodes is set by", "write nodes"]),  # sbatch takes shortened names
        ("a: {sbatch: [--no-requeue]}", ["--no-requeue is set by", "take it out"]),
    ],
)
def test_a_wrong_profile_is_refused_with_file_value_and_remedy(text: str, words: list[str], profiles: Path):
    profiles.write_text(text)
    with pytest.raises(UserError) as error:
        clusters.find("a")
    assert all(word in str(error.value) for word in [str(profiles), *words]), error.value
    assert "hunter" not in str(error.value)


def test_a_file_of_profiles_that_cannot_be_read(profiles: Path):
    profiles.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"clusters\.yaml: cannot be read \(it is not a text file\)"):
        clusters.find("a")
    profiles.unlink()
    profiles.mkdir()
    with pytest.raises(UserError, match=r"clusters\.yaml: cannot be read \(Is a directory\)"):
        clusters.find("a")
    profiles.rmdir()


def test_a_cluster_that_is_not_there(profiles: Path):
    with pytest.raises(UserError, match="no such cluster; did you mean large"):
        clusters.find("larg")
    with pytest.raises(UserError, match="several clusters; name one with --on small, --on large"):
        clusters.find("")
    profiles.unlink()
    assert clusters.find("", nodes="3").max_nodes == 3
    with pytest.raises(UserError, match="launch --init"):
        clusters.find("large")


# ---------------------------------------------------------------- the batch script
def test_a_profile_of_evaluation_jobs_without_cores_is_refused_before_submission(
    profiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its cores are the share of the GPUs, which nobody knows without sinfo; the watcher would learn that in its job."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(slurm, "_check", lambda runs, cluster: None)
    clusters.file().write_text("small: {gpus: 1, hours: 1}")
    with pytest.raises(UserError, match=r"cpus is not given, and sinfo .* is not installed here"):
        slurm.submit([load("demo", [f"run={tmp_path}/runs/a"])], Cluster(evaluation="small"))
    assert not (tmp_path / "runs").exists()


def test_the_batch_script_holds_all_options(profiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    run = tmp_path / "a run"
    words = ["parallel.mode=ddp", "data.train=x", f"run={run}", "data.batch=128"]
    assert call("launch", "demo", *words, "--on", "large", "--hours", "1.5", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    folder = tmp_path / "jobs" / "a run-1"
    for option in (
        *("nodes=2-4", "gpus-per-node=8", "cpus-per-task=96", "mem=921600M", "partition=gpu"),
        *("qos=normal", "account=me", "constraint=h100", "reservation=week", "exclude=n7", "mail-type=FAIL"),
        *("exclusive", "time=90", "signal=B:USR2@120", "requeue", "no-kill", "open-mode=append"),
        *("job-name='a run'", f"output='{folder}/%j_0_log.out'"),
    ):
        assert f"#SBATCH --{option}" in lines
    assert "wckey" not in "".join(lines)
    setup = lines.index("module load cuda")
    assert lines[setup + 1] == "export NCCL_DEBUG='WARN, please'"
    assert lines[setup + 2].startswith(f"export PYTHONPATH={tmp_path}/jobs/code-{code_snapshot.code_hash()}$")
    assert lines[setup - 1] == "trap '' USR2"
    assert lines[-1] == f"exec {shlex.quote(sys.executable)} -u -m submitit.core._submit '{folder}'"
    assert not folder.parent.exists()  # nothing was written


def test_processes_that_do_not_fit_are_refused_before_submission(profiles: Path, tmp_path: Path):
    words = ["data.train=x", f"run={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="single is one process, not 2"):
        call("launch", "demo", *words, "--on", "small", "--nodes", "2", "--dry-run")
    with pytest.raises(UserError, match=r"3 processes do not divide it; write data\.batch=129"):
        call("launch", "demo", *words, "parallel.mode=ddp", "--on", "small", "--nodes", "3", "--dry-run")
    call("launch", "demo", *words, "parallel.mode=ddp", "--on", "small", "--nodes", "2-3", "--dry-run")  # 2 of 3
    cfg = load("demo", [*words, "parallel.mode=ddp", "parallel.micro_batch=48"])
    with pytest.raises(
        UserError, match=r"parallel\.micro_batch = 48: data\.batch = 128 over 2 processes does not divide"
    ):
        supervisor.check_world(cfg, 2)
    recipe = load("mae_vits16", [*words, "parallel.mode=ddp"])  # of the guide, on its profile: 2 nodes of 8 GPUs
    for processes, micro_batches in ((1, 8), (4, 2), (8, 1), (16, 1), (1024, 1)):
        supervisor.check_world(recipe, processes)
        assert accumulation(recipe, False, processes) == micro_batches


def test_an_array_has_a_run_for_each_combination(tmp_path: Path):
    made = slurm.recipes("demo", [f"run={tmp_path}/r"], ["seed=0,1", "optim.lr=[1e-3, 2e-3]"])
    assert [(one.seed, one.optim.lr.value) for one in made] == [(0, 1e-3), (0, 2e-3), (1, 1e-3), (1, 2e-3)]
    assert [Path(one.run).name for one in made][:2] == ["r_seed-0_lr-1e-3", "r_seed-0_lr-2e-3"]
    stored = slurm.recipes("demo", [f"run={tmp_path}/r", "checkpoint.folder=s3://b/c/"], ["seed=0,1"])
    assert [one.checkpoint.folder for one in stored] == ["s3://b/c_seed-0", "s3://b/c_seed-1"]
    (alone,) = slurm.recipes("demo", [f"run={tmp_path}/r", "checkpoint.folder=s3://b/c"], [])
    assert alone.checkpoint.folder == "s3://b/c"
    (alone,) = slurm.recipes("demo", ["run=runs/x"], [])
    assert alone.run == str(Path.cwd() / "runs" / "x")
    for entry, words in (
        ("seed=0,0", "values that differ"),
        ("run=a,b", "KEY=VALUE,VALUE"),
        ("seed", "no override"),
        ("steps=9", "write steps=9 before --array"),
    ):
        with pytest.raises(UserError, match=words):
            slurm.recipes("demo", [], [entry])


@pytest.mark.parametrize(("name", "words"), [("50%", "holds '%'"), ("jobs", "is where the folders of jobs are")])
def test_run_folders_that_a_job_cannot_have(name: str, words: str, tmp_path: Path):
    cfg = load("demo", ["data.train=x", f"run={tmp_path / name}"])
    with pytest.raises(UserError, match=words):
        slurm.script([cfg], Cluster())


def test_a_folder_of_jobs_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / ".lock").mkdir()
    said = r"cannot be written \(Is a directory\); choose another run folder"
    with pytest.raises(UserError, match=said), slurm._one_at_a_time(tmp_path):
        pass


def test_a_job_that_cannot_be_cancelled_does_not_hide_the_first_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """If RUN/job.json cannot be written, the job that was queued is taken back."""
    for name in ("provide", "_write_folder"):
        monkeypatch.setattr(slurm, name, lambda *_: None)
    monkeypatch.setattr(slurm.periodic_scoring, "check", lambda recipe: None)
    monkeypatch.setattr(slurm.batch_script, "submit", lambda *_: ["7"])
    monkeypatch.setattr(slurm.slurm_client, "cluster_name", lambda: "here")
    asked: list[tuple[str, ...]] = []

    def fails(*words: str) -> str:
        asked.append(words)
        raise UserError("the controller is down" if words[0] == "scancel" else "the disk is full")

    monkeypatch.setattr(slurm.slurm_client, "ask", fails)
    monkeypatch.setattr(slurm.job_of_run, "write_job", fails)
    with pytest.raises(UserError, match="the disk is full"):
        slurm._submit([load("demo", [f"run={tmp_path}/run"])], Cluster(), None, 0)
    assert asked[-1] == ("scancel", "7") and [*(tmp_path / "jobs").iterdir()] == []


def test_only_the_owner_can_change_what_a_job_executes(tmp_path: Path):
    before = os.umask(0)
    try:
        with batch_script.private_files():
            (tmp_path / "job.json").touch()
            (tmp_path / "folder").mkdir()
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("job.json", "folder")] == [0o644, 0o755]


# ---------------------------------------------------------------- the snapshot of the code
def test_a_snapshot_runs_and_does_not_follow_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = code_snapshot.write(tmp_path)
    assert code_snapshot.write(tmp_path) == code and [path.name for path in tmp_path.iterdir()] == [code.name]
    env = {**os.environ, "PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    program = (
        "import common, launch.cli; from pretrain.recipes.recipe import load; load('demo'); print(common.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == str(code / "common" / "__init__.py"), done.stderr
    monkeypatch.setattr(code_snapshot, "ROOT", code)
    before = code_snapshot.code_hash()
    assert code.name == f"code-{before}"
    (code / "pretrain" / "recipes" / "demo.yaml").write_text("steps: 1\n")
    assert code_snapshot.code_hash() != before


# ---------------------------------------------------------------- what Slurm's commands say
@pytest.mark.parametrize(
    ("limit", "hours"), [("infinite", None), ("30:00", 0.5), ("12:00:00", 12.0), ("2-06:30:00", 54.5), ("n/a", None)]
)
def test_time_limits_as_sinfo_writes_them(limit: str, hours: float | None):
    assert slurm_client._hours(limit) == hours


def test_without_slurm_the_command_says_where_it_works(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="squeue --noheader --array: is not installed here; use a machine from which"):
        slurm_client.jobs(["1"])
    assert slurm_client.jobs([]) == {}


# ---------------------------------------------------------------- in the job
def test_variables_of_torch_distributed_from_those_of_slurm():
    slurm_variables = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}
    found = distributed({**slurm_variables, "SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "16"})
    assert found == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}


def test_the_reason_of_a_failed_step_is_what_its_process_wrote():
    srun = "srun: error: n2: task 0: Exited with exit code 3"
    assert batch_script.error_lines(f"{srun}\nno library\n") == "no library"
    assert batch_script.error_lines(f"a\nb\n\nc\nd\n{srun}") == "b; c; d"
    assert batch_script.error_lines(srun) == srun and batch_script.error_lines("") == ""


def test_the_cores_of_the_smallest_node(monkeypatch: pytest.MonkeyPatch):
    for text, cores in (("4", 4), ("96(x2),64", 64), ("8(x16)", 8)):
        monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", text)
        assert batch_script.cores_of_job() == cores


def test_the_rank_that_failed_first_is_named():
    first = {"rank": 2, "node": "n2", "pid": 7, "code": -9, "ended": 10.0}
    second = {"rank": 0, "node": "n1", "pid": 8, "code": 1, "ended": 10.1}
    silent = {"rank": 1, "node": "n1", "pid": 9}
    assert rank_records.cause({0: second, 2: first}) is first
    assert rank_records.cause({0: second, 1: silent, 2: first}) is first  # the one that was killed
    assert rank_records.cause({0: second, 1: silent}) is silent  # the other only waited for it
    assert rank_records.described(first) == "rank 2 on n2 was killed by SIGKILL"
    assert rank_records.described({**first, "code": -36}) == "rank 2 on n2 was killed by SIGRTMIN+2"
    assert rank_records.described({**first, "code": 1}) == "rank 2 on n2 ended with code 1"
    assert "hung or its node was lost" in rank_records.described(silent)
    assert "never started" in rank_records.described({"rank": 3, "node": "n2"})


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> supervisor.Supervisor:
    """The supervisor of a job with one run, outside of Slurm and without signal handlers."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(supervisor.time, "sleep", lambda seconds: None)
    job = {"runs": [str(tmp_path / "run")], "cluster": config.to_dict(Cluster()), "methods": {}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    return supervisor.Supervisor(tmp_path, 0)


def test_a_job_that_was_stopped_before_it_handled_signals_ends(alone: supervisor.Supervisor):
    (alone.folder / supervisor.STOP).touch()  # as `unlabeled stop` does before it sends its signal, which was lost
    assert alone.supervise() == 0 and alone.state["ended"] == "stopped" and alone.state["attempts"] == 0


def test_a_file_system_that_does_not_answer_once_does_not_end_the_job(
    alone: supervisor.Supervisor, monkeypatch: pytest.MonkeyPatch
):
    rank_records.record(alone.folder / "rank-0.end.json", rank=0, code=0)
    known: dict[str, rank_records.Rank] = {}

    def stale(path: object) -> list[str]:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", stale)
        patch.setattr(os, "stat", stale)
        rank_records.read_new_ends(alone.folder, known)
        assert not known and not alone.should_stop()
    rank_records.read_new_ends(alone.folder, known)
    assert [*known] == ["rank-0.end.json"]


def test_ranks_that_fail_while_a_run_stops_are_no_fault_of_it(
    alone: supervisor.Supervisor, monkeypatch: pytest.MonkeyPatch
):
    def attempt(nodes: list[str]) -> dict[int, rank_records.Rank]:
        alone.signals.append(signal.SIGUSR2)
        return {0: {"rank": 0, "node": "n1", "pid": 7, "code": -9, "ended": 1.0}}

    monkeypatch.setattr(alone, "nodes", lambda: ["n1"])
    monkeypatch.setattr(alone, "attempt", attempt)
    monkeypatch.setattr(alone, "requeue", lambda: 75)
    alone.cluster.max_restarts = 0
    assert alone.supervise() == 75 and (alone.state["restarts"], alone.state["ended"]) == (0, "")


def test_a_state_that_cannot_be_written_is_written_later(alone: supervisor.Supervisor):
    (alone.folder / "state.partial").mkdir()  # as if the disk were full
    alone.update_state(restarts=3)
    assert alone.state["restarts"] == 3 and not (alone.folder / "state.json").exists()
    (alone.folder / "state.partial").rmdir()
    alone.update_state(in_a_row=1)
    state = rank_records.read_record(alone.folder / "state.json")
    assert (state["restarts"], state["in_a_row"]) == (3, 1)


RANK = """
import sys
from pathlib import Path
from launch import slurm_rank
sys.executable = "/bin/true"  # the trainer
sys.exit(slurm_rank.run(Path(sys.argv[1]), "recipe.yaml"))
"""


@pytest.mark.slow
def test_how_a_rank_has_ended_is_recorded_when_the_disk_has_space_again(tmp_path: Path):
    for name in ("rank-0.partial", "rank-0.end.partial"):
        (tmp_path / name).mkdir()  # as if the disk were full
    env = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
    env |= {"SLURMD_NODENAME": "n1", "SLURM_STEP_ID": "0"}
    rank = subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path)], env={**os.environ, **env})
    with pytest.raises(subprocess.TimeoutExpired):
        rank.wait(1.5)
    for name in ("rank-0.partial", "rank-0.end.partial"):
        (tmp_path / name).rmdir()
    assert rank.wait(20) == 0
    (found,) = rank_records.ranks_of(tmp_path).values()
    assert found["code"] == 0 and found["pid"] > 0


def test_a_state_that_was_lost_does_not_number_attempts_anew(alone: supervisor.Supervisor):
    for number in (1, 2):
        (alone.folder / f"attempt-{number}").mkdir()
    for damaged in ("", "[1]", '{"attempts": "x", "bad_nodes": 3}'):
        (alone.folder / "state.json").write_text(damaged)
        assert supervisor.Supervisor(alone.folder.parent, 0).state["attempts"] == 2


def test_a_requeued_job_does_without_all_nodes_that_it_has_lost(
    alone: supervisor.Supervisor, monkeypatch: pytest.MonkeyPatch
):
    """Also those of an earlier start, for a day."""
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(slurm_client, "ask", lambda *words: asked.append(words) or "")
    monkeypatch.setattr(slurm_client, "jobs", lambda ids: {})
    monkeypatch.setattr(slurm_client, "REQUEUE_SECONDS", 0.0)
    now = time.time()
    alone.update_state(bad_nodes={"n1": now - 100000, "n2": now - 1000})
    again = supervisor.Supervisor(alone.folder.parent, 0)
    again.update_state(bad_nodes=again.state["bad_nodes"] | {"n3": now})
    again.requeue()
    assert asked[-1] == ("scontrol", "update", "JobId=7", "ExcNodeList=n2,n3")


def test_a_supervisor_without_a_heartbeat_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(heartbeat, "PERIOD", 0.02)
    listener = heartbeat.Listener(tmp_path / "beat", 3)

    def heard(seconds: float) -> bool:
        """Whether the heartbeat was heard all the time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if listener.is_lost():
                return False
            real_sleep(0.002)
        return True

    assert heard(0.2)  # a file that cannot be read says nothing
    (tmp_path / "beat").touch()
    assert heard(0.2)  # nor an empty one, which is left where the disk is full
    (tmp_path / "beat").write_text("x" * 100)
    with heartbeat.heartbeat(tmp_path / "beat"):
        assert heard(0.2) and (tmp_path / "beat").stat().st_size == 100  # in place: it needs no space
    (tmp_path / "beat").unlink()
    writer = subprocess.Popen([sys.executable, "-c", BEAT, str(tmp_path / "beat")])
    while not (tmp_path / "beat").is_file():
        real_sleep(0.01)
    assert heard(0.3)
    writer.kill()
    writer.wait()
    assert not heard(1.0) and not heard(1.0)  # and again, as a requeue may be refused


def test_a_request_is_repeated_while_the_controller_does_not_answer(
    alone: supervisor.Supervisor, monkeypatch: pytest.MonkeyPatch
):
    failures = [UserError("scontrol requeue 7: did not answer")] * 2

    def request() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert slurm_client.repeated(request, alone.say) == "done" and not failures
    failures += [UserError("scontrol requeue 7: failed: no such job")]
    monkeypatch.setattr(slurm_client, "REPEAT_SECONDS", -1.0)
    with pytest.raises(UserError, match="no such job"):
        slurm_client.repeated(request, alone.say)


@pytest.mark.parametrize(("error", "count"), [("did not answer in 60 s", 3), ("failed: Invalid job id specified", 1)])
def test_the_end_of_a_step_is_asked_for_until_slurm_answers(
    error: str, count: int, alone: supervisor.Supervisor, monkeypatch: pytest.MonkeyPatch
):
    step = subprocess.Popen(["sleep", "60"])
    rank_records.record(alone.folder / "rank-0.json", rank=0, node="n1", step="3", pid=7)
    asked: list[tuple[str, ...]] = []

    def ask(*words: str) -> str:
        asked.append(words)
        if len(asked) < 3:
            raise UserError(f"scancel: {error}")
        step.kill()
        return ""

    monkeypatch.setattr(slurm_client, "ask", ask)
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 0.1)
    alone.end(step, alone.folder)
    assert asked == [("scancel", "--signal=KILL", "7.3")] * count and step.poll() == -signal.SIGKILL


def test_a_node_that_differs_or_is_slow_is_left_out(tmp_path: Path):
    found = node_check.make_report(tmp_path, 0)
    assert found["disk"] == "" and found["free_gb"] > 0 and found["mb_per_second"] > 0
    good = {**found, "free_gb": 100.0, "mb_per_second": 100.0}  # whatever this machine's disk does at present
    now = good["clock"]
    assert node_check.problems({"n1": good, "n2": good}, 0, now, now) == {}
    assert node_check.problems({"n1": good}, 0, now, now + 60) == {}  # another node had not answered for a minute
    assert node_check.problems({"n1": good}, 0, now - 60, now) == {}
    bad = {
        "torch": ({**good, "torch": "1.0"}, "torch is 1.0, but "),
        "code": ({**good, "code": "0"}, "code is 0, but "),
        "clock": ({**good, "clock": good["clock"] + 100}, "its clock differs by 100 s"),
        "free": ({**good, "free_gb": 0.1}, "0.1 GB of free disk space"),
        "disk": ({**good, "disk": "Read-only file system"}, "cannot write to the run folder (Read-only file system)"),
        "slow": ({**good, "mb_per_second": 0.5}, "writes to and reads from the run folder at 0.5 MB/s"),
        "gpus": ({**good, "gpus": 7}, "has 7 GPUs, but 8 are needed"),
    }
    reports = {name: {"gpus": 8, **report} for name, (report, _) in bad.items()}
    well = {**good, "gpus": 8}
    found = node_check.problems({"n1": well, "n2": well, **reports}, 8, now, now)
    assert found.keys() == bad.keys()
    assert all(words in found[name] for name, (_, words) in bad.items()), found
    assert (
        node_check.make_report(tmp_path / "missing", 0)["disk"] == "No such file or directory"
    )  # not mounted on that node


def test_the_end_of_a_file(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert last_step(tmp_path) == 0 and tail(path, 3) == []
    path.write_text("".join(f'{{"step": {n}, "loss": 1.0}}\n' for n in range(5000)) + '{"step": 50')
    assert last_step(tmp_path) == 5000
    assert tail(path, 2) == ['{"step": 4999, "loss": 1.0}', '{"step": 50']


def test_a_profile_survives_the_way_to_the_job(profiles: Path):
    cluster = clusters.find("large")
    assert config.to_dict(build_config.build(Cluster, config.to_dict(cluster), {})) == config.to_dict(cluster)


def test_only_the_set_up_of_the_tests_installs_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    """A run of pytest, even as root, installs nothing; `make slurm` does, and says so."""
    called = tmp_path / "called"
    (tmp_path / "apt-get").write_text(f'#!/bin/sh\necho "$@" >> {called}\n')
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(slurm_of_tests, "PATH", str(tmp_path))  # no program of Slurm
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.0.1")
    assert "`make slurm` installs them" in slurm_of_tests.missing() and not called.exists()
    slurm_of_tests.install()
    assert (
        called.read_text().splitlines()[-1]
        == f"install -y -qq --no-install-recommends {' '.join(slurm_of_tests.PACKAGES)}"
    )
    said = capfd.readouterr().out
    assert "installing slurmctld slurmd slurm-client munge with apt-get" in said and "will be SKIPPED" in said
