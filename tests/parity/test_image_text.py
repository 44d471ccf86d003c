"""The losses of image and text pairs compared with plain loops in float64, and CLIP and SigLIP compared with
transformers: values and gradients."""

from __future__ import annotations

import math
import os
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.build import build_objective
from pretrain.ops import contrastive
from pretrain.ops.contrastive import sigmoid_pairs, softmax_pairs
from pretrain.ops.gather import world
from pretrain.ops.precision import unit
from pretrain.recipes.recipe import load
from tests.parity.test_losses import assert_same, mean, normal

SCALE, BIAS = torch.tensor([7.0], dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def hf() -> ModuleType:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    return transformers


# ---------------------------------------------------------------- the losses
def naive_softmax_pairs(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    terms = []
    for one, other in ((a, b), (b, a)):
        for i, row in enumerate(one):
            exponentials = [(scale * (row @ column)).exp() for column in other]
            terms.append(-(exponentials[i] / sum(exponentials)).log())
    return mean(terms)


def naive_sigmoid_pairs(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    terms = [
        -(1 / (1 + (-(1 if i == j else -1) * (scale * (x @ y) + bias)).exp())).log()
        for i, x in enumerate(a)
        for j, y in enumerate(b)
    ]
    return torch.stack(terms).sum() / len(a)


def test_the_symmetric_loss():
    assert_same(
        lambda a, b, s: softmax_pairs(unit(a), unit(b), s),
        lambda a, b, s: naive_softmax_pairs(unit(a), unit(b), s).squeeze(),
        normal(9, 4),
        normal(9, 4, seed=1),
        SCALE,
    )


@pytest.mark.parametrize("logits", [1 << 26, 4 * 9, 5])
def test_the_sigmoid_loss(logits: int, monkeypatch: pytest.MonkeyPatch):
    """In one chunk, in chunks of four columns, and in chunks of one."""
    monkeypatch.setattr(contrastive, "MAX_CHUNK_LOGITS", logits)
    assert_same(
        lambda a, b, s, c: sigmoid_pairs(unit(a), unit(b), s, c),
        lambda a, b, s, c: naive_sigmoid_pairs(unit(a), unit(b), s, c).squeeze(),
        normal(9, 4),
        normal(9, 4, seed=1),
        SCALE,
        BIAS,
    )


def check_pairs(kind: str) -> dict[str, list[Tensor]]:
    """A loss of the global batch, for tests/parity/test_distributed.py: the gradients of both towers and of scale and
    bias."""
    torch.manual_seed(0)
    image, text = nn.Linear(5, 4).double(), nn.Linear(6, 4).double()
    learned = [x.clone().requires_grad_() for x in (SCALE, BIAS)[: 1 if kind == "softmax" else 2]]
    rank, count = world()
    a, b = (x.chunk(count)[rank] for x in (normal(8, 5), normal(8, 6, seed=1)))
    loss = {"softmax": softmax_pairs, "sigmoid": sigmoid_pairs}[kind](unit(image(a)), unit(text(b)), *learned)
    inputs = [*image.parameters(), *text.parameters(), *learned]
    return {"mean": [loss.detach(), *torch.autograd.grad(loss, inputs)]}


# ---------------------------------------------------------------- the objectives
def objective(name: str, *overrides: str) -> Any:
    sizes = ["model=vit", "model.dim=32", "model.depth=2", "model.heads=2", "model.image_size=32", "model.patch_size=8"]
    text = f"{{name: {name}_text, dim: 24, depth: 2, heads: 2, vocab_size: 64, context: 12}}"
    cfg = load("demo", [f"objective={name}", f"objective.text={text}", *sizes, "data.batch=6", *overrides])
    return build_objective(cfg).double()


def batch_of(count: int = 6) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "image": normal(count, 3, 32, 32),
        "tokens": torch.randint(3, 64, (count, 12), generator=draw),
        "last": torch.tensor([3, 11, 5, 0, 7, 2])[:count],
    }


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_loss_compares_embeddings_of_length_one(name: str):
    model, batch = objective(name), batch_of()
    images = model.image(batch["image"]).cls
    if name == "clip":
        images, words = model.image_projection(images), model.text(batch["tokens"]).tokens
        words = torch.stack([row[last] for row, last in zip(words, batch["last"], strict=True)])
    else:
        words = model.text(batch["tokens"]).tokens[:, -1]
    words = model.text_projection(words)
    x, y = (rows / rows.norm(dim=1, keepdim=True) for rows in (images, words))
    loss, logs = model(batch, 0)
    if name == "clip":
        assert logs["scale"] == pytest.approx(1 / 0.07)
        expected = naive_softmax_pairs(x, y, torch.tensor(1 / 0.07))
    else:
        assert (logs["scale"], logs["bias"]) == (pytest.approx(10.0), -10.0)
        expected = naive_sigmoid_pairs(x, y, torch.tensor(10.0), torch.tensor(-10.0))
    torch.testing.assert_close(loss, expected.to(loss.dtype).squeeze(), rtol=1e-6, atol=1e-6)


def test_clip_reads_a_caption_up_to_eos_and_siglip_all_of_it():
    batch = batch_of()
    changed = batch | {"tokens": batch["tokens"].clone()}
    changed["tokens"][3, 1:] = 5  # after the EOS of this caption
    clip, siglip = objective("clip"), objective("siglip")
    assert torch.equal(clip(batch, 0)[0], clip(changed, 0)[0])
    assert not torch.equal(siglip(batch, 0)[0], siglip(changed, 0)[0])


def test_the_scale_of_clip_stays_at_100():
    model = objective("clip", "objective.temperature=0.005")
    assert model(batch_of(), 0)[1]["scale"] == pytest.approx(100)
    model.after_step(0)
    assert model.logit_scale.item() == pytest.approx(math.log(100))


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_locked_image_model_needs_weights_and_is_not_trained(name: str):
    model = objective(name, "objective.locked=true")
    with pytest.raises(ValueError, match=r"objective.locked = true: the image model has random weights"):
        model.before_first_step(set())
    model.before_first_step({"image.cls_token"})
    model.train()(batch_of(), 0)[0].backward()
    assert not model.image.training and model.text.training
    trained = {key.partition(".")[0] for key, p in model.named_parameters() if p.grad is not None}
    assert "image" not in trained and {"text", "text_projection", "logit_scale"} <= trained


def test_dropped_patches_are_not_seen():
    model, batch = objective("clip", "objective.patch_drop=0.5"), batch_of()
    keep = torch.stack([torch.randperm(16)[:8] for _ in range(6)])
    pixels = batch["image"].clone()
    hidden = torch.ones(6, 16, dtype=torch.bool).scatter(1, keep, False).view(6, 1, 4, 4)
    pixels[hidden.repeat_interleave(8, 2).repeat_interleave(8, 3).expand_as(pixels)] = 3.0
    seen = model(batch | {"keep": keep}, 0)[0]
    assert torch.equal(seen, model(batch | {"image": pixels, "keep": keep}, 0)[0])
    assert not torch.equal(seen, model(batch, 0)[0])
