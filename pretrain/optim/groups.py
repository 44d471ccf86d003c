"""Parameter groups. Each group has a factor for the learning rate, a factor for the weight decay, and the number of
steps for which its parameters are frozen."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from pretrain.models.layers import Backbone
from pretrain.optim import optimizers
from pretrain.optim.skippable_optimizer import Skippable
from pretrain.recipes.sections import Optim


def decays(name: str, parameter: Tensor, tokens: bool) -> bool:
    """Whether a parameter has weight decay. Tokens and position tables do if `tokens` is true. Of all others, matrices
    and convolution kernels do, vectors (biases, norms, scales) do not."""
    return tokens if name.endswith(("_token", "registers", "pos_embed")) else parameter.ndim > 1


def clip_groups(module: nn.Module, cfg: Optim) -> dict[Tensor, str]:
    """{trained parameter: its clipping group; the gradients of a group share one norm}. With `optim.clip_scope: global`
    the group is "" for all of them. With `module` it is the dotted name of the outermost module that holds the
    parameter, where the objective itself, a ModuleDict and a ModuleList are not counted: a backbone, or a head. With
    `tensor` it is the parameter's own name."""
    names: dict[Tensor, str] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups = {"global": "", "module": _outermost_module(module, name), "tensor": name}
            names[parameter] = groups[cfg.clip_scope]
    return names


def _outermost_module(module: nn.Module, name: str) -> str:
    path = ""
    for part in name.split(".")[:-1]:
        path = f"{path}.{part}".lstrip(".")
        if not isinstance(module.get_submodule(path), (nn.ModuleDict, nn.ModuleList)):
            break
    return path


def parameter_groups(module: nn.Module, cfg: Optim) -> list[dict]:
    """Groups with `lr_scale` and `wd_scale`, the factors of a step's learning rate and weight decay, and `frozen`, the
    number of steps for which the learning rate is 0.

    In a backbone of n blocks, the learning-rate factor is layer_decay^(n − i) for block i (counted from 0),
    layer_decay^(n + 1) for the embedding, and 1 for all other parameters (BEiT, arXiv 2106.08254). The factor of the
    patch embedding is also multiplied by patch_embed_lr (DINO). With `layer_decay_of: transformers`, both factors are 1
    in convolutional networks. The factor in a sub-module that `Objective.lr_scales` names is multiplied by the one
    given there. Parameters with requires_grad=False are left out.
    """
    backbones = {f"{name}." if name else "": m for name, m in module.named_modules() if isinstance(m, Backbone)}
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    matrix_rows = _rows_of_matrices(backbones)
    group_options = optimizers.optimizer_class(cfg.name).options
    last_layers = _last_layers(module)
    if cfg.freeze_last_layer and not last_layers & trained.keys():
        raise ConfigError(
            f"optim.freeze_last_layer = {cfg.freeze_last_layer}: no head of this objective has a `last_layer`;"
            " write optim.freeze_last_layer=0"
        )
    groups: dict[tuple, list[nn.Parameter]] = {}
    lr_scales: dict[str, float] = getattr(module, "lr_scales", {})
    for name, parameter in trained.items():
        options = tuple(group_options(matrix_rows.get(parameter)).items())
        scale, decay, frozen = _factors(name, parameter, backbones, name in last_layers, cfg)
        scale *= math.prod(factor for part, factor in lr_scales.items() if name.startswith(f"{part}."))
        key = (scale, decay, frozen, options)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": p, "lr_scale": scale, "wd_scale": decay, "scale": scale, "frozen": frozen, **dict(options)}
        for (scale, decay, frozen, options), p in groups.items()
    ]


def _rows_of_matrices(backbones: dict[str, Backbone]) -> dict[Tensor, tuple[int, ...]]:
    """For the weight of each linear layer in a backbone's blocks: the number of rows of each matrix that is stacked in
    it, or () for a single matrix."""
    rows: dict[Tensor, tuple[int, ...]] = {}
    for backbone in backbones.values():
        for name, module in backbone.named_modules():
            if isinstance(module, nn.Linear):
                layer, last_layer = backbone.layer_of(f"{name}.weight")
                if 0 < layer < last_layer:
                    rows[module.weight] = getattr(module, "parts", ())
    return rows


def _last_layers(module: nn.Module) -> set[str]:
    """Names of the parameters that `optim.freeze_last_layer` freezes. A head names its parameter, or several, in the
    attribute `last_layer`; a module by this name, as other libraries have, names none."""
    found = ((name, getattr(m, "last_layer", ())) for name, m in module.named_modules())
    each = (
        (name, (last,) if isinstance(last, str) else last) for name, last in found if not isinstance(last, nn.Module)
    )
    return {f"{name}.{last}".lstrip(".") for name, names in each for last in names}


def _factors(
    name: str, parameter: Tensor, backbones: dict[str, Backbone], is_last_layer: bool, cfg: Optim
) -> tuple[float, float, int]:
    """(factor of the learning rate, factor of the weight decay, number of steps for which the parameter is frozen).
    `is_last_layer`: whether the parameter is the last layer of a head."""
    decay = float(decays(name, parameter, cfg.decay_tokens))
    prefix = next((prefix for prefix in backbones if name.startswith(prefix)), None)
    if prefix is None:
        return 1.0, decay, cfg.freeze_last_layer if is_last_layer else 0
    if cfg.layer_decay_of == "transformers" and backbones[prefix].convolutional:
        return 1.0, decay, cfg.freeze_backbone
    name_in_backbone = name.removeprefix(prefix)
    layer, last_layer = backbones[prefix].layer_of(name_in_backbone)
    scale = cfg.layer_decay ** (last_layer - layer)
    if name_in_backbone.startswith(("patch_embed.", "downsample_layers.0.", "stem.")):
        scale *= cfg.patch_embed_lr
    return scale, decay, cfg.freeze_backbone


def thaw(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set `lr_scale` of each group for a step: 0 if the group is still frozen. The optimizer updates the moments of
    frozen parameters, too."""
    for group in optimizer.param_groups:
        group["lr_scale"] = 0.0 if step < group["frozen"] else group["scale"]


def make_optimizer(module: nn.Module, cfg: Optim) -> Skippable:
    """The optimizer that `optim.name` names. Before each step, `thaw` and `Engine.step` set the learning rate and
    weight decay of its groups."""
    return optimizers.find(cfg.name).build(parameter_groups(module, cfg), cfg)
