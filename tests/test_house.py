"""The folders are layers. A file imports from its own layer and from those below it, and no two files import each
other. An objective is complete in its file: no other module names one of its options."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from common import config
from pretrain.objectives import finder

ROOT = Path(__file__).parents[1]
METHODS = ("pretrain/objectives/", "pretrain/ops/")  # where options of objectives are read
SERVANTS = {  # files outside of these that serve certain methods
    "data_pipeline/views/multicrop.py": "makes the views that `MultiCrop` of pretrain/objectives/options.py describes",
    "data_pipeline/views/two_views.py": "makes the views that `TwoViews` there describes",
    "pretrain/interchange/teachers.py": "opens the teacher and the students of a distillation",
    "pretrain/interchange/layouts/transformers_image_text.py": "names the options with which the exports of clip and"
    " siglip have a class of transformers",
    "eval/gram_teachers.py": "the command that chooses a Gram teacher",
}
COMMON_WORDS = {  # options whose names mean something else, too
    **dict.fromkeys(("blur", "color", "flip", "jitter", "solarize"), "kinds of augmentation, in data_pipeline/views/"),
    **dict.fromkeys(("momentum", "decoder_depth", "temperature"), "options of an optimizer, a model, a protocol"),
    "teacher": "the frozen networks of a plan",
    "classes": "the names of the labels of a set",
    "pool": "the feature of an export",
    **dict.fromkeys(("share", "span", "random", "masked", "loss", "text"), "words of the language"),
    "z_loss": "an argument of the chunked cross-entropy, which models of text hand on",
}
LONGEST_METHOD = 200  # lines

PACKAGES = ("common", "data_pipeline", "pretrain", "eval", "launch")
FLOORS = [  # from the ground up; the longest path that leads a file's name decides. Single files are interfaces that lower folders need
    ["common/"],
    ["data_pipeline/formats/"],
    ["data_pipeline/storage/"],
    ["data_pipeline/order/"],
    ["data_pipeline/views/"],
    ["data_pipeline/shards/"],
    ["data_pipeline/parts/"],
    ["data_pipeline/stream/"],
    ["data_pipeline/build/"],
    ["pretrain/ops/"],
    ["pretrain/models/"],
    ["pretrain/kernels/"],
    [
        "pretrain/objectives/base.py",
        "pretrain/objectives/finder.py",
        "pretrain/objectives/options.py",
        "pretrain/objectives/__init__.py",
    ],
    ["pretrain/optim/optimizers.py", "pretrain/optim/skippable_optimizer.py", "pretrain/optim/__init__.py"],
    ["pretrain/trackers/trackers.py", "pretrain/trackers/__init__.py"],
    ["pretrain/recipes/"],
    [f"pretrain/parallel/{name}.py" for name in ("processes", "timeouts", "silent_ranks", "__init__")],
    ["pretrain/optim/"],
    ["pretrain/parallel/"],
    [
        "pretrain/checkpoint/store.py",
        "pretrain/checkpoint/disk_store.py",
        "pretrain/checkpoint/remote_store.py",
        "pretrain/checkpoint/open_store.py",
        "pretrain/checkpoint/integrity.py",
        "pretrain/checkpoint/__init__.py",
    ],
    ["pretrain/run_folder/", "pretrain/signals.py", "pretrain/metrics.py"],
    ["pretrain/collapse_monitor.py", "pretrain/trackers/", "pretrain/image_folders.py", "pretrain/__init__.py"],
    ["pretrain/checkpoint/"],
    ["pretrain/interchange/"],
    ["pretrain/objectives/"],
    ["pretrain/build.py", "pretrain/contract.py", "pretrain/host_syncs.py", "pretrain/step.py"],
    ["pretrain/estimate/"],
    ["eval/"],
    [
        "pretrain/train.py",
        "pretrain/loop_step.py",
        "pretrain/validation.py",
        "pretrain/run_exports.py",
        "pretrain/run_log.py",
        "pretrain/run_startup.py",
    ],
    ["launch/"],
]


def graph() -> dict[str, set[str]]:
    """{file: the files that it imports, anywhere in the file}, as paths from the root."""
    files = {path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): str(path) for path in files}
    out: dict[str, set[str]] = {}
    for path in files:
        found: set[str] = set()
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Import):
                found |= {modules[alias.name] for alias in node.names if alias.name in modules}
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    found |= {modules[m] for m in (name if name in modules else node.module,) if m in modules}
        out[str(path)] = found - {str(path)}
    return out


def floor(path: str) -> int:
    """The layer of a file: the longest entry of FLOORS that is a prefix of its path."""
    fits = [(len(entry), n) for n, entries in enumerate(FLOORS) for entry in entries if path.startswith(entry)]
    assert fits, f"{path}: stands on no floor; add its folder to FLOORS in {Path(__file__).name}"
    return max(fits)[1]


def test_no_import_points_upward():
    upward = [
        f"{path} imports {other}" for path, others in graph().items() for other in others if floor(other) > floor(path)
    ]
    assert not upward, "\n".join(sorted(upward))


def test_no_circle_between_files():
    left = graph()
    while free := [path for path, others in left.items() if not others & left.keys()]:
        left = {path: others for path, others in left.items() if path not in free}
    ends = {path: sorted(others & left.keys()) for path, others in left.items()}
    assert not ends, "\n".join(f"{path} imports {', '.join(others)}" for path, others in sorted(ends.items()))


def test_names_of_files_mean_one_thing():
    """No two files have the same name, except `__init__`, `build` (from a config to an object) and T5, which is a
    model and an objective."""
    by_name: dict[str, list[str]] = {}
    for path in graph():
        by_name.setdefault(Path(path).stem, []).append(path)
    twice = {
        n: sorted(paths) for n, paths in by_name.items() if len(paths) > 1 and n not in ("__init__", "build", "t5")
    }
    assert not twice, twice


def options_of_objectives() -> dict[str, str]:
    """{option: an objective that has it}."""
    return {key: name for name in finder.names() for key in config.fields(finder.config_class(name)[0])}


def words_of(node: ast.AST) -> list[str]:
    """The names and texts that occur in a part of a program."""
    found = getattr(node, "attr", None) or getattr(node, "arg", None) or getattr(node, "id", None)
    if isinstance(node, ast.Constant):
        found = node.value
    return [found] if isinstance(found, str) else []


def test_only_a_method_knows_its_options():
    options, used = options_of_objectives(), set()
    known = []
    for path in graph():
        if path.startswith(METHODS) or path in SERVANTS:
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            for word in words_of(node):
                dotted = [name for name in re.findall(r"\bobjective\.(\w+)", word) if name in options]
                used |= {word} & COMMON_WORDS.keys()
                if dotted or (word in options and word not in COMMON_WORDS):
                    name = dotted[0] if dotted else word
                    line = getattr(node, "lineno", 0)
                    known.append(f"{path}:{line}: {name} is an option of {options[name]}; ask its Config instead")
    assert not known, "\n".join(sorted(known))
    assert used == COMMON_WORDS.keys() and used <= options.keys()  # the list holds no more than it must


def test_a_method_is_one_short_file():
    long = {name: len((finder.FOLDER / f"{name}.py").read_text().splitlines()) for name in finder.names()}
    assert not {name: lines for name, lines in long.items() if lines > LONGEST_METHOD}
