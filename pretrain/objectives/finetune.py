"""Fine-tuning: a pretrained backbone and a linear classifier learn labels, as MAE and BEiT do it (arXiv 2111.06377).

    x̃ = λ x + (1 − λ) x'  (mixup, 1710.09412), or x with a box of x' whose area has the share 1 − λ (CutMix, 1905.04899)
    t = λ t_y + (1 − λ) t_y',  t_y = (1 − ε) onehot(y) + ε / V                              (label smoothing, 1512.00567)
    loss = −Σ_v t_v log softmax(W f(x̃) + b)_v, mean over images;  f: the class token, or the mean of the patches

The backbone starts from `init.backbone`. Learning rates that decrease from block to block are `optim.layer_decay`, drop
path is `model.drop_path`, and a linear probe is `optim.freeze_backbone=STEPS`. With `head_from`, W and b start from a
classifier that was fitted to the same features (LP-FT, 2202.10054). With `lora`, the backbone is frozen, and its linear
layers get trained low-rank updates (2106.09685), which are merged into the weights that are exported. The export is an
image classifier. In the published code x' is the sample at the other end of a GPU's batch, and λ is one
number for this batch; here they belong to pairs of samples, so that they do not depend on the number of GPUs.

Shapes: B images, C channels, S pixels per side, D encoder width, V classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from common.config import Facts, option, option_if
from common.errors import ConfigError, DataError
from data_pipeline.parts.image import Image
from data_pipeline.parts.label import Label
from data_pipeline.parts.part import About
from data_pipeline.views.augmentations import MASKS, Augment, Rng, crops
from data_pipeline.views.mixing import pair_numbers
from data_pipeline.views.rand_augment import RandAugment, erased
from pretrain.interchange.load_record import is_loading
from pretrain.interchange.weight_sources import class_names_of, classifier_of, source_about
from pretrain.objectives.base import Batch, Builder, Exported, Objective, Sample, View
from pretrain.objectives.options import Options, pool_of_backbone
from pretrain.ops.low_rank import add_low_rank, merge_low_rank
from pretrain.ops.precision import wide


def classes_of_data(facts: Facts) -> int | None:
    """the number of classes that the shards name"""
    return facts.classes or None


@dataclass
class Config(Options):
    # V, the number of classes, whose labels are 0 to V − 1; auto: the number of names in the manifest of the shards
    classes: int | Literal["auto"] = option("auto", low=2, auto=classes_of_data)
    # the feature that is classified: the class token, or the mean of the patches; auto: what the export says
    pool: Literal["auto", "cls", "mean"] = option("auto", auto=pool_of_backbone)
    # export whose classifier the head starts from, as `unlabeled eval … logistic logistic.save=FOLDER` writes it; empty:
    # a new head
    head_from: str = ""
    crop_scale: float = option(0.08, above=0, high=1)  # smallest share of the image's area in a random crop
    flip: float = option(0.5, low=0, high=1)  # probability of a horizontal flip
    # magnitude of RandAugment, from 0 to 10; 0: without it
    rand_augment: float = option(9.0, low=0, high=10)
    random_erasing: float = option(0.25, low=0, high=1)  # probability that a rectangle is replaced by noise
    mixup: float = option(0.8, low=0)  # α of mixup; 0: without it
    cutmix: float = option(1.0, low=0)  # α of CutMix; 0: without it. If both are on, each has half of the pairs
    label_smoothing: float = option(0.1, low=0, below=1)  # ε
    # r, the rank of low-rank updates, with which the backbone itself is frozen; null: the whole backbone is trained
    lora: int | None = option(None, low=1)
    lora_alpha: float = option_if(16.0, "lora", unless=None, above=0)  # α of these updates, which are scaled by α / r
    # parts of the dotted names of the linear layers that get an update, such as [qkv, mlp] or [blocks.2]; empty: all
    lora_layers: list[str] = option_if(list, "lora", unless=None)

    def mixes(self) -> bool:
        return bool(self.mixup or self.cutmix)

    def rows(self) -> tuple[int, str]:
        return (2, "objective.mixup=0 objective.cutmix=0") if vars(self)["mixup"] or vars(self)["cutmix"] else (1, "")

    def check_rows(self, rows: int, what: str) -> None:
        if rows % self.rows()[0]:
            raise ValueError(
                f"{what}: is odd, but mixup and CutMix need pairs; write an even number, or {self.rows()[1]}"
            )

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        small = {"objective.classes": 2, "objective.crop_scale": 0.5}
        return [small, {"objective.lora": 2}, {"objective.mixup": 0, "objective.cutmix": 0, "objective.pool": "mean"}]


class FineTune(Objective):
    parts = {"image": Image(), "label": Label()}

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        if cfg.classes == "auto":
            raise ValueError("objective.classes = auto: not all shards name classes; write objective.classes=NUMBER")
        self.backbone = backbone(local_cls_norm=False)  # there are no local crops
        self.head = nn.Linear(self.backbone.embed_dim, cfg.classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # as in the published code of both papers
        nn.init.zeros_(self.head.bias)
        if cfg.head_from and is_loading():
            start_head(self.head, cfg)
        if cfg.lora:
            add_low_rank(self.backbone, cfg.lora, cfg.lora_alpha, cfg.lora_layers)

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        if len(about.classes) > int(cfg.classes):
            count = len(about.classes)
            raise ValueError(
                f"objective.classes = {cfg.classes}: the shards have {count}; write objective.classes={count}"
            )
        if cfg.rand_augment and (about.channels, about.pixel_dtype) != (3, "uint8"):
            raise ValueError(
                f"objective.rand_augment = {cfg.rand_augment:g}: changes the colours of three channels of uint8, not of"
                f" {about.channels} of {about.pixel_dtype}; write objective.rand_augment=0"
            )
        names = class_names_of(cfg.head_from) if cfg.head_from and about.classes else []
        if names and names != [*about.classes]:
            raise ValueError(
                f"objective.head_from = {cfg.head_from}: its classes are {', '.join(names[:5])} …, but those of the shards"
                f" are {', '.join(about.classes[:5])} …; name a classifier that was fitted to these classes"
            )
        augment = Augment(about.image_size, (cfg.crop_scale, 1.0), flip=cfg.flip)
        further = RandAugment(cfg.rand_augment, about.mean) if cfg.rand_augment else None

        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            if not 0 <= sample["label"] < int(cfg.classes):
                raise DataError(
                    f"a sample has the label {sample['label']}, but objective.classes = {cfg.classes}, so that labels"
                    f" are 0 to {int(cfg.classes) - 1}; write objective.classes=NUMBER with the number of classes"
                )
            image = crops(sample, {"image": augment}, rng)["image"]  # [C, S, S]
            if further is not None:
                image = further(image, rng(MASKS))
            image = erased(image, cfg.random_erasing, about.mean, about.std, rng(MASKS + 1))
            mixing = pair_numbers(sample, about.image_size, cfg.mixup, cfg.cutmix) if cfg.mixes() else {}
            return {"image": image, "label": np.array(sample["label"], np.int64), **mixing}

        return view

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, label = batch["image"], batch["label"]  # [B, C, S, S], [B]
        share, other = torch.ones_like(label, dtype=images.dtype), label
        if self.cfg.mixes():
            images, other = mixed(images, batch["mix_share"][:, 0], batch["mix_box"]), swapped(label)
            share = batch["mix_share"][:, 1].to(images.dtype)  # λ
        log_p = wide(self.logits(images)).log_softmax(1)  # [B, V]
        own, others = (log_p.gather(1, index.unsqueeze(1)).squeeze(1) for index in (label, other))  # [B]
        of_labels = share * own + (1 - share) * others
        smoothing = self.cfg.label_smoothing
        loss = -((1 - smoothing) * of_labels + smoothing * log_p.mean(1)).mean()
        larger = torch.where(share >= 0.5, label, other)  # the label with the larger share
        return loss, {"accuracy": (log_p.argmax(1) == larger).float().mean()}

    def logits(self, images: Tensor) -> Tensor:
        """[B, C, S, S] → [B, V]."""
        features = self.backbone(images)
        return self.head(features.cls if self.cfg.pool == "cls" else features.tokens.mean(1))

    def exports(self) -> dict[str, Exported]:
        merged = partial(merge_low_rank, alpha=self.cfg.lora_alpha) if self.cfg.lora else None
        return {"model": Exported(self.backbone, self.cfg.pool, classifier=self.head, merged=merged)}


@torch.no_grad()
def start_head(head: nn.Linear, cfg: Config) -> None:
    """Copy the classifier of the export `cfg.head_from`. Raises ConfigError if it has other classes or another feature."""
    where, pool = f"objective.head_from = {cfg.head_from}", source_about(cfg.head_from)["pool"]
    given = classifier_of(cfg.head_from)
    if given.weight.shape != head.weight.shape:
        raise ConfigError(
            f"{where}: classifies {given.weight.shape[1]} features as {len(given.names)} classes, but this run"
            f" {head.in_features} as {head.out_features}; name a classifier of this backbone and these classes"
        )
    if pool != cfg.pool:
        raise ConfigError(f"{where}: reads the feature {pool}, but this run {cfg.pool}; write objective.pool={pool}")
    head.weight.copy_(given.weight)
    head.bias.copy_(given.bias)


def swapped(x: Tensor) -> Tensor:
    """x [B, …] with the two rows of each pair 2k, 2k + 1 exchanged."""
    if len(x) % 2:
        raise ConfigError(
            f"{len(x)} samples are in one forward of a process, but mixup and CutMix need pairs; write another data.batch"
            " or parallel.micro_batch, or objective.mixup=0 objective.cutmix=0"
        )
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def mixed(images: Tensor, share: Tensor, box: Tensor) -> Tensor:
    """Each image of [B, C, S, S] mixed with the other one of its pair, of which it gets everything inside the box [B, 4]
    (top, bottom, left, right), and 1 − `share` [B] outside."""
    places = torch.arange(images.shape[-1], device=images.device)  # [S]
    top, bottom, left, right = box.unsqueeze(-1).unbind(1)  # [B, 1] each
    rows, columns = (places >= top) & (places < bottom), (places >= left) & (places < right)  # [B, S]
    inside = rows.unsqueeze(2) & columns.unsqueeze(1)  # [B, S, S]
    kept = torch.where(inside, 0.0, share.to(images.dtype)[:, None, None]).unsqueeze(1)  # [B, 1, S, S]
    return kept * images + (1 - kept) * swapped(images)
