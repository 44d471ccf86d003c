"""Exported encoders as models of MTEB (arXiv 2210.07316) and MIEB (2504.10471), which score texts and images:

    import mteb
    from eval.mteb_model import Model

    mteb.evaluate(Model("runs/mine/export/20000"), tasks=mteb.get_tasks(tasks=["STL10Classification"]))

A model of images gives the features of center crops, a model of texts those of texts, pooled as for the protocols here.
The benchmark downloads its data sets, and keeps its results in a cache of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from data_pipeline.views.augmentations import center
from eval.features import open_encoder


class Model:
    """An exported folder, "pixels" or "bytes", with the interface of an encoder that the benchmark expects
    (`mteb.models.EncoderProtocol`). `device`: cpu, cuda, …; None: the best one."""

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        image_size: int | None = None,
        **_: Any,
    ):
        self.encoder, _ = open_encoder(model_name, image_size, device or "auto")
        inputs = {"images": "image", "texts": "text"}
        if self.encoder.unit not in inputs:
            raise UserError(
                f"{model_name}: reads {self.encoder.unit}, but the benchmark's adapter gives texts and images"
            )
        self.input, self.revision = inputs[self.encoder.unit], revision or self.encoder.model_hash[:16]

    def encode(self, inputs: Iterable[dict[str, Any]], **_: Any) -> np.ndarray:
        """Features [N, D], fp32, of batches of inputs, {"image": PIL images} or {"text": texts}."""
        out = []
        for batch in inputs:
            if self.input not in batch:
                raise UserError(f"{self.encoder.name}: reads {self.encoder.unit}, but the task has {', '.join(batch)}")
            prepare = self._pixels if self.input == "image" else str
            out.append(self.encoder.pooled([prepare(each) for each in batch[self.input]]))
        return torch.cat(out).numpy()

    def _pixels(self, image: Any) -> np.ndarray:
        """The center crop of a PIL image, uint8 [C, S, S]."""
        modes = {1: "L", 3: "RGB", 4: "RGBA"}
        if self.encoder.channels not in modes:
            raise UserError(
                f"{self.encoder.name}: reads {self.encoder.channels} channels, which no image of a task has"
            )
        pixels = np.array(image.convert(modes[self.encoder.channels]))
        return center(pixels.reshape(*pixels.shape[:2], -1), self.encoder.image_size)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosine similarities [N, M] of features [N, D] and [M, D]."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosine similarities [N] of features [N, D] and [N, D]."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(1)

    @property
    def mteb_model_meta(self) -> Any:
        try:
            from mteb.models import ModelMeta
        except ImportError:
            raise UserError("mteb is not installed; pip install 'unlabeled[mteb]'") from None

        facts = {"name": f"unlabeled/{self.encoder.name}", "revision": self.revision, "modalities": [self.input]}
        return ModelMeta.create_empty(facts)


def _unit(x: Any) -> Tensor:
    """Normalised rows, fp32."""
    return F.normalize(torch.atleast_2d(torch.as_tensor(x)).float(), dim=1)
