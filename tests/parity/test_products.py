"""Matrix products and attention by whichever of a CPU's kernels is the faster: the same numbers by each, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models import fused, text_layers
from pretrain.models.text_layers import attend
from pretrain.ops import products
from pretrain.ops.cross_entropy import cross_entropy
from pretrain.plan_trace import FLOPS

needs_onednn = pytest.mark.skipif(products.onednn is None, reason="PyTorch is built without oneDNN here")


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """oneDNN for every fp32 product, whatever the CPU; the shapes of those that it computed."""
    monkeypatch.setattr(products, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products, "ROWS", 0)
    used: list[tuple] = []
    real = products._by_onednn
    monkeypatch.setattr(
        products, "_by_onednn", lambda a, b, bias: used.append((*a.shape, b.shape[1])) or real(a, b, bias)
    )
    return used


def gradients(function, leaves: list[Tensor]) -> list[Tensor]:
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    torch.manual_seed(1)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.randn(out.shape, dtype=torch.float64).to(out.dtype))]


def near(ours: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    for one, other in zip(ours, exact, strict=True):
        assert one.shape == other.shape and (one.double() - other).norm() <= tolerance * other.norm()


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_linear_by_onednn(bias: bool, compiled: bool, by_onednn: list, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    leaves = [torch.randn(3, 5, 48), torch.randn(32, 48), *([torch.randn(32)] if bias else [])]
    function = torch.compile(products.linear, fullgraph=True) if compiled else products.linear
    exact = gradients(F.linear, [leaf.double() for leaf in leaves])
    near(gradients(function, leaves), exact, 1e-6)
    assert compiled or by_onednn == [(15, 48, 32), (15, 32, 48), (32, 15, 48)]
    by_onednn.clear()
    monkeypatch.setattr(products, "LEAST", 1 << 30)
    near(gradients(products.linear, leaves), exact, 1e-6)
    assert not by_onednn


@needs_onednn
def test_layers_by_onednn(by_onednn: list):
    """Factors, residuals and rotations of the fused layers, and the loss in chunks."""
    torch.manual_seed(0)
    x, weight, bias, scale, residual = (torch.randn(s) for s in ((12, 16), (48, 16), (48,), (48,), (12, 48)))
    leaves = [x, weight, bias, scale, residual]
    plain = lambda x, weight, bias, scale, residual: residual + scale * F.linear(x, weight, bias)  # noqa: E731
    near(gradients(fused.linear, leaves), gradients(plain, [leaf.double() for leaf in leaves]), 1e-5)
    near(
        gradients(lambda *a: fused.linear(*a, None, None), leaves[:3]),
        gradients(F.linear, [leaf.double() for leaf in leaves[:3]]),
        1e-5,
    )
    angles = torch.randn(6, 1, 4)
    rotations = [(torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin())]

    def qkv(dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        turned = [tuple(part.to(dtype) for part in rotations[0])]
        return fused.attend(fused.query_key_value(x, weight, bias, [(2, 6)], 2, turned))

    with_kernel = gradients(lambda *a: qkv(torch.float32, *a), leaves[:3])
    near(with_kernel, gradients(lambda *a: qkv(torch.float64, *a), [leaf.double() for leaf in leaves[:3]]), 1e-5)
    targets = torch.randint(0, 48, (12,))
    near(
        gradients(lambda h, w: cross_entropy(h, w, targets), leaves[:2]),
        gradients(lambda h, w: F.cross_entropy(h @ w.t(), targets, reduction="sum"), [x.double(), weight.double()]),
        1e-5,
    )
    assert len(by_onednn) >= 15


@needs_onednn
def test_flops_of_onednn_are_counted(by_onednn: list):
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, residual = torch.randn(4, 6), torch.randn(8, 6), torch.randn(4, 8)
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        products.product(x, weight.t())
        products.added(torch.randn(8), x, weight.t())
        products.added(residual, x, weight.t())
    assert counter.get_total_flops() == 3 * 2 * 4 * 6 * 8


@pytest.mark.parametrize("bias", [False, True])
def test_products_through_fp32_are_those_of_bf16(bias: bool, monkeypatch: pytest.MonkeyPatch):
    """The same operands rounded to bf16: outputs equal but for the order of sums, gradients at least as near to the exact ones as autocast's."""
    draw = torch.Generator().manual_seed(0)
    x, weight, slope = (torch.randn(shape, generator=draw) for shape in ((3, 5, 48), (32, 48), (3, 5, 32)))
    given = [x, weight, *([torch.randn(32, generator=draw)] if bias else [])]

    def run(faster: bool, low: bool) -> list[Tensor]:
        monkeypatch.setattr(products, "fp32_is_faster", lambda: faster)
        leaves = [value.clone().requires_grad_() for value in given]
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = products.linear(*leaves)
        return [out, *torch.autograd.grad(out, leaves, slope.to(out.dtype))]

    ours, theirs, exact = run(True, True), run(False, True), run(True, False)
    assert [value.dtype for value in ours] == [value.dtype for value in theirs]
    torch.testing.assert_close(ours[0], theirs[0], rtol=2**-7, atol=2**-7)
    for a, b, c in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        assert (a - c).norm() <= 1.05 * (b - c).norm()


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("kind", ["causal", "all", "documents", "bias"])
def test_attention_in_bf16(kind: str, heads: int, monkeypatch: pytest.MonkeyPatch):
    """Where bf16 products are the CPU's faster ones: as near to exact attention of the same rounded numbers as PyTorch's kernel."""
    torch.manual_seed(0)
    leaves = [torch.randn(3, h, 12, 8).bfloat16() for h in (4, heads, heads)]
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12, [0] * 9 + [-1] * 3])
    places = torch.arange(12)
    mask = {
        "causal": None,
        "all": None,
        "documents": text_layers.visible(places, places, 4, documents, causal=True),
        "bias": torch.randn(1, 4, 12, 12),
    }[kind]
    used = []
    real = fused.attend_rows
    monkeypatch.setattr(fused, "attend_rows", lambda *a: used.append(kind) or real(*a))

    def run(native: bool, leaves: list[Tensor], mask: Tensor | None) -> list[Tensor]:
        monkeypatch.setattr(fused, "fp32_is_faster", lambda: not native)
        return gradients(lambda q, k, v: attend(q, k, v, mask, kind == "causal", 0.3), leaves)

    exact = run(True, [leaf.double() for leaf in leaves], mask.double() if kind == "bias" else mask)
    near(run(False, leaves, mask), exact, 0.01)
    assert not used
    near(run(True, leaves, mask), exact, 0.01)
    assert used == [kind]


def test_attention_in_bf16_is_for_short_rows_and_fixed_masks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused, "fp32_is_faster", lambda: False)
    monkeypatch.setattr(fused, "attend_rows", None)
    q = torch.randn(1, 2, 40, 8, dtype=torch.bfloat16, requires_grad=True)
    assert not fused.short_in_bf16(q, q) and fused.short_in_bf16(q[:, :, :32], q[:, :, :32])
    assert not fused.short_in_bf16(q.detach()[:, :, :8], q[:, :, :8])
    learned = nn.Parameter(torch.zeros(1, 2, 8, 8))
    short = q[:, :, :8]
    attend(short, short, short, learned, False).sum().backward()
    assert learned.grad is not None
    with fused.switched_off():
        assert not fused.short_in_bf16(short, short)
