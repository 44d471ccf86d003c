"""Further forms of an exported folder: timm's, the official layout, torch.export and ONNX, each opened again and compared before it counts as written.

transformers  the folder itself                      AutoModel.from_pretrained(FOLDER); for text models, the only form
timm          FOLDER/timm/                           timm.create_model("local-dir:FOLDER/timm", pretrained=True); of a network of timm, the folder itself
official      FOLDER/official.pth                    the names of DINOv2's and DINOv3's own files
torch         FOLDER/model.pt2                       torch.export.load(…).module()(images) → (cls, tokens); any batch, the model's image size
onnx          FOLDER/model.onnx                      the same, for onnxruntime
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pretrain import weights
from pretrain.errors import UserError, nearest
from pretrain.layouts import official, timm, transformers_text
from pretrain.models import presets, timm_network
from pretrain.models.layers import Backbone
from pretrain.models.text_layers import TextBackbone

TOLERANCE = 1e-3  # of the largest feature: other libraries' kernels, and timm's own epsilon in norms
Outputs = tuple[Tensor, Tensor | None]  # cls [B, D], tokens [B, N, D] where there are some


class Plain(nn.Module):
    """images [B, C, H, W] → (cls [B, D], tokens [B, N, D])."""

    def __init__(self, encoder: Backbone):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(images)
        return features.cls, features.tokens


def check(forms: list[str]) -> None:
    """Raises UserError for a form that there is not."""
    for form in forms:
        if form not in FORMS:
            raise UserError(f"{form!r}: no such form; {nearest(form, FORMS)}")


def release(folder: Path, forms: list[str]) -> list[str]:
    """Write an export's further forms; a line for each that says how far its outputs are from ours. Raises UserError where one cannot be, or differs."""
    check(forms)
    encoder, about = weights.load_backbone(folder)
    if isinstance(encoder, TextBackbone):
        return [_text(folder, encoder, form) for form in forms]
    size = encoder.image_size
    images = torch.randn(2, encoder.cfg.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = Plain(encoder)(images)
    lines = []
    for form in forms:
        with torch.no_grad():
            where, theirs = FORMS[form](folder, encoder, about, images)
        if theirs is None:
            lines.append(f"{where}: written; {form} is not installed here, so its outputs were not compared")
            continue
        scale = max(1.0, float(ours[0].abs().max()))
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b is not None]
        far = max(float((a - b).abs().max()) for a, b in pairs) / scale
        if not far <= TOLERANCE:
            raise UserError(
                f"{where}: {form} gives other features from it, {far:.1e} of the largest away; it is not to be used"
            )
        lines.append(f"{where}: opened again, features within {far:.0e} of ours")
    return lines


def opened_by(folder: Path) -> tuple[str, str]:
    """(which form an exported folder itself is, or "" where only we open it; what to open it with)."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    if kind == "timm_wrapper":
        return "timm", f"open it with timm.create_model({f'local-dir:{folder}'!r}, pretrained=True)"
    if kind.startswith("unlabeled"):
        return "", f"open it with pretrain.weights.load_backbone({str(folder)!r}); transformers has no class for it"
    return (
        "transformers",
        f"open it with transformers.{transformers_text.CLASSES.get(kind, 'AutoModel')}.from_pretrained({str(folder)!r})",
    )


def _text(folder: Path, model: Any, form: str) -> str:
    """A text model's logits, which transformers' class must give as well. Raises UserError where it has none."""
    if form != "transformers":
        raise UserError(f"{form!r}: text models have no such form; {folder} itself is for transformers")
    kind, odd = transformers_text.kind_of(model.cfg)
    if kind == transformers_text.OWN:
        raise UserError(f"{folder}: transformers has no class for {odd} here; `weights.load_backbone` opens it")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    library = _import("transformers")
    if library is None:
        return f"{folder}: written; transformers is not installed here, so its logits were not compared"
    theirs, info = getattr(library, transformers_text.CLASSES[kind]).from_pretrained(folder, output_loading_info=True)
    if any(info.values()):
        raise UserError(f"{folder}: transformers finds other keys than its class has: {info}")
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.vocab_size, (2, min(64, model.context)), generator=draw)
    with torch.no_grad():
        hidden = model(tokens).tokens
        more = {}
        if isinstance(model.cfg, presets.EncoderDecoder):
            hidden, more = model.decoder(tokens, hidden), {"decoder_input_ids": tokens}
        ours, found = model.head(hidden), theirs.eval()(input_ids=tokens, **more).logits
    far = float((ours - found).abs().max()) / max(1.0, float(ours.abs().max()))
    if not far <= TOLERANCE:
        raise UserError(
            f"{folder}: transformers gives other logits, {far:.1e} of the largest away; it is not to be used"
        )
    return f"{folder}: opened again, logits within {far:.0e} of ours"


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _transformers(folder: Path, encoder: Backbone, about: dict, images: Tensor) -> tuple[str, Outputs | None]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    library = _import("transformers")
    if library is None:
        return str(folder), None
    if isinstance(encoder.cfg, presets.ResNet) and encoder.cfg.stem == "small":
        raise UserError(f"{folder}: transformers has no ResNet with a small stem; `weights.load_backbone` opens it")
    model, info = library.AutoModel.from_pretrained(folder, output_loading_info=True)
    if any(info.values()):
        raise UserError(f"{folder}: transformers finds other keys than its class has: {info}")
    last = model.eval()(images).last_hidden_state
    if isinstance(encoder.cfg, presets.ResNet):
        tokens = last.flatten(2).transpose(1, 2)
        return str(folder), (tokens.mean(1), tokens)
    prefix: int = 1 + vars(encoder.cfg).get("registers", 0)
    return str(folder), (last[:, 0], last[:, prefix:])


def _timm(folder: Path, encoder: Backbone, about: dict, images: Tensor) -> tuple[str, Outputs | None]:
    if isinstance(encoder, timm_network.TimmNetwork):
        encoder.network = timm_network.create(encoder.cfg, str(folder)).eval()
        return str(folder), Plain(encoder)(images)
    fields, tensors = timm.write(encoder.cfg, encoder.state_dict(), about["mean"], about["std"])
    target = folder / "timm"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(fields, indent=1) + "\n")
    library = _import("timm")
    if library is None:
        return str(target), None
    model = library.create_model(f"local-dir:{target}", pretrained=True).eval()
    if isinstance(encoder.cfg, presets.ConvNeXt):
        return str(target), (model(images), None)
    tokens = model.forward_features(images)
    return str(target), (model(images), tokens[:, model.num_prefix_tokens :])


def _official(folder: Path, encoder: Backbone, about: dict, images: Tensor) -> tuple[str, Outputs | None]:
    target = folder / "official.pth"
    torch.save({k: v.contiguous() for k, v in official.write(encoder.cfg, encoder.state_dict()).items()}, target)
    again, _ = weights.load_backbone(target)
    own, taken = ({m.eps for m in body.modules() if isinstance(m, nn.LayerNorm)} for body in (encoder, again))
    for module in again.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = next(iter(own))
    note = f" (has no place for the norms' eps, {next(iter(own)):g}; those who read it take {next(iter(taken)):g})"
    return f"{target}{'' if own == taken else note}", Plain(again)(images)


def _torch(folder: Path, encoder: Backbone, about: dict, images: Tensor) -> tuple[str, Outputs | None]:
    target, batch = folder / "model.pt2", torch.export.Dim("batch")
    exported = torch.export.export(Plain(encoder).eval(), (images,), dynamic_shapes={"images": {0: batch}})
    torch.export.save(exported, target)
    model = torch.export.load(target).module()
    model(images[:1])  # another batch than it was traced with
    return str(target), model(images)


def _onnx(folder: Path, encoder: Backbone, about: dict, images: Tensor) -> tuple[str, Outputs | None]:
    if _import("onnxscript") is None or _import("onnx") is None:
        raise UserError("onnx: is not installed; pip install 'unlabeled[onnx]'")
    target = folder / "model.onnx"
    torch.onnx.export(
        Plain(encoder).eval(),
        (images,),
        str(target),
        input_names=["images"],
        output_names=["cls", "tokens"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    library = _import("onnxruntime")
    if library is None:
        return str(target), None
    session = library.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    session.run(None, {"images": images[:1].numpy()})
    cls, tokens = (torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()}))
    return str(target), (cls, tokens)


FORMS: dict[str, Callable[[Path, Backbone, dict, Tensor], tuple[str, Outputs | None]]] = {
    "transformers": _transformers,
    "timm": _timm,
    "official": _official,
    "torch": _torch,
    "onnx": _onnx,
}
