"""The base class of an objective's `Config`, options that several methods share, and the rules that replace `auto` by a
value.

This module does not import torch, because a recipe is checked before torch is imported. The published recipes are for a
million images and batches of thousands. For such runs the rules give the published values; they adapt them to less
data, smaller batches and shorter runs. They are rules of thumb; the log names the chosen values.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from common.config import Facts, Section, option
from common.schedules import Schedule
from pretrain.models import presets


class Options(Section):
    """Base class of every objective's `Config`. Its methods tell other modules what they have to know about the method;
    a subclass overrides those whose default does not fit."""

    # {logged quantity that reveals a collapse: advice which options to change}
    remedies: ClassVar[dict[str, str]] = {}

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        """Overrides of a recipe, by dotted key, with which a test trains this objective in seconds, on a small ViT or
        on the `model` that they name.

        The first entry is complete. Each further entry is merged into the first one, to test options that the first
        does not use. In a value, "{export}" stands for the folder of an exported ViT, and "{run NAME}" for the folder
        of a run of the objective NAME.
        """
        return [{}]

    def assignments(self) -> int | None:
        """K, the number of classes to which images are assigned, if the objective logs `teacher_entropy`, whose maximum
        is ln K. Otherwise None."""
        return None

    def rows(self) -> tuple[int, str]:
        """(n, override): the number of samples in one forward, over all ranks, must be a multiple of n, unless the
        recipe has the override."""
        return 1, ""

    def check_rows(self, rows: int, what: str) -> None:
        """Raises ValueError if the options do not fit `rows`, the number of samples in one forward over all ranks.
        `what`: a description of these samples for the message."""


def pool_of_backbone(facts: Facts) -> str:
    """the feature that the export of init.backbone states, otherwise cls"""
    return facts.backbone().get("pool") or "cls"


def network(name: str, **changes: Any) -> Any:
    """A field of a Config that holds a further model: the preset `name` with `changes`, unless the recipe sets it.
    `backbone("FIELD")` builds it.

    In a Config:  text: Section = network("bert_micro", depth=4)
    In a recipe:  objective: {text: {name: bert_base, depth: 6}}, or objective.text=bert_base
    """

    def default() -> Section:
        cls, values = presets.choose(name)
        section = cls(**(values | changes))
        section.name, section._defaults = name, values | changes
        return section

    return dataclasses.field(default_factory=default, metadata={"choose": presets.choose})


# ---------------------------------------------------------------- what `auto` becomes
def inherited(facts: Facts) -> Any:
    """The value of the same option in the run that this one starts from (`init.run`)."""
    return facts.previous_run().get(facts.key)


def prototypes(facts: Facts) -> int:
    """min(samples / 20, 64 · batch, 262144), rounded to a power of two, at least 256.

    This is 65,536 for ImageNet's 1.28 M images, and at most 262,144, which DINOv3 has at batch 4,096.
    """
    wanted = max(256, min(facts.samples / 20, 64 * facts.batch, 262144))
    return 2 ** round(math.log2(wanted))


def momentum(facts: Facts) -> Schedule:
    """From 1 − max(0.004 · batch / 1024, 20 / steps) to 1 − 20 / steps by a cosine, each between 0.5 and 0.9999.

    0.004 is DINO's rate at batch 1,024, with the same half-life in samples at other batches. The teacher is an average
    over at most a twentieth of the run, also at its end: with a final value of 1, the weights of the last teacher of a
    short run would be those of the middle of the run.
    """
    least = min(0.5, max(20 / facts.steps, 1e-4))
    first = min(0.5, max(0.004 * facts.batch / 1024, least))
    return Schedule(1 - first, kind="cosine", final=1 - least, steps=facts.steps)


def small_data(facts: Facts) -> bool:
    """True with fewer than 100,000 samples."""
    return facts.samples < 100_000


def temperature(facts: Facts) -> Schedule:
    """From 0.04 to 0.07 over 30 epochs, but at most 30 % of the run; to 0.05 with fewer than 100,000 samples."""
    length = max(1, round(min(0.3 * facts.steps, 30 * facts.samples / facts.batch)))
    value = 0.07 if facts.samples >= 100_000 else 0.05
    return Schedule(value, start=0.04, warmup=float(length), steps=facts.steps)


def log_share_of_partners(facts: Facts) -> float:
    """max(−10, −ln batch): the logarithm of the share of pairs that are partners; −10 from a batch of 22,026 on.

    A lower bias makes all pairs too improbable. The loss then draws images and captions to one common direction, in
    which the models are constant, and from there they do not learn: with −10 at a batch of 128, the loss stays at that
    of constant predictions.
    """
    return max(-10.0, -math.log(facts.batch))


def sinkhorn_temperature(facts: Facts) -> Schedule:
    """0.025 with fewer than 100,000 samples, else as `temperature`.

    At higher temperatures, the assignments of Sinkhorn-Knopp are nearly uniform in the first hundred steps.
    """
    return Schedule(0.025, steps=facts.steps) if small_data(facts) else temperature(facts)


# ---------------------------------------------------------------- options that methods share
def check_each(key: str, values: list[float], of: tuple[str, ...]) -> None:
    """Raises ValueError unless there is one value for each of `of`."""
    if len(values) != len(of):
        raise ValueError(f"objective.{key} = {values}: write {len(of)} numbers, for {', '.join(of)}")


def check_range(key: str, values: list[float]) -> None:
    """Raises ValueError unless the option holds the smallest and the largest value of a range."""
    if len(values) != 2 or values[0] > values[1]:
        raise ValueError(f"objective.{key} = {values}: write two numbers, the smaller one first")


@dataclass
class TwoViews(Options):
    """Two views of an image with the augmentations of BYOL (data_pipeline/views/two_views.py)."""

    remedies = {name: "compare the augmentations and the width of the heads" for name in ("feature_std", "rank")}

    crop_scale: float = option(0.08, above=0, high=1)  # smallest share of the image's area in a random crop
    # strengths of the colour jitter: brightness, contrast, saturation, hue
    jitter: list[float] = option(lambda: [0.4, 0.4, 0.2, 0.1], low=0)
    blur: list[float] = option(lambda: [1.0, 0.1], low=0, high=1)  # probability of a blur in the first and second view
    solarize: list[float] = option(lambda: [0.0, 0.2], low=0, high=1)  # the same of an inversion of bright pixels
    flip: float = option(0.5, low=0, high=1)  # probability of a horizontal flip

    def check(self) -> None:
        check_each("jitter", self.jitter, JITTER)
        for key in ("blur", "solarize"):
            check_each(key, getattr(self, key), ("the first view", "the second view"))


@dataclass
class MaskedBlocks(Options):
    """A crop with colour jitter and the block masks of BEiT (`block_mask` in data_pipeline/views/masks.py)."""

    mask_ratio: float = option(0.4, above=0, below=1)  # share of the patches that are masked
    smallest_block: int = option(16, low=1)  # smallest number of patches in a block
    crop_scale: float = option(0.08, above=0, high=1)  # smallest share of the image's area in a random crop
    # strengths of the colour jitter: brightness, contrast, saturation, hue
    jitter: list[float] = option(lambda: [0.4, 0.4, 0.4, 0.0], low=0)

    def check(self) -> None:
        check_each("jitter", self.jitter, JITTER)

    def masked_patches(self, side: int) -> int:
        """The number of masked patches of an image of side × side. Raises ValueError if there are none."""
        count = int(self.mask_ratio * side * side)
        if not count:
            raise ValueError(f"objective.mask_ratio = {self.mask_ratio}: masks none of {side}×{side} patches")
        return count


@dataclass
class MaskedAutoencoder(Options):
    """A ViT that encodes some patches of its input, and a decoder that predicts the others."""

    mask_ratio: float = option(0.75, above=0, below=1)  # share of the patches that the encoder does not see
    decoder_dim: int = option(512, low=1)  # width of the decoder
    decoder_depth: int = option(8, low=1)  # number of blocks of the decoder
    decoder_heads: int = option(16, low=1)  # number of attention heads in each of these blocks
    norm_pix: bool = True  # whether the pixels to predict are normalised per patch

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        return [{"objective.decoder_dim": 32, "objective.decoder_depth": 1, "objective.decoder_heads": 2}]


@dataclass
class ImageTextPairs(Options):
    """A crop of an image and its caption (data_pipeline/views/image_text.py), and whether the image model is trained."""

    crop_scale: float = option(0.9, above=0, high=1)  # smallest share of the image's area in a random crop
    flip: float = option(0.0, low=0, high=1)  # probability of a horizontal flip
    # share of the patches that the image model does not see, new ones in each epoch; 0.5 and 0.75 in FLIP
    patch_drop: float = option(0.0, low=0, below=1)
    locked: bool = False  # whether the image model is not trained; `init.backbone` names its weights


@dataclass
class SigmoidPairs(ImageTextPairs):
    """The pairs of SigLIP (`pretrain.ops.contrastive.sigmoid_pairs`), and the model that reads captions."""

    text: Section = network("siglip_text")  # the model that reads captions
    initial_scale: float = option(10.0, above=0)  # t at the beginning
    # b at the beginning, when almost all pairs are no partners; published: -10
    initial_bias: float | Literal["auto"] = option("auto", auto=log_share_of_partners, former_default=-10.0)

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        text = {"name": "siglip_text", "dim": 32, "depth": 2, "heads": 2, "vocab_size": 512, "context": 24}
        first = {"data.length": 24, "objective.text": text, "model.pooling": "attention"}
        return [first, {"objective.patch_drop": 0.5}]


JITTER = ("brightness", "contrast", "saturation", "hue")


@dataclass
class Crops(Options):
    """Two global crops and n local crops (data_pipeline/views/multicrop.py)."""

    local_crops: int = option(8, low=0)  # number of local crops of each image, in addition to two global crops
    local_size: int = option(96, low=1)  # side of a local crop in pixels
    global_scale: float = option(0.32, above=0, high=1)  # smallest share of the image's area in a global crop
    local_scale: float = option(0.05, above=0, high=1)  # smallest share in a local crop; its largest is `global_scale`
    # probability that the first global crop, the second global crop and a local crop are blurred; the released models
    # have 0, 0.9, 0.5
    blur: list[float] = option(lambda: [1.0, 0.1, 0.5], low=0, high=1)
    # strengths of the colour jitter: brightness, contrast, saturation, hue
    jitter: list[float] = option(lambda: [0.4, 0.4, 0.2, 0.1], low=0)
    solarize: float = option(0.2, low=0, high=1)  # probability that the second global crop is solarized
    flip: float = option(0.5, low=0, high=1)  # probability of a horizontal flip; DINOv3's 7B model has 0

    def check(self) -> None:
        check_each("blur", self.blur, ("the first global crop", "the second one", "the local crops"))
        check_each("jitter", self.jitter, JITTER)
        self.check_order("local_scale", "global_scale")

    def check_order(self, low: str, high: str) -> None:
        """Raises ValueError if the option `low` is above the option `high`."""
        smallest, largest = getattr(self, low), getattr(self, high)
        if smallest > largest:
            raise ValueError(f"objective.{low} = {smallest}: must be at most objective.{high} = {largest}")


@dataclass
class MultiCrop(Crops):
    """Two global crops, n local crops, and block masks on the global crops (data_pipeline/views/multicrop.py)."""

    mask_share: float = option(0.5, low=0, high=1)  # share of the global crops that are masked
    mask_ratio_min: float = option(0.1, low=0, high=1)  # smallest share of masked patches in a masked crop
    # largest share of masked patches; each masked crop draws its share between the two
    mask_ratio_max: float = option(0.5, low=0, high=1)

    def check(self) -> None:
        super().check()
        self.check_order("mask_ratio_min", "mask_ratio_max")


@dataclass
class SelfDistillation(MultiCrop):
    """Options of the DINO, iBOT and KoLeo losses, where a teacher assigns crops and patches to prototypes."""

    remedies = {
        "teacher_entropy": "lower objective.teacher_temperature or the number of prototypes",
        "feature_std": "raise objective.momentum or objective.koleo_weight",
        "rank": "raise objective.momentum or objective.koleo_weight",
    }

    student_temperature: float = option(0.1, above=0)  # the student's logits are divided by it before the softmax
    # the teacher's logits are divided by it
    teacher_temperature: Literal["auto"] | Schedule = option(
        lambda: Schedule(0.07, start=0.04, warmup=0.1), above=0, auto=sinkhorn_temperature
    )
    # momentum of the teacher: the share of its weights that it keeps in a step (EMA)
    momentum: Literal["auto"] | Schedule = option(lambda: Schedule(0.994), low=0, high=1, auto=momentum)
    ibot_weight: float = 1.0  # weight of the iBOT loss on masked patches; the DINO loss has 1
    koleo_weight: float = 0.1  # weight of KoLeo, which spreads the class tokens of a batch
    # number of images in a group, within which KoLeo compares them; null: the whole batch. The papers use each GPU's
    # batch
    koleo_group: int | None = option(None, low=2)

    def neighbours(self) -> int:
        """The number of nearest neighbours in a group that KoLeo uses."""
        return 1

    def check(self) -> None:
        super().check()
        if self.koleo_group is not None and self.neighbours() >= self.koleo_group:
            raise ValueError(
                f"objective.koleo_neighbours = {self.neighbours()}: must be less than"
                f" objective.koleo_group = {self.koleo_group}"
            )

    def rows(self) -> tuple[int, str]:
        return vars(self)["koleo_group"] or 1, "objective.koleo_group=null"

    def check_rows(self, rows: int, what: str) -> None:
        """KoLeo's groups are made of the images in one forward, over all ranks."""
        group = vars(self)["koleo_group"]
        if group is None and self.neighbours() >= max(rows, 2):
            raise ValueError(
                f"objective.koleo_neighbours = {self.neighbours()}: must be less than the images of {what}"
            )
        if group is not None and rows % group:
            raise ValueError(
                f"objective.koleo_group = {group}: does not divide {what};"
                " write a divisor, or null for one group of all"
            )


@dataclass
class DINOHeadOptions(Options):
    """The head of DINO, whose outputs are products with prototypes (`pretrain.ops.heads.PrototypeHead`)."""

    # K, the number of outputs of the DINO head
    prototypes: int | Literal["auto"] = option(65536, low=1, auto=(inherited, prototypes))
    head_hidden: int = option(2048, low=1)  # width of the head's hidden layers
    head_bottleneck: int = option(256, low=1)  # width of the layer before the prototypes
    # whether batch norms follow the layers of the head; auto: with fewer than 100,000 samples
    head_norms: bool | Literal["auto"] = option(False, auto=(inherited, small_data))

    def assignments(self) -> int | None:
        count = vars(self)["prototypes"]
        return count if isinstance(count, int) else None

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        heads = {"objective.prototypes": 64, "objective.head_hidden": 64, "objective.head_bottleneck": 32}
        return [{**heads, "objective.local_size": 16, "objective.local_crops": 2}]


@dataclass
class PrototypeHeads(SelfDistillation, DINOHeadOptions):
    """Self-distillation with a DINO head and an iBOT head that the run trains (DINOv2, DINOv3)."""

    # number of outputs of the iBOT head; null: that of the DINO head
    ibot_prototypes: int | None = option(None, low=1)
    # width of the hidden layers of the iBOT head; null: that of the DINO head
    ibot_hidden: int | None = option(None, low=1)
    # width of the iBOT head's layer before the prototypes; null: that of the DINO head
    ibot_bottleneck: int | None = option(None, low=1)
