"""Instance retrieval: mean average precision of rankings of a gallery, as in Revisited Oxford and Paris (1803.11285).

The gallery is ranked by cosine similarity to a query. The .json member of a query lists the keys of gallery samples that
show the same thing, {"easy": […], "hard": […], "junk": […]}, and may have the box of the query in its image, {"bbox":
[left, top, right, bottom]}. As published, the three settings are

    easy:    positives are the easy ones,        junk and hard ones are left out of the ranking
    medium:  positives are easy and hard ones,   junk ones are left out
    hard:    positives are the hard ones,        junk and easy ones are left out

and queries without positives are skipped. Average precision is the trapezoid rule over recall; the rectangle rule, which
most libraries have, gives larger values. Without such lists, samples with the label of the query are its positives, and
copies of the query are left out.

Shapes: Q queries, N gallery images, D features.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import Section, option
from common.errors import Damaged, DataError, UserError
from common.untrusted import loads
from data_pipeline.shards.samples import Samples
from data_pipeline.views.augmentations import center
from eval.feature_cache import Labelled, read_batches
from eval.feature_rows import chunks
from eval.features import Encoder

NEEDS = "matches"
VERSION = 1
PRECISIONS = (1, 5, 10)
CHUNK = 1 << 16  # gallery rows on the device at once
SIMILARITIES = 1 << 28  # in memory at once
LISTS = ("easy", "hard", "junk")
SETTINGS = {  # {setting: (lists of positives, lists that are left out of the ranking)}
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}


@dataclass
class Config(Section):
    # sizes of the images, as shares of that of the model; the descriptor is the mean over them. Published: 1, 0.7071, 0.5
    scales: list[float] = option(lambda: [1.0], above=0)
    box: bool = True  # cut queries to their box, as published; DINO's script does not


class Query(NamedTuple):
    number: int
    lists: dict[str, list[str]] | None  # keys of gallery samples; None: there are none
    box: tuple[int, int, int, int] | None  # left, top, right, bottom


def check_shards(shards: list[str], role: str, cfg: Config) -> None:
    """Raises DataError if the query has neither lists nor labels."""
    samples = Samples(shards)
    if role == "query" and not {"json", "cls"} & {*samples.extensions}:
        raise DataError(f"{samples.names}: holds neither .json members with lists of keys nor .cls members with labels")


def run(encoder: Encoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"map"}: of the setting "medium", or by labels; with lists also {"map_SETTING", "mp1_SETTING", …}, by labels
    {"mp1", "mp5", "mp10"}: the precision among the first 1, 5 and 10."""
    if encoder.unit != "images":
        raise UserError(f"{encoder.name}: instance_retrieval ranks images, but this model reads {encoder.unit}")
    if not cfg.scales:
        raise UserError("instance_retrieval.scales = []: write one share of the image size or more")
    samples = encoder.check(query)
    queries = [each for each in (_query(samples, n) for n in range(len(samples))) if each is not None]
    by_lists = any(each.lists for each in queries)
    scales = [_variant(encoder, scale, has_labels=not by_lists) for scale in cfg.scales]
    sets = [each.labelled(gallery) for each in scales]
    if by_lists:
        queries = [each for each in queries if each.lists]
        rows = _rows_of(encoder.check(gallery), sets[0])
        missing = [key for each in queries for keys in (each.lists or {}).values() for key in keys if key not in rows]
        if missing:
            raise DataError(
                f"{samples.names}: lists {missing[0]!r} ({len(missing)} keys in all), which is the key of no readable"
                f" sample of {', '.join(gallery)}"
            )
    kept, vectors = _descriptors(scales, samples, queries, cfg.box)
    if not kept:
        raise DataError(f"{samples.names}: no query can be read")
    if len({each.shape[1] for each in vectors}) > 1:
        raise UserError(
            f"{encoder.name}: gives features of another width for images of another size; write"
            " instance_retrieval.scales=[1]"
        )
    similarities = similarities_of(sets, vectors, encoder.device)
    counts = {
        "gallery_count": len(sets[0]),
        "count": len(kept),
        "left_out": sets[0].left_out + len(queries) - len(kept),
        "passed_over": sets[0].passed_over + len(samples) - len(queries),
    }
    scores: dict[str, float] = {}
    if by_lists:
        found: dict[str, list[np.ndarray]] = {name: [] for name in SETTINGS}
        for each, row in zip(kept, similarities, strict=True):
            lists = each.lists or {}
            for name, groups in SETTINGS.items():
                ok, junk = ({rows[key] for part in parts for key in lists[part]} for parts in groups)
                found[name].append(ranks(row, ok, junk - ok))
        for name, places in found.items():
            scores |= {f"{key}_{name}": value for key, value in means(places).items()}
        scores |= {"map": scores["map_medium"]} if "map_medium" in scores else {}
    else:
        scores = means(_ranks_by_label(similarities, kept, sets[0], encoder.labelled(query), samples, encoder))
    if "map" not in scores:
        raise DataError(f"{samples.names}: no query has a positive in the gallery {', '.join(gallery)}")
    return scores | counts


# ---------------------------------------------------------------- average precision
def ranks(similarities: Tensor, positives: Iterable[int], left_out: Iterable[int]) -> np.ndarray:
    """The places of the positives, from 0, ascending, in the ranking by similarities [N] without those left out."""
    order = similarities.argsort(descending=True, stable=True).numpy()
    kept = order[~np.isin(order, np.fromiter(left_out, np.int64))]
    return np.flatnonzero(np.isin(kept, np.fromiter(positives, np.int64)))


def average_precision(places: np.ndarray) -> float:
    """The area under precision over recall, by the trapezoid rule, from the places of all positives."""
    j = np.arange(len(places))
    before = np.where(places > 0, j / np.maximum(places, 1), 1.0)
    return float(((before + (j + 1) / (places + 1)) / 2).mean())


def precision_at(places: np.ndarray, k: int) -> float:
    """The share of positives among the first k, or among those up to the last positive if these are fewer."""
    k = min(k, int(places.max()) + 1)
    return float((places < k).sum() / k)


def means(places: list[np.ndarray]) -> dict[str, float]:
    """{"map", "mp1", "mp5", "mp10"} over the queries that have positives; {} if none has."""
    places = [each for each in places if len(each)]
    if not places:
        return {}
    out = {"map": float(np.mean([average_precision(each) for each in places]))}
    return out | {f"mp{k}": float(np.mean([precision_at(each, k) for each in places])) for k in PRECISIONS}


def similarities_of(sets: list[Labelled], vectors: list[Tensor], device: torch.device) -> Iterator[Tensor]:
    """For each query its cosine similarities [N], on the CPU, with the gallery. Descriptors are the means of normalised
    features over scales. The gallery is read once for as many queries as SIMILARITIES allows."""
    query = sum((F.normalize(each, dim=1) for each in vectors), torch.zeros(()))  # [Q, D]
    for part in F.normalize(query, dim=1).to(device).split(max(1, SIMILARITIES // len(sets[0]))):
        out = []
        for parts in zip(*(chunks(each.features, CHUNK, device) for each in sets), strict=True):
            gallery = sum((F.normalize(rows, dim=1) for _, rows in parts), torch.zeros((), device=device))
            out.append((part @ F.normalize(gallery, dim=1).T).cpu())
        yield from torch.cat(out, 1)


# ---------------------------------------------------------------- queries
def _query(samples: Samples, number: int) -> Query | None:
    """What the .json member of a query says. None if it is damaged."""
    try:
        about: Any = loads(samples.read(number, ("json",)).get("json", b"{}"))
    except (Damaged, ValueError):
        return None
    if not isinstance(about, dict):
        return None
    lists = {name: about.get(name, []) for name in LISTS}
    if not all(isinstance(keys, list) and all(isinstance(key, str) for key in keys) for keys in lists.values()):
        example = json.dumps({name: ["KEY"] for name in LISTS})
        raise DataError(f"{samples.names}: sample {number}: write lists of keys, {example}")
    box = about.get("bbox")
    is_box = isinstance(box, list) and len(box) == 4 and all(isinstance(value, (int, float)) for value in box)
    return Query(number, lists if any(lists.values()) else None, tuple(round(v) for v in box) if is_box else None)  # type: ignore[arg-type]


def _descriptors(
    scales: list[Encoder], samples: Samples, queries: list[Query], use_box: bool
) -> tuple[list[Query], list[Tensor]]:
    """(the queries that can be read, their features [Q, D] at each scale)."""

    def read(n: int) -> list[np.ndarray] | None:
        query = queries[n]
        try:
            image = scales[0].image(samples, query.number)
        except Damaged:
            return None
        if use_box and query.box:
            left, top, right, bottom = (max(0, value) for value in query.box)
            part = image[top:bottom, left:right]
            if not part.size:
                raise DataError(f"{samples.names}: sample {query.number}: its bbox {list(query.box)} is outside of it")
            image = part
        return [center(image, each.image_size) for each in scales]

    kept: list[Query] = []
    vectors: list[list[Tensor]] = [[] for _ in scales]
    for numbers, found in read_batches(read, range(len(queries)), scales[0].batch):
        usable = [(queries[n], views) for n, views in zip(numbers, found, strict=True) if views is not None]
        kept += [query for query, _ in usable]
        for n, scale in enumerate(scales if usable else []):
            vectors[n].append(scale.pooled([views[n] for _, views in usable]))
    return kept, [torch.cat(each) for each in vectors if each]


def _variant(encoder: Encoder, scale: float, has_labels: bool) -> Encoder:
    """The same encoder for images of another size, a multiple of the patch size."""
    patch = encoder.patch_size
    size = encoder.image_size if scale == 1 else max(patch, round(scale * encoder.image_size / patch) * patch)
    return encoder.variant(image_size=size, has_labels=has_labels)


def _rows_of(samples: Samples, found: Labelled) -> dict[str, int]:
    """{key of a gallery sample: its row}. A key may be written with or without the folders before its name."""
    rows: dict[str, int] = {}
    for numbers, names in read_batches(lambda n: samples.name(int(n))[1], found.numbers, 1024):  # type: ignore[arg-type]
        for n, key in zip(range(len(rows), len(rows) + len(numbers)), names, strict=True):
            if key in rows:
                raise DataError(f"{samples.names}: two samples have the key {key!r}, so lists cannot name them")
            rows[key] = n
    short: dict[str, int | None] = {}
    for key, row in rows.items():
        name = key.rpartition("/")[2]
        short[name] = None if name in short else row
    return {name: row for name, row in short.items() if row is not None} | rows


def _ranks_by_label(
    similarities: Iterator[Tensor],
    kept: list[Query],
    gallery: Labelled,
    queries: Labelled,
    samples: Samples,
    encoder: Encoder,
) -> list[np.ndarray]:
    """The places of the gallery samples with the label of each query, without copies of the query itself."""
    names = np.array(gallery.names)[gallery.classes.numpy()]  # [N]
    label_of = {int(n): queries.names[c] for n, c in zip(queries.numbers, queries.classes.tolist(), strict=True)}
    hashes, own = gallery.hashes[gallery.numbers], samples.hashes(encoder.members)
    out = []
    for query, row in zip(kept, similarities, strict=True):
        copies = np.flatnonzero(hashes == own[query.number])
        positives = np.flatnonzero(names == label_of.get(query.number))
        out.append(ranks(row, np.setdiff1d(positives, copies), copies))
    return out
