"""Features as files: each row belongs to its key, for any number of processes that may be killed."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet

from common.errors import Damaged, UserError
from data_pipeline.build.build_shards import build
from data_pipeline.shards import index
from data_pipeline.shards.samples import Samples
from eval import embed
from eval.features import Encoder, open_encoder
from eval.text_features import bytes_of
from tests.conftest import call, teacher
from tests.forked import Forked
from tests.tars import jpeg, write_tar

PART = 4  # samples, in these tests


@pytest.fixture
def data(images: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(embed, "PART_SAMPLES", PART)
    return str(images)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 samples in two shards: 20 images, one of which is damaged, and two samples without an image. All tests share
    them, because their index takes seconds."""
    folder = tmp_path_factory.mktemp("data")
    for shard in range(2):
        members = []
        for n in range(11):
            image = jpeg(11 * shard + n, 40)
            damaged = shard == 0 and n == 6
            members.append((f"{n:02d}.txt", b"word") if n == 5 else (f"{n:02d}.jpg", image[: 200 if damaged else None]))
        write_tar(folder / f"{shard}.tar", members)
    return folder


def read(out: Path) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """(features, keys) of a folder of .npy parts."""
    names = sorted(path.stem for path in out.glob("*.npy"))
    rows = [json.loads(line) for name in names for line in (out / f"{name}.jsonl").read_text().splitlines()]
    return np.concatenate([np.load(out / f"{name}.npy") for name in names]), [(r["shard"], r["key"]) for r in rows]


def read_shards(out: Path) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """The same of a folder of shards, as any data set of this project is read."""
    index.write(out, lambda line: None, further=["features.npy"])
    samples = Samples([str(out)])
    found = [np.load(io.BytesIO(samples.read(n, ("features.npy",))["features.npy"])) for n in range(len(samples))]
    keys = [samples.name(n)[1].partition("/") for n in range(len(samples))]
    return np.stack(found), [(f"{shard}.tar", key) for shard, _, key in keys]


def expected(encoder: Encoder, data: str) -> tuple[torch.Tensor, list[tuple[str, str]]]:
    samples = encoder.check([data])
    numbers = [n for n in range(22) if n % 11 != 5 and n != 6]
    images = np.stack([encoder.read(samples, n) for n in numbers])
    return encoder(images), [(f"{n // 11}.tar", f"{n % 11:02d}") for n in numbers]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["npy", "parquet", "tar"])
def test_rows_and_keys(format: str, data: str, tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture):
    model = teacher(shards.parent)
    features, keys = expected(open_encoder(str(model))[0], data)
    values = {"auto": features.cls, "cls": features.cls, "mean": features.tokens.mean(1), "patches": features.tokens}
    for output, value in values.items():
        out = tmp_path / "new" / output
        assert call("embed", model, data, out, "--output", output, "--format", format) == 0
        if format == "npy":
            found, names = read(out)
        elif format == "tar":
            found, names = read_shards(out)
        else:
            table = parquet.read_table(out)
            assert table.column_names == ["shard", "key", "features"]
            names = list(zip(table["shard"].to_pylist(), table["key"].to_pylist(), strict=True))
            found = np.array(table["features"].to_pylist(), np.float32).reshape(value.shape)
        assert names == keys
        torch.testing.assert_close(torch.from_numpy(found), value, rtol=1e-4, atol=1e-5)
        about = json.loads((out / "_embed.json").read_text())
        assert about["shape"] == list(value.shape[1:]) and about["output"] == ("cls" if output == "auto" else output)
    assert "the features of 19 samples; 3 samples that cannot be read have none" in capsys.readouterr().out


def run(data: str, out: Path, die_at: int = 0, wait_for: Path | None = None) -> None:
    """Embed pixels with small parts, and write a line to OUT.log for each batch. `wait_for`: begin when it exists."""
    embed.PART_SAMPLES, Encoder.batch, calls = PART, 2, 0
    log = out.with_name(f"{out.name}.{os.getpid()}.log")
    plain = Encoder.pooled

    def pooled(self: Encoder, images: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with log.open("a") as file:
            file.write("batch\n")
        time.sleep(0.05)
        return plain(self, images)

    Encoder.pooled = pooled  # type: ignore[method-assign]
    while wait_for is not None and not wait_for.exists():
        log.with_suffix(".ready").touch()
        time.sleep(0.02)
    embed.embed("pixels", [data], out)


@pytest.mark.slow
def test_killed_and_shared(data: str, tmp_path: Path):
    assert embed.embed("pixels", [data], tmp_path / "whole") == (19, 3)
    assert Forked(run, data, tmp_path / "out", 6).wait(60) == -signal.SIGKILL
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npy")}
    assert list(written) and len(written) < 6
    (tmp_path / "out" / ".part-00005.npy.77.partial").write_bytes(b"half")
    started = [Forked(run, data, tmp_path / "out", 0, tmp_path / "go") for _ in range(2)]
    while len(list(tmp_path.glob("out.*.ready"))) < 2:
        time.sleep(0.02)
    (tmp_path / "go").touch()
    assert [process.wait(60) for process in started] == [0, 0]
    logs = [len((tmp_path / f"out.{process.pid}.log").read_text().split()) for process in started]
    assert min(logs) > 1, logs  # batches; one is that of the shape
    for path in (tmp_path / "whole").glob("part-*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == changed for name, changed in written.items())
    assert embed.embed("pixels", [data], tmp_path / "out") == (19, 3)


@pytest.mark.parametrize("format", ["npy", "parquet", "tar"])
def test_samples_that_could_not_be_read_once_are_read_again(
    format: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = Encoder.read

    def failing(self: Encoder, samples: Any, number: int) -> np.ndarray:
        if number == 9:
            raise Damaged("an error of the storage")
        return plain(self, samples, number)

    monkeypatch.setattr(Encoder, "read", failing)
    assert embed.embed("pixels", [data], tmp_path / "out", format=format) == (18, 4)
    assert [path.name for path in sorted((tmp_path / "out").glob("*.damaged"))] == [
        "_part-00001.damaged",
        "_part-00002.damaged",
    ]
    monkeypatch.setattr(Encoder, "read", plain)
    assert embed.embed("pixels", [data], tmp_path / "out", format=format) == (19, 3)
    assert [path.name for path in (tmp_path / "out").glob("*.damaged")] == ["_part-00001.damaged"]


def test_texts(tmp_path: Path, shards: Path):
    rows = "".join(json.dumps({"text": f"{word} {n}", "label": None}) + "\n" for n in range(5) for word in ("a", "bb"))
    (tmp_path / "rows.jsonl").write_text(rows)
    build(tmp_path / "rows.jsonl", tmp_path / "texts")
    assert embed.embed("bytes", [str(tmp_path / "texts")], tmp_path / "out") == (10, 0)
    found, _ = read(tmp_path / "out")
    text = [f"{word} {n}" for n in range(5) for word in ("a", "bb")]
    assert torch.equal(torch.from_numpy(found), torch.stack([bytes_of(each) for each in text]))
    with pytest.raises(UserError, match="--output patches: bytes reads texts, whose numbers of tokens differ"):
        embed.embed("bytes", [str(tmp_path / "texts")], tmp_path / "patches", "patches")


def test_another_folder_is_refused(data: str, tmp_path: Path, shards: Path):
    out = tmp_path / "out"
    embed.embed("pixels", [data], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match=r"holds features of samples 22, not 48; name a new"):
        embed.embed("pixels", [str(shards)], out)
    for old, new in (("1.tar", "2.tar"), ("0.tar", "3.tar")):  # the order of two shards
        (tmp_path / "swapped").mkdir(exist_ok=True)
        shutil.copy(Path(data) / old, tmp_path / "swapped" / new)
    with pytest.raises(UserError, match=r"holds features of another model, image size or other data; name a new"):
        embed.embed("pixels", [str(tmp_path / "swapped")], out)
    with pytest.raises(UserError, match=r"holds features of .*format npy, not parquet"):
        embed.embed("pixels", [data], out, format="parquet")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"mine: holds notes\.txt, which is no file of `unlabeled embed`"):
        embed.embed("pixels", [data], tmp_path / "mine")
    with pytest.raises(UserError, match=r"cannot be kept there \(Not a directory\); name another folder"):
        embed.embed("pixels", [data], tmp_path / "mine" / "notes.txt" / "out")
