"""Batches are a function of the step. Damaged samples are logged and replaced; too many of them end the run."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import simplejpeg
import torch

from common.errors import Damaged, DataError
from data_pipeline.build.stats import summarize
from data_pipeline.formats.decode_budget import Budget
from data_pipeline.order.schedule import Phase
from data_pipeline.parts.caption import Caption
from data_pipeline.parts.image import Image
from data_pipeline.shards import index
from data_pipeline.shards.samples import Samples
from data_pipeline.stream.damage_log import MIN_ALLOWED_DAMAGED, DamageLog
from data_pipeline.stream.stream import Reading, Stream, to_device
from data_pipeline.stream.stream_stats import StreamStats
from data_pipeline.views.augmentations import Augment, crops
from pretrain.build import build_objective, build_stream, open_samples
from tests.conftest import tiny_recipe
from tests.forked import Forked
from tests.tars import jpeg, write_tar


def views(sample, rng):
    return {"image": sample["image"].pixels().transpose(2, 0, 1)}


def augmented(sample, rng):
    one = Augment(32, (0.3, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), gray=0.2, blur=0.5)
    return crops(sample, {"image": [one, one]}, rng) | {"slot": np.int64(sample["slot"])}


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Twelve samples, two of them damaged before they were indexed: one cut short, one with a hole."""
    hole = bytearray(jpeg(3))
    hole[2000:2064] = bytes(64)
    images = [jpeg(i) for i in range(12)]
    images[3], images[7] = images[7][:2000], bytes(hole)
    write_tar(tmp_path / "d.tar", [(f"{i:03d}.jpg", image) for i, image in enumerate(images)])
    return tmp_path / "d.tar"


# ---------------------------------------------------------------- data workers that end
@pytest.mark.slow
@pytest.mark.parametrize(("number", "cause"), [(signal.SIGKILL, "lack of memory"), (signal.SIGBUS, "/dev/shm is full")])
def test_a_killed_data_worker_is_reported_in_one_line(number: signal.Signals, cause: str, shards: Path):
    before = signal.getsignal(signal.SIGCHLD)
    stream = Stream(Samples([str(shards)]), views, 12, workers=1)
    next(stream)
    (worker,) = stream._processes
    os.kill(
        worker.pid, signal.SIGTERM
    )  # as a scheduler sends to all processes: workers ignore it, the trainer ends them
    for _ in range(10):
        next(stream)
    assert signal.getsignal(signal.SIGCHLD) == before  # the DataLoader's handler would raise at any line
    os.kill(worker.pid, number)
    with pytest.raises(DataError, match=rf"\(process {worker.pid}\) was killed by {number.name}, .*{cause}"):
        for _ in range(100):
            next(stream)


def hold_workers(shards: str, file: str) -> None:
    """A trainer with two data workers, whose process ids it writes to a file."""
    stream = Stream(Samples([shards]), views, 12, workers=2)
    next(stream)
    Path(file).write_text(" ".join(str(worker.pid) for worker in stream._processes))
    time.sleep(600)


@pytest.mark.slow
def test_data_workers_end_with_a_killed_trainer(shards: Path, tmp_path: Path):
    """Data workers have copies of the trainer's sockets, so that other ranks wait until they have ended. torch's check
    takes up to 5 seconds."""
    process = Forked(hold_workers, str(shards), str(tmp_path / "workers"))
    while not (tmp_path / "workers").exists() or not (tmp_path / "workers").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    workers = [psutil.Process(int(pid)) for pid in (tmp_path / "workers").read_text().split()]
    process.kill()
    left = psutil.wait_procs(workers, timeout=2)[1]
    assert [w for w in left if w.is_running() and w.status() != psutil.STATUS_ZOMBIE] == []  # a zombie has ended


def test_samples_without_an_image_are_skipped_and_not_damaged(tmp_path: Path):
    members = [(f"{i:02d}.{'txt' if i % 3 == 1 else 'jpg'}", b"words" if i % 3 == 1 else jpeg(i)) for i in range(12)]
    write_tar(tmp_path / "a.tar", members)
    samples = Samples([str(tmp_path / "a.tar")])
    lines = summarize(samples)
    assert "12 samples with 8 .jpg, 4 .txt; no class names" in lines[0]
    assert "4 samples hold no image, for example 01; other samples replace them" in lines[1]
    damage_log = DamageLog(None)
    stream = Stream(samples, views, 12, workers=0, damage_log=damage_log)
    seen = torch.cat([next(stream)["id"] for _ in range(2)])
    assert stream.absent == 8 and damage_log.bad == {} and set(seen.tolist()) == {i for i in range(12) if i % 3 != 1}
    write_tar(tmp_path / "b.tar", [(f"{i:02d}.txt", b"words") for i in range(99)])
    with pytest.raises(DataError, match=r"64 damaged samples in a row, the last sample .*: holds no image member"):
        next(Stream(Samples([str(tmp_path / "b.tar")]), views, 8, workers=0))


# ---------------------------------------------------------------- the same batches
@pytest.mark.slow
def test_batches_are_the_same_for_any_number_of_processes_workers_threads_and_micro_batches(shards: Path):
    samples = Samples([str(shards)])
    whole = Stream(samples, augmented, 12, seed=3, workers=0)
    batches = [next(whole) for _ in range(6)]
    for world, accumulate, workers, threads in [(2, 1, 0, 3), (3, 2, 0, 1), (1, 3, 2, 2), (4, 1, 1, 1)]:
        streams = [
            Stream(
                samples, augmented, 12, 3, rank=r, world=world, accumulate=accumulate, reading=Reading(workers, threads)
            )
            for r in range(world)
        ]
        for batch in batches:
            parts = [next(s) for s in streams for _ in range(accumulate)]
            for key in batch:
                assert np.array_equal(np.concatenate([p[key] for p in parts]), batch[key]), (world, accumulate, key)
        for stream in streams:
            stream.close()


def test_views_do_not_depend_on_each_other(shards: Path):
    """The random numbers of view k depend on (seed, dataset, epoch, sample, k) only."""
    samples, drawn = Samples([str(shards)]), {}

    def draws(sample, rng):
        return {"draw": np.array([rng(k).random() for k in (0, 1, 2, 1)]), "epoch": np.int64(sample["epoch"])}

    stream = Stream(samples, draws, 12, workers=0)
    for _ in range(12):
        batch = next(stream)
        for number, epoch, draw in zip(
            batch["id"].tolist(), batch["epoch"].tolist(), batch["draw"].tolist(), strict=True
        ):
            assert draw[1] == draw[3]
            drawn[number, epoch] = draw
    values = [value for draw in drawn.values() for value in draw[:3]]
    assert len(drawn) == 144 and len(set(values)) == len(values)
    other = Stream(samples, draws, 12, seed=1, workers=0)
    batch = next(other)
    assert not {v for d in batch["draw"].tolist() for v in d} & set(values)


def test_a_stream_resumes_at_its_step(shards: Path):
    samples = Samples([str(shards)])
    stream = Stream(samples, views, 8, workers=1, accumulate=2)
    for _ in range(6):
        next(stream)
    state = stream.state_dict()
    assert state["step"] == 3 and len(json.dumps(state)) < 200
    expected = [next(stream)["id"].tolist() for _ in range(4)]
    stream.close()
    again = Stream(samples, views, 8, workers=0, accumulate=2)
    again.load_state_dict(state)
    assert [next(again)["id"].tolist() for _ in range(4)] == expected
    with pytest.raises(DataError, match=r'written with the order "v1 seed 0 lanes 8 .*", but this run has "v1 seed 1'):
        Stream(samples, views, 8, seed=1).load_state_dict(state)
    with pytest.raises(DataError, match="written on other data"):
        Stream(samples, views, 8).load_state_dict({**state, "data": "00000000"})


def test_phases_and_mixtures_resume_exactly(shards: Path, photos: Path, tmp_path: Path):
    write_tar(tmp_path / "more.tar", [(f"{i:03d}.jpg", jpeg(i)) for i in range(30)])
    sets = [Samples([str(shards)]), Samples([str(tmp_path / "more.tar")])]

    def which(sample, rng):
        return {"from": np.array([sample["dataset"], sample["epoch"]])}

    phases = [Phase(0, 8, (3.0, 1.0), (0.0, 0.0)), Phase(10, 16, (1.0, 1.0), (0.0, 0.25))]
    stream = Stream(sets, which, 8, workers=0, phases=phases)
    batches = [next(stream) for _ in range(30)]
    assert [len(b["id"]) for b in batches[8:12]] == [8, 8, 16, 16]
    drawn = [(d, e, i) for b in batches for (d, e), i in zip(b["from"].tolist(), b["id"].tolist(), strict=True)]
    assert len(set(drawn)) == len(drawn)
    counts = [sum(d == n for d, _, _ in drawn) for n in range(2)]
    assert stream.epochs == pytest.approx([counts[0] / 48, counts[1] / 30])
    resumed = Stream(sets, which, 8, workers=1, phases=phases, rank=1, world=2)
    resumed.load_state_dict({**stream.state_dict(), "step": 9})
    for expected in batches[9:]:
        half = len(expected["id"]) // 2
        got = next(resumed)["id"]
        assert got.tolist() == expected["id"][half:].tolist()
        assert resumed.stand_in()["id"].tolist() == (got.tolist() * 2)[:8]  # of the size of the next micro-batch
    resumed.close()


# ---------------------------------------------------------------- damage
@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_samples_are_logged_and_replaced(damaged: Path, workers: int):
    stream = Stream(Samples([str(damaged)]), views, batch=4, workers=workers)
    assert stream.plan.orders[0].chunk == 1
    for step in range(6):
        planned = (stream.plan.slots(step, 0, 4).global_index % 12).tolist()
        assert next(stream)["id"].tolist() == [{3: 4, 7: 8}.get(i, i) for i in planned]  # the neighbour fills the slot
    assert {key for _, key in stream.damage_log.bad} == {"003", "007"}
    assert sorted(key for _, key, _ in stream.damage_log.new()) == ["003", "007"] and stream.damage_log.new() == []
    stream.close()


def test_a_neighbour_comes_from_the_same_chunk(tmp_path: Path):
    images = [jpeg(i, 16) if i % 5 else b"\xff\xd8junk" for i in range(80)]
    write_tar(tmp_path / "a.tar", [(f"{i:03d}.jpg", image) for i, image in enumerate(images)])
    stream = Stream(
        Samples([str(tmp_path / "a.tar")]), views, 1, workers=0, damage_log=DamageLog(None, share=1, shard_share=1)
    )
    chunk = stream.plan.orders[0].chunk
    assert chunk == 10
    for step in range(200):
        (global_index,) = stream.plan.slots(step, 0, 1).global_index.tolist()
        number = int(next(stream)["id"][0])
        expected = global_index if global_index % 5 else global_index // chunk * chunk + (global_index + 1) % chunk
        assert number == expected % 80


def test_invalid_lines_of_a_damage_log_are_ignored(tmp_path: Path):
    good = {"step": 1, "shard": "a.tar", "key": "1", "reason": "is damaged"}
    odd = [json.dumps(row) for row in (None, [], 1, {}, good | {"key": []}, good | {"shard": None}, good)]
    (tmp_path / "damaged-0.jsonl").write_text("\n".join([*odd, "[" * 100_000, '{"step"']))
    assert DamageLog(tmp_path).bad == {("a.tar", "1"): "is damaged"}


def test_a_set_of_damaged_samples_is_an_error(tmp_path: Path):
    write_tar(tmp_path / "x.tar", [(f"{i}.jpg", b"\xff\xd8junk") for i in range(4)])
    with pytest.raises(DataError, match="64 damaged samples in a row"):
        next(Stream(Samples([str(tmp_path / "x.tar")]), views, batch=2, workers=0))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_quota_does_not_depend_on_the_number_of_processes(world: int, tmp_path: Path):
    images = [jpeg(i, 16) if i % 3 else b"\xff\xd8junk" for i in range(120)]
    write_tar(tmp_path / "a.tar", [(f"{i:03d}.jpg", image) for i, image in enumerate(images)])
    streams = [
        Stream(
            Samples([str(tmp_path / "a.tar")]),
            views,
            6,
            workers=0,
            rank=r,
            world=world,
            damage_log=DamageLog(tmp_path / "bad", r),
        )
        for r in range(world)
    ]
    with pytest.raises(
        DataError,
        match=rf"{MIN_ALLOWED_DAMAGED + 1} damaged samples, .* allows {MIN_ALLOWED_DAMAGED}; .*the last: \d+ in .*a.tar",
    ):
        for _ in range(40):
            for stream in streams:
                next(stream)
    lines = [line for path in (tmp_path / "bad").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len({json.loads(line)["key"] for line in lines}) == MIN_ALLOWED_DAMAGED + 1
    with pytest.raises(DataError, match="damaged samples"):  # the next start reads the log
        stream = Stream(Samples([str(tmp_path / "a.tar")]), views, 6, workers=0, damage_log=DamageLog(tmp_path / "bad"))
        for _ in range(40):
            next(stream)


def test_the_quota_of_a_shard_is_reached_before_that_of_the_data(tmp_path: Path):
    for name in "ab":
        bad = name == "b"
        write_tar(
            tmp_path / f"{name}.tar",
            [(f"{name}{i:03d}.jpg", b"\xff\xd8junk" if bad and i % 2 else jpeg(i, 16)) for i in range(60)],
        )
    index.write(tmp_path)
    stream = Stream(Samples([str(tmp_path)]), views, 6, workers=0, damage_log=DamageLog(None, share=1.0))
    with pytest.raises(DataError, match=r"b.tar: 11 damaged samples, but data.bad_shard_share = 0.01 allows 10"):
        for _ in range(60):
            next(stream)


def test_batch_larger_than_the_data(shards: Path):
    with pytest.raises(DataError, match=r"data.batch = 64 is more than the 48 samples .*; write data.batch=48 or less"):
        Stream(Samples([str(shards)]), views, 64)
    with pytest.raises(DataError, match="does not divide into 2 processes × 3 micro-batches"):
        Stream(Samples([str(shards)]), views, 16, world=2, accumulate=3)


# ---------------------------------------------------------------- large images
def test_threads_do_not_exceed_the_decode_budget(tmp_path: Path):
    """Images of 3 megapixels, which need 18 MB each; budgets for none of them, for two, and for all."""
    flat = np.zeros((1500, 2000, 3), np.uint8)
    images = [simplejpeg.encode_jpeg(flat + np.uint8(20 * n), 90) for n in range(8)]
    write_tar(tmp_path / "a.tar", [(f"{n}.jpg", image) for n, image in enumerate(images)])
    batches, peaks = [], []
    for megabytes in (0.001, 40, 1000):
        reading = Reading(workers=0, threads=4, decode_mb=megabytes)
        stream = Stream(Samples([str(tmp_path / "a.tar")]), augmented, 8, reading=reading)
        batches.append(next(stream))
        assert stream.batches.budget.used == 0
        peaks.append(stream.batches.budget.peak)
    assert peaks[0] == 18_000_000 and peaks[1] <= 36_000_000
    for other in batches[1:]:
        assert all(torch.equal(value, other[key]) for key, value in batches[0].items())


def test_only_the_first_demand_of_a_lease_waits():
    budget, order = Budget(100), list[str]()
    waiting = threading.Event()

    def second() -> None:
        with budget.lease() as take:
            waiting.set()
            take(50)
            order.append("second")
            take(40)  # the image is decoded again, into the same bytes
            assert budget.used == 50

    with budget.lease() as take:
        take(60)
        thread = threading.Thread(target=second)
        thread.start()
        waiting.wait()
        take(500)  # waiting here could be a deadlock
        order.append("first")
        assert budget.used == 500
    thread.join()
    assert order == ["first", "second"] and (budget.used, budget.peak) == (0, 500)
    with pytest.raises(ValueError, match="of the views"), budget.lease() as take:
        take(101)  # more than the budget, for the only lease
        raise ValueError("of the views")
    assert budget.used == 0


def test_the_recipe_limits_the_size_of_images(shards: Path, tmp_path: Path):
    limits = ["data.max_pixels=1000", "data.decode_mb=7", "data.threads=2"]
    cfg = tiny_recipe("simclr", shards, tmp_path / "run", *limits)
    samples = open_samples(cfg)
    stream = build_stream(cfg, build_objective(cfg), samples)
    assert stream.batches.budget.total == 7 * 2**20
    with pytest.raises(DataError, match=r"pixels, but 1 to 1000 are allowed; data\.max_pixels, and"):
        next(stream)
    with pytest.raises(Damaged, match="are allowed"):
        samples[0].image(0)
    assert not any("images:" in line for line in summarize(samples[0]))  # none of them can be read


# ---------------------------------------------------------------- batches
def test_members_that_are_not_images(tmp_path: Path):
    write_tar(
        tmp_path / "a.tar", [m for i in range(8) for m in ((f"{i}.jpg", jpeg(i)), (f"{i}.txt", b"word " * (i + 1)))]
    )

    def words(sample, rng):
        return {"words": np.int64(len(sample["txt"].split())), "side": np.int64(sample["image"].shape[0])}

    stream = Stream(Samples([str(tmp_path / "a.tar")]), words, 4, workers=0, parts={"image": Image(), "txt": Caption()})
    batch = next(stream)
    assert batch["words"].tolist() == [i + 1 for i in batch["id"].tolist()] and set(batch["side"].tolist()) == {64}


def test_images_of_any_number_of_channels(tmp_path: Path):
    import io

    rng, members = np.random.default_rng(0), []
    for i in range(8):
        out = io.BytesIO()
        np.save(out, rng.integers(0, 256, (40, 40, 5), dtype=np.uint8))
        members.append((f"{i}.npy", out.getvalue()))
    write_tar(tmp_path / "a.tar", members)
    stream = Stream(Samples([str(tmp_path / "a.tar")]), augmented, 4, workers=0, parts={"image": Image(channels=5)})
    assert next(stream)["image"].shape == (4, 2, 5, 32, 32)
    stream = Stream(Samples([str(tmp_path / "a.tar")]), augmented, 4, workers=0)
    says = r"\d in .*a.tar, like its neighbours, holds 5 channels, but 3 are requested; write model.in_channels=5, and 5 values"
    with pytest.raises(DataError, match=says):
        next(stream)
    assert not stream.damage_log.bad  # the recipe is wrong, and not the samples


def test_a_single_image_with_other_channels_is_damaged(tmp_path: Path):
    import io

    members = []
    for i in range(8):
        out = io.BytesIO()
        np.save(out, np.zeros((40, 40, 4 if i == 3 else 5), np.uint8))
        members.append((f"{i}.npy", out.getvalue()))
    write_tar(tmp_path / "a.tar", members)
    stream = Stream(Samples([str(tmp_path / "a.tar")]), augmented, 8, workers=0, parts={"image": Image(channels=5)})
    next(stream)
    assert [key for _, key in stream.damage_log.bad] == ["3"]


def test_colours_on_the_device_equal_fused_colours(shards: Path):
    out = {}
    for color in ("fused", "device"):
        stream = Stream(Samples([str(shards)]), augmented, 8, workers=0, parts={"image": Image(color=color)})
        batch = next(stream)
        assert ("image.color" in batch) == (color == "device")
        out[color] = (
            to_device(batch, torch.device("cpu"), {"image": Image(mean=[0.0] * 3, std=[1.0] * 3)})["image"] * 255
        )
    assert (out["fused"] - out["device"]).abs().max() <= 2.01


def test_uint8_is_normalised_on_the_device():
    batch = to_device(
        {"image": torch.tensor([[[[0]], [[255]], [[51]]]], dtype=torch.uint8), "keep": torch.tensor([1])},
        torch.device("cpu"),
        {"image": Image(mean=[0.5, 0.5, 0], std=[0.5, 0.25, 1])},
    )
    assert batch["image"].flatten().tolist() == pytest.approx([-1.0, 2.0, 0.2]) and batch["keep"].dtype == torch.int64


def test_buffers_are_reused_only_after_their_batch_is_freed(shards: Path):
    """Of some batches all tensors are kept, of some only a view, and the others are freed: what is kept never
    changes."""
    samples = Samples([str(shards)])
    expected = Stream(samples, augmented, 8, workers=0)
    stream, kept = Stream(samples, augmented, 8, workers=2), []
    for n in range(60):
        batch, there = next(stream), next(expected)
        assert batch["image"].is_shared() and torch.equal(batch["image"], there["image"])
        if n % 7 == 0:
            kept.append((batch["image"], there["image"]))
        if n % 11 == 0:
            kept.append((batch["image"][3, 1], there["image"][3, 1]))
        del batch
    assert all(torch.equal(ours, theirs) for ours, theirs in kept)
    assert int(stream.batches.buffers._busy.sum()) < 32  # some are free
    stream.close()


def test_statistics_name_the_bottleneck():
    for counts, wait, expected in [
        ({"read_us": 10, "views_us": 10}, 0.0, "the model is the bottleneck: 0% of the time"),
        ({"read_us": 900, "views_us": 100}, 10.0, "the store is the bottleneck: .*on reading"),
        (
            {"read_us": 100, "views_us": 900},
            10.0,
            "decoding and views are the bottleneck: .*more than 3 data.workers may help",
        ),
    ]:
        stats = StreamStats()
        stats.add(wait, counts | {"bytes": 2_000_000, "held": 5_000_000, "queue": 3})
        stats.add(wait / 10, {"requests": 4, "held": 7_000_000, "queue": 1})
        figures, line = stats.take(3)
        assert np.char.startswith(line, expected.split(": .*")[0]) and expected.split(": .*")[-1].split(":")[0] in line
        assert (figures["mb"], figures["requests"], figures["held_mb"], figures["queue"]) == (2.0, 4, 7.0, 1)
        assert figures["wait_ms_p99"] >= figures["wait_ms_p50"]
        assert stats.take(3)[0]["requests"] == 0


@pytest.mark.slow
def test_memory_and_open_files_are_bounded(tmp_path: Path):
    import psutil

    for shard in range(300):
        write_tar(tmp_path / f"{shard:03d}.tar", [(f"{shard}-{i}.txt", bytes(1000)) for i in range(20)])
    index.write(tmp_path)

    def size(sample, rng):
        return {"size": np.int64(len(sample["txt"]))}

    stream = Stream(Samples([str(tmp_path)]), size, 32, workers=0, parts={"txt": Caption()})
    me = psutil.Process()
    for _ in range(100):
        next(stream)
    before, files = me.memory_info().rss, me.num_fds()
    for _ in range(600):
        next(stream)
    assert me.num_fds() <= files + 5 and files < 300
    assert me.memory_info().rss - before < 20e6
