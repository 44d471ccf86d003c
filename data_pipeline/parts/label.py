"""A label: the number of a sample's class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import ConfigError, Damaged
from common.untrusted import is_number
from data_pipeline.parts.part import About, Part
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.manifest import common_classes


@dataclass
class Label(Part):
    """A label is decoded to an int, the number of its class. `About.classes` has the names of the classes, by the
    manifests of all shards (see `common_classes`)."""

    extensions = ("cls",)

    def check(self, datasets: Sequence[Dataset], model: Any) -> None:
        super().check(datasets, model)
        pairs = [pair for dataset in datasets for pair in zip(dataset.manifests, dataset.specs, strict=True)]
        found = [(indexed.manifest.classes, spec) for indexed, spec in pairs]
        longest, theirs = max(found, key=lambda each: len(each[0]), default=([], ""))
        for names, ours in found:
            if differing := [n for n, name in enumerate(names) if name != longest[n]]:
                n = differing[0]
                raise ConfigError(
                    f"{ours}: its label {n} is {names[n]}, but label {n} of {theirs} is {longest[n]}; a number needs"
                    " one meaning in a run: build these shards together, from one source with all classes"
                )

    def about(self, datasets: Sequence[Dataset] | None, model: Any) -> dict[str, Any]:
        classes = [indexed.manifest.classes for dataset in datasets or () for indexed in dataset.manifests]
        return {"classes": tuple(common_classes(classes))}

    def decode(self, members: dict[str, bytes], known: dict[str, Any]) -> int:
        text = members["cls"].decode(errors="replace").strip()
        if not is_number(text):
            raise Damaged(f"its label is {text[:60]!r}; a label is the number of a class")
        return int(text)

    def stand_in(self, name: str, rng: np.random.Generator, about: About) -> dict[str, Any]:
        return {name: int(rng.integers(max(1, len(about.classes))))}
