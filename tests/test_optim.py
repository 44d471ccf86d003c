"""Parameter groups as {name: (lr, weight decay)}, frozen parameters, the interface of every optimizer, LARS compared
with its formula on one process and on two, and SGD compared with PyTorch's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from common import build_config, config
from common.errors import ConfigError
from launch.local import environments, wait
from pretrain.build import build_objective
from pretrain.models import families, presets
from pretrain.models.build import build_model
from pretrain.objectives.dinov2 import Config, DINOv2
from pretrain.ops.parameter_shards import whole
from pretrain.optim import optimizers
from pretrain.optim.groups import clip_groups, make_optimizer, parameter_groups, thaw
from pretrain.optim.lars import LARS
from pretrain.optim.sgd import SGD
from pretrain.parallel.engine import Engine
from pretrain.recipes import parallel_checks
from pretrain.recipes.sections import Optim
from pretrain.train import train
from tests.conftest import tiny_recipe
from tests.faults import killer
from tests.forked import Forked


def objective(**options: Any) -> DINOv2:
    model = families.ViT(image_size=32, patch_size=8, dim=32, depth=3, heads=4, registers=2, layer_scale=1e-5)
    torch.manual_seed(0)
    cfg = Config(prototypes=8, head_hidden=16, head_bottleneck=4, **options)
    return DINOv2(cfg, lambda **changes: build_model(model, **changes))


def rates(module: nn.Module, optimizer: torch.optim.Optimizer, lr: float, wd: float) -> dict[str, tuple[float, float]]:
    by_id = {id(p): (lr * g["lr_scale"], wd * g["wd_scale"]) for g in optimizer.param_groups for p in g["params"]}
    return {name: by_id[id(p)] for name, p in module.named_parameters() if id(p) in by_id}


def test_every_parameter():
    model = objective()
    found = rates(model.student, make_optimizer(model, Optim(layer_decay=0.5, patch_embed_lr=0.2)), 1.0, 0.1)
    body = {
        "cls_token": (0.0625, 0),
        "registers": (0.0625, 0),
        "mask_token": (0.0625, 0),
        "pos_embed": (0.0625, 0),
        "patch_embed.weight": (0.0125, 0.1),
        "patch_embed.bias": (0.0125, 0),
        "norm.weight": (1, 0),
        "norm.bias": (1, 0),
    }
    for i in range(3):
        rate = 0.5 ** (3 - i)
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            body |= {f"blocks.{i}.{part}.weight": (rate, 0.1), f"blocks.{i}.{part}.bias": (rate, 0)}
        for part in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            body[f"blocks.{i}.{part}"] = (rate, 0)
    expected = {f"backbone.{name}": pair for name, pair in body.items()}
    for head in ("dino_head", "ibot_head"):
        expected[f"{head}.prototypes"] = (1, 0.1)
        for i in (0, 2, 4):
            expected |= {f"{head}.mlp.{i}.weight": (1, 0.1), f"{head}.mlp.{i}.bias": (1, 0)}
    assert found == {name: pytest.approx(pair) for name, pair in expected.items()}
    assert len(parameter_groups(model, Optim())) == 2  # without factors: decayed or not

    found = rates(model.student, make_optimizer(model, Optim(decay_tokens=True)), 1.0, 0.1)
    decayed = {name for name, (_, decay) in found.items() if decay}
    tokens = {f"backbone.{name}" for name in ("cls_token", "registers", "mask_token", "pos_embed")}
    assert decayed == {name for name, (_, decay) in expected.items() if decay} | tokens


@pytest.mark.parametrize("tokens", [False, True])
def test_mask_tokens_of_a_predictor_decay_as_those_of_a_backbone(tokens: bool, shards: Path, tmp_path: Path):
    """I-JEPA's is a vector."""
    model = build_objective(tiny_recipe("ijepa", shards, tmp_path))
    found = rates(model, make_optimizer(model, Optim(decay_tokens=tokens)), 1.0, 0.1)
    assert {found[name][1] for name in ("mask_token", "backbone.cls_token")} == {0.1 if tokens else 0.0}


def test_the_trained_lengths_of_prototypes_decay_and_are_frozen_with_them():
    model = objective(trained_lengths=True)
    optimizer = make_optimizer(model, Optim(freeze_last_layer=3))
    lengths = {model.student[head].lengths for head in ("dino_head", "ibot_head")}
    groups = [group for group in optimizer.param_groups if lengths & {*group["params"]}]
    assert [(group["wd_scale"], group["frozen"]) for group in groups] == [(1.0, 3)]


def test_an_objective_scales_the_learning_rate_of_its_parts(shards: Path, tmp_path: Path):
    """The discriminator of a context encoder learns at a tenth of the rate of encoder and decoder."""
    model = build_objective(tiny_recipe("context_encoder", shards, tmp_path))
    found = rates(model, make_optimizer(model, Optim()), 1.0, 0.1)
    scales = {name: rate for name, (rate, _) in found.items()}
    assert scales == {name: 0.1 if name.startswith("discriminator.") else 1.0 for name in scales}
    assert set(scales.values()) == {0.1, 1.0}


@pytest.mark.parametrize("scope", ["global", "module", "tensor"])
def test_gradients_are_clipped_together_or_by_part(scope: str, shards: Path, tmp_path: Path):
    """The first moments of AdamW hold the clipped gradients, which equal those of a loop. One of the modules is below
    the limit; the norm that a step returns is that of all gradients before clipping."""
    cfg = tiny_recipe("dinov2", shards, tmp_path, "optim.clip=2.0", f"optim.clip_scope={scope}")
    objective = build_objective(cfg)
    engine = Engine(objective, cfg, torch.device("cpu"))
    sizes = {"backbone": 0.3, "dino_head": 1.0, "ibot_head": 1e-4}
    gradients = {}
    for number, (name, p) in enumerate(objective.student.named_parameters()):
        drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
        p.grad = gradients[name] = drawn * sizes[name.partition(".")[0]]
    part = {name: {"global": "", "module": name.partition(".")[0], "tensor": name}[scope] for name in gradients}
    squares = dict.fromkeys(part.values(), 0.0)
    for name, gradient in gradients.items():
        squares[part[name]] += float(gradient.double().square().sum())
    total = sum(squares.values()) ** 0.5
    norms = {name: s**0.5 for name, s in squares.items()}
    assert (min(norms.values()) < 2) == (scope != "global") and max(norms.values()) > 2
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    thaw(engine.optimizer, 0)
    assert float(engine.step(0.01, 0.05)) == pytest.approx(total, rel=1e-6)
    for name, p in objective.student.named_parameters():
        clipped = gradients[name] * min(1.0, 2 / (norms[part[name]] + 1e-6))
        torch.testing.assert_close(engine.optimizer.state[p]["exp_avg"], 0.1 * clipped, rtol=1e-5, atol=1e-9)


def test_modules_that_are_clipped_by_themselves():
    """Each backbone and each head, wherever they lie; the parameters of a module that has further modules belong to
    it."""
    body = build_model(families.ViT(image_size=32, patch_size=8, dim=32, depth=1, heads=4))
    tree = nn.ModuleDict({"students": nn.ModuleDict({"a": nn.ModuleDict({"backbone": body, "head": nn.Linear(2, 2)})})})
    tree.add_module("list", nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))]))
    tree.register_parameter("own", nn.Parameter(torch.zeros(1)))
    names = clip_groups(tree, Optim(clip=1.0, clip_scope="module"))
    assert {*names.values()} == {"", "students.a.backbone", "students.a.head", "list.0", "list.1"}
    assert names[tree.get_parameter("own")] == "" and names[body.blocks[0].mlp.fc1.weight] == "students.a.backbone"
    assert {*clip_groups(tree, Optim(clip=1.0)).values()} == {""}


@pytest.mark.parametrize(
    "name, embed", [("convnext_micro", "downsample_layers.0.0.weight"), ("resnet_micro", "stem.0.0.weight")]
)
def test_convolutional_networks(name: str, embed: str):
    cls, options = presets.choose(name)
    cfg = cls(**options)
    cfg.name = name
    body = build_model(cfg)
    found = rates(body, make_optimizer(body, Optim(layer_decay=0.5, patch_embed_lr=0.1)), 1.0, 1.0)
    blocks = sum(options["depths"])
    assert found[embed] == pytest.approx((0.1 * 0.5 ** (blocks + 1), 1.0))
    assert sorted({lr for lr, _ in found.values()})[-1] == pytest.approx(0.5 if name == "resnet_micro" else 1)
    transformers = Optim(layer_decay=0.5, patch_embed_lr=0.1, layer_decay_of="transformers")
    assert {lr for lr, _ in rates(body, make_optimizer(body, transformers), 1.0, 1.0).values()} == {1.0}
    vit = build_model(families.ViT(image_size=32, patch_size=8, dim=32, depth=1, heads=4))
    assert min(lr for lr, _ in rates(vit, make_optimizer(vit, transformers), 1.0, 1.0).values()) < 0.1


def test_freezing():
    model = objective()
    optimizer = make_optimizer(model, Optim(freeze_last_layer=3, freeze_backbone=5, layer_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.student.named_parameters()}
    for step, still in [(2, ("backbone.", "prototypes")), (3, ("backbone.",)), (5, ())]:
        thaw(optimizer, step)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 0.1 * group["lr_scale"], 0.1 * group["wd_scale"]
        for p in model.student.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for name, p in model.student.named_parameters():
            frozen = any(part in name for part in still)
            assert torch.equal(p, before[name]) == frozen, (step, name)


def test_a_head_says_which_of_its_layers_is_the_last():
    """In any objective: a module names its parameter."""

    class Head(nn.Linear):
        last_layer = "weight"

    module = nn.ModuleDict({"head": Head(2, 2), "other": nn.Linear(2, 2)})
    frozen = {id(p): g["frozen"] for g in parameter_groups(module, Optim(freeze_last_layer=5)) for p in g["params"]}
    assert {name: frozen[id(p)] for name, p in module.named_parameters()} == {
        **{"head.weight": 5, "head.bias": 0},
        **{"other.weight": 0, "other.bias": 0},
    }


def test_refusals():
    for options, message in [
        ({"layer_decay": 0.0}, "optim.layer_decay = 0.0"),
        ({"patch_embed_lr": -1.0}, "optim.patch_embed_lr"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build_config.build(Optim, options, {}, "optim.")
    with pytest.raises(ConfigError, match="no head of this objective has a `last_layer`"):
        parameter_groups(nn.Linear(2, 2), Optim(freeze_last_layer=5))


# ---------------------------------------------------------------- what every optimizer owes
def one_step(optimizer: torch.optim.Optimizer, fill: float | None, found: float) -> None:
    """A step with gradients that depend on the number of the parameter, or that all have one value."""
    for group in optimizer.param_groups:
        group.update(lr=0.1, weight_decay=0.1 * group["wd_scale"])
        for n, p in enumerate(group["params"]):
            drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
            p.grad = drawn if fill is None else torch.full_like(p, fill)
    optimizer.found_inf = torch.tensor(found)  # type: ignore[attr-defined]
    optimizer.step()


def test_names_are_files():
    assert optimizers.names() == ["adamw", "lars", "muon", "sgd"]
    classes = [optimizers.optimizer_class(name).__name__ for name in optimizers.names()]
    assert classes == ["AdamW", "LARS", "MuonAdamW", "SGD"]


@pytest.mark.parametrize("name", optimizers.names())
def test_a_step_with_found_inf_changes_nothing(name: str):
    model = objective().student
    optimizer = make_optimizer(model, Optim(name=name))
    parameters = list(model.parameters())
    one_step(optimizer, None, 0.0)

    def everything() -> list[Tensor]:
        return [p.detach().clone() for p in parameters] + [
            s.clone() for p in parameters for s in optimizer.state[p].values()
        ]

    before = everything()
    one_step(optimizer, float("nan"), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    one_step(optimizer, None, 0.0)
    moved = [not torch.equal(a, b) for a, b in zip(before, everything(), strict=True)]
    assert all(moved) and all(p.isfinite().all() for p in parameters)


@pytest.mark.parametrize("name", optimizers.names())
def test_state_is_what_its_names_say(name: str):
    """Tensors in the parameter's shape have these names, all other entries are scalars; before the first step the
    state is that of `begin`."""
    model = objective().student
    optimizer, found = make_optimizer(model, Optim(name=name)), set()
    one_step(optimizer, 0.0, 1.0)
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            shaped = {key for key, value in state.items() if value.shape == p.shape}
            assert shaped <= set(optimizer.state_names)
            assert all(state[key].ndim == 0 for key in state.keys() - shaped)
            if "zero" not in optimizer.unsupported:
                begun = optimizer.begin(p)
                assert begun.keys() == state.keys() and all(torch.equal(begun[key], state[key]) for key in begun)
            found |= shaped
    assert found == set(optimizer.state_names)


def test_what_lars_refuses(tmp_path: Path):
    cfg = tiny_recipe("mae", tmp_path, tmp_path, "optim.name=lars", "parallel.mode=zero2")
    with pytest.raises(ConfigError, match=r"optim.name = lars: .*; write parallel.mode=fsdp2, or optim.name=adamw"):
        parallel_checks.check(cfg, 2)
    parallel_checks.check(
        tiny_recipe("mae", tmp_path, tmp_path, "optim.name=lars", "parallel.mode=fsdp2", "parallel.offload=true"), 2
    )


# ---------------------------------------------------------------- LARS
SHAPES = {"matrix": (5, 4), "kernel": (2, 3, 2, 2), "row": (1, 4), "zero": (3, 2), "still": (4, 2), "bias": (5,)}
RATES = [(0.5, 0.1), (0.4, 0.1), (0.3, 0.2), (0.2, 0.05)]  # (lr, weight decay) of each step
SKIPPED, MOMENTUM, TRUST = 2, 0.8, 0.02


def numbers(name: str, step: int) -> Tensor:
    """Weights (step −1) and gradients. `zero` begins at 0, `still` has no gradient, the gradients of the skipped
    step are not finite."""
    seed = 100 * step + list(SHAPES).index(name)
    drawn = torch.randn(SHAPES[name], dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1000))
    if (name, step) == ("zero", -1) or (name == "still" and step >= 0):
        return torch.zeros_like(drawn)
    return drawn * torch.inf if step == SKIPPED else drawn


def lars_by_formula() -> dict[str, Tensor]:
    """Element by element, from the paper."""
    out = {}
    for name in SHAPES:
        weight = numbers(name, -1).flatten().tolist()
        velocity = [0.0] * len(weight)
        for step, (lr, wd) in enumerate(RATES):
            if step == SKIPPED:
                continue
            wd = 0.0 if name == "bias" else wd
            update = [g + wd * w for g, w in zip(numbers(name, step).flatten().tolist(), weight, strict=True)]
            length, size = (sum(x * x for x in values) ** 0.5 for values in (update, weight))
            ratio = TRUST * size / length if name != "bias" and size > 0 and length > 0 else 1.0
            velocity = [MOMENTUM * v + lr * ratio * u for v, u in zip(velocity, update, strict=True)]
            weight = [w - v for w, v in zip(weight, velocity, strict=True)]
        out[name] = torch.tensor(weight, dtype=torch.float64).view(SHAPES[name])
    return out


def train_with_lars(sharded: bool) -> dict[str, Tensor]:
    """The weights after all steps, gathered. With `sharded`, the processes have the rows that FSDP2 gives them, also
    unevenly, also none."""
    module = nn.ParameterDict({name: nn.Parameter(numbers(name, -1)) for name in SHAPES})
    if sharded:
        fully_shard(module, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    matrices = [p for name, p in module.items() if name != "bias"]
    groups = [{"params": matrices, "wd_scale": 1.0}, {"params": [module["bias"]], "wd_scale": 0.0}]
    optimizer = LARS(groups, MOMENTUM, TRUST)
    for step, (lr, wd) in enumerate(RATES):
        for group in optimizer.param_groups:
            group.update(lr=lr, weight_decay=wd * group["wd_scale"])
        for name, p in module.items():
            g = numbers(name, step)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if sharded else g
        optimizer.found_inf = torch.tensor(float(step == SKIPPED))
        optimizer.step()
    states = [s for p in module.values() for s in optimizer.state[p].values()]
    assert all(type(s) is (type(p.data) if sharded else Tensor) for s, p in zip(states, module.values(), strict=True))
    return {name: whole(p).detach() for name, p in module.items()}


def test_lars_is_its_formula():
    torch.testing.assert_close(train_with_lars(sharded=False), lars_by_formula(), rtol=1e-12, atol=1e-12)


def rank_of_lars(folder: str) -> None:
    dist.init_process_group("gloo")
    torch.save(train_with_lars(sharded=True), f"{folder}/{os.environ['RANK']}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_lars_of_shards_is_its_formula(tmp_path: Path):
    assert wait([Forked(rank_of_lars, str(tmp_path), env=environment) for environment in environments(2)]) == 0
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), lars_by_formula(), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_lars_goes_on_in_another_mode(shards: Path, tmp_path: Path):
    """One process resumes from a checkpoint of two processes with FSDP2, and equals a run that was one process from
    its start."""
    common = ["optim.name=lars", "optim.momentum=0.9", "optim.trust=1.0", "optim.lr=0.01", "checkpoint=4"]
    alone = train(tiny_recipe("mae", shards, tmp_path / "alone", *common))
    two = tmp_path / "two.yaml"
    cfg = tiny_recipe("mae", shards, tmp_path / "two", *common, "parallel.mode=fsdp2", "checkpoint.keep=2")
    two.write_text(config.dump(cfg))
    assert wait([Forked(killer.run, [str(two)], env=environment) for environment in environments(2)]) == 0
    resume = f"checkpoint.resume={tmp_path / 'two' / 'checkpoints' / '000000004'}"
    on = train(tiny_recipe("mae", shards, tmp_path / "on", *common, resume))
    found, expected = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (on, alone)
    )
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected[4:]], rel=1e-5)
    assert found[0]["step"] == 4 and found[-1]["step"] == 7


# ---------------------------------------------------------------- SGD
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_that_of_pytorch(nesterov: bool):
    """With a learning rate and a weight decay that change, and without the step that is skipped."""
    ours, theirs = ([nn.Parameter(numbers(name, -1)) for name in SHAPES] for _ in range(2))
    decayed = [{"params": ours[:-1], "wd_scale": 1.0}, {"params": ours[-1:], "wd_scale": 0.0}]
    optimizer = SGD(decayed, MOMENTUM, nesterov)
    reference = torch.optim.SGD([{"params": theirs[:-1]}, {"params": theirs[-1:]}], 1.0, MOMENTUM, nesterov=nesterov)
    for step, (lr, wd) in enumerate(RATES):
        for group, other, scale in zip(optimizer.param_groups, reference.param_groups, (1.0, 0.0), strict=True):
            group.update(lr=lr, weight_decay=wd * scale)
            other.update(lr=lr, weight_decay=wd * scale)
        for parameters in (ours, theirs):
            for name, p in zip(SHAPES, parameters, strict=True):
                p.grad = numbers(name, step)
        optimizer.found_inf = torch.tensor(float(step == SKIPPED))
        optimizer.step()
        if step != SKIPPED:
            reference.step()
    for p, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, other, rtol=1e-12, atol=1e-12)
