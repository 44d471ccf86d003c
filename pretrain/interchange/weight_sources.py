"""Determine which backbone a source of weights holds, and read its tensors. A source is an export or a checkpoint of
this library, a folder of `transformers` or `timm`, or an official DINOv2 or DINOv3 file. No code in a source is
executed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from common import build_config
from common.errors import UserError
from common.untrusted import loads, read_text, schema_error
from pretrain.checkpoint.dcp_format import Reader, fill, read_metadata
from pretrain.checkpoint.tools import locate, names_checkpoint
from pretrain.interchange.layouts import class_head, official, timm, transformers, transformers_config
from pretrain.interchange.layouts.class_head import Classifier
from pretrain.interchange.layouts.fields import read as read_fields
from pretrain.interchange.layouts.transformers import State
from pretrain.interchange.load_record import skip_loading
from pretrain.models import presets
from pretrain.models.build import build_model
from pretrain.objectives import finder
from pretrain.objectives.base import Objective
from pretrain.run_folder.written_files import EXPORT_TENSORS

# The URL of a model on the Hugging Face hub; group 1 is OWNER/MODEL.
HUB_URL = re.compile(r"(?:hf[-_]hub:|(?:https?://)?(?:www\.)?huggingface\.co/)([\w.-]+/[\w.-]+)")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # OWNER/MODEL, which may be the name of a model on the hub
# Names of the file of weights in a folder; the first one that exists is read. The weights of a large model are in
# several files, and NAME.index.json lists them.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# Largest number of parameters that a model may have in addition to those in its file, such as position tables.
MAX_UNSTORED_PARAMETERS = 1_000_000
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # those of ImageNet, for sources that do not state them


@dataclass
class Source:
    """A stored backbone, whose weights `state_dict` reads."""

    where: str  # path or URL
    cfg: Any  # the config of our model
    layout: str  # unlabeled, checkpoint, transformers, timm, official, or text side (`tensors` have our names)
    model_type: str = ""  # the model_type in a config.json of transformers
    tensors: State | None = None  # the weights, if `find_source` had to read them to determine the model
    about: dict[str, Any] = field(default_factory=dict)  # at least mean, std, pool and step
    states_normalisation: bool = True  # whether the source itself states its mean and std

    def state_dict(self) -> State:
        """Read the tensors, and name them as in our model. Tensors that our model does not have keep their names."""
        if self.layout == "checkpoint":
            return _encoder_tensors(self.where)
        tensors = folder_tensors(Path(self.where)) if self.tensors is None else self.tensors
        if self.layout == "text side":
            return tensors
        if self.layout == "official":
            return official.read(self.cfg, tensors)
        if self.layout == "timm":
            return timm.read(self.cfg, tensors)
        tensors = class_head.remove(tensors) if self.cfg.reads == "image" else tensors
        return transformers.read(self.cfg, tensors, self.model_type)


# ---------------------------------------------------------------- which model a source holds
def find_source(source: str | Path) -> Source:
    """The backbone in `source`: a folder, a file or the URL of a checkpoint. Raises UserError, which states what to
    write instead, if it cannot be read, or if its config describes a model that does not fit the size of its files."""
    found = _find(source)
    if found.layout in ("unlabeled", "timm", "transformers"):
        _check_size(found)
    return found


def source_about(where: str) -> dict[str, Any]:
    """`Source.about` of a source."""
    return find_source(where).about


def _find(source: str | Path) -> Source:
    path = Path(source)
    if path.is_file():
        return _official_source(path)
    if hub := HUB_URL.match(str(source)):
        raise UserError(_download_first(hub[1]))
    if "://" in str(source) or names_checkpoint(path):
        return checkpoint_source(str(source))
    try:
        fields = read_fields(path)
    except FileNotFoundError:
        if not path.exists() and HUB_NAME.fullmatch(str(source)) and not path.parent.exists():
            raise UserError(_download_first(str(source))) from None
        reason = "config.json is missing" if path.exists() else "there is no such file or folder"
        raise UserError(
            f"{path}: is not an exported model ({reason}); a run keeps its exports in RUN/export/STEP"
        ) from None
    if "unlabeled" in fields:
        about = fields["unlabeled"]
        model = dict(about["model"])
        kind = fields["model_type"] if "text" in about else ""  # a dual encoder
        return Source(str(path), model_config(model.pop("name"), model, str(path)), "unlabeled", kind, about=about)
    if "architecture" in fields:
        return _timm_source(path, fields)
    if "model_type" in fields:
        return _transformers_source(path, fields)
    raise UserError(
        f"{path}: config.json has neither model_type (transformers), architecture (timm) nor the key unlabeled"
    )


def checkpoint_source(where: str) -> Source:
    """The encoder in a checkpoint of this library."""
    store, name = locate(where)
    recipe = store.run_json(name)["recipe"]
    model = dict(recipe["model"])
    about = {"mean": recipe["data"]["mean"], "std": recipe["data"]["std"], "step": int(name)}
    if (dtype := recipe["data"].get("pixel_dtype", "auto")) not in ("auto", "uint8"):
        about["pixel_dtype"] = dtype
    cfg = model_config(model.pop("name"), model, where)
    return Source(where, cfg, "checkpoint", about=_with_defaults(about) | {"objective": recipe["objective"]["name"]})


def _timm_source(path: Path, fields: dict[str, Any]) -> Source:
    name, options = timm.describe(fields, str(path))
    stated = fields.get("pretrained_cfg", {})
    about = _with_defaults({"mean": list(stated.get("mean", MEAN)), "std": list(stated.get("std", STD))})
    cfg = model_config(name, options, str(path))
    return Source(str(path), cfg, "timm", about=about, states_normalisation="mean" in stated)


def _transformers_source(path: Path, fields: dict[str, Any]) -> Source:
    name, options = transformers_config.describe(fields, str(path))
    stated = _preprocessor_normalisation(path)
    return Source(
        str(path),
        model_config(name, options, str(path)),
        "transformers",
        fields["model_type"],
        about=_with_defaults(stated),
        states_normalisation="mean" in stated,
    )


def _official_source(path: Path) -> Source:
    tensors = official.unwrap(_read_weight_file(path), str(path))
    if not official.matches(tensors):
        names = ", ".join(list(tensors)[:5])
        raise UserError(
            f"{path}: does not have the tensor names of a DINOv2 or DINOv3 file ({names} …); for any other model, name"
            " a folder of transformers or timm"
        )
    name, options = official.describe(tensors, str(path))
    cfg = model_config(name, options, str(path))
    return Source(str(path), cfg, "official", tensors=tensors, about=_with_defaults({}))


def model_config(name: str, options: dict[str, Any], where: str) -> Any:
    """The config of our model `name` with `options`. Raises an error that begins with `where` if they are not valid."""
    cls, defaults = presets.choose(name, f"{where}: ")
    cfg = build_config.build(cls, options, {"": where}, "model.", defaults)
    cfg.name = name
    return cfg


def _with_defaults(about: dict[str, Any]) -> dict[str, Any]:
    """`Source.about`: the entries that the source states, and defaults for the others."""
    return {"mean": MEAN, "std": STD, "pool": "cls", "step": None, "objective": None, **about}


def _download_first(name: str) -> str:
    """The error message for the name of a model on a hub. Models are never downloaded here; the message states the
    command that downloads them."""
    folder = name.rpartition("/")[2]
    return (
        f"{name}: there is no such file or folder, and models are not downloaded from a hub by their names;"
        f" run `hf download {name} --local-dir {folder}`, and write {folder} instead of {name}"
    )


def _check_size(source: Source) -> None:
    """Raise UserError if a config.json describes a model much larger than the files of weights beside it. This is
    checked before the model is allocated, because a few bytes of JSON can describe a model that fills the machine's
    memory."""
    files = [path for ending in ("safetensors", "bin") for path in Path(source.where).glob(f"*.{ending}")]
    stored_bytes = sum(path.stat().st_size for path in files)
    try:
        with torch.device("meta"), skip_loading():
            model = build_model(source.cfg)
    except (ValueError, RuntimeError, OverflowError) as error:  # inconsistent or impossible sizes
        raise UserError(
            f"{source.where}: config.json does not describe a model that can be built"
            f" ({' '.join(str(error).split())[:200]})"
        ) from None
    described = sum(p.numel() for p in [*model.parameters(), *model.buffers()])
    if files and described > 2 * stored_bytes + MAX_UNSTORED_PARAMETERS:
        raise UserError(
            f"{source.where}: config.json describes {described:,} parameters, but its files of weights have only"
            f" {stored_bytes:,} bytes; correct config.json, or add the files that are missing"
        )
    if source.about.get("pool") not in ("cls", "mean", None):
        raise UserError(f"{source.where}: pool is {source.about['pool']!r}; write cls or mean")


def _preprocessor_normalisation(folder: Path) -> dict[str, Any]:
    """Mean and std from the preprocessor_config.json of a folder; {} if there is no such file, or no valid JSON in it.
    Raises UserError if the values have a wrong type."""
    try:
        values = loads(read_text(folder / "preprocessor_config.json"))
    except (OSError, ValueError):
        return {}
    if wrong := schema_error(values, {"?image_mean": ([float], None), "?image_std": ([float], None)}):
        raise UserError(f"{folder}/preprocessor_config.json: {wrong}")
    return {k: list(values[f"image_{k}"]) for k in ("mean", "std") if values.get(f"image_{k}")}


# ---------------------------------------------------------------- tensors in files
def folder_tensors(folder: Path) -> State:
    """All tensors of a folder: from one of WEIGHT_FILES, or from the files that the index of one of them lists."""
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = _indexed_files(index)
            return {key: value for part in parts for key, value in _read_weight_file(folder / part).items()}
        if (folder / name).is_file():
            return _read_weight_file(folder / name)
    raise UserError(f"{folder}: is not an exported model ({' or '.join(WEIGHT_FILES)} is missing)")


def further_tensors(where: str | Path) -> dict[str, torch.Tensor]:
    """The tensors that an export holds in addition to its backbone (`Exported.tensors`), on the CPU. Raises UserError
    if it holds none."""
    path = Path(where) / EXPORT_TENSORS
    if not path.parent.is_dir():
        raise UserError(f"{where}: no such folder")
    if not path.is_file():
        raise UserError(f"{where}: is no export with further tensors ({EXPORT_TENSORS} is missing)")
    return _read_weight_file(path)


def classifier_of(folder: str | Path) -> Classifier:
    """The classifier in an export, or in a folder of transformers. Raises UserError if there is none."""
    source = find_source(folder)
    if source.layout not in ("unlabeled", "transformers"):
        raise UserError(f"{folder}: is no folder with a classifier; name an export of a run of `finetune`")
    with torch.device("meta"):
        width = build_model(source.cfg).embed_dim
    tensors = folder_tensors(Path(folder))
    if (Path(folder) / EXPORT_TENSORS).is_file():
        tensors = {**further_tensors(folder), **tensors}
    return class_head.find(Path(folder), read_fields(Path(folder)), tensors, width, source.about["pool"])


def class_names_of(folder: str | Path) -> list[str]:
    """The names of the classes of the classifier in a folder; [] if it is not there, or has numbers only."""
    if not (Path(folder) / "config.json").is_file():
        return []
    names = read_fields(Path(folder)).get("id2label")
    if not isinstance(names, dict):
        return []
    found = [names.get(str(n), str(n)) for n in range(len(names))]
    return [] if found == [str(n) for n in range(len(names))] else found


def segmenter_of(folder: str | Path) -> Classifier:
    """The linear layer on each patch in an export of `finetune_segmentation`. Raises UserError if there is none."""
    with torch.device("meta"):
        width = build_model(find_source(folder).cfg).embed_dim
    tensors = further_tensors(folder) if (Path(folder) / EXPORT_TENSORS).is_file() else {}
    return class_head.find_dense(Path(folder), tensors, width)


def _indexed_files(index: Path) -> list[str]:
    """The names of the files that an index of tensors lists. Raises UserError if one is not in the folder of the
    index."""
    try:
        content = loads(read_text(index))
        wrong = schema_error(content, {"weight_map": {...: str}})
    except (OSError, ValueError) as error:
        wrong = str(error)
    if wrong:
        raise UserError(f"{index}: is not an index of tensors ({wrong})")
    files = sorted(set(content["weight_map"].values()))
    if outside := [file for file in files if "/" in file]:
        raise UserError(f"{index}: names {outside[0]!r}, which is not in the index's folder")
    return files


def _read_weight_file(path: Path) -> dict[str, Any]:
    """Read one file of weights to the CPU. Raises UserError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # safetensors and pickle raise exceptions of many types
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read ({text})") from None


# ---------------------------------------------------------------- tensors in checkpoints
def checkpoint_tensors(where: str) -> tuple[Reader, dict[str, tuple[int, ...]]]:
    """(reader of a checkpoint, {name: shape} of the objective's tensors in it)."""
    store, name = locate(where)
    files = store.run_json(name)["files"]
    metadata = read_metadata(store, name, files)
    shapes = {
        key.removeprefix("model."): tuple(value.size)
        for key, value in metadata.state_dict_metadata.items()
        if key.startswith("model.") and isinstance(value, TensorStorageMetadata)
    }
    return Reader(store, name, files, metadata), shapes


def _encoder_tensors(where: str) -> State:
    """The tensors of the encoder in a checkpoint. The encoder is the sub-module of the objective that is exported and
    evaluated."""
    reader, shapes = checkpoint_tensors(where)
    prefix = _encoder_name(where) + "."
    if not any(key.startswith(prefix) for key in shapes):
        raise UserError(
            f"{where}: holds no tensors {prefix}…, where its encoder should be; export it with `unlabeled export RUN`"
        )
    state = {k: torch.empty(shape) for k, shape in shapes.items() if k.startswith(prefix)}
    fill({"model": state}, reader, where, alone=True)
    return {k.removeprefix(prefix): v for k, v in state.items()}


def _encoder_name(where: str) -> str:
    """The dotted name of the encoder within the objective of a checkpoint. Checkpoints of earlier versions do not store
    it; for them, it is the `encoder_name` of the objective's current class."""
    store, name = locate(where)
    run_json = store.run_json(name)
    if "encoder" in run_json:
        return run_json["encoder"]
    objective = run_json["recipe"]["objective"]["name"]
    # If the objective is in a file of the user, that file is not imported, and the default of `Objective` is used.
    return (Objective if finder.is_file(objective) else finder.find(objective)).encoder_name
