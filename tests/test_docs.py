"""Every command in README.md, CONTRIBUTING.md, AGENTS.md and docs/ is run at a tiny size, in the order of its page,
or parsed if it cannot be run. Each page is one session in its own folder. All differences from the text of a page
are in GIVEN, REPLACED, SIZES and NOT_RUN."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import launch.cli
from common.config import fields
from common.errors import run_main
from data_pipeline.build.build_shards import build
from data_pipeline.build.tokenize_text import tokenize
from eval.protocol_finder import protocols
from pretrain.objectives import finder
from pretrain.recipes import recipe
from tests.conftest import TINY, clips, sampled, tiny_recipe
from tests.contract.own_objectives import OWN
from tests.contract.test_recipes import small
from tests.data.sounds import tone, wav
from tests.data.texts import prose, write_texts
from tests.forked import Forked
from tests.tars import jpeg

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
    if path.stem != "CHANGELOG"
)
LANGUAGES = ("sh", "python", "yaml", "text")

# ---------------------------------------------------------------- what differs from what a reader would type
GIVEN = {  # what lies in a page's folder before its first command; the home folder is the same
    "README.md": ("photos", "labelled", "texts"),
    "AGENTS.md": ("my/method.py",),
    "docs/audio.md": ("spoken/train", "spoken/test"),
    "docs/data.md": ("photos",),
    "docs/dinov3.md": ("shards",),
    "docs/evaluation.md": ("shards", "labelled"),
    "docs/faults.md": ("shards",),
    "docs/image_text.md": ("pairs.csv", "labelled"),
    "docs/many_gpus.md": ("bucket/train",),
    "docs/objectives.md": ("shards", "labelled"),
    "docs/scientific_images.md": ("scenes",),
    "docs/trackers.md": ("shards",),
    "docs/video.md": ("videos", "photos", "frames"),
    "docs/text.md": ("texts", "labelled/train", "labelled/test", "runs/demo-text", "runs/bert"),
}
REPLACED = (  # in every command and program, by regular expression
    (r"/export/\d+", "/export/4"),
    (r"/checkpoints/\d+", "/checkpoints/000000002"),
    (r"s3://bucket", "bucket"),  # a local folder stands for the bucket
    (r"(?<==)/(nvme|shared)", r"\1"),
    (r"--vocab 32000", "--vocab 300"),
    (r"query=held-out/", "query=tokens/"),
    (r" --processes \d+", ""),
)
SIZES = ("steps", "model", "data.batch", "objective.local_size", "parallel.mode", "parallel.recompute")
RUN = ["steps=4", "checkpoint=2", "export=2", "log=1", "log.flops=false", "optim.lr=1e-3"]  # of every training
WIDE = {"dinov3_vits16_demo": ["model.dim=64", "model.heads=1"]}  # the official layout has heads of 64
NOT_RUN = {  # the first words of a command, or one of its overrides -> why it is only parsed
    "torchrun": "needs four machines; tests/parallel runs its processes",
    "deepspeed": "needs several machines; tests/parallel runs its processes",
    "unlabeled launch": "needs a Slurm cluster; tests/launch/test_slurm.py submits to one",
    "unlabeled status": "of a run that only a cluster trains; tests/launch/test_status.py runs it",
    "unlabeled harness": "downloads its tasks; tests/eval/test_harness.py runs it on tasks of its own",
    "init.backbone=dinov3_vits16.pth": "those weights are not ours to keep; tests/parity/test_weights.py reads such files",
    "init.text=runs/words/export/400": "needs exports of two more runs; tests/parity/test_text_tower.py makes them",
    "unlabeled shards index rooms/": "needs masks and depths; tests/eval/test_dense.py has such shards",
    "data.train=rooms/train": "needs masks; tests/eval/test_dense.py trains on such shards",
    "query=rooms/test": "needs masks and depths; tests/eval/test_dense.py has such shards",
    "gallery=rooms/train": "needs masks and depths; tests/eval/test_dense.py has such shards",
    "gallery=landmarks/all": "needs lists of positives; tests/eval/test_instance_retrieval.py has such shards",
    "group.field=site": "needs metadata; tests/eval/test_group.py has such shards",
    "robustness.samples=1000": "corrupts each image 75 times; tests/eval/test_robustness.py runs fewer corruptions",
    "robustness.labels=real.json": "needs that file; tests/eval/test_label_files.py has such files",
    "classifier.classes=imagenet_r_classes.txt": "needs that file; tests/eval/test_label_files.py has such files",
    "make": "takes minutes, and is how this test is started",
    "pip install": "installs packages; whether the extras exist is tested",
    "export": "only sets variables; whether the code knows them is tested",
    ".venv/bin/python -m pytest": "runs other tests",
}


# ---------------------------------------------------------------- reading the pages
class Block(NamedTuple):
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    found = re.findall(r"^```(\S*)\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    return [Block(*parts) for parts in found]


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a block as lists of words; a backslash at the end of a line continues the command."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            inner = re.fullmatch(r"\$\((.*)\)", words[1]) if words[0] == "eval" else None
            yield shlex.split(inner[1]) if inner else words


def all_commands() -> list[tuple[str, list[str]]]:
    return [(page, words) for page in PAGES for b in blocks(page) if b.language == "sh" for words in commands(b.text)]


def path_of_block(block: Block) -> str:
    """The name of the file that a block shows, from its first line; "" for a program."""
    first = re.match(r"# (\S+\.(?:py|yaml))\n", block.text)
    return first[1] if first else ""


def inline(page: str) -> list[str]:
    """Commands in running text and in tables."""
    prose = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
    return [code for code in re.findall(r"`([^`\n]+)`", prose) if code.startswith("unlabeled ")]


def parse(words: list[str]) -> argparse.Namespace:
    """Parse a command line as `launch.cli.main` does. Raises SystemExit for an unknown command or option."""
    args, rest = launch.cli.parser().parse_known_args(words)
    more = getattr(args, "overrides", None) or getattr(args, "protocols", None) or []
    if any(word.startswith("-") or "=" not in word for word in rest):
        launch.cli.parser().error(f"{rest}")
    more.extend(rest)
    return args


def replaced(text: str) -> str:
    for pattern, by in REPLACED:
        text = re.sub(pattern, by, text)
    return text


# ---------------------------------------------------------------- parsed
@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_fenced_and_named(page: str):
    text = (ROOT / page).read_text()
    assert text.count("\n```") % 2 == 0
    assert {b.language for b in blocks(page)} <= set(LANGUAGES)
    assert len(blocks(page)) == len(re.findall(r"^```\S+$", text, re.M))
    indented = re.findall(
        r"^ {4,}(?:\$ )?(?:unlabeled|make|pip|python|torchrun) .*",
        re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S),
        re.M,
    )
    assert not indented, "write commands in a fenced block of `sh`"
    assert all(path_of_block(b) for b in blocks(page) if b.language == "yaml")
    assert not any(re.search(r"^(?:unlabeled|make|pip) ", b.text, re.M) for b in blocks(page) if b.language == "text")


@pytest.mark.parametrize("page", PAGES)
def test_lines_and_length(page: str):
    lines = (ROOT / page).read_text().splitlines()
    code = re.findall(r"^```.*?^```$", "\n".join(lines), re.M | re.S)
    inside = {line for block in code for line in block.splitlines()}
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|") and line not in inside]
    assert page != "README.md" or len(lines) < 200


@pytest.mark.parametrize(
    ("page", "words"), all_commands(), ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else value
)
def test_command_is_parsed(page: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Command and options are known; a recipe can be resolved with the overrides that follow it."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):  # recipes and objectives that the page shows
        if path := path_of_block(block):
            Path(path).parent.mkdir(exist_ok=True)
            Path(path).write_text(block.text)
    name = words[0]
    if name == "unlabeled":
        args = parse(words[1 : words.index(">") if ">" in words else None])
        if getattr(args, "recipe", ""):
            recipe.load(args.recipe, args.overrides)
    elif name in ("torchrun", "deepspeed"):
        at = words.index("pretrain.train")
        recipe.load(words[at + 1], words[at + 2 :])
    elif name == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
        assert targets and words[1] in targets[1].split()
        assert words[1] != "bench" or (ROOT / "benchmarks" / f"{words[2].removeprefix('BENCH=')}.py").is_file()
    elif name == "pip":
        assert set(extras(" ".join(words))) <= known_extras()
    elif name == "export":
        code = "".join((ROOT / "data_pipeline" / "storage" / f"{f}.py").read_text() for f in ("urls", "ranges"))
        assert all(word.partition("=")[0] in code for word in words[1:])
    else:
        assert words[1:3] == ["-m", "pytest"] and name == ".venv/bin/python" and (ROOT / words[3]).is_file(), words


@pytest.mark.parametrize("page", [page for page in PAGES if inline(page)])
def test_command_in_running_text_is_parsed(page: str):
    for code in inline(page):
        words = shlex.split(code.replace("--vocab N", "--vocab 300").replace("--bits N", "--bits 12"))[1:]
        known = launch.cli.parser()
        while words:  # a group or a sub-command that is only named
            action = next((a for a in known._actions if isinstance(a, argparse._SubParsersAction)), None)
            if action is None or words[0] not in action.choices:
                break
            known = action.choices[words.pop(0)]
        if words:
            parse(shlex.split(code.replace("--vocab N", "--vocab 300"))[1:])


def extras(text: str) -> list[str]:
    return [name for found in re.findall(r"(?:unlabeled|\.)\[([\w,]+)\]", text) for name in found.split(",")]


def known_extras() -> set[str]:
    import tomllib

    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


@pytest.mark.parametrize("page", PAGES)
def test_named_extras_files_and_links_exist(page: str):
    text = (ROOT / page).read_text()
    assert set(extras(text)) <= known_extras()
    tops = "|".join((*launch_folders(), "tests", "benchmarks", "docs"))
    for path in re.findall(rf"`((?:{tops})/[\w/.]*)`", text):
        assert (ROOT / path).exists() or "NAME" in path, path
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert "://" in target or ((ROOT / page).parent / target).is_file(), target


def launch_folders() -> tuple[str, ...]:
    from tests.test_house import PACKAGES

    return PACKAGES


def test_table_of_methods_is_whole():
    table = (ROOT / "README.md").read_text().partition("## Methods")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` ", table, re.M)) == finder.names()
    named = {name for cell in re.findall(r"([^|]*)\|$", table, re.M) for name in re.findall(r"`([a-z]\w+)`", cell)}
    assert named and named <= set(recipe.names())


def test_table_of_protocols_is_whole():
    """All protocols, and all options of each; the name of another protocol stands for its options."""
    text = (ROOT / "docs/evaluation.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*?) \|$", text, re.M))
    options = {name: {*fields(importlib.import_module(f"eval.{name}").Config)} for name in protocols()}
    for name, known in options.items():
        said = {*re.findall(r"`([a-z_]+)`", rows[name])}
        named = (said & options.keys()) - known
        assert said - named | {each for other in named for each in options[other]} == known, name


def test_house_names_files_that_exist():
    """In the table of folders of docs/design.md; words in brackets are explanations."""
    for cell, text in re.findall(r"^\| (`[\w/]+/`.*?) \| (.*) \|$", (ROOT / "docs/design.md").read_text(), re.M):
        folder = ROOT / re.findall(r"`([\w/]+)/`", cell)[0]
        for name in re.findall(r"`(\w+)/?`", re.sub(r"\(.*?\)", "", text)):
            assert (folder / f"{name}.py").is_file() or (folder / name).is_dir() or name == "Config", f"{cell}: {name}"


def test_site_is_built_without_a_warning(tmp_path: Path):
    from mkdocs.commands.build import build as build_site
    from mkdocs.config import load_config

    build_site(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site")))
    assert len(list((tmp_path / "site").glob("*/index.html"))) == len(list((ROOT / "docs").glob("*.md"))) - 1


def test_reasons_are_used_and_every_other_command_is_run():
    unused = [entry for entry in NOT_RUN if not any(left_out(words)(entry) for _, words in all_commands())]
    assert not unused
    assert {page for page in PAGES if runs(page)} == GIVEN.keys()


# ---------------------------------------------------------------- run
def runs(page: str) -> list[Block]:
    """The blocks of a page in which at least one command is run."""
    return [
        b
        for b in blocks(page)
        if (b.language == "python" and not path_of_block(b))
        or (b.language == "sh" and any(map(is_run, commands(b.text))))
    ]


def is_run(words: list[str]) -> bool:
    return not any(map(left_out(words), NOT_RUN))


def left_out(words: list[str]) -> Callable[[str], bool]:
    """Whether an entry of NOT_RUN matches a command."""
    return lambda entry: entry in words if "=" in entry else words[: len(entry.split())] == entry.split()


def provide(what: str, photos: Path, shards: Path) -> None:
    """Create one entry of GIVEN in the current folder."""
    path = Path(what)
    path.parent.mkdir(parents=True, exist_ok=True)
    match what:
        case "photos":
            shutil.copytree(photos, path)
        case "shards" | "bucket/train":
            shutil.copytree(shards, path)
        case "frames":
            (path / "slow").mkdir(parents=True)
            for number in range(12):
                (path / "slow" / f"{number}.jpg").write_bytes(jpeg(number))
        case "scenes":
            for n in range(12):
                scene = path / ("train" if n < 8 else "test") / ("water" if n % 2 else "forest") / f"{n}.npy"
                scene.parent.mkdir(parents=True, exist_ok=True)
                np.save(scene, np.random.default_rng(n).integers(0, 4096, (256, 512, 7), dtype=np.uint16))
        case "videos":
            shutil.copytree(clips(shards.parent).parent / "videos", path)
        case "labelled":
            for split in ("train", "val", "test"):
                shutil.copytree(shards, path / split)
        case "pairs.csv":
            shutil.copytree(photos, "pictures")
            files = sorted(Path("pictures").rglob("*.jpg"))
            rows = [f"{file},a photo of a {file.parent.name} number {n}" for n, file in enumerate(files)]
            path.write_text("\n".join(["image,caption", *rows]) + "\n")
        case "spoken/train" | "spoken/test":
            for n in range(24):
                word = path / ("high" if n % 2 else "low")
                word.mkdir(parents=True, exist_ok=True)
                (word / f"{n}.wav").write_bytes(wav(tone(800 if n % 2 else 200, 0.3 + 0.1 * n)))
        case "texts":
            path.mkdir()
            for n in range(60):
                (path / f"{n}.txt").write_text(prose(n, 400))
        case "labelled/train" | "labelled/test":
            rows = "".join(
                f'{{"text": "{kind} {n}", "label": "{kind}"}}\n' for n in range(20) for kind in ("sea", "wind")
            )
            Path(f"{path.name}.jsonl").write_text(rows)
            build(f"{path.name}.jsonl", path)
        case "runs/demo-text":
            for split in ("train", "val", "test"):
                tokenize(write_texts(path / f"{split}-text"), path / split, **vocabulary(path, split))
        case "runs/bert":
            from pretrain.train import train

            train(tiny_recipe("bert", shards, path, "steps=4"))
        case "my/method.py":
            path.write_text(OWN["labels"])


def vocabulary(path: Path, split: str) -> dict:
    return {"vocab": 300} if split == "train" else {"tokenizer_file": str(path / "train" / "tokenizer.json")}


def sized(args: argparse.Namespace, words: list[str], shards: Path) -> list[str]:
    """A command for a recipe with the overrides that make it small; the page's other overrides are kept."""
    own = [word for word in words if word not in args.overrides]
    # a budget of seconds is kept: it is no size of the batch alone
    sizes = [w for w in args.overrides if any(re.match(rf"{re.escape(key)}[.=](?!\{{seconds)", w) for key in SIZES)]
    said = [w for w in args.overrides if w not in sizes]
    wide = WIDE.get(args.recipe, [])
    base = (
        [*small(args.recipe, shards), *wide]
        if args.recipe in recipe.names()
        else [*TINY, *channels_of(args.recipe), "data.batch=16", "data.workers=0", "parallel.micro_batch=null"]
    )
    scored = ["eval.final=[knn]"] * any(
        word.startswith("eval.gallery") for word in said
    )  # the page scores more by itself
    return [*own, *base, *(RUN if words[0] == "train" else []), *scored, *said]


def channels_of(file: str) -> list[str]:
    """The override that keeps the number of channels of a page's recipe where a test replaces its model."""
    count = getattr(recipe.load(file, []).model, "in_channels", None)
    return [f"model.in_channels={count}"] if count else []


def run_command(words: list[str]) -> int | None:
    """Run `unlabeled …`. The trainer runs in this process, as with torchrun, instead of being started by the
    launcher."""
    sys.argv = ["unlabeled", *words]
    if words[0] != "train":
        return launch.cli.main()
    from pretrain.train import main

    sys.argv = ["pretrain.train", *words[1:]]
    return run_main(main)


def run_program(text: str, overrides: dict[str, list[str]]) -> None:
    load = recipe.load
    recipe.load = lambda name, said=None: load(name, [*overrides[name], *(w for w in said if "steps=" not in w)])  # type: ignore[assignment]
    exec(compile(text, "program of the page", "exec"), {"__name__": "__main__"})


def finish(process: Forked, output: Path, what: str) -> None:
    code = process.wait(300)
    assert code == 0, f"{what}: code {code}\n{output.read_text()[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", sampled(GIVEN, "README.md", "AGENTS.md", "docs/objectives.md"))
def test_commands_run(page: str, photos: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    env = {"HOME": str(folder), "UNLABELED_CACHE": str(tmp_path / "cache")}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    for what in GIVEN[page]:
        provide(what, photos, shards)
    for number, block in enumerate(blocks(page)):
        output = tmp_path / f"{number}.txt"
        if path := path_of_block(block):
            Path(path).parent.mkdir(exist_ok=True)
            Path(path).write_text(block.text)
        elif block.language == "python":
            overrides = {name: [*small(name, shards), *RUN] for name in recipe.names() if f'"{name}"' in block.text}
            process = Forked(run_program, replaced(block.text), overrides, output=(str(output),) * 2)
            finish(process, output, block.text)
        elif block.language == "sh":
            for words in filter(is_run, commands(block.text)):
                words = shlex.split(replaced(shlex.join(words)))[1:]
                words, target = (words[: words.index(">")], words[-1]) if ">" in words else (words, output)
                words = [re.sub(r"^~", str(folder), word) for word in words]
                args = parse(words)
                if hasattr(args, "recipe") and words[:2] != ["recipes", "show"]:
                    words = sized(args, words, shards)
                finish(Forked(run_command, words, output=(str(target), str(output))), output, shlex.join(words))
