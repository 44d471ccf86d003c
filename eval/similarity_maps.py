"""The section of the report with similarity maps: the reader chooses a patch of an image, and sees which patches have
features like it. Shapes: P = h × w patches of an image, D features.

The page holds the similarities of all pairs of patches as bytes, so that a chosen patch needs no model. Without
JavaScript the maps of the patch in the middle are shown.
"""

from __future__ import annotations

import base64
from html import escape

import numpy as np

from eval import pictures
from eval.report_page import section

MAX_GRID = 16  # patches along a side of the square
# Colours from no similarity to equality, black to white by blue, red and yellow; those between are interpolated.
ANCHORS = [(8, 8, 28), (58, 42, 148), (186, 55, 110), (245, 140, 52), (255, 252, 200)]
TABLE = np.stack(
    [np.interp(np.linspace(0, 4, 256), range(5), [color[i] for color in ANCHORS]) for i in range(3)], axis=1
).round()
COLORS = TABLE.astype(np.uint8)  # [256, 3]

SCRIPT = """
for (const card of document.querySelectorAll('.similar')) {
  const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const [h, w] = card.dataset.grid.split(' ').map(Number), colors = bytes(card.dataset.colors);
  const picker = card.querySelector('.picker'), mark = card.querySelector('.mark');
  const maps = [...card.querySelectorAll('img[data-pairs]')].map(img => {
    const canvas = document.createElement('canvas');
    canvas.width = w; canvas.height = h; canvas.dataset.pairs = img.dataset.pairs;
    canvas.setAttribute('role', 'img'); canvas.setAttribute('aria-label', img.alt);
    img.replaceWith(canvas);
    return {canvas, pairs: bytes(img.dataset.pairs)};
  });
  let chosen = Number(card.dataset.patch);
  const show = () => {
    for (const {canvas, pairs} of maps) {
      const pixels = new ImageData(w, h);
      for (let i = 0; i < h * w; i++) {
        pixels.data.set(colors.subarray(3 * pairs[chosen * h * w + i]).subarray(0, 3), 4 * i);
        pixels.data[4 * i + 3] = 255;
      }
      canvas.getContext('2d').putImageData(pixels, 0, 0);
    }
    mark.style.left = 100 * (chosen % w) / w + '%';
    mark.style.top = 100 * Math.floor(chosen / w) / h + '%';
    picker.setAttribute('aria-label', 'chosen patch: row ' + (Math.floor(chosen / w) + 1) + ', column ' + (chosen % w + 1));
    card.dataset.patch = chosen;
  };
  const at = event => {
    const box = picker.getBoundingClientRect(), limit = (x, n) => Math.min(n - 1, Math.max(0, Math.floor(x * n)));
    chosen = limit((event.clientY - box.top) / box.height, h) * w + limit((event.clientX - box.left) / box.width, w);
    show();
  };
  picker.addEventListener('pointerdown', at);
  picker.addEventListener('pointermove', event => { if (event.pointerType === 'mouse') at(event); });
  picker.addEventListener('keydown', event => {
    const [y, x] = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key] || [0, 0];
    if (!y && !x) return;
    event.preventDefault();
    chosen = Math.min(h - 1, Math.max(0, Math.floor(chosen / w) + y)) * w + Math.min(w - 1, Math.max(0, chosen % w + x));
    show();
  });
  show();
}
"""


def pairs(features: np.ndarray) -> np.ndarray:
    """Patch features [h, w, D] → the cosine similarities of all pairs of patches, uint8 [P, P]: 255 for 1, and 0 for the
    2nd percentile of all pairs and below it."""
    flat = np.nan_to_num(features.reshape(-1, features.shape[-1]).astype(np.float64))
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
    cosines = flat @ flat.T
    low = np.percentile(cosines, 2)
    return ((cosines - low) / max(1 - low, 1e-12) * 255).clip(0, 255).round().astype(np.uint8)


def map_section(images: list[np.ndarray], names: list[str], maps: dict[str, list[np.ndarray]], side: int) -> str:
    """`images`: [C, S, S] of any dtype; `names`: their labels, or ""; `maps`: {name of a checkpoint: patch features [h, w, D]
    of each image}; `side`: the side of the images in pixels that the encoder got."""
    if not images:
        return ""
    cards = []
    for n, (image, name) in enumerate(zip(images, names, strict=True)):
        height, width = next(iter(maps.values()))[n].shape[:2]
        patch = height // 2 * width + width // 2
        figures = ""
        for checkpoint, features in maps.items():
            values = pairs(features[n])
            preset = pictures.data_url(COLORS[values[patch]].reshape(height, width, 3))
            alt = escape(f"similarity to the chosen patch, {checkpoint}")
            figures += (
                f'<figure><img alt="{alt}" src="{preset}" data-pairs="{base64.b64encode(values.tobytes()).decode()}">'
                f"<figcaption>{escape(checkpoint)}</figcaption></figure>"
            )
        mark = (
            f'<span class="mark" style="left:{100 * (patch % width) / width:.4g}%;top:'
            f'{100 * (patch // width) / height:.4g}%;width:{100 / width:.4g}%;height:{100 / height:.4g}%"></span>'
        )
        caption = f"<figcaption>{escape(name) or 'image'}</figcaption>"
        cards.append(
            f'<div class="card similar" data-grid="{height} {width}" data-patch="{patch}"'
            f' data-colors="{base64.b64encode(COLORS.tobytes()).decode()}"><figure><div class="picker" tabindex="0">'
            f'<img alt="{escape(name)}" src="{pictures.data_url(image, 256)}">{mark}</div>{caption}</figure>{figures}</div>'
        )
    text = (
        "Choose a patch of an image: point at it or tap it, or move the frame with the arrow keys. The maps show the"
        " cosine similarity of its features to those of each other patch, from dark (the 2nd percentile of all pairs of"
        f" this image) to light (1). Images of {side} × {side} pixels."
    )
    return section("Similarity to a patch", text, *cards, columns="420px")
