"""The section of the report on a model of images and texts: the captions that it finds for images."""

from __future__ import annotations

from html import escape

import numpy as np

from common.errors import Damaged
from data_pipeline.parts.caption import Caption
from data_pipeline.shards.samples import Samples
from eval import pictures
from eval.features import Encoder
from eval.report_page import section
from eval.retrieval import captions
from eval.text_embeddings import embed_features, embed_texts, text_side_of
from eval.tiers import training_shards
from pretrain.interchange import text_sides
from pretrain.recipes.recipe import Recipe

MAX_SAMPLES, SHOWN, FOUND = 256, 8, 3  # captions that are compared, images that are shown, captions of each


def caption_section(recipe: Recipe, encoder: Encoder) -> str:
    """The captions that the last export finds for some images, among those of other samples; "" for a model that reads
    no texts, or for data without captions."""
    if encoder.folder is None or not text_sides.has_one(encoder.folder) or encoder.channels != 3:
        return ""
    part = Caption(extensions=("txt",))
    held_out = recipe.eval.test or recipe.eval.val
    shards = held_out if held_out and "txt" in Samples(held_out).extensions else training_shards(recipe)
    samples, images, texts = Samples(shards), list[np.ndarray](), list[str]()
    for number in np.linspace(0, len(samples) - 1, min(MAX_SAMPLES, len(samples))).round().astype(int).tolist():
        try:
            caption = captions(part, samples, number)[0]
            images.append(encoder.read(samples, number))
        except Damaged:
            continue
        texts.append(caption)
    if len(texts) <= FOUND:
        return ""
    side = text_side_of(encoder)
    of_texts = embed_texts(side, texts)
    of_images = embed_features(side, pictures.pooled(encoder, np.stack(images), scaled=False))
    similarity = of_images @ of_texts.T  # [N, N]
    cards = []
    for n in np.linspace(0, len(texts) - 1, min(SHOWN, len(texts))).round().astype(int).tolist():
        lines = ""
        for found in similarity[n].topk(FOUND).indices.tolist():
            is_own = texts[found] == texts[n]
            lines += (
                f'<li class="{"up" if is_own else ""}">{"✓ " if is_own else ""}{escape(texts[found])}'
                f" <small>{similarity[n, found]:.2f}</small></li>"
            )
        place = int((similarity[n] > similarity[n, n]).sum()) + 1
        image = f'<img alt="" src="{pictures.data_url(images[n], 128)}">'
        own = f"<p>{escape(texts[n])} <small>its own caption, place {place}</small></p>"
        cards.append(f'<div class="card captioned">{image}<div>{own}<ol>{lines}</ol></div></div>')
    seen = "held-out" if shards is held_out else "training"
    text = (
        f"{seen.capitalize()} images, and the {FOUND} captions whose embeddings have the largest cosine similarity to"
        f" theirs, among those of {len(texts):,} images."
    )
    return section("Captions", text, *cards, columns="420px")
