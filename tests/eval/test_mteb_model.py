"""Exported encoders as models of MTEB and MIEB, on local tasks of images and texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from eval.mteb_model import Model

GENERAL: dict[str, Any] = {
    "description": "A task of local data.",
    "reference": None,
    "dataset": {"path": "NA", "revision": "NA"},
    "eval_splits": ["test"],
    "eval_langs": ["eng-Latn"],
    "main_score": "accuracy",
    "date": None,
    "dialect": None,
    "domains": None,
    "task_subtypes": None,
    "license": None,
    "annotations_creators": None,
    "sample_creation": None,
    "bibtex_citation": None,
}


def task(kind: str, modality: str, column: str, values: list[Any], labels: list[int]) -> Any:
    """A classification task whose training and test sets are these values."""
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.classification import AbsTaskClassification
    from mteb.abstasks.task_metadata import TaskMetadata

    class Local(AbsTaskClassification):
        metadata = TaskMetadata(
            name=f"Local{kind}", type=kind, modalities=[modality], category=f"{modality[0]}2c", **GENERAL
        )
        input_column_name = column
        n_experiments = 1

        def load_data(self, *_: Any, **__: Any) -> None:
            part = Dataset.from_dict({column: values, "label": labels})
            self.dataset, self.data_loaded = DatasetDict({"train": part, "test": part}), True

    return Local()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ImageClassification", "Classification"])
def test_local_tasks(kind: str):
    mteb = pytest.importorskip("mteb")
    rng, labels = np.random.default_rng(0), [n % 2 for n in range(24)]
    if kind == "Classification":
        values: list[Any] = [("aaab" if label else "zzzy") * (2 + n) for n, label in enumerate(labels)]
        local, model = task(kind, "text", "text", values, labels), Model("bytes", device="cpu")
    else:
        noise = rng.integers(0, 60, (24, 40, 50, 3))
        values = [Image.fromarray((noise[n] + 150 * label).astype(np.uint8)) for n, label in enumerate(labels)]
        local, model = task(kind, "image", "image", values, labels), Model("pixels", device="cpu")
    result = mteb.evaluate(model, local, cache=None, show_progress_bar=False, co2_tracker=False)
    assert result.task_results[0].get_score() == 1.0


def test_features_and_similarities():
    """Of batches, in order; of a gray image as of a colour one."""
    model, rng = Model("pixels", device="cpu"), np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (40, 30 + n, 3), dtype=np.uint8)) for n in range(5)]
    together = model.encode([{"image": images[:3]}, {"image": images[3:]}], hf_split="test")
    assert together.shape == (5, 3 * 32 * 32) and np.array_equal(together[4:], model.encode([{"image": images[4:]}]))
    assert model.encode([{"image": [images[0].convert("L")]}]).shape == (1, 3 * 32 * 32)
    x = torch.from_numpy(together)
    expected = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)
    torch.testing.assert_close(model.similarity(together, together), expected)
    torch.testing.assert_close(model.similarity_pairwise(together[:4], together[1:]), expected.diagonal(1))
    with pytest.raises(UserError, match="pixels: reads images, but the task has text, label"):
        model.encode([{"text": ["a"], "label": [0]}])
