"""A linear classifier on the pooled feature of an image model, in its export: as transformers' classes for image
classification have it, which then compute the same logits, where there is such a class; for other models as the
tensors `classifier.weight` and `classifier.bias` in a file of their own, which only this project reads.

Shapes: V classes, D width of the feature.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import UserError
from common.untrusted import schema_error
from pretrain.interchange.layouts.transformers import State

PREFIX = "classifier."  # of the tensors of a classifier, in every layout
DENSE = "segmenter."  # of those of a linear layer on each patch, in a file of their own
# {model_type: (class for classification, prefix of the tensors of its backbone, place of the linear layer)}
CLASSES = {
    "dinov2": ("Dinov2ForImageClassification", "dinov2.", ""),
    "dinov2_with_registers": ("Dinov2WithRegistersForImageClassification", "dinov2_with_registers.", ""),
    "resnet": ("ResNetForImageClassification", "resnet.", "1."),
}


class Classifier(NamedTuple):
    """A linear layer, and the names of its classes."""

    weight: Tensor  # [V, D]
    bias: Tensor  # [V]
    names: list[str]
    dense: bool = False  # whether it is applied to each patch


def add(
    fields: dict[str, Any], tensors: State, classifier: Classifier, pool: str
) -> tuple[dict[str, Any], State, State]:
    """(fields of config.json, tensors of the model, tensors of a file of their own) of a backbone with a classifier,
    from those of the backbone. `pool`: the feature that it reads, the class token ("cls") or the mean of the patches
    ("mean"). transformers has no class for a layer on each patch."""
    weight, kind = classifier.weight, fields["model_type"]
    if classifier.dense:
        stated = {"unlabeled": {**fields.get("unlabeled", {}), "segmenter": len(weight)}}
        return fields | stated, tensors, {f"{DENSE}weight": weight, f"{DENSE}bias": classifier.bias}
    names = {
        "id2label": {str(n): name for n, name in enumerate(classifier.names)},
        "label2id": {name: n for n, name in enumerate(classifier.names)},
    }
    if kind not in CLASSES:
        return fields | names, tensors, {f"{PREFIX}weight": weight, f"{PREFIX}bias": classifier.bias}
    name, prefix, place = CLASSES[kind]
    if kind != "resnet":  # these classes read the class token and the mean of the patches, one after the other
        unused = torch.zeros_like(weight)
        weight = torch.cat([weight, unused] if pool == "cls" else [unused, weight], dim=1)  # [V, 2·D]
    tensors = {f"{prefix}{key}": value for key, value in tensors.items()}
    tensors |= {f"{PREFIX}{place}weight": weight, f"{PREFIX}{place}bias": classifier.bias}
    return fields | names | {"architectures": [name]}, tensors, {}


def remove(tensors: State) -> State:
    """The tensors of the backbone alone, with the names that they have without a classifier."""
    prefixes = tuple(prefix for _, prefix, _ in CLASSES.values())
    kept = {key: value for key, value in tensors.items() if not key.startswith(PREFIX)}
    return {
        key.removeprefix(next((prefix for prefix in prefixes if key.startswith(prefix)), "")): value
        for key, value in kept.items()
    }


def find(where: Path, fields: dict[str, Any], tensors: State, width: int, pool: str) -> Classifier:
    """The classifier in a folder of a model, from its config.json and its tensors. `width`: D. Raises UserError if there
    is none that reads the feature `pool`."""
    weight, bias = (next((tensors[k] for k in _keys(part) if k in tensors), None) for part in ("weight", "bias"))
    if weight is None or bias is None:
        raise UserError(f"{where}: holds no classifier; name an export of a run of `finetune`, RUN/export/STEP")
    problem = schema_error(fields, {"?id2label": {...: str}})
    if problem or weight.ndim != 2 or bias.shape != weight.shape[:1] or weight.shape[1] not in (width, 2 * width):
        shapes = f"{list(weight.shape)} and {list(bias.shape)}"
        raise UserError(
            f"{where}: its classifier cannot be used ({problem or f'tensors of {shapes} for features of {width}'})"
        )
    if weight.shape[1] == 2 * width:
        cls, mean = weight.split(width, dim=1)
        weight, unused = (cls, mean) if pool == "cls" else (mean, cls)
        if unused.any():
            raise UserError(f"{where}: its classifier reads the class token and the mean of the patches together")
    names = fields.get("id2label", {})
    return Classifier(weight, bias, [names.get(str(n), str(n)) for n in range(len(weight))])


def _keys(part: str) -> list[str]:
    return [f"{PREFIX}{place}{part}" for place in dict.fromkeys(place for _, _, place in CLASSES.values())]


def find_dense(where: Path, tensors: State, width: int) -> Classifier:
    """The linear layer on each patch among the further tensors of an export. `width`: D. Raises UserError if there is
    none."""
    weight, bias = (tensors.get(f"{DENSE}{part}") for part in ("weight", "bias"))
    if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1] or weight.shape[1] != width:
        raise UserError(
            f"{where}: holds no segmentation head for {width} features; name an export of a run of"
            " `finetune_segmentation`, RUN/export/STEP"
        )
    return Classifier(weight, bias, [str(n) for n in range(len(weight))], dense=True)
