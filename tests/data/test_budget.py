"""Batches by budget: recordings of similar lengths, a limited number of seconds, each recording once in an epoch."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import ConfigError, DataError
from data_pipeline.formats.waveforms import decode, seconds_of
from data_pipeline.order.budget import BatchBudget, BudgetPlan
from data_pipeline.parts.audio import Audio, cut, cut_length
from data_pipeline.parts.part import About
from data_pipeline.shards import durations, index
from data_pipeline.shards.samples import Samples
from data_pipeline.stream.damage_log import DamageLog
from data_pipeline.stream.stream import Reading, Stream
from pretrain.build import build_objective, build_stream, open_samples
from pretrain.recipes.recipe import load
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.train import train
from tests.conftest import tiny_recipe
from tests.data.building import quiet
from tests.data.sounds import encoded, tone, wav
from tests.tars import write_tar

RATE = 1000  # of the recordings of these tests
ABOUT = About(sample_rate=RATE, samples=2 * RATE)
BUDGET = BatchBudget(12.0, 2.0, 6)


def lengths(count: int = 500, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(4, 2, count).clip(0.1, 30)


# ---------------------------------------------------------------- the plan
@pytest.mark.parametrize(
    ("size", "buckets", "shuffle"), [(64, 16, True), (64, 3, True), (300, 16, True), (40, 1, False)]
)
def test_every_sample_is_used_once_in_an_epoch_and_no_batch_exceeds_the_budget(
    size: float, buckets: int, shuffle: bool
):
    values = lengths()
    plan = BudgetPlan(values, BatchBudget(size, 30.0, buckets), seed=1, shuffle=shuffle)
    assert len(plan.buckets) <= buckets
    epochs = []
    for epoch in range(3):
        batches = []
        for step in range(epoch * plan.steps, (epoch + 1) * plan.steps):
            slots = plan.slots(step, 0, plan.batch(step))
            numbers, padded = slots.global_index - epoch * len(values), plan.facts(step)["seconds"]
            assert values[numbers].max() <= padded + 1e-6 and len(numbers) * padded <= size + 1e-6
            batches.append(numbers.tolist())
        assert sorted(itertools.chain(*batches)) == list(range(len(values)))
        assert {tuple(plan.epochs(epoch * plan.steps))} == {(epoch,)}
        epochs.append(batches)
    assert (epochs[0] == epochs[1]) != shuffle
    padding = 1 - values.sum() / sum(plan.batch(s) * plan.facts(s)["seconds"] for s in range(plan.steps))
    assert padding < {16: 0.13, 3: 0.35, 1: 0.7}[buckets]
    sizes = [plan.batch(step) for step in range(plan.steps)]
    assert np.mean([plan.work(step) for step in range(plan.steps)]) > (0.75 if buckets == 16 else 0.5), sizes


def test_the_parts_of_a_batch_are_the_batch_for_any_number_of_ranks():
    plan = BudgetPlan(lengths(), BatchBudget(100.0, 30.0))
    for world, accumulate, step in [(1, 1, 0), (2, 1, 5), (3, 1, 7), (2, 2, 11)]:
        whole = plan.slots(step, 0, plan.batch(step)).global_index.tolist()
        parts, of_ranks = [], []
        for rank in range(world):
            indices = step * accumulate + np.arange(accumulate)
            found = plan.micro_batches(indices, accumulate, rank, world)
            parts += [[n for _, n in found[int(i)]] for i in indices]
            steps, slots = plan.slots_of_steps(step, 2, rank, world)
            of_ranks += slots.global_index[steps == step].tolist()
        assert [*itertools.chain(*parts)] == whole == of_ranks
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_prefetch_server_knows_the_next_use_of_a_sample():
    plan = BudgetPlan(lengths(60), BatchBudget(60.0, 30.0))
    for step in range(plan.steps, 2 * plan.steps):
        for number in plan.slots(step, 0, plan.batch(step)).global_index - 60:
            assert plan.orders[0].next_use(int(number), 1) == step


def test_a_budget_that_is_too_small_is_refused():
    with pytest.raises(
        DataError, match=r"the longest recording has 29\.\d+ s, .*; write 29\.\d+ or more, or a smaller"
    ):
        BudgetPlan(np.append(lengths(50).clip(0, 20), 29.5), BatchBudget(25.0, 30.0))
    plan = BudgetPlan(lengths(), BatchBudget(200.0, 10.0))  # longer recordings are cut
    assert "are longer than data.seconds = 10" in plan.lines()[1]
    plan.check(4, 2)
    with pytest.raises(DataError, match=r"up to [\d.]+ s has \d+ samples, fewer than 6 processes × 4 micro-batches"):
        plan.check(6, 4)


# ---------------------------------------------------------------- lengths
def test_the_lengths_of_recordings_are_known_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    members = [("a.wav", wav(tone(seconds=1.25))), ("b.txt", b"no recording")]
    members[2:] = [(f"{e}.{e}", encoded(e, seconds=1.5)) for e in ("flac", "mp3", "opus")]
    members.append(("x.wav", b"no recording"))
    expected = [1.25, 0, 1.5, 1.5, 1.5, 0]
    (tmp_path / "s").mkdir()
    (tmp_path / "t").mkdir()
    write_tar(tmp_path / "s" / "a.tar", members)
    found = durations.durations_of(Samples([str(tmp_path / "s")], say=quiet))  # measured, and kept in the cache
    assert np.all(found >= np.array(expected, np.float32)) and np.allclose(found, expected, atol=0.12)
    assert seconds_of(encoded("mp3", seconds=3)) - len(decode(encoded("mp3", seconds=3), 16000)) / 16000 < 0.12
    manifest = index.write(tmp_path / "s", say=quiet)
    durations.write(Samples([str(tmp_path / "s")], say=quiet), quiet)  # stored beside the index
    file = tmp_path / "s" / durations.file_name(manifest)
    assert file.stat().st_size == 4 * len(members)
    monkeypatch.setattr(durations, "_measure", lambda samples: pytest.fail("measured again"))
    for specs in ([str(tmp_path / "s")], [str(tmp_path / "s" / "a.tar")]):
        assert np.array_equal(durations.durations_of(Samples(specs, say=quiet)), found)
    file.unlink()
    write_tar(tmp_path / "t" / "a.tar", members)  # the same shards elsewhere
    assert np.array_equal(durations.durations_of(Samples([str(tmp_path / "t")], say=quiet)), found)
    file.write_bytes(b"\0" * 7)
    with pytest.raises(DataError, match=r"seconds-.*bin: is damaged; run `unlabeled shards index"):
        durations.durations_of(Samples([str(tmp_path / "s")], say=quiet))


# ---------------------------------------------------------------- the stream
@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of 0.1 to 1.9 s whose samples are the numbers from 1 on, so that each of them can be counted."""
    rng, first, members = np.random.default_rng(0), -32767, []
    for n in range(60):
        count = int(rng.uniform(0.1, 1.9) * RATE)
        members.append((f"{n:02d}.wav", wav(np.arange(first, first + count).astype(np.int16), RATE)))
        first += count
    assert first < 32767
    folder = tmp_path_factory.mktemp("counted")
    write_tar(folder / "a.tar", members)
    index.write(folder, say=quiet)
    return folder


def view(sample: dict[str, Any], rng: Any) -> dict[str, np.ndarray]:
    audio, length = cut(sample["audio"], cut_length(sample, ABOUT), rng(0))
    return {"audio": audio, "length": np.array(length)}


def stream_of(folder: Path, workers: int = 0, **options: Any) -> Stream:
    reading = options.pop("reading", None) or Reading(workers=workers)
    parts = {"audio": Audio(RATE, seconds=2.0)}
    return Stream(Samples([str(folder)], say=quiet), view, 0, budget=BUDGET, parts=parts, reading=reading, **options)


def test_every_second_of_audio_is_used_once_in_an_epoch(counted: Path):
    whole = np.concatenate([decode(each["wav"], RATE) for each in map(Samples([str(counted)]).read, range(60))])
    stream = stream_of(counted)
    for _ in range(2):
        heard = []
        for _ in range(stream.plan.steps):
            batch = next(stream)
            assert batch["audio"].numel() <= BUDGET.size * RATE
            heard += [row[:n].numpy() for row, n in zip(batch["audio"], batch["length"].tolist(), strict=True)]
        assert np.array_equal(np.sort(np.concatenate(heard)), whole)
    assert stream.epochs == [2.0]


def rows_of(streams: list[Stream]) -> list[Tensor]:
    """The rows of the batch of a step from the streams of all ranks."""
    batches = [next(stream) for stream in streams for _ in range(stream.accumulate)]
    return [row for batch in batches for row in batch["audio"]]


@pytest.mark.slow
def test_batches_are_the_same_for_any_number_of_ranks_and_workers_and_after_a_resume(counted: Path, tmp_path: Path):
    whole = stream_of(counted)
    expected = [rows_of([whole]) for _ in range(whole.plan.steps + 3)]
    cached = Reading(workers=1, cache=str(tmp_path / "cache"))  # reads by way of the prefetch server
    for world, accumulate, reading in [(2, 1, None), (2, 2, None), (1, 3, Reading(2, 2)), (1, 1, cached)]:
        streams = [
            stream_of(counted, rank=r, world=world, accumulate=accumulate, reading=reading) for r in range(world)
        ]
        for rows in expected[: 6 if reading is None else None]:
            assert all(map(torch.equal, rows_of(streams), rows))
        for stream in streams:
            stream.close()
    state = whole.state_dict()
    again = stream_of(counted)
    again.load_state_dict(state)
    assert all(map(torch.equal, rows_of([again]), rows_of([whole])))
    other = Stream(again.samples, view, 0, budget=BatchBudget(13.0, 2.0, 6), parts=again.batches.parts, workers=0)
    with pytest.raises(DataError, match="written with the order"):
        other.load_state_dict(state)


def test_a_damaged_recording_is_replaced_by_one_of_its_group(tmp_path: Path):
    members = [(f"{n:02d}.wav", wav(np.full(100 * (n + 1), n + 1, np.int16), RATE)) for n in range(20)]
    members[18] = ("18.wav", wav(np.full(1900, 19, np.int16), RATE)[:-9])
    write_tar(tmp_path / "a.tar", members)
    log = DamageLog(None)
    stream = stream_of(tmp_path, damage_log=log)
    for step in range(stream.plan.steps):
        batch = next(stream)
        assert batch["audio"].shape[1] == round(stream.plan.facts(step)["seconds"] * RATE)
    assert [key for _, key in log.bad] == ["18"]


# ---------------------------------------------------------------- training
def recipe(shards: Path, run: Path, *overrides: str) -> Any:
    budget = [
        "data.batch={seconds: 8, buckets: 4}",
        "data.seconds=1.6",
        "precision=fp32",
        "optim.lr.kind=constant",
        "optim.lr.warmup=0",
    ]
    return tiny_recipe("bestrq", shards, run, *budget, "device=cpu", *overrides)


@pytest.mark.slow
def test_a_run_with_a_budget_is_the_same_with_micro_batches_and_after_a_resume(shards: Path, tmp_path: Path):
    whole = read_rows(train(recipe(shards, tmp_path / "a")) / "metrics.jsonl")
    text = (tmp_path / "a" / "log.txt").read_text()
    assert "8 steps of 8 s recordings, fp32." in (tmp_path / "a" / "export" / "8" / "README.md").read_text()
    assert "samples, batch 8 s, fp32" in text and "batches of 8 s: " in text and "% is padding" in text
    parts = read_rows(train(recipe(shards, tmp_path / "b", "parallel.micro_batch={seconds: 3}")) / "metrics.jsonl")
    train(recipe(shards, tmp_path / "c", "steps=4"))
    resumed = read_rows(train(recipe(shards, tmp_path / "c")) / "metrics.jsonl")
    for key in ("loss", "grad_norm"):
        one, two, three = ([row[key] for row in rows] for rows in (whole, parts, resumed))
        assert one[0] == pytest.approx(two[0], rel=1e-5) and one == pytest.approx(two, rel=3e-3)
        assert one == three and len(one) == 8
    counts = [row["samples"] for row in whole]
    assert len({*counts}) > 1 and sum(counts) > 40


def test_what_does_not_go_with_a_budget_is_refused(shards: Path, tmp_path: Path):
    for override, says in (
        ("data.batch={seconds: 0}", "seconds = 0: write a number above 0"),
        ("data.batch={minutes: 1}", r"data\.batch\.minutes = 1: no such key"),
        (
            "data.batch={tokens: 4096}",
            r"data\.batch\.tokens = 4096: no such key; all rows .* write data\.batch=N/data\.",
        ),
        ("data.phases=[{step: 2, batch: 4}]", "data.phases changes the batch .* remove data.phases"),
        ("data.mix=[{shards: a}]", r"data\.mix has several datasets, .* name all their shards in data\.train"),
        ("parallel.micro_batch=4", r"parallel\.micro_batch is a number of samples, .* write parallel.micro_batch={sec"),
    ):
        with pytest.raises(ConfigError, match=says):
            recipe(shards, tmp_path / "run", override)
    with pytest.raises(ConfigError, match=r"micro_batch is a budget of seconds, .* write a number of samples"):
        load("demo", ["parallel.micro_batch.seconds=3"])
    cfg = recipe(shards, tmp_path / "run", "data.batch.seconds=1")
    with pytest.raises(DataError, match=r"the longest recording has 1\.\d+ s, so that no batch can hold it"):
        build_stream(cfg, build_objective(cfg), open_samples(cfg))
    with pytest.raises(ConfigError, match=r"audio_mae takes samples of one length; write a number of samples"):
        build_objective(tiny_recipe("audio_mae", shards, tmp_path / "run", "data.batch={seconds: 8}", "data.seconds=1"))
    assert load("demo", ["data.batch={seconds: 8}", "data.batch=4"]).data.batch == 4
    assert json.loads(json.dumps(load("demo", ["data.batch.seconds=8"]).data.batch_size)) == 1
