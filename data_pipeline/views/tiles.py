"""Jigsaw puzzles of an image (arXiv 1603.09246): tiles with gaps between them, and a set of permutations that differ
from one another at as many places as possible. Drawn in the data workers."""

from __future__ import annotations

import functools

import numpy as np

MOST_TILES = 9  # all 9! = 362,880 orders are held in memory


def tiles(image: np.ndarray, side: int, size: int, shift: int, rng: np.random.Generator) -> np.ndarray:
    """[side², C, size, size], row-major: from each of side × side cells of an image [C, S, S], without a margin of
    `shift` pixels, one tile of `size` pixels at a random place in the cell, so that there is a random gap between
    neighbours.

    In each tile, each channel is moved by up to `shift` pixels along both axes. Otherwise the chromatic aberration of a
    lens would tell where in the image a tile was. Raises ValueError for tiles that are larger than a cell.
    """
    channels, pixels = len(image), image.shape[-1] - 2 * shift
    cell = pixels // side
    if size > cell:
        raise ValueError(f"tiles of {size} pixels are larger than the cells of {cell} pixels in an image of {pixels}")
    corners = cell * np.stack(np.divmod(np.arange(side * side), side), axis=1)  # [side², 2]: top, left
    corners += rng.integers(0, cell - size + 1, corners.shape)
    moved = corners[:, None] + rng.integers(0, 2 * shift + 1, (side * side, channels, 2))  # [side², C, 2]
    return np.stack(
        [
            np.stack([image[c, top : top + size, left : left + size] for c, (top, left) in enumerate(places)])
            for places in moved.tolist()
        ]
    )


@functools.lru_cache(8)
def permutation_set(count: int, length: int) -> np.ndarray:
    """`count` different orders of `length` things, int64 [count, length]: the greedy algorithm 1 of arXiv 1603.09246.

    The first one is random. Each next one has the largest mean Hamming distance from those before it; of several, a
    random one. The random numbers are fixed, so that all processes have the same set. Raises ValueError if there are
    fewer orders.
    """
    if length > MOST_TILES:
        raise ValueError(f"orders of {length} tiles are too many to compare; use at most {MOST_TILES} tiles")
    orders = _all_orders(length)
    if count > len(orders):
        raise ValueError(f"{length} tiles have {len(orders)} orders, which is less than {count}")
    orders = np.random.default_rng(0).permutation(orders)
    columns = np.ascontiguousarray(orders.T)  # [length, orders]
    agreements = np.zeros(len(orders), np.int32)  # with all chosen orders, summed over places
    chosen: list[int] = []
    while len(chosen) < count:
        best = int(agreements.argmin())
        chosen.append(best)
        for place, value in zip(columns, orders[best], strict=True):
            agreements += place == value
        agreements[best] = np.iinfo(np.int32).max // 2  # never again
    return orders[chosen].astype(np.int64)


def _all_orders(length: int) -> np.ndarray:
    """uint8 [length!, length]."""
    orders = np.zeros((1, 1), np.uint8)
    for n in range(1, length):
        orders = np.concatenate([np.insert(orders, place, n, axis=1) for place in range(n + 1)])
    return orders
