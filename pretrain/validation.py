"""The batches of `eval.val` on which the validation loss of a text run is computed during training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from common.errors import UserError
from data_pipeline.shards.dataset import Dataset
from data_pipeline.stream.stream import Reading, Stream
from pretrain.build import views
from pretrain.objectives.base import Objective
from pretrain.parallel import processes
from pretrain.parallel.engine import Engine
from pretrain.recipes.recipe import Recipe


def held_out_batches(
    cfg: Recipe, objective: Objective, samples: Sequence[Dataset], engine: Engine, say: Callable[[str], None]
) -> list[dict[str, Tensor]]:
    """This rank's micro-batches of `eval.val`, on the host. The loss is always computed on the same rows, which come
    from all parts of the set. [] if the recipe asks for no such loss, or if it cannot be computed on this set, which is
    logged."""
    if not objective.validates or not cfg.log.val_every or not cfg.log.val_batches or not cfg.eval.val:
        return []
    try:
        part = next(iter(objective.parts.values()))
        rows = part.open(cfg.eval.val, held_out=True)
        part.check([samples[0], rows], cfg.model)
    except (
        UserError
    ) as error:  # not fatal: the set may hold labelled texts for a protocol; scoring refuses a missing set
        say(f"no loss on eval.val will be computed while training: {error}")
        return []
    micro_batches = engine.world * engine.accumulate  # in a global batch
    batch = min(cfg.data.batch_size, len(rows) // micro_batches * micro_batches)
    if not batch:
        say(
            f"no loss on eval.val will be computed while training: {rows.names} has {len(rows)} rows, but"
            f" {micro_batches} or more are needed"
        )
        return []
    stream = Stream(
        [rows],
        views(cfg, objective, [rows]),
        batch,
        cfg.seed,
        parts=objective.parts,
        rank=processes.rank(),
        world=engine.world,
        accumulate=engine.accumulate,
        reading=Reading(workers=0, pinned=engine.device.type == "cuda"),
    )
    steps = min(cfg.log.val_batches, len(rows) // batch)
    batches = [next(stream) for _ in range(steps * engine.accumulate)]
    stream.close()
    return batches
