"""SigLIP 2: SigLIP, a decoder that writes the captions, and self-distillation with masked patches (arXiv 2502.14786).

    loss = L_sigmoid + w_c L_caption + w_s L_consistency + w_m L_masked
    L_sigmoid      of pairs, as in `siglip.py`                                                          (2303.15343)
    L_caption      = mean over tokens of −log p(token | patches, earlier tokens); for a share of the captions
                     p(token | patches), all tokens in parallel                                         (2403.19596)
    L_consistency  = mean over local crops v of H(P_t(f_θ'(global crop)), P_s(f_θ(v)))                  (2310.13355)
    L_masked       = mean over masked patches of H(P_t(patch of f_θ'(global crop)), P_s(patch of f_θ(masked crop)))
                                                                                          (2410.16512, 2111.07832)
    P_s = softmax(g_θ(·) / τ_s);  P_t = softmax((g_θ'(·) − c) / τ_t);  H(p, q) = −Σ p log q;  c: mean of g_θ'
    after each step: θ' ← m θ' + (1 − m) θ, with a constant m

The self-distillation, which the paper adds for the last 20 % of the training, is on with `distillation`: a second run
with `init.run` begins with it, and its teacher with the student's weights. Of LocCa's tasks, those that need boxes are
left out. Shapes: B images with captions of T tokens, L local crops, N patches, M masked ones, D width, K prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.config import option, option_if
from common.schedules import Schedule
from data_pipeline.parts.caption import CaptionTokens
from data_pipeline.parts.part import About
from data_pipeline.views.augmentations import MASKS, Augment, Rng
from data_pipeline.views.image_text import ImageText
from data_pipeline.views.multicrop import PART_OF
from pretrain.models.caption_decoder import CaptionDecoder
from pretrain.objectives import siglip
from pretrain.objectives.base import Batch, Builder, Sample, View
from pretrain.objectives.options import DINOHeadOptions, SigmoidPairs, check_each
from pretrain.ops.center import Center
from pretrain.ops.contrastive import sigmoid_pairs
from pretrain.ops.cross_entropy import IGNORED
from pretrain.ops.ema import ema_update, make_teacher
from pretrain.ops.heads import PrototypeHead
from pretrain.ops.patchify import mask_at, pick
from pretrain.ops.precision import unit, wide
from pretrain.ops.self_distillation import health

MASKED, PARALLEL = MASKS + 2, MASKS + 3  # numbers of generators
HEADS = {"cls": "consistency", "patch": "masked"}


@dataclass
class Config(SigmoidPairs, DINOHeadOptions):
    remedies = {
        "teacher_entropy": "lower objective.teacher_temperature or the number of prototypes",
        **{name: "raise objective.momentum" for name in ("feature_std", "rank")},
    }

    caption_weight: float = option(1.0, low=0)  # w_c; 0: no decoder
    decoder_depth: int = option_if(6, "caption_weight", unless=0, low=1)  # blocks of the decoder, as wide as `text`
    # share of the captions whose tokens are predicted in parallel
    parallel_share: float = option_if(0.5, "caption_weight", unless=0, low=0, high=1)
    distillation: bool = False  # whether the loss has the last two terms
    consistency_weight: float = option_if(1.0, "distillation", True, low=0)  # w_s
    masked_weight: float = option_if(0.25, "distillation", True, low=0)  # w_m
    mask_ratio: float = option_if(0.5, "distillation", True, above=0, below=1)  # share of the patches that are masked
    local_crops: int = option_if(8, "distillation", True, low=1)  # L
    local_size: int = option_if(96, "distillation", True, low=1)  # side of a local crop in pixels
    global_scale: float = option_if(0.4, "distillation", True, above=0, high=1)  # smallest area of the global crop
    local_scale: float = option_if(
        0.05, "distillation", True, above=0, high=1
    )  # of a local one; its largest: the above
    # strengths of the colour jitter of these crops: brightness, contrast, saturation, hue
    jitter: list[float] = option_if(lambda: [0.4, 0.4, 0.2, 0.1], "distillation", True, low=0)
    student_temperature: float = option_if(0.1, "distillation", True, above=0)  # τ_s
    teacher_temperature: float = option_if(0.04, "distillation", True, above=0)  # τ_t
    momentum: Schedule = option_if(lambda: Schedule(0.996), "distillation", True, low=0, high=1)  # m
    center_momentum: float = option_if(0.9, "distillation", True, low=0, high=1)  # share of c that a step keeps

    def check(self) -> None:
        if self.distillation:
            check_each("jitter", self.jitter, ("brightness", "contrast", "saturation", "hue"))
        if self.distillation and self.locked:
            raise ValueError("objective.distillation = true: trains the image model; write objective.locked=false")

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        heads = {f"objective.{k}": v for k, v in (("prototypes", 64), ("head_hidden", 64), ("head_bottleneck", 32))}
        crops = {"objective.local_crops": 2, "objective.local_size": 16, "objective.distillation": True}
        first = {**SigmoidPairs.tiny()[0], "objective.decoder_depth": 1, **heads, **crops}
        return [first, {"objective.patch_drop": 0.5}]


class SigLIP2(siglip.SigLIP):
    target_name = "targets"
    part_of = PART_OF
    reinitialized = ("heads.", "teacher.", "teacher_heads.", "centers.", "decoder.", "image.mask_token")

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone, mask_token=cfg.distillation)
        text, dim = cfg.text, self.image.embed_dim
        sizes = (text.vocab_size, text.context, self.text.embed_dim, dim)
        self.decoder = CaptionDecoder(*sizes, cfg.decoder_depth, text.heads) if cfg.caption_weight else None
        if cfg.distillation:
            head = (cfg.head_hidden, cfg.head_bottleneck, cfg.prototypes)
            self.heads = nn.ModuleDict({name: PrototypeHead(dim, *head, batch_norms=cfg.head_norms) for name in HEADS})
            self.teacher = make_teacher(self.image).eval()
            self.teacher_heads = make_teacher(self.heads, batch_statistics=True).eval()
            self.centers = nn.ModuleDict({name: Center(cfg.prototypes) for name in HEADS})
            self.kept_in_eval = (*self.kept_in_eval, "teacher", "teacher_heads")
            self.averaged = {"image": "teacher", "heads": "teacher_heads"}

    @staticmethod
    def views(cfg: Config, about: About) -> View:  # type: ignore[override]
        tokens, size = CaptionTokens(about, cfg.text, "objective.text"), about.image_size
        augment, further = Augment(size, scale=(cfg.crop_scale, 1.0), flip=cfg.flip), dict[str, list[Augment]]()
        if cfg.distillation:
            if cfg.local_size % about.patch_size:
                raise ValueError(
                    f"objective.local_size = {cfg.local_size}: write a multiple of model.patch_size = {about.patch_size}"
                )
            more: Any = {"jitter": tuple(cfg.jitter), "gray": 0.2, "flip": cfg.flip}
            further["global"] = [Augment(size, scale=(cfg.global_scale, 1.0), **more)]
            further["local"] = [Augment(cfg.local_size, (cfg.local_scale, cfg.global_scale), **more)] * cfg.local_crops
        pairs, patches = (
            ImageText(augment, about.patch_size, tokens, cfg.patch_drop, further),
            (size // about.patch_size) ** 2,
        )

        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            out = pairs(sample, rng)
            real = np.arange(len(out["tokens"])) <= out["last"]
            out["targets"] = np.where(real, out["tokens"], IGNORED)
            if cfg.caption_weight:
                out["parallel"] = np.asarray(rng(PARALLEL).random() < cfg.parallel_share)
            if cfg.distillation:
                out["masked"] = np.sort(rng(MASKED).permutation(patches)[: max(1, int(cfg.mask_ratio * patches))])
            return out

        return view

    def before_first_step(self, loaded: set[str]) -> None:
        super().before_first_step(loaded)
        for trained, average in self.averaged.items():
            if not any(name.startswith(f"{average}.") for name in loaded):
                ema_update(self.get_submodule(average), self.get_submodule(trained), momentum=0.0)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.image(batch["image"], keep=batch.get("keep"))
        text = self.text(batch["tokens"]).tokens[:, -1]
        scale, bias = self.logit_scale.exp(), self.logit_bias
        loss = sigmoid_pairs(unit(features.cls), unit(self.text_projection(text)), scale, bias)
        logs = {"scale": scale.squeeze(0), "bias": bias.squeeze(0), "sigmoid": loss}
        if self.decoder is not None:
            total = self.decoder(batch["tokens"], batch["targets"], batch["parallel"], features.tokens)
            logs["caption"] = self.mean(total, batch)
            loss = loss + self.cfg.caption_weight * logs["caption"]
        if self.cfg.distillation:
            logs |= self.distilled(batch, step)
            loss = loss + self.cfg.consistency_weight * logs["consistency"] + self.cfg.masked_weight * logs["masked"]
        return loss, {name: value.detach() for name, value in logs.items()}

    def distilled(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """{"consistency", "masked"}: the losses, and scalars that reveal a collapse."""
        images, local, masked = batch["global"].flatten(0, 1), batch["local"].flatten(0, 1), batch["masked"]
        with torch.no_grad():
            taught = self.teacher(images)
            rows = {"cls": taught.cls, "patch": pick(taught.tokens, masked).flatten(0, 1)}  # [B, D], [B·M, D]
            p = {name: self.assignments(name, x, step) for name, x in rows.items()}
        masks = [mask_at(masked, taught.tokens.shape[1]), None]
        whole, small = self.image([images, local], mask=masks)
        own = {"cls": small.cls, "patch": pick(whole.tokens, masked).flatten(0, 1)}  # [B·L, D], [B·M, D]
        temperature = self.cfg.student_temperature
        terms = {HEADS[name]: self.heads[name](x, p[name], temperature) / len(x) for name, x in own.items()}
        return terms | health(taught.cls, p["cls"])

    def assignments(self, name: str, x: Tensor, step: int) -> Tensor:
        """P_t [R, K] of the teacher's features x [R, D]."""
        outputs = wide(self.teacher_heads[name](x))
        center: Any = self.centers[name]
        center.hold(outputs, step)
        return ((outputs - center.mean) / self.cfg.teacher_temperature).softmax(-1)

    def after_step(self, step: int) -> None:
        for trained, average in self.averaged.items():
            ema_update(self.get_submodule(average), self.get_submodule(trained), self.cfg.momentum(step), self.skipped)
        for center in self.centers.children() if self.averaged else ():
            center.update(step, self.cfg.center_momentum, self.skipped)  # type: ignore[operator]
