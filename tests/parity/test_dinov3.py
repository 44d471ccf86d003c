"""DINOv3: its terms compared with plain loops in float64, the whole objective crop by crop, one training step
compared with a plain script, and its stages."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ConfigError, UserError
from common.schedules import Schedule
from data_pipeline.views.augmentations import Augment
from data_pipeline.views.multicrop import _augments, draw_kind, multicrop
from pretrain.build import build_objective
from pretrain.interchange.export import load as load_export
from pretrain.models import families
from pretrain.models.build import build_model
from pretrain.objectives.dinov3 import Config, DINOv3
from pretrain.ops.gram import gram_loss, resize_map
from pretrain.ops.koleo import koleo
from pretrain.ops.self_distillation import health
from pretrain.optim.groups import thaw
from pretrain.parallel.engine import Engine
from pretrain.train import train
from tests.conftest import teacher_run, tiny_recipe
from tests.parity.test_losses import (
    assert_same,
    mean,
    naive_dino,
    naive_ibot,
    naive_koleo,
    naive_sinkhorn,
    noise,
    normal,
    places_of,
)

SIZES = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 4}
VIT = {**SIZES, "positions": "rope", "registers": 2, "layer_scale": 0.3, "key_bias": False}


# ---------------------------------------------------------------- terms
def naive_gram(s: Tensor, t: Tensor, mask: Tensor, tokens: str, negatives: str, per_image: bool) -> Tensor:
    if not per_image:
        s, t, mask = (x.flatten(0, 1).unsqueeze(0) for x in (s, t, mask))
    images = []
    for a, b, m in zip(s, t, mask, strict=True):
        rows = [i for i in range(len(a)) if tokens == "all" or bool(m[i]) == (tokens == "masked")]
        errors = []
        for i in rows:
            for j in rows:
                x, y = (v[i] @ v[j] / (v[i].norm() * v[j].norm()) for v in (a, b))
                if negatives == "clip_teacher" and y < 0 and x < 0:
                    x = x * 0
                if negatives == "clip" and x < 0:
                    x = x * 0
                if negatives != "keep" and y < 0:
                    y = y * 0
                errors.append((x - y) ** 2)
        if errors:
            images.append(mean(errors))
    return mean(images)


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("negatives", ["keep", "clip", "clip_teacher"])
@pytest.mark.parametrize("tokens", ["all", "masked", "unmasked"])
def test_gram(tokens: str, negatives: str, per_image: bool):
    s, t = normal(3, 6, 4), normal(3, 6, 5, seed=1)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [0] * 6, [1, 0, 1, 1, 0, 1]], dtype=torch.bool)
    options = (mask, tokens, negatives, per_image)
    assert_same(lambda s: gram_loss(s, t, *options), lambda s: naive_gram(s, t, *options), s)


def test_gram_options_differ_and_nothing_chosen_is_zero():
    s, t, mask = normal(2, 12, 3), normal(2, 12, 3, seed=1), torch.zeros(2, 12, dtype=torch.bool)
    mask[0, :6], mask[1, 3:] = True, True
    values = {
        gram_loss(s, t, mask, a, b, c).item()
        for a in ("all", "masked")
        for b in ("keep", "clip", "clip_teacher")
        for c in (True, False)
    }
    assert len(values) == 12 and gram_loss(s, s) == pytest.approx(0, abs=1e-30)
    nothing = s.clone().requires_grad_()
    value = gram_loss(nothing, t, torch.zeros_like(mask), "masked")
    value.backward()
    assert value == 0 and not nothing.grad.any()
    with pytest.raises(ValueError, match="needs a mask"):
        gram_loss(s, t, None, "masked")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gram_loss(s.float(), t.float()), gram_loss(s, t).float(), rtol=1e-4, atol=0)


def test_resize_map():
    tokens = normal(2, 24, 3)
    ours = resize_map(tokens, (4, 6), (2, 3))
    for b in range(2):
        for d in range(3):
            expected = F.interpolate(tokens[b, :, d].view(1, 1, 4, 6), (2, 3), mode="bicubic").flatten()
            torch.testing.assert_close(ours[b, :, d], expected)
    assert resize_map(tokens, (4, 6), (4, 6)) is tokens


@pytest.mark.parametrize("group, neighbours", [(6, 1), (3, 1), (4, 2), (12, 3)])
def test_grouped_koleo(group: int, neighbours: int):
    def naive(x: Tensor) -> Tensor:
        return mean([naive_koleo(part, neighbours) for part in x.split(group)])

    assert_same(lambda x: koleo(x, group, neighbours), naive, normal(12, 4))
    if neighbours == 1 and group == 12:
        assert_same(lambda x: koleo(x, group), koleo, normal(12, 4))


def test_grouped_koleo_at_its_edges():
    x = normal(1, 4).expand(4, -1).clone().requires_grad_()
    value = koleo(x, 2)
    value.backward()
    assert value.isfinite() and x.grad.isfinite().all()
    for group, neighbours in [(3, 1), (1, 1), (2, 2), (4, 0)]:
        with pytest.raises(ValueError, match=f"KoLeo over groups of {group} with {neighbours} neighbours: the 4 rows"):
            koleo(x, group, neighbours)


def test_health():
    """Known cases: equal features, an orthonormal set, two clusters."""
    uniform, sure = torch.full((4, 8), 1 / 8), torch.eye(8)[:4]
    alike = health(torch.ones(4, 8), uniform)
    assert alike["feature_std"] == 0 and alike["teacher_entropy"].item() == pytest.approx(math.log(8))
    spread = health(torch.eye(8), sure)
    assert spread["rank"].item() == pytest.approx(7) and spread["teacher_entropy"] == pytest.approx(0, abs=1e-6)
    assert spread["feature_std"].item() == pytest.approx(math.sqrt(1 - 1 / 8))
    assert health(torch.eye(8)[[0, 0, 1, 1]], sure)["rank"].item() == pytest.approx(1)


# ---------------------------------------------------------------- the objective
def dinov3(**options: object) -> DINOv3:
    sizes = {"prototypes": 11, "head_hidden": 16, "head_bottleneck": 8, "local_crops": 3, "local_size": 16}
    cfg = Config(**sizes, **options)
    cfg.teacher_temperature, cfg.momentum = Schedule(0.2), Schedule(0.9)
    torch.manual_seed(0)
    return DINOv3(cfg, lambda **changes: build_model(families.ViT(**VIT), **changes))


def batch_of(images: int = 4, gram: int = 64) -> dict[str, Tensor]:
    mask = torch.zeros(images, 2, 16, dtype=torch.bool)
    mask[0, 1, 3], mask[1, 0, 5:9], mask[1, 1], mask[2, 1, ::2] = True, True, True, True
    return {
        "global": normal(images, 2, 3, 32, 32),
        "local": normal(images, 3, 3, 16, 16, seed=1),
        "gram": normal(images, 2, 3, gram, gram, seed=2),
        "mask": mask,
        **places_of(mask),
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "gram_tokens": "masked",
            "gram_negatives": "clip",
            "koleo_group": 2,
            "ibot_prototypes": 7,
            "ibot_hidden": 12,
            "ibot_bottleneck": 6,
        },
        {
            "gram_tokens": "unmasked",
            "gram_negatives": "clip_teacher",
            "gram_per_image": False,
            "koleo_neighbours": 2,
        },
    ],
    ids=["plain", "options", "more options"],
)
def test_forward(options: dict):
    """The whole loss, computed crop by crop."""
    model = dinov3(
        gram_teacher="ema", gram_weight=Schedule(1.5), local_weight=Schedule(0.5), ibot_weight=0.7, **options
    ).double()
    for seed, part in enumerate((model.student, model.teacher, model.gram)):
        noise(part, seed)
    batch, mask = batch_of(), batch_of()["mask"].flatten(0, 1)
    t_cls, t_patch, s_global, s_local, s_patch, grams, spread = [], [], [], [], [], [], [[], []]
    body, own = model.teacher["backbone"], model.student["backbone"]
    for i in range(4):
        for g in range(2):
            hidden, crop = batch["mask"][i, g], batch["global"][i, g][None]
            with torch.no_grad():
                features = body(crop)
                t_cls.append(model.teacher["dino_head"](features.cls)[0])
                t_patch += [model.teacher["ibot_head"](token[None])[0] for token in features.tokens[0][hidden]]
                target = model.gram(batch["gram"][i, g][None]).tokens  # [1, 64, D] of 8 × 8
                target = F.interpolate(target.transpose(1, 2).view(1, 32, 8, 8), (4, 4), mode="bicubic")
            features = own(crop, mask=hidden[None])
            s_global.append(model.student["dino_head"](features.cls)[0])
            s_patch += [model.student["ibot_head"](token[None])[0] for token in features.tokens[0][hidden]]
            grams.append((features.tokens[0], target[0].flatten(1).T))
            spread[g].append(features.cls[0])
        s_local += [model.student["dino_head"](own(crop[None]).cls)[0] for crop in batch["local"][i]]
    p_cls, p_patch = naive_sinkhorn(torch.stack(t_cls), 0.2), naive_sinkhorn(torch.stack(t_patch), 0.2)
    local, glob = naive_dino(
        torch.stack(s_global).view(4, 2, -1), torch.stack(s_local).view(4, 3, -1), p_cls.view(4, 2, -1), 0.1
    )
    ibot = naive_ibot(torch.stack(s_patch), p_patch, mask, 0.1)
    s, t = (torch.stack(each) for each in zip(*grams, strict=True))
    asked = {"gram_tokens": "all", "gram_negatives": "keep", "gram_per_image": True} | options
    gram = naive_gram(s, t, mask, *(asked[f"gram_{key}"] for key in ("tokens", "negatives", "per_image")))
    group, near = options.get("koleo_group", 4), options.get("koleo_neighbours", 1)
    uniform = sum(mean([naive_koleo(part, near) for part in torch.stack(rows).split(group)]) for rows in spread)
    expected = 0.5 * local + glob + 0.7 * ibot + 0.1 * uniform + 1.5 * gram
    loss, logs = model(batch, 0)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)  # angles are fp32
    torch.testing.assert_close(logs["gram"], gram.detach(), rtol=1e-5, atol=0)
    parameters = dict(model.student.named_parameters())
    gradients = [torch.autograd.grad(x, list(parameters.values())) for x in (loss, expected)]
    for name, one, other in zip(parameters, *gradients, strict=True):
        assert other.abs().sum() > 0, name
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()), msg=name)
    assert not any(p.requires_grad for p in [*model.teacher.parameters(), *model.gram.parameters()])


def test_schedules_are_followed():
    """Weights, temperature and momentum have the values of the step."""
    line = lambda first, last: Schedule(first, kind="linear", final=last, steps=11)  # noqa: E731
    model, batch = dinov3(gram_teacher="ema").double(), batch_of()
    noise(model.student, 1), noise(model.teacher, 2), noise(model.gram, 3)
    cfg = model.cfg
    cfg.gram_weight, cfg.local_weight = line(0.0, 2.0), line(1.0, 0.5)
    for step, gram, local in [(0, 0.0, 1.0), (5, 1.0, 0.75), (10, 2.0, 0.5), (99, 2.0, 0.5)]:
        loss, logs = model(batch, step)
        parts = local * logs["dino_local"] + logs["dino_global"] + logs["ibot"] + 0.2 * logs["koleo"]
        torch.testing.assert_close(loss.detach(), parts + gram * logs["gram"])
    found = []
    for temperature in (line(0.2, 0.7), Schedule(0.45), Schedule(0.2)):
        cfg.teacher_temperature = temperature
        found.append(model(batch, 5)[0].item())
    assert found[0] == pytest.approx(found[1]) and abs(found[0] - found[2]) > 1e-3
    cfg.momentum = line(0.5, 1.0)
    for step, momentum in [(5, 0.75), (10, 1.0)]:
        before = model.teacher["dino_head"].prototypes.clone()
        model.after_step(step)
        expected = momentum * before + (1 - momentum) * model.student["dino_head"].prototypes.detach()
        torch.testing.assert_close(model.teacher["dino_head"].prototypes.detach(), expected)


def test_gram_teacher_follows_a_few_times():
    model = dinov3(gram_teacher="ema", gram_every=2, gram_updates=2)
    noise(model.teacher, 1)
    model.before_first_step(set())
    weight = lambda: model.gram.blocks[0].mlp.fc1.weight.clone()  # noqa: E731
    assert torch.equal(weight(), model.teacher["backbone"].blocks[0].mlp.fc1.weight)
    changed, before = [], weight()
    for step in range(8):
        noise(model.student, step)
        model.after_step(step)
        changed.append(not torch.equal(weight(), before))
        if changed[-1]:
            assert torch.equal(weight(), model.teacher["backbone"].blocks[0].mlp.fc1.weight)
        before = weight()
    assert changed == [False, True, False, True, False, False, False, False]
    assert (
        not model.teacher.training
        and not model.gram.training
        and not model.train().gram.training
        and model.student.training
    )


def test_gram_options_without_a_gram_teacher_are_refused(shards: Path, tmp_path: Path):
    options = [
        "objective.gram_teacher=none",
        "objective.gram_size=512",
        "objective.gram_every=5",
        "objective.gram_updates=1",
    ]
    with pytest.raises(ConfigError, match=r"nothing reads objective.gram_every = 5, objective.gram_updates = 1"):
        train(tiny_recipe("dinov3", shards, tmp_path / "run", *options))


# ---------------------------------------------------------------- views
def sample(step: int = 0, slot: int = 0) -> dict:
    rng = np.random.default_rng(slot)
    rough = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return {"image": rough.repeat(20, 0).repeat(20, 1), "slot": slot, "batch": 8, "step": step, "seed": 3}


def rng_of(k: int) -> np.random.Generator:
    return np.random.default_rng([5, k])


def test_gram_views_are_the_same_crops():
    """Without colour augmentations, the large view resized to the smaller size is the global crop; with them, the
    box is still the same."""
    plain = Config(local_crops=1, local_size=16, blur=[0, 0, 0], solarize=0.0)
    colours = multicrop(plain, 64, 8, 128)
    out = colours(sample(), rng_of)
    assert out["gram"].shape == (2, 3, 128, 128) and out["global"].shape == (2, 3, 64, 64)
    for view, large in zip(out["global"], out["gram"], strict=True):
        small = F.interpolate(torch.from_numpy(large).float()[None], (64, 64), mode="area")[0].numpy().mean(0)
        assert np.corrcoef(small.ravel(), view.mean(0).ravel())[0, 1] > 0.8
    without = multicrop(plain, 64, 8)(sample(), rng_of)
    assert "gram" not in without and all(np.array_equal(without[k], out[k]) for k in without)  # other views do not move


def test_each_view_has_its_own_operations():
    """Probabilities of blur are those of the first, the second and the local crops, in this order; only the second
    crop is solarised; Gram crops have no colour augmentations."""
    made = _augments(Config(blur=[0.1, 0.9, 0.5], flip=0.3, local_crops=3), (64, 32, 128))
    assert [a.blur for a in made["global"]] == [0.1, 0.9] and [a.solarize for a in made["global"]] == [0, 0.2]
    assert [a.blur for a in made["local"]] == [0.5] * 3 and made["local"][0].solarize == 0
    assert [a.scale for a in (*made["global"], made["local"][0])] == [(0.32, 1.0), (0.32, 1.0), (0.05, 0.32)]
    for augment in (*made["global"], made["local"][0]):
        assert augment.jitter == (0.4, 0.4, 0.2, 0.1) and augment.gray == 0.2 and augment.flip == 0.3
    plain = Augment(128, (0.32, 1.0), flip=0.3)
    assert made["gram"] == [plain, plain] and "gram" not in _augments(Config(), (64, 32, 0))


@pytest.mark.slow
def test_resolutions_are_drawn_by_step():
    rows = [[64.0, 16.0, 128.0, 0.3], [96.0, 32.0, 128.0, 0.7]]
    view = multicrop(Config(local_crops=1), 64, 8, 128, rows)
    seen = Counter()
    for step in range(40):
        shapes = {
            tuple(view(sample(step, slot), rng_of)[k].shape[-1] for k in ("global", "local", "gram")) for slot in (0, 1)
        }
        assert len(shapes) == 1  # the same for all samples of a step
        seen[shapes.pop()] += 1
    assert set(seen) == {(64, 16, 128), (96, 32, 128)}
    assert view(sample(1), rng_of)["mask"].shape == (2, (12 if draw_kind(3, 1, (0.3, 0.7)) else 8) ** 2)
    drawn = [[draw_kind(seed, step, (0.3, 0.7)) for step in range(40)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    shares = np.mean([draw_kind(0, step, (0.3, 0.7)) for step in range(20000)])
    assert shares == pytest.approx(0.7, abs=0.01)
    for row, message in [
        ([64, 16, 128], "must be"),
        ([60, 16, 128, 1], "do not divide"),
        ([64, 16, 0, 1], "must have Gram pixels"),
    ]:
        with pytest.raises(ValueError, match=message):
            multicrop(Config(), 64, 8, 128, [row])


def test_counts_of_masks():
    """Half of the global crops are masked, with ratios spread evenly over (.1, .5], each with the exact number of
    patches."""
    view = multicrop(Config(local_crops=0), 128, 8)
    counts = sorted(int(m.sum()) for slot in range(8) for m in view(sample(0, slot), rng_of)["mask"])
    assert counts == [0] * 8 + [int((0.1 + 0.4 * (i + 1) / 8) * 256) for i in range(8)]


# ---------------------------------------------------------------- one whole step
def straight_step(
    state: dict[str, Tensor], batch: dict[str, Tensor], lr: float, wd: float
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """One step of DINOv3, written with functions of torch only: (loss, clipped gradients, all parameters after AdamW
    and the update of the teacher). `state`: that of student and teacher."""
    p = {k: v.clone().requires_grad_(k.startswith("student")) for k, v in state.items()}

    def vit(x: Tensor, net: str, mask: Tensor | None = None) -> Tensor:
        w = {k.removeprefix(f"{net}.backbone."): v for k, v in p.items()}
        x = F.conv2d(x, w["patch_embed.weight"], w["patch_embed.bias"], stride=8)
        h, n = x.shape[2], x.shape[2] * x.shape[3]
        x = x.flatten(2).transpose(1, 2)
        if mask is not None:
            x = torch.where(mask[..., None], w["mask_token"], x)
        x = torch.cat([w["cls_token"].expand(len(x), -1, -1), w["registers"].expand(len(x), -1, -1), x], 1)
        centres = (torch.arange(h) + 0.5) / h * 2 - 1
        periods = 100.0 ** (torch.arange(2) / 2)
        rows, columns = centres.repeat_interleave(h), centres.repeat(h)
        angle = torch.cat([2 * math.pi * rows[:, None] / periods, 2 * math.pi * columns[:, None] / periods], 1).repeat(
            1, 2
        )
        cos, sin = angle.cos(), angle.sin()

        def turn(y: Tensor) -> Tensor:
            patches = y[:, :, -n:]
            a, b = patches.chunk(2, -1)
            return torch.cat([y[:, :, :-n], patches * cos + torch.cat([-b, a], -1) * sin], 2)

        for i in range(2):
            b = f"blocks.{i}."
            y = F.layer_norm(x, (32,), w[b + "norm1.weight"], w[b + "norm1.bias"], 1e-6)
            bias = w[b + "attn.qkv.bias"]
            bias = torch.cat([bias[:32], torch.zeros(32, dtype=bias.dtype), bias[32:]])
            q, k, v = F.linear(y, w[b + "attn.qkv.weight"], bias).chunk(3, -1)
            q, k, v = (t.view(len(x), -1, 4, 8).transpose(1, 2) for t in (q, k, v))
            y = (turn(q) @ turn(k).transpose(-1, -2) / math.sqrt(8)).softmax(-1) @ v
            y = F.linear(y.transpose(1, 2).flatten(2), w[b + "attn.proj.weight"], w[b + "attn.proj.bias"])
            x = x + w[b + "ls1.gamma"] * y
            y = F.layer_norm(x, (32,), w[b + "norm2.weight"], w[b + "norm2.bias"], 1e-6)
            y = F.linear(
                F.gelu(F.linear(y, w[b + "mlp.fc1.weight"], w[b + "mlp.fc1.bias"])),
                w[b + "mlp.fc2.weight"],
                w[b + "mlp.fc2.bias"],
            )
            x = x + w[b + "ls2.gamma"] * y
        return F.layer_norm(x, (32,), w["norm.weight"], w["norm.bias"], 1e-6)

    def head(x: Tensor, name: str) -> Tensor:
        for i in (0, 2, 4):
            x = F.linear(x, p[f"{name}.mlp.{i}.weight"], p[f"{name}.mlp.{i}.bias"])
            x = F.gelu(x) if i < 4 else x
        return F.normalize(x, dim=-1) @ p[f"{name}.prototypes"].T

    def centre(x: Tensor) -> Tensor:
        q = (x / 0.2).exp()
        for _ in range(3):
            q = q / q.sum(0) / q.shape[1]
            q = q / q.sum(1, keepdim=True) / len(q)
        return q * len(q)

    def entropy(target: Tensor, logits: Tensor) -> Tensor:
        return -(target * (logits / 0.1).log_softmax(-1)).sum(-1)

    images, mask = batch["global"].flatten(0, 1), batch["mask"].flatten(0, 1)
    with torch.no_grad():
        seen = vit(images, "teacher")
        p_cls = centre(head(seen[:, 0], "teacher.dino_head")).view(-1, 2, 11)
        p_patch = centre(head(seen[:, 3:][mask], "teacher.ibot_head"))
    seen, small = vit(images, "student", mask), vit(batch["local"].flatten(0, 1), "student")
    cls = seen[:, 0].view(-1, 2, 32)
    s = head(seen[:, 0], "student.dino_head").view(-1, 2, 11)
    s_local = head(small[:, 0], "student.dino_head").view(-1, 3, 11)
    pairs = [entropy(p_cls[:, 1 - g], s[:, g]) for g in range(2)]
    pairs += [entropy(p_cls[:, g], s_local[:, i]) for g in range(2) for i in range(3)]
    loss = torch.stack(pairs).mean()
    patches, row = entropy(p_patch, head(seen[:, 3:][mask], "student.ibot_head")), 0
    for m in mask:
        count = int(m.sum())
        loss = loss + (patches[row : row + count].mean() / len(mask) if count else 0)
        row += count
    for g in range(2):
        z = F.normalize(cls[:, g], dim=-1)
        near = (z @ z.T - 3 * torch.eye(len(z))).argmax(1)
        loss = loss - 0.1 * (z - z[near]).norm(dim=-1).log().mean()
    trained = {k: v for k, v in p.items() if v.requires_grad}
    gradients = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    clipped, out = {k: g * min(1.0, 0.5 / (norm.item() + 1e-6)) for k, g in gradients.items()}, {}
    for name, value in trained.items():
        g = clipped[name]
        rate = lr
        if ".backbone." in name:
            place = name.split("backbone.")[1]
            layer = (
                int(place.split(".")[1]) + 1 if place.startswith("blocks") else 3 if place.startswith("norm.") else 0
            )
            rate *= 0.8 ** (3 - layer) * (0.2 if place.startswith("patch_embed") else 1)
        elif "prototypes" in name:
            rate = 0.0
        decayed = value.ndim > 1 and not name.endswith(("token", "registers"))
        first, second = 0.1 * g / (1 - 0.9), 0.001 * g * g / (1 - 0.999)
        out[name] = (value * (1 - rate * wd * decayed) - rate * first / (second.sqrt() + 1e-8)).detach()
        teacher = name.replace("student", "teacher")
        out[teacher] = 0.9 * p[teacher] + 0.1 * out[name]
    return loss.detach(), clipped, out


@pytest.mark.parametrize("precision, tolerance", [("fp64", 1e-6), ("bf16", 3e-2)])
def test_a_training_step_is_the_straight_script(shards: Path, tmp_path: Path, precision: str, tolerance: float):
    model = [f"model.{k}={v}" for k, v in VIT.items()]
    options = [
        "objective.prototypes=11",
        "objective.head_hidden=16",
        "objective.head_bottleneck=8",
        "objective.local_crops=3",
    ]
    options += [
        "objective.teacher_temperature=0.2",
        "objective.momentum=0.9",
        "objective.gram_teacher=none",
        "objective.gram_size=512",
        "objective.koleo_group=null",
    ]
    rates = ["optim.clip=0.5", "optim.layer_decay=0.8", "optim.patch_embed_lr=0.2", "optim.freeze_last_layer=1"]
    cfg = tiny_recipe(
        "dinov3", shards, tmp_path / "run", *model, *options, *rates, f"precision={precision.replace('64', '32')}"
    )
    objective = build_objective(cfg)
    noise(objective.student, 1)
    noise(objective.teacher, 2)
    dtype = (
        torch.float64 if precision == "fp64" else torch.float32
    )  # in fp32, Adam's first step turns rounding into signs
    objective.to(dtype)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch_of().items()}
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    expected, gradients, after = straight_step(before, batch, lr=0.01, wd=0.05)
    engine = Engine(objective, cfg, torch.device("cpu"))
    loss, _ = engine.forward(batch, 0)
    engine.backward(loss)
    thaw(engine.optimizer, 0)
    engine.step(0.01, 0.05)
    objective.after_step(0)
    torch.testing.assert_close(loss.detach(), expected, rtol=tolerance, atol=0)
    # Adam's first step is the gradient's sign: its length, and what clipping makes of it, show in the first moments
    moments = {
        name: engine.optimizer.state[p]["exp_avg"] / (1 - 0.9)
        for name, p in objective.named_parameters()
        if p.requires_grad
    }
    assert moments.keys() == gradients.keys()
    for name, gradient in gradients.items():
        away = (moments[name] - gradient).norm() / gradient.norm()
        assert away < (1e-6 if precision == "fp64" else 0.25), name
    state = objective.state_dict()
    assert state.keys() == after.keys()
    moved = [float((after[k] - before[k]).abs().max()) for k in after]
    assert sum(m > 0 for m in moved) == len(after) - 2  # the student's prototypes are frozen
    for name, value in after.items():
        if precision == "fp64":
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-7, msg=name)
        else:  # signs that bf16 may turn where a gradient is near zero
            same = ((state[name] - before[name]).sign() == (value - before[name]).sign()).float().mean()
            assert same > 0.85, name


# ---------------------------------------------------------------- stages
def losses(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


DINO = ["model.positions=rope", "model.registers=2", "model.rope_rescale=2.0", "model.local_cls_norm=true"]


@pytest.mark.slow
def test_stages_chain(shards: Path, tmp_path: Path):
    """pretrain → gram → highres, each from the checkpoint of the previous stage, which a resumed run does not read
    again; and a Gram teacher from an export."""
    first = train(
        tiny_recipe(
            "dinov3",
            shards,
            tmp_path / "pretrain",
            *DINO,
            "objective.gram_teacher=none",
            "objective.gram_size=512",
            "steps=3",
            "checkpoint=2",
            "checkpoint.keep=9",
        )
    )
    assert "gram" not in losses(first)[0]
    options = [
        *DINO,
        f"init.run={first}",
        "objective.gram_teacher=ema",
        "objective.gram_every=2",
        "objective.gram_updates=1",
    ]
    second = train(tiny_recipe("dinov3", shards, tmp_path / "gram", *options, "steps=4", "checkpoint=2"))
    rows = losses(second)
    assert all(row["gram"] > 0 for row in rows)
    start, _ = load_export(second / "export" / "0")
    end, _ = load_export(first / "export" / "3")
    assert all(torch.equal(a, b) for a, b in zip(start.state_dict().values(), end.state_dict().values(), strict=True))
    assert (
        train(tiny_recipe("dinov3", shards, tmp_path / "gram", *options, "steps=4", "checkpoint=2")) == second
    )  # finished

    # from the EMA teacher of that stage, which is then the student and the Gram teacher, too
    objective = build_objective(
        tiny_recipe("dinov3", shards, tmp_path / "x", *DINO, f"init.run={second}", "objective.gram_teacher=ema"),
        start=True,
    )
    other = build_objective(
        tiny_recipe(
            "dinov3",
            shards,
            tmp_path / "x",
            *[*DINO, f"init.run={second}", "init.weights=teacher", "objective.gram_teacher=ema"],
        ),
        start=True,
    )
    plain, taught = (one.student.state_dict() for one in (objective, other))
    teacher, body = other.teacher.state_dict(), other.teacher["backbone"].state_dict()
    assert all(torch.equal(value, teacher[key]) for key, value in taught.items())
    assert all(torch.equal(value, body[key]) for key, value in other.gram.state_dict().items())
    assert any(not torch.equal(value, teacher[key]) for key, value in plain.items())

    sizes = "objective.resolutions=[[32, 16, 64, 1], [48, 16, 48, 1], [64, 32, 96, 1]]"
    third = [
        *DINO,
        f"init.run={second}/checkpoints/000000004",
        "objective.gram_teacher=init",
        sizes,
        "steps=4",
        "checkpoint=2",
    ]
    high = train(
        tiny_recipe(
            "dinov3",
            shards,
            tmp_path / "highres",
            *third,
            "objective.gram_every=100",
            "objective.local_size=96",
            "objective.gram_size=512",
        )
    )
    assert len(losses(high)) == 4 and all(row["gram"] > 0 for row in losses(high))

    # stopped after two steps and started again: the same sizes at the same steps, the same losses
    again = [*third, "objective.gram_every=100", "objective.local_size=96", "objective.gram_size=512"]
    shutil.copytree(high, tmp_path / "resumed")
    for path in ("checkpoints/000000004", "export/4"):
        shutil.rmtree(tmp_path / "resumed" / path)
    (tmp_path / "resumed" / "checkpoints" / "latest").unlink()
    resumed = train(tiny_recipe("dinov3", shards, tmp_path / "resumed", *again))
    told = [[{k: row[k] for k in ("loss", "gram", "ibot")} for row in losses(run)] for run in (high, resumed)]
    assert told[0] == told[1] and "resumes from step 2" in (resumed / "log.txt").read_text()

    for source in (second / "export" / "4", first / "checkpoints" / "000000002"):
        cfg = tiny_recipe("dinov3", shards, tmp_path / "x", *DINO, f"objective.gram_teacher={source}")
        objective = build_objective(cfg, start=True)
        own, theirs = objective.gram.state_dict(), load_export(source)[0].state_dict()
        assert all(torch.equal(own[k], theirs[k]) for k in theirs if k in own and "mask" not in k)

    with pytest.raises(ConfigError, match="names no checkpoint that holds a Gram teacher"):
        build_objective(
            tiny_recipe("dinov3", shards, tmp_path / "x", *DINO, f"init.run={first}", "objective.gram_teacher=init"),
            start=True,
        )
    with pytest.raises(
        UserError,
        match=r"is a checkpoint of another model: objective.prototypes is 32 here and 64 there; write objective.prototypes=64;"
        r" .*student.dino_head.prototypes is \[64, 32\], here \[32, 32\]",
    ):
        build_objective(
            tiny_recipe("dinov3", shards, tmp_path / "x", *DINO, f"init.run={first}", "objective.prototypes=32"),
            start=True,
        )
    with pytest.raises(ConfigError, match=r"init.backbone and init.run are both given"):
        tiny_recipe("dinov3", shards, tmp_path / "x", "init.run=a", "init.backbone=b")


@pytest.mark.slow
def test_a_stage_at_another_size_resizes_learned_positions(shards: Path, tmp_path: Path):
    """DINOv2's short stage at 518 pixels: the position table of every network is resized as `transformers` does; all
    other tensors are equal."""
    first = train(tiny_recipe("dinov2", shards, tmp_path / "first", "model.positions=learned", "steps=2"))
    small = build_objective(
        tiny_recipe("dinov2", shards, tmp_path / "x", f"init.run={first}", "model.positions=learned"), start=True
    )
    options = ["model.positions=learned", "model.image_size=64", f"init.run={first}"]
    large = build_objective(tiny_recipe("dinov2", shards, tmp_path / "x", *options), start=True)
    was, now = small.state_dict(), large.state_dict()
    tables = [key for key in now if key.endswith("pos_embed")]
    assert tables == ["student.backbone.pos_embed", "teacher.backbone.pos_embed"]
    for key in tables:
        grid = was[key][:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(grid, size=(8, 8), mode="bicubic").flatten(2).transpose(1, 2)
        torch.testing.assert_close(now[key], torch.cat([was[key][:, :1], resized], dim=1))
    assert all(torch.equal(now[key], was[key]) for key in now if key not in tables)
    second = train(tiny_recipe("dinov2", shards, tmp_path / "second", *options, "steps=2"))
    assert len(losses(second)) == 2


def test_a_run_of_another_model_is_refused(shards: Path, tmp_path: Path):
    """The error names all tensors that only one of the stage and the previous run has."""
    common = [f"init.run={teacher_run(shards)}", "model.patch_size=4", "model.dim=48"]
    for depth, message in (
        (
            3,
            r"another model: model.depth is 3 here and 2 there; write model.depth=2; missing student\.backbone\.blocks\.2\.norm1\.weight, missing .*, and \d+ more",
        ),
        (
            1,
            r"another model: model.depth is 1 here and 2 there; .* model.depth=2; unexpected student\.backbone\.blocks\.1\.\S+, unexpected .*, and \d+ more",
        ),
    ):
        with pytest.raises(UserError, match=message):
            build_objective(tiny_recipe("dinov2", shards, tmp_path / "x", *common, f"model.depth={depth}"), start=True)
    with pytest.raises(
        UserError,
        match=r"is a run of dinov2, and this one is of simclr; .*write init.backbone=\S+ in place of init.run",
    ):
        build_objective(tiny_recipe("simclr", shards, tmp_path / "x", *common), start=True)


def test_a_method_without_a_moving_average_does_not_start_from_one(shards: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"init.weights = teacher: this objective has no moving average; remove"):
        build_objective(tiny_recipe("mae", shards, tmp_path)).start_from_teacher()


@pytest.mark.slow
def test_continued_pretraining_from_a_backbone(shards: Path, tmp_path: Path):
    """The heads are initialised anew and trained alone at first; then the backbone is trained, too. Any objective
    supports this."""
    first = train(tiny_recipe("mae", shards, tmp_path / "mae", *DINO[:2], "steps=2"))
    source = first / "export" / "2"
    options = [
        *DINO[:2],
        f"init={source}",
        "optim.freeze_backbone=2",
        "objective.momentum=0.0",
        "objective.gram_teacher=none",
        "objective.gram_size=512",
    ]
    second = train(tiny_recipe("dinov3", shards, tmp_path / "more", *options, "steps=3", "export=1"))
    said = (second / "log.txt").read_text()
    assert f"weights from {source} (unlabeled, step 2): the backbone vit, " in said
    assert "frozen: teacher (no gradients); the backbone until step 2 (optim.freeze_backbone)" in said
    assert said.count("step 2: the backbone is trained from here on") == 1
    bodies = [load_export(second / "export" / str(step))[0].state_dict() for step in range(4)]
    source_state = load_export(source)[0].state_dict()
    for step, body in enumerate(bodies):
        same = [k for k in source_state if torch.equal(body[k], source_state[k])]
        assert (len(same) == len(source_state)) == (step <= 2), (step, same)
    with pytest.raises(UserError, match=r"is another model: model.depth is 3 here and 2 there"):
        build_objective(
            tiny_recipe("simclr", shards, tmp_path / "x", *DINO[:2], f"init={source}", "model.depth=3"), start=True
        )
