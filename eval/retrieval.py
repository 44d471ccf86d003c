"""Retrieval with a dual encoder, as reported on COCO and Flickr30k (arXiv 2103.00020, table 13): recall at 1, 5 and 10 of
the captions of an image, and of the image of a caption, by the similarity of their embeddings.

An image with several captions is found if one of them is among the first k. Equal similarities count against the model,
so that one that embeds everything alike finds nothing. There is no gallery: all images and captions of the queries are
compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import Section
from common.errors import Damaged, DataError
from data_pipeline.parts.caption import Caption
from data_pipeline.shards.samples import Samples
from eval.feature_cache import is_damaged, read_batches
from eval.features import Encoder
from eval.text_embeddings import embed_features, embed_texts, text_side_of

NEEDS = "captions"
VERSION = 1
AT = (1, 5, 10)
CHUNK = 1024  # rows of similarities at once


@dataclass
class Config(Section):
    captions: str = ""  # the field of the .json members that holds the caption or captions; "": the .txt members


def _part(cfg: Config) -> Caption:
    return Caption(field=cfg.captions, extensions=("json",) if cfg.captions else ("txt",))


def check_shards(shards: list[str], role: str, cfg: Config) -> None:
    """Raises UserError if samples have no captions."""
    _part(cfg).check([Samples(shards)], None)


def run(encoder: Encoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"image_to_text_K", "text_to_image_K" for K of AT: shares of the images and of the captions; numbers of
    images}."""
    side, samples, part = text_side_of(encoder), encoder.check(query), _part(cfg)
    part.check([samples], None)
    images, texts, owners = list[Tensor](), list[str](), list[int]()
    lost = {"left_out": 0, "passed_over": 0}

    def read(number: int) -> tuple[object, list[str]] | Damaged:
        try:
            return encoder.read(samples, number), captions(part, samples, number)
        except Damaged as reason:
            return reason

    count = 0
    for _, found in read_batches(read, range(len(samples)), encoder.batch):
        for one in found:
            if isinstance(one, Damaged):
                lost["left_out" if is_damaged(one) else "passed_over"] += 1
        usable = [one for one in found if not isinstance(one, Damaged)]
        if usable:
            images.append(embed_features(side, encoder.pooled([image for image, _ in usable])))
        for _, own in usable:
            texts += own
            owners += [count] * len(own)
            count += 1
    if count < 2:
        raise DataError(f"{samples.names}: {count} of its {len(samples)} images can be read and have a caption")
    owner = torch.tensor(owners)
    ranks = ranked(torch.cat(images), embed_texts(side, texts), owner)
    scores = {f"{kind}_{k}": (rank < k).double().mean().item() for kind, rank in ranks.items() for k in AT}
    return scores | {"count": count, **lost}


def captions(part: Caption, samples: Samples, number: int) -> list[str]:
    """The captions of a sample. Raises Damaged."""
    members = samples.read(number, part.extensions)
    if not members:
        raise part.absent()
    found = part.decode(members, {})
    return [found] if isinstance(found, str) else found


def ranked(images: Tensor, texts: Tensor, owner: Tensor) -> dict[str, Tensor]:
    """{"image_to_text": for each image the number of captions of other images that are at least as similar as the best
    of its own, [N]; "text_to_image": for each caption the number of other images that are at least as similar as its
    own, [M]}. `owner`: the image of each caption, [M]; captions of an image are consecutive."""
    of_images, of_texts = [], []
    for first in range(0, len(images), CHUNK):
        similarity = images[first : first + CHUNK] @ texts.T  # [n, M]
        numbers = torch.arange(first, first + len(similarity)).unsqueeze(1)
        is_own = owner == numbers
        best = similarity.masked_fill(~is_own, -torch.inf).amax(1, keepdim=True)
        of_images.append(((similarity >= best) & ~is_own).sum(1))
    for first in range(0, len(texts), CHUNK):
        similarity = texts[first : first + CHUNK] @ images.T  # [n, N]
        own = similarity.gather(1, owner[first : first + CHUNK].unsqueeze(1))
        of_texts.append((similarity >= own).sum(1) - 1)
    return {"image_to_text": torch.cat(of_images), "text_to_image": torch.cat(of_texts)}
