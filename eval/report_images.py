"""The sections of the report that show what a model of images sees: colours of patches, similarity to a chosen patch,
nearest neighbours and a map of the features. Shapes: N images, M mosaics, S pixels, h × w patches, D features."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from data_pipeline.formats.pixels import PixelDtype
from data_pipeline.shards.samples import Samples
from data_pipeline.views.augmentations import center
from eval import feature_map, pictures, similarity_maps
from eval.features import Encoder, open_encoder
from eval.report_page import section
from eval.tiers import training_shards
from pretrain.recipes.recipe import Recipe

# The report uses at most so many test and gallery images, evenly spaced over the sets, and shows so many on the map.
MAX_TEST_IMAGES, MAX_GALLERY_IMAGES, MAX_MAP_IMAGES = 512, 1536, 400
MAX_CHECKPOINTS = 4  # that are shown: the first, the last, and those between
SCALES = (1, 2, 4)  # times the image size, at which an image is shown
MAX_SIDE = 1024  # pixels of the largest of these
SHOWN_IMAGES, NEIGHBOUR_QUERIES = 4, 8


class Images(NamedTuple):
    """Images that a report shows: labelled test images and gallery images, or only training images."""

    samples: Samples
    images: np.ndarray  # [N, C, S, S] of the encoder's dtype
    labels: pictures.Labels
    numbers: list[int]  # of these images in `samples`
    gallery: np.ndarray  # [G, C, S, S]; `images` itself, if there is no gallery
    gallery_labels: pictures.Labels
    gallery_count: int  # number of images in the whole gallery

    def at_size(self, chosen: list[int], size: int) -> list[np.ndarray]:
        """Some of the images, read again at another size: [C, size, size] each."""
        channels, dtype = self.images.shape[1], self.images.dtype.name
        return [center(self.samples.image(self.numbers[n], channels, dtype=dtype), size) for n in chosen]


class Seen(NamedTuple):
    """What one checkpoint makes of the images."""

    mosaics: list[np.ndarray]  # [h, w, D] each
    patches: list[np.ndarray]  # of SHOWN_IMAGES images, [h, w, D] each
    pooled: Tensor  # [≤ MAX_MAP_IMAGES, D]


def load_images(recipe: Recipe, size: int, channels: int, dtype: PixelDtype) -> Images:
    """The images for a report, center crops of side `size`, with `channels` of `dtype`. Raises DataError if they cannot be read."""
    cfg = recipe.eval
    gallery_shards = cfg.test_gallery or cfg.gallery
    if cfg.test and gallery_shards:
        samples, gallery = Samples(cfg.test), Samples(gallery_shards)
        shown = pictures.load_some(samples, MAX_TEST_IMAGES, size, channels, dtype)
        gallery_images, gallery_labels, _ = pictures.load_some(gallery, MAX_GALLERY_IMAGES, size, channels, dtype)
        return Images(samples, *shown, gallery_images, gallery_labels, len(gallery))
    samples = Samples(training_shards(recipe))
    images, _, numbers = pictures.load_some(samples, MAX_TEST_IMAGES, size, channels, dtype)
    labels: pictures.Labels = [None] * len(images)
    return Images(samples, images, labels, numbers, images, labels, len(samples))


def chosen_steps(steps: list[int]) -> list[int]:
    """At most MAX_CHECKPOINTS of the steps: the first, the last, and those between, evenly spaced."""
    return [steps[n] for n in sorted({*np.linspace(0, len(steps) - 1, MAX_CHECKPOINTS).round().astype(int).tolist()})]


def checkpoint_name(step: int) -> str:
    return f"pretrained, step {step:,}" if step else "untrained"


def image_sections(recipe: Recipe, exports: Mapping[int, Path], last: Encoder, device: str) -> str:
    """All sections on images. `exports`: {step: folder}; `last`: the encoder of the last one."""
    shown = load_images(recipe, last.image_size, last.channels, last.dtype)
    groups = pictures.spread(shown.labels, 12, 4)
    mosaics = [pictures.mosaic(shown.images[np.concatenate(groups[i : i + 4])]) for i in (0, 4, 8)]
    chosen = list(dict.fromkeys(n for (n,) in pictures.spread(shown.labels, SHOWN_IMAGES, 1)))
    side = similarity_maps.MAX_GRID * last.patch_size
    side = min(side, MAX_SIDE) // last.patch_size * last.patch_size or last.patch_size
    large = shown.at_size(chosen, side)
    mapped = np.linspace(0, len(shown.images) - 1, min(MAX_MAP_IMAGES, len(shown.images))).round().astype(int)
    seen = {}
    for step in chosen_steps(list(exports)):
        encoder = last if step == max(exports) else open_encoder(str(exports[step]), recipe.eval.image_size, device)[0]
        seen[step] = Seen(
            [pictures.patch_features(encoder, mosaic) for mosaic in mosaics],
            [pictures.patch_features(encoder, image) for image in large],
            pictures.pooled(encoder, shown.images[mapped]),
        )
    ends = {checkpoint_name(step): seen[step] for step in sorted({min(seen), max(seen)})}
    names = [shown.labels[n] or "" for n in chosen]
    return "".join(
        [
            _mosaic_section(mosaics, _rows_of_classes(shown.labels, groups), seen),
            _size_section(shown, chosen, names, last),
            similarity_maps.map_section(large, names, {name: each.patches for name, each in ends.items()}, side),
            _neighbour_section(shown, last),
            _map_section(shown, mapped, {name: each.pooled for name, each in ends.items()}),
        ]
    )


def _rows_of_classes(labels: pictures.Labels, groups: list[list[int]]) -> list[list[str]]:
    """For each mosaic the labels of its four rows, or [] if a row has images of several classes or without one."""
    rows = [{labels[number] for number in group} for group in groups]
    names = [str(next(iter(row))) if len(row) == 1 and None not in row else "" for row in rows]
    return [names[i : i + 4] if all(names[i : i + 4]) else [] for i in range(0, len(names), 4)]


def _mosaic_section(mosaics: list[np.ndarray], rows: list[list[str]], seen: dict[int, Seen]) -> str:
    """The section with mosaics of images, and their patch features at several checkpoints as colours."""
    colors = {checkpoint_name(step): pictures.pca_colors(np.stack(each.mosaics)) for step, each in seen.items()}
    strips = []
    for i, mosaic in enumerate(mosaics):
        figures = pictures.figure(f"mosaic {i + 1}", mosaic, "rows: " + ", ".join(rows[i]) if rows[i] else "image")
        for name, of_checkpoint in colors.items():
            figures += pictures.figure(f"mosaic {i + 1}, {name}", of_checkpoint[i], name, "pixels")
        strips.append(f'<div class="strip">{figures}</div>')
    text = (
        "Each mosaic of 4 × 4 images is one input of the encoder. The first three principal components (PCA) of the"
        " patch features of all mosaics are shown as red, green and blue: patches of similar colour have similar"
        " features. Colours of different checkpoints cannot be compared."
    )
    channels = mosaics[0].shape[0]
    text += f" The first three of the {channels} channels of the images are shown." if channels > 3 else ""
    return section("What the patches learned", text, *strips, kind="")


def _size_section(shown: Images, chosen: list[int], names: list[str], encoder: Encoder) -> str:
    """The section with single images at several sizes, and their patch features as colours."""
    sizes = [encoder.image_size * scale for scale in SCALES if encoder.image_size * scale <= MAX_SIDE]
    sizes = sizes or [encoder.image_size]
    strips = []
    for number, name in zip(chosen, names, strict=True):
        images = [shown.at_size([number], size)[0] for size in sizes]
        features = [pictures.patch_features(encoder, image) for image in images]
        figures = pictures.figure(name, images[-1], name or "image")
        for size, each, color in zip(sizes, features, pictures.joint_colors(features), strict=True):
            height, width = each.shape[:2]
            figures += pictures.figure(
                f"{name}, {size} pixels", color, f"{size} × {size} pixels, {height} × {width} patches", "pixels"
            )
        strips.append(f'<div class="strip">{figures}</div>')
    text = (
        "The last checkpoint on larger and larger versions of an image. The principal components are those of all sizes"
        " of an image together, so colours in a row can be compared: a model that keeps its colours can be used at that"
        " size."
    )
    return section("Patches at several resolutions", text, *strips, kind="")


# ---------------------------------------------------------------- whole images
def _neighbour_section(shown: Images, encoder: Encoder) -> str:
    """The section with some of the images and their nearest neighbours in the gallery, which may be the images
    themselves."""
    queries = list(dict.fromkeys(n for (n,) in pictures.spread(shown.labels, NEIGHBOUR_QUERIES, 1)))
    gallery = pictures.pooled(encoder, shown.gallery)
    similarity = pictures.pooled(encoder, shown.images[queries]) @ gallery.T  # [Q, G]
    candidates = len(shown.gallery)
    if shown.gallery is shown.images:  # an image is not its own neighbour
        similarity[range(len(queries)), queries] = -2
        candidates -= 1
    cards, verdicts = [], []
    nearest = similarity.topk(min(6, candidates)).indices.tolist()
    for query, neighbours in zip(queries, nearest, strict=True):
        thumbnails = _thumbnail(shown.images[query], shown.labels[query])
        for i in neighbours:
            verdicts.append(_verdict(shown.labels[query], shown.gallery_labels[i]))
            thumbnails += _thumbnail(shown.gallery[i], shown.gallery_labels[i], verdicts[-1])
        cards.append(f'<div class="card near">{thumbnails}</div>')
    text = (
        "A query is on the left. Beside it are the six images whose pooled features have the largest cosine similarity"
        f" to its features, among {len(shown.gallery):,} of {shown.gallery_count:,} gallery images."
    )
    text += f" {verdicts.count('right')} of {len(verdicts)} are of the query's class." if any(verdicts) else ""
    return section("Nearest neighbours", text, *cards, columns="420px")


def _verdict(query: str | None, neighbour: str | None) -> str:
    """Whether a neighbour has the query's label: "right", "wrong", or "" if a label is missing."""
    if query is None or neighbour is None:
        return ""
    return "right" if query == neighbour else "wrong"


def _thumbnail(image: np.ndarray, label: str | None, verdict: str = "") -> str:
    """A small image with its label and a mark for the verdict."""
    name, mark = escape(label or ""), {"right": "✓ ", "wrong": "✗ "}.get(verdict, "")
    caption = f'<figcaption title="{name}">{mark}{name}</figcaption>' if name else ""
    return f'<figure class="{verdict}"><img alt="{name}" src="{pictures.data_url(image, 96)}">{caption}</figure>'


def _map_section(shown: Images, mapped: np.ndarray, pooled: dict[str, Tensor]) -> str:
    """The section with maps of the features: points by class at the first and the last checkpoint, and the images."""
    labels = [shown.labels[n] for n in mapped]
    places = {name: feature_map.positions(features) for name, features in pooled.items()}
    classes = len({label for label in labels if label is not None})
    cards = [feature_map.points(name, each, labels) for name, each in places.items()] if classes > 1 else []
    for name, each in places.items():
        picture = pictures.figure("images on the map", feature_map.thumbnails(each, shown.images[mapped]), name)
        cards.append(f'<div class="card">{picture}</div>')
    text = (
        f"t-SNE of the pooled features of {len(mapped):,} images: images with similar features are close together."
        " Distances between groups, and the directions, have no meaning."
    )
    return section("Map of the features", text, *cards, columns="420px")
