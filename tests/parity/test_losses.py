"""Every loss compared with an independent formula: plain loops in float64, values and gradients for the same
tensors; and with transformers or lightly if they have the loss. No training curve shows a wrong gradient."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from common.schedules import Schedule
from data_pipeline.views.masks import masked_patches
from pretrain.models import families
from pretrain.models.build import build_model
from pretrain.models.layers import DropPath
from pretrain.models.positions import sincos_table
from pretrain.objectives.dinov2 import Config as DINOv2Config
from pretrain.objectives.dinov2 import DINOv2
from pretrain.objectives.mae import MAE
from pretrain.objectives.mae import Config as MAEConfig
from pretrain.objectives.simclr import Config as SimCLRConfig
from pretrain.objectives.simclr import SimCLR
from pretrain.ops import ema
from pretrain.ops.contrastive import nt_xent
from pretrain.ops.cross_entropy import cross_entropy
from pretrain.ops.ema import ema_update, make_teacher
from pretrain.ops.heads import PrototypeHead
from pretrain.ops.koleo import koleo
from pretrain.ops.patchify import complement, patchify, unpatchify
from pretrain.ops.self_distillation import dino_terms, ibot_term
from pretrain.ops.sinkhorn import sinkhorn
from pretrain.ops.sync_norm import BatchNorm


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(ours: Callable[..., Tensor], naive: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Equal values, and equal gradients for every input, in float64."""
    results = []
    for function in (ours, naive):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        value = function(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert all(gradient.abs().sum() > 0 for gradient in results[1][1:])


def noise(module: nn.Module, seed: int) -> nn.Module:
    """Add normal noise of 0.2 to every parameter, because zero biases and ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return module


def backbone(**changes: object) -> nn.Module:
    return build_model(families.ViT(image_size=32, patch_size=8, dim=32, depth=2, heads=4), **changes)


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum() / len(values)


# ---------------------------------------------------------------- formulas
def naive_nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    rows = [*a, *b]
    terms = []
    for i, x in enumerate(rows):
        partner = (i + len(a)) % len(rows)
        similarity = [(x @ y) / (x.norm() * y.norm()) / temperature for y in rows]
        others = sum(similarity[j].exp() for j in range(len(rows)) if j != i)
        terms.append(-(similarity[partner].exp() / others).log())
    return mean(terms)


def naive_cross_entropy(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """-Σ target · log softmax(logits / temperature) of one row."""
    exponentials = [(x / temperature).exp() for x in logits]
    return -sum(t * (e / sum(exponentials)).log() for t, e in zip(target, exponentials, strict=True))


def naive_koleo(x: Tensor, neighbours: int = 1, eps: float = 1e-8) -> Tensor:
    rows = [row / row.norm() for row in x]
    logs = []
    for i, row in enumerate(rows):
        others = [other for j, other in enumerate(rows) if j != i]
        nearest = sorted(others, key=lambda other: (row - other).norm().item())[:neighbours]
        logs += [((row - other + eps).square().sum().sqrt() + eps).log() for other in nearest]
    return -mean(logs)


def naive_sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    q = (logits / temperature).exp()  # [B, K]
    samples, prototypes = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        for k in range(prototypes):
            q[:, k] = q[:, k] / q[:, k].sum() / prototypes
        for i in range(samples):
            q[i] = q[i] / q[i].sum() / samples
    return q * samples


def naive_dino(s_global: Tensor, s_local: Tensor, p: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(local, global) sums over pairs of a student crop and a different teacher crop, both divided by the number of
    all pairs."""
    local, glob, pairs = [], [], 0
    for b in range(len(p)):
        for t in range(p.shape[1]):
            for s in range(s_global.shape[1]):
                if s != t:
                    glob.append(naive_cross_entropy(s_global[b, s], p[b, t], temperature))
                    pairs += 1
            for s in range(s_local.shape[1]):
                local.append(naive_cross_entropy(s_local[b, s], p[b, t], temperature))
                pairs += 1
    return sum(local, torch.zeros((), dtype=p.dtype)) / pairs, sum(glob) / pairs


def naive_ibot(s: Tensor, p: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """The mean over the masked patches of each image, summed over images and divided by the number of images."""
    total, row = torch.zeros((), dtype=s.dtype), 0
    for image in mask:
        count = int(image.sum())
        for _ in range(count):
            total = total + naive_cross_entropy(s[row], p[row], temperature) / count
            row += 1
    assert row == len(s)
    return total / len(mask)


def naive_patches(image: Tensor, size: int) -> list[Tensor]:
    """Patches in row-major order, each flattened as (row, column, channel)."""
    out = []
    for top in range(0, image.shape[1], size):
        for left in range(0, image.shape[2], size):
            pixels = [image[:, y, x] for y in range(top, top + size) for x in range(left, left + size)]
            out.append(torch.cat(pixels))
    return out


# ---------------------------------------------------------------- ops
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent(temperature: float):
    a, b = normal(6, 5), normal(6, 5, seed=1)
    assert_same(lambda a, b: nt_xent(a, b, temperature), lambda a, b: naive_nt_xent(a, b, temperature), a, b)


def test_nt_xent_known_values():
    """Orthogonal images whose two views are equal; and equal rows, where the partner is one of 2·B − 1 equal
    classes."""
    pairs = torch.eye(4)
    assert nt_xent(pairs, pairs, 0.1).item() == pytest.approx(math.log(1 + 6 * math.exp(-10)), rel=1e-2)
    assert nt_xent(torch.ones(4, 3), torch.ones(4, 3), 0.1).item() == pytest.approx(math.log(7), rel=1e-5)


def test_koleo():
    assert_same(koleo, naive_koleo, normal(9, 4))
    assert_same(koleo, naive_koleo, normal(2, 4))
    assert koleo(torch.tensor([[2.0, 0], [0, 3]])).item() == pytest.approx(-math.log(math.sqrt(2)))
    assert koleo(torch.tensor([[1.0, 0], [-1, 0]])).item() == pytest.approx(
        -math.log(2)
    )  # the best that two rows can do


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_koleo_at_its_edges(dtype: torch.dtype):
    """With duplicates, also if all rows are equal, values and gradients are large but finite; the loss of a batch of
    one row is 0."""
    row = normal(1, 8).to(dtype)
    for x in (torch.cat([row, row, -row]), row.expand(4, -1), torch.zeros(3, 8, dtype=dtype)):
        x = x.clone().requires_grad_()
        value = koleo(x)
        value.backward()
        assert value.isfinite() and x.grad.isfinite().all()
    assert koleo(row.expand(4, -1)) > 15
    one = row.clone().requires_grad_()
    koleo(one).backward()
    assert koleo(one) == 0 and not one.grad.any()


@pytest.mark.parametrize("temperature, iterations", [(0.04, 3), (0.5, 1), (1.0, 7)])
def test_sinkhorn(temperature: float, iterations: int):
    logits = normal(6, 9).tanh()
    ours = sinkhorn(logits, temperature, iterations)
    torch.testing.assert_close(ours, naive_sinkhorn(logits, temperature, iterations), rtol=1e-9, atol=1e-300)
    torch.testing.assert_close(ours.sum(1), torch.ones(6, dtype=torch.float64))


def test_sinkhorn_of_several_columns_assigns_each_by_itself():
    """So prototypes that tell only the column apart are of no use: the assignments are uniform then."""
    logits = normal(6, 5, 9)
    expected = torch.stack([naive_sinkhorn(logits[:, n], 0.5) for n in range(5)], dim=1)
    torch.testing.assert_close(sinkhorn(logits, 0.5), expected, rtol=1e-9, atol=1e-300)
    by_column = normal(1, 5, 9).expand(6, -1, -1)
    torch.testing.assert_close(sinkhorn(by_column, 0.1), torch.full((6, 5, 9), 1 / 9, dtype=torch.float64))
    assert sinkhorn(by_column.flatten(0, 1), 0.1).amax() > 0.5  # of all rows together


def test_sinkhorn_shares_prototypes_evenly():
    q = sinkhorn(normal(12, 8), 0.5, iterations=200)
    torch.testing.assert_close(q.sum(0), torch.full((8,), 12 / 8, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinkhorn_does_not_overflow_or_underflow(dtype: torch.dtype):
    for logits in (1e4 * normal(6, 9), 1e38 * normal(6, 9).sign(), torch.eye(9)[:6] * torch.finfo(dtype).max):
        q = sinkhorn(logits.to(dtype), 0.04)
        assert q.dtype == torch.float32 and q.isfinite().all()
        torch.testing.assert_close(q.sum(1), torch.ones(6))
    # a constant per prototype falls out at the first step, even where exp() of it would be 0 or infinite
    logits = normal(6, 9)
    far = torch.tensor([0.0, -1e3, 1e3, 0, 1e3, -1e3, 50, 0, -50], dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(logits + far, 0.5), sinkhorn(logits, 0.5), rtol=1e-9, atol=1e-300)
    assert sinkhorn(torch.zeros(0, 9), 0.04).shape == (0, 9)


def test_losses_stay_in_fp32_under_autocast():
    """The engine runs whole objectives under bf16 autocast, but similarities that are divided by a temperature of
    0.1 must not be rounded to 1/256."""
    a, b = normal(16, 8).float(), normal(16, 8, seed=1).float()
    near = a[:1] + 1e-2 * b  # neighbours that bf16 cannot tell apart
    functions = [
        lambda: nt_xent(a, b, 0.1),
        lambda: koleo(near),
        lambda: sinkhorn(a, 0.05),
    ]
    for function in functions:
        plain = function()
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(function(), plain, rtol=1e-5, atol=1e-7)


def test_cross_entropy_rounds_products_alone_under_autocast():
    """With these weights the products are the hidden states; no later operation rounds."""
    a, target = normal(16, 8).float(), normal(16, 8, seed=1).float().softmax(-1)
    plain = cross_entropy(a.bfloat16().float(), torch.eye(8), target, scale=10.0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(cross_entropy(a, torch.eye(8), target, scale=10.0), plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("lengths", ["unit", "weight_norm", "unnormalised"])
def test_prototype_head(lengths: str, norms: bool):
    head, x = noise(PrototypeHead(6, 8, 5, 7, lengths, norms), 0).double(), normal(4, 6)
    factors = {
        "unit": torch.ones(7),
        "weight_norm": head.lengths,
        "unnormalised": head.prototypes.norm(dim=1),
    }[lengths]

    def naive(x: Tensor) -> Tensor:
        hidden = x
        for i in (0, 3, 6) if norms else (0, 2, 4):
            hidden = hidden @ head.mlp[i].weight.T + head.mlp[i].bias
            if norms:
                norm, moments = head.mlp[i + 1], [(c.mean(), (c - c.mean()).square().mean()) for c in hidden.T]
                columns = [(c - m) / (v + 1e-5).sqrt() for c, (m, v) in zip(hidden.T, moments, strict=True)]
                hidden = torch.stack(columns, 1)
                hidden = hidden if norm.weight is None else hidden * norm.weight + norm.bias
            if i < (6 if norms else 4):
                hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        logits = [
            factor * (row @ prototype) / (row.norm() * prototype.norm())
            for row in hidden
            for factor, prototype in zip(factors, head.prototypes, strict=True)
        ]
        return torch.stack(logits).view(4, 7)

    weights = normal(4, 7, seed=1)
    assert_same(lambda x: (head(x) * weights).sum(), lambda x: (naive(x) * weights).sum(), x)

    targets, rows = normal(2, 7, seed=2).softmax(-1), normal(4, seed=3)  # each target is that of two rows

    def terms(x: Tensor) -> Tensor:
        return sum(rows[i] * naive_cross_entropy(naive(x)[i], targets[i // 2], 0.1) for i in range(4))

    def loss(x: Tensor) -> Tensor:
        return head(x, targets, 0.1, rows)

    assert_same(loss, terms, x)
    last = [p for p in (head.prototypes, head.lengths) if p is not None]
    for ours, theirs in zip(*(torch.autograd.grad(f(x), last) for f in (loss, terms)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("over_processes", [False, True])
def test_a_head_with_batch_norms_without_rows(over_processes: bool, monkeypatch: pytest.MonkeyPatch):
    """A batch in which no crop is masked: no row, gradients of 0, and running statistics that stay as they are."""
    if over_processes:  # the formula for several processes, in one
        monkeypatch.setattr(BatchNorm, "_in_one_process", BatchNorm._over_processes)
    head = PrototypeHead(6, 8, 5, 7, batch_norms=True)
    loss = head(torch.zeros(0, 6), torch.zeros(0, 7), 0.1, torch.zeros(0))
    loss.backward()
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in head.parameters())
    assert not head.mlp[1].running_mean.any() and head.mlp[1].running_var.eq(1).all()


def test_prototypes_with_trained_lengths_are_torchs_weight_norm():
    """Their lengths are 1 at first, and a step changes length and direction as it changes torch's."""
    head = noise(PrototypeHead(6, 8, 5, 7, "weight_norm"), 0).double()
    assert torch.equal(PrototypeHead(6, 8, 5, 7, "weight_norm").lengths, torch.ones(7, 1))
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(5, 7, bias=False).double())
    length, direction = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    with torch.no_grad():
        length.copy_(head.lengths)
        direction.copy_(head.prototypes)
    x, weights = normal(4, 6), normal(4, 7, seed=1)
    theirs = (layer(torch.nn.functional.normalize(head.mlp(x), dim=-1)) * weights).sum()
    ours = (head(x) * weights).sum()
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, [head.lengths, head.prototypes]),
        torch.autograd.grad(theirs, [length, direction]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_patchify():
    images = normal(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert torch.equal(patches, torch.stack([torch.stack(naive_patches(image, 4)) for image in images]))
    assert torch.equal(unpatchify(patches, 4, (2, 3)), images)


def test_complement():
    keep = torch.tensor([[5, 0, 2], [1, 3, 4]])
    assert complement(keep, 7).tolist() == [[1, 3, 4, 6], [0, 2, 5, 6]]


def test_sincos_table():
    """The table that MAE has published: columns in the first half, rows in the second; in each, sines before
    cosines."""
    height, width, dim = 3, 4, 16
    expected = torch.zeros(height * width, dim)
    for y in range(height):
        for x in range(width):
            for half, position in enumerate((x, y)):
                for k in range(dim // 4):
                    angle = position / 10000 ** (k / (dim / 4))
                    expected[y * width + x, half * dim // 2 + k] = math.sin(angle)
                    expected[y * width + x, half * dim // 2 + dim // 4 + k] = math.cos(angle)
    torch.testing.assert_close(sincos_table(dim, (height, width)), expected)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.999, 1.0])
def test_ema_update(momentum: float):
    def network(seed: int) -> nn.Module:
        return noise(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), seed)

    teacher, student = network(0), network(1)
    student[1].running_mean.fill_(5)
    student[1].num_batches_tracked.fill_(7)
    before = [p.detach().clone() for p in teacher.parameters()]
    own = [p.detach().clone() for p in student.parameters()]
    ema_update(teacher, student, momentum)
    for p, old, new in zip(teacher.parameters(), before, own, strict=True):
        torch.testing.assert_close(p.double(), momentum * old.double() + (1 - momentum) * new.double())
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), own, strict=True))
    assert teacher[1].running_mean.tolist() == [5] * 4 and teacher[1].num_batches_tracked == 7


@pytest.mark.parametrize("skipped", [None, torch.zeros(())])
def test_ema_of_a_network_without_parameters(skipped: torch.Tensor | None):
    teacher, student = (nn.BatchNorm1d(4, affine=False) for _ in range(2))
    student.running_mean.fill_(5)
    ema_update(teacher, student, 0.5, skipped)
    assert teacher.running_mean.tolist() == [5] * 4


def test_ema_update_on_a_device(monkeypatch: pytest.MonkeyPatch):
    """The code for GPUs, where the host does not read `skipped`: the same average, computed in chunks, and no bit
    changes in a skipped step."""
    monkeypatch.setattr(ema, "MAX_TEMPORARY", 10)
    teacher, student = ([normal(*shape, seed=seed) for shape in ((3, 4), (5,), (4,), (2,))] for seed in (0, 1))
    before = [t.clone() for t in teacher]
    ema.move_towards(teacher, student, torch.tensor(0.0))
    assert all(torch.equal(t, old) for t, old in zip(teacher, before, strict=True))
    ema.move_towards(teacher, student, torch.tensor(0.25, dtype=torch.float64))
    for t, old, new in zip(teacher, before, student, strict=True):
        torch.testing.assert_close(t, 0.75 * old + 0.25 * new)


def test_ema_update_on_a_gpu_takes_a_few_operations_and_no_sync():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    with FakeTensorMode(), torch.device("cuda"):
        teacher, student = (nn.Sequential(*[nn.Linear(3, 3) for _ in range(8)]) for _ in range(2))
        skipped = torch.zeros(())
        with Seen():
            ema_update(teacher, student, 0.99, skipped)
    calls = [name for name in seen if "foreach" in name]
    assert calls == ["aten._foreach_sub.List", "aten._foreach_mul_.Tensor", "aten._foreach_add_.List"]
    assert not any("local_scalar" in name for name in seen)


def test_ema_update_refuses():
    """Networks that differ, and empty placeholders, for which the teacher would not be updated without any error."""
    empty = nn.ParameterList([torch.empty(0)])
    for teacher, student in [
        (nn.Linear(2, 3), nn.Linear(2, 4)),
        (nn.Linear(2, 3), nn.Linear(2, 3, bias=False)),
        (empty, empty),
    ]:
        with pytest.raises(ValueError, match="the teacher cannot be updated"):
            ema_update(teacher, student, 0.9)


def test_make_teacher():
    student = backbone(drop_path=0.3)
    teacher = make_teacher(student)
    assert not any(p.requires_grad for p in teacher.parameters()) and all(p.requires_grad for p in student.parameters())
    assert {m.drop_rate for m in teacher.modules() if isinstance(m, DropPath)} == {0.0}
    assert {m.drop_rate for m in student.modules() if isinstance(m, DropPath)} == {0.3}
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)


# ---------------------------------------------------------------- SimCLR
def test_simclr():
    model = noise(SimCLR(SimCLRConfig(temperature=0.2, head_hidden=16, head_outputs=8), backbone), 0).double()
    images = normal(5, 2, 3, 32, 32)

    def naive(images: Tensor) -> Tensor:
        z = torch.stack([model.backbone(view[None]).cls[0] for image in images for view in image])  # image by image
        hidden = z @ model.head[0].weight.T
        centred = hidden - hidden.mean(0)
        hidden = centred / (centred.square().mean(0) + 1e-5).sqrt() * model.head[1].weight + model.head[1].bias
        z = hidden.clamp(min=0) @ model.head[3].weight.T + model.head[3].bias
        return naive_nt_xent(z[0::2], z[1::2], 0.2)

    assert_same(lambda x: model({"image": x}, 0)[0], naive, images)


# ---------------------------------------------------------------- DINOv2
def dinov2(local_crops: int = 3, prototypes: int = 11, hidden: int = 16, bottleneck: int = 8) -> DINOv2:
    cfg = DINOv2Config(
        prototypes=prototypes, head_hidden=hidden, head_bottleneck=bottleneck, local_crops=local_crops, local_size=16
    )
    cfg.teacher_temperature, cfg.momentum = Schedule(0.07), Schedule(0.9)
    torch.manual_seed(0)
    return DINOv2(cfg, backbone)


def dinov2_batch(local_crops: int = 3, images: int = 4) -> dict[str, Tensor]:
    """Masks with no patch, one patch, some, and all patches of a crop; the reciprocals of their numbers are exact."""
    mask = torch.zeros(images, 2, 16, dtype=torch.bool)
    mask[0, 1, 3], mask[1, 0, 5:9], mask[1, 1], mask[2, 1, ::2] = True, True, True, True
    return {
        "global": normal(images, 2, 3, 32, 32),
        "local": normal(images, local_crops, 3, 16, 16, seed=1),
        "mask": mask,
        **places_of(mask),
    }


def places_of(mask: Tensor) -> dict[str, Tensor]:
    """The arrays that data workers collate from a batch's masks."""
    return {key: torch.from_numpy(value) for key, value in masked_patches(mask.numpy()).items()}


def as_it_is(x: Tensor, targets: Tensor, temperature: float, row_weights: Tensor | None = None) -> Tensor:
    """A head whose logits are its input."""
    unit = torch.eye(x.shape[1], dtype=x.dtype)
    return cross_entropy(x, unit, targets, scale=1 / temperature, row_weights=row_weights)


@pytest.mark.parametrize("crops, small", [(2, 3), (2, 0), (3, 2)])
def test_dino_terms(crops: int, small: int):
    p = normal(4, crops, 11).mul(3).softmax(-1)

    def ours(s_global: Tensor, s_local: Tensor) -> Tensor:
        local, glob = dino_terms(as_it_is, s_global, s_local, p, 0.1)
        return 2 * local + 3 * glob

    def naive(s_global: Tensor, s_local: Tensor) -> Tensor:
        local, glob = naive_dino(s_global, s_local, p, 0.1)
        return 2 * local + 3 * glob

    s_global, s_local = normal(4, crops, 11, seed=1).tanh(), normal(4, small, 11, seed=2).tanh()
    if small:
        assert_same(ours, naive, s_global, s_local)
    else:
        assert_same(lambda s: ours(s, s_local), lambda s: naive(s, s_local), s_global)


def test_ibot_term():
    mask = dinov2_batch()["mask"].flatten(0, 1)
    count = int(mask.sum())
    p, s = normal(count, 11).mul(3).softmax(-1), normal(count, 11, seed=1).tanh()
    weight = places_of(mask)["mask_weight"]
    assert_same(lambda s: ibot_term(as_it_is, s, p, weight, 8, 0.1), lambda s: naive_ibot(s, p, mask, 0.1), s)
    nothing = ibot_term(as_it_is, s[:0].clone().requires_grad_(), p[:0], weight[:0], 8, 0.1)
    nothing.backward()
    assert nothing == 0


@pytest.mark.parametrize("small", [3, 0])
def test_dinov2_forward(small: int):
    """The whole loss, computed crop by crop, without lists of sizes and flattened batches."""
    model = dinov2(small).double()
    noise(model.student, 1)
    noise(model.teacher, 2)  # as after some training: no longer the student
    batch = dinov2_batch(small)
    images, mask = (
        list(zip(batch["global"].unbind(0), batch["mask"].unbind(0), strict=True)),
        batch["mask"].flatten(0, 1),
    )

    with torch.no_grad():
        body, t_cls, t_patch = model.teacher["backbone"], [], []
        for crops, masks in images:
            for crop, hidden in zip(crops, masks, strict=True):
                features = body(crop[None])
                t_cls.append(model.teacher["dino_head"](features.cls)[0])
                t_patch += [model.teacher["ibot_head"](token[None])[0] for token in features.tokens[0][hidden]]
        p_cls, p_patch = naive_sinkhorn(torch.stack(t_cls), 0.07), naive_sinkhorn(torch.stack(t_patch), 0.07)

    body, s_global, s_local, s_patch, spread = model.student["backbone"], [], [], [], [[], []]
    for i, (crops, masks) in enumerate(images):
        for g in range(2):
            features = body(crops[g][None], mask=masks[g][None])
            s_global.append(model.student["dino_head"](features.cls)[0])
            s_patch += [model.student["ibot_head"](token[None])[0] for token in features.tokens[0][masks[g]]]
            spread[g].append(features.cls[0])
        s_local += [model.student["dino_head"](body(crop[None]).cls)[0] for crop in batch["local"][i]]
    s_small = torch.stack(s_local).view(4, small, -1) if small else torch.zeros(4, 0, 11)
    local, glob = naive_dino(torch.stack(s_global).view(4, 2, -1), s_small, p_cls.view(4, 2, -1), 0.1)
    ibot = naive_ibot(torch.stack(s_patch), p_patch, mask, 0.1)
    uniform = sum(naive_koleo(torch.stack(rows)) for rows in spread)
    expected = local + glob + ibot + 0.1 * uniform

    loss, logs = model(batch, 0)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for name, value in {"dino_local": local, "dino_global": glob, "ibot": ibot, "koleo": uniform / 2}.items():
        torch.testing.assert_close(logs[name], value.detach(), rtol=1e-9, atol=1e-12)
    assert logs["teacher_entropy"].item() == pytest.approx(-(p_cls * p_cls.log()).sum().item() / 8, rel=1e-6)
    parameters = dict(model.student.named_parameters())
    gradients = [torch.autograd.grad(x, list(parameters.values())) for x in (loss, expected)]
    for name, one, other in zip(parameters, *gradients, strict=True):
        assert other.abs().sum() > 0, name
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8 * float(other.abs().max()), msg=name)
    assert all(p.grad is None for p in model.teacher.parameters())


def test_dinov2_after_step():
    model = dinov2()
    noise(model.student, 1)
    old, student = model.teacher["dino_head"].prototypes.clone(), model.student["dino_head"].prototypes.detach()
    model.after_step(0)
    torch.testing.assert_close(model.teacher["dino_head"].prototypes, 0.9 * old + 0.1 * student)


def test_dinov2_at_initialisation():
    """Logits are almost zero, so that each cross-entropy is almost ln K: the local and global losses together are
    one ln K, iBOT one per masked share of the crops."""
    model, batch = dinov2(prototypes=1024, hidden=64, bottleneck=256), dinov2_batch(images=8)
    _, logs = model({k: v.float() if v.is_floating_point() else v for k, v in batch.items()}, 0)
    assert (logs["dino_local"] + logs["dino_global"]).item() == pytest.approx(math.log(1024), abs=0.5)
    assert (logs["dino_local"] / logs["dino_global"]).item() == pytest.approx(2 * 3 / 2, rel=0.1)  # as the pairs
    masked = batch["mask"].any(-1).double().mean().item()
    assert logs["ibot"].item() == pytest.approx(masked * math.log(1024), abs=0.5)
    assert 0 < logs["teacher_entropy"] <= math.log(1024)


# ---------------------------------------------------------------- MAE
def mae(norm_pix: bool = True) -> MAE:
    torch.manual_seed(0)
    cfg = MAEConfig(decoder_dim=16, decoder_depth=1, decoder_heads=2, norm_pix=norm_pix)
    return noise(MAE(cfg, lambda **changes: backbone(**{"positions": "sincos"} | changes)), 0)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_mae_loss(norm_pix: bool):
    model, keep = mae(norm_pix).double(), torch.tensor([[3, 9, 14, 0], [8, 1, 6, 2]])

    def naive(images: Tensor) -> Tensor:
        prediction, dropped = model.reconstruct(images, keep)
        errors = []
        for i, image in enumerate(images):
            patches = naive_patches(image, 8)
            assert sorted([*dropped[i].tolist(), *keep[i].tolist()]) == list(range(16))
            for j, place in enumerate(dropped[i].tolist()):
                y = patches[place]
                if norm_pix:
                    variance = (y - y.mean()).square().sum() / (len(y) - 1)
                    y = (y - y.mean()) / (variance + 1e-6).sqrt()
                errors.append((prediction[i, j] - y).square().sum() / len(y))
        return mean(errors)

    assert_same(lambda x: model({"image": x, "keep": keep}, 0)[0], naive, normal(2, 3, 32, 32))


def test_the_decoder_of_mae_begins_with_xavier_weights():
    """As in the published code. With a std of 0.02, a narrow decoder learns much more slowly."""
    torch.manual_seed(0)
    model = MAE(MAEConfig(decoder_dim=64, decoder_depth=1, decoder_heads=2), backbone)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith("backbone.")}
    assert {"embed", "predict", "blocks.0.mlp.fc1", "blocks.0.attn.proj"} < linear.keys()
    for name, layer in linear.items():
        variance = 2 / (layer.in_features + layer.out_features)
        assert layer.weight.std().item() == pytest.approx(variance**0.5, rel=0.1), name
        assert layer.weight.abs().max().item() <= (3 * variance) ** 0.5 and not layer.bias.any(), name


def write_mae_for_transformers(model: MAE, folder: Path) -> None:
    """Our weights with the names of the published MAE checkpoints."""
    from safetensors.torch import save_file

    def block(i: int, ours: str, theirs: str) -> dict[str, str]:
        names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
        names |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
        names |= {f"attn.qkv[{n}]": f"attention.attention.{kind}" for n, kind in enumerate(("query", "key", "value"))}
        return {f"{ours}.{i}.{a}": f"{theirs}.{i}.{b}" for a, b in names.items()}

    names = {"backbone.patch_embed": "vit.embeddings.patch_embeddings.projection", "backbone.norm": "vit.layernorm"}
    names |= {"embed": "decoder.decoder_embed", "norm": "decoder.decoder_norm", "predict": "decoder.decoder_pred"}
    for i in range(2):
        names |= block(i, "backbone.blocks", "vit.encoder.layer")
    names |= block(0, "blocks", "decoder.decoder_layers")
    state, out = model.state_dict(), {}
    for ours, theirs in names.items():
        base, _, third = ours.partition("[")
        for part in ("weight", "bias"):
            value = state[f"{base}.{part}"]
            out[f"{theirs}.{part}"] = (value.chunk(3)[int(third[0])] if third else value).clone()
    out["vit.embeddings.cls_token"], out["decoder.mask_token"] = state["backbone.cls_token"], state["mask_token"]
    out["vit.embeddings.position_embeddings"] = state["backbone.pos_embed"]
    out["decoder.decoder_pos_embed"] = torch.cat([torch.zeros(1, 16), sincos_table(16, (4, 4))])[None]
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "image_size": 32,
        "patch_size": 8,
    }
    fields |= {
        f"decoder_{k}": v
        for k, v in {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        }.items()
    }
    fields |= {"model_type": "vit_mae", "norm_pix_loss": model.cfg.norm_pix, "layer_norm_eps": 1e-6, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("norm_pix", [True, False])
def test_mae_equals_transformers(tmp_path: Path, norm_pix: bool):
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import ViTMAEForPreTraining

    model = mae(norm_pix)
    write_mae_for_transformers(model, tmp_path)
    theirs, info = ViTMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    images = normal(3, 3, 32, 32).float()
    order = torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    keep = order.argsort(1)[:, :4]  # a mask ratio of 0.75 of 16
    out = theirs.eval()(images, noise=order)
    loss, _ = model({"image": images, "keep": keep}, 0)
    prediction, dropped = model.reconstruct(images, keep)
    assert torch.equal(out.mask.nonzero()[:, 1].view(3, -1), dropped)
    torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(prediction, out.logits[out.mask.bool()].view_as(prediction), rtol=0, atol=1e-5)

    loss.backward()
    out.loss.backward()
    named = dict(theirs.named_parameters())
    pairs = [
        (model.backbone.patch_embed.weight, named["vit.embeddings.patch_embeddings.projection.weight"]),
        (model.backbone.cls_token, named["vit.embeddings.cls_token"]),
        (model.backbone.norm.weight, named["vit.layernorm.weight"]),
        (model.embed.weight, named["decoder.decoder_embed.weight"]),
        (model.mask_token, named["decoder.mask_token"]),
        (model.predict.bias, named["decoder.decoder_pred.bias"]),
    ]
    for own, other in pairs:
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-5 * float(other.grad.abs().max()))


def test_mae_pictures():
    """The image, the patches that the encoder gets, and the reconstruction: kept patches do not change; dropped
    patches are black in the second picture and predicted in the third."""
    model, images, keep = mae(), normal(2, 3, 32, 32).float(), torch.tensor([[3, 9, 14, 0], [8, 1, 6, 2]])
    picture = model.pictures({"image": images, "keep": keep})["reconstructions"]
    assert picture.dtype == torch.uint8 and picture.shape == (3, 2 * 32, 3 * 32)
    for i in range(2):
        row = picture[:, 32 * i : 32 * (i + 1)].float()
        image, seen, painted = (naive_patches(panel, 8) for panel in row.split(32, dim=2))
        for place in range(16):
            kept = place in keep[i]
            assert torch.equal(image[place], seen[place]) == kept and torch.equal(image[place], painted[place]) == kept
            assert kept or len(seen[place].unique()) == 1


# ---------------------------------------------------------------- lightly
def test_losses_equal_lightlys():
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss, NTXentLoss
    from lightly.loss.swav_loss import sinkhorn as swav_sinkhorn

    a, b = normal(6, 5), normal(6, 5, seed=1)
    assert_same(lambda a, b: nt_xent(a, b, 0.2), NTXentLoss(temperature=0.2), a, b)
    assert_same(koleo, KoLeoLoss(), a)
    torch.testing.assert_close(sinkhorn(a, 0.3), swav_sinkhorn(a, 3, 0.3), rtol=1e-9, atol=0)

    teacher = normal(4, 2, 11)  # a temperature that fp32 holds exactly, as lightly rounds it
    p = (teacher / 0.0625).softmax(-1)

    def theirs(s_global: Tensor, s_local: Tensor) -> Tensor:
        loss = DINOLoss(output_dim=11, student_temp=0.1).double()
        return loss(list(teacher.unbind(1)), [*s_global.unbind(1), *s_local.unbind(1)], teacher_temp=0.0625)

    s_global, s_local = normal(4, 2, 11, seed=1), normal(4, 3, 11, seed=2)
    assert_same(lambda g, s: sum(dino_terms(as_it_is, g, s, p, 0.1)), theirs, s_global, s_local)

    mask = dinov2_batch()["mask"].flatten(0, 1)
    teacher, s_patch = normal(int(mask.sum()), 11), normal(int(mask.sum()), 11, seed=1)
    patch_loss = IBOTPatchLoss(output_dim=11, student_temp=0.1, teacher_temp=0.0625).double()
    p = (teacher / 0.0625).softmax(-1)
    weight = places_of(mask)["mask_weight"]
    assert_same(
        lambda s: ibot_term(as_it_is, s, p, weight, 8, 0.1),
        lambda s: patch_loss(teacher, s, mask.view(-1, 4, 4)),
        s_patch,
    )
