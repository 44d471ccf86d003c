"""Losses that depend on the whole batch: two gloo processes with half of the batch each give the value and the
gradient of one process with the whole batch."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import kernels
from pretrain.kernels import batch_norm
from pretrain.models import families
from pretrain.models.build import build_model
from pretrain.objectives.dinov2 import DINOv2
from pretrain.ops.contrastive import nt_xent
from pretrain.ops.ema import ema_update, make_teacher
from pretrain.ops.gather import gather, logsumexp_over_batch, products_over_batch, sum_over_world, world
from pretrain.ops.gram import gram_loss
from pretrain.ops.koleo import koleo
from pretrain.ops.similarity_distillation import relation_loss
from pretrain.ops.sinkhorn import sinkhorn
from pretrain.ops.sync_norm import BatchNorm
from tests.parity import test_catalogue, test_image_text, test_pretext
from tests.parity.test_dinov3 import batch_of, dinov3
from tests.parity.test_losses import dinov2, dinov2_batch, normal, places_of

WORLD = 2


def mine(x: Tensor) -> Tensor:
    """This process's half of a batch."""
    return x.chunk(world()[1])[world()[0]]


# Each check runs in one process and in two, and returns tensors: "rows" of this process, to be put one below the other; "mean", to be averaged
# over processes, as an engine averages gradients; "same", equal everywhere.
Result = dict[str, list[Tensor]]


def check_gather() -> Result:
    """The gradient of a process's rows includes the losses of all processes."""
    x = mine(normal(6, 3)).requires_grad_()
    everyone = gather(x)
    loss = ((everyone @ normal(3, 6, seed=1)) ** 3).sum() / 6  # the same on every process
    (gradient,) = torch.autograd.grad(loss, [x])
    return {"same": [everyone.detach(), loss.detach()], "rows": [gradient / world()[1]]}


def check_products_over_batch() -> Result:
    """Also of a matrix with itself. The loss is the same on every process."""
    a, b = (mine(normal(6, n, seed=n)).requires_grad_() for n in (3, 4))
    products = products_over_batch(a, b)
    own = products_over_batch(a, a)
    loss = ((products @ normal(4, 2)) ** 3).sum() + (own.square() * normal(3, 3)).sum()
    return {
        "same": [products.detach(), own.detach()],
        "rows": [g / world()[1] for g in torch.autograd.grad(loss, [a, b])],
    }


def check_products_are_not_copied() -> Result:
    """Forward and backward make no second tensor of the size of the matrix, apart from its gradient; the backward does
    not all-reduce."""
    a, b = (mine(normal(6, n, seed=n)).requires_grad_() for n in (50, 60))
    grad, made = torch.ones(50, 60, dtype=torch.float64), list[str]()

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            out = op(*arguments, **(options or {}))
            old = {x.data_ptr() for x in arguments if isinstance(x, Tensor)}
            new = isinstance(out, Tensor) and out.numel() == 3000 and out.data_ptr() not in old
            if new or "allreduce" in str(op):
                made.append(str(op))
            return out

    with Made():
        products = products_over_batch(a, b)
    forward = sum("allreduce" not in op for op in made)
    made.clear()
    with Made():
        products.backward(grad)
    assert (forward, made) == (1, [])
    return {"same": []}


def check_gather_of_different_losses() -> Result:
    """Each process weights the gathered rows differently; the gradient is the sum over the processes."""
    x = mine(normal(6, 3)).requires_grad_()
    weights = mine(normal(4, 6, 3, seed=1))
    (gradient,) = torch.autograd.grad((gather(x) * weights.sum(0)).sum(), [x])
    return {"rows": [gradient]}


def check_gather_leaves_a_shared_gradient() -> Result:
    """The backward of a sum passes the same tensor to both inputs; the gradient of the other input must be that of
    this process."""
    x, rank = mine(normal(6, 3)).requires_grad_(), world()[0]
    other = normal(6, 3, seed=1).requires_grad_()
    own = normal(2, 6, 3, seed=2)  # by process
    weights = own.sum(0) if world()[1] == 1 else own[rank]
    total = gather(x) + other
    for_x, for_other = torch.autograd.grad((total * weights).sum(), [x, other])
    return {"rows": [for_x], "mean": [for_other * world()[1]]}


@contextlib.contextmanager
def cuda_operations() -> Iterator[None]:
    """The operations of batch norm that only CUDA has, replaced by the formulas that they compute."""

    def by_channel(x: Tensor, values: Tensor) -> Tensor:
        return values.view(1, -1, *[1] * (x.ndim - 2))

    def over_all_but_channels(x: Tensor) -> Tensor:
        return x.sum([0, *range(2, x.ndim)])

    def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        return mean, (variance + eps).rsqrt()

    def gather_stats(x, means, scales, running_mean, running_var, momentum, eps, counts):
        shares, total = (counts / counts.sum()).unsqueeze(1), counts.sum()
        mean = (shares * means).sum(0)
        variance = (shares * (scales**-2 - eps + (means - mean).square())).sum(0)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * total / (total - 1), momentum)
        return mean, (variance + eps).rsqrt()

    def elemt(x, weight, bias, mean, scale, eps):
        return (x - by_channel(x, mean)) * by_channel(x, scale * weight) + by_channel(x, bias)

    def backward_reduce(grad, x, mean, scale, weight, *needed):
        sum_dy, sum_dy_xmu = over_all_but_channels(grad), over_all_but_channels(grad * (x - by_channel(x, mean)))
        return sum_dy, sum_dy_xmu, sum_dy_xmu * scale, sum_dy

    def backward_elemt(grad, x, mean, scale, weight, sum_dy, sum_dy_xmu, counts):
        total = counts.sum()
        centred = by_channel(x, sum_dy_xmu / total * scale**2) * (x - by_channel(x, mean))
        return (grad - by_channel(x, sum_dy / total) - centred) * by_channel(x, scale * weight)

    names = {
        "batch_norm_stats": stats,
        "batch_norm_gather_stats_with_counts": gather_stats,
        "batch_norm_elemt": elemt,
        "batch_norm_backward_reduce": backward_reduce,
        "batch_norm_backward_elemt": backward_elemt,
    }
    with contextlib.ExitStack() as stack:
        for name, function in names.items():
            stack.enter_context(mock.patch.object(torch, name, function))
        yield


def check_the_kernel_of_batch_norm() -> Result:
    """For images and vectors: output, gradients and running statistics are those of nn.BatchNorm on the whole batch."""
    rows, means = [], []
    for shape in ((6, 4, 3, 2), (6, 4)):
        norm = BatchNorm(4).double()
        kernels.replace(norm, kernels.CUDA)
        names = set(norm.state_dict())
        assert type(norm) is batch_norm.CudaBatchNorm and names == set(nn.BatchNorm1d(4).state_dict())
        with torch.no_grad():
            norm.weight.copy_(normal(4, seed=2))
            norm.bias.copy_(normal(4, seed=3))
        x, slope = mine(normal(*shape)).requires_grad_(), mine(normal(*shape, seed=1))
        with cuda_operations():
            value = norm(x)
            for_x, for_weight, for_bias = torch.autograd.grad((value * slope).sum(), [x, norm.weight, norm.bias])
        rows += [value.detach(), for_x]
        means += [world()[1] * for_weight, world()[1] * for_bias]
        means += [norm.running_mean, norm.running_var, norm.num_batches_tracked.double()]
    return {"rows": rows, "mean": means}


def check_networks_of_timm() -> Result:
    """Their batch norms, without and with an activation, use the samples of both processes; so do those of a teacher
    in evaluation mode, which keeps statistics of its own."""
    rows, means = [], []
    for architecture in ("test_resnet", "test_efficientnet"):
        torch.manual_seed(0)
        body: Any = build_model(families.Timm(architecture, image_size=32)).double().train()
        teacher = make_teacher(body, batch_statistics=True).eval()
        x = mine(normal(4, 3, 32, 32))
        value, averaged = body(x).cls, teacher(x).cls
        assert not torch.equal(next(teacher.buffers()), torch.zeros_like(next(teacher.buffers())))
        ema_update(teacher, body, 0.9)
        slope = mine(normal(4, value.shape[1], seed=1))
        found = torch.autograd.grad((value * slope).sum(), list(body.parameters()))
        rows += [value.detach(), averaged]
        means += [*(world()[1] * g for g in found), *(b.double() for b in [*body.buffers(), *teacher.buffers()])]
    return {"rows": rows, "mean": means}


def check_nt_xent() -> Result:
    torch.manual_seed(0)
    network = nn.Linear(5, 4).double()
    a, b = mine(normal(8, 5)), mine(normal(8, 5, seed=1))
    loss = nt_xent(network(a), network(b), 0.2)
    return {"mean": [loss.detach(), *torch.autograd.grad(loss, list(network.parameters()))]}


def check_sinkhorn() -> Result:
    """The whole batch, its halves, and rows that differ so much that the maximum of one process is not enough."""
    logits = normal(8, 11)
    far = logits + torch.tensor([0.0] * 4 + [500.0] * 4).unsqueeze(1)
    return {"rows": [sinkhorn(mine(logits), 0.07), sinkhorn(mine(far), 0.5, iterations=2)]}


def check_sinkhorn_of_uneven_halves() -> Result:
    """As for masked patches: five rows on one process and three on the other, or all eight on one."""
    logits, rank = normal(8, 11), world()[0]
    if world()[1] == 1:
        return {"rows": [sinkhorn(logits, 0.07)] * 3}
    return {"rows": [sinkhorn(logits.split(sizes)[rank], 0.07) for sizes in ([5, 3], [8, 0], [0, 8])]}


def check_sums() -> Result:
    x, rank = normal(8, 3), world()[0]
    part = x if world()[1] == 1 else x.split([8, 0])[rank]
    return {"same": [logsumexp_over_batch(part), sum_over_world(part.sum(0))]}


def part_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's samples of a batch, with the arrays that its data workers would collate from their masks."""
    rows = {key: mine(value) for key, value in batch.items() if not key.startswith("mask_")}
    return rows | places_of(rows["mask"])


def check_dinov2() -> Result:
    """The whole objective except KoLeo, which is computed within each process's batch (2304.07193 §4). All masked
    patches are in the first half."""
    model: DINOv2 = dinov2().double()
    model.cfg.koleo_weight = 0.0
    batch = dinov2_batch()
    batch["mask"][2:] = False
    loss, logs = model(part_of(batch), 0)
    gradients = torch.autograd.grad(loss, list(model.student.parameters()))
    return {
        "mean": [
            loss.detach(),
            *(logs[name] for name in ("dino_local", "dino_global", "ibot", "teacher_entropy")),
            *gradients,
        ]
    }


def check_grouped_koleo() -> Result:
    """Groups that span processes, groups within one process, and the whole batch; with one neighbour and with two."""
    torch.manual_seed(0)
    network = nn.Linear(5, 4).double()
    out = []
    for group, neighbours in ((8, 1), (8, 2), (4, 2), (2, 1), (None, 1), (None, 3)):
        loss = koleo(network(mine(normal(8, 5))), group, neighbours)
        out += [loss.detach(), *torch.autograd.grad(loss, list(network.parameters()))]
    loss = koleo(
        network(mine(normal(12, 5))), 4
    )  # of two processes with six rows each, the second group has rows of both
    out += [loss.detach(), *torch.autograd.grad(loss, list(network.parameters()))]
    return {"mean": out}


def check_relations() -> Result:
    """Each crop is compared with the crops of all processes, and its gradient includes their losses."""
    torch.manual_seed(0)
    network = nn.Linear(5, 4).double()
    loss = relation_loss(network(mine(normal(8, 5))), mine(normal(8, 6, seed=1)), 0.1)
    return {"mean": [loss.detach(), *torch.autograd.grad(loss, list(network.parameters()))]}


def check_dinov3() -> Result:
    """The whole objective: KoLeo over all processes, and the mean of the Gram loss over processes."""
    model = dinov3(koleo_group=4, gram_teacher="ema").double()
    batch = batch_of()
    batch["mask"][2:] = False
    loss, logs = model(part_of(batch), 0)
    gradients = torch.autograd.grad(loss, list(model.student.parameters()))
    return {"mean": [loss.detach(), *(logs[n] for n in ("dino_local", "ibot", "koleo", "gram")), *gradients]}


def check_gram_of_masked_patches() -> Result:
    """Masked patches of three images in the first half and of one in the second: each image has the same weight on
    any process."""
    torch.manual_seed(0)
    network, mask = nn.Linear(5, 4).double(), torch.zeros(8, 6, dtype=torch.bool)
    mask[0, 1:3], mask[1, ::2], mask[3], mask[6, 2:] = True, True, True, True
    x, target, out = normal(8, 6, 5), normal(8, 6, 3, seed=1), []
    for tokens in ("masked", "unmasked"):
        loss = gram_loss(network(mine(x)), mine(target), mine(mask), tokens)
        out += [loss.detach(), *torch.autograd.grad(loss, list(network.parameters())[:1])]
    nothing = gram_loss(mine(x), mine(target), mine(mask & False), "masked")
    return {"mean": [*out, nothing]}


CHECKS: dict[str, Callable[[], Result]] = {
    name: value for name, value in globals().items() if name.startswith("check_")
}
CHECKS |= {
    f"check_{name}_{model}": functools.partial(test_catalogue.check, name, model)
    for name, model in test_catalogue.PAIRS
}
CHECKS |= {
    f"check_{name}_{model}": functools.partial(test_pretext.check, name, model) for name, model in test_pretext.PAIRS
}
CHECKS["check_context_encoder_resnet"] = functools.partial(
    test_pretext.check, "context_encoder", test_pretext.SMALL_MAP, 64
)
CHECKS |= {
    f"check_{kind}_pairs": functools.partial(test_image_text.check_pairs, kind) for kind in ("softmax", "sigmoid")
}
CHECKS["check_vqvae_without_restarts"] = functools.partial(test_pretext.check, "vqvae", "vit", restart_below=0.0)


def run_checks(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.save({name: check() for name, check in CHECKS.items()}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Result]]:
    """The results of each process, in rank order."""
    folder = tmp_path_factory.mktemp("ranks")
    os.environ["OMP_NUM_THREADS"] = "1"
    mp.spawn(run_checks, (folder,), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.slow  # the first one starts the processes
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_equal_one(name: str, ranks: list[dict[str, Result]]):
    alone = CHECKS[name]()
    together = [result[name] for result in ranks]
    for kind, expected in alone.items():
        for i, value in enumerate(expected):
            parts = [result[kind][i] for result in together]
            if kind == "same":
                assert all(torch.equal(part, parts[0]) for part in parts)
            found = {"same": lambda p: p[0], "rows": torch.cat, "mean": lambda p: sum(p) / len(p)}[kind](parts)
            # position tables are interpolated in fp32
            torch.testing.assert_close(found, value, rtol=1e-8, atol=1e-8, msg=f"{kind}[{i}]: {found} is not {value}")
