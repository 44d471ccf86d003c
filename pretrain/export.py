"""Export: a folder config.json + model.safetensors that `transformers.AutoModel.from_pretrained` and `load` open, with a tokenizer for text models.

Which class of transformers stands for which backbone, and under which names, is in `pretrain/layouts/transformers.py`. The key `unlabeled` of config.json
holds what `load` needs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pretrain import card, config, weights
from pretrain.layouts import tokenizer as tokenizers
from pretrain.layouts import transformers
from pretrain.layouts.transformers import State
from pretrain.models.layers import Backbone
from pretrain.models.text_layers import TextBackbone
from pretrain.objectives.base import Objective
from pretrain.recipe import Recipe


def write(
    folder: Path,
    encoder: Backbone,
    about: dict[str, Any],
    mean: list[float] | None = None,
    std: list[float] | None = None,
    state: State | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Write an encoder as a folder, atomically, and read it back to see that nothing was lost. `state`: weights to write in place of its own.

    `mean` and `std` are of the pixels that it was trained on; `tokenizer`, a tokenizer.json, of the text.
    """
    cfg: Any = encoder.cfg
    if vars(cfg).get("local_cls_norm"):  # of training alone
        cfg = cfg.replace(local_cls_norm=False)
    state = encoder.state_dict() if state is None else state
    state = {k: v.detach().cpu() for k, v in state.items() if not k.startswith("local_cls_norm.")}
    fields, tensors = transformers.write(cfg, state)
    fields["dtype"] = "float32"
    text = isinstance(encoder, TextBackbone)
    look = {} if text else {"mean": mean, "std": std}
    fields["unlabeled"] = {"model": config.to_dict(cfg), **look, **about}
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(
        {k: (v.float() if v.is_floating_point() else v).contiguous() for k, v in tensors.items()},
        partial / "model.safetensors",
        metadata={"format": "pt"},
    )
    if text and tokenizer is not None:
        fields |= tokenizers.write(partial, Path(tokenizer), encoder.context)
        if "decoder_start_token_id" in fields:  # T5 begins with padding
            fields["decoder_start_token_id"] = fields.get("pad_token_id", 0)
    (partial / "config.json").write_text(json.dumps(fields, indent=1) + "\n")
    if not text:
        processor = _processor(encoder.image_size, mean, std)
        (partial / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
    again = load(partial)[0].state_dict()
    lost = [key for key in state if not torch.equal(again[key], state[key].to(again[key].dtype))]
    if lost:
        raise RuntimeError(f"{folder}: the export does not hold what was written: {', '.join(lost[:5])}")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _processor(size: int, mean: list[float] | None, std: list[float] | None) -> dict[str, Any]:
    """preprocessor_config.json: the short side resized, the middle cropped, which is what `data_pipeline.views.center` shows to evaluation."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def folders(folder: Path, objective: Objective) -> dict[str, Path]:
    """Where an objective's encoders go: the recipe's own model to `folder`, further ones to NAME/STEP beside it."""
    return {name: folder if name == "model" else folder.parent / name / folder.name for name in objective.encoders()}


def save(
    folder: Path,
    objective: Objective,
    recipe: Recipe,
    step: int,
    states: dict[str, State] | None = None,
    tokenizer: Path | None = None,
    run: Path | None = None,
) -> list[Path]:
    """Export an objective's encoders at a step of its run to their `folders`, which are returned, `folder` first; those that are there are left as they are.

    `states`: the encoders' whole weights in main memory, where an engine has spread them (`Engine.encoder_states`). `tokenizer`: as for `write`.
    `run`: whose recipe, data and scores the model card tells, where the folder lies outside of it.
    """
    places, encoders = folders(folder, objective), objective.encoders()
    for name, target in places.items():
        about = {"step": step, "objective": recipe.objective.name, "pool": objective.pool}
        about |= {"student": name} if name != "model" else {}
        if not (target / "config.json").is_file():
            text = isinstance(encoders[name], TextBackbone)
            mean, std = (None, None) if text else (recipe.data.mean, recipe.data.std)
            write(target, encoders[name], about, mean, std, states[name] if states else None, tokenizer)
            card.write(target, run)
    return sorted(places.values(), key=lambda place: place != folder)


def load(folder: str | Path) -> tuple[Backbone, dict[str, Any]]:
    """(the encoder in eval mode, what is known of it: mean, std, pool, step, objective) of an exported folder, or any other source of `weights`."""
    return weights.load_backbone(folder)
