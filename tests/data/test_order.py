"""The order of samples: each sample once per epoch, the same global batches for any number of processes, a pure
function of the step, fixed by golden vectors."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from data_pipeline.order.permutation import MAX_CHUNK_BYTES, MAX_SHUFFLE_BYTES, VERSION, Order, hash_to_key, permute
from data_pipeline.order.schedule import PERIOD, Phase, Plan, even_sequence


def ids(plan: Plan, step: int, first: int = 0, last: int | None = None) -> list[tuple[int, int]]:
    """(dataset, global index) of the slots of a step."""
    slots = plan.slots(step, first, plan.batch(step) if last is None else last)
    return list(zip(slots.dataset.tolist(), slots.global_index.tolist(), strict=True))


# ---------------------------------------------------------------- permutations
@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(count: int, key: int):
    image = permute(np.arange(count), count, key)
    assert np.array_equal(np.sort(image), np.arange(count))
    assert np.array_equal(permute(np.arange(count)[::-1], count, key), image[::-1])  # each element is computed alone
    assert np.array_equal(permute(image, count, key, inverse=True), np.arange(count))


@given(st.lists(st.tuples(st.integers(1, 900), st.integers(0, 2**64 - 1)), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_permutations_with_different_keys_in_one_call(cases: list[tuple[int, int]]):
    index = np.concatenate([np.arange(count) for count, _ in cases])
    counts, keys = (np.concatenate([np.full(c, [c, k][n], np.uint64) for c, k in cases]) for n in range(2))
    expected = np.concatenate([permute(np.arange(count), count, key) for count, key in cases])
    assert np.array_equal(permute(index, counts, keys), expected)


def test_permute_mixes():
    image = permute(np.arange(10_000), 10_000, 7)
    assert abs(np.corrcoef(np.arange(10_000), image)[0, 1]) < 0.03
    assert (image == permute(np.arange(10_000), 10_000, 8)).mean() < 0.01
    assert hash_to_key(1, 2) != hash_to_key(2, 1)


# ---------------------------------------------------------------- one dataset
@pytest.mark.slow
@given(
    count=st.integers(20, 700),
    lanes=st.integers(1, 16),
    per_lane=st.integers(1, 5),
    seed=st.integers(0, 99),
    shuffle=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_each_sample_occurs_once_per_epoch(count: int, lanes: int, per_lane: int, seed: int, shuffle: bool):
    """No (sample, epoch) pair occurs twice or is missing, and at no step do the counts of two samples differ by more
    than 2."""
    batch = min(count, lanes * per_lane)
    plan = Plan([count], [Phase(0, batch)], seed, shuffle)
    order, seen, drawn = plan.orders[0], np.zeros(count, int), set()
    held = plan.lanes * order.chunk * order.block
    steps = -(-3 * count // batch) + -(-held // batch)
    for step in range(steps):
        global_index = [v for _, v in ids(plan, step)]
        drawn.update(global_index)
        np.add.at(seen, np.array(global_index) % count, 1)
        assert seen.max() - seen.min() <= 2
    assert len(drawn) == steps * batch
    assert {v for v in drawn if v < count} == set(range(count))


@given(count=st.integers(1, 10**7), lanes=st.integers(1, 64), size=st.floats(0, 1e9))
@settings(max_examples=60, deadline=None)
def test_samples_in_memory_for_shuffling_are_bounded(count: int, lanes: int, size: float):
    order = Order.of(count, lanes, sample_bytes=size)
    held = lanes * order.block * order.chunk
    assert held <= max(lanes, count / 2)
    assert held <= lanes or held * size <= MAX_SHUFFLE_BYTES
    assert order.chunk == 1 or order.chunk * size <= MAX_CHUNK_BYTES
    assert (order.chunk, order.block) == (16, 32) or count < 2 * lanes * 512 or size > 10_000


def test_large_batches_have_enough_lanes_and_a_large_enough_window():
    for batch in (4096, 65_536):
        plan = Plan([1_700_000_000], [Phase(0, batch)], sample_bytes=[75_000.0])
        assert plan.lanes == batch // 64 and plan.lanes * plan.orders[0].chunk * plan.orders[0].block == 8 * batch


@given(count=st.integers(600, 3000), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_chunk_is_used_by_one_lane_until_the_end_of_its_block(count: int, seed: int):
    order = Order.of(count, 4, seed)
    lane, place = (x.ravel() for x in np.indices((4, 400)))
    chunk = order.global_index(lane, place) // order.chunk
    ends = order.block_ends(lane, place)
    for one in np.unique(chunk):
        here = chunk == one
        assert len(set(lane[here])) == 1 and len(set(ends[here])) == 1 and place[here].max() < ends[here][0]
    assert (
        len(set(order.block_ends(np.arange(4), np.zeros(4, int)).tolist())) > 1
    )  # blocks of different lanes end at different places


@pytest.mark.parametrize(("world", "most"), [(1, 1.0), (8, 1.0), (64, 1.0), (96, 2.0), (128, 2.0), (256, 4.0)])
def test_each_byte_is_read_by_one_process_if_there_are_enough_lanes(world: int, most: float):
    plan = Plan([10**7], [Phase(0, 768 if world == 96 else 4096)], seed=2)
    chunk, read = plan.orders[0].chunk, 0
    steps = plan.orders[0].block * chunk // (plan.batch(0) // plan.lanes)
    for rank in range(world):
        _, slots = plan.slots_of_steps(1000 * steps, 2 * steps, rank, world)
        read += len(np.unique(slots.global_index // chunk))
    _, whole = plan.slots_of_steps(1000 * steps, 2 * steps, 0, 1)
    assert read / len(np.unique(whole.global_index // chunk)) <= most + 0.01
    held = plan.lanes * plan.orders[0].block * chunk
    assert len(np.unique(whole.global_index // chunk)) * chunk <= 2 * steps * plan.batch(0) + held  # requests and bytes


def test_shuffled_is_inverted():
    order = Order.of(1003, 4, seed=3)
    numbers = np.arange(3 * 1003 // order.chunk)
    assert np.array_equal(order.shuffled(order.shuffled(numbers), inverse=True), numbers)


@pytest.mark.slow
@given(st.integers(0, 500), st.sampled_from([1, 2, 3, 4, 6, 12]))
@settings(max_examples=40, deadline=None)
def test_slots_do_not_depend_on_how_the_batch_is_divided(step: int, parts: int):
    plan = Plan([1000, 77], [Phase(0, 24, (3.0, 1.0), (0.0, 0.1)), Phase(9, 48, (1.0, 1.0), (0.0, 0.0))], seed=5)
    size = plan.batch(step) // parts
    split = [pair for i in range(parts) for pair in ids(plan, step, i * size, (i + 1) * size)]
    assert split == ids(plan, step)


@pytest.mark.slow
@given(st.integers(0, 60), st.integers(1, 40), st.sampled_from([1, 2, 4]), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_slots_of_steps_and_micro_batches_equal_slots(step: int, steps: int, world: int, rank: int):
    rank %= world
    plan = Plan([1000, 77], [Phase(0, 24, (3.0, 1.0), (0.0, 0.1)), Phase(31, 48, (1.0, 1.0), (0.0, 0.0))], seed=5)
    at, slots = plan.slots_of_steps(step, steps, rank, world)
    ahead = list(zip(at.tolist(), slots.dataset.tolist(), slots.global_index.tolist(), strict=True))
    one_by_one = []
    for s in range(step, int(at[-1]) + 1):
        size = plan.batch(s) // world
        one_by_one += [(s, *pair) for pair in ids(plan, s, rank * size, (rank + 1) * size)]
    assert ahead == one_by_one and at[-1] < step + steps


def test_batches_of_class_sorted_data_are_mixed():
    """1.28 million samples sorted by 1,000 classes, batches of 4,096, 33 thousand samples in memory: the counts of
    classes in a batch are distributed almost as in a random draw."""
    plan = Plan([1_280_000], [Phase(0, 4096)], seed=1)
    assert plan.lanes * plan.orders[0].chunk * plan.orders[0].block == 32_768
    ratios = []
    for step in range(100, 140):
        counts = np.bincount(np.array([v for _, v in ids(plan, step)]) % 1_280_000 // 1280, minlength=1000)
        ratios.append(((counts - 4.096) ** 2 / 4.096).sum() / 999)
    assert np.mean(ratios) <= 3


def test_without_shuffling_samples_are_in_the_order_of_the_shards():
    plan = Plan([10], [Phase(0, 4)], shuffle=False)
    assert [v % 10 for _, v in ids(plan, 2)] == [8, 9, 0, 1]


@pytest.mark.parametrize("batch", [1, 7, 64, 100, 4096])
def test_lanes_divide_the_batch(batch: int):
    assert batch % Plan([10_000], [Phase(0, batch)]).lanes == 0


GOLDEN = {  # of version 1. If these change, increase VERSION: runs with the old order are refused then
    (100003, 64, 7, 0): [3566, 84878, 42990, 96176, 25889, 64389, 46844, 19363],
    (100003, 64, 7, 12345): [775926, 776298, 801452, 749634, 809797, 881922, 849321, 757327],
    (1700000000, 4096, 0, 1000000): [
        3636186218,
        4876349740,
        4021662844,
        5099150752,
        3419615392,
        3953012199,
        4786322222,
        4542182660,
    ],
    (48, 16, 3, 5): [56, 54, 53, 74, 90, 89, 87, 88],
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_vectors(case: tuple[int, int, int, int]):
    count, batch, seed, step = case
    assert VERSION == 1
    assert [v for _, v in ids(Plan([count], [Phase(0, batch)], seed), step, 0, 8)] == GOLDEN[case]


def test_golden_vectors_of_a_mixture():
    phases = [Phase(0, 16, (0.7, 0.3), (0.0, 0.1)), Phase(100, 32, (0.5, 0.5), (0.0, 0.0))]
    plan = Plan([1000, 333], phases, seed=11)
    assert [ids(plan, step, 0, 3) for step in (0, 9, 99, 100, 5000)] == [
        [(0, 987), (1, 64), (0, 713)],
        [(1, 13), (0, 724), (0, 123)],
        [(0, 1574), (1, 738), (0, 876)],
        [(0, 343), (0, 1270), (1, 953)],
        [(1, 77199), (1, 77054), (0, 77326)],
    ]


# ---------------------------------------------------------------- several datasets
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=9))
@settings(max_examples=25, deadline=None)
def test_mixing_is_even_in_every_window(weights: list[int]):
    shares = np.array(weights) / sum(weights)
    chosen = even_sequence(shares)[:, None] == np.arange(len(shares))
    deviation = np.pad(chosen.cumsum(0), ((1, 0), (0, 0))) - np.arange(PERIOD + 1)[:, None] * chosen.mean(0)
    assert (deviation.max(0) - deviation.min(0)).max() <= max(1, len(shares))  # the worst window of each dataset
    assert np.abs(chosen.mean(0) - shares).max() <= 1 / PERIOD


@given(
    counts=st.lists(st.integers(5, 400), min_size=2, max_size=4),
    lanes=st.integers(1, 40),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(lambda sizes: [1, *sizes]),
    data=st.data(),
)
@pytest.mark.slow
@settings(max_examples=40, deadline=None)
def test_mixtures_and_phases_skip_and_repeat_no_sample(counts: list[int], lanes: int, sizes: list[int], data):
    weight = st.integers(0, 5)
    phases, step = [], 0
    for size in sizes:
        weights = tuple(float(w) for w in data.draw(st.lists(weight, min_size=len(counts), max_size=len(counts))))
        alone = tuple(data.draw(st.sampled_from([0.0, 0.1])) for _ in counts)
        phases.append(Phase(step, lanes * size, weights if any(weights) else (1.0,) * len(counts), alone))
        step += data.draw(st.integers(1, 25))
    plan = Plan(counts, phases, seed=data.draw(st.integers(0, 9)))
    drawn, places = Counter(), {}
    for s in range(step + 30):
        slots = plan.slots(s, 0, plan.batch(s))
        drawn.update(zip(slots.dataset.tolist(), slots.global_index.tolist(), strict=True))
        for d, lane, place in zip(*(column.tolist() for column in slots[:3]), strict=True):
            places.setdefault((d, lane), []).append(place)
    assert max(drawn.values()) == 1  # no (dataset, sample, epoch) twice
    for taken in places.values():  # places without a gap, for any phases
        assert sorted(taken) == list(range(len(taken)))
    totals = Counter(d for d, _ in drawn)
    assert [totals[d] / n for d, n in enumerate(counts)] == pytest.approx(plan.epochs(step + 30))


@pytest.mark.slow
def test_shares_follow_the_weights_and_homogeneous_steps_have_one_dataset():
    plan = Plan([5000, 700], [Phase(0, 20, (0.75, 0.25), (0.0, 0.1))], seed=1)
    mixed, alone = Counter(), 0
    for step in range(1000):
        here = Counter(d for d, _ in ids(plan, step))
        if here[1] == 20:
            alone += 1
        else:
            mixed += here
            assert abs(here[1] - 5) <= 2
    assert abs(alone - 100) <= 1
    assert mixed[1] / mixed.total() == pytest.approx(0.25, abs=2e-3)


def test_invalid_phases_are_refused():
    for phases, message in [
        ([Phase(0, 64), Phase(10, 100)], r"data.phases, step 10: batch = 100 is not a multiple of 64, .*; write 128"),
        ([Phase(0, 64), Phase(10, 64), Phase(5, 64)], "begin at steps .10, 5.; write steps in increasing order"),
        ([Phase(3, 64)], "begins at step 3"),
        ([Phase(0, 64, (1.0, 2.0))], "2 weights and 1 homogeneous shares for a mix of 1 datasets"),
        ([Phase(0, 64, (0.0,))], "all weights are 0"),
        ([Phase(0, 64, (-1.0,))], "weight = -1"),
        ([Phase(0, 64, (1.0,), (1.5,))], "sum to more than 1"),
    ]:
        with pytest.raises(DataError, match=message):
            Plan([1000], phases)
    with pytest.raises(DataError, match="weight = 1e-09; write 0, or a number from 1/10007 of the sum"):
        Plan([10, 10], [Phase(0, 4, (1.0, 1e-9), (0.0, 0.0))])
