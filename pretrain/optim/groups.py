"""Parameter groups: each parameter's factors of learning rate and weight decay, and the number of steps for which it is
frozen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.config import ConfigError
from pretrain.models.layers import Backbone
from pretrain.optim import optimizers
from pretrain.optim.skippable import Skippable
from pretrain.recipes.sections import Optim


def decays(name: str, parameter: Tensor) -> bool:
    """Whether a parameter has weight decay: matrices and kernels have; vectors (biases, norms, scales), tokens and
    position tables not."""
    return parameter.ndim > 1 and not name.endswith(("_token", "registers", "pos_embed"))


def parameter_groups(module: nn.Module, cfg: Optim) -> list[dict]:
    """Groups with `lr_scale` and `wd_scale`, by which a step's lr and weight decay are multiplied, and `frozen`, the
    steps for which lr is 0.

    In a backbone of n blocks, the lr factor of block i (from 0) is layer_decay^(n − i), of the embedding layer_decay^(n
    + 1), of all other parameters 1 (BEiT, arXiv 2106.08254); the patch embedding's is also multiplied by patch_embed_lr
    (DINO). Parameters with requires_grad false are left out.
    """
    bodies = {f"{name}." if name else "": m for name, m in module.named_modules() if isinstance(m, Backbone)}
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    hidden, options = _hidden_matrices(bodies), optimizers.kind(cfg.name).options
    last = _last_layers(module)
    if cfg.freeze_last_layer and not last & trained.keys():
        raise ConfigError(
            f"optim.freeze_last_layer = {cfg.freeze_last_layer}: no head of this objective has a `last_layer`;"
            " write optim.freeze_last_layer=0"
        )
    groups: dict[tuple, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        own = tuple(options(hidden.get(parameter)).items())
        groups.setdefault((*_factors(name, parameter, bodies, name in last, cfg), own), []).append(parameter)
    return [
        {"params": p, "lr_scale": scale, "wd_scale": decay, "scale": scale, "frozen": frozen, **dict(own)}
        for (scale, decay, frozen, own), p in groups.items()
    ]


def _hidden_matrices(bodies: dict[str, Backbone]) -> dict[nn.Parameter, tuple[int, ...]]:
    """{weight of a linear layer in a backbone's block: the rows of each matrix that is stacked in it, () for a single
    matrix}."""
    found = {}
    for body in bodies.values():
        for name, module in body.named_modules():
            layer, last = body.layer_of(f"{name}.weight") if isinstance(module, nn.Linear) else (0, 0)
            if 0 < layer < last:
                found[module.weight] = getattr(module, "parts", ())
    return found


def _last_layers(module: nn.Module) -> set[str]:
    """Names of the parameters that `optim.freeze_last_layer` freezes: those that a module's attribute `last_layer`
    names."""
    found = ((name, getattr(m, "last_layer", None)) for name, m in module.named_modules())
    return {f"{name}.{last}".lstrip(".") for name, last in found if isinstance(last, str)}


def _factors(
    name: str, parameter: Tensor, bodies: dict[str, Backbone], last: bool, cfg: Optim
) -> tuple[float, float, int]:
    """(factor of the lr, factor of the weight decay, steps for which it is frozen). `last`: whether it is the last
    layer of a head."""
    decay = float(decays(name, parameter))
    prefix = next((prefix for prefix in bodies if name.startswith(prefix)), None)
    if prefix is None:
        return 1.0, decay, cfg.freeze_last_layer if last else 0
    own = name.removeprefix(prefix)
    layer, last = bodies[prefix].layer_of(own)
    scale = cfg.layer_decay ** (last - layer)
    if own.startswith(("patch_embed.", "downsample_layers.0.", "stem.")):
        scale *= cfg.patch_embed_lr
    return scale, decay, cfg.freeze_backbone


def thaw(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the groups' `lr_scale` for a step: 0 for those that are still frozen. Their moments are updated in any
    case."""
    for group in optimizer.param_groups:
        group["lr_scale"] = 0.0 if step < group["frozen"] else group["scale"]


def make_optimizer(module: nn.Module, cfg: Optim) -> Skippable:
    """The optimizer that `optim.name` names. `thaw` and `Engine.step` set lr and weight decay of its groups before each
    step."""
    return optimizers.find(cfg.name).build(parameter_groups(module, cfg), cfg)
