"""The accuracy of the classifier that an export holds, such as that of a run of `finetune`.

Nothing is fitted, so there is no gallery. Images are resized and cropped at the centre as for all protocols, and every
labelled image of the query set counts once. Classes are compared by their names. For sets that have a part of the
classes, or several right labels for an image (ImageNet-A, -R, ReaL), see `label_files.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.errors import DataError, UserError
from eval.feature_rows import chunks
from eval.features import Encoder
from eval.knn import accuracies
from eval.label_files import AnswerFiles, answers
from pretrain.interchange.weight_sources import classifier_of

NEEDS = "query_labels"
VERSION = 1
CHUNK = 1024  # images whose logits are computed at once
TOP = 5
REMARKS = {"some_unknown": "some query images are of classes that the classifier does not have, and count as wrong"}


@dataclass
class Config(AnswerFiles):
    """Which answers count."""


def run(encoder: Encoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"accuracy", "balanced_accuracy" (without `labels`), "top5": share of the images whose class is among the five
    with the largest logits, if more classes can be answered, "some_unknown": 1 if this remark of REMARKS applies, and
    numbers of images}."""
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
    found = answers(cfg, head.names, labelled, encoder.check(query), "classifier")
    if found.allowed is not None:
        weight, bias = weight[found.allowed.to(weight.device)], bias[found.allowed.to(bias.device)]
    best = torch.cat(  # [Q, ≤ 5], the classes with the largest logits
        [
            (x @ weight.T + bias).topk(min(TOP, len(bias))).indices.cpu()
            for _, x in chunks(labelled.features, CHUNK, encoder.device)
        ]
    )[found.rows]
    best = best if found.allowed is None else found.allowed[best]
    correct = found.correct(best)  # [Q', ≤ 5]
    scores = {"accuracy": correct[:, 0].double().mean().item()}
    if not cfg.labels:
        scores = accuracies(best[:, 0], labelled.classes[found.rows], labelled.names, head.names)
    if len(bias) > TOP:
        scores["top5"] = correct.any(1).double().mean().item()
    counts = {"left_out": labelled.left_out, "passed_over": labelled.passed_over, "unlabelled": labelled.unlabelled}
    return scores | {"some_unknown": float(bool(unknown)), "count": float(len(found.rows)), **counts}
