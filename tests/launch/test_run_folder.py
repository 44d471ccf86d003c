"""What a command does with an existing run folder: only overwrite=true deletes files, and only those that the
program has written; refused commands change nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common import config
from common.errors import UserError
from pretrain import train as trainer
from pretrain.checkpoint.disk_store import DiskStore
from pretrain.checkpoint.integrity import run_json_digest
from pretrain.recipes.recipe import Recipe, load
from pretrain.run_folder import overwrite, run_lock, written_files
from pretrain.run_folder.checkpoint_owner import check_checkpoint_owner
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.run_folder.marker import run_identity
from pretrain.run_folder.prepare import prepare
from pretrain.run_folder.recipe_file import restore_recipe
from pretrain.run_folder.run_lock import Lock
from pretrain.run_folder.written_files import EXPORT_FILES, RUN_FILES, matches
from pretrain.train import train
from tests.conftest import call, tiny_recipe
from tests.services import FaultProxy


@pytest.fixture(scope="module")
def made(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with checkpoints and exports at 2 and 4."""
    return train(tiny_recipe("mae", shards, tmp_path_factory.mktemp("made") / "run", *SIZE))


SIZE = ("steps=4", "checkpoint=2", "export=2")


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def recipe(shards: Path, run: Path, *overrides: str):
    return tiny_recipe("mae", shards, run, *SIZE, *overrides)


def files(folder: Path) -> dict[str, bytes]:
    """{path: content} of every file below a folder; the content of a link is its target."""
    out = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            out[str(path.relative_to(folder))] = os.readlink(path).encode()
        elif path.is_file():
            out[str(path.relative_to(folder))] = path.read_bytes()
    return out


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]


def log(run: Path) -> str:
    return (run / "log.txt").read_text()


def previous_version(run: Path) -> None:
    """Change a run into one that a version before ids and markers has written."""
    for name in (".run.json", "checkpoints/owner.json"):
        (run / name).unlink(missing_ok=True)
    forget_ids(run / "checkpoints")


def forget_ids(checkpoints: Path) -> None:
    for path in checkpoints.glob("*/run.json"):
        about = json.loads(path.read_text())
        about.pop("run", None)
        del about["digest"]
        path.write_text(json.dumps({**about, "digest": run_json_digest(about)}))


# ---------------------------------------------------------------- what is deleted
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("extra", [[], ["overwrite=true"], ["optim.lr=0.5"]])
def test_a_project_is_no_run(made: Path, shards: Path, tmp_path: Path, extra: list[str], copied: bool):
    """A folder with a recipe, even one copied from a run, is refused, and nothing in it changes."""
    project = tmp_path / "project"
    (project / ".git").mkdir(parents=True)
    (project / ".git" / "HEAD").write_text("ref")
    (project / "data").mkdir()
    (project / "data" / "0.json").write_text("mine")
    own = (made / "recipe.yaml").read_text() if copied else config.dump(recipe(shards, tmp_path / "x"))
    (project / "recipe.yaml").write_text(own)
    before = files(project)
    with pytest.raises(UserError, match="holds files but no run; choose another folder with run=FOLDER"):
        prepare(load(project / "recipe.yaml", [f"run={project}", *extra]), Lock())
    assert files(project) == before


def test_a_folder_that_cannot_be_made_is_an_error_of_one_line(shards: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for run in (tmp_path / "file" / "run", tmp_path / "link" / "run", tmp_path / "loop" / "run", Path("/proc/run")):
        with pytest.raises(
            UserError, match=rf"^{run}: cannot be made or read \(.*choose a folder with write permission"
        ):
            prepare(recipe(shards, run))


def test_a_disk_without_room_for_the_recipe_is_named(run: Path, shards: Path, monkeypatch: pytest.MonkeyPatch):
    before = files(run)

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(written_files.os, "fsync", full)
    with pytest.raises(UserError, match=r"recipe\S*yaml: cannot be written \(No space left on device\); make room"):
        prepare(recipe(shards, run, "log=3"))
    assert {name: text for name, text in files(run).items() if name != ".recipe.yaml"} == before


def test_a_copied_recipe_beside_files_with_names_that_runs_use_is_no_run(made: Path, shards: Path, tmp_path: Path):
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    shutil.copy(made / "recipe.yaml", project)
    for name in ("log.txt", "metrics.jsonl", "tokenizer.json", "report.html", "data/0.json"):
        (project / name).write_text("mine")
    before = files(project)
    for extra in ([], ["overwrite=true"]):
        with pytest.raises(UserError, match="holds files but no run"):
            prepare(load(project / "recipe.yaml", [f"run={project}", *extra]), Lock())
    assert files(project) == before


FOREIGN = (
    *("notes.txt", "mine/a.bin", "data/list.json", "data/0.json.bak", "export/notes.txt", "export/4/notes.txt"),
    *(
        "export/100-best/config.json",
        "checkpoints/best.pt",
        "checkpoints/000000002/notes.txt",
        "checkpoints/.a.partial/x",
    ),
    *("tensorboard/mine.csv", "pictures/me.png", "pictures/me-1.png", "log.txt.old", "run.lock"),
)


def test_overwrite_deletes_what_the_program_wrote_and_names_the_rest(
    run: Path, shards: Path, capsys: pytest.CaptureFixture
):
    whole = losses(run)
    (run / "export" / "best").symlink_to("4")
    for name in FOREIGN:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    train(recipe(shards, run, "overwrite=true", "steps=3"))
    said = capsys.readouterr().out
    assert "overwritten; these files are not the run's and were kept: " in said and "restarted" not in said
    there = files(run)
    assert all(there[name] == name.encode() for name in FOREIGN) and there["export/best"] == b"4"
    assert losses(run) == whole[:3]
    assert DiskStore(str(run / "checkpoints")).complete_names() == [
        "000000002",
        "000000003",
    ]  # one of them around a file of its user
    assert not (run / "export" / "4" / "config.json").exists() and (run / "export" / "3" / "config.json").exists()


def test_overwrite_leaves_nothing_of_the_run_before(run: Path, shards: Path):
    """The list of what the program writes is complete."""
    for name in ("report.html", "tokenizer.json", "tokenizer_config.json", "samples.jsonl", "export/vit/2/config.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    old, lock = run_identity(run), Lock()
    prepare(recipe(shards, run, "overwrite=true"), lock)
    assert set(files(run)) == {"recipe.yaml", ".run.json", ".run.lock"} and run_identity(run) != old
    lock.release()
    assert sorted(path.name for path in run.iterdir()) == [".run.json", "recipe.yaml"]


def test_a_run_that_failed_before_its_first_step_takes_a_mended_recipe_and_loses_nothing(shards: Path, tmp_path: Path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"data.batch = 1000 is more than"):
        train(recipe(shards, run, "data.batch=1000"))
    (run / "notes.txt").write_text("mine")
    (run / "export").mkdir()
    (run / "export" / "mine.txt").write_text("mine")
    before = files(run)
    prepare(recipe(shards, run, "optim.lr=0.5"), lock := Lock())
    lock.release()
    assert {**files(run), "recipe.yaml": b""} == {**before, "recipe.yaml": b""}
    assert load(run).optim.lr.value == 0.5


@pytest.mark.parametrize("moved", ["metrics.jsonl", "checkpoints"])
def test_a_run_with_results_is_never_taken_for_a_failed_one(run: Path, shards: Path, tmp_path: Path, moved: str):
    (run / moved).rename(tmp_path / "moved")
    before = files(run)
    with pytest.raises(UserError, match="holds a run of another recipe"):
        prepare(recipe(shards, run, "optim.lr=0.5"))
    assert files(run) == before


@pytest.mark.slow
def test_checkpoints_elsewhere_count_where_metrics_were_moved(shards: Path, tmp_path: Path):
    run, elsewhere = tmp_path / "run", f"checkpoint.folder={tmp_path / 'elsewhere'}"
    train(recipe(shards, run, elsewhere))
    for name in ("metrics.jsonl", "export"):
        (run / name).rename(tmp_path / name)
    before = files(tmp_path)
    with pytest.raises(UserError, match=rf"checkpoint.resume={tmp_path}/elsewhere/000000004 run=NEW"):
        train(recipe(shards, run, elsewhere, "optim.lr=0.5"))
    assert files(tmp_path) == before


def test_a_run_folder_may_be_a_link(run: Path, shards: Path, tmp_path: Path):
    """Its sub-folders may be links, too. Their contents are deleted, the links are kept."""
    disk = tmp_path / "disk"
    disk.mkdir()
    for name in ("checkpoints", "export"):
        (run / name).rename(disk / name)
        (run / name).symlink_to(disk / name)
    link = tmp_path / "link"
    link.symlink_to(run)
    (run / "notes.txt").write_text("mine")
    train(recipe(shards, link, "overwrite=true", "steps=2"))
    assert link.is_symlink() and (run / "export").is_symlink() and (run / "notes.txt").read_text() == "mine"
    assert len(losses(run)) == 2 and sorted(p.name for p in (disk / "export").iterdir()) == ["0", "2"]
    assert DiskStore(str(disk / "checkpoints")).complete_names() == ["000000002"]
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"dangling: is a link to .*/nowhere, which does not exist; make that folder"):
        prepare(recipe(shards, tmp_path / "dangling"))


@pytest.mark.parametrize(
    ("first", "again", "wiped"),
    [
        ({"TORCHELASTIC_RUN_ID": "a"}, {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "1"}, False),
        ({"TORCHELASTIC_RUN_ID": "a"}, {"TORCHELASTIC_RUN_ID": "a"}, False),  # after a change of nodes the count is 0
        ({"TORCHELASTIC_RUN_ID": "none"}, {"TORCHELASTIC_RUN_ID": "none"}, False),  # the same agent: our parent
        ({"TORCHELASTIC_RUN_ID": "a"}, {"TORCHELASTIC_RUN_ID": "b"}, True),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, False),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7"}, True),  # a second command in the same allocation
        ({}, {}, True),
    ],
)
def test_a_restart_of_the_same_job_never_overwrites(
    run: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, first: dict, again: dict, wiped: bool
):
    for environment in (first, again):
        for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        prepare(recipe(shards, run, "overwrite=true"))
        gone = not (run / "metrics.jsonl").exists()
        (run / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    assert gone == wiped


@pytest.mark.slow
def test_torchrun_restarts_with_overwrite_in_the_command(shards: Path, tmp_path: Path):
    """Each attempt is killed after its first checkpoint; the second attempt resumes from the checkpoint of the
    first."""
    run, path = tmp_path / "run", tmp_path / "r.yaml"
    path.write_text(config.dump(tiny_recipe("mae", shards, run, "steps=100", "checkpoint=2")))
    script = tmp_path / "trainer.py"
    script.write_text("import sys; from tests.faults import killer; sys.exit(killer.run(sys.argv[1:]))")
    command = ["torch.distributed.run", "--nproc-per-node=1", "--max-restarts=1", "--standalone"]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(script), str(path), "overwrite=true"],
        capture_output=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "KILL": "0 set_latest+ 1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
    )
    assert done.returncode != 0
    assert DiskStore(str(run / "checkpoints")).complete_names() == [
        "000000002",
        "000000004",
    ] and "resumes from step 2" in log(run)


def test_an_overwrite_that_was_killed_is_completed(run: Path, shards: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(overwrite, "delete_files", killed)
        prepare(recipe(shards, run, "overwrite=true", "optim.lr=0.5"))
    assert (run / "metrics.jsonl").exists()
    prepare(recipe(shards, run, "optim.lr=0.5"))
    assert set(files(run)) == {"recipe.yaml", ".run.json"} and "clearing" not in (run / ".run.json").read_text()


def test_runs_of_the_previous_version_go_on_and_can_be_overwritten(run: Path, shards: Path, tmp_path: Path):
    previous_version(run)
    train(recipe(shards, run, "export=1"))
    assert "has finished its 4 steps" in log(run)
    previous_version(run)
    (run / "notes.txt").write_text("mine")
    prepare(recipe(shards, run, "overwrite=true"))
    assert set(files(run)) == {"recipe.yaml", ".run.json", "notes.txt"}


def test_the_marker_lists_what_is_written(run: Path, shards: Path):
    """A file that the marker does not list is kept, and a marker cannot list files that the program never writes."""
    marker = json.loads((run / ".run.json").read_text())
    assert len(marker["id"]) == 32 and "metrics.jsonl" in marker["writes"]
    (run / "notes.txt").write_text("mine")
    writes = [name for name in marker["writes"] if name != "log.txt"]
    (run / ".run.json").write_text(json.dumps({**marker, "writes": [*writes, "*", "../*"]}))
    prepare(recipe(shards, run, "overwrite=true"))
    assert set(files(run)) == {"recipe.yaml", ".run.json", "notes.txt", "log.txt"}
    (run / ".run.json").write_text("{}")
    with pytest.raises(UserError, match=r"\.run\.json: is damaged or was not written by this program"):
        prepare(recipe(shards, run))


OPTIONS = {  # runs that between them write everything: scores, pictures, samples, tokenizers, every form of an export
    "dinov2": ["model.dim=128", "model.heads=2"],
    "gpt": ["eval.prompts=[the sea]"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2", "gpt"])
def test_everything_that_a_run_and_its_exports_write_is_listed(name: str, shards: Path, tmp_path: Path):
    """Temporary files that Python opens are included, because a kill may leave any of them."""
    run, opened = tmp_path / "run", set[str]()
    watching = True

    def hook(event: str, args: tuple) -> None:
        path, flags = (args[0], args[2] or 0) if event == "open" and watching else ("", 0)
        if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(f"{run}/"):
            opened.add(str(path).removeprefix(f"{run}/"))

    sys.addaudithook(hook)
    more = [f"eval.gallery={shards}", f"eval.val={shards}"] if name != "gpt" else []
    train(tiny_recipe(name, shards, run, *SIZE, *OPTIONS[name], *more))
    also = ("--also", "timm", "official", "torch", "onnx") if name == "dinov2" else ()
    assert call("export", run, *also) == 0 and call("report", run) == 0
    watching = False
    there = set(files(run))
    assert opened > {".recipe.yaml", "log.txt"}
    patterns = [tuple(pattern.split("/")) for pattern in RUN_FILES]
    unlisted = {
        path for path in there | opened if not any(matches(tuple(path.split("/")), pattern) for pattern in patterns)
    }
    assert not {path for path in unlisted if not path.startswith("checkpoints/")}
    if name == "dinov2":
        listed = {file for file in EXPORT_FILES if ".partial" not in file and file[0] != "."}
        written = {path.removeprefix("export/4/") for path in there if path.startswith("export/4/")}
        of_others = {"tensors.safetensors", "tokenizer.json", "tokenizer_config.json", "video_preprocessor_config.json"}
        of_others |= {"model.int8.onnx", "int8.json"}  # of `quantize`: tests/eval/test_int8.py
        assert written == listed - of_others
    prepare(tiny_recipe(name, shards, run, *SIZE, *OPTIONS[name], *more, "overwrite=true"))
    assert set(files(run)) == {"recipe.yaml", ".run.json"}


@pytest.mark.slow
def test_an_export_into_a_folder_of_files_keeps_them(run: Path, shards: Path):
    shutil.rmtree(run / "export" / "4")
    (run / "export" / "4").mkdir()
    (run / "export" / "4" / "notes.txt").write_text("mine")
    train(recipe(shards, run, "checkpoint.resume=2"))
    assert {"notes.txt", "config.json", "model.safetensors"} <= {path.name for path in (run / "export" / "4").iterdir()}


# ---------------------------------------------------------------- whose checkpoints they are
@pytest.mark.slow
def test_a_checkpoint_folder_belongs_to_one_run(shards: Path, tmp_path: Path):
    """Another run that names it is refused, even with overwrite=true; the alternative in the error message works."""
    first, second, there = tmp_path / "first", tmp_path / "second", tmp_path / "there"
    train(recipe(shards, first, f"checkpoint.folder={there}"))
    assert DiskStore(str(there)).run_json("000000004")["run"] == run_identity(first)
    before = files(tmp_path / "first") | files(there)
    for extra in ([], ["overwrite=true"]):
        with pytest.raises(
            UserError, match=rf"checkpoint.folder = {there}: holds the checkpoints of another run, {first}"
        ) as info:
            train(recipe(shards, second, f"checkpoint.folder={there}", *extra))
        assert files(first) | files(there) == before
    with pytest.raises(UserError, match=f"of another run, {first}"):
        train(recipe(shards, second, f"checkpoint.folder={there}/../there"))
    resume = str(info.value).partition("to resume from there: ")[2].partition(" ")[0]
    train(recipe(shards, second, resume, f"checkpoint.folder={tmp_path / 'another'}"))
    assert "resumes from step 4" in log(second) and files(first) | files(there) == before


def test_a_copy_of_a_run_folder_does_not_take_the_checkpoints_of_the_original(shards: Path, tmp_path: Path):
    """A copied run folder has the id of the original, whose checkpoints lie elsewhere. A moved folder keeps them."""
    run, there = tmp_path / "run", tmp_path / "there"
    train(recipe(shards, run, f"checkpoint.folder={there}"))
    copy, before = shutil.copytree(run, tmp_path / "copy"), files(there)
    for extra in ([], ["overwrite=true"]):
        with pytest.raises(UserError, match=rf"holds the checkpoints of {run}, of which {copy} is a copy") as info:
            train(recipe(shards, copy, f"checkpoint.folder={there}", *extra))
        assert files(there) == before
    told = str(info.value).partition("in the copy write ")[2].replace("ANOTHER", str(tmp_path / "another"))
    train(recipe(shards, copy, *told.split(), "steps=5", "optim.lr=1e-3"))
    assert "resumes from step 4" in log(copy) and files(there) == before
    run.rename(tmp_path / "moved")
    train(recipe(shards, tmp_path / "moved", f"checkpoint.folder={there}", "steps=5"))
    assert "resumes from step 4" in log(tmp_path / "moved")


def test_a_run_whose_checkpoints_are_not_found_does_not_start_again(run: Path, shards: Path, tmp_path: Path):
    """A disk that is not mounted, or a command with another checkpoint.folder: training again from the first step would
    delete the rows of metrics."""
    kept = run / "checkpoints"
    train(recipe(shards, run, "steps=5"))  # the fixture has copied the folder
    before = (run / "metrics.jsonl").read_bytes()
    elsewhere = f"checkpoint.folder={tmp_path / 'empty'}"
    with pytest.raises(UserError, match=rf"{tmp_path}/empty: holds no checkpoint .* saved its own in {kept};") as info:
        train(recipe(shards, run, "steps=6", elsewhere))
    assert (run / "metrics.jsonl").read_bytes() == before and not list((tmp_path / "empty").glob("0*"))
    resume = str(info.value).partition(", or ")[2].partition(" ")[0].replace("STEP", "5")
    train(recipe(shards, run, "steps=6", elsewhere, resume))
    assert "resumes from step 5" in log(run)
    shutil.rmtree(tmp_path / "empty")
    with pytest.raises(UserError, match=rf"has saved checkpoints in {tmp_path}/empty, which holds none now"):
        train(recipe(shards, run, "steps=6", elsewhere))
    train(recipe(shards, run, "steps=6", elsewhere, "checkpoint.resume=none"))
    assert [step for step, _ in losses(run)] == [*range(6)]


def test_the_folder_inside_of_another_run_is_that_runs(run: Path, shards: Path, tmp_path: Path):
    (run / "checkpoints" / "owner.json").unlink()
    for _ in ("with ids", "of the previous version"):
        with pytest.raises(UserError, match="holds the checkpoints of another run, "):
            train(recipe(shards, tmp_path / "second", f"checkpoint.folder={run / 'checkpoints'}"))
        forget_ids(run / "checkpoints")


def test_what_others_keep_in_a_checkpoint_folder_stays(shards: Path, tmp_path: Path):
    """Checkpoints of another program are kept, even with overwrite=true, and so is its file `latest`."""
    run, there = tmp_path / "run", tmp_path / "there"
    command = recipe(shards, run, f"checkpoint.folder={there}", "overwrite=true")
    for name in ("500/.metadata", "500/__0_0.distcp", "000000500/__0_0.distcp", "notes.txt"):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_text("theirs")
    before = files(there)
    prepare(command.replace(overwrite=True))
    assert files(there) == before
    for make in (lambda path: path.write_text("500\n"), lambda path: path.symlink_to("500")):
        make(there / "latest")
        before = files(there)
        for check in (check_checkpoint_owner, lambda command, run: prepare(command.replace(overwrite=True))):
            with pytest.raises(UserError, match=r"latest: (was not written by this program|cannot be read)"):
                check(command, run)
        assert files(there) == before
        (there / "latest").unlink()
    DiskStore(str(there)).set_owner(run_identity(run))
    before = files(there)
    prepare(command.replace(overwrite=True))  # of a folder that is the run's, its own names go
    assert {name for name in before if name not in files(there)} == {"000000500/__0_0.distcp"}


def test_a_checkpoint_of_another_run_that_was_copied_here_stays(run: Path, shards: Path):
    copy = shutil.copytree(run / "checkpoints" / "000000002", run / "checkpoints" / "000000001")
    about = json.loads((copy / "run.json").read_text())
    about["run"]["id"] = "b" * 32
    del about["digest"]
    (copy / "run.json").write_text(json.dumps({**about, "digest": run_json_digest(about)}))
    cut(run, 2)
    train(recipe(shards, run, "checkpoint.keep=1"))
    assert DiskStore(str(run / "checkpoints")).complete_names() == ["000000001", "000000004"]
    before = files(run)
    with pytest.raises(UserError, match="holds the checkpoints of another run, "):
        prepare(recipe(shards, run, "overwrite=true"))
    assert files(run) == before


@pytest.mark.slow
def test_overwrite_starts_at_step_0_where_checkpoints_lie_elsewhere(shards: Path, tmp_path: Path):
    run, there = tmp_path / "run", tmp_path / "there"
    options = [f"checkpoint.folder={there}", "overwrite=true"]
    train(recipe(shards, run, *options, "optim.lr=0.5"))
    (there / "000000004" / "notes.txt").write_text("mine")
    train(recipe(shards, run, *options))
    assert [step for step, _ in losses(run)] == [0, 1, 2, 3] and "resumes from step" not in log(run)
    assert (there / "000000004" / "notes.txt").read_text() == "mine" and DiskStore(str(there)).latest() == "000000004"
    shutil.rmtree(run)  # its folder is lost: it is known by its path
    train(recipe(shards, run, *options))
    assert "resumes from step" not in log(run)
    shutil.rmtree(run)
    train(recipe(shards, run, f"checkpoint.folder={there}"))
    assert "resumes from step 4" in log(run)


@pytest.mark.slow
def test_a_run_of_the_previous_version_with_checkpoints_elsewhere_goes_on(shards: Path, tmp_path: Path):
    run, there = tmp_path / "run", tmp_path / "there"
    train(recipe(shards, run, f"checkpoint.folder={there}", "steps=2"))
    (run / ".run.json").unlink()
    (there / "owner.json").unlink()
    forget_ids(there)
    moved = run.rename(tmp_path / "moved")
    train(recipe(shards, moved, f"checkpoint.folder={there}", "steps=2"))
    assert "has finished" in log(moved)


def test_a_folder_that_another_run_takes_meanwhile(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    there = tmp_path / "there"
    other = {"id": "b" * 32, "folder": "/runs/b"}
    monkeypatch.setattr(
        trainer, "_refuse_unread", lambda cfg: DiskStore(str(there)).set_owner(other)
    )  # at the first step
    options = (f"checkpoint.folder={there}", "checkpoint.retry_seconds=0")
    with pytest.raises(UserError, match=r"000000002: cannot write .*has been taken by another run, /runs/b"):
        train(recipe(shards, tmp_path / "run", *options))
    assert DiskStore(str(there)).complete_names() == []


@pytest.mark.slow
def test_s3_folders_belong_to_one_run(shards: Path, tmp_path: Path, proxy: FaultProxy, store):
    there = "checkpoint.folder=s3://data/owned"
    train(recipe(shards, tmp_path / "first", there))
    for extra in ([], ["overwrite=true"]):
        with pytest.raises(UserError, match=f"s3://data/owned: holds the checkpoints of another run, {tmp_path}/first"):
            train(recipe(shards, tmp_path / "second", there, *extra))
    store.put("owned/000000004/notes.txt", b"mine")
    store.put("owned/notes.txt", b"mine")
    train(recipe(shards, tmp_path / "first", there, "optim.lr=0.5", "steps=2", "overwrite=true"))
    assert "resumes from step" not in log(tmp_path / "first") and len(losses(tmp_path / "first")) == 2
    held = store.client().list_objects_v2(Bucket="data", Prefix="owned/")["Contents"]
    names = {entry["Key"].removeprefix("owned/") for entry in held}
    assert {name for name in names if not name.startswith("000000002/")} == {
        *("owner.json", "latest", "notes.txt", "000000004/notes.txt")
    }


# ---------------------------------------------------------------- files that somebody has changed
SCORE = {"model": "pretrained", "step": 2, "protocol": "knn", "split": "val", "metric": "accuracy", "value": 0.5}


@pytest.mark.parametrize(
    ("name", "good", "changes"),
    [
        ("metrics.jsonl", {"step": 1, "loss": 1.0}, {"samples_per_second": "fast", "loss": 10**400}),
        ("results.jsonl", SCORE, {"model": {}, "value": True, "count": "2", "metric": None, "split": [], "note": 1}),
        ("samples.jsonl", {"step": 1, "prompt": "a", "text": "b"}, {"prompt": None, "text": []}),
    ],
)
def test_lines_that_are_no_rows_are_passed_over(tmp_path: Path, name: str, good: dict, changes: dict):
    wrong = [good | {key: value} for key, value in (changes | {"step": "1"}).items()]
    wrong += [good | {"step": step} for step in (-1, 1.0, True, None, 1 << 62)]
    texts = [json.dumps(row) for row in (wrong[0], good, *wrong[1:], {"step": 1} if len(good) > 2 else {}, [], None)]
    (tmp_path / name).write_text("\n".join([*texts, "[" * 100_000, json.dumps(good | {"more": [1]}), '{"step": 3']))
    assert read_rows(tmp_path / name) == [good, good | {"more": [1]}]


def test_a_score_that_is_no_finite_number_is_a_row(tmp_path: Path):
    (tmp_path / "results.jsonl").write_text(json.dumps(SCORE | {"value": float("nan")}))
    (row,) = read_rows(tmp_path / "results.jsonl")
    assert row["value"] != row["value"]


@pytest.mark.parametrize(
    "marker",
    ["[" * 100_000, "{", "[]", '{"id": "a", "writes": [1]}', '{"id": "a", "writes": [], "clearing": []}', "\udcff"],
)
def test_a_damaged_marker_is_named(tmp_path: Path, marker: str):
    (tmp_path / ".run.json").write_bytes(marker.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"\.run\.json: is damaged or was not written by this program"):
        run_identity(tmp_path)


@pytest.mark.parametrize("owner", ["[" * 60_000, "{", '{"id": "a"}', "[]"])
def test_a_damaged_owner_of_checkpoints_is_named(tmp_path: Path, owner: str):
    (tmp_path / "owner.json").write_text(owner)
    with pytest.raises(UserError, match=r"owner\.json: is damaged or was not written by this program"):
        DiskStore(str(tmp_path)).owner()


# ---------------------------------------------------------------- one trainer
def held(run: Path, **changes: object) -> Path:
    """A lock that a trainer on this machine has left; `changes` replace entries of its only holder."""
    lock = Lock()
    lock.take(run)
    content = json.loads((run / ".run.lock").read_text())
    lock.release()
    content["holders"][0] |= changes
    (run / ".run.lock").write_text(json.dumps({**content, "token": "another"}))
    return run / ".run.lock"


@pytest.fixture
def gone() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_living_trainer_is_named(tmp_path: Path):
    held(tmp_path)
    with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on {os.uname().nodename} since 20"):
        Lock().take(tmp_path)
    sleeper = subprocess.Popen(["sleep", "100"])
    held_path = tmp_path / ".run.lock"
    held_path.unlink()
    held(tmp_path, pid=sleeper.pid, started=run_lock.process_start(sleeper.pid))
    with pytest.raises(UserError, match=f"process {sleeper.pid} on "):
        Lock().take(tmp_path)
    sleeper.kill()  # and nobody has waited for it: a zombie
    while run_lock.process_start(sleeper.pid):
        time.sleep(0.01)
    (lock := Lock()).take(tmp_path)
    lock.release()
    sleeper.wait()
    assert not list(tmp_path.iterdir())


def test_stale_locks_are_recognised(tmp_path: Path, gone: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_lock, "WRITING_SECONDS", 0.05)
    for changes in ({"pid": gone}, {"started": "1"}):  # killed; its id has been given to another process
        held(tmp_path, **changes)
        (lock := Lock()).take(tmp_path)
        assert json.loads((tmp_path / ".run.lock").read_text())["token"] == lock.token
        lock.release()
    holder = {"host": "a", "machine": "b", "pid": 1, "started": "1", "since": "1"}
    odd = [json.dumps({"token": "a", "holders": [holder | {"pid": pid}]}) for pid in (float("inf"), [], "1", 1 << 70)]
    killed = ["", "{", "[" * 100_000]  # while it was written
    for broken in (*killed, *odd, '{"token": 1, "holders": [{"pid": -1}]}', '{"token": [], "holders": {}}', "[]"):
        (tmp_path / ".run.lock").write_text(broken)
        (lock := Lock()).take(tmp_path)
        lock.release()
    assert not list(tmp_path.iterdir())


def test_a_lock_of_another_machine_lives_while_it_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_lock, "RENEWAL_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 3.0)
    path = held(tmp_path, machine="another", host="node7", pid=77)
    end = threading.Event()

    def renew() -> None:
        while not end.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(UserError, match="is in use by process 77 on node7 since "):
        Lock().take(tmp_path)
    end.set()
    thread.join()
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.3)
    (lock := Lock()).take(tmp_path)  # nobody renews it any more
    path.write_text(json.dumps({"token": "a third", "holders": []}))
    while not lock.taken_over:
        time.sleep(0.01)
    with pytest.raises(UserError, match="another trainer has taken over this folder"):
        lock.check()
    lock.release()
    assert path.is_file()  # it is not this one's to delete


@pytest.mark.parametrize("attempt", range(20))
def test_of_many_that_begin_at_once_one_gets_the_lock(tmp_path: Path, gone: int, attempt: int):
    held(tmp_path, pid=gone)
    got: list[Lock] = []
    refused: list[str] = []
    together = threading.Barrier(16)

    def begin() -> None:
        lock = Lock()
        together.wait()
        try:
            lock.take(tmp_path)
            got.append(lock)
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=begin) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 15
    got[0].release()
    assert not list(tmp_path.iterdir())


def test_a_claim_left_by_a_crash_ends(tmp_path: Path, gone: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.2)
    stale = run_lock._read(held(tmp_path, pid=gone))
    assert stale is not None
    name = hashlib.sha256(json.dumps(stale).encode()).hexdigest()[:32]
    (tmp_path / f".run.lock.{name}").touch()
    (lock := Lock()).take(tmp_path)
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_lock_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (lock := Lock()).take(tmp_path)
    with pytest.raises(UserError, match="is in use by process"):
        Lock().take(tmp_path)
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_launchers_trainers_join_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (launcher := Lock()).take(tmp_path)
    monkeypatch.setenv(run_lock.LOCK_TOKEN_VARIABLE, launcher.token)
    (trainer := Lock()).take(tmp_path)
    assert len(json.loads((tmp_path / ".run.lock").read_text())["holders"]) == 2
    trainer.release()
    monkeypatch.delenv(run_lock.LOCK_TOKEN_VARIABLE)
    with pytest.raises(UserError, match="is in use by"):
        Lock().take(tmp_path)
    launcher.release()
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the same command goes on
@pytest.mark.slow
def test_the_command_of_a_branch_goes_on(run: Path, shards: Path, tmp_path: Path):
    """checkpoint.resume=PATH is where the run begins; later the same command resumes from the run's own checkpoints."""
    branch, resume = tmp_path / "branch", f"checkpoint.resume={run / 'checkpoints' / '000000002'}"
    options = ("steps=5", "optim.lr=5e-4", "checkpoint=1", resume)
    whole = losses(train(tiny_recipe("mae", shards, branch, *options)))
    assert "resumes from step 2 " in log(branch) and [step for step, _ in whole] == [2, 3, 4]
    cut(branch, 4)
    train(tiny_recipe("mae", shards, branch, *options))
    assert log(branch).count("resumes from step 2 ") == 1 and "resumes from step 4 " in log(branch)
    assert "has newer checkpoints, so it resumes from them" in log(branch) and losses(branch) == whole


@pytest.mark.slow
def test_a_run_goes_on_with_data_that_were_moved(run: Path, shards: Path, tmp_path: Path):
    """By path, or as the same folder by another path. Other data are refused, and change nothing."""
    moved = shutil.copytree(shards, tmp_path / "moved")
    train(tiny_recipe("mae", moved, run, *SIZE, "steps=5"))
    assert "resumes from step 4" in log(run) and load(run).data.train == [str(moved)]
    whole = train(tiny_recipe("mae", shards, tmp_path / "whole", *SIZE, "steps=5"))
    assert losses(run) == losses(whole)
    twice, before = f"data.train=[{moved},{moved}]", (run / "recipe.yaml").read_text()
    with pytest.raises(UserError, match=r"is not the data that this run was started on: .* is new"):
        train(tiny_recipe("mae", moved, run, *SIZE, "steps=6", twice))
    assert (run / "recipe.yaml").read_text() == before
    mix = ["data.train=[]", f"data.mix=[{{shards: [{shards}], weight: 2}},{{shards: [{moved}], weight: 1}}]"]
    mixed = train(tiny_recipe("mae", shards, tmp_path / "mixed", *SIZE, *mix))
    other = [mix[0], mix[1].replace(str(shards), str(moved))]
    train(tiny_recipe("mae", shards, mixed, *SIZE, *other, "steps=5"))
    with pytest.raises(UserError, match="another recipe"):
        train(tiny_recipe("mae", shards, mixed, *SIZE, other[0], other[1].replace("weight: 2", "weight: 3"), "steps=6"))


@pytest.mark.slow
def test_a_branch_has_the_options_of_its_own_recipe(run: Path, shards: Path, tmp_path: Path):
    """Also those that the optimizer keeps in its parameter groups, which a checkpoint holds, too."""
    resume, found = f"checkpoint.resume={run / 'checkpoints' / '000000002'}", {}
    for name, more in {"same": [], "beta1": ["optim.beta1=0.5"], "eps": ["optim.eps=1e-3"]}.items():
        found[name] = losses(train(tiny_recipe("mae", shards, tmp_path / name, "steps=4", resume, *more)))
    first, last = ({name: rows[n][1] for name, rows in found.items()} for n in (0, -1))
    assert len({*first.values()}) == 1 and len({*last.values()}) == 3


def test_a_branch_that_would_begin_after_its_last_step_is_refused(run: Path, shards: Path, tmp_path: Path):
    resume = f"checkpoint.resume={run / 'checkpoints' / '000000004'}"
    with pytest.raises(UserError, match="steps = 3: the run begins at step 4"):
        train(tiny_recipe("mae", shards, tmp_path / "branch", "steps=3", resume))


def cut(run: Path, step: int) -> None:
    """Change a run into what it would be if it had been stopped at a step."""
    store = DiskStore(str(run / "checkpoints"))
    for name in store.complete_names():
        if int(name) > step:
            store.delete(name)
    store.set_latest(f"{step:09d}")
    for path in (run / "export").glob("[0-9]*"):
        if int(path.name) > step:
            shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.parametrize("resume", ["2", "none"])
def test_a_step_is_gone_back_to_once(run: Path, shards: Path, resume: str):
    whole, options = losses(run), ["checkpoint=1", f"checkpoint.resume={resume}"]
    train(recipe(shards, run, *options))
    assert losses(run) == whole and "resumes from step 4 " not in log(run)
    cut(run, 3)
    train(recipe(shards, run, *options))
    assert log(run).count("resumes from step 3 ") == 1 and losses(run) == whole
    if resume == "2":
        by_path = f"checkpoint.resume={run / 'checkpoints' / '000000003'}"
        train(recipe(shards, run, "checkpoint=1", by_path))
        assert log(run).count("resumes from step 3 ") == 2 and losses(run) == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("refused", "says"),
    [
        ("checkpoint.resume=11", "no complete checkpoint there"),
        ("log.every=7", "nothing reads it"),
        ("checkpoint.folder=/dev/null/x", "holds no checkpoint of"),
        ("optim.lr=0.5", "another recipe"),
    ],
)
def test_a_refused_command_leaves_the_stored_recipe(
    run: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, refused: str, says: str
):
    def unread(cfg: Recipe) -> None:
        if refused == "log.every=7" and cfg.log.every == 7:
            raise UserError("nothing reads it")

    monkeypatch.setattr(trainer, "_refuse_unread", unread)  # which is found after the first step
    cut(run, 2)
    before = (run / "recipe.yaml").read_bytes()
    with pytest.raises(UserError, match=says):
        train(recipe(shards, run, refused))
    assert (run / "recipe.yaml").read_bytes() == before and not (run / ".recipe.before.yaml").exists()
    train(load(run, ["data.threads=2"]))
    assert len(losses(run)) == 4 and "threads: 2" in (run / "recipe.yaml").read_text()


def test_a_command_that_is_killed_before_its_first_step_leaves_the_recipe_that_counts(run: Path, shards: Path):
    prepare(recipe(shards, run, "log.every=7"))  # as the launcher does; and then nothing trains
    assert "every: 7" in (run / "recipe.yaml").read_text()
    prepare(recipe(shards, run, "log.every=8"))
    restore_recipe(run)
    assert "every: 7" not in (run / "recipe.yaml").read_text() and load(run).log.every == 1


@pytest.mark.parametrize(
    "change", [["optim.lr=5e-4"], ["steps=6", "optim.lr.kind=cosine"], ["data.phases=[{step: 1, batch: 32}]"]]
)
def test_the_refusal_of_a_changed_recipe_names_the_way_that_works(
    run: Path, shards: Path, tmp_path: Path, change: list[str]
):
    with pytest.raises(UserError, match=r"holds a run of another recipe .* with (\S+) run=NEW") as info:
        train(recipe(shards, run, *change))
    resume = str(info.value).partition("start a new run from its checkpoint with ")[2].partition(" run=NEW")[0]
    assert resume == f"checkpoint.resume={run}/checkpoints/000000004"
    new = train(recipe(shards, tmp_path / "new", *change, resume))
    assert "resumes from step 4" in log(new) and len(losses(run)) == 4


def test_the_refusal_names_no_way_that_does_not_work(run: Path, shards: Path):
    for change in ("seed=7", "model.depth=3", "data.batch=8"):
        with pytest.raises(UserError, match="overwrite=true") as info:
            train(recipe(shards, run, change))
        assert "checkpoint.resume" not in str(info.value)
