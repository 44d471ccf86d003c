"""Every objective trains in the same way in every mode: losses, gradient norms and weights on two and four processes
equal those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.local import environments, wait
from pretrain.objectives import finder
from tests.conftest import reads_text, tiny_recipe
from tests.forked import Forked
from tests.parallel import modes
from tests.parallel.modes import LR

MODES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "single": ("single", 1, {}),
    "ddp2": ("ddp", 2, {}),
    "fsdp2": ("fsdp2", 2, {}),
    "fsdp2-alone": ("fsdp2", 1, {}),
    "hsdp2x2": ("fsdp2", 4, {"parallel.replicate": 2}),
    "zero1": ("zero1", 2, {}),
    "zero2": ("zero2", 2, {}),
    "zero3": ("zero3", 2, {}),
    "recompute": ("fsdp2", 2, {"parallel.recompute": "full"}),
    "selective": ("ddp", 2, {"parallel.recompute": "selective"}),
    "fsdp2-offload": ("fsdp2", 2, {"parallel.offload": True}),
    "zero2-offload": ("zero2", 2, {"parallel.offload": True}),
    "single-bf16": ("single", 1, {"precision": "bf16"}),
    "ddp2-bf16": ("ddp", 2, {"precision": "bf16"}),
    "fsdp2-bf16": ("fsdp2", 2, {"precision": "bf16"}),
    "zero2-bf16": ("zero2", 2, {"precision": "bf16"}),
    "zero3-bf16": ("zero3", 2, {"precision": "bf16"}),
}
ALONE = ("single", "single-bf16")
LARS = {"optim.name": "lars", "optim.trust": 1.0}  # so large that a wrong norm shows after four steps
# One objective for each property: byol has a teacher with batch norms of its own, moco a queue, simclr couples the batch and has batch norm, dinov3 has an averaged teacher, Sinkhorn and Gram anchoring, gpt a count of
# targets that differs by process and tied weights, distillation a frozen teacher, mae buffers, vqvae a codebook, context_encoder convolutions and a discriminator with a learning rate of its own, bestrq
# relative positions and depthwise convolutions.
IN_CI: dict[str, tuple[str, ...]] = {
    "single": (
        "mae",
        "clip",
        "siglip",
        "simclr",
        "dinov3",
        "gpt",
        "distillation",
        "byol",
        "moco",
        "vqvae",
        "context_encoder",
        "bestrq",
    ),
    "ddp2": ("simclr", "dinov3", "gpt", "distillation", "byol", "siglip"),
    "fsdp2": ("clip", "simclr", "dinov3", "gpt", "distillation", "mae", "moco", "vqvae", "context_encoder"),
    "fsdp2-alone": ("dinov3", "siglip"),  # siglip logs a parameter itself
    "hsdp2x2": ("dinov3",),
    "zero1": ("gpt",),
    "zero2": ("simclr",),
    "zero3": ("dinov3", "gpt", "vqvae", "context_encoder", "bestrq"),
    "recompute": ("dinov3",),
    "selective": ("mae",),
    "fsdp2-offload": ("dinov3",),
    "zero2-offload": ("mae",),
    "single-bf16": ("simclr", "dinov3", "gpt"),
    "ddp2-bf16": ("gpt",),
    "fsdp2-bf16": ("dinov3", "simclr", "distillation", "bestrq"),
    "zero2-bf16": ("gpt",),
    "zero3-bf16": ("dinov3",),
}


def run(mode: str, shards: Path, folder: Path, names: list[str], **more: Any) -> list[dict[str, Any]]:
    """The results of each process for the objectives, in rank order."""
    kind, count, options = MODES[mode]
    for name in names:  # what their options name is made before several processes look for it
        tiny_recipe(name, shards, folder)
    started = [
        Forked(modes.main, shards, kind, {**options, **more}, folder, names, env=environment)
        for environment in environments(count)
    ]
    assert wait(started) == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, shards: Path, tmp_path_factory: pytest.TempPathFactory):
    """{mode: results of its processes}. Each mode is started once, for all objectives that the selected tests use in
    it."""
    known: dict[str, list[dict[str, Any]]] = {}
    selected = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    pairs = {(params["mode"], params["name"]) for params in selected if "name" in params}

    def get(mode: str) -> list[dict[str, Any]]:
        if mode not in known:
            alone = mode in ALONE  # what the other modes are compared with
            names = sorted({name for other, name in pairs if alone or other == mode})
            known[mode] = run(mode, shards, tmp_path_factory.mktemp(mode), names)
        return known[mode]

    return get


def cases(*modes: str) -> pytest.MarkDecorator:
    """(mode, name) of every mode and objective. `make test` runs those in IN_CI, `make test-matrix` the others. The
    tests of a mode share its processes."""
    return pytest.mark.parametrize(
        ("mode", "name"),
        [
            pytest.param(
                mode, name, marks=[pytest.mark.xdist_group(mode), *[pytest.mark.matrix] * (name not in IN_CI[mode])]
            )
            for mode in modes
            for name in finder.names()
        ],
    )


def close(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float, weights: float) -> None:
    for key in ("loss", "validated", "norm", "logs"):
        expected = torch.tensor(theirs[key])
        torch.testing.assert_close(torch.tensor(ours[key]), expected, rtol=tolerance, atol=tolerance / 10)
    close_weights(ours, theirs, weights)


def close_weights(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    assert ours["weights"].keys() == theirs["weights"].keys()
    name, away = max(distances(ours, theirs).items(), key=lambda item: item[1])
    assert away < tolerance, f"{name}: {away}"


def distances(ours: dict[str, Any], theirs: dict[str, Any], kind: str = "weights") -> dict[str, float]:
    """The distance of each weight from that of the other run, relative to its size. A weight without a gradient
    differs only by rounding. Of the rows of a queue, the products are compared: the micro-batches here are cut so that
    processes hold the rows of a step in another order."""
    out = {}
    for name in ours[kind]:
        value, other = ours[kind][name].double(), theirs[kind][name].double()
        if name in theirs["queues"]:
            value, other = value.T @ value, other.T @ other
        out[name] = float((value - other).norm() / (other.norm() + LR * other.numel() ** 0.5))
    return out


@pytest.mark.slow
@cases(*[m for m in MODES if "bf16" not in m and m != "single"])
def test_the_same_in_every_mode(mode: str, name: str, found):
    """To 1e-5. SimCLR with selective recomputation to 2e-5, because that uses other operations, and its batch norm
    divides almost equal features by their small spread."""
    alone = found("single")[0][name]
    assert len(alone["validated"]) == (modes.STEPS if reads_text(name) else 0)
    tolerance = 2e-5 if (mode, name) == ("selective", "simclr") else 1e-5
    for rank, process in enumerate(found(mode)):
        close(process[name], alone, tolerance, 1e-5)
        exported = process[name]["exports"]
        assert exported.keys() == (alone["exports"].keys() if rank == 0 else set())
        away = distances(process[name], alone, "exports")
        assert max(away.values(), default=0.0) < 1e-5, max(away, key=lambda key: away[key])


@pytest.mark.slow
@cases(*MODES)
def test_a_value_that_is_not_finite_on_one_process_changes_nothing_on_any(mode: str, name: str, found):
    """Weights, buffers, teacher and optimizer state are bit-equal before and after that step; the next step trains."""
    for process in found(mode):
        assert process[name]["skipped"] == 1.0 and not process[name]["changed"] and not process[name]["stuck"]


@pytest.mark.slow
@cases(*[m for m in MODES if "bf16" in m and m != "single-bf16"])
def test_bf16_is_the_same_within_its_rounding(mode: str, name: str, found):
    """The measure is the distance between bf16 and fp32 on one process. Losses and gradient norms agree to 1 %, or to
    four times that distance, and weights to 5 %, or to four times it; FSDP2 rounds the weights, too, and a rounded
    distance may choose another code. Logged
    values agree to 2 %, or to four times the distance, or to one of the 16 samples, of which some are shares.

    Batch norm in a head divides the almost equal features of an untrained network by their small spread, and so
    magnifies rounding: two runs in bf16 differ after the first update, and only loss and gradient norm of the first
    step agree, to 5 %, or to four times the distance."""
    alone, exact = found("single-bf16")[0][name], found("single")[0][name]
    has_batch_norm = any(key.endswith("running_var") for key in alone["weights"])
    steps = 1 if has_batch_norm else modes.STEPS

    def agree(ours: dict[str, Any], key: str, tolerance: float, atol: float = 0.0) -> None:
        values, bf16, fp32 = (torch.tensor(one[key][:steps]).double() for one in (ours, alone, exact))
        rounding = (bf16 - fp32).abs().amax(0)  # the largest of all steps
        allowed = (tolerance * bf16.abs()).clamp_min(atol).maximum(4 * rounding)
        assert ((values - bf16).abs() <= allowed).all(), f"{key}: {values} is not {bf16} ± {allowed}"

    for ours in (process[name] for process in found(mode)):
        for key in ("loss", "norm"):
            agree(ours, key, 5e-2 if has_batch_norm else 1e-2)
        if not has_batch_norm:
            if alone["validated"]:
                agree(ours, "validated", 1e-2)
            agree(ours, "logs", 2e-2, atol=1 / (modes.BATCH * modes.ACCUMULATE) + 1e-6)
            close_weights(ours, alone, max(5e-2, 4 * max(distances(alone, exact).values())))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        *[(mode, {"optim.name": "muon"}) for mode in ("ddp2", "fsdp2", "hsdp2x2")],
        ("hsdp2x2", LARS),
        *[pytest.param(mode, LARS, marks=pytest.mark.matrix) for mode in ("ddp2", "fsdp2", "fsdp2-offload")],
    ],
    ids=lambda value: value if isinstance(value, str) else value["optim.name"],
)
def test_an_optimizer_of_whole_tensors_is_the_same_in_every_mode(
    mode: str, options: dict[str, Any], shards: Path, tmp_path: Path
):
    """Four processes shard the matrices of a ViT unevenly. A step that is not finite leaves the momentum bit-equal,
    too."""
    found = {}
    for name in ("single", mode):
        (tmp_path / name).mkdir()
        processes = run(name, shards, tmp_path / name, ["mae"], **options)
        found[name] = [process["mae"] for process in processes]
    for process in found[mode]:
        close(process, found["single"][0], 1e-5, 1e-5)
        assert process["skipped"] == 1.0 and not process["changed"] and not process["stuck"]
