"""Losses that look at the whole batch: two gloo processes with half of it each give the value and the gradient of one process with all of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from pretrain.objectives.dinov2 import DINOv2
from pretrain.ops.contrastive import nt_xent
from pretrain.ops.gather import gather, logsumexp_over_batch, sum_over_world, world
from pretrain.ops.gram import gram_loss
from pretrain.ops.koleo import koleo
from pretrain.ops.relations import relation_loss
from pretrain.ops.sinkhorn import sinkhorn
from tests.parity.test_dinov3 import batch_of, dinov3
from tests.parity.test_losses import dinov2, dinov2_batch, normal

WORLD = 2


def mine(x: Tensor) -> Tensor:
    """This process's half of a batch."""
    return x.chunk(world()[1])[world()[0]]


# Each check runs in one process and in two, and returns tensors: "rows" of this process, to be put one below the other; "mean", to be averaged
# over processes, as an engine averages gradients; "same", equal everywhere.
Result = dict[str, list[Tensor]]


def check_gather() -> Result:
    """The gradient of a process's rows comes from the losses of all processes."""
    x = mine(normal(6, 3)).requires_grad_()
    everyone = gather(x)
    loss = ((everyone @ normal(3, 6, seed=1)) ** 3).sum() / 6  # the same on every process
    (gradient,) = torch.autograd.grad(loss, [x])
    return {"same": [everyone.detach(), loss.detach()], "rows": [gradient / world()[1]]}


def check_gather_of_different_losses() -> Result:
    """Each process weighs the gathered rows in its own way: what comes back is the sum over processes."""
    x = mine(normal(6, 3)).requires_grad_()
    weights = mine(normal(4, 6, 3, seed=1))
    (gradient,) = torch.autograd.grad((gather(x) * weights.sum(0)).sum(), [x])
    return {"rows": [gradient]}


def check_nt_xent() -> Result:
    torch.manual_seed(0)
    network = nn.Linear(5, 4).double()
    a, b = mine(normal(8, 5)), mine(normal(8, 5, seed=1))
    loss = nt_xent(network(a), network(b), 0.2)
    return {"mean": [loss.detach(), *torch.autograd.grad(loss, list(network.parameters()))]}


def check_sinkhorn() -> Result:
    """Whole, in halves; and with rows so far apart that each process's own maximum would not do."""
    logits = normal(8, 11)
    far = logits + torch.tensor([0.0] * 4 + [500.0] * 4).unsqueeze(1)
    return {"rows": [sinkhorn(mine(logits), 0.07), sinkhorn(mine(far), 0.5, iterations=2)]}


def check_sinkhorn_of_uneven_halves() -> Result:
    """As of masked patches: five rows on one process and three on the other, or all eight on one."""
    logits, rank = normal(8, 11), world()[0]
    if world()[1] == 1:
        return {"rows": [sinkhorn(logits, 0.07)] * 3}
    return {"rows": [sinkhorn(logits.split(sizes)[rank], 0.07) for sizes in ([5, 3], [8, 0], [0, 8])]}


def check_sums() -> Result:
    x, rank = normal(8, 3), world()[0]
    part = x if world()[1] == 1 else x.split([8, 0])[rank]
    return {"same": [logsumexp_over_batch(part), sum_over_world(part.sum(0))]}


def check_dinov2() -> Result:
    """The whole objective but KoLeo, which is a loss of each process's own batch (2304.07193 §4). All masked patches are in the first half."""
    model: DINOv2 = dinov2().double()
    model.cfg.koleo_weight = 0.0
    batch = dinov2_batch()
    batch["mask"][2:] = False
    loss, logs = model({key: mine(value) for key, value in batch.items()}, 0)
    gradients = torch.autograd.grad(loss, list(model.student.parameters()))
    return {
        "mean": [
            loss.detach(),
            *(logs[name] for name in ("dino_local", "dino_global", "ibot", "teacher_entropy")),
            *gradients,
        ]
    }


def check_grouped_koleo() -> Result:
    """Groups that span processes, that lie within one, and the whole batch; one neighbour and two."""
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
    """Each crop is compared with those of all processes, and its gradient comes from their losses, too."""
    torch.manual_seed(0)
    network = nn.Linear(5, 4).double()
    loss = relation_loss(network(mine(normal(8, 5))), mine(normal(8, 6, seed=1)), 0.1)
    return {"mean": [loss.detach(), *torch.autograd.grad(loss, list(network.parameters()))]}


def check_dinov3() -> Result:
    """The whole objective: KoLeo over all processes, the Gram term's mean over processes."""
    model = dinov3(koleo_group=4, gram_teacher="ema").double()
    batch = batch_of()
    batch["mask"][2:] = False
    loss, logs = model({key: mine(value) for key, value in batch.items()}, 0)
    gradients = torch.autograd.grad(loss, list(model.student.parameters()))
    return {"mean": [loss.detach(), *(logs[n] for n in ("dino_local", "ibot", "koleo", "gram")), *gradients]}


def check_gram_of_masked_patches() -> Result:
    """The masked patches of three images of the first half and of one of the second: each image weighs the same, on whichever process it is."""
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


def run_checks(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.save({name: check() for name, check in CHECKS.items()}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Result]]:
    """What each of the processes found, in rank order."""
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
