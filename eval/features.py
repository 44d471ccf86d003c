"""Features of images, or of clips of videos, from a frozen encoder.

Protocols get an `Encoder` for an exported folder, or for raw pixels as a baseline. Shapes: N images, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import Damaged, DataError, UserError
from data_pipeline.formats.decode_budget import Budget
from data_pipeline.formats.image_formats import ARRAY, IMAGE_MEMBERS, WrongChannels
from data_pipeline.formats.pixels import PIXEL_DTYPES, PixelDtype
from data_pipeline.parts.image import Image
from data_pipeline.parts.video_clip import Clip, Clips
from data_pipeline.shards.samples import MAX_TRIED, Samples
from data_pipeline.views.augmentations import Augment, Rng, center, spaced_squares
from data_pipeline.views.clip_views import clip_crops
from eval import feature_cache
from eval.audio_features import AudioEncoder, LogMelPart, log_mel_statistics, open_audio_encoder
from eval.text_features import TextEncoder, bytes_of, name_of
from pretrain.models.layers import Features
from pretrain.parallel.device import pick_device


class Encoder(feature_cache.Source):
    """A frozen backbone with its normalisation of pixels (`mean`, `std`), their `dtype`, and its pooling.

    `backbone` is a `Backbone`, or any function from normalised images [B, C, S, S] to `Features`. `name`: the model's
    name in result rows; it also identifies a function in the cache of features, so that functions need different names.
    `cache`: the folder of that cache; None: the user's (see `feature_cache.py`).
    """

    unit = "images"
    batch = 64
    folder: Path | None = None  # the export of the backbone; that of a dual encoder also holds the text model
    members = IMAGE_MEMBERS

    def __init__(
        self,
        backbone: Any,
        name: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        pool: str = "cls",
        device: str = "auto",
        dtype: PixelDtype = "uint8",
    ):
        self.dtype = dtype
        self.backbone, self.name, self.image_size, self.pool = backbone, name, image_size, pool
        self.mean, self.std = list(mean), list(std)
        self.part = Image(len(self.mean), mean=self.mean, std=self.std)
        self.channels = len(self.mean)
        self.has_labels = True  # False: all samples have the label "", also those that have none
        self.device = pick_device(device, key="eval.device")
        self.budget = Budget()
        if isinstance(backbone, torch.nn.Module):
            backbone.to(self.device).eval()

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> Features:
        """Features of images [B, C, H, W] of uint8, uint16 or float32, on the device."""
        return self.backbone(self.part.place(torch.from_numpy(images), self.device))

    def pooled(self, images: np.ndarray | list[np.ndarray]) -> Tensor:
        """One vector per image [B, D]: the class token, or the mean of the patches. fp32, on the CPU."""
        features = self(np.stack(images) if isinstance(images, list) else images)
        return (features.cls if self.pool == "cls" else features.tokens.mean(1)).float().cpu()

    @property
    def patch_size(self) -> int:
        """Pixels along one side of a patch; 1 for a function."""
        return getattr(self.backbone, "patch_size", 1)

    @property
    def max_layers(self) -> int:  # type: ignore[override]
        return getattr(self.backbone, "max_layers", 0)

    @torch.inference_mode()
    def stored(self, inputs: Any) -> Tensor:
        """If `layers` is set, the class tokens of as many last blocks, those of the last one first, and the mean of the
        last block's patches: [B, (layers + 1)·D]. Otherwise `pooled`."""
        if not self.layers:
            return self.pooled(inputs)
        images = self.part.place(torch.from_numpy(np.stack(inputs)), self.device)
        features = self.backbone(images, layers=self.layers)
        width = features.cls.shape[1] // self.layers
        blocks = features.cls.split(width, 1)  # the last block is the last one
        return torch.cat([*blocks[::-1], features.tokens[..., -width:].mean(1)], 1).float().cpu()

    def columns(self, layers: int, mean: bool) -> Tensor:
        """The columns of a stored row that hold the class tokens of the last `layers` blocks and, if `mean`, the mean of
        the patches."""
        width = self.backbone.embed_dim
        return torch.cat([torch.arange(layers * width), self.layers * width + torch.arange(width * mean)])

    @property
    def pooled_columns(self) -> slice:
        width = self.backbone.embed_dim if self.layers else 0
        first = self.layers * width if self.pool == "mean" else 0
        return slice(first, first + width) if self.layers else slice(None)

    def augmented(self, samples: Samples, number: int, rng: Rng, flip: float = 0.5) -> np.ndarray:
        """A random crop of a sample, flipped with probability `flip`, of the shape that `read` returns, on which probes
        are trained."""
        view, pixels = Augment(self.image_size, (0.08, 1.0), flip=flip), self.image(samples, number)
        return view.apply(pixels, view.draw(pixels.shape[:2], rng(0)))

    def check(self, specs: Sequence[str]) -> Samples:
        """The samples. See `check_pixels`."""
        samples = Samples(specs)
        self.check_pixels(samples)
        return samples

    def check_pixels(self, samples: Samples) -> None:
        """Raises UserError if the samples hold signed or float pixels, and the model reads unsigned ones."""
        if self.dtype != "float32" and samples.stored_dtype() == "float32":
            raise UserError(
                f"{samples.names}: holds signed or float pixels, whose range of values is not known, but {self.name}"
                f" reads {self.dtype}; scale the images as those that it was trained on"
            )

    def variant(self, **changes: Any) -> Encoder:
        """A copy with other attributes (`image_size`, `has_labels`). `delete_features` deletes the features of both."""
        out = copy.copy(self)
        vars(out).update({"_sets": self._sets, "model_hash": self.model_hash, **changes})
        return out

    def _key(self, specs: Sequence[str]) -> tuple[str, ...]:
        return (*super()._key(specs), str(self.image_size), str(self.has_labels))

    @cached_property
    def model_hash(self) -> str:
        return feature_cache.model_hash(self.backbone) if isinstance(self.backbone, torch.nn.Module) else self.name

    def fingerprint(self, samples: Samples) -> str:
        decoding = [(each.manifest.pixels, each.manifest.classes) for each in samples.manifests]
        kept = f"last {self.layers}" if self.layers else self.pool
        known = f"{self.model_hash} {kept} {self.image_size} {self.mean} {self.std} {samples.max_pixels} {decoding}"
        known += "" if self.dtype == "uint8" else f" {self.dtype}"
        return known if self.has_labels else f"{known} without labels"

    def read(self, samples: Samples, number: int) -> np.ndarray:
        """The center crop of an image, `dtype` [C, S, S]."""
        return center(self.image(samples, number), self.image_size)

    def image(self, samples: Samples, number: int) -> np.ndarray:
        """A whole image, `dtype` [H, W, C]."""
        with self.budget.lease() as take:
            return samples.image(number, self.channels, take, self.dtype)

    def stand_in(self) -> np.ndarray:
        return np.zeros((self.channels, self.image_size, self.image_size), self.dtype)

    def label(self, samples: Samples, number: int) -> str:
        return feature_cache.label_of(samples, number) if self.has_labels else ""


class PixelEncoder(Encoder):
    """The pixels of images of side 32, with as many channels as the images of a set have."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: str = "auto"):
        super().__init__(_pixels, "pixels", 32, mean, std, device=device)

    def check(self, specs: Sequence[str]) -> Samples:
        samples = Samples(specs)
        count, self.dtype = stored_channels(samples), samples.stored_dtype()
        if count != self.channels:
            self.channels, self.mean, self.std = count, [0.5] * count, [0.5] * count
            self.part = Image(count, mean=self.mean, std=self.std)
        return samples


def stored_channels(samples: Samples) -> int:
    """The number of channels of the first image that can be read, if that cannot be converted to three; otherwise 3.
    Only arrays and TIFFs can have others."""
    has_others = {ARRAY, "tif", "tiff"} & {*samples.extensions}
    for number in range(min(len(samples), MAX_TRIED)) if has_others else ():
        try:
            return samples.image(number, dtype="float32").shape[2]
        except WrongChannels as error:
            return error.stored
        except Damaged:
            continue
    return 3


class ClipEncoder(Encoder):
    """An encoder of clips: `frames` frames, `fps` in a second, from the middle of a video. An image is a clip of equal
    frames."""

    unit = "clips"
    batch = 16
    members = Clip.extensions

    def __init__(self, backbone: Any, name: str, image_size: int, frames: int, fps: float, *options: Any, **more: Any):
        super().__init__(backbone, name, image_size, *options, **more)
        self.frames, self.fps = frames, fps
        self.part: Clip = Clip(self.channels, mean=self.mean, std=self.std, frames=frames, fps=fps)

    def stand_in(self) -> np.ndarray:
        return np.zeros((self.frames, *super().stand_in().shape), np.uint8)

    def fingerprint(self, samples: Samples) -> str:
        return f"{super().fingerprint(samples)} {self.frames} frames {self.fps}"

    def read(self, samples: Samples, number: int) -> np.ndarray:
        """The center crops of the frames of a clip, uint8 [T, C, S, S]."""
        with self._clips(samples, number) as clips:
            (frames,) = clips.spread(1)
            return np.stack([center(frame, self.image_size) for frame in frames])

    def spread(self, samples: Samples, number: int, segments: int, views: int) -> np.ndarray:
        """The clips in the middle of `segments` equal parts of a video, each with `views` squares that are evenly spaced
        along its longer side: uint8 [segments · views, T, C, S, S]."""
        with self._clips(samples, number) as clips:
            found = [[spaced_squares(f, self.image_size, views) for f in clip] for clip in clips.spread(segments)]
        return np.array(found).swapaxes(1, 2).reshape(segments * views, *self.stand_in().shape)

    def augmented(self, samples: Samples, number: int, rng: Rng, flip: float = 0.5) -> np.ndarray:
        """A clip at a random time, with one crop and flip for all frames: uint8 [T, C, S, S]."""
        with self._clips(samples, number) as clips:
            return clip_crops({"clip": clips}, Augment(self.image_size, (0.3, 1.0), flip=flip), 1, rng)["clip"][0]

    @contextmanager
    def _clips(self, samples: Samples, number: int) -> Iterator[Clips]:
        """The clips of a sample, which are decoded within the budget of memory. Raises Damaged."""
        members = samples.read(number, self.members)
        if not members:
            raise self.part.absent()
        with self.budget.lease() as take:
            clips = self.part.decode(members, samples.known(number))
            clips.reserve = take
            yield clips


def _pixels(images: Tensor) -> Features:
    """Normalised pixels [B, …] as the features of images or clips: one vector each."""
    flat = images.flatten(1)
    return Features(flat, flat.unsqueeze(1), flat.unsqueeze(1)[:, :0], (1, 1))


def open_encoder(model: str, image_size: int | None = None, device: str = "auto") -> tuple[Any, dict[str, Any]]:
    """(an `Encoder`, `TextEncoder` or `AudioEncoder`, facts about it: step, pool, …) for an exported folder or a
    baseline.

    The baselines are "pixels", the pixels of an image of side 32, "clip_pixels", those of 8 frames of side 16, four in
    a second, "bytes", the byte frequencies of a text, and "log_mel", the mean and the deviation of each mel band of a
    recording.
    `device`: cpu, cuda, cuda:1, …, or auto, the best one.
    """
    if model == "bytes":
        return TextEncoder(bytes_of, "bytes", device=device), {"step": 0}
    if model == "log_mel":
        return AudioEncoder(log_mel_statistics, "log_mel", LogMelPart(), device=device), {"step": 0}
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    if model == "pixels":
        return PixelEncoder(mean, std, device), {"step": 0}
    if model == "clip_pixels":
        return ClipEncoder(_pixels, "clip_pixels", 16, 8, 4.0, mean, std, device=device), {"step": 0}
    from pretrain.interchange.export import load

    backbone, facts = load(Path(model))
    name = name_of(facts)
    if backbone.cfg.reads == "tokens":
        return TextEncoder(backbone, name, Path(model), facts.get("pool", "mean"), device), facts
    if backbone.cfg.reads == "audio":
        return open_audio_encoder(backbone, facts, name, device), facts
    if str(backbone.cfg.reads) not in ("image", "clip"):
        raise UserError(
            f"{model}: reads {backbone.cfg.reads}, but the protocols score models that read images, clips, text or"
            " audio"
        )
    mean, std, channels = facts["mean"], facts["std"], backbone.cfg.in_channels
    if not all(values and len(values) == channels for values in (mean, std)):
        raise DataError(
            f"{model}: mean and std are {[mean, std]}, but its images have {channels} channels; export it again"
        )
    size = image_size or backbone.image_size
    encoder: Encoder
    if backbone.cfg.reads == "clip":
        if size != backbone.image_size and backbone.cfg.positions == "sequence":
            raise UserError(
                f"{model}: its positions are for frames of {backbone.image_size} pixels, not of {size}; leave out the"
                " image size (eval.image_size=null)"
            )
        pool, frames, fps = facts.get("pool", "mean"), backbone.cfg.frames, facts.get("fps", 4.0)
        encoder = ClipEncoder(backbone, name, size, frames, fps, mean, std, pool, device)
    else:
        pool, dtype = facts.get("pool", "cls"), facts.get("pixel_dtype", "uint8")
        if dtype not in PIXEL_DTYPES:
            raise DataError(f"{model}: pixel_dtype is {dtype!r}; write one of {', '.join(PIXEL_DTYPES)}")
        encoder = Encoder(backbone, name, size, mean, std, pool, device, dtype)
    encoder.folder = Path(model)
    return encoder, facts
