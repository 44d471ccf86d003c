"""Fixtures and helpers of all tests. The images are real photographs: crops of scikit-learn's two sample pictures,
as a folder of two classes and as shards."""

from __future__ import annotations

import gc
import io
import itertools
import operator
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import launch.cli
from data_pipeline.build import demo_images
from data_pipeline.build.build_shards import build
from data_pipeline.parts.caption import Caption
from launch import command_parser
from pretrain import contract
from pretrain.interchange import export
from pretrain.models import families
from pretrain.models.build import build_model
from pretrain.objectives import finder
from pretrain.recipes.recipe import Recipe, load
from tests.data.sounds import recordings
from tests.forked import Forked
from tests.services import FaultProxy, ObjectStore, environment

COMMON = ["eval.image_size=null", "threads=1", "precision=fp32"]
TINY = [*contract.VIT, *COMMON]
OBJECTIVES = {*finder.names()}
GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="also run the tests marked `matrix`")
    parser.addoption("--device", choices=["cuda", "cpu"], help="run tests/gpu, on this device; `make test-gpu`: cuda")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(
            "--device cuda: torch finds no GPU here; run this on a machine with one, or try the tests' code with"
            " --device cpu"
        )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collect tests/gpu only if --device names a device."""
    return True if collection_path == GPU_TESTS and config.option.device is None else None


FIRST = (
    "faults",
    "parallel",
    "launch",
)  # folders with the longest tests: begun first, so that no worker is left alone with one
ALONE = ("faults",)  # folders whose tests share no fixture of a module


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that are not `wanted`. Group tests for pytest-xdist: those of a file, which share its
    fixtures, run on one worker."""
    run = [wanted(item, config.option.matrix, config.option.keyword) for item in items]
    config.hook.pytest_deselected(items=list(itertools.compress(items, map(operator.not_, run))))
    items[:] = itertools.compress(items, run)
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            shared = item.path.parent.name not in ALONE
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0] if shared else item.nodeid))
    items.sort(key=lambda item: FIRST.index(item.path.parent.name) if item.path.parent.name in FIRST else len(FIRST))


def wanted(item: Any, matrix: bool, keyword: str) -> bool:
    """Whether pytest may run a collected test. Those marked `matrix` need --matrix. `-k NAME` with the name of an
    objective runs all cases of this objective, also those marked `matrix`, and none of other objectives whose names
    contain it."""
    name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
    if {keyword, name} <= OBJECTIVES:
        return name == keyword
    return matrix or not item.get_closest_marker("matrix")


def pytest_collection_finish() -> None:
    """Freeze modules and tests for the garbage collector, because they live until the end. Otherwise the collection
    before each training would visit them, which takes a third of a small training."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a line for each reason of skipped tests, the seconds of each file, and every test that took over a
    minute."""
    skipped = Counter(
        report.longrepr[2] for report in terminalreporter.stats.get("skipped", []) if isinstance(report.longrepr, tuple)
    )
    for reason, count in skipped.items():
        terminalreporter.write_line(f"{count} tests were SKIPPED: {reason.removeprefix('Skipped: ')}", red=True)
    files: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                test = report.nodeid.partition("@")[0]  # pytest-xdist appends the group
                files[test.partition("::")[0]] += report.duration
                tests[test] += report.duration
    if sum(files.values()) < 60:
        return
    terminalreporter.section("where the time went")
    for name, seconds in files.most_common(20):
        terminalreporter.write_line(f"{seconds:7.0f} s  {name}")
    long = [(name, seconds) for name, seconds in tests.most_common() if seconds > 60]
    terminalreporter.write_line(f"{len(long)} tests took over a minute" + ":" * bool(long))
    for name, seconds in long:
        terminalreporter.write_line(f"{seconds:7.0f} s  {name}")


# One objective for each property: moco has a queue, byol a teacher with batch norms of its own, simclr couples the
# batch and has batch norm, dinov2 and dinov3 have several sizes of crops, distillation a frozen teacher, bert, gpt and
# t5 read text, siglip2 has two encoders, vjepa2 reads video.
BY_PROPERTY = (
    "bert",
    "byol",
    "dinov2",
    "dinov3",
    "distillation",
    "gpt",
    "mae",
    "moco",
    "siglip2",
    "simclr",
    "t5",
    "vjepa2",
)


QUICK = ("dinov2", "gpt", "mae", "moco")  # those of `make test-quick`


def sampled(
    names: Iterable[Any],
    *chosen: Any,
    others: pytest.MarkDecorator = pytest.mark.matrix,
    quick: Collection[Any] | None = None,
) -> list[Any]:
    """Test parameters of which `make test` runs the chosen ones, one for each property, and `make test-matrix` runs
    the others. With `others=pytest.mark.slow`, `make test-quick` runs the chosen ones, and `make test` all. `quick`:
    the only ones that `make test-quick` runs."""
    assert set(chosen) <= set(names), chosen
    marks = {name: [others] * (name not in chosen) for name in names}
    if quick is not None:
        marks = {name: found or [pytest.mark.slow] * (name not in quick) for name, found in marks.items()}
    return [pytest.param(name, marks=found) for name, found in marks.items()]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The cache of indices, features and shards is a folder of this session, so that no test reads what another version
    of the code has cached. The downloads of the demo are those of the user's cache."""
    users = Path(os.environ.get("UNLABELED_CACHE") or Path.home() / ".cache" / "unlabeled")
    folder = tmp_path_factory.mktemp("cache")
    for name in (demo_images.PACKAGE, "demo-text"):
        (users / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(users / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNLABELED_CACHE", str(folder))
        yield


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 crops of 64×64 pixels: china/*.jpg and flower/*.jpg."""
    return write_photos(tmp_path_factory.mktemp("photos"))


def write_photos(folder: Path) -> Path:
    """Write these crops to a folder."""
    from sklearn.datasets import load_sample_image

    rng = np.random.default_rng(0)
    for name in ("china", "flower"):
        (folder / name).mkdir(parents=True)
        picture = load_sample_image(f"{name}.jpg")
        for i in range(24):
            top, left = rng.integers(0, picture.shape[0] - 64), rng.integers(0, picture.shape[1] - 64)
            Image.fromarray(picture[top : top + 64, left : left + 64]).save(folder / name / f"{i:02d}.jpg", quality=92)
    return folder


@pytest.fixture(scope="session")
def shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("shards") / "all"
    build(photos, target)
    return target


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real S3 server."""
    with ObjectStore(tmp_path_factory.mktemp("s3")) as store:
        yield store


@pytest.fixture
def proxy(store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultProxy]:
    """A proxy in front of the store, on which faults can be set; the test gets a cache of its own."""
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))
    with FaultProxy(store.port) as proxy:
        for name, value in environment(proxy.port).items():
            monkeypatch.setenv(name, value)
        forget_connections()
        yield proxy
    forget_connections()


def forget_connections() -> None:
    """Close connections and forget keys, because other tests use other servers and keys."""
    import fsspec
    import s3fs

    from data_pipeline.storage import ranges

    s3fs.S3FileSystem.clear_instance_cache()
    fsspec.config.conf.clear()
    ranges._backends.clear()


def tiny_recipe(name: str, shards: Path, run: Path, *overrides: str) -> Recipe:
    """A recipe of any objective that trains in seconds."""
    data = [
        *data_of(name, shards),
        "data.batch=16",
        "data.workers=0",
        "steps=8",
        f"run={run}",
        "checkpoint=1000",
        "export=1000",
        "log=1",
        "log.flops=false",
    ]
    return load("demo", [f"objective={name}", *tiny(name, shards), *data, "optim.lr=1e-3", *overrides])


def data_of(name: str, shards: Path) -> list[str]:
    """The overrides that name data with the parts of an objective."""
    parts = finder.find(name).parts
    if any(isinstance(part, Caption) for part in parts.values()):
        return [f"data.train={captioned(shards)}", f"data.tokenizer={tokens(shards.parent)}"]
    if "mask" in parts:
        return [f"data.train={masked(shards)}"]
    if "clip" in parts:
        return [f"data.train={clips(shards.parent)}"]
    if any("flac" in part.extensions for part in parts.values()):
        return [f"data.train={recordings(shards.parent)}"]
    return [f"data.train={tokens(shards.parent) if reads_text(name) else shards}"]


def captioned(shards: Path) -> Path:
    """The samples of the shards, each with a caption that names its class and describes the sample."""
    from data_pipeline.shards import index
    from data_pipeline.shards.samples import Samples
    from tests.tars import write_tar

    target = shards.parent / "captioned"
    if not target.is_dir():
        samples, members = Samples([str(shards)]), []
        for number in range(len(samples)):
            text = f"a photo of a {samples.label(number)}, part {number % 7}"
            for extension, data in samples.read(number).items():
                members.append((f"{number:03d}.{extension}", data))
            members.append((f"{number:03d}.txt", text.encode()))
        partial = shards.parent / "captioned.partial"
        partial.mkdir()
        write_tar(partial / "000000.tar", members)
        index.write(partial, lambda line: None, extra={"classes": samples.manifests[0].manifest.classes})
        partial.rename(target)
    return target


def masked(shards: Path) -> Path:
    """The images of the shards, each with a mask: class 0 where it is dark, 1 elsewhere, 2 in its first row, and 255 in
    its last one."""
    from data_pipeline.shards.samples import Samples
    from tests.tars import write_tar

    target = shards.parent / "masked"
    if not target.is_dir():
        samples, members = Samples([str(shards)]), []
        for number in range(len(samples)):
            pixels, found = samples.image(number, 3), samples.read(number)
            mask = (pixels.mean(2) > 100).astype(np.uint8)
            mask[0], mask[-1] = 2, 255
            encoded = io.BytesIO()
            Image.fromarray(mask).save(encoded, "PNG")
            members += [(f"{number:03d}.{e}", data) for e, data in found.items() if e not in ("cls", "json")]
            members.append((f"{number:03d}.mask.png", encoded.getvalue()))
        partial = shards.parent / "masked.partial"
        partial.mkdir()
        write_tar(partial / "000000.tar", members)
        partial.rename(target)
    return target


def reads_text(name: str) -> bool:
    """Whether an objective trains on tokens."""
    return "tokens" in finder.find(name).parts


def tiny(name: str, shards: Path) -> list[str]:
    """Overrides for the model and the options with which tests train an objective."""
    return [*contract.tiny(name, lambda kind: folder_of(kind, shards))[0], *COMMON]


def variants(name: str, shards: Path) -> list[list[str]]:
    """The overrides to add to `tiny`, one list after the other, so that every option of an objective is used; the
    first list is empty."""
    return [[], *contract.tiny(name, lambda kind: folder_of(kind, shards))[1:]]


def folder_of(kind: str, shards: Path) -> str:
    """The folder that stands for "{export}" or "{run NAME}" in a value of `Config.tiny`."""
    word, _, name = kind.partition(" ")
    return str(teacher(shards.parent) if word == "export" else run_of(name, shards))


def tokens(folder: Path) -> Path:
    """A token set of artificial prose, with a mask token and sentinels."""
    from tests.data.texts import tokens_of, write_texts

    target = folder / "tokens"
    if not target.is_dir():
        tokens_of(write_texts(folder / "texts"), target, vocab=500, specials=("sentinels",))
    return target


def clips(folder: Path) -> Path:
    """Shards of 48 videos of 16 frames of 32 pixels, eight in a second, in two classes: a camera that moves over one
    of scikit-learn's pictures."""
    import av
    from sklearn.datasets import load_sample_image

    target, source = folder / "clips", folder / "videos"
    if target.is_dir():
        return target
    rng = np.random.default_rng(0)
    for name in ("china", "flower"):
        (source / name).mkdir(parents=True)
        picture = load_sample_image(f"{name}.jpg")
        for i in range(24):
            top, left = (int(rng.integers(16, size - 48)) for size in picture.shape[:2])
            down, right = rng.integers(-1, 2, 2)
            with av.open(str(source / name / f"{i:02d}.mp4"), "w") as out:
                stream = out.add_stream("mpeg4", rate=8)
                stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 32, 32, "yuv420p", 400_000
                for t in range(16):
                    y, x = top + t * down, left + t * right
                    frame = np.ascontiguousarray(picture[y : y + 32, x : x + 32])
                    out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
                out.mux(stream.encode())
    build(source, target)
    return target


def run_of(name: str, shards: Path) -> Path:
    """A run of an objective with a checkpoint, such as a teacher with heads. Its model is wider than the students
    and has other patches."""
    from pretrain.train import train

    run = shards.parent / f"run_of_{name}"
    if not run.is_dir():
        wide = [] if reads_text(name) else ["model.patch_size=4", "model.dim=48"]
        train(tiny_recipe(name, shards, run, "steps=2", *wide))
    return run


def teacher_run(shards: Path) -> Path:
    return run_of("dinov2", shards)


def teacher(folder: Path) -> Path:
    """An export to distil from. Its model is wider than the students and has other patches."""
    target = folder / "teacher"
    if not target.is_dir():
        cfg = families.ViT(image_size=32, patch_size=4, dim=48, depth=2, heads=4, positions="rope")
        cfg.name = "vit"
        with torch.random.fork_rng():
            torch.manual_seed(7)
            body = build_model(cfg)
        export.write(target, body, {"step": 1, "objective": "mae", "pool": "cls"}, [0.5] * 3, [0.25] * 3)
    return target


def unlabeled(*args: object, timeout: float = 300, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run the command line in a separate process."""
    return _forked(_command_line, args, timeout, cwd)


def trainer(*args: object, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run `python -m pretrain.train`, without the launcher and without importing torch again."""
    return _forked(_trainer, args, timeout)


def _forked(
    function: Callable[[list[str]], int | None], args: tuple[object, ...], timeout: float, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        words = list(map(str, args))
        process = Forked(function, words, output=(str(out), str(err)), cwd=cwd)
        code = process.wait(timeout)
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())


def _command_line(words: list[str]) -> int | None:
    sys.argv = ["unlabeled", *words]
    return launch.cli.main()


def _trainer(words: list[str]) -> int:
    from common.errors import run_main
    from pretrain.train import main

    sys.argv = ["pretrain.train", *words]
    return run_main(main)


def call(*args: object) -> int:
    """Run a command in this process. Returns its exit code."""
    parsed = launch.cli.parser().parse_args([*map(str, args)])
    return command_parser.call(parsed) or 0
