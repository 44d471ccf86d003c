"""The losses of image and text pairs compared with plain loops in float64, and CLIP and SigLIP compared with
transformers: values and gradients."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_pipeline.parts.caption import CaptionTokens
from data_pipeline.parts.part import About
from pretrain.build import build_objective
from pretrain.interchange import export, model_card, text_sides, weights
from pretrain.interchange.layouts import transformers_image_text
from pretrain.ops import contrastive
from pretrain.ops.contrastive import sigmoid_pairs, softmax_pairs
from pretrain.ops.gather import world
from pretrain.ops.precision import unit
from pretrain.recipes.recipe import load
from tests.conftest import tokens
from tests.parity.test_losses import assert_same, mean, normal
from tests.parity.test_models import noise

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
    kind = "clip" if name == "clip" else "siglip"
    text = f"{{name: {kind}_text, dim: 24, depth: 2, heads: 2, vocab_size: 64, context: 12}}"
    cfg = load("demo", [f"objective={name}", f"objective.text={text}", *sizes, "data.batch=6", *overrides])
    return build_objective(cfg).double()


PUBLISHED = {
    "clip": ["model.embed_norm=true", "model.patch_bias=false", "model.mlp=quick_gelu", "model.norm_eps=1e-5"],
    "siglip": ["model.pooling=attention", "model.mlp=gelu_tanh"],
    # the token of masked patches is not part of an export
    "siglip2": ["model.pooling=attention", "model.mlp=gelu_tanh", "objective.caption_weight=0"],
}  # the layers of the papers' image models


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
        assert (logs["scale"], logs["bias"]) == (pytest.approx(10.0), pytest.approx(-math.log(len(images))))
        expected = naive_sigmoid_pairs(x, y, torch.tensor(10.0), torch.tensor(-math.log(len(images))))
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


def test_the_initial_weights_of_clip_depend_on_the_width():
    """With a std of 0.02 for all widths, a model of width 96 embedded all images alike and learned nothing."""
    model = objective("clip", "model.dim=128", "objective.text={name: clip_text, dim: 96, depth: 3, vocab_size: 64}")
    for tower, dim, depth in ((model.image, 128, 2), (model.text, 96, 3)):
        block, std = tower.blocks[1], dim**-0.5
        writes = [block.attn.proj, block.mlp.fc2 if tower is model.image else block.mlp.down]
        first = block.mlp.fc1 if tower is model.image else block.mlp.up
        expected = {first: std / 2**0.5, block.attn.qkv: std} | dict.fromkeys(writes, std / (2 * depth) ** 0.5)
        for layer, value in expected.items():
            assert layer.weight.std().item() == pytest.approx(value, rel=0.05)
    assert model.image.cls_token.std().item() == pytest.approx(128**-0.5, rel=0.3)
    assert model.text_projection.weight.std().item() == pytest.approx(96**-0.5, rel=0.05)


def test_the_initial_weights_of_siglip_are_those_of_xavier():
    model = objective("siglip", "model.dim=128", "model.pooling=attention")
    pool, block = model.image.attention_pool, model.text.blocks[0]
    for layer in (model.image.blocks[0].attn.qkv, pool.proj, block.mlp.up, model.text_projection):
        assert layer.weight.std().item() == pytest.approx((2 / sum(layer.weight.shape)) ** 0.5, rel=0.06)


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


def attended(part: Any, x: Tensor, memory: Tensor, seen: Tensor) -> Tensor:
    """Attention head by head: x [T, D], memory [S, M], seen bool [T, S]."""
    q, (k, v) = part.query(x), part.key_value(memory).chunk(2, dim=1)
    width, out = q.shape[1] // part.heads, []
    for h in range(part.heads):
        own = slice(h * width, (h + 1) * width)
        scores = (q[:, own] @ k[:, own].T / width**0.5).exp() * seen
        out.append(scores / scores.sum(1, keepdim=True) @ v[:, own])
    return part.proj(torch.cat(out, dim=1))


def naive_caption(decoder: Any, tokens: Tensor, last: int, parallel: bool, patches: Tensor) -> list[Tensor]:
    """The cross-entropy of each token of one caption, from what it may see alone."""
    terms = []
    for t in range(last + 1):
        rows = [decoder.mask] * len(tokens) if parallel else [decoder.start, *decoder.embed(tokens[:t])]
        x = torch.stack([row + place for row, place in zip(rows, decoder.positions, strict=False)])
        seen = torch.ones(len(x), len(x)) if parallel else torch.ones(len(x), len(x)).tril()
        for block in decoder.blocks:
            normed = block.norm1(x)
            x = x + attended(block.attn, normed, normed, seen)
            x = x + attended(block.cross, block.norm2(x), patches, torch.ones(len(x), len(patches)))
            x = x + block.mlp(block.norm3(x))
        logits = decoder.head.weight @ decoder.norm(x)[t]
        terms.append(logits.exp().sum().log() - logits[tokens[t]])
    return terms


def test_siglip2_adds_captions_self_distillation_and_masked_patches():
    """Values and gradients, with a teacher and centres that differ from the student and from 0."""
    crops = ["objective.local_crops=3", "objective.local_size=16", "objective.distillation=true"]
    head = ["objective.prototypes=7", "objective.head_hidden=8", "objective.head_bottleneck=5"]
    weights_of = ["objective.caption_weight=0.7", "objective.consistency_weight=0.6", "objective.masked_weight=0.3"]
    text = "objective.text={name: siglip_text, dim: 24, depth: 1, heads: 2, vocab_size: 64, context: 12}"
    sizes = [text, "objective.decoder_depth=2", "model.pooling=attention", "model.depth=1"]
    model = objective("siglip2", *sizes, *crops, *head, *weights_of)
    noise(model)
    for center in model.centers.values():
        center.mean.copy_(normal(7))
    draw, batch = torch.Generator().manual_seed(3), batch_of(4)
    places = torch.arange(12) <= batch["last"].unsqueeze(1)
    batch |= {"global": normal(4, 1, 3, 32, 32, seed=4), "local": normal(4, 3, 3, 16, 16, seed=5)}
    batch |= {
        "targets": torch.where(places, batch["tokens"], -100),
        "parallel": torch.tensor([True, False, False, True]),
    }
    batch |= {"masked": torch.stack([torch.randperm(16, generator=draw)[:6].sort().values for _ in range(4)])}
    loss, logs = model(batch, 0)

    features = model.image(batch["image"])
    words = model.text_projection(model.text(batch["tokens"]).tokens[:, -1])
    learned = (model.logit_scale.exp(), model.logit_bias)
    sigmoid = naive_sigmoid_pairs(unit(features.cls), unit(words), *learned)
    rows = zip(batch["tokens"], batch["last"].tolist(), batch["parallel"].tolist(), features.tokens, strict=True)
    caption = mean([term for row in rows for term in naive_caption(model.decoder, *row)])

    def crossed(name: str, taught: Tensor, own: Tensor) -> Tensor:
        outputs = model.teacher_heads[name](taught) - center_of[name]
        p = (outputs / 0.04).exp() / (outputs / 0.04).exp().sum()
        q = (model.heads[name](own) / 0.1).exp()
        return -(p.detach() * (q / q.sum()).log()).sum()

    center_of = {name: center.mean for name, center in model.centers.items()}
    consistency, masked = [], []
    for n in range(4):
        taught = model.teacher(batch["global"][n])
        for crop in batch["local"][n]:
            consistency.append(crossed("cls", taught.cls[0], model.image(crop[None]).cls[0]))
        hidden = torch.zeros(1, 16, dtype=torch.bool)
        hidden[0, batch["masked"][n]] = True
        seen = model.image(batch["global"][n], mask=hidden).tokens[0]
        masked += [crossed("patch", taught.tokens[0, m], seen[m]) for m in batch["masked"][n].tolist()]
    terms = {"sigmoid": sigmoid.squeeze(), "caption": caption, "consistency": mean(consistency), "masked": mean(masked)}
    for name, term in terms.items():
        torch.testing.assert_close(logs[name], term.detach(), rtol=1e-6, atol=1e-8)
    expected = terms["sigmoid"] + 0.7 * terms["caption"] + 0.6 * terms["consistency"] + 0.3 * terms["masked"]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert not any(p.requires_grad for part in (model.teacher, model.teacher_heads) for p in part.parameters())
    gradients = [torch.autograd.grad(one, trained, allow_unused=True) for one in (loss, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_the_second_stage_of_siglip2_begins_with_the_weights_of_the_first():
    first, second = (
        objective("siglip2", *PUBLISHED["siglip"], f"objective.distillation={on}") for on in ("false", "true")
    )
    names = {*first.state_dict()}
    assert all(name.startswith(second.reinitialized) for name in {*second.state_dict()} - names)
    second.image.load_state_dict(first.image.state_dict(), strict=False)
    second.image.patch_embed.weight.data += 1
    second.before_first_step(names)
    assert torch.equal(second.teacher.patch_embed.weight, second.image.patch_embed.weight)
    second.teacher.patch_embed.weight.data += 1
    second.before_first_step({*second.state_dict()})
    assert not torch.equal(second.teacher.patch_embed.weight, second.image.patch_embed.weight)
    state, one = second.image.state_dict(), second.exports()["model"]  # whose token of masked patches is not exported
    texts = (second.text.cfg, one.text_side.state_dict(), {"eos_token_id": 1})
    fields, tensors = transformers_image_text.write("siglip", second.image.cfg, state, *texts)
    assert fields["model_type"] == "siglip" and "mask_token" in state and not any("mask" in name for name in tensors)


# ---------------------------------------------------------------- transformers
def exported(name: str, shards: Path, folder: Path, *overrides: str) -> Any:
    """An objective with noise on all parameters, whose export is in `folder`."""
    data = [f"data.tokenizer={tokens(shards.parent)}", "data.length=12", "objective.text.vocab_size=512"]
    model = objective(name, *data, *overrides).float()
    noise(model)
    one = model.exports()["model"]
    about = {"step": 1, "objective": name, "pool": "cls"}
    tokenizer = tokens(shards.parent) / "tokenizer.json"
    export.write(folder, one.backbone, about, [0.5] * 3, [0.25] * 3, None, tokenizer, text_side=one.text_side)
    return model.eval()


def texts_of(folder: Path, hf: ModuleType) -> tuple[Tensor, Tensor, Any]:
    """(tokens of two texts, places of their EOS, what transformers' tokenizer makes of them)."""
    found = hf.AutoTokenizer.from_pretrained(folder)(
        ["the sea", "a house in the hills"], padding="max_length", truncation=True, return_tensors="pt"
    )
    return found["input_ids"], found["attention_mask"].sum(1) - 1, found


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2"])
def test_transformers_opens_the_export(hf: ModuleType, name: str, shards: Path, tmp_path: Path):
    """With equal logits, features and loss; its tokenizer gives the tokens of the training."""
    model = exported(name, shards, tmp_path / "out", *PUBLISHED[name])
    theirs, info = hf.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs).__name__ == ("CLIPModel" if name == "clip" else "SiglipModel") and not any(info.values()), info
    images, (ids, last, _) = normal(2, 3, 32, 32).float(), texts_of(tmp_path / "out", hf)
    rows = [
        CaptionTokens(About(**model.parts["text"].about([], None)), model.cfg.text, "text")(
            text, np.random.default_rng(0)
        )
        for text in ("the sea", "a house in the hills")
    ]
    assert ids.tolist() == [row["tokens"].tolist() for row in rows] and last.tolist() == [row["last"] for row in rows]
    batch = {"image": images, "tokens": ids, "last": last}
    leaves = [images.clone().requires_grad_() for _ in range(2)]
    loss, _ = model(batch | {"image": leaves[0]}, 0)
    out = theirs.eval()(input_ids=ids, pixel_values=leaves[1], return_loss=True)
    torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(one, [leaf])[0] for one, leaf in zip((loss, out.loss), leaves, strict=True)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    side, encoder = text_sides.load(tmp_path / "out"), export.load(tmp_path / "out")[0]
    logits = side.logits(side.embed_images(encoder(images).cls), side(ids, last))
    torch.testing.assert_close(logits, out.logits_per_image, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_folder_of_transformers_is_read(hf: ModuleType, name: str, tmp_path: Path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    kind = {"clip": "CLIP", "siglip": "Siglip"}[name]
    text = sizes | {"vocab_size": 64, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    text |= {"projection_dim": 16} if name == "clip" else {"projection_size": 32}
    vision = sizes | {"image_size": 32, "patch_size": 8} | ({"projection_dim": 16} if name == "clip" else {})
    more = {"projection_dim": 16} if name == "clip" else {}
    theirs = getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(text_config=text, vision_config=vision, **more))
    noise(theirs)
    theirs.eval().save_pretrained(tmp_path)
    encoder, _ = weights.load_backbone(tmp_path)
    side, draw = text_sides.load(tmp_path), torch.Generator().manual_seed(0)
    ids = torch.randint(2, 64, (3, 12), generator=draw)
    ids[:, 7] = 1
    images = normal(2, 3, 32, 32).float()
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=images).logits_per_image
        logits = side.logits(side.embed_images(encoder(images).cls), side(ids, torch.full((3,), 7)))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    sizes_of_ours = ["model.dim=32", "model.heads=4", "model.mlp_ratio=1.5", *PUBLISHED[name]]
    model = objective(name, f"init.backbone={tmp_path}", "objective.locked=true", *sizes_of_ours)
    assert not model.image.loaded  # only the start of a run loads weights
    weights.load_into(model.image, tmp_path)
    model.before_first_step(set())
    torch.testing.assert_close(model.image.eval().float()(images).cls, encoder(images).cls)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_model_that_transformers_does_not_have_is_exported_in_our_layout(name: str, shards: Path, tmp_path: Path):
    """The card says which options to change; the folder opens with the same logits."""
    model = exported(name, shards, tmp_path / "out", "model.positions=rope")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["model_type"] == f"unlabeled_{name}"
    card = model_card.write(tmp_path / "out").read_text()
    assert "model.positions=learned" in card and "text_sides.load" in card
    encoder, side = export.load(tmp_path / "out")[0], text_sides.load(tmp_path / "out")
    batch = batch_of()
    with torch.no_grad():
        found = side.logits(
            side.embed_images(encoder(batch["image"].float()).cls), side(batch["tokens"], batch["last"])
        )
        one = model.exports()["model"].text_side
        features = model.image(batch["image"].float()).cls
        torch.testing.assert_close(found, one.logits(one.embed_images(features), one(batch["tokens"], batch["last"])))
