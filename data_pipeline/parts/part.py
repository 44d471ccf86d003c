"""A part: one thing that a sample holds (an image, a caption, a label, a row of tokens). A part knows how it is decoded
from the members of a sample, and how its tensors are moved to the device.

An objective names its parts: `parts = {"image": Image(), "text": Caption()}`. The objective's views get a sample with
an entry for each part: the value that `decode` returns. A new kind of part is a class that derives from `Part`; it can
be in the file of the objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from common.errors import Absent, ConfigError
from data_pipeline.formats.decode_budget import DECODE_MB
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.members import check_extensions
from data_pipeline.shards.samples import Samples
from data_pipeline.shards.vocabulary import Vocabulary


@dataclass
class About:
    """Facts about the model and the data that an objective's views may need.

    A fact that does not apply keeps its default.
    """

    image_size: int = 0  # pixels
    patch_size: int = 0  # pixels
    channels: int = 0
    mean: tuple[float, ...] = ()  # of the training pixels, for each channel, on a scale from 0 to 1
    std: tuple[float, ...] = ()  # the standard deviation of the same pixels
    pixel_dtype: str = "uint8"  # of images: see data_pipeline/formats/pixels.py
    frames: int = 0  # of a clip
    tubelet: int = 0  # frames of a clip that one token covers
    length: int = 0  # tokens of a row, or of a caption
    vocabulary: Vocabulary | None = None
    document_mask: bool = False  # whether tokens attend to and predict tokens of their own document only
    classes: tuple[str, ...] = ()  # the names of the labels, by number
    sample_rate: int = 0  # of waveforms, in Hz
    samples: int = 0  # of a cut waveform
    mels: int = 0  # bands of log-mel features
    stack: int = 0  # log-mel frames of a token


@dataclass
class Part:
    """The base class of parts.

    By default members are read from samples in tars, and tensors are copied to the device as they are.
    """

    decode_mb: ClassVar[float] = DECODE_MB  # MB of decoded values that a data worker may hold at a time
    extensions: ClassVar[tuple[str, ...]] = ()  # extensions of its members; a sample must have at least one of them

    def configured(self, data: Any, model: Any) -> Self:
        """A copy of this part with options from the `data` and `model` sections of a recipe.

        Raises ConfigError for options that do not fit each other.
        """
        return self

    def open(self, specs: Sequence[str], held_out: bool = False, extensions: Sequence[str] = ()) -> Dataset:
        """Open a dataset for an objective whose first part this is.

        `held_out`: whether the data is for the validation loss, which uses each sample once. `extensions`: those that
        the parts of the objective read; shards that have no index yet are indexed with them.
        """
        return Samples(specs, further=extensions)

    def check(self, datasets: Sequence[Dataset], model: Any) -> None:
        """Raises ConfigError if a dataset does not have this part, or does not fit the model of the recipe."""
        for dataset in datasets:
            if not set(dataset.extensions) & set(self.extensions):
                present = ", ".join(f".{extension}" for extension in dataset.extensions)
                further = check_extensions(self.extensions)
                hint = f"; `unlabeled shards index FOLDER --members {' '.join(further)}` adds them to an index"
                raise ConfigError(
                    f"{dataset.names}: holds {present} and no {self.noun}; members are read whose names end in"
                    f" {', '.join(self.extensions)}{hint if further else ''}"
                )

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The vocabulary of the tokenizer that the part itself opens, which is stored with the run; None if it opens
        none."""
        return None

    @property
    def noun(self) -> str:
        """The word for this part in messages."""
        return type(self).__name__.lower()

    def about(self, datasets: Sequence[Dataset] | None, model: Any) -> dict[str, Any]:
        """The fields of `About` that this part can set. `datasets` is None for `unlabeled plan`, which has no data."""
        return {}

    def stored_pixels(self, datasets: Sequence[Dataset]) -> str:
        """The dtype of `data_pipeline/formats/pixels.py` that keeps all bits of the images of all datasets, for
        `data.pixel_dtype: auto`; "" for a part without pixels."""
        return ""

    def facts(self) -> dict[str, Any]:
        """What the config.json of an export states about this part, so that the model can be used without the recipe
        (the key `unlabeled` there)."""
        return {}

    def decode(self, members: dict[str, bytes], known: dict[str, Any]) -> Any:
        """Decode this part of one sample from {extension: bytes} of its members. Returns its value, or an object that
        decodes it lazily. Raises Damaged.

        `known`: what the manifest of the shards states about all samples: "classes", and "pixels" (bits, orientation).
        """
        raise NotImplementedError

    def absent(self) -> Absent:
        """The exception for a sample without any member of this part. Such samples are skipped."""
        return Absent(f"holds no {self.noun} member ({', '.join(self.extensions)})")

    def stand_in(self, name: str, rng: np.random.Generator, about: About) -> dict[str, Any]:
        """The entries {name: value, …} of a random sample, which replaces real data in plans and tests."""
        raise NotImplementedError

    def placed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a sample's tensor after `place`, for plans, which place nothing. `shape`: that before it."""
        return shape

    def place(self, tensor: Tensor, device: torch.device, **extras: Tensor) -> Tensor:
        """Copy a tensor of a batch to the device, without a host sync.

        `extras`: the entries "KEY.name" of the batch that belong to the tensor "KEY", by name.
        """
        return tensor.to(device, non_blocking=True)
