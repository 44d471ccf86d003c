"""The published recipes have the published values, and their schedules equal the published arrays, step by step
(arXiv 2304.07193, 2508.10104)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common.schedules import Schedule
from pretrain.recipes import recipe

DINOV3 = {  # of all stages of the 7B model
    "model.name": "dinov3_vit7b16",
    "model.dim": 4096,
    "model.depth": 40,
    "model.heads": 32,
    "model.mlp": "swiglu",
    "model.mlp_ratio": 2.0,  # 8192 wide
    "model.qkv_bias": False,
    "model.registers": 4,
    "model.local_cls_norm": True,
    "model.norm_eps": 1e-5,
    "model.layer_scale": 1e-5,
    "model.positions": "rope",
    "model.rope_rescale": 2.0,
    "model.rope_base": 100.0,
    "model.drop_path": 0.4,
    "objective.prototypes": 262144,
    "objective.head_hidden": 8192,
    "objective.head_bottleneck": 512,
    "objective.ibot_prototypes": 98304,
    "objective.ibot_hidden": 4096,
    "objective.ibot_bottleneck": 384,
    "objective.unit_prototypes": False,
    "objective.koleo_group": 16,
    "objective.flip": 0.0,
    "optim.weight_decay.value": 0.04,
    "optim.weight_decay.kind": "constant",
    "optim.beta1": 0.9,
    "optim.beta2": 0.99,
    "optim.clip": 30.0,
    "optim.clip_scope": "module",
    "optim.decay_tokens": True,
    "optim.layer_decay": 0.98,
    "optim.patch_embed_lr": 0.2,
}
VIEWS = {  # of all recipes
    "objective.local_crops": 8,
    "objective.global_scale": 0.32,
    "objective.local_scale": 0.05,
    "objective.mask_share": 0.5,
    "objective.mask_ratio_min": 0.1,
    "objective.mask_ratio_max": 0.5,
    "objective.blur": [0.0, 0.9, 0.5],  # as the released models were trained
    "objective.solarize": 0.2,
    "objective.student_temperature": 0.1,
    "objective.koleo_weight": 0.1,
    "objective.ibot_weight": 1.0,
}
VALUES: dict[str, dict[str, Any]] = {
    "dinov3_vitl16_im1k": {
        "steps": 125000,
        "data.batch": 2048,
        "model.name": "dinov3_vitl16",
        "model.dim": 1024,
        "model.depth": 24,
        "model.heads": 16,
        "model.mlp": "gelu",
        "model.mlp_ratio": 4.0,
        "model.image_size": 224,
        "model.registers": 0,
        "model.qkv_bias": True,
        "model.key_bias": True,
        "model.local_cls_norm": False,
        "model.norm_eps": 1e-6,
        "model.rope_rescale": None,
        "model.drop_path": 0.3,
        "objective.local_size": 96,
        "objective.flip": 0.5,
        "objective.prototypes": 65536,
        "objective.head_hidden": 2048,
        "objective.head_bottleneck": 256,
        "objective.ibot_prototypes": None,
        "objective.gram_teacher": "none",
        "optim.beta1": 0.9,
        "optim.beta2": 0.999,
        "optim.clip": 3.0,
        "optim.clip_scope": "module",
        "optim.decay_tokens": True,
        "optim.layer_decay": 0.9,
        "optim.patch_embed_lr": 0.2,
        "optim.freeze_last_layer": 1250,
    },
    "dinov3_vit7b16_pretrain": DINOV3
    | {
        "steps": 1000000,
        "data.batch": 4096,
        "model.image_size": 256,
        "objective.local_size": 112,
        "objective.momentum.value": 0.994,
        "objective.gram_teacher": "none",
        "optim.freeze_last_layer": 5000,
    },
    "dinov3_vit7b16_gram": DINOV3
    | {
        "steps": 200000,
        "data.batch": 4096,
        "model.image_size": 256,
        "objective.local_size": 112,
        "objective.momentum.value": 0.999,
        "objective.gram_size": "auto",  # twice the image size: 512
        "objective.gram_every": 10000,
        "objective.gram_updates": 3,
        "objective.gram_tokens": "all",
        "objective.gram_negatives": "keep",
        "objective.gram_per_image": True,
        "optim.freeze_last_layer": 0,  # long past: the stage goes on from a million steps
    },
    "dinov3_vit7b16_highres": DINOV3
    | {
        "steps": 30000,
        "data.batch": 2048,
        "objective.momentum.value": 0.999,
        "init.weights": "teacher",
        "objective.gram_teacher": "ema",  # that of the stage before, as it was at its end
        "objective.gram_updates": 0,
        "objective.resolutions": [  # the paper's 168 is not a multiple of 16
            [512, 112, 768, 0.3],
            [768, 112, 1152, 0.3],
            [768, 160, 1152, 0.3],
            [768, 224, 1152, 0.05],
            [768, 336, 1152, 0.05],
        ],
        "optim.freeze_last_layer": 0,
    },
    "dinov3_distill_multi": {
        "steps": 25000,
        "data.batch": 1920,
        "model.image_size": 256,
        "model.drop_path": 0.0,
        "model.registers": 4,
        "model.key_bias": False,
        "model.local_cls_norm": False,
        "model.norm_eps": 1e-5,
        "model.rope_rescale": 2.0,
        "objective.loss": "prototypes",
        "objective.koleo_group": 16,  # there, the images of a GPU: 40, 24 and 16
        "objective.local_size": 112,
        "objective.flip": 0.0,
        "optim.beta1": 0.9,
        "optim.beta2": 0.999,
        "optim.clip": 3.0,
        "optim.clip_scope": "module",
        "optim.decay_tokens": True,
        "optim.layer_decay": 0.99,
        "optim.layer_decay_of": "transformers",
        "optim.patch_embed_lr": 0.2,
        "optim.freeze_last_layer": 0,
    },
    "dinov2_vitl14": {
        "steps": 625000,
        "data.batch": 3072,
        "model.dim": 1024,
        "model.depth": 24,
        "model.heads": 16,
        "model.patch_size": 14,
        "model.image_size": 224,
        "model.mlp": "swiglu",
        "model.mlp_ratio": 2736 / 1024,
        "model.layer_scale": 1e-5,
        "model.drop_path": 0.4,
        "objective.local_size": 98,
        "objective.flip": 0.5,
        "objective.prototypes": 131072,
        "objective.head_hidden": 2048,
        "objective.head_bottleneck": 384,
        "objective.ibot_bottleneck": 256,
        "objective.trained_lengths": True,
        "model.position_offset": 0.1,
        "optim.beta1": 0.9,
        "optim.beta2": 0.999,
        "optim.clip": 3.0,
        "optim.clip_scope": "module",
        "optim.decay_tokens": True,
        "optim.layer_decay": 1.0,
        "optim.patch_embed_lr": 0.2,
        "optim.freeze_last_layer": 1250,
    },
}


def value_of(section: Any, key: str) -> Any:
    first, _, rest = key.partition(".")
    value = vars(section)[first]
    return value_of(value, rest) if rest else value


@pytest.mark.parametrize("name", VALUES)
def test_values(name: str):
    cfg = recipe.load(name)
    found = {key: value_of(cfg, key) for key in VIEWS | VALUES[name]}
    assert found == VIEWS | VALUES[name]


def warm(value: float, warmup: int, start: float = 0.0) -> np.ndarray:
    return np.linspace(start, value, warmup)


def half_cosine(first: float, last: float, count: int) -> np.ndarray:
    return last + 0.5 * (first - last) * (1 + np.cos(np.pi * np.arange(count) / count))


def stay(value: float, count: int) -> np.ndarray:
    return np.full(count, value)


MILLION = 1_000_000
SCHEDULES = {  # (recipe, key): the published array
    ("dinov3_vitl16_im1k", "optim.lr"): [warm(4e-3 * 2**0.5, 12500), half_cosine(4e-3 * 2**0.5, 1e-6, 112500)],
    ("dinov3_vitl16_im1k", "optim.weight_decay"): [half_cosine(0.04, 0.4, 125000)],
    ("dinov3_vitl16_im1k", "objective.momentum"): [half_cosine(0.992, 1.0, 125000)],
    ("dinov3_vitl16_im1k", "objective.teacher_temperature"): [warm(0.07, 37500, 0.04), stay(0.07, 87500)],
    ("dinov3_vit7b16_pretrain", "optim.lr"): [warm(4e-4, 100000), stay(4e-4, 900000)],
    ("dinov3_vit7b16_pretrain", "objective.teacher_temperature"): [warm(0.07, 100000, 0.04), stay(0.07, 900000)],
    ("dinov3_vit7b16_pretrain", "objective.momentum"): [stay(0.994, MILLION)],
    ("dinov3_vit7b16_pretrain", "objective.local_weight"): [stay(1.0, MILLION)],
    # ours warms up for 1,000 steps, as its optimizer begins anew
    ("dinov3_vit7b16_gram", "optim.lr"): [warm(2.4e-4, 1000), stay(2.4e-4, 199000)],
    ("dinov3_vit7b16_gram", "objective.gram_weight"): [half_cosine(0.0, 2.0, 1000), stay(2.0, 199000)],
    ("dinov3_vit7b16_gram", "objective.local_weight"): [half_cosine(1.0, 0.5, 1000), stay(0.5, 199000)],
    ("dinov3_vit7b16_gram", "objective.teacher_temperature"): [stay(0.07, 200000)],
    ("dinov3_vit7b16_highres", "optim.lr"): [half_cosine(0.0, 5e-5 * 2**0.5, 10000), stay(7.1e-5, 20000)],
    ("dinov3_vit7b16_highres", "objective.gram_weight"): [stay(1.5, 30000)],
    ("dinov3_vit7b16_highres", "objective.local_weight"): [stay(0.5, 30000)],
    ("dinov3_vit7b16_highres", "objective.teacher_temperature"): [stay(0.07, 30000)],
    ("dinov3_distill_multi", "optim.lr"): [
        half_cosine(0.0, 2e-4 * (1776 / 1024) ** 0.5, 12500),
        stay(2e-4 * (1776 / 1024) ** 0.5, 12500),
    ],
    ("dinov3_distill_multi", "objective.teacher_temperature"): [stay(0.07, 25000)],
    ("dinov3_distill_multi", "optim.weight_decay"): [stay(0.04, 25000)],
    ("dinov3_distill_multi", "objective.momentum"): [half_cosine(0.994, 1.0, 25000)],
    ("dinov2_vitl14", "optim.lr"): [warm(2e-4 * 3**0.5, 100000), half_cosine(2e-4 * 3**0.5, 1e-6, 525000)],
    ("dinov2_vitl14", "optim.weight_decay"): [half_cosine(0.04, 0.2, 625000)],
    ("dinov2_vitl14", "objective.momentum"): [half_cosine(0.994, 1.0, 625000)],
    ("dinov2_vitl14", "objective.teacher_temperature"): [warm(0.07, 37500, 0.04), stay(0.07, 587500)],
}


@pytest.mark.parametrize("name, key", SCHEDULES, ids=str)
def test_schedules(name: str, key: str):
    """Within the change of the published schedule in one step: ours reaches the end of a warm-up, and of a cosine,
    one step later or earlier. Recipes round to seven digits."""
    published = np.concatenate(SCHEDULES[name, key])
    cfg = recipe.load(name)
    schedule = value_of(cfg, key)
    assert isinstance(schedule, Schedule) and len(published) == cfg.steps
    steps = [*range(0, 200), *range(200, cfg.steps, 487), cfg.steps - 1]
    ours = np.array([schedule(step) for step in steps])
    np.testing.assert_allclose(ours, published[steps], rtol=1e-6, atol=1.01 * np.abs(np.diff(published)).max())
