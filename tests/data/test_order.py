"""The order of samples: every sample once an epoch, the same global batches for every split, a pure function of the step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import Order, fold, permute


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(count: int, key: int):
    image = permute(np.arange(count), count, key)
    assert np.array_equal(np.sort(image), np.arange(count))
    assert np.array_equal(permute(np.arange(count)[::-1], count, key), image[::-1])  # any element alone


def test_permute_mixes():
    image = permute(np.arange(10_000), 10_000, 7)
    assert abs(np.corrcoef(np.arange(10_000), image)[0, 1]) < 0.03
    assert (image == permute(np.arange(10_000), 10_000, 8)).mean() < 0.01
    assert fold(1, 2) != fold(2, 1)


@given(
    count=st.integers(20, 400),
    batch=st.integers(1, 20),
    seed=st.integers(0, 99),
    chunk=st.integers(1, 9),
    block=st.integers(1, 5),
    shuffle=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_sample_once_an_epoch(count: int, batch: int, seed: int, chunk: int, block: int, shuffle: bool):
    """Over steps that cover whole windows, the (sample, epoch) pairs drawn are exactly all of them, with no pair twice."""
    order = Order(count, batch, seed, shuffle, chunk, block, max_lanes=4)
    window = order.lanes * chunk * block
    steps = -(-3 * count // batch) + -(-window // batch)
    drawn = [pair for step in range(steps) for pair in zip(*order.slots(step, 0, batch), strict=True)]
    assert len(set(drawn)) == len(drawn)
    first_epoch = {sample for sample, epoch in drawn if epoch == 0}
    assert first_epoch == set(range(count))


@given(st.integers(0, 500), st.sampled_from([1, 2, 3, 4, 6, 12]))
@settings(max_examples=40, deadline=None)
def test_any_split_of_the_slots_sees_the_same_batch(step: int, parts: int):
    order = Order(1000, 24, seed=5)
    whole = order.slots(step, 0, 24)
    size = 24 // parts
    split = [order.slots(step, i * size, (i + 1) * size) for i in range(parts)]
    for k in range(2):
        assert np.array_equal(np.concatenate([s[k] for s in split]), whole[k])


def test_sorted_classes_come_out_mixed():
    """1,000 classes of 64 in order, batches of 256: class counts are near those of a fair draw."""
    order = Order(64_000, 256, seed=1)
    ratios = []
    for step in range(50):
        counts = np.bincount(order.slots(step, 0, 256)[0] // 640, minlength=100)  # 100 groups of ten classes
        ratios.append(((counts - 2.56) ** 2 / 2.56).sum() / 99)
    assert np.mean(ratios) < 3


def test_without_shuffling_the_order_is_the_shards_own():
    assert Order(10, 4, shuffle=False).slots(2, 0, 4)[0].tolist() == [8, 9, 0, 1]


@pytest.mark.parametrize("batch", [1, 7, 64, 100, 4096])
def test_lanes_divide_the_batch(batch: int):
    assert batch % Order(10_000, batch).lanes == 0
