"""Zero-shot classification with a dual encoder, as CLIP reports it (arXiv 2103.00020 §3.1): the names of the classes,
put into templates, are the texts, and an image belongs to the class whose text is most similar.

A class is represented by the mean of its texts' embeddings, at length 1. The names are those in the manifests of the
shards, of all their classes, with spaces for underscores. There is no gallery.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.config import Section, option
from common.errors import DataError
from eval.feature_rows import chunks
from eval.features import Encoder
from eval.knn import accuracies
from eval.text_embeddings import embed_features, embed_texts, text_side_of

NEEDS = "classes"
VERSION = 1
CHUNK = 4096  # images at once


@dataclass
class Config(Section):
    # texts with {} in place of the name of a class
    templates: list[str] = option(lambda: ["a photo of a {}."])
    names: list[str] = option(list)  # names of the classes by number, in place of those in the manifests

    def check(self) -> None:
        if wrong := [text for text in self.templates if "{}" not in text] or [""] * (not self.templates):
            raise ValueError(f"zeroshot.templates: {wrong[0]!r} has no {{}} for the name of a class")


def run(encoder: Encoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"accuracy", "balanced_accuracy": its mean over classes; "top5": share of the images whose class is among the five
    most similar ones, if there are more; numbers of images}. Raises DataError if the shards have no names."""
    side, found = text_side_of(encoder), encoder.labelled(query)
    known = class_names(encoder, query)
    names = cfg.names or known
    if len(names) < len(known):
        raise DataError(f"zeroshot.names: has {len(names)} names, but {', '.join(query)} has {len(known)} classes")
    texts = [template.replace("{}", name.replace("_", " ")) for name in names for template in cfg.templates]
    embedded = embed_texts(side, texts).view(len(names), len(cfg.templates), -1)  # [C, templates, E]
    classes = F.normalize(embedded.mean(1), dim=1)
    best = []
    for _, features in chunks(found.features, CHUNK):
        best.append((embed_features(side, features) @ classes.T).topk(min(5, len(names))).indices)  # [≤ CHUNK, 5]
    top = torch.cat(best)
    scores = accuracies(top[:, 0], found.classes, found.names, known)
    if len(names) > 5:
        index = {name: n for n, name in enumerate(known)}
        truth = torch.tensor([index[name] for name in found.names])[found.classes]
        scores["top5"] = (top == truth.unsqueeze(1)).any(1).double().mean().item()
    return scores | {
        "count": len(found),
        "left_out": found.left_out,
        "passed_over": found.passed_over,
        "unlabelled": found.unlabelled,
    }


def class_names(encoder: Encoder, query: list[str]) -> list[str]:
    """The names of the classes, by number. Raises DataError if the manifests have none, or different ones."""
    samples = encoder.check(query)
    each = [indexed.manifest.classes for indexed in samples.manifests]
    if not each[0] or any(names != each[0] for names in each):
        raise DataError(
            f"{samples.names}: its manifests have {'different' if each[0] else 'no'} names of classes, which zero-shot"
            " classification needs; `unlabeled shards build` takes them from the folders"
        )
    return each[0]
