"""Masks have exactly the shares that a recipe asks for, however the batch is spread; views equal Pillow's and torchvision's operations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torchvision.transforms.v2 import RandomResizedCrop

from data_pipeline.masks import block_mask, stratified_ratio
from data_pipeline.views import Augment, center, color_jitter, crop_and_flip, random_box, resize
from pretrain.objectives.dinov2 import Config as DINOv2Config
from pretrain.objectives.dinov2 import DINOv2
from pretrain.objectives.mae import MAE
from pretrain.objectives.mae import Config as MAEConfig
from pretrain.objectives.simclr import Config as SimCLRConfig
from pretrain.objectives.simclr import SimCLR


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    from sklearn.datasets import load_sample_image

    return np.ascontiguousarray(load_sample_image("flower.jpg")[100:260, 200:420])  # [160, 220, 3]


def levels(ours: np.ndarray, theirs: torch.Tensor | np.ndarray) -> int:
    """The largest difference of two uint8 images."""
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
    """Masked neighbours are far more frequent than in a random mask of the same count; every place is reached, opposite ones equally often."""
    rng = np.random.default_rng(0)
    masks = np.stack([block_mask((14, 14), 60, rng) for _ in range(2000)])
    together = (masks[:, :, 1:] & masks[:, :, :-1]).sum() / masks[:, :, 1:].sum()
    assert together > 0.6  # at random: 60 / 196
    often = masks.mean(0)
    assert often.min() > 0.02 and often.max() < 0.6 and np.abs(often - often[::-1, ::-1]).max() < 0.06
    same = [block_mask((14, 14), 60, np.random.default_rng(3)) for _ in range(2)]
    assert np.array_equal(*same)


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
    """Bicubic with antialias, the width first; left alone, Pillow picks the cheaper order, which rounds differently."""
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
    """The same distribution of places, areas and aspects: means within five standard errors."""
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
    """The middle of the image with the nearest allowed aspect."""
    params = RandomResizedCrop(32, scale=(1.5, 2.0)).make_params([torch.empty(3, *shape)])
    expected = tuple(params[k] for k in ("top", "left", "height", "width"))
    assert random_box(shape, (1.5, 2.0), np.random.default_rng(0)) == expected


def test_crop_and_flip(photo: np.ndarray):
    mirrored = []
    for seed in range(60):
        ours = crop_and_flip(photo, 24, np.random.default_rng(seed), scale=(0.2, 1.0)).transpose(1, 2, 0)
        top, left, height, width = random_box((160, 220), (0.2, 1.0), np.random.default_rng(seed))
        theirs = pillow(photo[top : top + height, left : left + width], 24, 24)
        mirrored.append(levels(ours, theirs) > 2)
        assert levels(ours, theirs[:, ::-1] if mirrored[-1] else theirs) <= 2
    assert 18 <= sum(mirrored) <= 42


# ---------------------------------------------------------------- colours
def fixed(where: float, random: float = 0.99) -> Any:
    """A stand-in generator: `uniform` gives the value at `where` of its range, `random` always the same, and operations keep their order."""
    return SimpleNamespace(
        permutation=np.arange,
        uniform=lambda low, high: low + where * (high - low),
        random=lambda: random,
        integers=lambda low, high: low,
    )


@pytest.mark.parametrize("where", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
def test_color_operation_equals_torchvision(photo: np.ndarray, operation: str, where: float):
    """Within a level of torchvision on PIL images, which rounds; its tensor operations cut off instead."""
    strength = tuple(0.8 if operation == name else 0.0 for name in ("brightness", "contrast", "saturation", "hue"))
    ours, factor = color_jitter(photo, strength, fixed(where)), 0.2 + 1.6 * where
    adjust = getattr(TF, f"adjust_{operation}")
    assert levels(ours, adjust(Image.fromarray(photo), factor)) <= 1
    assert levels(ours.transpose(2, 0, 1), adjust(channels_first(photo), factor)) <= 2


@pytest.mark.parametrize("where", [0.0, 0.3, 0.45, 0.55, 0.75, 1.0])
def test_hue_equals_torchvision(photo: np.ndarray, where: float):
    """Within two levels on average: hue in 8 bits is a grid of 1.4 degrees, on which torchvision's two paths are up to 9 levels apart too."""
    ours, shift = color_jitter(photo, (0, 0, 0, 0.2), fixed(where)).transpose(2, 0, 1), -0.2 + 0.4 * where
    theirs = TF.adjust_hue(channels_first(photo), shift)
    assert levels(ours, theirs) <= 12 and np.abs(ours.astype(int) - theirs.numpy()).mean() < 2


def test_color_jitter_mixes_the_order_and_respects_its_strength(photo: np.ndarray):
    image, rng = photo[:32, :32], np.random.default_rng(0)
    assert np.array_equal(color_jitter(image, (0, 0, 0, 0), rng), image)
    orders = {tuple(order) for order in (np.random.default_rng(seed).permutation(4) for seed in range(60))}
    assert len(orders) > 15
    grey = color_jitter(
        np.full((4, 4, 3), 100, np.uint8), (0, 0.8, 0.8, 0.2), rng
    )  # no contrast, no colour: nothing to change
    assert levels(grey, np.full((4, 4, 3), 100, np.uint8)) == 0
    means = [color_jitter(np.full((1, 1, 3), 100, np.uint8), (0.4, 0, 0, 0), rng)[0, 0, 0] for _ in range(500)]
    assert min(means) in (60, 61) and max(means) in (139, 140) and abs(np.mean(means) - 100) < 4
    channels_swapped = color_jitter(image[..., ::-1], (0, 0, 0.8, 0), fixed(0.2))[..., ::-1]
    assert levels(channels_swapped, color_jitter(image, (0, 0, 0.8, 0), fixed(0.2))) > 5  # luma knows red from blue


@pytest.mark.parametrize("where", [0.0, 0.3, 1.0])
def test_blur_equals_torchvision(photo: np.ndarray, where: float):
    image, sigma = photo[:48, :48], 0.1 + 1.9 * where
    ours = Augment(48, scale=(1, 1), jitter=(0, 0, 0, 0), gray=0, blur=1)(image, fixed(where))
    assert levels(ours, TF.gaussian_blur(channels_first(image), [9, 9], [sigma, sigma])) <= 1


def test_solarize_and_grey_equal_torchvision(photo: np.ndarray):
    image = photo[:48, :48]
    solarized = Augment(48, scale=(1, 1), jitter=(0, 0, 0, 0), gray=0, solarize=1)(image, fixed(0.5))
    assert levels(solarized, TF.solarize(channels_first(image), 128)) == 0
    grey = Augment(48, scale=(1, 1), jitter=(0, 0, 0, 0), gray=1)(image, fixed(0.5))
    assert levels(grey, np.array(TF.to_grayscale(Image.fromarray(image), 3)).transpose(2, 0, 1)) <= 1
    mirrored = Augment(48, scale=(1, 1), jitter=(0, 0, 0, 0), gray=0)(image, fixed(0.5, random=0.1))
    assert levels(mirrored, channels_first(image[:, ::-1])) == 0


def test_augment_is_its_operations_in_order(photo: np.ndarray):
    augment = Augment(48, scale=(0.3, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), blur=0.5, solarize=0.5, gray=0.3)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        top, left, height, width = random_box((160, 220), (0.3, 1.0), rng)
        image = pillow(photo[top : top + height, left : left + width], 48, 48)
        image = image[:, ::-1] if rng.random() < 0.5 else image
        image = color_jitter(np.ascontiguousarray(image), (0.4, 0.4, 0.2, 0.1), rng) if rng.random() < 0.8 else image
        tensor = channels_first(image)
        tensor = TF.rgb_to_grayscale(tensor, 3) if rng.random() < 0.3 else tensor
        if rng.random() < 0.5:
            sigma = rng.uniform(0.1, 2.0)
            tensor = TF.gaussian_blur(tensor, [9, 9], [sigma, sigma])
        tensor = TF.solarize(tensor, 128) if rng.random() < 0.5 else tensor
        ours = augment(photo, np.random.default_rng(seed))
        assert np.abs(ours.astype(int) - tensor.numpy()).mean() < 1 and levels(ours, tensor) < 16, seed


# ---------------------------------------------------------------- views of the objectives
def sample(photo: np.ndarray, slot: int = 0, step: int = 0) -> dict:
    return {"image": photo, "id": 1, "epoch": 0, "slot": slot, "batch": 16, "step": step, "seed": 5}


def test_mae_keeps_a_uniform_subset(photo: np.ndarray):
    view, rng = MAE.views(MAEConfig(), 32, 4), np.random.default_rng(0)  # 64 patches
    kept = [view(sample(photo), rng)["keep"] for _ in range(400)]
    assert all(len(keep) == len(set(keep.tolist())) == 16 for keep in kept)
    often = np.bincount(np.concatenate(kept), minlength=64) / 400
    assert np.abs(often - 0.25).max() < 0.1  # 4.6 standard deviations
    together = np.mean([{0, 1} <= set(keep.tolist()) for keep in kept])
    assert together == pytest.approx(0.25 * 15 / 63, abs=0.05)


def test_dinov2_views(photo: np.ndarray):
    cfg = DINOv2Config(local_crops=3, local_size=16)
    view = DINOv2.views(cfg, 32, 4)
    counts = []
    for slot in range(16):
        out = view(sample(photo, slot), np.random.default_rng(slot))
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


def test_simclr_cropsdiffer(photo: np.ndarray):
    first, second = SimCLR.views(SimCLRConfig(), 32, 8)(sample(photo), np.random.default_rng(0))["image"]
    assert first.shape == (3, 32, 32) and not np.array_equal(first, second)
