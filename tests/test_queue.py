"""The queue of negatives compared with a plain list in float64, on one process and on two, with micro-batches and a
skipped step; and in every mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from common.errors import ConfigError
from launch.local import environments, wait
from pretrain.build import build_objective
from pretrain.models.build import build_model
from pretrain.objectives.mae import MAE
from pretrain.ops.gather import world
from pretrain.ops.queue import Queue
from pretrain.optim.skip_steps import Guard
from pretrain.parallel import processes
from pretrain.parallel.engine import Engine
from pretrain.parallel.modes import build_engine
from pretrain.recipes.recipe import load
from tests.conftest import sampled
from tests.contract.own_objectives import OWN
from tests.forked import Forked
from tests.parallel.modes import batches, one_step, recipe_of

SIZE, BATCH, DIM, STEPS, SKIPPED = 24, 8, 3, 5, 2


def rows_of(step: int) -> Tensor:
    """The rows of the global batch; those of the skipped step are not finite."""
    drawn = torch.randn(BATCH, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return drawn * torch.nan if step == SKIPPED else drawn


def new_queue() -> Queue:
    torch.manual_seed(7)
    return Queue(SIZE, DIM).double()


def step_of(queue: Queue, step: int, accumulate: int, rows: Tensor | None = None) -> None:
    """The micro-batches of a rank, as a stream divides the global batch."""
    own = (rows_of(step) if rows is None else rows).chunk(world()[1])[world()[0]]
    for micro in own.chunk(accumulate):
        queue.hold(micro.requires_grad_(), step)
    queue.push(step, torch.tensor(float(step == SKIPPED)))


def expected() -> tuple[list[list[float]], int]:
    """(rows, position), computed with a list: the rows of each step replace the oldest ones."""
    out, position = new_queue().rows.tolist(), 0
    for step in range(STEPS):
        for row in [] if step == SKIPPED else rows_of(step).tolist():
            out[position] = row
            position = (position + 1) % SIZE
    return out, position


def trained(accumulate: int) -> tuple[list[list[float]], int]:
    queue = new_queue()
    for step in range(STEPS):
        step_of(queue, step, accumulate)
    assert not queue.rows.requires_grad
    return queue.rows.tolist(), int(queue.position)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_it_is_a_list(accumulate: int):
    assert trained(accumulate) == expected()


def rank_of_two(folder: str) -> None:
    dist.init_process_group("gloo")
    torch.save([trained(accumulate) for accumulate in (1, 2)], f"{folder}/{dist.get_rank()}.pt")
    try:
        Queue(12, DIM).push(0)
    except RuntimeError as error:
        assert "without a hold" in str(error)
    try:
        step_of(Queue(12, DIM), 0, 1)
    except ConfigError as error:
        assert error.printed_by_rank_0 == (dist.get_rank() > 0)
    else:
        raise AssertionError
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_same_list(tmp_path: Path):
    assert wait([Forked(rank_of_two, str(tmp_path), env=environment) for environment in environments(2)]) == 0
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == [expected()] * 2


def test_it_begins_with_unit_vectors_and_goes_on_from_its_state():
    queue = new_queue()
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(SIZE, dtype=torch.float64))
    assert not torch.equal(queue.rows[0], queue.rows[1])
    for step in range(3):
        step_of(queue, step, 1)
    resumed = Queue(SIZE, DIM).double()
    resumed.load_state_dict(queue.state_dict())
    for step in range(3, STEPS):
        step_of(resumed, step, 1)
    assert (resumed.rows.tolist(), int(resumed.position)) == expected()


def test_rows_of_another_forward_are_dropped():
    """A validation holds rows that no step pushes."""
    queue = new_queue()
    for step in range(STEPS):
        step_of(queue, step, 2)
        queue.hold(torch.ones(4, DIM), step)
    assert (queue.rows.tolist(), int(queue.position)) == expected()
    with pytest.raises(RuntimeError, match=r"push\(9\) without a hold\(rows, 9\)"):
        queue.push(9)


def test_lower_precision_is_kept_in_the_queues_own():
    queue = Queue(SIZE, DIM)
    given = F.normalize(torch.randn(BATCH, DIM), dim=1).bfloat16()
    step_of(queue, 0, 1, given)
    assert queue.rows.dtype == torch.float32 and torch.equal(queue.rows[:BATCH], given.detach().float())


@pytest.mark.parametrize(("size", "better"), [(20, 16), (3, 8), (29, 32)])
def test_a_size_that_the_batch_does_not_divide(size: int, better: int):
    with pytest.raises(
        ConfigError, match=f"a queue of {size} rows: the size must be a multiple of the 8 rows .*; write {better}$"
    ):
        step_of(Queue(size, DIM), 0, 1)


def test_a_size_that_does_not_fit_the_recipe_fails_when_the_objective_is_built(tmp_path: Path):
    (tmp_path / "queue.py").write_text(OWN["queue"])
    options = [f"objective={tmp_path / 'queue.py'}", "model=vit_micro", "objective.size=64", "data.train=x"]
    build_objective(load("mae_vits16", [*options, "data.batch=16"]))
    for wrong in ("data.batch=24", "data.phases=[{step: 5, batch: 24}]"):
        with pytest.raises(
            ConfigError, match=r"a queue of 64 rows: the size must be a multiple of the 24 rows .*; write 72$"
        ):
            build_objective(load("mae_vits16", [*options, "data.batch=16", wrong]))
    Queue(48, DIM, per_sample=2).check_batch(24)
    with pytest.raises(ConfigError, match="a queue of 24 rows: the size must be a multiple of the 48 rows"):
        Queue(24, DIM, per_sample=2).check_batch(24)


# ---------------------------------------------------------------- as part of an objective
class Queued(MAE):
    """A MAE whose class tokens are also kept away from those of earlier batches."""

    def __init__(self, cfg, backbone):
        super().__init__(cfg, backbone)
        self.queue = Queue(32, self.backbone.embed_dim)

    def forward(self, batch, step):
        loss, logs = super().forward(batch, step)
        features = F.normalize(self.backbone(batch["image"]).cls.float(), dim=-1)  # [B, D]
        loss = loss + (features @ self.queue.rows.T / 0.2).logsumexp(1).mean()
        self.queue.hold(features, step)
        return loss, logs

    def after_step(self, step):
        self.queue.push(step, self.skipped)


def in_mode(mode: str, shards: Path, count: int) -> dict[str, Tensor]:
    """The queue after four steps, one of them skipped, as in a checkpoint; another engine that has loaded this state
    trains the last step."""
    device = torch.device("cpu")
    processes.start(mode, device)
    cfg = recipe_of("mae", shards, mode, {"parallel.micro_batch": 16 // count // 2})
    drawn = batches(cfg, shards, 8)
    parts = []  # the micro-batches of this rank, as a stream cuts a global batch of 16
    for pair in zip(drawn[::2], drawn[1::2], strict=True):
        own = {key: torch.cat([half[key] for half in pair]).chunk(count)[processes.rank()] for key in pair[0]}
        parts += [{key: value.chunk(2)[micro] for key, value in own.items()} for micro in range(2)]

    def begin() -> tuple[Engine, Guard]:
        torch.manual_seed(0)
        model = Queued(cfg.objective, lambda **changes: build_model(cfg.model, **changes))
        engine = build_engine(model, cfg, device)
        return engine, Guard(model, cfg.skip, device)

    engine, guard = begin()
    for step in range(3):
        one_step(engine, guard, parts[2 * step :], step, poison=step == 1)
    held = {key: value.clone() for key, value in engine.objective.queue.state_dict().items()}
    other, guard = begin()
    other.load_state_dict(engine.state_dict())
    assert all(torch.equal(value, held[key]) for key, value in other.objective.queue.state_dict().items())
    one_step(other, guard, parts[6:], 3)
    model = other.state_dict()["model"]
    processes.stop()
    return {key: model[f"queue.{key}"] for key in ("rows", "position")}


def rank_of_mode(mode: str, shards: Path, folder: Path) -> None:
    torch.save(in_mode(mode, shards, 2), folder / f"{processes.rank()}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("mode", sampled(["ddp", "fsdp2", "zero2", "zero3"], "fsdp2"))
def test_it_is_the_same_in_every_mode(mode: str, shards: Path, tmp_path: Path):
    alone = in_mode("single", shards, 1)
    assert int(alone["position"]) == 3 * 16 % 32
    started = [Forked(rank_of_mode, mode, shards, tmp_path, env=environment) for environment in environments(2)]
    assert wait(started) == 0
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), alone, rtol=1e-4, atol=1e-6)
