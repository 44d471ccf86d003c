"""Each image objective against its paper's formula: plain loops in float64 over images, features and prototypes, with the value of the loss and its
gradients for images and weights; and against lightly's losses. tests/parity/test_distributed.py compares two processes with one.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.schedules import Schedule
from data_pipeline.views import multicrop, two_views
from data_pipeline.views.augmentations import Augment
from pretrain import contract
from pretrain.build import build_objective
from pretrain.interchange import export
from pretrain.models import families
from pretrain.models.build import build_model
from pretrain.models.layers import Backbone
from pretrain.models.positions import sincos_table
from pretrain.objectives import finder, ijepa
from pretrain.objectives.barlow_twins import cross_correlation
from pretrain.objectives.base import Objective
from pretrain.objectives.byol import distance
from pretrain.objectives.lejepa import sigreg
from pretrain.objectives.moco import similarities
from pretrain.objectives.vicreg import regularisers
from pretrain.ops.center import Center
from pretrain.ops.gather import world
from pretrain.ops.heads import MLPHead, Prototypes
from pretrain.ops.precision import unit
from pretrain.ops.self_distillation import dino_terms
from pretrain.ops.sinkhorn import sinkhorn
from pretrain.ops.sync_norm import BatchNorm
from tests.conftest import sampled, tiny_recipe
from tests.parity.test_losses import (
    as_it_is,
    assert_same,
    mean,
    naive_cross_entropy,
    naive_dino,
    naive_patches,
    naive_sinkhorn,
    noise,
    normal,
)

MODELS = {
    "vit": families.ViT(image_size=32, patch_size=8, dim=32, depth=2, heads=4),
    "resnet": families.ResNet(stem="small", widths=[8, 16], depths=[1, 1]),
}
SMALL: dict[str, Any] = {"head_hidden": 12, "head_outputs": 6}
CROPS: dict[str, Any] = {"local_crops": 3, "local_size": 16}
OPTIONS: dict[str, dict[str, Any]] = {
    "barlow_twins": {**SMALL, "off_diagonal_weight": 0.3, "loss_factor": 0.5},
    "vicreg": SMALL,
    "byol": {**SMALL, "momentum": Schedule(0.9)},
    "moco": {**SMALL, "queue_size": 8, "momentum": Schedule(0.9)},
    "moco_v3": {**SMALL, "momentum": Schedule(0.9)},
    "swav": {**SMALL, **CROPS, "last_norm": True, "prototypes": 7, "queue_size": 8, "queue_start": 1},
    "lejepa": {**SMALL, **CROPS, "normality_weight": 0.3, "directions": 5, "knots": 9},
    "dino": {**CROPS, "head_hidden": 12, "head_bottleneck": 6, "prototypes": 7, "momentum": Schedule(0.9)},
    "ijepa": {"predictor_dim": 16, "predictor_depth": 2, "predictor_heads": 2, "momentum": Schedule(0.9)},
    "simmim": {},
    "data2vec": {"target_layers": 2, "momentum": Schedule(0.9)},
    "capi": {
        **{
            "cluster_count": 7,
            "predictor_dim": 16,
            "predictor_depth": 2,
            "predictor_heads": 2,
            "momentum": Schedule(0.9),
        },
        **{"student_temperature": 0.2, "teacher_temperature": 0.3, "clustering_temperature": 0.4},
    },
}
PATCHES: dict[str, dict[str, tuple[int, ...]]] = {  # shapes of the indices of patches, of methods that need a ViT
    "ijepa": {"context": (6,), "targets": (3, 4)},
    "simmim": {"masked": (6,)},
    "data2vec": {"masked": (6,)},
    "capi": {"visible": (6,), "predicted": (3,)},
}
PAIRS = [(name, model) for name in OPTIONS for model in MODELS if model == "vit" or name not in PATCHES]


def made(name: str, model: str | families.Model = "vit", **options: Any) -> Objective:
    """An objective in float64 with noise on its weights: teachers are not their students, biases not 0."""
    cfg = importlib.import_module(f"pretrain.objectives.{name}").Config(**{**OPTIONS.get(name, {}), **options})
    torch.manual_seed(0)
    section = MODELS[model] if isinstance(model, str) else model
    objective: Any = finder.find(name)(cfg, lambda **changes: build_model(section, **changes))
    for part in objective.modules():
        if isinstance(part, (BatchNorm, Center)):
            for buffer in part.buffers(recurse=False):
                if buffer.is_floating_point():
                    buffer.add_(0.1 * torch.rand(buffer.shape))
    noise(objective, 1)
    if name == "data2vec":  # the weights of its last norms do not change
        for network in (objective.backbone, objective.teacher):
            nn.init.ones_(network.norm.weight)
            nn.init.zeros_(network.norm.bias)
    return objective.double()


def batch_of(name: str, count: int = 4) -> dict[str, Tensor]:
    if "local_size" in OPTIONS[name]:
        return {"global": normal(count, 2, 3, 32, 32), "local": normal(count, 3, 3, 16, 16, seed=1)}
    if name in PATCHES:
        shapes = PATCHES[name].items()
        return {"image": normal(count, 3, 32, 32)} | {key: patches(count, *shape) for key, shape in shapes}
    return {"image": normal(count, 2, 3, 32, 32)}


def patches(*shape: int) -> Tensor:
    """Indices [..., n] of patches of a grid of 4 × 4, different in each row of n."""
    return normal(*shape[:-1], 16).argsort(-1)[..., : shape[-1]]


def naive_head(head: nn.Sequential, rows: list[Tensor]) -> list[Tensor]:
    """Layer by layer; batch norms by the batch's own mean and variance."""
    x = torch.stack(rows)
    for layer in head:
        if isinstance(layer, nn.Linear):
            x = torch.stack([layer.weight @ row for row in x]) + (0 if layer.bias is None else layer.bias)
        elif isinstance(layer, BatchNorm):
            centre = sum(x) / len(x)
            variance = sum((row - centre) ** 2 for row in x) / len(x)
            x = (x - centre) / (variance + 1e-5).sqrt()
            x = x if layer.weight is None else x * layer.weight + layer.bias
        else:
            x = x.clamp(min=0)
    return list(x)


def encode(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    """Class tokens, image by image."""
    return [backbone(image[None]).cls[0] for image in images]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a.norm() * b.norm())


# ---------------------------------------------------------------- the papers' formulas
def naive_barlow_twins(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """2103.03230, eqs. 1 and 2, feature by feature."""
    z = [torch.stack(naive_head(model.head, encode(model.backbone, view))) for view in batch["image"].unbind(1)]
    z = [(x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() for x in z]
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(z[0].shape[1]):
        for j in range(z[0].shape[1]):
            c = sum(a * b for a, b in zip(z[0][:, i], z[1][:, j], strict=True)) / len(z[0])
            loss = loss + ((1 - c) ** 2 if i == j else 0.3 * c**2)
    return 0.5 * loss


def naive_vicreg(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """2105.04906, eqs. 1 to 6."""
    a, b = (torch.stack(naive_head(model.head, encode(model.backbone, v))) for v in batch["image"].unbind(1))
    count, width = a.shape
    loss = 25 * mean([(x - y) ** 2 for x, y in zip(a.flatten(), b.flatten(), strict=True)])
    for z in (a, b):
        centre = sum(z) / count
        for i in range(width):
            deviation = (sum((row[i] - centre[i]) ** 2 for row in z) / (count - 1) + 1e-4).sqrt()
            loss = loss + 25 * (1 - deviation).clamp(min=0) / width / 2
            for j in range(width):
                covariance = sum((row[i] - centre[i]) * (row[j] - centre[j]) for row in z) / (count - 1)
                loss = loss + (covariance**2 / width if i != j else 0)
    return loss


def naive_byol(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """2006.07733, eq. 2, in both directions."""
    loss = torch.zeros((), dtype=torch.float64)
    views = batch["image"].unbind(1)
    for one, other in (views, views[::-1]):
        q = naive_head(model.predictor, naive_head(model.online["projector"], encode(model.online["backbone"], one)))
        z = naive_head(model.target["projector"], encode(model.target["backbone"], other.detach()))
        loss = loss + mean([(x / x.norm() - y / y.norm()).square().sum() for x, y in zip(q, z, strict=True)])
    return loss


def naive_moco(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """1911.05722, eq. 1."""
    first, second = batch["image"].unbind(1)
    q = naive_head(model.query["head"], encode(model.query["backbone"], first))
    k = naive_head(model.key["head"], encode(model.key["backbone"], second.detach()))
    terms = []
    for x, own in zip(q, k, strict=True):
        positive = (cosine(x, own) / 0.2).exp()
        negative = sum((x @ row / x.norm() / 0.2).exp() for row in model.queue.rows)
        terms.append(-(positive / (positive + negative)).log())
    return mean(terms)


def naive_moco_v3(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """2104.02057, algorithm 1."""
    loss = torch.zeros((), dtype=torch.float64)
    views = batch["image"].unbind(1)
    for one, other in (views, views[::-1]):
        q = naive_head(model.predictor, naive_head(model.query["projector"], encode(model.query["backbone"], one)))
        k = naive_head(model.key["projector"], encode(model.key["backbone"], other.detach()))
        exponentials = [[(cosine(x, y) / 0.2).exp() for y in k] for x in q]
        loss = loss + 2 * 0.2 * mean([-(row[i] / sum(row)).log() for i, row in enumerate(exponentials)])
    return loss


def naive_swav(model: Any, batch: dict[str, Tensor], queue: bool = False) -> Tensor:
    """2006.09882, eqs. 1 to 6: crops of one size after the other, and all of them in the head."""
    sizes = [batch["global"], batch["local"]]
    z = naive_head(model.head, [row for crops in sizes for row in encode(model.backbone, crops.flatten(0, 1))])
    count = len(batch["global"])
    scores = torch.stack([torch.stack([cosine(x, c) for c in model.prototypes.prototypes]) for x in z])
    s_global, s_local = scores[: 2 * count].view(count, 2, -1), scores[2 * count :].view(count, 3, -1)
    codes = []
    for crop in range(2):
        rows = s_global[:, crop].detach()
        if queue:
            held = model.queues[crop].rows
            old = [torch.stack([cosine(row, c) for c in model.prototypes.prototypes]) for row in held]
            rows = torch.cat([rows, torch.stack(old).detach()])
        codes.append(naive_sinkhorn(rows, 0.05)[:count])
    return sum(naive_dino(s_global, s_local, torch.stack(codes, 1), 0.1))


def naive_lejepa(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """2511.08544: the statistic of Epps and Pulley direction by direction, by the trapezoidal rule over [−3, 3]."""
    sizes, count = [batch["global"], batch["local"]], len(batch["global"])
    rows = naive_head(model.head, [row for crops in sizes for row in encode(model.backbone, crops.flatten(0, 1))])
    z = [[*rows[2 * b : 2 * b + 2], *rows[2 * count + 3 * b : 2 * count + 3 * b + 3]] for b in range(count)]
    prediction = mean([((x - (views[0] + views[1]) / 2) ** 2).mean() for views in z for x in views])
    points, terms = torch.linspace(-3, 3, 17, dtype=torch.float64), []
    for v in range(5):
        for a in model.directions(0, rows[0]).unbind(1):
            x = torch.stack([views[v] @ a for views in z])
            heights = []
            for t in points:
                real, imaginary = (t * x).cos().mean() - (-t * t / 2).exp(), (t * x).sin().mean()
                heights.append((real**2 + imaginary**2) * (-t * t / 2).exp())
            terms.append(count * torch.trapezoid(torch.stack(heights), points))
    return 0.7 * prediction + 0.3 * mean(terms)


def naive_dino_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """2104.14294, eqs. 1 and 3: teacher outputs are centred, then sharpened, or assigned by Sinkhorn-Knopp."""
    teacher, student, count = model.teacher, model.student, len(batch["global"])
    crops = batch["global"].flatten(0, 1)
    with torch.no_grad():
        outputs = [teacher["head"](x[None])[0] for x in encode(teacher["backbone"], crops)]
        if model.center is None:
            p = naive_sinkhorn(torch.stack(outputs), 0.04).view(count, 2, -1)
        else:
            p = torch.stack([((t - model.center.mean) / 0.04).exp() for t in outputs])
            p = (p / p.sum(1, keepdim=True)).view(count, 2, -1)
    s = [
        torch.stack([student["head"](x[None])[0] for x in encode(student["backbone"], c)])
        for c in (crops, batch["local"].flatten(0, 1))
    ]
    return sum(naive_dino(s[0].view(count, 2, -1), s[1].view(count, 3, -1), p, 0.1))


def naive_ijepa(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """2301.08243, §3, image by image and block by block; distances of the code or of the paper."""
    positions, terms = sincos_table(16, (4, 4)).double(), []
    for image, context, blocks in zip(batch["image"], batch["context"], batch["targets"], strict=True):
        with torch.no_grad():
            y = [
                (row - row.mean()) / (row.var(correction=0) + 1e-5).sqrt()
                for row in model.target(image[None]).tokens[0]
            ]
        seen = model.backbone(image[None], keep=context[None]).tokens[0]
        for places in blocks:
            known = [model.embed(row) + positions[k] for row, k in zip(seen, context, strict=True)]
            x = torch.stack([*known, *(model.mask_token + positions[k] for k in places)])
            for block in model.blocks:
                x = block(x, [(1, len(x))])
            for row, k in zip(x[len(context) :], places, strict=True):
                away = (model.predict(model.norm(row)) - y[k]).abs()
                terms += away**2 if model.cfg.loss == "l2" else torch.where(away < 1, away**2 / 2, away - 0.5)
    return mean(terms)


def naive_capi(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """2502.08769, §3: place by place, patch by patch, and head by head; the tables of rotations are those of the model,
    which `test_capi_rotates_by_the_place` checks."""
    cfg, clusters, clustering, predicted = model.cfg, model.clusters, list[Tensor](), list[Tensor]()
    with torch.no_grad():
        tokens = [model.teacher(image[None]).tokens[0] for image in batch["image"]]
    logits = [[clusters.weight @ (row / row.norm()) + clusters.bias for row in rows] for rows in tokens]  # [B][N]
    q = [naive_sinkhorn(torch.stack([rows[n] for rows in logits]).detach(), cfg.teacher_temperature) for n in range(16)]
    for b, rows in enumerate(logits):
        clustering += [naive_cross_entropy(row, q[n][b], cfg.clustering_temperature) for n, row in enumerate(rows)]
    weight = torch.stack([g * v / v.norm() for v, g in zip(model.head.vectors, model.head.lengths, strict=True)])
    cos, sin = (table[:, 0].double() for table in model.rotations((4, 4), torch.device("cpu")))  # [17, d/2]
    for b, image in enumerate(batch["image"]):
        visible, places = batch["visible"][b].tolist(), batch["predicted"][b].tolist()
        seen = model.backbone(image[None], keep=batch["visible"][b][None])
        context = [(seen.cls[0], 16), *zip(seen.tokens[0], visible, strict=True)]  # 16: not rotated
        for place in places:
            x = model.mask_token
            for block in model.blocks:
                x = x + block.proj.weight @ naive_cross_attention(block, x, place, context, cos, sin) + block.proj.bias
                x = x + block.mlp(block.norm2(x))
            x = model.norm(x)
            predicted.append(naive_cross_entropy(weight @ (x / x.norm()), q[place][b], cfg.student_temperature))
    return mean(predicted) + mean(clustering)


def naive_cross_attention(
    block: Any, x: Tensor, place: int, context: list[tuple[Tensor, int]], cos: Tensor, sin: Tensor
) -> Tensor:
    """The heads of one query x [16] at a place, over a context of tokens and their places."""
    query = block.query.weight @ block.norm1(x) + block.query.bias
    rows = [(block.key_value.weight @ token + block.key_value.bias, at) for token, at in context]
    heads = []
    for h in (0, 1):
        part = slice(8 * h, 8 * h + 8)
        scores = [
            turned(query[part], cos[place], sin[place]) @ turned(row[:16][part], cos[at], sin[at]) for row, at in rows
        ]
        shares = torch.stack(scores).div(8**0.5).softmax(0)
        heads.append(sum(share * row[16:][part] for share, (row, _) in zip(shares, rows, strict=True)))
    return torch.cat(heads)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x_j, x_{j+4}) of x [8], rotated by the angle j."""
    pairs = [(x[j] * cos[j] - x[j + 4] * sin[j], x[j + 4] * cos[j] + x[j] * sin[j]) for j in range(4)]
    return torch.stack([*(a for a, _ in pairs), *(b for _, b in pairs)])


def naive_simmim(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """2111.09886, eq. 1, patch by patch."""
    terms: list[Tensor] = []
    for image, masked in zip(batch["image"], batch["masked"].tolist(), strict=True):
        mask = torch.tensor([k in masked for k in range(16)])
        tokens, pixels = model.backbone(image[None], mask=mask[None]).tokens[0], naive_patches(image, 8)
        for k in range(16):
            if mask[k]:
                terms += (model.predict.weight @ tokens[k] + model.predict.bias - pixels[k]).abs()
    return mean(terms)


def naive_data2vec(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """2202.03555, §3.3 and §3.4: the outputs of the teacher's blocks, caught as they are, normalised and averaged."""
    terms, outputs = list[Tensor](), list[Tensor]()
    hooks = [block.register_forward_hook(lambda *given: outputs.append(given[2])) for block in model.teacher.blocks]
    for image, masked in zip(batch["image"], batch["masked"].tolist(), strict=True):
        outputs.clear()
        with torch.no_grad():
            model.teacher(image[None])
        mask = torch.tensor([k in masked for k in range(16)])
        tokens = model.backbone(image[None], mask=mask[None]).tokens[0]
        for k in masked:
            rows = [output[1 + k] for output in outputs]  # after the class token
            y = sum((row - row.mean()) / (row.var(correction=0) + 1e-6).sqrt() for row in rows) / len(rows)
            away = (model.predict.weight @ tokens[k] + model.predict.bias - y).abs()
            beta = model.cfg.quadratic_below
            terms += torch.where(away <= beta, away**2 / (2 * beta), away - beta / 2)
    for hook in hooks:
        hook.remove()
    return mean(terms)


NAIVE: dict[str, Callable[..., Tensor]] = {
    "barlow_twins": naive_barlow_twins,
    "vicreg": naive_vicreg,
    "byol": naive_byol,
    "moco": naive_moco,
    "moco_v3": naive_moco_v3,
    "swav": naive_swav,
    "dino": naive_dino_loss,
    "lejepa": naive_lejepa,
    "ijepa": naive_ijepa,
    "simmim": naive_simmim,
    "data2vec": naive_data2vec,
    "capi": naive_capi,
}


def gradients(objective: Objective, loss: Tensor, images: list[Tensor]) -> dict[str, Tensor]:
    named = {name: value for name, value in objective.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(loss, [*named.values(), *images])
    return dict(zip([*named, *(f"image {n}" for n in range(len(images)))], found, strict=True))


def agrees(
    objective: Objective,
    batch: dict[str, Tensor],
    naive: Callable[..., Tensor],
    step: int = 0,
    constant: tuple[str, ...] = (),
) -> None:
    """`constant`: tensors of the batch that get no gradient, in addition to those of whole numbers."""
    leaves = {k: v.clone().requires_grad_(v.is_floating_point() and k not in constant) for k, v in batch.items()}
    expected = naive(objective, leaves)  # first: a forward changes running statistics, but nothing that is read here
    loss, _ = objective(leaves, step)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    images = [value for value in leaves.values() if value.requires_grad]
    ours, theirs = (gradients(objective, value, images) for value in (loss, expected))
    for name, value in theirs.items():
        scale = max(float(value.abs().max()), 1e-3)
        away = 1e-6 if name.endswith("pos_embed") else 1e-9  # position tables are interpolated in fp32
        torch.testing.assert_close(ours[name], value, rtol=1e-7, atol=away * scale, msg=name)


@pytest.mark.parametrize("name", NAIVE)
def test_it_computes_its_paper(name: str):
    agrees(made(name), batch_of(name), NAIVE[name])


def test_dino_with_sinkhorn():
    model = made("dino", centering="sinkhorn")
    agrees(model, batch_of("dino"), naive_dino_loss)
    assert model.is_coupled() and not made("dino").is_coupled()


def test_swav_with_its_queue():
    model = made("swav")
    assert isinstance(model.head[-1], BatchNorm) and model.head[-1].weight is None  # `last_norm`
    assert not torch.allclose(naive_swav(model, batch_of("swav")), naive_swav(model, batch_of("swav"), queue=True))
    agrees(model, batch_of("swav"), lambda *args: naive_swav(*args, queue=True), step=1)


def test_swavs_assignments_stay_in_fp32_under_autocast():
    model, z = made("swav").float(), normal(4, 2, 6).float()
    expected = model.assignments(z, 1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.assignments(z, 1), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("unit", [True, False])
def test_dinos_logits_are_cosines_at_first(unit: bool):
    """The prototypes of the published head are weight-normed; their lengths are 1 at first, also where they are trained."""
    cfg = finder.config_class("dino")[0](**{**OPTIONS["dino"], "unit_prototypes": unit})
    model = finder.find("dino")(cfg, lambda **changes: build_model(MODELS["vit"], **changes))
    x = torch.randn(3, 32)
    for head in (model.student["head"], model.teacher["head"]):
        cosines = nn.functional.cosine_similarity(head.mlp(x).unsqueeze(1), head.prototypes.unsqueeze(0), dim=-1)
        torch.testing.assert_close(head(x), cosines)


def test_the_predictor_of_ijepa_begins_with_the_std_of_its_encoder():
    body = families.ViT(image_size=32, patch_size=8, dim=64, depth=1, heads=4, positions="sincos", initial_std=0.07)
    cfg = ijepa.Config(predictor_dim=48, predictor_depth=1, predictor_heads=4)
    torch.manual_seed(0)
    model = ijepa.IJEPA(cfg, lambda **changes: build_model(body, **changes))
    for layer in (model.backbone.blocks[0].mlp.fc1, model.embed, model.blocks[0].mlp.fc1, model.predict):
        assert layer.weight.std().item() == pytest.approx(0.07, rel=0.1)
    assert model.mask_token.std().item() == pytest.approx(0.07, rel=0.4)


def test_ijepa_exports_its_target():
    model: Any = made("ijepa")
    assert model.exports()["model"].backbone is model.target


def test_capi_rotates_by_the_place():
    """The angles of row and column, in float64; the row that stands for tokens without a place is not rotated."""
    cos, sin = made("capi").rotations((4, 4), torch.device("cpu"))  # type: ignore[attr-defined]
    for place in range(16):
        row, column = ((2 * (n + 0.5) / 4 - 1) * 2 * np.pi for n in divmod(place, 4))
        angles = torch.tensor([row, row / 10, column, column / 10])  # periods 1 and 100^(2/4)
        torch.testing.assert_close((cos[place, 0], sin[place, 0]), (angles.cos(), angles.sin()), rtol=0, atol=1e-6)
    assert (cos[16] == 1).all() and (sin[16] == 0).all()


def test_capi_without_positionwise_sinkhorn():
    """All patches of the batch are assigned together."""
    model, batch = made("capi", positionwise=False), batch_of("capi")
    rows = model.teacher(batch["image"]).tokens.flatten(0, 1)  # type: ignore[operator, attr-defined]
    logits = nn.functional.normalize(rows, dim=-1) @ model.clusters.weight.T + model.clusters.bias  # type: ignore[union-attr]
    _, q = model.clusters(rows.unflatten(0, (4, 16)), model.cfg)  # type: ignore[operator]
    torch.testing.assert_close(q.flatten(0, 1), naive_sinkhorn(logits.detach(), 0.3), rtol=1e-9, atol=1e-12)


def test_capi_refuses_heads_that_do_not_fit():
    with pytest.raises(ValueError, match=r"objective.predictor_heads = 5: four times this must divide 16, its width"):
        made("capi", predictor_heads=5)


def test_data2vec_trains_no_weights_of_the_last_norm():
    model: Any = made("data2vec").train()
    assert not model.backbone.norm.weight.requires_grad and not model.backbone.norm.training and model.backbone.training
    with pytest.raises(ValueError, match=r"target_layers = 3: the model has 2 blocks; write objective.target_layers=2"):
        made("data2vec", target_layers=3)


def test_ijepa_with_the_distance_of_the_paper():
    agrees(made("ijepa", loss="l2"), batch_of("ijepa"), naive_ijepa)


def test_moco_as_first_published():
    """v1: a head of one layer."""
    agrees(made("moco", head_hidden=None), batch_of("moco"), naive_moco)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "barlow_twins",
            "beit",
            "byol",
            "context_encoder",
            "ijepa",
            "jigsaw",
            "mae",
            "moco",
            "moco_v3",
            "rotnet",
            "simclr",
        ),
        *("simmim", "vicreg", "vqvae"),
    ],
)
def test_methods_without_local_crops_have_no_norm_for_them(name: str, shards: Path, tmp_path: Path):
    """In training, a ViT applies `local_cls_norm` to all inputs of a list but the first: the second view is no local crop."""
    with_norm, without = (
        build_objective(tiny_recipe(name, shards, tmp_path / "run", f"model.local_cls_norm={value}"))
        for value in ("true", "false")
    )
    assert with_norm.state_dict().keys() == without.state_dict().keys()


def test_moco_v3_keeps_its_patch_embedding():
    model, free = made("moco_v3").train(), made("moco_v3", freeze_patch_embed=False)
    embed = model.query["backbone"].patch_embed
    assert not embed.weight.requires_grad and not embed.training and model.query["backbone"].training
    assert free.query["backbone"].patch_embed.weight.requires_grad
    assert not any("frozen" in key for key in model.state_dict())


def test_moco_v3_keeps_a_patch_embedding_that_was_loaded(tmp_path: Path):
    loaded = ["model.depth=1", f"init.backbone={tmp_path / 'vit'}"]
    cfg = tiny_recipe("moco_v3", tmp_path, tmp_path / "run", *loaded)
    torch.manual_seed(1)
    body = build_model(cfg.model)
    export.write(tmp_path / "vit", body, {"step": 1, "objective": "mae", "pool": "cls"}, [0.5] * 3, [0.25] * 3)
    model: Any = build_objective(cfg, start=True)
    for encoder in (model.query["backbone"], model.key["backbone"]):
        assert torch.equal(encoder.patch_embed.weight, body.patch_embed.weight)
        assert not encoder.patch_embed.weight.requires_grad


@pytest.mark.slow
def test_moco_v3_cannot_freeze_the_patch_embedding_of_timm():
    vit, convolutions = (families.Timm(name, image_size=32) for name in ("vit_tiny_patch16_224", "resnet10t"))
    vit.name = "timm"
    cls, cfg = finder.find("moco_v3"), finder.config_class("moco_v3")[0]
    with pytest.raises(
        ValueError, match=r"of model\.name = timm cannot be frozen; write objective\.freeze_patch_embed=false"
    ):
        cls(cfg(**SMALL), lambda **changes: build_model(vit, **changes))
    cls(cfg(**SMALL, freeze_patch_embed=False), lambda **changes: build_model(vit, **changes))
    cls(cfg(**SMALL), lambda **changes: build_model(convolutions, **changes))


# ---------------------------------------------------------------- after a step
@pytest.mark.parametrize("name, teacher, student", [("byol", "target", "online"), ("moco", "key", "query")])
def test_the_teacher_of_a_resnet_normalises_by_its_own_batch(name: str, teacher: str, student: str):
    """In evaluation mode its batch norms are those of training, with statistics of their own, which the average leaves."""
    model = made(name, "resnet").train()
    averaged, online = getattr(model, teacher), getattr(model, student)
    norms = [m for m in averaged.modules() if isinstance(m, BatchNorm)]
    assert not averaged.training and norms and all(m.training for m in norms)
    own = norms[0].running_mean.clone()
    model(batch_of(name), 0)
    assert not torch.equal(norms[0].running_mean, own)
    own, weight = norms[0].running_mean.clone(), norms[0].weight.clone()
    other = next(m for m in online.modules() if isinstance(m, BatchNorm))
    model.after_step(0)
    torch.testing.assert_close(norms[0].weight, 0.9 * weight + 0.1 * other.weight)
    assert torch.equal(norms[0].running_mean, own) and not torch.equal(other.running_mean, own)


@pytest.mark.parametrize(
    "name, teacher, student", [("ijepa", "target", "backbone"), ("data2vec", "teacher", "backbone")]
)
def test_a_teacher_is_the_moving_average_of_its_student(name: str, teacher: str, student: str):
    """Unless the step was skipped; and it stays in evaluation mode."""
    model = made(name).train()
    averaged, trained = getattr(model, teacher), getattr(model, student)
    before = [value.clone() for value in averaged.parameters()]
    for skipped in (1.0, 0.0):
        model.skipped = torch.full((), skipped)
        model.after_step(0)
        share = 0.1 * (1 - skipped)
        for value, old, new in zip(averaged.parameters(), before, trained.parameters(), strict=True):
            torch.testing.assert_close(value, (1 - share) * old + share * new)
    assert trained.training and not averaged.training


def test_dino_moves_its_centre():
    """Eq. 4, over the outputs of two micro-batches; a skipped step leaves it."""
    model = made("dino")
    before, halves = model.center.mean.clone(), [{k: v[i::2] for k, v in batch_of("dino").items()} for i in (0, 1)]
    outputs = []
    for half in halves:
        model(half, 3)
        outputs += [
            model.teacher["head"](x[None])[0] for x in encode(model.teacher["backbone"], half["global"].flatten(0, 1))
        ]
    model.skipped = torch.ones(())
    model.after_step(3)
    assert torch.equal(model.center.mean, before)
    for half in halves:
        model(half, 4)
    model.skipped = torch.zeros(())
    model.after_step(4)
    torch.testing.assert_close(model.center.mean, 0.9 * before + 0.1 * torch.stack(outputs).mean(0))
    with pytest.raises(RuntimeError, match=r"update\(5\) without a hold"):
        model.center.update(5, 0.9)


def test_moco_fills_its_queue_with_keys():
    model = made("moco")
    model(batch_of("moco"), 0)
    keys = naive_head(model.key["head"], encode(model.key["backbone"], batch_of("moco")["image"][:, 1]))
    old = model.queue.rows.clone()
    model.after_step(0)
    torch.testing.assert_close(model.queue.rows[:4], torch.stack([k / k.norm() for k in keys]))
    assert torch.equal(model.queue.rows[4:], old[4:]) and model.queue.position == 4


# ---------------------------------------------------------------- views
def test_each_view_has_its_own_probabilities(monkeypatch: pytest.MonkeyPatch):
    """BYOL's appendix B: always a blur in the first view, solarisation in a fifth of the second ones."""
    drawn: list[list[Augment]] = []
    monkeypatch.setattr(two_views, "crops", lambda sample, views, rng: drawn.append(views["image"]))
    cfg = finder.config_class("byol")[0]()
    two_views.two_views(cfg, 32)({}, lambda number: np.random.default_rng(number))
    first, second = drawn[0]
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    assert (
        first.jitter == (0.4, 0.4, 0.2, 0.1) and first.scale == (0.08, 1.0) and first.gray == 0.2 and first.size == 32
    )


def test_crops_without_masks():
    cfg = finder.config_class("swav")[0](local_crops=3, local_size=16)
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    made = multicrop.unmasked_crops(cfg, 32, 8)({"image": image}, lambda number: np.random.default_rng(number))
    assert {key: value.shape for key, value in made.items()} == {"global": (2, 3, 32, 32), "local": (3, 3, 16, 16)}
    with pytest.raises(ValueError, match="do not divide into patches of 12"):
        multicrop.unmasked_crops(cfg, 36, 12)


# ---------------------------------------------------------------- heads
def test_mlp_head():
    """Also that batch norm has no parameters after the last layer, and none at all of its own with a single layer."""
    for head in (MLPHead(5, 4, 3), MLPHead(5, 4, 4, 3, last_norm=True), MLPHead(5, 3)):
        noise(head, 0).double()
        assert_same(
            lambda x, head=head: (head(x) ** 3).sum(),
            lambda x, head=head: (torch.stack(naive_head(head, list(x))) ** 3).sum(),
            normal(6, 5),
        )
    assert [len(list(MLPHead(*w, last_norm=n).parameters())) for w, n in (((5, 3), True), ((5, 4, 3), False))] == [1, 4]


def test_prototypes():
    head, x = Prototypes(6, 7).double(), normal(4, 6)
    torch.testing.assert_close(head.prototypes.norm(dim=1), torch.ones(7, dtype=torch.float64))
    noise(head, 0)
    weights, targets = normal(4, 7, seed=1), normal(4, 7, seed=2).softmax(-1)

    def naive(x: Tensor) -> Tensor:
        return torch.stack([torch.stack([cosine(row, c) for c in head.prototypes]) for row in x])

    assert_same(lambda x: (head(x) * weights).sum(), lambda x: (naive(x) * weights).sum(), x)
    expected = lambda x: sum(naive_cross_entropy(s, t, 0.1) for s, t in zip(naive(x), targets, strict=True))  # noqa: E731
    assert_same(lambda x: head(x, targets, 0.1), expected, x)


# ---------------------------------------------------------------- lightly
def test_losses_equal_lightlys():
    from lightly.loss import BarlowTwinsLoss, DINOLoss, NegativeCosineSimilarity, NTXentLoss, SwaVLoss, VICRegLoss
    from lightly.loss.lejepa_loss import SIGReg

    a, b = normal(6, 5), normal(6, 5, seed=1)

    def barlow(a: Tensor, b: Tensor) -> Tensor:
        on, off = cross_correlation(a, b)
        return on + 5e-3 * off

    assert_same(barlow, BarlowTwinsLoss(5e-3), a, b)

    def vicreg(a: Tensor, b: Tensor) -> Tensor:
        (v, c), (w, d) = regularisers(a), regularisers(b)
        return 25 * (a - b).square().mean() + 25 * (v + w) / 2 + c + d

    assert_same(vicreg, VICRegLoss(), a, b)
    assert_same(distance, lambda a, b: 2 + 2 * NegativeCosineSimilarity()(a, b), a, b)

    bank = NTXentLoss(0.2, memory_bank_size=(8, 5)).double()
    rows = bank.memory_bank.bank.clone()

    def moco(a: Tensor, b: Tensor) -> Tensor:
        logits = similarities(unit(a), unit(b), rows) / 0.2
        return nn.functional.cross_entropy(logits, torch.zeros(6, dtype=torch.long))

    def theirs(a: Tensor, b: Tensor) -> Tensor:
        bank.memory_bank.bank = rows.clone()
        return bank(a, b)

    assert_same(moco, theirs, a, b)

    s_global, s_local = normal(4, 2, 11, seed=1).tanh(), normal(4, 3, 11, seed=2).tanh()

    def swav(s_global: Tensor, s_local: Tensor) -> Tensor:
        q = torch.stack([sinkhorn(s.detach(), 0.05) for s in s_global.unbind(1)], 1)
        return sum(dino_terms(as_it_is, s_global, s_local, q, 0.1))

    assert_same(swav, lambda g, s: SwaVLoss()(list(g.unbind(1)), list(s.unbind(1)))[0], s_global, s_local)

    direction = nn.functional.normalize(normal(5, 7), dim=0)
    theirs_normality = SIGReg(num_vectors=7).double()
    theirs_normality._generate_unit_vectors = lambda *_: direction
    z = normal(3, 6, 5)
    fp32 = sigreg(z.float(), direction.float(), 17)  # lightly keeps its knots in fp32
    torch.testing.assert_close(fp32, mean([theirs_normality(view) for view in z]).float(), rtol=1e-5, atol=0)

    center, loss, outputs = Center(11).double(), DINOLoss(11).double(), normal(4, 2, 11)
    for step in range(2):
        center.hold(outputs.flatten(0, 1) * (step + 1), step)
        center.update(step, 0.9)
        loss.update_center(outputs.transpose(0, 1) * (step + 1))
    torch.testing.assert_close(center.mean, loss.center.flatten())
    p = ((outputs - center.mean) / 0.0625).softmax(-1)

    def dino(s_global: Tensor, s_local: Tensor) -> Tensor:
        loss.center.copy_(center.mean)
        return loss(list(outputs.unbind(1)), [*s_global.unbind(1), *s_local.unbind(1)], teacher_temp=0.0625)

    assert_same(lambda g, s: sum(dino_terms(as_it_is, g, s, p, 0.1)), dino, s_global, s_local)


# ---------------------------------------------------------------- transformers
def test_simmim_equals_transformers(monkeypatch: pytest.MonkeyPatch):
    """The loss of its masked image modelling on our encoder's tokens; its decoder has the channel before the pixel."""
    import transformers as hf

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    theirs = hf.ViTForMaskedImageModeling(hf.ViTConfig(**sizes, image_size=32, patch_size=8, encoder_stride=8)).double()
    model, batch = made("simmim"), batch_of("simmim")
    order = torch.arange(192).view(8, 8, 3).permute(2, 0, 1).flatten()
    with torch.no_grad():
        theirs.decoder[0].weight.copy_(model.predict.weight[order][..., None, None])
        theirs.decoder[0].bias.copy_(model.predict.bias[order])

    def encode(images: Tensor, bool_masked_pos: Tensor, **_: Any) -> Any:
        features = model.backbone(images, mask=bool_masked_pos)
        tokens = torch.cat([features.cls.unsqueeze(1), features.tokens], dim=1)
        return hf.modeling_outputs.BaseModelOutputWithPooling(last_hidden_state=tokens)

    monkeypatch.setattr(theirs.vit, "forward", encode)
    mask = torch.zeros(4, 16).scatter(1, batch["masked"], 1.0).bool()
    expected = theirs(batch["image"], bool_masked_pos=mask).loss
    torch.testing.assert_close(model(batch, 0)[0], expected, rtol=1e-6, atol=0)  # which adds 1e-5 to the count


# ---------------------------------------------------------------- two processes
def check(name: str, model: str) -> dict[str, list[Tensor]]:
    """The loss of this process's images, its gradients, and the buffers after the step: see test_distributed.py."""
    objective, rank, ranks = made(name, model).train(), *world()
    part = {key: value.chunk(ranks)[rank] for key, value in batch_of(name).items()}
    step = 1 if name == "swav" else 0  # its queue is in use
    loss, _ = objective(part, step)
    found = gradients(objective, loss, [])
    objective.skipped = torch.zeros(())
    objective.after_step(step)
    buffers = [value.double() for value in objective.buffers()]
    return {"mean": [loss.detach(), *found.values(), *buffers]}


LIGHTLYS = {path.stem: path for path in (Path(__file__).parents[2] / "benchmarks" / "lightly_methods").glob("*.py")}
OUR_NAMES = {  # parts of the names of lightly's parameters -> those of ours, of methods with the same layers
    "barlow_twins": {"head.layers.": "head."},
    "ijepa": {
        "predictor.predictor_embed.": "embed.",
        "predictor.predictor_proj.": "predict.",
        "predictor.decoder.": "",
    },
    "mae": {"decoder.": ""},
    "moco": {"head.layers.": "head."},
    "simmim": {"decoder.": "predict."},
    "vicreg": {"head.layers.": "head."},
}


@pytest.mark.parametrize("name", sampled(sorted(LIGHTLYS), "dinov2", "ijepa", "mae", "moco", "vicreg"))
def test_a_method_of_lightlys_modules(name: str):
    """The files that the benchmarks compare ours with: the same options and views; with the same layers and weights the
    same loss; gradients for all weights; a moving average of the same sub-module."""
    overrides = contract.tiny(name, str)[0]
    ours, theirs = (contract.build_case(each, overrides) for each in (name, str(LIGHTLYS[name])))
    model: Any = theirs.objective
    assert type(model).views is type(ours.objective).views and type(model.cfg) is type(ours.objective.cfg)
    if name in OUR_NAMES:
        copy_weights(dict(ours.objective.named_parameters()), model, OUR_NAMES[name])
        if name == "moco":
            model.criterion.memory_bank.bank.copy_(ours.objective.queue.rows)  # type: ignore[union-attr]
    loss, _ = model(ours.batch, 0)
    loss.backward()
    if name in OUR_NAMES:
        torch.testing.assert_close(loss, ours.objective(ours.batch, 0)[0], rtol=1e-5, atol=1e-6)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert not [key for key, p in trained.items() if p.grad is None]
    assert model.averaged == ours.objective.averaged
    for student, teacher in model.averaged.items():
        average, before = model.get_submodule(teacher), copy.deepcopy(model.get_submodule(teacher))
        with torch.no_grad():
            for parameter in trained.values():
                parameter.add_(1)
        model.after_step(0)
        moved = [key for key, p in average.named_parameters() if (p > before.get_parameter(key)).all()]
        assert {f"{student}.{key}" for key in moved} >= {key for key in trained if key.startswith(f"{student}.")}
    assert isinstance(model.exports()["model"].backbone, Backbone)


@torch.no_grad()
def copy_weights(source: dict[str, Tensor], model: nn.Module, names: dict[str, str]) -> None:
    """Copy parameters, whose names in `source` have other parts. Biases that are not in `source` become 0."""
    for name, parameter in model.named_parameters():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if name in source:
            parameter.copy_(source[name].view_as(parameter))
        else:
            assert name.endswith("bias") or not parameter.requires_grad, name
            parameter.mul_(0 if name.endswith("bias") else 1)
