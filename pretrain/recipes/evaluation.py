"""The section `eval` of a recipe: the labelled data and the protocols that score exports."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.config import Section, option

TIER_SHARDS = ("gallery", "query")  # keys of a tier of evaluation that name shards


@dataclass
class Tier(Section):
    """Protocols that score exports, and where. A list of names stands for `protocols`."""

    shorthand = "protocols"
    protocols: list[str] = field(default_factory=list)  # names that `unlabeled eval` lists; empty: none
    # options of these protocols, as on the command line of `unlabeled eval`: [knn.k=20, linear.steps=500]
    options: list[str] = field(default_factory=list)
    # labelled shards on which classifiers are fitted, if they are not those of `eval`, for example with masks
    gallery: list[str] = field(default_factory=list)
    query: list[str] = field(default_factory=list)  # labelled shards that are scored, if they are not those of `eval`
    device: str = ""  # where it is computed: cpu, cuda:1, …; empty or auto: on eval.device


@dataclass
class PeriodicTier(Tier):
    """Protocols that score exports while the run trains."""

    # exports whose step is a multiple of this are scored, and the last one; null: all exports
    every: int | None = option(None, low=1)


@dataclass
class QuickTier(PeriodicTier):
    """Protocols that take seconds to minutes."""

    protocols: list[str] = field(default_factory=lambda: ["knn"])


@dataclass
class FinalTier(Tier):
    """Protocols for the first and the last export."""

    protocols: list[str] = field(default_factory=lambda: ["knn", "linear"])


@dataclass
class Eval(Section):
    """The labelled data and the protocols that score exports, in three tiers: `quick` and `full` score `val` during the
    run, `final` scores `test` at its end."""

    # labelled shards on which classifiers are fitted, and in which neighbours are searched, during the run
    gallery: list[str] = field(default_factory=list)
    val: list[str] = field(default_factory=list)  # labelled shards on which exports are scored during the run
    # labelled shards on which the first and the last export are scored at the end
    test: list[str] = field(default_factory=list)
    test_gallery: list[str] = field(default_factory=list)  # gallery for `test`; empty: `gallery`
    quick: QuickTier = field(default_factory=QuickTier)  # protocols for every export, on val
    # protocols that take longer, for some exports (`every`), on val; they are computed when no quick ones wait
    full: PeriodicTier = field(default_factory=PeriodicTier)
    final: FinalTier = field(default_factory=FinalTier)  # protocols for the first and the last export, on test
    # number of training images on which the health of the features is measured at every export, without labels (the
    # protocol health); 0: none
    health: int = option(0, low=0)
    image_size: int | None = None  # side of the images in pixels; null: that of the model
    # where features and scores are computed: cpu, cuda, cuda:1, …; auto: cpu if the run trains on an accelerator, otherwise the
    # best device
    device: str = "auto"
    cache: str | None = None  # folder in which extracted features are kept; null: ~/.cache/unlabeled/features
    pixels: bool = True  # score raw pixels (of text: bytes, of audio: log-mel statistics) as well, as a baseline
    prompts: list[str] = field(default_factory=list)  # texts that a language model continues at each export

    def shard_lists(self) -> dict[str, list[str]]:
        """{key below `eval`: its list of shards}. The lists may be changed in place. This does not count as reading."""
        stored = vars(self)
        own = {key: stored[key] for key in ("gallery", "val", "test", "test_gallery")}
        tiers = {f"{tier}.{key}": vars(stored[tier])[key] for tier in ("quick", "full", "final") for key in TIER_SHARDS}
        return own | tiers
