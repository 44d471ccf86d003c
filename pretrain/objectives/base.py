"""The base class of all objectives. `pretrain/objectives/finder.py` finds objectives by name; `mae.py` is a good
example to begin with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.config import Section
from common.errors import ConfigError
from data_pipeline.parts.image import Image
from data_pipeline.parts.part import About, Part
from data_pipeline.views.augmentations import Rng
from pretrain.models.layers import Backbone
from pretrain.models.text_side import PREFIX, TextSide
from pretrain.ops.cross_entropy import IGNORED
from pretrain.ops.ema import ema_update

Batch = dict[str, Tensor]
# One entry for each of the objective's parts, as the part's `decode` returns it, and: "id", "epoch", "seed", "step",
# "batch" (the global batch size), "slot" (the sample's index in the global batch). A row of text has "tokens", int64
# [T + 1], and "documents", int32 [T + 1]: for each token the number of its document, counted from 0 in each row; −1 for
# padding.
Sample = dict[str, Any]
View = Callable[[Sample, Rng], dict[str, np.ndarray]]  # makes the arrays of one sample, by their names in the batch


class Builder(Protocol):
    """Builds a new network at each call.

    `backbone(**changes)` builds the recipe's model with some of its options changed; `backbone("text", **changes)`
    builds the model that the section `text` of the objective's Config describes. A change to False is accepted for a
    model that does not have the option.
    """

    def __call__(self, section: str = "", **changes: Any) -> Backbone: ...


@dataclass
class Exported:
    """A backbone that is evaluated and exported, and the feature that represents a sample: the class token or the mean
    of the tokens."""

    backbone: Backbone
    pool: Literal["cls", "mean"] = "cls"
    # {name: buffer} that the export holds in addition, in tensors.safetensors; each is the same on all ranks
    tensors: dict[str, Tensor] = field(default_factory=dict)
    # a linear layer on this feature, whose outputs are the logits of classes; the export is then an image classifier
    classifier: nn.Linear | None = None
    dense: bool = False  # whether it is applied to each patch instead; the export is then a segmentation model
    # makes the state dict that is exported from that of `backbone`, if the two differ
    merged: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    text_side: TextSide | None = None  # what makes a dual encoder of the backbone, in the same folder

    def state(self, gathered: Callable[[nn.Module], dict[str, Any]] | None = None) -> dict[str, Any]:
        """The tensors of the backbone; those of the classifier, whose names begin with "classifier."; and those of the
        text side, whose names begin with its PREFIX.

        `gathered`: a function that returns a module's state dict, where an engine has sharded it.
        """
        gathered = gathered or (lambda module: module.state_dict())
        state = gathered(self.backbone)
        for prefix, part in (("classifier.", self.classifier), (PREFIX, self.text_side)):
            state |= {f"{prefix}{key}": value for key, value in gathered(part).items()} if part is not None else {}
        return state


class Objective(nn.Module):
    """One method: the views of a sample, the loss, and the work after a step (for example a moving average).

    `forward` is a pure function of batch, step and weights: all random numbers come with the batch, except those of
    dropout and drop path.
    """

    # Whether the loss of a sample depends on other samples of its batch, apart from batch norms of the networks
    # (`is_coupled`). If so, gradient accumulation needs parallel.accumulate_coupled.
    couples_batch = False
    least_batch = 1  # smallest number of samples in one forward, over all ranks, for which the loss has a gradient
    kept_in_eval: tuple[str, ...] = ()  # dotted names of sub-modules that stay in evaluation mode, as teachers do
    # A scalar on the device: 1 if the optimizer has skipped this step, so that `after_step` must change nothing.
    skipped: Tensor | None = None
    parts: dict[str, Part] = {"image": Image()}  # the members of a sample; the first one opens the datasets
    part_of: dict[str, str] = {}  # {tensor of the batch: the part from which it is made}, if their names differ
    # Whether its views make arrays of the length `sample["seconds"]` if a sample has this entry, so that batches may hold
    # recordings by their total length (`data.batch: {seconds: S}`). It then needs `target_name`, as the number of samples
    # differs from batch to batch and from rank to rank.
    any_length = False
    validates = False  # whether the loss on held-out data (`eval.val`) is logged during training
    # Name of the tensor of the batch that holds the targets; −100 stands for no target. If given, the loss is the mean
    # over the targets of the global batch.
    target_name: str | None = None
    # Prefixes of the names of tensors that may differ between this objective and the checkpoint of `init.run`: missing
    # or additional ones are no error.
    reinitialized: tuple[str, ...] = ()
    # {dotted name of a sub-module: factor of its learning rate}
    lr_scales: dict[str, float] = {}
    # {name of a trained sub-module: name of the sub-module that is its moving average}, for `init.weights: teacher`
    averaged: dict[str, str] = {}
    # Name of the exported sub-module, for checkpoints of earlier versions, which do not store it.
    encoder_name = "backbone"

    def __init__(self, cfg: Any, backbone: Builder) -> None:
        super().__init__()
        self.cfg = cfg.settled() if isinstance(cfg, Section) else cfg

    @staticmethod
    def views(cfg: Any, about: About) -> View:
        """The function `view(sample, rng)` that data workers call for each sample. Raises ValueError for sizes that do
        not fit together.

        `rng(k)` is the sample's k-th random generator: `crops` uses 0, 1, 2, ... for its views, masks use the numbers
        from `MASKS` on (data_pipeline/views/augmentations.py).

        The function may be an object with a method `collate(arrays)`, which data workers call with the stacked arrays
        of a micro-batch, each [B, …]. It returns further arrays, which need not have one row per sample, such as the
        indices of masked patches, which would cost a host sync if they were computed on the device.
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name, module in self.named_modules():
            if name in self.kept_in_eval:
                module.eval()
        return self

    def before_first_step(self, loaded: set[str]) -> None:
        """Called before the first step of a new run. `loaded`: names of the tensors that were loaded from `init.run`.

        Raises ValueError if a tensor that the method needs was not loaded.
        """

    def start_from_teacher(self) -> None:
        """Copy the weights of each moving average to the sub-module that it averages (`init.weights: teacher`). Raises
        ValueError if there is none."""
        if not self.averaged:
            raise ValueError("init.weights = teacher: this objective has no moving average; remove init.weights")
        for trained, average in self.averaged.items():
            ema_update(self.get_submodule(trained), self.get_submodule(average), momentum=0.0)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(scalar loss, detached scalars to log)."""
        raise NotImplementedError

    def is_coupled(self) -> bool:
        """Whether the loss of a sample depends on other samples of its batch: by the method (`couples_batch`), or by a
        batch norm that does not stay in evaluation mode."""
        return self.couples_batch or any(isinstance(m, _BatchNorm) and m.training for m in self.modules())

    def mean(self, total: Tensor, batch: Batch) -> Tensor:
        """The contribution of a micro-batch to the mean loss over the targets of the global batch, a scalar. `total`:
        the sum of the losses of the micro-batch.

        The engine sets `batch["count"]`, the mean number of targets per micro-batch; without it, the mean is over the
        targets of this micro-batch.
        """
        return total / batch["count"] if "count" in batch else total / self.count(batch).clamp_min(1)

    def count(self, batch: Batch) -> Tensor:
        """The number of targets of a micro-batch, a scalar."""
        return (batch[self.target_name or "targets"] != IGNORED).sum()

    def after_step(self, step: int) -> None:
        """Called after the optimizer's step, for example to update a teacher or a queue. If `self.skipped` is 1, it
        must change nothing (`ema_update` and `Queue.push` take `skipped`)."""

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
        """{name: picture, uint8 [3, H, W]}: pictures that show what the method does with a batch, drawn at every
        export. The images of the batch are normalised."""
        return {}
