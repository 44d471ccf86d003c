"""The views of objectives with a pretext task: rotations, puzzles, masks and regions are what the papers say."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.parts.part import About
from data_pipeline.views import tiles as puzzles
from data_pipeline.views.masks import central_region, grown, random_region
from pretrain.objectives import finder
from tests.parity.test_pretext import write_tokenizer


def generators(number: int) -> np.random.Generator:
    return np.random.default_rng([0, number])


def views_of(name: str, about: About, image: np.ndarray | None = None, **options: Any) -> dict[str, np.ndarray]:
    """The arrays that an objective's views make from one image, by default a random one."""
    cls, cfg = finder.find(name), finder.config_class(name)[0](**options)
    image = np.random.default_rng(0).integers(0, 256, (80, 96, 3), np.uint8) if image is None else image
    return cls.views(cfg, about)({"image": image}, generators)


ABOUT = About(image_size=32, patch_size=8)


def test_rotnet_turns_counter_clockwise():
    """The top right corner becomes the top left one."""
    image = views_of("rotnet", ABOUT)["image"]
    assert image.shape == (4, 3, 32, 32) and image.dtype == np.uint8
    for now, then in itertools.pairwise(image):
        assert np.array_equal(then[:, 0, 0], now[:, 0, -1]) and np.array_equal(then[:, -1, 0], now[:, 0, 0])
        assert np.array_equal(then, now.transpose(0, 2, 1)[:, ::-1])


def test_tiles_lie_in_their_cells_with_gaps():
    """The pixels of the image are their own coordinates: the first channel is the row, the second the column."""
    rows, columns = np.meshgrid(np.arange(64), np.arange(64), indexing="ij")  # 3 cells of 20, and a margin of 2
    image = np.stack([rows, columns, rows]).astype(np.uint8)
    corners = []
    for number in range(300):
        cut = puzzles.tiles(image, 3, 16, 2, np.random.default_rng(number)).astype(int)
        assert cut.shape == (9, 3, 16, 16)
        top, left, other = (cut[:, channel, 0, 0] for channel in range(3))
        assert np.array_equal(cut[:, 0], top[:, None, None] + np.arange(16)[:, None] + np.zeros((1, 16), int))
        assert np.array_equal(cut[:, 1], left[:, None, None] + np.arange(16) + np.zeros((16, 1), int))
        corners.append([top - np.arange(9) // 3 * 20, left - np.arange(9) % 3 * 20, other - top])
    found = np.array(corners)  # [300, 3, 9]
    for tile in range(9):  # up to 4 pixels of room in the cell, channels moved by 0 to 4: the same for every tile
        assert set(found[:, 0, tile]) == set(found[:, 1, tile]) == set(range(9))
        assert set(found[:, 2, tile]) == set(range(-4, 5))
    still = puzzles.tiles(image[:, :60, :60], 3, 16, 0, np.random.default_rng(0))
    assert np.array_equal(still[:, 0], still[:, 2])
    with pytest.raises(ValueError, match="tiles of 21 pixels are larger than the cells of 20"):
        puzzles.tiles(image, 3, 21, 2, np.random.default_rng(0))


def test_permutations_are_far_from_one_another():
    """Algorithm 1 of 1603.09246: no order that is left would have a larger mean distance from those before it."""
    everything = np.array(list(itertools.permutations(range(4))))
    chosen = puzzles.permutation_set(10, 4)
    assert len(np.unique(chosen, axis=0)) == 10 and np.array_equal(np.sort(chosen, 1), np.tile(np.arange(4), (10, 1)))
    for count in range(1, 10):
        before = chosen[:count]
        left = [order for order in everything if not (before == order).all(1).any()]
        assert (before != chosen[count]).sum() == max((before != order).sum() for order in left)
    nine = puzzles.permutation_set(30, 9)
    distances = [(a != b).sum() for a, b in itertools.combinations(nine, 2)]
    assert len(np.unique(nine, axis=0)) == 30 and np.mean(distances) > 8.1  # of random orders: 8
    with pytest.raises(ValueError, match="3 tiles have 6 orders"):
        puzzles.permutation_set(7, 3)


def test_jigsaw_shuffles_by_the_permutation_that_it_names():
    """On an image of a constant grey in each cell, the tiles tell where they come from."""
    shades = np.kron(np.arange(9, dtype=np.uint8).reshape(3, 3) * 20, np.ones((20, 20), np.uint8))
    image, sizes = np.repeat(shades[..., None], 3, 2), {"tile_size": 12, "cell_size": 20, "permutations": 40}
    made = views_of("jigsaw", ABOUT, image, crop_scale=1.0, channel_shift=0, gray_share=0.0, **sizes)
    origin = made["tiles"].reshape(9, -1).mean(1) / 20
    assert np.array_equal(origin.round(), puzzles.permutation_set(40, 9)[made["permutation"]])


@pytest.mark.parametrize("color", ["exact", "fused", "device"])
def test_grey_puzzles_have_equal_channels(color: str):
    """Also where each channel of a tile is moved; colours of other images differ."""
    about, sizes = About(image_size=32, patch_size=8), {"tile_size": 16, "cell_size": 20, "permutations": 5}
    image = np.random.default_rng(0).integers(0, 256, (80, 96, 3), np.uint8)
    cls, config = finder.find("jigsaw"), finder.config_class("jigsaw")[0]
    for share in (0.0, 1.0):
        view = cls.views(config(gray_share=share, **sizes), about)
        made = view({"image": image, "color": color}, generators)
        same = [np.array_equal(tile[0], tile[1]) and np.array_equal(tile[0], tile[2]) for tile in made["tiles"]]
        assert set(made) == {"tiles", "permutation"} and made["tiles"].shape == (9, 3, 16, 16)
        assert same == [bool(share)] * 9


def test_beit_masks_blocks_and_shows_the_tokenizer_the_same_crop(tmp_path: Path):
    """With as many pixels per token on both sides the two crops are equal; the mask has exactly 40 % of the patches."""
    where = write_tokenizer(tmp_path)
    same, half = (views_of("beit", About(image_size=28 * p, patch_size=p), visual_tokenizer=where) for p in (4, 8))
    assert np.array_equal(same["image"], same["visual"]) and half["visual"].shape == (3, 112, 112)
    assert half["image"].shape == (3, 224, 224) and half["masked"].shape == (int(0.4 * 784),)
    pooled = half["image"].reshape(3, 112, 2, 112, 2).mean((2, 4))
    assert np.abs(pooled - half["visual"]).mean() < 4
    mask = np.isin(np.arange(784), half["masked"]).reshape(28, 28)
    assert (mask[1:] == mask[:-1]).mean() > 0.85  # single patches: 0.52


def test_regions_of_pixels():
    centre = central_region(32, 12)
    assert centre.sum() == 144 and centre[10:22, 10:22].all()
    assert np.array_equal(grown(centre, 2), central_region(32, 16))
    region = random_region(64, 0.25, np.random.default_rng(0))
    assert region.sum() == 1024 and (region[1:] == region[:-1]).mean() > 0.9  # single pixels: 0.62
    borders = {}  # between the region and the rest, in sides of the image: the same shapes at every size
    for size in (64, 256):
        regions = np.stack([random_region(size, 0.25, np.random.default_rng(seed)) for seed in range(40)])
        borders[size] = (regions[:, 1:] != regions[:, :-1]).sum() / 40 / size
    assert borders[64] == pytest.approx(borders[256], rel=0.1)


def test_only_the_dropped_centre_has_a_border():
    about = About(image_size=224, patch_size=16)
    region = views_of("context_encoder", about, dropped_region="center")["region"]
    assert region.dtype == np.uint8 and np.array_equal(region > 0, grown(region == 1, 7))
    assert (region > 0).sum() == 112**2 and (region == 1).sum() == 98**2
    region = views_of("context_encoder", about, dropped_region="random")["region"]
    assert region.dtype == np.uint8 and np.bincount(region.flatten()).tolist() == [3 * 224**2 // 4, 224**2 // 4]
    with pytest.raises(ValueError, match=r"random_share = 1e-06: drops no pixel of 224×224; write a higher one"):
        views_of("context_encoder", about, random_share=1e-6)
