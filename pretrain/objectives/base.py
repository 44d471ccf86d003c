"""What every objective is: see `pretrain/objective.py` for how one is found, and `mae.py` for one to start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from data_pipeline.views import Rng
from pretrain.models.layers import Backbone
from pretrain.ops.cross_entropy import IGNORED

Batch = dict[str, Tensor]
# "image": an `Encoded` or uint8 [H, W, C], as `crops` takes it; "color": how it does colours; "id", "epoch"; "slot": place in the global batch of
# "batch" samples at "step"; "seed". Of text: "tokens" int64 [T + 1], "documents" int32 [T + 1], counted from 0 in each row, −1 for padding
Sample = dict[str, Any]


class Objective(nn.Module):
    """One method: views, loss, and what happens after a step.

    `forward` is a pure function of batch, step and weights: all randomness but dropout and drop path comes with the batch.
    """

    couples_batch = False  # the loss of a sample depends on others of its batch: such an objective refuses to accumulate unless told
    skipped: Tensor | None = (
        None  # scalar on the device, 1 where the step that `after_step` follows was skipped: then nothing may move
    )
    reads: Literal["images", "text"] = "images"  # what it trains on
    counted: str | None = (
        None  # the part of a batch whose entries other than -100 are counted: the loss is a mean over those of the global batch
    )
    fresh: tuple[
        str, ...
    ] = ()  # beginnings of the names of tensors that a checkpoint which a run starts from may lack or have more of
    pool: Literal["cls", "mean"] = "cls"  # which feature of the encoder stands for an image in evaluation

    def __init__(self, cfg: Any, backbone: Callable[..., Backbone]):
        """`backbone(**changes)` builds the recipe's model, with some of its options changed; call it once per network that is needed."""
        super().__init__()
        self.cfg = cfg

    @staticmethod
    def views(cfg: Any, image_size: int, patch_size: int) -> Callable[[Sample, Rng], dict[str, np.ndarray]]:
        """What makes one sample's part of a batch, in the data workers: `view(sample, rng)`. uint8 arrays [..., C, H, W] are normalised on the device.

        An objective that reads text gets (T, `Vocabulary`, whether documents are to be masked) in place of the two sizes: see `pretrain.inputs.inputs`.

        `rng(k)` is the sample's k-th generator: `crops` takes 0, 1, 2, ... for its views; masks take those from `views.MASKS` on.
        """
        raise NotImplementedError

    def started(self, loaded: set[str]) -> None:
        """Before the first step of a new run; `loaded` has the names of the tensors that `init.run` has filled. ValueError where something is missing."""

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(scalar loss, detached scalars to log)."""
        raise NotImplementedError

    def mean(self, total: Tensor, batch: Batch) -> Tensor:
        """A sum over a micro-batch's targets as its part of the mean over the global batch's: the engine gives their `count` with the batch."""
        return total / batch["count"] if "count" in batch else total / self.count(batch).clamp_min(1)

    def count(self, batch: Batch) -> Tensor:
        """The number of targets of a micro-batch, a scalar."""
        return (batch[self.counted or "targets"] != IGNORED).sum()

    def after_step(self, step: int) -> None:
        """After the optimizer's step: move the teacher, the queue; not where `self.skipped` is 1 (`ema_update` takes it)."""

    def encoder(self) -> Backbone:
        """The backbone that evaluation and export see."""
        raise NotImplementedError

    def encoders(self) -> dict[str, Backbone]:
        """All that are exported, "model" (the recipe's) among them; the others go to RUN/export/NAME/STEP."""
        return {"model": self.encoder()}

    def shard_units(self) -> list[nn.Module]:
        """The modules that a sharded engine gathers one at a time, children before parents, the objective itself last."""

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
        """Pictures that show what the method does, uint8 [3, H, W] by name; drawn at every export. Batch images are normalised."""
        return {}
