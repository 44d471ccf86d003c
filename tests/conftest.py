"""Real photographs for the tests: crops of scikit-learn's two sample pictures, as a folder of two classes and as shards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.build import build
from pretrain import export
from pretrain.models import presets
from pretrain.recipe import Recipe, load
from tests.services import FaultProxy, ObjectStore, environment

# every objective at a size that trains in a second, on images of 32 pixels
TINY = [
    "model=vit",
    "model.dim=32",
    "model.depth=2",
    "model.heads=2",
    "model.image_size=32",
    "eval.image_size=null",
    "model.patch_size=8",
    "threads=1",
    "precision=fp32",
]
SMALL = {
    "mae": ["objective.decoder_dim=32", "objective.decoder_depth=1", "objective.decoder_heads=2"],
    "simclr": ["objective.head_hidden=64", "objective.head_outputs=32"],
    "dinov3": [
        "objective.prototypes=64",
        "objective.head_hidden=64",
        "objective.head_bottleneck=32",
        "objective.local_size=16",
        "objective.local_crops=2",
        "objective.koleo_group=4",
        "objective.gram_teacher=ema",
        "objective.gram_size=64",
    ],
    "distillation": ["objective.loss=features", "objective.local_size=16", "objective.local_crops=2"],
    "dinov2": [
        "objective.prototypes=64",
        "objective.head_hidden=64",
        "objective.head_bottleneck=32",
        "objective.local_size=16",
        "objective.local_crops=2",
    ],
}

# objectives that read text: their models at the same size, on rows of 32 tokens
SIZE = ["model.dim=32", "model.depth=2", "model.heads=2", "model.context=32", "model.vocab_size=512"]
TEXT = {
    "gpt": ["model=gpt_micro", *SIZE],
    "bert": ["model=bert_micro", *SIZE],
    "t5": ["model=t5_micro", *SIZE, "model.mlp_width=64", "data.document_mask=false"],
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 crops of 64×64 pixels: china/*.jpg and flower/*.jpg."""
    from sklearn.datasets import load_sample_image

    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in ("china", "flower"):
        (folder / name).mkdir()
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
    """The way to the store, on which faults can be set; with a cache of the test's own."""
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))
    with FaultProxy(store.port) as proxy:
        for name, value in environment(proxy.port).items():
            monkeypatch.setenv(name, value)
        forget_connections()
        yield proxy
    forget_connections()


def forget_connections() -> None:
    """Other tests have other servers and keys."""
    import fsspec
    import s3fs

    from data_pipeline import fetch

    s3fs.S3FileSystem.clear_instance_cache()
    fsspec.config.conf.clear()
    fetch._backends.clear()


def tiny_recipe(name: str, shards: Path, run: Path, *overrides: str) -> Recipe:
    """A recipe of any objective that trains in seconds; an objective without an entry in SMALL keeps its own sizes."""
    data = [
        f"data.train={shards}",
        "data.batch=16",
        "data.workers=0",
        "steps=8",
        f"run={run}",
        "checkpoint=1000",
        "export=1000",
        "log=1",
        "log.flops=false",
    ]
    own = [*TINY, *SMALL.get(name, [])]
    if name in TEXT:
        data[0] = f"data.train={tokens(shards.parent)}"
        own = [*TEXT[name], "eval.image_size=null", "threads=1", "precision=fp32"]
    own += [f"objective.teacher={teacher(shards.parent)}"] if name == "distillation" else []
    return load("demo", [f"objective={name}", *own, *data, "optim.lr=1e-3", *overrides])


def tokens(folder: Path) -> Path:
    """A token set of made-up prose, with masks and sentinels."""
    from tests.data.texts import tokens_of, write_texts

    target = folder / "tokens"
    if not target.is_dir():
        tokens_of(write_texts(folder / "texts"), target, vocab=500, specials=("sentinels",))
    return target


MORE = ("distillation",)  # objectives of which one set of options does not read all


def more(name: str, shards: Path) -> list[str]:
    """Another set of options."""
    return ["objective.loss=prototypes", f"objective.teacher={teacher_run(shards)}"]


def teacher_run(shards: Path) -> Path:
    """A run of dinov2 with a checkpoint: a teacher with heads."""
    from pretrain.train import train

    run = shards.parent / "teacher_run"
    if not run.is_dir():
        train(tiny_recipe("dinov2", shards, run, "steps=2", "model.patch_size=4", "model.dim=48"))
    return run


def teacher(folder: Path) -> Path:
    """An exported backbone to distil, wider than the students and with other patches."""
    target = folder / "teacher"
    if not target.is_dir():
        cfg = presets.ViT(image_size=32, patch_size=4, dim=48, depth=2, heads=4, positions="rope")
        cfg.name = "vit"
        with torch.random.fork_rng():
            torch.manual_seed(7)
            body = presets.build(cfg)
        export.write(target, body, {"step": 1, "objective": "mae", "pool": "cls"}, [0.5] * 3, [0.25] * 3)
    return target


def unlabeled(*args: object, timeout: float = 300, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "launch.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd)
