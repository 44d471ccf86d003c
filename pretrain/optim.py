"""Optimizer and parameter groups: which factor of the step's learning rate and weight decay falls on which parameter, and for how long it stays frozen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.config import ConfigError
from pretrain.models.layers import Backbone
from pretrain.muon import MuonAdamW
from pretrain.recipe import Optim

LAST = "prototypes"  # name of the last layer of a head over prototypes


def decays(name: str, parameter: Tensor) -> bool:
    """Weight decay falls on matrices and kernels: not on vectors (biases, norms, scales), tokens and position tables."""
    return parameter.ndim > 1 and not name.endswith(("_token", "registers", "pos_embed"))


def parameter_groups(module: nn.Module, cfg: Optim) -> list[dict]:
    """Groups with the factors by which the step's lr and weight decay are multiplied, and `frozen`, the number of steps for which the lr is 0.

    In a backbone of n blocks, block i (from 0) has the factor layer_decay^(n − i), what embeds pixels layer_decay^(n + 1), the rest 1 (BEiT, arXiv
    2106.08254); the patch embedding is multiplied by patch_embed_lr on top (DINO). Frozen parameters (requires_grad false) are left out.
    """
    if not 0 < cfg.layer_decay <= 1:
        raise ConfigError(f"optim.layer_decay = {cfg.layer_decay}: must be above 0 and at most 1")
    if cfg.patch_embed_lr < 0:
        raise ConfigError(f"optim.patch_embed_lr = {cfg.patch_embed_lr}: must be 0 or more")
    bodies = {f"{name}." if name else "": m for name, m in module.named_modules() if isinstance(m, Backbone)}
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    hidden = _hidden_matrices(bodies) if cfg.name == "muon" else {}
    if cfg.freeze_last_layer and not any(name.rpartition(".")[2] == LAST for name in trained):
        raise ConfigError(
            f"optim.freeze_last_layer = {cfg.freeze_last_layer}: this objective has no prototypes; leave it out"
        )
    groups: dict[tuple, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        key = _factors(name, parameter, bodies, cfg)
        groups.setdefault((*key, hidden.get(parameter)), []).append(parameter)
    own = {"muon": False} if cfg.name == "muon" else {}
    return [
        {"params": p, "lr_scale": scale, "wd_scale": decay, "scale": scale, "frozen": frozen}
        | (own if parts is None else {"muon": True, "parts": parts})
        for (scale, decay, frozen, parts), p in groups.items()
    ]


def _hidden_matrices(bodies: dict[str, Backbone]) -> dict[nn.Parameter, tuple[int, ...]]:
    """The linear layers' matrices inside of the backbones' blocks, with the rows of those that stand one above the other in each; () for one alone."""
    found = {}
    for body in bodies.values():
        for name, module in body.named_modules():
            layer, last = body.layer_of(f"{name}.weight") if isinstance(module, nn.Linear) else (0, 0)
            if 0 < layer < last:
                found[module.weight] = getattr(module, "parts", ())
    return found


def _factors(name: str, parameter: Tensor, bodies: dict[str, Backbone], cfg: Optim) -> tuple[float, float, int]:
    """(factor of the lr, factor of the weight decay, steps that it stays frozen)."""
    decay = float(decays(name, parameter))
    prefix = next((prefix for prefix in bodies if name.startswith(prefix)), None)
    if prefix is None:
        return 1.0, decay, cfg.freeze_last_layer if name.rpartition(".")[2] == LAST else 0
    own = name.removeprefix(prefix)
    layer, last = bodies[prefix].layer_of(own)
    scale = cfg.layer_decay ** (last - layer)
    if own.startswith(("patch_embed.", "downsample_layers.0.", "stem.")):
        scale *= cfg.patch_embed_lr
    return scale, decay, cfg.freeze_backbone


def thaw(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the groups' `lr_scale` for a step: 0 for those that are frozen still. Their moments go on."""
    for group in optimizer.param_groups:
        group["lr_scale"] = 0.0 if step < group["frozen"] else group["scale"]


def make_optimizer(module: nn.Module, cfg: Optim) -> torch.optim.Optimizer:
    """Fused AdamW, or Muon beside it; `thaw` and `Engine.step` set lr and weight decay each step."""
    groups, betas = parameter_groups(module, cfg), (cfg.beta1, cfg.beta2)
    if cfg.name == "muon":
        if not any(group["muon"] for group in groups):
            raise ConfigError("optim.name = muon: this model's blocks have no trained matrices; write optim.name=adamw")
        return MuonAdamW(groups, cfg.momentum, betas, cfg.eps)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=cfg.eps, fused=True)
