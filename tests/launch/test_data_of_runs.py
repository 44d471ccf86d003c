"""Runs on mixtures, with phases, on data that change, and from a bucket; and previews of the model's input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from common import config
from common.errors import ConfigError, DataError, UserError
from data_pipeline.build.contact_sheet import Font
from data_pipeline.shards import index
from eval.run import evaluate
from launch.preview import GAP, TEXT_WIDTH, TILE, preview
from pretrain import train as training
from pretrain.build import build_objective, build_stream, open_samples
from pretrain.recipes.recipe import load
from pretrain.signals import EXIT_STOPPED
from pretrain.train import train
from tests.conftest import clips, sampled, tiny_recipe
from tests.faults import killer
from tests.faults.test_kill import wait_for
from tests.faults.test_signals import everyone
from tests.forked import Forked
from tests.services import FaultProxy, ObjectStore, environment
from tests.tars import jpeg, write_tar


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_finished_run_goes_on_where_its_schedules_allow(shards: Path, tmp_path: Path):
    """With a constant rate after a warm-up, the numbers are those of a run that was longer from the start. If the
    rate has begun to decay, the run is refused."""
    rate = "optim.lr={value: 1e-3, warmup: 2}"
    train(tiny_recipe("mae", shards, tmp_path / "run", "steps=3", rate))
    assert "run: finished its 3 steps; its export is " in (tmp_path / "run" / "log.txt").read_text()
    train(load(tmp_path / "run", ["steps=5"]))
    train(tiny_recipe("mae", shards, tmp_path / "whole", "steps=5", rate))
    assert [r["loss"] for r in rows(tmp_path / "run")] == [r["loss"] for r in rows(tmp_path / "whole")]
    assert [r["lr"] for r in rows(tmp_path / "run")] == [0, 5e-4, 1e-3, 1e-3, 1e-3]
    decay = tiny_recipe(
        "mae", shards, tmp_path / "run", "steps=7", "optim.lr={kind: wsd, value: 1e-3, warmup: 2, decay: 2}"
    )
    train(decay)
    assert [r["lr"] for r in rows(tmp_path / "run")][4:] == [1e-3, 1e-3, 0]
    with pytest.raises(UserError, match=r"another recipe \(optim.lr.steps: 7 → 9"):
        train(load(tmp_path / "run", ["steps=9"]))
    assert load(tmp_path / "run").steps == 7


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    folder = tmp_path / "noise"
    folder.mkdir()
    write_tar(folder / "a.tar", [(f"{i:03d}.jpg", jpeg(i)) for i in range(40)])
    index.write(folder)
    return folder


def mixed(shards: Path, noise: Path, run: Path, *overrides: str):
    mix = f"data.mix=[{{shards: {shards}, weight: 3}}, {{shards: {noise}, weight: 1, homogeneous: 0.2}}]"
    return tiny_recipe("simclr", shards, run, "data.train=[]", mix, *overrides)


@pytest.mark.slow
def test_a_mixture_trains_and_says_how_far_each_dataset_is(shards: Path, noise: Path, tmp_path: Path):
    run = train(mixed(shards, noise, tmp_path / "run", "steps=10"))
    last = rows(run)[-1]
    assert last["epoch/0"] > 0 and last["epoch/1"] > 0
    assert last["epoch/0"] * 48 + last["epoch/1"] * 40 == pytest.approx(160, abs=0.1)
    assert "bottleneck" in last["stage"] and last["stream/wait_ms_p99"] >= 0 and last["stream/requests"] > 0
    assert load(run).data.mix[1].homogeneous == 0.2  # the resolved recipe holds it


@pytest.mark.parametrize("name", ["videomae", "vjepa2"])
def test_videos_and_images_are_mixed_in_one_run(name: str, shards: Path, tmp_path: Path):
    """An image is a clip of equal frames."""
    mix = f"data.mix=[{{shards: {clips(shards.parent)}}}, {{shards: {shards}, homogeneous: 0.4}}]"
    run = train(cfg := tiny_recipe(name, shards, tmp_path / "run", "data.train=[]", mix, "steps=3"))
    assert rows(run)[-1]["epoch/0"] > 0 < rows(run)[-1]["epoch/1"]
    samples = open_samples(cfg)
    stream, moving = build_stream(cfg, build_objective(cfg), samples), set()
    for step in range(3):
        batch, slots = next(stream)["clip"].flatten(0, -5), stream.plan.slots(step, 0, 16)
        for clip, dataset in zip(batch, slots.dataset.tolist(), strict=True):
            moving.add((dataset, not torch.equal(clip, clip[:1].expand_as(clip))))
    assert moving >= {(0, True), (1, False)} and (1, True) not in moving


@pytest.mark.slow
def test_a_phase_changes_batch_and_weights_and_what_is_past_stays(shards: Path, noise: Path, tmp_path: Path):
    train(mixed(shards, noise, tmp_path / "run", "steps=4", "checkpoint=4"))
    with pytest.raises(UserError, match=r"data.phases: \[\] → "):
        train(mixed(shards, noise, tmp_path / "run", "steps=4", "data.phases=[{step: 2, batch: 32}]"))
    later = "data.phases=[{step: 4, batch: 32, weights: [1, 1]}]"
    last = rows(train(mixed(shards, noise, tmp_path / "whole", "steps=8", later)))[-1]
    assert last["epoch/0"] * 48 + last["epoch/1"] * 40 == pytest.approx(4 * 16 + 4 * 32, abs=0.1)


def stopped_after_three_steps(shards: Path, run: Path) -> None:
    """Train with a signal in the third step."""
    with mock.patch.object(training, "_is_due", lambda step, _: step == 3 and not signal.raise_signal(signal.SIGTERM)):
        train(tiny_recipe("simclr", shards, run))


@pytest.mark.slow
def test_a_phase_added_after_a_stop_gives_the_run_that_had_it_from_the_start(shards: Path, tmp_path: Path):
    phase = "data.phases=[{step: 5, batch: 32}]"
    whole = rows(train(tiny_recipe("simclr", shards, tmp_path / "whole", phase)))
    run = tmp_path / "run"
    assert Forked(stopped_after_three_steps, shards, run).wait(100) == EXIT_STOPPED
    train(tiny_recipe("simclr", shards, run, phase))
    assert [r["loss"] for r in rows(run)] == pytest.approx([r["loss"] for r in whole], rel=1e-6)


@pytest.mark.slow
def test_a_run_goes_on_only_with_the_data_it_was_started_on(noise: Path, tmp_path: Path):
    run = tmp_path / "run"
    cfg = tiny_recipe("simclr", noise, run)
    train(cfg)
    with pytest.raises(UserError, match="both given"):
        train(tiny_recipe("simclr", noise, tmp_path / "x", f"data.mix=[{noise}]"))
    write_tar(noise / "b.tar", [("new.jpg", jpeg(99))])
    index.write(noise)
    with pytest.raises(
        DataError, match=r"is not the data that this run was started on: 0/b.tar is new \(1 shards before, 2 now\)"
    ):
        train(tiny_recipe("simclr", noise, run))


def test_damaged_samples_of_a_run_are_listed_in_its_folder(tmp_path: Path):
    folder = tmp_path / "shards"
    folder.mkdir()
    members = {f"{i:03d}.jpg": jpeg(i) for i in range(40)} | {"005.jpg": b"\xff\xd8no"}
    members["007.txt"] = members["009.txt"] = b"words"
    del members["007.jpg"], members["009.jpg"]
    write_tar(folder / "a.tar", sorted(members.items()))
    run = train(tiny_recipe("mae", folder, tmp_path / "run", "data.shuffle=false"))
    (line,) = (run / "damaged" / "damaged-0.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "005" and rows(run)[-1]["stream/damaged"] == 1
    said = (run / "log.txt").read_text()
    assert "damaged sample left out: 005 in" in said
    assert (
        f"{run}: trained on 128 samples in the steps from 0 to 8; samples that lack a part were skipped 7 times;"
        f" 1 was damaged and replaced by neighbours, all listed in {run / 'damaged'}"
    ) in said  # 40 samples three times, and the first 8 once more


@pytest.mark.parametrize("name", sampled(["dinov2", "mae", "simclr"], "mae", others=pytest.mark.slow))
def test_images_of_five_channels_train_and_are_scored(name: str, tmp_path: Path):
    rng, members = np.random.default_rng(0), []
    for i in range(24):
        out = io.BytesIO()
        np.save(out, rng.integers(0, 256, (40, 40, 5), dtype=np.uint8))
        members += [(f"{i:02d}.npy", out.getvalue()), (f"{i:02d}.cls", b"%d" % (i % 2))]
    (tmp_path / "five").mkdir()
    write_tar(tmp_path / "five" / "a.tar", members)
    index.write(tmp_path / "five")
    values = "[0.5, 0.5, 0.5, 0.5, 0.5]"
    channels = ["model.in_channels=5", f"data.mean={values}", f"data.std={values}"]
    run = train(tiny_recipe(name, tmp_path / "five", tmp_path / "run", *channels))
    assert np.isfinite(rows(run)[-1]["loss"])
    (row,) = [
        r
        for r in evaluate(str(run / "export" / "8"), ["knn"], [str(tmp_path / "five")], [str(tmp_path / "five")])
        if r["metric"] == "accuracy"
    ]
    assert row["count"] == 24
    with pytest.raises(UserError, match=r"data.mean = \[.*\]: model.in_channels = 5, so write 5 values"):
        train(tiny_recipe(name, tmp_path / "five", tmp_path / "other", "model.in_channels=5"))


@pytest.mark.slow
def test_preview_needs_no_batch_that_fits(shards: Path, tmp_path: Path):
    cfg = tiny_recipe("mae", shards, tmp_path / "run", "data.batch=1000", "parallel.micro_batch=128")
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    with pytest.raises(DataError, match=r"mine\.png: exists already, and this command has not written it"):
        preview(cfg, tmp_path / "mine.png", rows=2)
    assert np.array(Image.open(preview(cfg, tmp_path / "x.png", rows=2))).shape[0] == GAP + 2 * (TILE + GAP)
    with pytest.raises(ConfigError, match=r"than the 48 samples in .*; write data.batch=48$"):
        train(cfg)
    done = train(tiny_recipe("mae", shards, tmp_path / "run", "data.batch=48", "parallel.micro_batch=128", "steps=1"))
    assert (done / "export" / "1").is_dir()


def test_preview_of_clips_is_a_strip_of_frames(shards: Path, tmp_path: Path):
    page = np.array(Image.open(preview(tiny_recipe("videomae", shards, tmp_path), tmp_path / "x.png", rows=2)))
    assert page.shape[:2] == (GAP + 2 * (TILE + GAP), GAP + 4 * (TILE + GAP))
    strip = page[GAP : GAP + TILE]
    frames = np.stack([strip[:, GAP + t * (TILE + GAP) :][:, :TILE] for t in range(4)]).astype(float)
    patches = frames.reshape(4, 4, TILE // 4, 4, TILE // 4, 3).mean((2, 4, 5))  # [frame, row, column]
    bright = patches > 64  # masked ones have a quarter of their brightness
    assert (bright == bright[0]).all() and bright[0].sum() <= 2


def test_preview_shows_captions_beside_images(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = []
    monkeypatch.setattr(Font, "draw", lambda font, page, place, lines: drawn.append((place, " ".join(lines))))
    page = np.array(Image.open(preview(tiny_recipe("clip", shards, tmp_path), tmp_path / "x.png", rows=2)))
    assert page.shape == (GAP + 2 * (TILE + GAP), 2 * GAP + TILE + TEXT_WIDTH, 3)
    assert [place for place, _ in drawn] == [(2 * GAP + TILE, GAP + n * (TILE + GAP)) for n in range(2)]
    assert all("a photo of a" in text and "part" in text for _, text in drawn)


@pytest.mark.parametrize("name", ["dinov2", "mae", "simclr"])
@pytest.mark.parametrize("color", ["exact", "device"])
def test_preview_draws_all_views_and_their_masks(name: str, color: str, shards: Path, tmp_path: Path):
    cfg = tiny_recipe(name, shards, tmp_path / "run", f"data.color={color}")
    page = np.array(Image.open(preview(cfg, tmp_path / "p" / "x.png", rows=3)))
    views = {"dinov2": 4, "mae": 1, "simclr": 2}[name]
    assert page.shape == (3 * (TILE + GAP) + GAP, views * (TILE + GAP) + GAP, 3)
    tiles = [page[GAP : GAP + TILE, GAP + n * (TILE + GAP) :][:, :TILE] for n in range(views)]
    assert all(tile.std() > 5 for tile in tiles)
    if name == "mae":  # three of four patches are dark
        dark = sorted(tiles[0].reshape(4, TILE // 4, 4, TILE // 4, 3).mean((1, 3, 4)).ravel())
        assert np.mean(dark[:12]) < 0.5 * np.mean(dark[12:])
    assert not (tmp_path / "run").exists()  # it only looks
    with pytest.raises(DataError, match=r"write a name that ends in .png"):
        preview(cfg, tmp_path / "x.unknown", rows=1)


@pytest.mark.slow
def test_a_run_from_a_bucket_killed_at_any_moment_goes_on_exactly(
    shards: Path, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    url = store.put_folder(shards, "run")
    overrides = ["steps=40", "checkpoint=5", "data.workers=1", f"data.fetch.cache={tmp_path / 'ssd'}"]
    whole = rows(train(tiny_recipe("simclr", shards, tmp_path / "whole", "steps=40")))
    with FaultProxy(store.port) as proxy:
        env = {**environment(proxy.port), "UNLABELED_CACHE": str(tmp_path / "cache")}
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(config.dump(tiny_recipe("simclr", shards, tmp_path / "run", f"data.train={url}", *overrides)))
        metrics = tmp_path / "run" / "metrics.jsonl"
        for _ in range(3):
            proxy.set(latency=0.02, error_rate=0.05, cut_rate=0.05)
            child = Forked(killer.run, [str(recipe)], env=env, output=(os.devnull, os.devnull))
            trained = metrics.read_bytes().count(b"\n") + random.randint(-2, 6) if metrics.exists() else 0
            assert wait_for(
                lambda trained=trained: metrics.exists() and metrics.read_bytes().count(b"\n") > trained, child
            )
            for process in everyone(child):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            child.wait()
        proxy.set()
        done = Forked(killer.run, [str(recipe)], env=env, output=(os.devnull, str(tmp_path / "errors")))
        assert done.wait(200) == 0, (tmp_path / "errors").read_text()
    assert [r["loss"] for r in rows(tmp_path / "run")] == pytest.approx([r["loss"] for r in whole], rel=1e-6)
