"""The base class of all objectives. `pretrain/objectives/finder.py` says how one is found; `mae.py` is one to start
from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor, nn

from common.config import ConfigError, Section
from data_pipeline.parts.image import Image
from data_pipeline.parts.part import About, Part
from data_pipeline.views.augmentations import Rng
from pretrain.models.layers import Backbone
from pretrain.ops.cross_entropy import IGNORED

Batch = dict[str, Tensor]
# One entry for each of the objective's parts, as the part's `decode` returns it, and: "id", "epoch", "seed", "step",
# "batch" (the global batch size), "slot" (the sample's index in the global batch). A row of tokens has "tokens" int64
# [T + 1] and "documents" int32 [T + 1]: the number of each token's document, counted from 0 in each row, −1 for
# padding.
Sample = dict[str, Any]
View = Callable[[Sample, Rng], dict[str, np.ndarray]]  # from one sample to its arrays of the batch


class Builder(Protocol):
    """Builds a new network at each call.

    `backbone(**changes)` builds the recipe's model with some of its options changed; `backbone("text", **changes)`
    builds the model that the section `text` of the objective's Config describes.
    """

    def __call__(self, section: str = "", **changes: Any) -> Backbone: ...


@dataclass
class Exported:
    """A backbone that is evaluated and exported, and the feature that represents a sample: the class token or the mean
    of the tokens."""

    backbone: Backbone
    pool: Literal["cls", "mean"] = "cls"


class Objective(nn.Module):
    """One method: the views of a sample, the loss, and the work after a step (for example a moving average).

    `forward` is a pure function of batch, step and weights: all randomness comes with the batch, except dropout and
    drop path.
    """

    # True where the loss of a sample depends on the others of its batch: gradient accumulation then needs
    # parallel.accumulate_coupled.
    couples_batch = False
    least_batch = 1  # the smallest number of samples in one forward, over all ranks, with which the loss has a gradient
    # A scalar on the device: 1 where the optimizer skipped the step before `after_step`, which then must change
    # nothing.
    skipped: Tensor | None = None
    parts: dict[str, Part] = {"image": Image()}  # the members of a sample; the first one opens the datasets
    made_of: dict[str, str] = {}  # {tensor of the batch: the part that it is made from}, where the names differ
    validates = False  # whether the loss on held-out data (`eval.val`) is logged while the run trains
    # The tensor of the batch that holds targets, −100 where there is none. If given, the loss is the mean over the
    # targets of the global batch.
    counted: str | None = None
    # Prefixes of tensors that may be missing from, or extra in, the checkpoint of `init.run`.
    fresh: tuple[str, ...] = ()
    # The exported sub-module, for checkpoints of earlier versions, which do not store its name.
    encoder_name = "backbone"

    def __init__(self, cfg: Any, backbone: Builder) -> None:
        super().__init__()
        self.cfg = cfg.settled() if isinstance(cfg, Section) else cfg

    @staticmethod
    def views(cfg: Any, about: About) -> View:
        """The function `view(sample, rng)` that data workers call for each sample. Raises ValueError for sizes that do
        not fit together.

        `rng(k)` is the sample's k-th random generator: `crops` uses 0, 1, 2, ... for its views, masks use those from
        `MASKS` on (data_pipeline/views/augmentations.py).

        The function may be an object that also has `collate(arrays)`: it gets the stacked arrays of a micro-batch, [B,
        …] each, and returns further ones, which are not one row for each sample. The data workers call it too: it is
        the place for what the device could only tell by a host sync, such as the indices of masked patches.
        """
        raise NotImplementedError

    def started(self, loaded: set[str]) -> None:
        """Called before the first step of a new run. `loaded`: names of the tensors that `init.run` has filled.

        Raises ValueError where a tensor that the method needs was not loaded.
        """

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(scalar loss, detached scalars to log)."""
        raise NotImplementedError

    def mean(self, total: Tensor, batch: Batch) -> Tensor:
        """From the sum of a micro-batch's losses to its share of the mean over the targets of the global batch, a
        scalar.

        The engine puts the number of targets per micro-batch into `batch["count"]`; without it the mean is over this
        micro-batch.
        """
        return total / batch["count"] if "count" in batch else total / self.count(batch).clamp_min(1)

    def count(self, batch: Batch) -> Tensor:
        """The number of targets of a micro-batch, a scalar."""
        return (batch[self.counted or "targets"] != IGNORED).sum()

    def after_step(self, step: int) -> None:
        """Called after the optimizer's step, for example to update a teacher or a queue. Where `self.skipped` is 1, it
        must change nothing (`ema_update` takes `skipped`)."""

    def exports(self) -> dict[str, Exported]:
        """The backbones to evaluate and export, by name: "model" is written to RUN/export/STEP, others to
        RUN/export/NAME/STEP."""
        raise NotImplementedError

    def encoder(self) -> Backbone:
        """The backbone that is exported as "model"."""
        found = self.exports()
        if "model" not in found:
            raise ConfigError(f'exports() names {", ".join(found) or "nothing"}; name the recipe\'s model "model"')
        return found["model"].backbone

    def encoder_path(self) -> str:
        """The dotted module name of `encoder()`: the prefix of its tensors in a checkpoint."""
        encoder = self.encoder()
        return next(name for name, module in self.named_modules() if module is encoder)

    def shard_units(self) -> list[nn.Module]:
        """The modules whose parameters a sharded engine gathers one at a time: children before parents, the objective
        itself last."""

        def below(module: nn.Module) -> Iterator[nn.Module]:
            for child in module.children():
                if isinstance(child, Backbone):
                    yield from child.shard_units()
                elif isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                    yield from below(child)
                elif any(True for _ in child.parameters()):
                    yield child

        return [*below(self), self]

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """{name: picture, uint8 [3, H, W]} of what the method does with a batch, drawn at every export. The batch's
        images are normalised."""
        return {}
