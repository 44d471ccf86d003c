"""Writes an encoder with int8 weights for onnxruntime, and says which of its layers lose most by it.

`quantize` uses onnxruntime's dynamic quantization of linear layers: int8 weights with one scale for each output, and
uint8 inputs with one scale for each call. Convolutions, norms and the product of queries and keys stay in fp32.
`layer_losses` simulates the same arithmetic in torch, layer by layer. Shapes: B images, D and E features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from pretrain.interchange.export_formats import PlainOutputs, write_onnx
from pretrain.models.layers import Backbone, Features
from pretrain.run_folder.written_files import INT8_FILES, delete_folder, make_empty_folder

PARTIAL = ".int8.partial"
MODEL = "model.int8.onnx"


@dataclass
class LayerLoss:
    """What int8 does to one linear layer."""

    layer: str  # its name in the backbone
    own: float  # relative error of its output for the true input: ‖int8 − fp32‖ / ‖fp32‖
    features: float  # relative error of the model's features if only this layer is int8
    # largest input / root of the mean square of its inputs: a large one leaves few steps for the others
    outliers: float


def quantize(folder: Path, encoder: Backbone, reduce_range: bool = False) -> Path:
    """Write FOLDER/model.int8.onnx, and return its path. Outputs and free sizes are those of the ONNX export.

    `reduce_range`: weights of 7 bits, for x86 processors without VNNI, whose int8 products can overflow. Raises
    UserError for a model without linear layers, and if the packages are not installed."""
    if not linear_layers(encoder):
        raise UserError(f"{folder}: has no linear layers ({encoder.cfg.name}), and only these become int8")
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError:
        raise UserError("int8: onnxruntime is not installed; run pip install 'unlabeled[onnx]'") from None
    partial = folder / PARTIAL
    make_empty_folder(partial, INT8_FILES)
    try:
        write_onnx(encoder, encoder.example(), partial / "model.onnx")
        logger = logging.getLogger()
        level, logger.disabled = logger.disabled, True  # it recommends a preparation that the exporter has done
        try:
            quantize_dynamic(
                partial / "model.onnx",
                partial / MODEL,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                reduce_range=reduce_range,
                weight_type=QuantType.QInt8,
            )
        finally:
            logger.disabled = level
        return (partial / MODEL).replace(folder / MODEL)
    finally:
        delete_folder(partial, INT8_FILES)


class OnnxBackbone:
    """The encoder of an ONNX file, on the CPU: normalised images [B, C, H, W] → `Features`."""

    def __init__(self, path: Path, patch_size: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.patch_size = patch_size

    def __call__(self, images: Tensor) -> Features:
        cls, tokens = (torch.from_numpy(out) for out in self._session.run(None, {"images": images.cpu().numpy()}))
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        return Features(cls, tokens, tokens[:, :0], grid)


def linear_layers(encoder: nn.Module) -> dict[str, nn.Linear]:
    """The layers that become int8, by name."""
    return {name: module for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}


# ---------------------------------------------------------------- losses of layers
@torch.inference_mode()
def layer_losses(encoder: Backbone, images: Tensor, pool: str = "cls") -> list[LayerLoss]:
    """The losses of all linear layers on normalised images [B, C, H, W], the layer first that changes the features most.
    The model runs once for each layer."""
    layers = linear_layers(encoder)
    inputs: dict[str, Tensor] = {}
    whole = _run(encoder, images, pool, {name: _keep(inputs, name) for name in layers})
    out = []
    for name, layer in layers.items():
        x = inputs.pop(name)
        true, found = layer(x), int8_linear(layer, x)
        changed = _run(encoder, images, pool, {name: lambda module, given, _: int8_linear(module, given[0])})
        outliers = x.abs().max() / x.square().mean().sqrt().clamp_min(1e-30)
        out.append(LayerLoss(name, _relative(found, true), _relative(changed, whole), float(outliers)))
    return sorted(out, key=lambda each: -each.features)


@torch.inference_mode()
def simulate(encoder: Backbone, images: Tensor) -> tuple[Tensor, Tensor]:
    """(cls, tokens) if all linear layers are int8."""
    hooks = [
        m.register_forward_hook(lambda m, given, _: int8_linear(m, given[0])) for m in linear_layers(encoder).values()
    ]
    try:
        return PlainOutputs(encoder)(images)
    finally:
        for hook in hooks:
            hook.remove()


def int8_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer [.., D] → [.., E] with int8 weights and uint8 inputs, as onnxruntime computes it; the result of the
    integer product in fp32."""
    assert isinstance(layer, nn.Linear)
    scales = layer.weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127  # one for each output
    weight = (layer.weight / scales).round().clamp(-127, 127) * scales
    low, high = x.amin().clamp_max(0), x.amax().clamp_min(0)
    step = ((high - low) / 255).clamp_min(1e-30)
    zero = (-low / step).round()
    rounded = ((x / step).round() + zero).clamp(0, 255) - zero
    return nn.functional.linear(rounded * step, weight, layer.bias)


Hook = Callable[[nn.Module, Any, Tensor], Any]


def _run(encoder: Backbone, images: Tensor, pool: str, hooks: dict[str, Hook]) -> Tensor:
    """Pooled features [B, D] with hooks on some layers."""
    layers = linear_layers(encoder)
    handles = [layers[name].register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        features = encoder(images)
    finally:
        for handle in handles:
            handle.remove()
    return features.cls if pool == "cls" else features.tokens.mean(1)


def _keep(inputs: dict[str, Tensor], name: str) -> Hook:
    def hook(_: nn.Module, given: Any, __: Tensor) -> None:
        inputs[name] = given[0]

    return hook


def _relative(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm().clamp_min(1e-30))
