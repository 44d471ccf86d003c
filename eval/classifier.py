"""The accuracy of the classifier that an export holds, such as that of a run of `finetune`.

Nothing is fitted, so there is no gallery. Images are resized and cropped at the centre as for all protocols, and every
labelled image of the query set counts once. Classes are compared by their names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import Section
from common.errors import DataError, UserError
from eval.feature_cache import chunks
from eval.features import Encoder
from eval.knn import accuracies
from pretrain.interchange.weight_sources import classifier_of

NEEDS = "query_labels"
VERSION = 1
CHUNK = 1024  # images whose logits are computed at once
TOP = 5
REMARKS = {"some_unknown": "some query images are of classes that the classifier does not have, and count as wrong"}


@dataclass
class Config(Section):
    """This protocol has no options."""


def run(encoder: Encoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"accuracy", "balanced_accuracy", "top5": share of the images whose class is among the five with the largest
    logits, if there are more classes, "some_unknown": 1 if this remark of REMARKS applies, and numbers of images}."""
    if encoder.folder is None:
        raise UserError(f"{encoder.name}: has no classifier; name an export of a run of `finetune`, RUN/export/STEP")
    head, labelled = classifier_of(encoder.folder), encoder.labelled(query)
    if labelled.not_finite:
        raise DataError(
            f"{encoder.name}: its features of {labelled.not_finite} of {len(labelled)} images are not finite; its"
            " weights may not be finite, either"
        )
    unknown = set(labelled.names) - set(head.names)
    if len(unknown) == len(labelled.names):
        raise DataError(
            f"{', '.join(query)}: has the classes {', '.join(labelled.names[:3])} …, but the classifier has"
            f" {', '.join(head.names[:3])} …, so every answer would be wrong; name a set with the same classes"
        )
    weight, bias = head.weight.to(encoder.device), head.bias.to(encoder.device)
    count = min(TOP, len(head.names))
    best = torch.cat(  # [Q, ≤ 5], the classes with the largest logits
        [(x @ weight.T + bias).topk(count).indices.cpu() for _, x in chunks(labelled.features, CHUNK, encoder.device)]
    )
    scores = accuracies(best[:, 0], labelled.classes, labelled.names, head.names)
    if len(head.names) > TOP:
        scores["top5"] = _share_among(best, labelled.classes, labelled.names, head.names)
    counts = {"left_out": labelled.left_out, "passed_over": labelled.passed_over, "unlabelled": labelled.unlabelled}
    return scores | {"some_unknown": float(bool(unknown)), "count": float(len(labelled)), **counts}


def _share_among(best: Tensor, classes: Tensor, names: list[str], known: list[str]) -> float:
    """The share of the queries whose class is among `best` [Q, k], indices into `known`. `classes` [Q] are indices into
    `names`."""
    index = {name: n for n, name in enumerate(known)}
    truth = torch.tensor([index.get(name, -1) for name in names])[classes]
    return (best == truth.unsqueeze(1)).any(1).double().mean().item()
