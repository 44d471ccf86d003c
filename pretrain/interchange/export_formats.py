"""Writes an export in further formats: timm's, the official layout, torch.export and ONNX. Each is opened again and its
outputs are compared with ours, before its files are moved to their place.

transformers  FOLDER itself        opened by AutoModel.from_pretrained(FOLDER); the only format of text models
timm          FOLDER/timm/         opened by timm.create_model("local-dir:FOLDER/timm", pretrained=True); a network of
                                   timm has this format in FOLDER itself
official      FOLDER/official.pth  tensors with the names of DINOv2's and DINOv3's own files
torch         FOLDER/model.pt2     torch.export.load(…).module()(images) → (cls, tokens), for any batch size and the
                                   model's image size
onnx          FOLDER/model.onnx    the same, for onnxruntime and TensorRT; of images of any batch, height and width
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from common.errors import UserError, nearest
from pretrain.interchange import weights
from pretrain.interchange.layouts import official, timm, transformers_text
from pretrain.models import families, timm_network
from pretrain.models.layers import Backbone
from pretrain.models.text_layers import TextBackbone
from pretrain.run_folder.written_files import EXPORT_FORMAT_FILES, delete_folder, make_empty_folder

MAX_ERROR_LENGTH = 200  # characters of another library's error message that are quoted
# Largest allowed difference of features, relative to the largest feature. Other libraries have other kernels, and timm
# has another epsilon in its norms.
TOLERANCE = 1e-3
MAX_ONNX_BYTES = 2**31 - 2**24  # of weights in one file, which protobuf limits to 2 GiB; the rest is for the graph
Outputs = tuple[Tensor, Tensor | None]  # cls [B, D]; tokens [B, N, D], or None if the format has none


class PlainOutputs(nn.Module):
    """An encoder that returns tensors: images [B, C, H, W] → (cls [B, D], tokens [B, N, D])."""

    def __init__(self, encoder: Backbone):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(images)
        return features.cls, features.tokens


def check(formats: list[str]) -> None:
    """Raises UserError for an unknown format."""
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"{name!r}: no such export format; {nearest(name, FORMATS)}")


def release(folder: Path, formats: list[str], say: Callable[[str], None] = lambda line: None) -> list[str]:
    """Write an export in further formats. Returns a line for each format, with the difference of its outputs from ours;
    `say` is called with each line at once.

    A format is written to FOLDER/.FORMAT.partial, and moved to its place after the comparison. If a format cannot be
    written, or its outputs differ, its new files are deleted, earlier files of this format are kept, and the next
    formats are written. Finally Failed is raised, with a line for each format that has failed.
    """
    check(formats)
    encoder, about = weights.load_backbone(folder)
    lines, failed = [], []
    for name in formats:
        partial = folder / f".{name}.partial"
        try:
            if isinstance(encoder, TextBackbone):
                line = _compare_text_model(folder, encoder, name)
            else:
                if EXPORT_FORMAT_FILES[name]:
                    make_empty_folder(partial, EXPORT_FORMAT_FILES[name])
                line = _write_format(folder, partial, encoder, about, name)
        except UserError as error:
            failed.append(str(error))
        except Exception as error:  # exporters of other libraries may raise any exception
            reason = next((part.strip() for part in str(error).split("\n") if part.strip()), "no reason given")
            failed.append(f"{folder}: {name} cannot be written ({type(error).__name__}: {reason[:MAX_ERROR_LENGTH]})")
        else:
            lines.append(line)
            say(line)
        finally:
            delete_folder(partial, EXPORT_FORMAT_FILES[name])
    if failed:
        raise Failed(failed)
    return lines


class Failed(UserError):
    """Some formats could not be written; `lines` has a line for each of them."""

    def __init__(self, lines: list[str]):
        super().__init__("; ".join(lines))
        self.lines = lines


def _write_format(folder: Path, partial: Path, encoder: Backbone, about: dict, name: str) -> str:
    """Write a backbone of images or audio in one format, compare its outputs, and move it to its place. Returns the line
    about it."""
    images = encoder.example()
    with torch.no_grad():
        ours = PlainOutputs(encoder)(images)
        where, theirs = FORMATS[name](folder, partial, encoder, about, images)
    if theirs is None:
        _move_to_place(folder, partial, name)
        return f"{where}: written; {name} is not installed here, so its outputs were not compared"
    scale = max(1.0, float(ours[0].abs().max()))
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b is not None]
    difference = max(float((a - b).abs().max()) for a, b in pairs) / scale
    if not difference <= TOLERANCE:  # true for NaN, too
        raise UserError(
            f"{where}: {name} gives other features from it, which differ by {difference:.1e} of the largest one;"
            " do not use it"
        )
    _move_to_place(folder, partial, name)
    return f"{where}: opened again, features within {difference:.0e} of ours"


def _move_to_place(folder: Path, partial: Path, name: str) -> None:
    """Move a format's files to their place. Other files there are kept."""
    for file in EXPORT_FORMAT_FILES[name]:
        if (partial / file).exists():
            (folder / file).parent.mkdir(exist_ok=True)
            (partial / file).replace(folder / file)


def opened_by(folder: Path) -> tuple[str, str]:
    """(format of an exported folder, or "" if only this program can open it; a sentence on how to open it)."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    if kind == "timm_wrapper":
        return "timm", f"open it with timm.create_model({f'local-dir:{folder}'!r}, pretrained=True)"
    if kind.startswith("unlabeled"):
        call = f"pretrain.interchange.weights.load_backbone({str(folder)!r})"
        return "", f"open it with {call}; transformers has no class for it"
    class_name = transformers_text.CLASSES.get(kind, "AutoModel")
    return "transformers", f"open it with transformers.{class_name}.from_pretrained({str(folder)!r})"


def _compare_text_model(folder: Path, model: Any, name: str) -> str:
    """Compare a text model's logits with those of the class of transformers that opens the folder. Returns a line about
    the difference. Raises UserError if there is no such class."""
    if name != "transformers":
        raise UserError(f"{name!r}: text models have no such export format; {folder} itself is for transformers")
    kind, unsupported = transformers_text.kind_of(model.cfg)
    if kind != json.loads((folder / "config.json").read_text())["model_type"]:
        raise UserError(
            f"{folder}: was written by an earlier version, which did not use transformers' {kind} for it;"
            " export its step again"
        )
    if kind == transformers_text.OWN:
        raise UserError(
            f"{folder}: transformers has no class for {unsupported} in such a model; `weights.load_backbone` opens it"
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    library = _import("transformers")
    if library is None:
        return f"{folder}: written; transformers is not installed here, so its logits were not compared"
    theirs, info = getattr(library, transformers_text.CLASSES[kind]).from_pretrained(folder, output_loading_info=True)
    if any(info.values()):
        raise UserError(f"{folder}: the tensors are not those that transformers' class has: {info}")
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.vocab_size, (2, min(64, model.context)), generator=draw)
    with torch.no_grad():
        hidden = model(tokens).tokens
        more = {}
        if isinstance(model.cfg, families.EncoderDecoder):
            hidden, more = model.decoder(tokens, hidden), {"decoder_input_ids": tokens}
        ours, found = model.head(hidden), theirs.eval()(input_ids=tokens, **more).logits
    difference = float((ours - found).abs().max()) / max(1.0, float(ours.abs().max()))
    if not difference <= TOLERANCE:  # true for NaN, too
        raise UserError(
            f"{folder}: transformers gives other logits, which differ by {difference:.1e} of the largest one;"
            " do not use it"
        )
    return f"{folder}: opened again, logits within {difference:.0e} of ours"


def _import(name: str) -> Any:
    """The module, or None if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _transformers(
    folder: Path, partial: Path, encoder: Backbone, about: dict, images: Tensor
) -> tuple[str, Outputs | None]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    library = _import("transformers")
    if library is None:
        return str(folder), None
    if isinstance(encoder.cfg, families.ResNet) and encoder.cfg.stem == "small":
        raise UserError(f"{folder}: transformers has no ResNet with a small stem; `weights.load_backbone` opens it")
    model, info = library.AutoModel.from_pretrained(folder, output_loading_info=True)
    if any(info.values()):
        raise UserError(f"{folder}: the tensors are not those that transformers' class has: {info}")
    if hasattr(model, "vision_model"):  # a dual encoder; its last_hidden_state has no last norm in CLIPModel
        return str(folder), (model.eval().vision_model(images).pooler_output, None)
    last = model.eval()(images).last_hidden_state
    if isinstance(encoder.cfg, families.Conformer):
        return str(folder), (last.mean(1), last)
    if isinstance(encoder.cfg, families.ResNet):
        tokens = last.flatten(2).transpose(1, 2)
        return str(folder), (tokens.mean(1), tokens)
    prefix: int = 1 + vars(encoder.cfg).get("registers", 0)
    return str(folder), (last[:, 0], last[:, prefix:])


def _timm(folder: Path, partial: Path, encoder: Backbone, about: dict, images: Tensor) -> tuple[str, Outputs | None]:
    if isinstance(encoder, timm_network.TimmNetwork):
        encoder.network = timm_network.create(encoder.cfg, str(folder)).eval()
        return str(folder), PlainOutputs(encoder)(images)
    fields, tensors = timm.write(encoder.cfg, encoder.state_dict(), about["mean"], about["std"])
    target, final = partial / "timm", str(folder / "timm")
    target.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(fields, indent=1) + "\n")
    library = _import("timm")
    if library is None:
        return final, None
    model = library.create_model(f"local-dir:{target}", pretrained=True).eval()
    if isinstance(encoder.cfg, families.ConvNeXt):
        return final, (model(images), None)
    tokens = model.forward_features(images)
    return final, (model(images), tokens[:, model.num_prefix_tokens :])


def _official(
    folder: Path, partial: Path, encoder: Backbone, about: dict, images: Tensor
) -> tuple[str, Outputs | None]:
    target = partial / "official.pth"
    torch.save({k: v.contiguous() for k, v in official.write(encoder.cfg, encoder.state_dict()).items()}, target)
    again, _ = weights.load_backbone(target)
    # The format does not store the eps of the norms.
    eps, assumed = (next(m.eps for m in net.modules() if isinstance(m, nn.LayerNorm)) for net in (encoder, again))
    for module in again.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    note = f" (does not store the norms' eps, {eps:g}; its readers assume {assumed:g})"
    return f"{folder / target.name}{'' if eps == assumed else note}", PlainOutputs(again)(images)


def _torch(folder: Path, partial: Path, encoder: Backbone, about: dict, images: Tensor) -> tuple[str, Outputs | None]:
    target, batch = partial / "model.pt2", torch.export.Dim("batch")
    exported = torch.export.export(PlainOutputs(encoder).eval(), (images,), dynamic_shapes={"images": {0: batch}})
    torch.export.save(exported, target)
    model = torch.export.load(target).module()
    model(images[:1])  # the exported model must also accept other batch sizes than that of the trace
    return str(folder / target.name), model(images)


def _onnx(folder: Path, partial: Path, encoder: Backbone, about: dict, images: Tensor) -> tuple[str, Outputs | None]:
    target = partial / "model.onnx"
    write_onnx(encoder, images, target)
    library = _import("onnxruntime")
    if library is None:
        return str(folder / target.name), None
    session = library.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    session.run(None, {"images": images[:1].numpy()})
    if has_free_size(encoder):
        other = F.pad(images, (0, 2 * encoder.patch_size, 0, encoder.patch_size))
        found = session.run(None, {"images": other.numpy()})
        for ours, theirs in zip(PlainOutputs(encoder)(other), found, strict=True):
            difference = float((ours - torch.from_numpy(theirs)).abs().max()) / max(1.0, float(ours.abs().max()))
            if not difference <= TOLERANCE:
                size = f"{other.shape[-2]} × {other.shape[-1]}"
                raise UserError(f"{target.name}: gives other features for images of {size} pixels ({difference:.1e})")
    cls, tokens = (torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()}))
    return str(folder / target.name), (cls, tokens)


def has_free_size(encoder: Backbone) -> bool:
    """Whether the ONNX file of an encoder takes images of any height and width; otherwise only the batch is free. timm's
    networks, and models of clips and audio, are written for their own size."""
    return str(encoder.cfg.reads) == "image" and not isinstance(encoder, timm_network.TimmNetwork)


def write_onnx(encoder: Backbone, images: Tensor, target: Path) -> None:
    """Write an encoder as ONNX: "images" → "cls", "tokens", with names for the sizes that are free. Raises UserError if
    the packages are not installed."""
    if _import("onnxscript") is None or _import("onnx") is None:
        raise UserError("onnx: is not installed; run pip install 'unlabeled[onnx]'")
    size = sum(t.numel() * t.element_size() for t in (*encoder.parameters(), *encoder.buffers()))
    if size > MAX_ONNX_BYTES:
        raise UserError(
            f"onnx: the weights have {size / 1e9:.1f} GB, but a file of this format holds at most 2 GB; export them as"
            " torch (--also torch)"
        )
    sizes: dict[int, Any] = {0: torch.export.Dim("batch")}
    if has_free_size(encoder):
        height, width = (torch.export.Dim(name) for name in ("height", "width"))
        if encoder.whole_patches:  # in patches
            height, width = encoder.patch_size * height, encoder.patch_size * width
        sizes |= {2: height, 3: width}
        images = F.pad(images, (0, 2 * encoder.patch_size))  # equal sides would be taken for the same size
    torch.onnx.export(
        PlainOutputs(encoder).eval(),
        (images,),
        str(target),
        input_names=["images"],
        output_names=["cls", "tokens"],
        dynamic_shapes={"images": sizes},
        dynamo=True,
        external_data=False,
        verbose=False,
    )


# {export format: function that writes it to a temporary folder and opens it again; it returns (path, outputs or None)}
FORMATS: dict[str, Callable[[Path, Path, Backbone, dict, Tensor], tuple[str, Outputs | None]]] = {
    "transformers": _transformers,
    "timm": _timm,
    "official": _official,
    "torch": _torch,
    "onnx": _onnx,
}
