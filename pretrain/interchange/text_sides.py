"""Write and read the text side of a dual encoder: the text model, projections, scale, bias and tokenizer in an export's
folder, or in a folder of transformers' CLIPModel or SiglipModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import config
from common.errors import UserError
from data_pipeline.parts.caption import Caption
from pretrain.interchange.layouts import tokenizer_files, transformers_image_text
from pretrain.interchange.layouts.fields import read as read_fields
from pretrain.interchange.layouts.transformers import State
from pretrain.interchange.weight_sources import Source, find_source, folder_tensors, model_config
from pretrain.models.text_side import Kind, TextSide, build_text_side

TEXT = "text."  # prefix of the text model's tensors in the state dict of a `TextSide`


def write(
    folder: Path, image: Any, image_state: State, side: TextSide, side_state: State, tokenizer: Path | None
) -> tuple[dict[str, Any], State]:
    """(fields of config.json, tensors) of an image model with the options `image`, and its text side; the tokenizer is
    written to `folder`."""
    text, ids = side.text.cfg, dict[str, int]()
    if tokenizer is not None:
        length = side.captions.length
        ids = tokenizer_files.write(folder, tokenizer, length, captions=True)
    fields, tensors = transformers_image_text.write(side.kind, image, image_state, text, side_state, ids)
    projection_dim = len(side_state["text_projection.weight"])
    about = {"kind": side.kind, "model": config.to_dict(text), "projection_dim": projection_dim}
    return fields | {"unlabeled": {"text": {**about, "length": side.captions.length}}}, tensors


def has_one(folder: Path) -> bool:
    """Whether a folder holds a dual encoder. Raises UserError if its config.json is not valid."""
    try:
        fields = read_fields(folder)
    except FileNotFoundError:
        return False
    return "text" in fields.get("unlabeled", {}) or fields.get("model_type") in transformers_image_text.CLASSES


def load(folder: Path) -> TextSide:
    """The text side in a folder, in eval mode. Raises UserError if it holds none, or one that cannot be read."""
    short, cfg, width, length, state = _read(folder)
    try:
        image_dim = state["image_projection.weight"].shape[1] if short == "clip" else width
        captions = Caption(tokenizer=str(folder), length=length)
        side = build_text_side(short, cfg, image_dim, width, captions)
        side.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: its text model is not the one in config.json ({reason})") from None
    return side.eval()


def find_text_source(where: str | Path) -> Source:
    """The text model in a source: that beside the image model of a dual encoder, or else what `find_source` finds."""
    if not Path(where).is_dir() or not has_one(Path(where)):
        return find_source(where)
    _, cfg, _, _, state = _read(Path(where))
    tensors = {k.removeprefix(TEXT): v for k, v in state.items() if k.startswith(TEXT)}
    step = find_source(where).about["step"]
    return Source(str(where), cfg, "text side", tensors=tensors, about={"step": step}, states_normalisation=False)


def _read(folder: Path) -> tuple[Kind, Any, int, int, State]:
    """(kind, options of the text model, width of the embeddings, length of captions, state dict) of the text side in a
    folder."""
    fields, where = read_fields(folder), str(folder)
    kind = fields.get("model_type", "")
    if "text" in fields.get("unlabeled", {}):
        about = fields["unlabeled"]["text"]
        model = dict(about["model"])
        name, width, length = model.pop("name"), about["projection_dim"], about["length"]
        short = about["kind"]
    elif kind in transformers_image_text.CLASSES:
        name, model, width = transformers_image_text.describe_text(kind, fields, where)
        short, length = kind, model["context"]
    else:
        raise UserError(f"{folder}: holds no text model beside its image model; name an export of clip or siglip")
    if short not in transformers_image_text.CLASSES:
        raise UserError(f"{folder}: config.json names a dual encoder of the kind {short!r}; it is not valid")
    cfg = model_config(name, model, where)
    return (
        short,
        cfg,
        width,
        length,
        transformers_image_text.read_text(vars(cfg)["depth"], folder_tensors(folder), kind),
    )
