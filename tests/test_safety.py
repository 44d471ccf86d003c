"""No file that is read is executed: neither the objective files that stored recipes name, nor modules in the current
folder. Secrets in URLs are neither stored nor printed, and names from data cannot send control characters to a
terminal."""

from __future__ import annotations

import ast
import base64
import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import config, output
from common.errors import ConfigError, DataError, UserError, run_main
from data_pipeline.shards.samples import Samples
from data_pipeline.storage.urls import open_store
from eval import report
from pretrain.interchange import export, model_card
from pretrain.models import families
from pretrain.models.build import build_model
from pretrain.recipes.recipe import load, stored
from pretrain.run_folder.export_folders import exports, run_of
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.run_folder.prepare import prepare
from pretrain.run_folder.recipe_file import HEADER, write_recipe
from pretrain.run_log import Log
from tests.conftest import call, tiny_recipe
from tests.tars import jpeg, write_tar

PACKAGES = ("common", "pretrain", "data_pipeline", "eval", "launch")
ROOT = Path(__file__).parents[1]


def write_export(folder: Path, step: int) -> Path:
    cfg = families.ViT(image_size=32, patch_size=8, dim=32, depth=1, heads=2)
    cfg.name = "vit"
    about = {"step": step, "objective": "mae", "pool": "mean"}
    export.write(folder, build_model(cfg), about, [0.5] * 3, [0.25] * 3)
    return folder


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """An objective file that creates a file when its `Config` is executed."""
    path = tmp_path / "evil.py"
    path.write_text(
        f'"""Evil."""\nfrom dataclasses import dataclass\nfrom pretrain.objectives.options import Options\n\n\n@dataclass\nclass Config(Options):\n'
        f"    open({str(tmp_path / 'executed')!r}, 'w').close()\n    share: float = 0.5\n"
    )
    return path


def write_evil_recipe(folder: Path, evil: Path, shards: Path) -> None:
    values = config.to_dict(tiny_recipe("mae", shards, folder, f"eval.gallery={shards}", f"eval.test={shards}"))
    values["objective"] = {"name": str(evil), "share": 0.25}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(f"{HEADER}\n{json.dumps(values)}")  # JSON is YAML, too


def test_a_folder_that_is_no_export_of_a_run_is_scored_without_what_lies_above_it(
    tmp_path: Path, evil: Path, shards: Path
):
    write_evil_recipe(tmp_path / "shared", evil, shards)
    data = [f"gallery={shards}", f"query={shards}", "knn"]
    for place in ("shared/x/60", "shared/60", "shared/export/a/b/60", "shared/export/last"):
        folder = write_export(tmp_path / place, 60)
        assert run_of(folder) is None
        call("eval", folder, *data)
        with pytest.raises(DataError, match="no labelled shards are named"):  # those of the recipe are not taken
            call("eval", folder, "knn")
        assert "Recipe" not in model_card.write(folder).read_text()
    assert not (tmp_path / "executed").exists() and not list(tmp_path.rglob("results.jsonl"))


def test_a_run_is_scored_and_reported_without_its_objectives_file(tmp_path: Path, evil: Path, shards: Path):
    run = tmp_path / "shared"
    write_evil_recipe(run, evil, shards)
    folder, student = write_export(run / "export" / "60", 60), write_export(run / "export" / "small" / "60", 60)
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    assert run_of(folder) == run_of(student) == run
    call("eval", folder, "knn")  # on what the recipe scores
    assert {row["gallery"][0] for row in read_rows(run / "results.jsonl")} == {str(shards)}
    assert "evil.py" in report.write(run).read_text() and "share: 0.25" not in (run / "report.html").read_text()
    assert "## Recipe" in model_card.write(folder).read_text()
    assert vars(stored(run).objective).get("share") is None
    with pytest.raises(UserError, match=r"holds a run of another recipe \(objective.name"):
        prepare(tiny_recipe("mae", shards, run))
    assert not (tmp_path / "executed").exists()
    load("demo", [f"objective={evil}"])  # named by the user
    assert (tmp_path / "executed").exists()


def test_an_objective_without_py_is_one_of_ours(tmp_path: Path, evil: Path):
    for name in (str(evil.with_suffix("")), "../recipe", "base", "__init__"):
        with pytest.raises(ConfigError, match="no such objective; "):
            load("demo", [f"objective={name}"])
    assert not (tmp_path / "executed").exists()


def test_an_objectives_file_takes_no_other_modules_name(tmp_path: Path, evil: Path):
    from pretrain.objectives import finder

    for name in ("pretrain", "torch", "mae"):
        path = tmp_path / f"{name}.py"
        path.write_text(evil.read_text())
        before = {key: sys.modules.get(key) for key in (name, f"{name}.config")}
        finder.config_class(str(path))
        with pytest.raises(ConfigError, match="holds 0 classes that derive from Objective"):
            finder.find(str(path))
        assert before == {key: sys.modules.get(key) for key in before}
    evil.write_text(evil.read_text() + "import my_layers\n")
    with pytest.raises(ConfigError, match=f"evil.py: imports my_layers, .* PYTHONPATH={tmp_path}$"):
        finder.find(str(evil))


def test_an_export_is_named_by_its_step(tmp_path: Path):
    write_recipe(load("demo"), tmp_path)
    for name in ("0", "60", "²", "060x", "-1"):
        (tmp_path / "export" / name).mkdir(parents=True)
        (tmp_path / "export" / name / "config.json").write_text("{}")
    assert list(exports(tmp_path)) == [0, 60]
    assert run_of(tmp_path / "export" / "²") is None and run_of(tmp_path / "export" / "60") == tmp_path


@functools.cache
def trees() -> list[tuple[Path, ast.Module]]:
    """The files of the packages with their syntax trees."""
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return [(path, ast.parse(path.read_text())) for path in paths]


def test_no_process_is_started_with_the_current_folder_among_the_places_of_modules():
    """Every list of words in the packages that begins with the interpreter and names a module contains -P."""
    found = 0
    for path, tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.List) or not node.elts or ast.unparse(node.elts[0]) != "sys.executable":
                continue
            words = [word.value if isinstance(word, ast.Constant) else None for word in node.elts]
            assert words[1] == "-P", f"{path}:{node.lineno}: {ast.unparse(node)}"
            found += 1
    assert found >= 4


@pytest.mark.slow
def test_a_users_own_modules_in_the_current_folder_are_not_imported(photos: Path, tmp_path: Path):
    """Build with workers, and train with a prefetch server, a data worker and scores, in a folder with an eval.py, a
    torch.py and a launch/ of the user."""
    here = tmp_path / "here"
    for name in ("eval", "torch", "numpy", "json", "PIL", "yaml", "fsspec", "tarfile"):
        here.mkdir(exist_ok=True)
        (here / f"{name}.py").write_text("raise SystemExit('a module of the current folder was imported')\n")
    for name in PACKAGES:
        (here / name).mkdir()
        (here / name / "__init__.py").write_text("raise SystemExit('a package of the current folder was imported')\n")

    def unlabeled(*args: object) -> None:
        command = [Path(sys.executable).with_name("unlabeled"), *args]
        env = {**os.environ, "UNLABELED_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=here, env=env, timeout=500)
        assert done.returncode == 0 and "current folder" not in done.stdout + done.stderr, done.stderr

    unlabeled("shards", "build", photos, "shards", "--workers", 2, "--shard-mb", 0.05)
    (here / "shards" / "manifest.json").unlink()  # so that two processes index them
    more = ["steps=2", "eval.gallery=shards", "eval.val=shards", "data.workers=1", f"data.fetch.cache={tmp_path}"]
    (here / "r.yaml").write_text(config.dump(tiny_recipe("mae", Path("shards"), Path("run"), *more)))
    unlabeled("train", "r.yaml")
    assert {row["step"] for row in read_rows(here / "run" / "results.jsonl")} == {0, 2}


# ---------------------------------------------------------------- secrets
SECRETS = [  # as written, as shown, as it should be written
    ("http://joe:hunter@host/a", "http://***@host/a", "http://host/a"),
    ("https://hunter@h/a.tar, x", "https://***@h/a.tar, x", "https://h/a.tar, x"),
    ("['s3://KEY:hunter@b/k']", "['s3://***@b/k']", "['s3://b/k']"),
    ("simplecache::http://joe:hun@ter@h/x", "simplecache::http://***@h/x", "simplecache::http://h/x"),
    (
        "https://b/a.tar?X-Amz-Expires=9&X-Amz-Signature=hunter",
        "https://b/a.tar?X-Amz-Expires=9&X-Amz-Signature=***",
        "",
    ),
    ("https://a/c/x.tar?sv=1&sig=hunter%3D&se=2", "https://a/c/x.tar?sv=1&sig=***&se=2", ""),
    ("https://h/a?access_token=hunter#x", "https://h/a?access_token=***#x", ""),
]
OPEN = [
    "abfs://container@account.dfs.core.windows.net/a",
    "s3://b/key=1/a?/b",
    "sftp://joe@h/a",
    "http://h:80/a?v=1",
    "/a:b@c",
]


def test_secrets_of_urls_are_masked():
    for text, shown, plain in SECRETS:
        assert (
            output.printable(text) == shown
            and output.secrets_error(text)
            and (not plain or output.drop_secrets(text) == plain)
        )
        assert "hunter" not in output.drop_secrets(text)
    for text in OPEN:
        assert output.printable(text) == output.drop_secrets(text) == text and not output.secrets_error(text)


@pytest.mark.parametrize("url", ["http://joe:hunter@127.0.0.1:9/a", "https://127.0.0.1:9/a.tar?X-Amz-Signature=hunter"])
def test_a_url_with_a_secret_is_refused_in_one_line(url: str, tmp_path: Path, shards: Path, capsys):
    commands = [("shards", "build", url, tmp_path / "new"), ("shards", "build", shards, f"{url}/new")]
    commands += [("shards", name, url) for name in ("index", "verify", "stats")]
    commands += [("eval", "pixels", "knn", f"gallery={url}", f"query={shards}")]
    for words in commands:
        assert run_main(lambda words=words: call(*words)) == 2
        said = capsys.readouterr()
        assert "hunter" not in said.out + said.err and "holds a" in said.err and said.err.count("\n") == 1
    for key in ("data.train", "eval.val", "checkpoint.folder", "init.backbone"):
        with pytest.raises(UserError, match=rf"^{key}(\[0\])? = .* (in ~/.netrc|download the file first)$"):
            prepare(tiny_recipe("mae", shards, tmp_path / "run", f"{key}={url}"))
    assert not list(tmp_path.iterdir())


def test_a_run_that_has_stored_a_password_goes_on_without_it(tmp_path: Path, shards: Path):
    run = tmp_path / "run"
    write_evil_recipe(run, Path("mae"), shards)
    old = tiny_recipe("mae", shards, run, "data.train=http://joe:hunter@host/a")
    write_recipe(old, run)  # as the version before did
    folder = write_export(run / "export" / "8", 8)
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    assert "http://***@host/a" in model_card.write(folder).read_text()
    assert "http://***@host/a" in report.write(run).read_text()
    with pytest.raises(UserError, match=r"^data\.train\[0\] = http://\*\*\*@host/a: holds a user name"):
        prepare(load(run))
    prepare(load(run, ["data.train=http://host/a"]))
    assert "hunter" not in (run / "recipe.yaml").read_text()
    with pytest.raises(UserError, match=r"holds a run of another recipe \(data.train"):
        prepare(load(run, ["data.train=http://host/b"]))


class Guarded(http.server.SimpleHTTPRequestHandler):
    """A server of byte ranges for the user joe with the password hunter."""

    def do_GET(self) -> None:
        if self.headers["Authorization"] != "Basic " + base64.b64encode(b"joe:hunter").decode():
            return self.send_error(401)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return super().do_GET() if path.is_dir() else self.send_error(404)
        data, wanted = path.read_bytes(), self.headers["Range"]
        begin, end = (wanted or "bytes=0-").removeprefix("bytes=").split("-")
        part = data[int(begin) : int(end or len(data)) + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def guarded(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Guarded, directory=str(shards.parent))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{shards.name}"
        server.shutdown()


def test_a_password_comes_from_netrc(guarded: str, tmp_path: Path, shards: Path):
    for content in (
        None,
        "machine elsewhere login joe password hunter\n",
        "machine 127.0.0.1 login joe password OLD\n",
    ):
        if content:
            (tmp_path / "netrc").write_text(content)
        with pytest.raises(DataError, match=r"refuses these credentials .*machine HOST login USER.* in ~/.netrc$"):
            Samples([guarded])
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login joe password hunter\n")
    there, here = Samples([guarded]), Samples([str(shards)])
    assert there.id == here.id and there.read(3) == here.read(3)
    (tmp_path / "netrc").write_text("machine 127.0.0.1\nlogn joe\n")
    with pytest.raises(DataError, match="the netrc file, which holds its password, cannot be read"):
        open_store(guarded)


# ---------------------------------------------------------------- names
NASTY = "a\n2026-01-01 all is well\r\x1b[2J\x1b]0;title\x07\u202egnp\x9b31m"


def test_nothing_in_the_packages_prints_but_the_one_place():
    for path, tree in trees():
        for node in ast.walk(tree):
            called = node.func if isinstance(node, ast.Call) else None
            last = getattr(called, "id", getattr(called, "attr", ""))
            text = ast.unparse(called) if called and last in ("print", "write") else ""
            assert text not in ("print", "sys.stdout.write", "sys.stderr.write") or path.name == "output.py", (
                f"{path}:{node.lineno}: {text}; use common.output"
            )
            defaults = [ast.unparse(d) for d in node.args.defaults] if isinstance(node, ast.FunctionDef) else []
            assert "print" not in defaults, f"{path}:{node.lineno}"


def test_what_is_a_number_is_asked_in_one_place():
    """`isdigit` is true for "²", and `isdecimal` for "٣" and for 5000 digits; `untrusted.is_number` is for untrusted
    texts."""
    known = {"common/untrusted.py", "pretrain/models/convnext.py"}  # the latter of names of its own weights
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        if str(path.relative_to(ROOT)) not in known:
            assert not re.search(r"\.is(digit|decimal|numeric)\(", path.read_text()), path


def test_a_line_stays_a_line(tmp_path: Path, capsys):
    output.say(NASTY, "è 漢 🙂 █")
    out = capsys.readouterr().out
    assert out.count("\n") == 2 and "\\n2026" in out and "\\x1b[2J" in out and "\\u202e" in out and "è 漢 🙂 █" in out
    assert "\\x07" in out and "\\x9b31m" in out and "\\r" in out and "\x9b" not in out
    output.say(os.fsdecode(b"caf\xe9.jpg"))  # a name that is not UTF-8
    assert capsys.readouterr().out == "caf\\udce9.jpg\n"
    output.write("two\nlines\t\x1b[31m")
    assert capsys.readouterr().out == "two\nlines\t\\x1b[31m"
    (tmp_path / "run").mkdir()
    Log(tmp_path / "run")(f"damaged sample left out: {NASTY}")
    assert (tmp_path / "run" / "log.txt").read_text().count("\n") == 1 == capsys.readouterr().out.count("\n")


def safe(text: str) -> bool:
    return not output.UNSAFE.search(text.replace("\n", ""))


def test_names_of_files_and_members_are_shown_escaped(photos: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))
    name = NASTY.replace("/", "")
    source = tmp_path / "in" / f"{name}-class"
    source.mkdir(parents=True)
    (source / f"{name}.jpg").write_bytes(jpeg())
    (source / f"{name}-bad.jpg").write_bytes(b"no image")
    call("shards", "build", tmp_path / "in", tmp_path / "built")
    call("shards", "stats", tmp_path / "built")
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", [(f"{name}.jpg", jpeg()), ("b.jpg", b"x"), (f"{name}.jpg", jpeg(1))])
    call("shards", "index", tmp_path / "tars")
    said = capsys.readouterr()
    assert said.out.count("\\x1b[2J") >= 3 and safe(said.out + said.err), said
    assert run_main(lambda: call("shards", "stats", tmp_path / name)) == 2
    said = capsys.readouterr().err
    assert safe(said) and said.count("\n") == 1
    with pytest.raises(SystemExit):
        call("shards", "stats", tmp_path, f"--{name}")  # as of `shards stats *`
    said = capsys.readouterr().err
    assert safe(said) and "\\x1b[2J" in said
