"""A label: the number of a sample's class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import Damaged
from common.untrusted import is_number
from data_pipeline.parts.part import About, Part
from data_pipeline.shards.dataset import Dataset


@dataclass
class Label(Part):
    """A label is decoded to an int, the number of its class. `About.classes` has the names of the classes, if the
    manifests of all shards have the same names."""

    extensions = ("cls",)

    def about(self, datasets: Sequence[Dataset] | None, model: Any) -> dict[str, Any]:
        classes = [indexed.manifest.classes for dataset in datasets or () for indexed in dataset.manifests]
        return {"classes": tuple(classes[0]) if classes and all(names == classes[0] for names in classes) else ()}

    def decode(self, members: dict[str, bytes], known: dict[str, Any]) -> int:
        text = members["cls"].decode(errors="replace").strip()
        if not is_number(text):
            raise Damaged(f"its label is {text[:60]!r}; a label is the number of a class")
        return int(text)

    def stand_in(self, name: str, rng: np.random.Generator, about: About) -> dict[str, Any]:
        return {name: int(rng.integers(max(1, len(about.classes))))}
