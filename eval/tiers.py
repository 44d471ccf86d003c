"""The tiers of a recipe's `eval` section as tasks: which protocols score which shards, with which options, and where.

Rows of results.jsonl have the split of their task: `val` (eval.quick), `full` (eval.full), `test` (eval.final), and
`train` (eval.health). This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from common import yaml_values
from common.errors import UserError, nearest
from eval.protocol_finder import needs
from pretrain.recipes.recipe import Recipe, expand_paths

FULL = "full"
QUICK_TO_FULL = ("val", FULL)  # splits that are scored during the run


class Task(NamedTuple):
    """Protocols for one split."""

    tier: str  # the key of the recipe that names the protocols, such as eval.quick
    protocols: list[str]
    options: list[str]
    gallery: list[str]
    query: list[str]
    gallery_key: str  # the keys of the recipe that name these shards
    query_key: str
    device: str  # "" for eval.device
    every: int | None  # which exports: those of the multiples of this step and the last one; None: all

    def option_values(self) -> dict[str, dict[str, Any]]:
        """{protocol: {option: value}}. Raises UserError."""
        return protocol_options(self.options, self.protocols, f"{self.tier}.options")

    def is_due(self, step: int, last: int) -> bool:
        """Whether the export of a step is scored, in a run whose last step is `last`."""
        return step == last or self.every is None or step % self.every == 0


def tasks(recipe: Recipe) -> dict[str, Task]:
    """{split: task} for all splits of which the recipe names shards."""
    cfg, out = recipe.eval, dict[str, Task]()
    final_gallery = "test_gallery" if cfg.test_gallery else "gallery"
    for split, name, gallery, query in (
        ("val", "quick", "gallery", "val"),
        (FULL, "full", "gallery", "val"),
        ("test", "final", final_gallery, "test"),
    ):
        tier = getattr(cfg, name)
        gallery, query = (
            f"{name}.{own}" if getattr(tier, own) else of_all
            for own, of_all in (("gallery", gallery), ("query", query))
        )
        shards = cfg.shard_lists()
        out[split] = Task(
            *(f"eval.{name}", tier.protocols, tier.options, shards[gallery], shards[query]),
            *(f"eval.{gallery}", f"eval.{query}", tier.device.replace("auto", ""), getattr(tier, "every", None)),
        )
    health = [f"health.samples={cfg.health}"]
    training = training_shards(recipe) if cfg.health else []
    out["train"] = Task("eval.health", ["health"], health, [], training, "", "data.train", "", None)
    return {split: task for split, task in out.items() if task.query}


def training_shards(recipe: Recipe) -> list[str]:
    """The shards of the training data."""
    return list(recipe.data.train) or [shard for source in recipe.data.mix for shard in source.shards]


def protocol_options(words: Iterable[str], protocols: Collection[str], key: str) -> dict[str, dict[str, Any]]:
    """{protocol: {option: value}} from words such as "linear.steps=500" for some of the protocols. Raises UserError that
    begins with `key`."""
    out: dict[str, dict[str, Any]] = {}
    for word in words:
        name, value = yaml_values.parse_override(word)
        protocol, _, option = name.partition(".")
        if not option:
            raise UserError(f"{key}: {word!r} is no option of a protocol; write PROTOCOL.OPTION=VALUE, as in knn.k=20")
        if protocol not in protocols:
            needs(protocol)  # raises an error for a name that is no protocol
            raise UserError(f"{key}: {word!r}: the tier has no protocol {protocol}; {nearest(protocol, protocols)}")
        yaml_values.merge(out, {}, yaml_values.nest(name, expand_paths(value, f"{key}: ", name)), key, set())
    return out
