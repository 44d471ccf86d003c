"""What a CPU computes in fewer passes over memory against plain operations: outputs and gradients of every parameter, and of the input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pretrain.models import fused, presets
from pretrain.models.vit import VisionTransformer
from tests.parity.test_losses import noise

ROPE = {"positions": "rope", "registers": 2, "rope_rescale": 2.0}
CASES = [
    {},
    {**ROPE, "layer_scale": 0.1, "key_bias": False},
    {**ROPE, "layer_scale": 0.1, "qkv_bias": False, "mlp": "swiglu", "local_cls_norm": True},
    {**ROPE, "layer_scale": 0.1, "drop_path": 0.5},
]


def results(model: nn.Module, weights: list[Tensor], keep: Tensor | None, precision: str) -> list[Tensor]:
    """Tokens of two sizes, and gradients of their weighted sum; the random numbers are the same each time."""
    torch.manual_seed(3)
    images = [torch.randn(3, 3, 32, 32), torch.randn(4, 3, 16, 24)]
    dtype = next(model.parameters()).dtype
    images = [image.to(dtype).requires_grad_() for image in images]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        out = [torch.cat([f.cls.unsqueeze(1), f.tokens], 1) for f in model(images, keep=[keep, None])]
    loss = sum((o * w.to(dtype)).sum() for o, w in zip(out, weights, strict=True))
    return [*out, *torch.autograd.grad(loss, [*images, *model.parameters()])]


@pytest.mark.parametrize(("precision", "attention"), [("fp64", "fp64"), ("bf16", "fp32"), ("bf16", "bf16")])
@pytest.mark.parametrize("options", CASES)
def test_the_same_as_plain_operations(options: dict, precision: str, attention: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused, "fp32_is_faster", lambda: attention == "fp32")
    cfg = presets.ViT(**({"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 4} | options))
    model = VisionTransformer(cfg).train()
    noise(model, 1)
    model = model.double() if precision == "fp64" else model
    keep = torch.tensor([[0, 3, 5, 9], [1, 2, 3, 4], [15, 14, 2, 0]]) if options else None
    weights = [torch.randn(3, 5 if options else 17, 32), torch.randn(4, 7, 32)]
    used = []
    real = fused.attend
    monkeypatch.setattr(fused, "attend", lambda parts: used.extend(part.dtype for part in parts) or real(parts))
    ours = results(model, weights, keep, precision)
    kind = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[attention]
    assert used == [kind] * 4
    monkeypatch.setattr(fused, "possible", lambda *_: False)
    plain = results(model, weights, keep, precision)
    assert len(used) == 4
    for one, other in zip(ours, plain, strict=True):
        if precision == "fp64":
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        else:  # both round to 8 bits, at other places
            assert one.dtype == other.dtype and (one - other).norm() < 3e-2 * other.norm() + 1e-3


def test_where_it_is_not_for(monkeypatch: pytest.MonkeyPatch):
    """Long sequences go to PyTorch's kernel; half precision, whose smallest numbers a layer scale would pass, and compilers get plain operations."""
    model = VisionTransformer(presets.ViT(image_size=32, patch_size=8, dim=32, depth=1, heads=4)).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(x).tokens
    monkeypatch.setattr(fused, "LONGEST", 1)
    monkeypatch.setattr(fused, "attend", None)
    torch.testing.assert_close(model(x).tokens, expected, rtol=1e-10, atol=1e-10)
    weight = torch.ones(4, 4)
    with torch.autocast("cpu", torch.float16):
        assert not fused.possible(x, weight)
    assert fused.possible(x, weight) and not fused.possible(x, weight.bfloat16())
    with torch.no_grad():
        program = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(program(x).tokens, expected, rtol=1e-10, atol=1e-10)


def test_frozen_parts_get_no_gradient():
    x, weight, bias = torch.randn(5, 3), nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
    residual = torch.randn(5, 4, requires_grad=True)
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    out = fused.linear(x, weight, bias, None, residual)
    torch.testing.assert_close(out, residual + nn.functional.linear(x, weight, bias))
    out.sum().backward()
    assert torch.equal(residual.grad, torch.ones(5, 4)) and weight.grad is None
