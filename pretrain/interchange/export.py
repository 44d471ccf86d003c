"""Writes exports: folders with config.json, model.safetensors and, for text models, a tokenizer.
`transformers.AutoModel.from_pretrained` and `load` open them.

`pretrain/interchange/layouts/transformers.py` determines the class of transformers for a backbone, and the names of its
tensors. The key `unlabeled` of config.json holds what `load` needs in addition.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from common import config
from common.errors import UserError
from data_pipeline.shards.manifest import common_classes, parse_manifest
from pretrain.checkpoint.disk_store import fsync
from pretrain.interchange import model_card, text_sides, weights
from pretrain.interchange.layouts import class_head, preprocessors, transformers
from pretrain.interchange.layouts import tokenizer_files as tokenizers
from pretrain.interchange.layouts.class_head import PREFIX, Classifier
from pretrain.interchange.layouts.transformers import State
from pretrain.interchange.weight_sources import classifier_of, further_tensors, segmenter_of
from pretrain.models.layers import Backbone
from pretrain.models.text_side import PREFIX as TEXT_SIDE
from pretrain.models.text_side import TextSide
from pretrain.objectives.base import Exported, Objective
from pretrain.recipes.recipe import Recipe
from pretrain.run_folder.export_folders import run_of
from pretrain.run_folder.written_files import EXPORT_FILES, EXPORT_TENSORS, delete_folder, make_empty_folder

PIXELS = ("image", "clip")  # parts of pixels, which are normalised by a mean and a deviation


def write(
    folder: Path,
    encoder: Backbone,
    about: dict[str, Any],
    mean: list[float] | None = None,
    std: list[float] | None = None,
    state: State | None = None,
    tokenizer: Path | None = None,
    further: State | None = None,
    classifier: Classifier | None = None,
    text_side: TextSide | None = None,
) -> None:
    """Write an encoder as a folder, atomically, and read it again to check that its weights are the same.

    `about`: further entries for the key `unlabeled` of config.json; for clips, "fps" among them. `mean`, `std`: the
    normalisation of the pixels in training. `state`: weights to write instead of those of `encoder`. `tokenizer`: the
    tokenizer.json of a text model. `further`: tensors to write to tensors.safetensors, see `Exported.tensors`.
    `classifier`: a linear layer on the feature that `about["pool"]` names, or on each patch; the folder is then an image
    classifier, or a segmentation model.
    `text_side`: see `Exported`; `state` has its tensors as well.
    """
    cfg: Any = encoder.cfg
    if state is None:
        state = Exported(encoder, text_side=text_side).state()
    side = {k.removeprefix(TEXT_SIDE): v.detach().cpu() for k, v in state.items() if k.startswith(TEXT_SIDE)}
    state = {k: v for k, v in state.items() if not k.startswith(TEXT_SIDE)}
    # what only training uses; the models of two encoders have no token for masked patches
    training_only = [*encoder.training_only, *(["mask_token"] if text_side is not None else [])]
    left_out = [name for name in training_only if vars(cfg).get(name)]
    cfg = cfg.replace(**dict.fromkeys(left_out, False)) if left_out else cfg
    state = {k: v.detach().cpu() for k, v in state.items() if k.partition(".")[0] not in left_out}
    partial = _partial(folder)
    make_empty_folder(partial, EXPORT_FILES)
    if text_side is None:
        fields, tensors = transformers.write(cfg, state)
    else:
        fields, tensors = text_sides.write(partial, cfg, state, text_side, side, tokenizer)
    if classifier is not None:
        fields, tensors, own = class_head.add(fields, tensors, classifier, about["pool"])
        further = {**(further or {}), **own}
    fields["dtype"] = "float32"
    pixels = {"mean": mean, "std": std} if cfg.reads in PIXELS else {}
    fields["unlabeled"] = {"model": config.to_dict(cfg), **pixels, **about, **fields.get("unlabeled", {})}
    save_file(
        {k: (v.float() if v.is_floating_point() else v).contiguous() for k, v in tensors.items()},
        partial / "model.safetensors",
        metadata={"format": "pt"},
    )
    if further:
        save_file({k: v.detach().cpu().contiguous() for k, v in further.items()}, partial / EXPORT_TENSORS)
    if cfg.reads == "tokens" and tokenizer is not None:
        fields |= tokenizers.write(partial, Path(tokenizer), encoder.context, not cfg.causal)
        if "decoder_start_token_id" in fields:  # the decoder of T5 begins with the padding token
            fields["decoder_start_token_id"] = fields.get("pad_token_id", 0)
    (partial / "config.json").write_text(json.dumps(fields, indent=1) + "\n")
    if cfg.reads == "image":
        processor = preprocessors.images(encoder.image_size, mean, std, about.get("pixel_dtype", "uint8"))
        (partial / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
    if cfg.reads == "clip":
        processor = preprocessors.videos(fields["model_type"], encoder.image_size, mean, std)
        (partial / "video_preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
    if cfg.reads == "audio" and (extractor := transformers.feature_extractor(cfg, about.get("audio", {}))):
        (partial / "preprocessor_config.json").write_text(json.dumps(extractor, indent=1) + "\n")
    stored = weights.tensors_of(partial)
    changed = _different(state, stored) + (_different(further, further_tensors(partial)) if further else [])
    changed += _changed_classifier(partial, classifier)
    changed += [] if text_side is None else _different(side, text_sides.load(partial).state_dict())
    if changed:
        raise RuntimeError(f"{folder}: tensors of the export differ from those of the model: {', '.join(changed[:5])}")
    for path in (*partial.rglob("*"), partial):  # a loss of power must not leave empty files in a complete folder
        fsync(path)
    if not folder.is_dir():
        partial.rename(folder)
        return
    # config.json is moved last, because it makes the folder an export. Other files in the folder are kept.
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        path.replace(folder / path.name)
    partial.rmdir()


def _partial(folder: Path) -> Path:
    """The temporary folder in which an export is written."""
    return folder.with_name(f".{folder.name}.partial")


def _different(state: State, stored: State) -> list[str]:
    """The names of the tensors that are missing in `stored` or differ there, after conversion to its dtype."""
    return [k for k, v in state.items() if k not in stored or not torch.equal(stored[k], v.cpu().to(stored[k].dtype))]


def _changed_classifier(folder: Path, classifier: Classifier | None) -> list[str]:
    """What differs between a classifier and the one in its export."""
    if classifier is None:
        return []
    try:
        stored = segmenter_of(folder) if classifier.dense else classifier_of(folder)
        state = {"weight": classifier.weight, "bias": classifier.bias}
    except UserError:
        return ["classifier"]
    changed = _different(state, {"weight": stored.weight, "bias": stored.bias})
    return [f"classifier.{name}" for name in changed] + ["names of classes"] * (stored.names != classifier.names)


def class_names(run: Path | None, count: int) -> list[str]:
    """The names of a classifier's classes, from the manifests of a run's data (see `common_classes`), and the numbers of
    those without names."""
    paths = sorted((run / "data").glob("[0-9]*.json")) if run is not None else []
    found = [parse_manifest(path.read_bytes(), str(path.parent), str(path)).classes for path in paths]
    names = common_classes(found)
    return [*names, *(str(n) for n in range(len(names), count))]


def folders(folder: Path, objective: Objective) -> dict[str, Path]:
    """{name: export folder} of an objective's encoders: `folder` itself for the recipe's model, and NAME/STEP next to
    it for further ones."""
    return {name: folder if name == "model" else folder.parent / name / folder.name for name in objective.exports()}


def save(
    folder: Path,
    objective: Objective,
    recipe: Recipe,
    step: int,
    states: dict[str, State] | None = None,
    tokenizer: Path | None = None,
    run: Path | None = None,
) -> list[Path]:
    """Export an objective's encoders at a step of its run to their `folders`, except to those that exist. Returns the
    folders, `folder` first.

    `states`: the encoders' full weights on the host, if an engine has sharded them (`Engine.encoder_states`).
    `tokenizer`: as for `write`. `run`: the run whose recipe, data and scores the model card lists; needed if `folder`
    is outside the run folder.
    """
    targets, exported = folders(folder, objective), objective.exports()
    for name, target in targets.items():
        about = {"step": step, "objective": recipe.objective.name, "pool": exported[name].pool}
        about |= {"student": name} if name != "model" else {}
        for part in objective.parts.values():
            about |= part.facts()
        files = ["config.json", *([EXPORT_TENSORS] if exported[name].tensors else [])]
        if not all((target / file).is_file() for file in files):
            one = exported[name]
            encoder = one.backbone
            mean, std = (recipe.data.mean, recipe.data.std) if str(encoder.cfg.reads) in PIXELS else (None, None)
            about |= {"fps": recipe.data.fps} if encoder.cfg.reads == "clip" else {}
            state, classifier = contents(one, states[name] if states else None, run or run_of(target))
            try:
                write(target, encoder, about, mean, std, state, tokenizer, one.tensors, classifier, one.text_side)
            except (OSError, SafetensorError):  # the disk is full, and half an export would keep it full
                delete_folder(_partial(target), EXPORT_FILES)
                raise
            model_card.write(target, run)
    return sorted(targets.values(), key=lambda target: target != folder)


def contents(one: Exported, state: State | None, run: Path | None) -> tuple[State, Classifier | None]:
    """(the state dict of a backbone as it is exported, its classifier) from an entry of `Engine.encoder_states`; None:
    from the modules themselves. `run`: the run whose data name the classes."""
    if state is None:
        state = one.state()
    classifier = None
    if one.classifier is not None:
        weight, bias = (state[f"{PREFIX}{key}"].detach().cpu() for key in ("weight", "bias"))
        state = {key: value for key, value in state.items() if not key.startswith(PREFIX)}
        names = [str(n) for n in range(len(weight))] if one.dense else class_names(run, len(weight))
        classifier = Classifier(weight, bias, names, one.dense)
    return (one.merged(state) if one.merged else state), classifier


def holds(folder: Path, exported: Exported, step: int) -> bool:
    """Whether a folder holds the export of this encoder, with the same weights and further tensors, at this step."""
    if not (folder / "config.json").is_file():
        return False
    try:
        loaded, about = load(folder)
        further = further_tensors(folder) if exported.tensors else {}
    except UserError:
        return False
    stored = loaded.state_dict()
    own, classifier = contents(exported, None, run_of(folder))
    if exported.text_side is not None:
        try:
            stored |= {f"{TEXT_SIDE}{key}": value for key, value in text_sides.load(folder).state_dict().items()}
        except UserError:
            return False
    same_weights = all(
        k in own and v.shape == own[k].shape and torch.equal(v, own[k].to(v.dtype)) for k, v in stored.items()
    )
    changed = _different(exported.tensors, further) + _changed_classifier(folder, classifier)
    return same_weights and not changed and about["step"] == step


def load(folder: str | Path) -> tuple[Backbone, dict[str, Any]]:
    """(encoder in eval mode, {"mean", "std", "pool", "step", "objective"}) of an export, or of any other source that
    `weights.load_backbone` reads."""
    return weights.load_backbone(folder)
