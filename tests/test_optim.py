"""Parameter groups as {name: (lr, weight decay)}, and what stays frozen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.config import ConfigError
from pretrain.models import presets
from pretrain.objectives.dinov2 import Config, DINOv2
from pretrain.optim import make_optimizer, parameter_groups, thaw
from pretrain.recipe import Optim


def objective() -> DINOv2:
    model = presets.ViT(image_size=32, patch_size=8, dim=32, depth=3, heads=4, registers=2, layer_scale=1e-5)
    torch.manual_seed(0)
    cfg = Config(prototypes=8, head_hidden=16, head_bottleneck=4)
    return DINOv2(cfg, lambda **changes: presets.build(model, **changes))


def rates(module: nn.Module, optimizer: torch.optim.Optimizer, lr: float, wd: float) -> dict[str, tuple[float, float]]:
    by_id = {id(p): (lr * g["lr_scale"], wd * g["wd_scale"]) for g in optimizer.param_groups for p in g["params"]}
    return {name: by_id[id(p)] for name, p in module.named_parameters() if id(p) in by_id}


def test_every_parameter():
    model = objective()
    found = rates(model.student, make_optimizer(model, Optim(layer_decay=0.5, patch_embed_lr=0.2)), 1.0, 0.1)
    body = {
        "cls_token": (0.0625, 0),
        "registers": (0.0625, 0),
        "mask_token": (0.0625, 0),
        "pos_embed": (0.0625, 0),
        "patch_embed.weight": (0.0125, 0.1),
        "patch_embed.bias": (0.0125, 0),
        "norm.weight": (1, 0),
        "norm.bias": (1, 0),
    }
    for i in range(3):
        rate = 0.5 ** (3 - i)
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            body |= {f"blocks.{i}.{part}.weight": (rate, 0.1), f"blocks.{i}.{part}.bias": (rate, 0)}
        for part in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            body[f"blocks.{i}.{part}"] = (rate, 0)
    expected = {f"backbone.{name}": pair for name, pair in body.items()}
    for head in ("dino_head", "ibot_head"):
        expected[f"{head}.prototypes"] = (1, 0.1)
        for i in (0, 2, 4):
            expected |= {f"{head}.mlp.{i}.weight": (1, 0.1), f"{head}.mlp.{i}.bias": (1, 0)}
    assert found == {name: pytest.approx(pair) for name, pair in expected.items()}
    assert len(parameter_groups(model, Optim())) == 2  # without factors: decayed or not


@pytest.mark.parametrize(
    "name, embed", [("convnext_micro", "downsample_layers.0.0.weight"), ("resnet_micro", "stem.0.0.weight")]
)
def test_convolutional_networks(name: str, embed: str):
    cls, options = presets.choose(name)
    cfg = cls(**options)
    cfg.name = name
    body = presets.build(cfg)
    found = rates(body, make_optimizer(body, Optim(layer_decay=0.5, patch_embed_lr=0.1)), 1.0, 1.0)
    blocks = sum(options["depths"])
    assert found[embed] == pytest.approx((0.1 * 0.5 ** (blocks + 1), 1.0))
    assert sorted({lr for lr, _ in found.values()})[-1] == pytest.approx(0.5 if name == "resnet_micro" else 1)


def test_freezing():
    model = objective()
    optimizer = make_optimizer(model, Optim(freeze_last_layer=3, freeze_backbone=5, layer_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.student.named_parameters()}
    for step, still in [(2, ("backbone.", "prototypes")), (3, ("backbone.",)), (5, ())]:
        thaw(optimizer, step)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 0.1 * group["lr_scale"], 0.1 * group["wd_scale"]
        for p in model.student.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for name, p in model.student.named_parameters():
            frozen = any(part in name for part in still)
            assert torch.equal(p, before[name]) == frozen, (step, name)


def test_refusals():
    for options, message in [
        ({"layer_decay": 0.0}, "optim.layer_decay = 0.0"),
        ({"patch_embed_lr": -1.0}, "optim.patch_embed_lr"),
    ]:
        with pytest.raises(ConfigError, match=message):
            parameter_groups(objective(), Optim(**options))
    with pytest.raises(ConfigError, match="this objective has no prototypes"):
        parameter_groups(nn.Linear(2, 2), Optim(freeze_last_layer=5))
