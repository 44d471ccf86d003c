"""The chunked cross-entropy compared with loops in float64 and with PyTorch's cross-entropy: values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.cross_entropy import cross_entropy


def naive(hidden, weight, targets, bias=None, row_weights=None, softcap=None, z_loss=0.0, scale=1.0) -> Tensor:
    total = torch.zeros((), dtype=hidden.dtype)
    for n, x in enumerate(hidden):
        hard = targets.ndim == 1
        if hard and targets[n] == -100:
            continue
        logits = torch.stack([scale * (x * w).sum() for w in weight])
        logits = logits if bias is None else logits + bias
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        lse = sum(logit.exp() for logit in logits).log()
        loss = (
            lse - logits[targets[n]] if hard else -sum(t * (z - lse) for t, z in zip(targets[n], logits, strict=True))
        )
        total = total + (loss + z_loss * lse**2) * (1.0 if row_weights is None else row_weights[n])
    return total


def given(dtype=torch.float64, rows: int = 11, classes: int = 7, dim: int = 5) -> dict[str, Tensor]:
    torch.manual_seed(0)
    hard = torch.randint(0, classes, (rows,))
    hard[3] = hard[rows - 1] = -100
    soft = torch.randn(rows, classes, dtype=dtype).softmax(-1)
    more = {"hard": hard, "soft": soft, "bias": torch.randn(classes, dtype=dtype)}
    return more | {
        "hidden": torch.randn(rows, dim, dtype=dtype),
        "weight": torch.randn(classes, dim, dtype=dtype),
        "row_weights": torch.rand(rows, dtype=dtype),
    }


def with_gradients(function, inputs: list[Tensor], factor: float = 0.37) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = function(*leaves)
    (loss * factor).backward()
    return [loss.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 3.0}, {"z_loss": 0.1}, {"scale": 4.0}, {"row_weights": True, "softcap": 2.0, "z_loss": 0.2, "scale": 0.5}],
    ids=lambda o: "+".join(o) or "plain",
)  # fmt: skip
@pytest.mark.parametrize("chunks", [1, 3, None])
def test_value_and_gradients_are_those_of_loops(kind: str, options: dict, chunks: int | None):
    x = given()
    options = {key: x["row_weights"] if value is True else value for key, value in options.items()}
    inputs = [x["hidden"], x["weight"], x["bias"]]
    ours = with_gradients(lambda h, w, b: cross_entropy(h, w, x[kind], bias=b, chunks=chunks, **options), inputs)
    theirs = with_gradients(lambda h, w, b: naive(h, w, x[kind], b, **options), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_fp32_is_the_plain_one_to_1e6():
    x = given(torch.float32, 300, 1000, 64)
    inputs = [x["hidden"], x["weight"] * 0.2]
    ours = with_gradients(lambda h, w: cross_entropy(h, w, x["hard"]) / 298, inputs)
    theirs = with_gradients(lambda h, w: F.cross_entropy(h @ w.t(), x["hard"]), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_bf16_is_the_plain_one_to_its_rounding():
    x = given(torch.float32, 300, 1000, 64)

    def autocast(function):
        def run(*inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*inputs)

        return run

    inputs = [x["hidden"], x["weight"] * 0.2]
    exact = with_gradients(lambda h, w: cross_entropy(h, w, x["hard"]), inputs)
    ours = with_gradients(autocast(lambda h, w: cross_entropy(h, w, x["hard"])), inputs)
    plain = autocast(lambda h, w: F.cross_entropy(F.linear(h, w).float(), x["hard"], reduction="sum"))
    theirs = with_gradients(plain, inputs)
    for name, e, a, b in zip(("loss", "hidden", "weight"), exact, ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert (a - e).norm() <= max(1.05 * (b - e).norm(), 1e-4 * e.norm()), name  # not further from the exact one
        assert (a - e).norm() < 0.01 * e.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fp16_keeps_small_gradients(dtype: torch.dtype):
    """The smallest number in fp16 is 6e-8, and the loss scale is applied only in the backward. `dtype`: that of the
    hidden states."""
    x = given(torch.float32, 300, 1000, 64)
    inputs = [x["hidden"], x["weight"] * 0.2]

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return 1e4 * cross_entropy(h, w, x["soft"], row_weights=torch.full((300,), 1e-5))

    def half(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.float16):
            return loss(h.to(dtype), w)

    for name, a, e in zip(
        ("loss", "hidden", "weight"), with_gradients(half, inputs), with_gradients(loss, inputs), strict=True
    ):
        assert (a - e).norm() < 2e-3 * e.norm(), name


def test_large_logits_and_no_valid_target():
    x = given(torch.float32)
    loss, by_hidden, by_weight = with_gradients(
        lambda h, w: cross_entropy(h, w, x["hard"], scale=1e4), [x["hidden"], x["weight"]]
    )
    assert loss.isfinite() and by_hidden.isfinite().all() and by_weight.isfinite().all()
    nothing = torch.full_like(x["hard"], -100)
    loss, by_hidden, by_weight = with_gradients(lambda h, w: cross_entropy(h, w, nothing), [x["hidden"], x["weight"]])
    assert loss == 0 and not by_hidden.any() and not by_weight.any()


def test_gradients_only_where_they_are_asked_for():
    x = given()
    weight = x["weight"].clone().requires_grad_()
    with torch.no_grad():
        value = cross_entropy(x["hidden"], weight, x["hard"])
    loss = cross_entropy(x["hidden"], weight, x["hard"])
    loss.backward()
    assert value == loss.detach() and weight.grad is not None
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
