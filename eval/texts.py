"""Frozen language models as protocols see them: an exported folder with its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipeline.rows import Rows
from data_pipeline.storage import DataError
from data_pipeline.vocabulary import Vocabulary
from pretrain.models.text_layers import TextBackbone


class TextEncoder:
    """A frozen text model; `name` stands in result rows, `pool` is the feature that stands for a text: `cls` or the `mean` of its tokens."""

    def __init__(self, backbone: TextBackbone, name: str, folder: Path, pool: str = "mean"):
        self.backbone, self.name, self.folder, self.pool = backbone, name, folder, pool
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        backbone.to(self.device).eval()
        self.vocabulary = Vocabulary.read(str(folder))

    def rows(self, specs: Sequence[str], length: int | None, document_mask: bool) -> Rows:
        """Token sets as rows of so many tokens (null: the model's context). DataError where another tokenizer made them."""
        if not specs:
            raise DataError("no token set is named; write eval.val=… (or query=… for `unlabeled eval`)")
        rows = Rows(specs, length or self.backbone.context, "split", document_mask)
        if rows.blocks.hash != self.vocabulary.hash:
            raise DataError(
                f"{rows.names}: was made with another tokenizer than {self.folder};"
                f" tokenize its text with --tokenizer {self.folder / 'tokenizer.json'}"
            )
        return rows


def name_of(about: dict[str, Any]) -> str:
    """What stands in result rows: the student's name, or whether it is the untrained network."""
    return about.get("student") or ("untrained" if about.get("step") == 0 else "pretrained")
