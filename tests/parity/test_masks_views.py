"""Masks have exactly the shares that a recipe gives, for any distribution of the batch over processes; views equal
operations of Pillow and torchvision."""

from __future__ import annotations

import colorsys
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torchvision.transforms.v2 import RandomResizedCrop

from common.errors import Damaged
from data_pipeline.formats.decode import Encoded
from data_pipeline.parts.part import About
from data_pipeline.views import augmentations, colors, device_color
from data_pipeline.views.augmentations import MASKS, Augment, Params, center, crops, random_box, resize
from data_pipeline.views.colors import LUMA, color_row
from data_pipeline.views.masks import (
    ContextAndTargets,
    block_mask,
    block_size,
    masked_patches,
    resize_mask,
    square_mask,
    stratified_ratio,
    visible_block,
)
from pretrain.objectives.dinov2 import Config as DINOv2Config
from pretrain.objectives.dinov2 import DINOv2
from pretrain.objectives.mae import MAE
from pretrain.objectives.mae import Config as MAEConfig
from pretrain.objectives.simclr import Config as SimCLRConfig
from pretrain.objectives.simclr import SimCLR

JITTER = (0.4, 0.4, 0.2, 0.1)
CONSTANTS = device_color.constants([0.5] * 3, [0.25] * 3, torch.device("cpu"))
FULL = Augment(48, scale=(0.3, 1.0), jitter=JITTER, gray=0.2, blur=0.5, solarize=0.3)  # all operations


def generators(seed: int = 0) -> Callable[[int], np.random.Generator]:
    return lambda k: np.random.default_rng([seed, k])


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    from sklearn.datasets import load_sample_image

    return np.ascontiguousarray(load_sample_image("flower.jpg")[100:260, 200:420])  # [160, 220, 3]


def levels(ours: np.ndarray, theirs: torch.Tensor | np.ndarray) -> int:
    """The largest difference between two uint8 images."""
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.uint8
    return int(np.abs(ours.astype(int) - theirs.astype(int)).max())


def channels_first(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


# ---------------------------------------------------------------- masks
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (4, 4), (14, 14), (6, 32)])
def test_block_mask_has_exactly_the_count(grid: tuple[int, int]):
    rng = np.random.default_rng(0)
    for count in range(grid[0] * grid[1] + 1):
        mask = block_mask(grid, count, rng)
        assert mask.shape == grid and mask.dtype == bool and mask.sum() == count


def test_block_mask_is_made_of_blocks_everywhere():
    """Masked neighbours are far more frequent than in a random mask with the same count; every position is masked
    sometimes, opposite positions equally often."""
    rng = np.random.default_rng(0)
    masks = np.stack([block_mask((14, 14), 60, rng) for _ in range(2000)])
    together = (masks[:, :, 1:] & masks[:, :, :-1]).sum() / masks[:, :, 1:].sum()
    assert together > 0.6  # at random: 60 / 196
    often = masks.mean(0)
    assert often.min() > 0.02 and often.max() < 0.6 and np.abs(often - often[::-1, ::-1]).max() < 0.06
    same = [block_mask((14, 14), 60, np.random.default_rng(3)) for _ in range(2)]
    assert np.array_equal(*same)


def naive_block_mask(side: int, count: int, smallest: int, rng: random.Random) -> np.ndarray:
    """The published procedure, cell by cell: blocks until ten attempts in a row fail, then single cells."""
    on: set[tuple[int, int]] = set()
    while len(on) < count:
        added = False
        for _ in range(10):
            area = rng.uniform(smallest, min(count - len(on), side * side / 2))  # the second may be the smaller one
            aspect = 0.3 * (1 / 0.09) ** rng.random()
            h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if 0 < h < side and 0 < w < side:
                top, left = rng.randint(0, side - h), rng.randint(0, side - w)
                new = {(top + i, left + j) for i in range(h) for j in range(w)} - on
                if new and len(new) <= count - len(on):
                    on |= new
                    added = True
                    break
        if not added:
            free = [(i, j) for i in range(side) for j in range(side) if (i, j) not in on]
            on |= set(rng.sample(free, count - len(on)))
    return np.array([[(i, j) in on for j in range(side)] for i in range(side)])


@pytest.mark.parametrize("count, smallest", [(2, 4), (3, 4), (19, 4), (60, 4), (98, 4), (75, 16)])
def test_block_masks_are_distributed_as_published(count: int, smallest: int):
    """Borders between masked and other cells, masked cells without masked neighbours, and the extent of a mask:
    means over 600 masks."""

    def shape(mask: np.ndarray) -> list[float]:
        wide = np.pad(mask, 1)
        near = wide[:-2, 1:-1].astype(int) + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:]
        rows, columns = np.nonzero(mask)
        return [(4 - near)[mask].sum(), (mask & (near == 0)).sum(), rows.std(), columns.std()]

    rng, plain = np.random.default_rng(0), random.Random(1)
    ours = np.array([shape(block_mask((14, 14), count, rng, smallest)) for _ in range(600)])
    theirs = np.array([shape(naive_block_mask(14, count, smallest, plain)) for _ in range(600)])
    error = np.sqrt((ours.var(0) + theirs.var(0)) / 600)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4 * error + 1e-9).all(), (ours.mean(0), theirs.mean(0), error)


@pytest.mark.parametrize("grid, cells", [((4, 4), 1), ((2, 3), 2), ((7, 7), 2)])
def test_square_masks(grid: tuple[int, int], cells: int):
    """Whole squares, exactly as many as asked, each equally often."""
    h, w = grid
    often = np.zeros(grid)
    for seed in range(400):
        mask = square_mask(grid, cells, h * w // 2, np.random.default_rng(seed))
        squares = mask.reshape(h, cells, w, cells).transpose(0, 2, 1, 3).reshape(h, w, -1)
        assert mask.shape == (h * cells, w * cells) and np.array_equal(squares.all(-1), squares.any(-1))
        assert squares.all(-1).sum() == h * w // 2
        often += squares.all(-1) / 400
    assert np.abs(often - (h * w // 2) / (h * w)).max() < 0.12


def blocks_of(grid: tuple[int, int], targets: np.ndarray) -> list[tuple[int, int]]:
    """(height, width) of target blocks [M, n]. Fails unless each is a full rectangle."""
    rows, columns = targets // grid[1], targets % grid[1]
    sizes = [(int(np.ptp(r)) + 1, int(np.ptp(c)) + 1) for r, c in zip(rows, columns, strict=True)]
    assert all(len(set(t)) == len(t) == h * w for t, (h, w) in zip(targets.tolist(), sizes, strict=True))
    return sizes


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (14, 14), (6, 12)])
def test_context_and_targets(grid: tuple[int, int]):
    """Targets of one size in a step, whose area and aspect stay in their ranges; a context of fixed size without them."""
    patches, sizes = grid[0] * grid[1], set()
    draw = ContextAndTargets(grid, 4, (0.15, 0.2), (0.75, 1.5), (0.85, 1.0), patches // 4)
    for step in range(40):
        samples = [draw({"seed": 5, "step": step}, generators(slot)(MASKS)) for slot in range(3)]
        found = {size for one in samples for size in blocks_of(grid, one["targets"])}
        assert len(found) == 1
        sizes |= found
        for one in samples:
            context = one["context"]
            assert (
                len(context) == patches // 4
                and (np.diff(context) > 0).all()
                and 0 <= context[0] <= context[-1] < patches
            )
            assert not set(context) & set(one["targets"].flat) and one["targets"].shape[0] == 4
        again = draw({"seed": 5, "step": step}, generators(2)(MASKS))
        assert all(np.array_equal(again[key], samples[2][key]) for key in again)
        assert not np.array_equal(samples[0]["targets"], samples[1]["targets"]) or grid == (4, 4)
    assert len(sizes) > 2
    for h, w in sizes:  # sides are rounded by up to one half
        assert (h - 0.5) * (w - 0.5) <= 0.2 * patches and (h + 0.5) * (w + 0.5) >= 0.15 * patches
        assert (h - 0.5) / (w + 0.5) <= 1.5 and (h + 0.5) / (w - 0.5) >= 0.75


@pytest.mark.parametrize(("grid", "count"), [((16, 16), 90), ((14, 14), 69), ((4, 6), 7), ((8, 8), 63), ((5, 5), 1)])
def test_visible_blocks(grid: tuple[int, int], count: int):
    """Rolled back, the block is a rectangle of an aspect from 1/2 to 2, without the end of its last row; all patches
    are visible equally often."""
    rng, often = np.random.default_rng(0), np.zeros(grid)
    for draw in range(1000):
        mask = visible_block(grid, count, rng)
        assert mask.sum() == count
        often += mask
        if draw < 30:
            rolled = (np.roll(mask, (-y, -x), (0, 1)) for y in range(grid[0]) for x in range(grid[1]))
            block = next(one for one in rolled if one[0, 0] and _is_block(one))
            rows, columns = block.any(1).sum(), block.any(0).sum()
            assert rows - 1 < 2 * columns and columns - 1 < 2 * rows
    assert often / 1000 == pytest.approx(np.full(grid, count / (grid[0] * grid[1])), abs=0.08)


def _is_block(mask: np.ndarray) -> bool:
    """Whether all rows but the last one of a mask begin at the left edge and have the same length."""
    lengths = mask.sum(1)[mask.any(1)]
    starts = all(mask[row, : mask[row].sum()].all() for row in range(len(mask)))
    return starts and mask.any(1)[: len(lengths)].all() and (lengths[:-1] == lengths.max()).all()


def test_the_aspect_of_a_block_is_its_height_over_its_width():
    """On a grid so large that rounding does not hide it. The mean width / height would be 0.92."""
    rng = np.random.default_rng(0)
    heights, widths = np.array([block_size((60, 60), (0.15, 0.2), (0.75, 1.5), rng) for _ in range(500)]).T
    assert (heights / widths).mean() == pytest.approx(1.125, abs=0.04)
    assert (heights * widths).mean() / 3600 == pytest.approx(0.175, abs=0.004)


def test_targets_are_everywhere_and_contexts_lie_in_a_block():
    """Opposite places are targets equally often; a context that fits into a block of half of the image lies in one."""
    draw = ContextAndTargets((14, 14), 4, (0.15, 0.2), (0.75, 1.5), (0.5, 0.5), 20)
    often = np.zeros(196)
    for slot in range(2000):
        one = draw({"seed": slot, "step": 0}, generators(slot)(MASKS))
        np.add.at(often, one["targets"].reshape(-1), 1 / 2000)
        assert max(np.ptp(one["context"] // 14), np.ptp(one["context"] % 14)) < 10
    square = often.reshape(14, 14)
    assert square.min() > 0.03 and np.abs(square - square[::-1, ::-1]).max() < 0.15


def test_a_large_context_takes_further_patches():
    """First those outside of its block, then those of the targets."""
    sample = {"seed": 0, "step": 0}
    for count in (30, 60, 64):
        draw = ContextAndTargets((8, 8), 2, (0.2, 0.2), (1.0, 1.0), (0.3, 0.3), count)
        one = draw(sample, generators()(MASKS))
        free = 64 - len(set(one["targets"].flat))
        assert len(set(one["context"])) == count
        assert len(set(one["context"]) & set(one["targets"].flat)) == max(0, count - free)


@pytest.mark.parametrize(
    "batch, crops, share", [(16, 2, 0.5), (7, 2, 0.5), (12, 3, 0.3), (5, 1, 1.0), (8, 2, 0.0), (64, 2, 0.77)]
)
@pytest.mark.parametrize("step", [0, 1, 1000])
def test_stratified_ratios_over_the_global_batch(batch: int, crops: int, share: float, step: int):
    samples = [{"batch": batch, "seed": 5, "step": step, "slot": slot, "image": None} for slot in range(batch)]
    low, high = 0.1, 0.5

    def ratios(slots: range) -> list[float]:
        return [
            stratified_ratio(samples[slot], view, crops, share, (low, high)) for slot in slots for view in range(crops)
        ]

    everything = ratios(range(batch))
    masked = sorted(ratio for ratio in everything if ratio)
    count = int(share * batch * crops)
    assert masked == pytest.approx(
        [low + (high - low) * (i + 1) / count for i in range(count)]
    )  # upper edges of equal bins
    for processes in (1, 2, 3, 4):
        parts = [range(batch * i // processes, batch * (i + 1) // processes) for i in range(processes)]
        assert [ratio for part in parts for ratio in ratios(part)] == everything


@pytest.mark.slow
def test_stratified_ratios_change_with_step_and_seed():
    def ratios(**change: int) -> list[float]:
        base = {"batch": 32, "seed": 5, "step": 0}
        return [
            stratified_ratio(base | change | {"slot": slot}, view, 2, 0.5, (0.1, 0.5))
            for slot in range(32)
            for view in range(2)
        ]

    assert ratios() == ratios() and ratios() != ratios(step=1) and ratios() != ratios(seed=6)
    # every place of the batch, and either view, is masked half of the time
    often = np.mean([np.array(ratios(step=step)).reshape(32, 2) > 0 for step in range(150)], axis=0)
    assert np.abs(often - 0.5).max() < 0.2 and np.abs(often.mean(0) - 0.5).max() < 0.02


# ---------------------------------------------------------------- boxes and sizes
def pillow(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic interpolation with antialiasing, the width first. By default Pillow chooses the cheaper order, which
    rounds differently."""
    wide = Image.fromarray(image).resize((width, image.shape[0]), Image.Resampling.BICUBIC)
    return np.array(wide.resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(32, 32), (96, 96), (224, 200), (300, 400), (160, 220)])
def test_resize_equals_pillow(photo: np.ndarray, size: tuple[int, int]):
    for image in (photo, photo[10:121, 33:94]):  # the second is not contiguous
        ours, theirs = resize(image, size), pillow(image, *size)
        assert (
            levels(ours, theirs) <= 2 and np.mean(ours != theirs) < 0.01
        )  # 2 in places: torch rounds its weights to 16 bits


@pytest.mark.parametrize("shape", [(160, 220), (220, 160), (64, 64), (65, 64)])
def test_center_equals_pillow(photo: np.ndarray, shape: tuple[int, int]):
    image = resize(photo, shape)
    short = min(shape)
    left, top = (shape[1] - short) // 2, (shape[0] - short) // 2
    assert (
        levels(center(image, 48), pillow(image[top : top + short, left : left + short], 48, 48).transpose(2, 0, 1)) <= 1
    )


@pytest.mark.parametrize(
    "shape, scale", [((160, 220), (0.32, 1.0)), ((100, 100), (0.05, 0.32)), ((60, 240), (0.2, 1.0))]
)
def test_random_box_is_random_resized_crop(shape: tuple[int, int], scale: tuple[float, float]):
    """Positions, areas and aspect ratios have the same distribution: means within five standard errors."""
    rng, count = np.random.default_rng(0), 3000
    torch.manual_seed(0)
    theirs = RandomResizedCrop(32, scale=scale)
    image = torch.empty(3, *shape)
    drawn = [theirs.make_params([image]) for _ in range(count)]
    boxes = {
        "ours": np.array([random_box(shape, scale, rng) for _ in range(count)], float),
        "theirs": np.array([[d[k] for k in ("top", "left", "height", "width")] for d in drawn], float),
    }
    features = []
    for box in boxes.values():
        top, left, height, width = box.T
        assert (box >= 0).all() and (top + height <= shape[0]).all() and (left + width <= shape[1]).all()
        area, aspect = height * width / (shape[0] * shape[1]), np.log(width / height)
        features.append(np.stack([top, left, area, aspect, area**2, aspect**2, top * height, left * width]))
    ours, other = features
    error = np.sqrt((ours.var(1) + other.var(1)) / count)
    assert (np.abs(ours.mean(1) - other.mean(1)) < 5 * error + 1e-9).all()


@pytest.mark.parametrize("shape", [(20, 200), (200, 20), (50, 50)])
def test_random_box_where_no_box_fits(shape: tuple[int, int]):
    """The centre of the image, with the nearest allowed aspect ratio."""
    params = RandomResizedCrop(32, scale=(1.5, 2.0)).make_params([torch.empty(3, *shape)])
    expected = tuple(params[k] for k in ("top", "left", "height", "width"))
    assert random_box(shape, (1.5, 2.0), np.random.default_rng(0)) == expected


def test_crop_and_flip(photo: np.ndarray):
    augment, mirrored = Augment(24, scale=(0.2, 1.0)), []
    for seed in range(60):
        ours = crops({"image": photo}, {"image": augment}, generators(seed))["image"].transpose(1, 2, 0)
        top, left, height, width = random_box((160, 220), (0.2, 1.0), generators(seed)(0))
        theirs = pillow(photo[top : top + height, left : left + width], 24, 24)
        mirrored.append(levels(ours, theirs) > 2)
        assert levels(ours, theirs[:, ::-1] if mirrored[-1] else theirs) <= 2
    assert 18 <= sum(mirrored) <= 42


# ---------------------------------------------------------------- colours one by one
@pytest.mark.parametrize("factor", [0.2, 0.5, 0.96, 1.0, 1.2, 1.64, 1.8])
@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
def test_color_operation_equals_torchvision(photo: np.ndarray, operation: str, factor: float):
    """Within one level of torchvision on PIL images and on tensors, which both round down."""
    ours, adjust = getattr(colors, operation)(photo, factor), getattr(TF, f"adjust_{operation}")
    from_pil = np.array(adjust(Image.fromarray(photo), factor))
    from_tensor = adjust(channels_first(photo), factor).numpy().transpose(1, 2, 0)
    for theirs in (from_pil, from_tensor):
        assert levels(ours, theirs) <= 1 and abs(ours.mean() - theirs.mean()) < 0.6  # as they differ from each other


@pytest.mark.parametrize("shift", [-0.5, -0.2, -0.08, -0.02, 0.0, 0.02, 0.1, 0.2])
def test_hue_equals_torchvision(photo: np.ndarray, shift: float):
    """Within two levels on average: hue in 8 bits has steps of 1.4 degrees, for which torchvision's two
    implementations differ by up to 9 levels, too."""
    ours = colors.hue(photo, shift).transpose(2, 0, 1)
    theirs = TF.adjust_hue(channels_first(photo), shift)
    assert levels(ours, theirs) <= 12 and np.abs(ours.astype(int) - theirs.numpy()).mean() < 2


def test_colorless_images_stay_as_they_are():
    """Without contrast or colour there is nothing to change. Red and blue have different luma."""
    flat = np.full((4, 4, 3), 100, np.uint8)
    for operation in ("contrast", "saturation", "hue"):
        assert levels(getattr(colors, operation)(flat, 0.2), flat) == 0
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 200
    assert levels(colors.saturation(red, 0.2)[..., ::-1].copy(), colors.saturation(red[..., ::-1].copy(), 0.2)) > 5


@pytest.mark.parametrize("sigma", [0.1, 0.21, 0.22, 0.3, 0.43, 0.44, 0.6, 0.65, 0.66, 0.8, 0.87, 0.88, 1.05, 1.5, 2.0])
def test_blur_equals_torchvision(photo: np.ndarray, sigma: float):
    """With 0, 3, 5, 7 and 9 taps. The mean error is that of rounding ties, so that the omitted taps have no effect."""
    image = photo[:48, :48]
    ours, theirs = (
        colors.blur(image, sigma).transpose(2, 0, 1),
        TF.gaussian_blur(channels_first(image), [9, 9], [sigma, sigma]),
    )
    assert levels(ours, theirs) <= 1 and np.mean(ours != theirs.numpy()) < 0.01


def test_solarize_and_grey_equal_torchvision(photo: np.ndarray):
    assert levels(colors.solarize(photo).transpose(2, 0, 1), TF.solarize(channels_first(photo), 128)) == 0
    assert levels(colors.grayscale(photo), np.array(TF.to_grayscale(Image.fromarray(photo), 1))) <= 1


def test_draws_have_the_published_distribution():
    """Probabilities and ranges of all random values, and all orders of the jitter."""
    augment = Augment(
        32, (0.2, 1.0), flip=0.3, jitter=(0.4, 0.3, 0.2, 0.1), jitter_p=0.8, gray=0.2, blur=0.6, solarize=0.1
    )
    drawn = [augment.draw((160, 220), np.random.default_rng(seed)) for seed in range(4000)]
    share = {
        key: np.mean([bool(getattr(p, key)) for p in drawn]) for key in ("flip", "jitter", "gray", "sigma", "solarize")
    }
    assert share == pytest.approx({"flip": 0.3, "jitter": 0.8, "gray": 0.2, "sigma": 0.6, "solarize": 0.1}, abs=0.03)
    sigmas = [p.sigma for p in drawn if p.sigma]
    assert 0.1 <= min(sigmas) < 0.11 and 1.99 < max(sigmas) <= 2.0 and np.mean(sigmas) == pytest.approx(1.05, abs=0.05)
    factors = {
        name: [dict(p.jitter)[name] for p in drawn if p.jitter]
        for name in ("brightness", "contrast", "saturation", "hue")
    }
    for (name, values), strength in zip(factors.items(), (0.4, 0.3, 0.2, 0.1), strict=True):
        middle = 0 if name == "hue" else 1
        assert abs(min(values) - middle + strength) < 0.01 > abs(max(values) - middle - strength), name
        assert np.mean(values) == pytest.approx(middle, abs=0.05 * strength) and np.std(values) == pytest.approx(
            strength / 3**0.5, rel=0.05
        )
    orders = [tuple(name for name, _ in p.jitter) for p in drawn if p.jitter]
    often = np.array([orders.count(order) for order in set(orders)])
    assert len(often) == 24 and (np.abs(often - len(orders) / 24) < 5 * (len(orders) / 24) ** 0.5).all()
    independent = np.corrcoef(
        [[p.flip, p.gray, bool(p.sigma), p.solarize, bool(p.jitter), p.box[0]] for p in drawn], rowvar=False
    )
    assert np.abs(independent - np.eye(6)).max() < 0.08


def test_strengths_of_zero_and_more_than_one():
    none = Augment(8, (1, 1), jitter=(0.4, 0, 0, 0), jitter_p=1.0).draw((8, 8), np.random.default_rng(0))
    assert [name for name, _ in none.jitter] == ["brightness"]
    wide = Augment(8, (1, 1), jitter=(1.5, 0, 0, 0), jitter_p=1.0)
    factors = [wide.draw((8, 8), np.random.default_rng(i)).jitter[0][1] for i in range(200)]
    assert 0 <= min(factors) < 0.1 and 2.4 < max(factors) <= 2.5  # no negative brightness
    assert not Augment(8, (1, 1)).colors and not Augment(8, (1, 1), jitter=JITTER, jitter_p=0).colors and wide.colors


def torchvision_view(photo: np.ndarray, params: Params, size: int) -> torch.Tensor:
    """The view with these parameters, computed by Pillow's resize and torchvision's operations on PIL images."""
    top, left, height, width = params.box
    image = pillow(photo[top : top + height, left : left + width], size, size)
    picture = Image.fromarray(np.ascontiguousarray(image[:, ::-1] if params.flip else image))
    for name, factor in params.jitter:
        picture = getattr(TF, f"adjust_{name}")(picture, factor)
    tensor = channels_first(np.array(TF.to_grayscale(picture, 3) if params.gray else picture))
    if params.sigma:
        tensor = TF.gaussian_blur(tensor, [9, 9], [params.sigma, params.sigma])
    return TF.solarize(tensor, 128) if params.solarize else tensor


def test_exact_views_are_torchvision_operations_in_order(photo: np.ndarray):
    """Differences come from several roundings, and from the coarse steps of hue."""
    without = Augment(48, scale=(0.3, 1.0), jitter=(0.4, 0.4, 0.2, 0), gray=0.2, blur=0.5, solarize=0.3)
    for seed in range(60):
        for augment, mean, most in ((without, 0.8, 4), (FULL, 2, 16)):
            params = augment.draw((160, 220), generators(seed)(0))
            ours = crops({"image": photo}, {"x": augment}, generators(seed))["x"]
            theirs = torchvision_view(photo, params, 48)
            assert np.abs(ours.astype(int) - theirs.numpy()).mean() < mean and levels(ours, theirs) <= most, seed


# ---------------------------------------------------------------- colours fused
def naive_fused(image: np.ndarray, params: Params) -> np.ndarray:
    """In float64, step by step, without clipping in between: first the rotation of hue in YIQ, with which the other
    operations commute. [H, W, 3] → [3, H, W]."""
    x = image.astype(np.float64)
    luma = np.array(LUMA)
    to_yiq = np.array([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
    angle = 2 * np.pi * dict(params.jitter).get("hue", 0)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), np.sin(angle)], [0, -np.sin(angle), np.cos(angle)]])
    x = x @ (np.linalg.inv(to_yiq) @ turn @ to_yiq).T
    for name, factor in params.jitter:
        if name == "brightness":
            x = factor * x
        elif name == "contrast":
            x = factor * x + (1 - factor) * (x @ luma).mean()
        elif name == "saturation":
            x = factor * x + (1 - factor) * (x @ luma)[..., None]
    if params.gray:
        x = np.repeat((x @ luma)[..., None], 3, axis=2)
    x = x.clip(0, 255).round()
    if params.sigma:
        taps = np.exp(-(np.arange(-4, 5) ** 2) / (2 * params.sigma**2))
        taps /= taps.sum()
        for axis in (0, 1):
            padded = np.pad(x, [(4, 4) if a == axis else (0, 0) for a in range(3)], "reflect")
            x = sum(w * np.take(padded, np.arange(i, i + x.shape[axis]), axis) for i, w in enumerate(taps))
        x = x.round()
    return (np.where(x >= 128, 255 - x, x) if params.solarize else x).astype(np.uint8).transpose(2, 0, 1)


def flipped_crop(photo: np.ndarray, params: Params, size: int) -> np.ndarray:
    top, left, height, width = params.box
    image = resize(photo[top : top + height, left : left + width], (size, size))
    return image[:, ::-1] if params.flip else image


def test_fused_views_equal_the_formula(photo: np.ndarray):
    strong = Augment(48, (0.3, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), gray=0.2, blur=0.5, solarize=0.3)
    for seed in range(60):
        augment = (FULL, strong)[seed % 2]
        params = augment.draw((160, 220), generators(seed)(0))
        ours = crops({"image": photo, "color": "fused"}, {"x": augment}, generators(seed))["x"]
        theirs = naive_fused(flipped_crop(photo, params, 48), params)
        assert levels(ours, theirs) <= 1 and np.mean(ours != theirs) < 0.15, (seed, params)


def test_fused_is_near_exact(photo: np.ndarray):
    """Equal up to one rounding per operation if nothing is clipped and hue is not rotated. Hue rotates in the same
    direction, by 0.6 to 1.7 of the angle."""
    image = (photo // 4 + 96).astype(np.uint8)  # room on both sides
    without = Augment(48, (0.3, 1.0), jitter=(0.2, 0.2, 0.2, 0), gray=0.2, blur=0.5, solarize=0.3)
    for seed in range(40):
        pair = [
            crops({"image": image, "color": color}, {"x": without}, generators(seed))["x"]
            for color in ("exact", "fused")
        ]
        assert levels(*pair) <= 3, seed
    for shift in (-0.1, -0.05, 0.05, 0.1):
        for hue in np.arange(0, 1, 1 / 12):
            vivid = np.zeros((4, 4, 3), np.uint8) + (255 * np.array(colorsys.hsv_to_rgb(hue, 0.4, 0.6))).astype(
                np.uint8
            )
            params = Params((4, 4), (0, 0, 4, 4), False, (("hue", shift),), False, 0.0, False)
            turned = colorsys.rgb_to_hsv(*colors.fused(vivid, params)[0, 0].tolist())[0]
            assert 0.6 < ((turned - hue + 0.5) % 1 - 0.5) / shift < 1.7, (shift, hue)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_device_colors_equal_fused(photo: np.ndarray, channels: int):
    image = photo if channels == 3 else np.concatenate([photo, photo[..., ::-1]], axis=2)[..., :channels].copy()
    small = Augment(16, (0.1, 0.5), jitter=JITTER, blur=0.5)
    plan = {"global": [FULL] * 3, "local": [small] * 4, "plain": Augment(20, (0.5, 1.0)), "one": FULL, "none": []}
    for seed in range(12):
        fused = crops({"image": image, "color": "fused"}, plan, generators(seed))
        device = crops({"image": image, "color": "device"}, plan, generators(seed))
        assert device.keys() - fused.keys() == {"global.color", "local.color", "one.color"}
        assert {k: v.shape for k, v in device.items() if "." in k} == {
            "global.color": (3, 6),
            "local.color": (4, 6),
            "one.color": (6,),
        }
        for name in ("global", "local", "one"):
            batch = [torch.from_numpy(device[key])[None] for key in (name, f"{name}.color")]  # a batch of one
            ours = device_color.apply(*batch, CONSTANTS)[0]
            assert ours.dtype == torch.uint8 and levels(fused[name], ours) <= 1, (seed, name)
            assert np.mean(fused[name] != ours.numpy()) < 0.1
        assert np.array_equal(fused["plain"], device["plain"])


def test_device_colors_need_no_particular_dimensions(photo: np.ndarray):
    out = crops({"image": photo, "color": "device"}, {"x": [FULL] * 6}, generators())
    images, rows = torch.from_numpy(out["x"]), torch.from_numpy(out["x.color"])
    flat = device_color.apply(images, rows, CONSTANTS)
    shaped = device_color.apply(images.view(2, 1, 3, *images.shape[1:]), rows.view(2, 1, 3, 6), CONSTANTS)
    assert torch.equal(shaped.flatten(0, 2), flat)
    assert torch.equal(device_color.apply(images[4], rows[4], CONSTANTS), flat[4])
    assert device_color.apply(images[:0], rows[:0], CONSTANTS).shape == (0, 3, 48, 48)
    identity = torch.from_numpy(color_row(Params((1, 1), (0, 0, 1, 1), True, (), False, 0.0, False), 3))
    assert torch.equal(device_color.apply(images, identity.expand(6, 6), CONSTANTS), images)


def test_normalize_equals_torchvision(photo: np.ndarray):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    images = channels_first(photo)[None]
    theirs = TF.normalize(TF.to_dtype(images, torch.float32, scale=True), mean, std)
    ours = device_color.normalize(images, device_color.constants(mean, std, images.device))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert images.dtype == torch.uint8 and torch.equal(images[0], channels_first(photo))


# ---------------------------------------------------------------- all views of a sample
def test_views_are_numbered_through_and_do_not_depend_on_each_other(photo: np.ndarray):
    small = Augment(16, (0.05, 0.3), jitter=JITTER)
    for color in ("exact", "fused"):
        sample = {"image": photo, "color": color}
        out = crops(sample, {"global": [FULL, FULL], "local": [small] * 3}, generators())
        assert out["global"].shape == (2, 3, 48, 48) and out["local"].shape == (3, 3, 16, 16)
        assert out["global"].dtype == out["local"].dtype == np.uint8
        fewer = crops(sample, {"global": [FULL, FULL], "local": [small]}, generators())
        assert np.array_equal(fewer["global"], out["global"]) and np.array_equal(fewer["local"], out["local"][:1])
        for k, (augment, view) in enumerate([*[(FULL, v) for v in out["global"]], *[(small, v) for v in out["local"]]]):
            assert np.array_equal(crops(sample, {"x": augment}, lambda _, k=k: generators()(k))["x"], view)
        assert len({view.tobytes() for view in [*out["global"], *out["local"]]}) == 5
        assert not np.array_equal(crops(sample, {"global": [FULL, FULL]}, generators(1))["global"], out["global"])


def test_generators_are_philox_with_the_key():
    for key in ((0, 0), (3, 1 << 40), (2**64 - 1, 2**63)):
        for number in (0, 1, 7, MASKS):
            theirs = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64), counter=[0, 0, 0, number]))
            ours = augmentations.generators(key)(number)
            assert np.array_equal(ours.random(9), theirs.random(9)) and ours.integers(1 << 60) == theirs.integers(
                1 << 60
            )
    assert np.array_equal(augmentations.generators((1, 2))(3).random(4), augmentations.generators((1, 2))(3).random(4))


def test_a_decision_leaves_the_others_alone(photo: np.ndarray):
    """Probabilities determine which operations are applied, but do not change the box, the flip, or the numbers of
    other operations."""
    for seed in range(20):
        full, plain = (a.draw((160, 220), generators(seed)(0)) for a in (FULL, Augment(48, scale=(0.3, 1.0))))
        assert (full.box, full.flip) == (plain.box, plain.flip)
        always = Augment(48, (0.3, 1.0), jitter=JITTER, gray=1, blur=0.5, solarize=0.3).draw(
            (160, 220), generators(seed)(0)
        )
        assert always == full._replace(gray=True)


def test_leading_dimensions(photo: np.ndarray):
    out = crops({"image": photo}, {"one": FULL, "list": [FULL], "none": []}, generators())
    assert {key: value.shape for key, value in out.items()} == {
        "one": (3, 48, 48),
        "list": (1, 3, 48, 48),
        "none": (0, 3, 1, 1),
    }
    with pytest.raises(ValueError, match=r'views "x" have sizes \[16, 48\]'):
        crops({"image": photo}, {"x": [FULL, Augment(16, (1, 1))]}, generators())
    with pytest.raises(ValueError, match='color is "bright"; it can be exact, fused, device'):
        crops({"image": photo, "color": "bright"}, {"x": FULL}, generators())
    with pytest.raises(ValueError, match=r"float64 \[160, 220, 3\]; it must be \[H, W, C\] of uint8"):
        crops({"image": photo / 255}, {"x": FULL}, generators())


@pytest.mark.parametrize("color", ["exact", "fused", "device"])
def test_every_frame_of_a_clip_gets_the_same_view(photo: np.ndarray, color: str):
    """Equal frames give equal views; different frames give the same result as alone with these parameters."""
    shifted = np.roll(photo, 9, axis=1)
    plan = {"clip": [FULL, FULL], "one": Augment(16, (0.2, 0.6), jitter=JITTER, blur=1.0)}
    for seed in range(6):
        out = crops({"image": [photo, shifted, photo], "color": color}, plan, generators(seed))
        assert out["clip"].shape == (2, 3, 3, 48, 48) and out["one"].shape == (3, 3, 16, 16)
        for t, frame in enumerate((photo, shifted, photo)):
            alone = crops({"image": frame, "color": color}, plan, generators(seed))
            assert all(np.array_equal(out[key].take(t, axis=-2 if "." in key else -4), alone[key]) for key in out)


def test_frames_of_different_sizes_and_no_frames(photo: np.ndarray):
    with pytest.raises(Damaged, match="frames of different sizes"):
        crops({"image": [photo, photo[1:]]}, {"x": FULL}, generators())
    with pytest.raises(Damaged, match="no frames"):
        crops({"image": []}, {"x": FULL}, generators())


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 13])
@pytest.mark.parametrize("color", ["exact", "fused"])
def test_any_number_of_channels(photo: np.ndarray, channels: int, color: str):
    """Geometry, blur and solarization treat each channel separately; brightness and contrast use the mean of all
    channels."""
    image = np.tile(photo, (1, 1, 5))[..., :channels] // (1 + np.arange(channels)).astype(np.uint8)
    geometry = Augment(32, (0.3, 1.0), gray=1.0, blur=0.5, solarize=0.5)
    for seed in range(8):
        out = crops({"image": image, "color": color}, {"x": geometry}, generators(seed))["x"]
        assert out.shape == (channels, 32, 32)
        for c in range(channels):
            alone = crops({"image": image[..., c : c + 1].copy(), "color": color}, {"x": geometry}, generators(seed))[
                "x"
            ]
            assert levels(out[c], alone[0]) <= 1
    bright = Augment(32, (0.3, 1.0), flip=0, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=1.0)
    params = bright.draw(image.shape[:2], generators()(0))
    expected = flipped_crop(image, params, 32).astype(np.float64)
    for name, factor in params.jitter:
        if name in ("brightness", "contrast"):
            expected = factor * expected + (1 - factor) * expected.mean() * (name == "contrast")
            expected = expected.clip(0, 255) if color == "exact" else expected
    ours = crops({"image": image, "color": color}, {"x": bright}, generators())["x"]
    assert np.abs(ours - expected.clip(0, 255).transpose(2, 0, 1)).max() <= 2


# ---------------------------------------------------------------- decoding no more than the views need
@pytest.fixture(scope="module")
def large() -> np.ndarray:
    """A photograph of 1280×854 pixels with the detail of half this size: [854, 1280, 3]."""
    from sklearn.datasets import load_sample_image

    return resize(np.array(load_sample_image("china.jpg")), (854, 1280))


def test_scaled_decoding_never_leaves_a_crop_below_its_size(large: np.ndarray):
    data = simplejpeg.encode_jpeg(large, 92, colorsubsampling="420")
    decoded: list[float] = []

    class Watched(Encoded):
        def pixels(self, shrink: float = 1.0) -> np.ndarray:
            out = super().pixels(shrink)
            decoded.append(out.shape[0] / 854)
            return out

    boxes: list[tuple[tuple[int, ...], int]] = []

    class Recording(Augment):
        def apply(self, pixels: np.ndarray, params: Params, *rest: Any) -> np.ndarray:
            boxes.append((augmentations._scaled(params, pixels.shape[:2]), min(params.box[2:])))
            top, left, height, width = boxes[-1][0]
            assert top >= 0 <= left and top + height <= pixels.shape[0] and left + width <= pixels.shape[1]
            return super().apply(pixels, params, *rest)

    for seed in range(60):
        size = (32, 96, 160, 500)[seed % 4]
        boxes.clear()
        color = ("fused", "device")[seed % 2]
        crops(
            {"image": Watched(data, "jpg"), "color": color}, {"x": [Recording(size, (0.1, 1.0))] * 3}, generators(seed)
        )
        for (_, _, height, width), full in boxes:
            assert min(height, width) >= min(size, full)
    assert len(decoded) == 60 and min(decoded) <= 0.26 and len({round(8 * share) for share in decoded}) >= 4
    assert any(share == 1 for share in decoded)
    decoded.clear()
    plan = {"x": Augment(32, (0.9, 1.0))}
    for sample in ({"image": Watched(data, "jpg")}, {"image": Watched(data, "jpg"), "color": "exact"}):
        ours = crops(sample, plan, generators())["x"]
        assert np.array_equal(ours, crops({"image": Encoded(data, "jpg").pixels()}, plan, generators())["x"])
    assert decoded == [1, 1]


def test_scaled_decoding_keeps_places_and_detail(large: np.ndarray):
    """Compared with Pillow's result for the same box of the full image: the same picture, with most of the energy of
    its gradients."""
    data = simplejpeg.encode_jpeg(large, 92, colorsubsampling="420")
    full, augment, ratios = Image.fromarray(Encoded(data, "jpg").pixels()), Augment(96, (0.3, 1.0), flip=0), []
    for seed in range(30):
        params = augment.draw((854, 1280), generators(seed)(0))
        small = Encoded(data, "jpg").pixels(min(params.box[2:]) / 96)
        down, across = 854 / small.shape[0], 1280 / small.shape[1]
        assert down > 1.9
        top, left, height, width = augmentations._scaled(params, small.shape[:2])
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        moved = np.array(box) - np.array(params.box)[[1, 0, 1, 0]] - np.array([0, 0, params.box[3], params.box[2]])
        assert np.abs(moved).max() <= down  # half a pixel of the small picture for the place, and half for the size
        theirs = np.array(full.resize((96, 96), Image.Resampling.BICUBIC, box=box), float).transpose(2, 0, 1)
        sample = {"image": Encoded(data, "jpg"), "color": "fused"}
        ours = crops(sample, {"x": augment}, generators(seed))["x"].astype(float)
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.98, seed
        assert abs(ours.mean() - theirs.mean()) < 0.6, seed
        ratios.append(np.square(np.diff(ours)).mean() / np.square(np.diff(theirs)).mean())
    assert 0.85 < np.mean(ratios) < 1.1  # 0.83 where the crop has just the size of the view


def test_an_image_that_is_small_comes_in_full(photo: np.ndarray):
    data = simplejpeg.encode_jpeg(photo, 95)
    plan = {"global": [FULL] * 2, "local": [Augment(96, (0.05, 0.3))] * 2}
    for color in ("exact", "fused", "device"):
        from_bytes = crops({"image": Encoded(data, "jpg"), "color": color}, plan, generators())
        from_pixels = crops({"image": Encoded(data, "jpg").pixels(), "color": color}, plan, generators())
        assert all(np.array_equal(from_bytes[key], from_pixels[key]) for key in plan)


def test_boxes_are_drawn_before_anything_is_decoded(photo: np.ndarray):
    hole = bytearray(simplejpeg.encode_jpeg(photo, 90))
    hole[len(hole) // 2 :] = b""
    drawn: list[int] = []

    def rng(k: int) -> np.random.Generator:
        drawn.append(k)
        return np.random.default_rng(k)

    with pytest.raises(Damaged):
        crops({"image": Encoded(bytes(hole), "jpg")}, {"x": [FULL] * 3}, rng)
    assert drawn == [0, 1, 2]


# ---------------------------------------------------------------- views of the objectives
def sample(photo: np.ndarray, slot: int = 0, step: int = 0) -> dict:
    return {"image": photo, "id": 1, "epoch": 0, "slot": slot, "batch": 16, "step": step, "seed": 5}


def test_mae_keeps_a_uniform_subset(photo: np.ndarray):
    view = MAE.views(MAEConfig(), About(image_size=32, patch_size=4))  # 64 patches
    kept = [view(sample(photo), generators(seed))["keep"] for seed in range(400)]
    assert all(len(keep) == len(set(keep.tolist())) == 16 for keep in kept)
    often = np.bincount(np.concatenate(kept), minlength=64) / 400
    assert np.abs(often - 0.25).max() < 0.1  # 4.6 standard deviations
    together = np.mean([{0, 1} <= set(keep.tolist()) for keep in kept])
    assert together == pytest.approx(0.25 * 15 / 63, abs=0.05)


def test_masked_patches():
    """The indices of masked patches and their weights, as computed from the mask."""
    mask = np.random.default_rng(0).random((3, 2, 16)) < 0.3
    mask[1, 0], mask[2, 1] = False, True
    made, whole = masked_patches(mask), torch.from_numpy(mask).flatten(0, 1)
    tokens = torch.arange(6 * 16).view(6, 16)
    assert torch.equal(tokens.flatten()[made["mask_indices"]], tokens[whole])
    weight = (1 / whole.sum(1).clamp_min(1)).unsqueeze(1).expand_as(whole)[whole]
    assert torch.equal(torch.from_numpy(made["mask_weight"]), weight) and weight.dtype == torch.float32
    empty = masked_patches(mask & False)
    assert all(len(value) == 0 for value in empty.values())


def test_resized_masks():
    mask = np.zeros((1, 4, 4), bool)
    mask[0, :2, 2:] = True
    assert resize_mask(mask.reshape(1, 16), (4, 4), (2, 2)).tolist() == [[False, True, False, False]]
    finer = resize_mask(mask.reshape(1, 16), (4, 4), (8, 8)).reshape(8, 8)
    assert np.array_equal(finer, mask[0].repeat(2, 0).repeat(2, 1))
    assert np.array_equal(resize_mask(mask.reshape(1, 16), (4, 4), (4, 4)), mask.reshape(1, 16))
    oblong = np.arange(8).reshape(1, 8) % 3 == 0  # of 2 × 4: the second column of each pair, the second row
    assert resize_mask(oblong, (2, 4), (1, 2)).tolist() == [[bool(oblong[0, 5]), bool(oblong[0, 7])]]


def test_dinov2_views(photo: np.ndarray):
    cfg = DINOv2Config(local_crops=3, local_size=16)
    view = DINOv2.views(cfg, About(image_size=32, patch_size=4))
    counts = []
    for slot in range(16):
        out = view(sample(photo, slot), generators(slot))
        assert (
            out["global"].shape == (2, 3, 32, 32)
            and out["local"].shape == (3, 3, 16, 16)
            and out["mask"].shape == (2, 64)
        )
        assert out["mask"].dtype == bool and out["global"].dtype == out["local"].dtype == np.uint8
        assert not np.array_equal(out["global"][0], out["global"][1]) and not np.array_equal(
            out["local"][0], out["local"][1]
        )
        counts += out["mask"].sum(1).tolist()
    assert sorted(counts) == [0] * 16 + [int((0.1 + 0.4 * (i + 1) / 16) * 64) for i in range(16)]
    assert DINOv2.views(DINOv2Config(local_crops=0), About(image_size=32, patch_size=4))(sample(photo), generators())[
        "local"
    ].shape == (0, 3, 1, 1)


def test_simclr_cropsdiffer(photo: np.ndarray):
    first, second = SimCLR.views(SimCLRConfig(), About(image_size=32, patch_size=8))(sample(photo), generators())[
        "image"
    ]
    assert first.shape == (3, 32, 32) and not np.array_equal(first, second)


def test_recipes_of_the_objectives(photo: np.ndarray):
    """The number of the generator for each operation, and the operations of the papers: DINO's blur and solarization
    by view; MAE only crops and flips."""
    asked: list[int] = []

    def rng(k: int) -> np.random.Generator:
        asked.append(k)
        return np.random.default_rng([9, k])

    out = DINOv2.views(DINOv2Config(local_crops=2, local_size=16), About(image_size=32, patch_size=4))(
        sample(photo), rng
    )
    assert sorted(asked) == [0, 1, 2, 3, MASKS, MASKS + 1]
    wide = {"scale": (0.32, 1.0), "jitter": JITTER, "gray": 0.2}
    plan = {
        "global": [Augment(32, blur=1.0, **wide), Augment(32, blur=0.1, solarize=0.2, **wide)],
        "local": [Augment(16, (0.05, 0.32), jitter=JITTER, gray=0.2, blur=0.5)] * 2,
    }
    assert all(np.array_equal(value, out[key]) for key, value in crops(sample(photo), plan, rng).items())
    out = SimCLR.views(SimCLRConfig(), About(image_size=32, patch_size=8))(sample(photo), rng)
    plan = {"image": [Augment(32, (0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), gray=0.2, blur=0.5)] * 2}
    assert np.array_equal(crops(sample(photo), plan, rng)["image"], out["image"])
    asked.clear()
    out = MAE.views(MAEConfig(), About(image_size=32, patch_size=4))(sample(photo), rng)
    assert sorted(asked) == [0, MASKS]
    assert np.array_equal(crops(sample(photo), {"image": Augment(32, (0.2, 1.0))}, rng)["image"], out["image"])
