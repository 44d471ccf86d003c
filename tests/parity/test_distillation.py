"""Distillation: students compared with plain loops, also with other strides than the teacher's; students do not
influence each other; teachers of every kind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ConfigError, UserError
from pretrain.build import build_objective, build_stream, open_samples, placed
from pretrain.interchange import export
from pretrain.interchange.export import load as load_export
from pretrain.interchange.export_formats import opened_by, release
from pretrain.interchange.weight_sources import model_config
from pretrain.metrics import Board
from pretrain.models import families, timm_network
from pretrain.models.build import build_model
from pretrain.ops.randomness import named_generator
from pretrain.ops.resize_features import align_map, standardise
from pretrain.ops.similarity_distillation import relation_loss
from pretrain.ops.sync_norm import BatchNorm
from pretrain.train import train
from tests.conftest import sampled, tiny_recipe, variants
from tests.parity.test_losses import assert_same, naive_dino, naive_ibot, naive_koleo, naive_sinkhorn, noise, normal

SMALL_STUDENTS = "objective.students=[vit dim=24 depth=2 heads=2 image_size=32 patch_size=4 drop_path=0.5, convnext_micro drop_path=0.5]"


# ---------------------------------------------------------------- alignment
def centres(h: int, w: int) -> Tensor:
    """The centres of the cells of a grid, [1, h·w, 2] in [0, 1]."""
    rows, columns = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
    return torch.stack([rows, columns], -1).view(1, h * w, 2)


@pytest.mark.parametrize("target", [(2, 4), (4, 4), (4, 8), (1, 1), (8, 16)])
def test_aligned_cells_cover_the_same_place(target: tuple[int, int]):
    found = align_map(centres(4, 8), (4, 8), target).view(*target, 2)
    expected = centres(*target).view(*target, 2)
    if target == (8, 16):  # at the border, nothing lies beyond
        found, expected = found[1:-1, 1:-1], expected[1:-1, 1:-1]
    torch.testing.assert_close(found, expected)


def test_standardise():
    x = 3 * normal(50, 4) + 2
    z = standardise(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0)
    assert standardise(torch.ones(3, 2)).isfinite().all()


def naive_relations(x: Tensor, z: Tensor, temperature: float) -> Tensor:
    """KL divergence of softmaxes over the other rows, computed row by row."""
    rows = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        p, q = (
            torch.stack([a[i] @ a[j] / (a[i].norm() * a[j].norm()) / temperature for j in others]).softmax(0)
            for a in (z, x)
        )
        rows.append((p * (p / q).log()).sum())
    return torch.stack(rows).mean()


def test_relations():
    z = normal(7, 5, seed=1)
    for temperature in (0.1, 1.0):
        assert_same(
            lambda x, t=temperature: relation_loss(x, z, t),
            lambda x, t=temperature: naive_relations(x, z, t),
            normal(7, 3),
        )
    same = relation_loss(3 * z, z, 0.1)  # lengths do not count
    assert abs(float(same)) < 1e-12
    with torch.autocast("cpu", torch.bfloat16):
        assert relation_loss(z.float(), z.float(), 0.1).dtype == torch.float32


def test_named_generator():
    def draws(names: list[str]) -> dict[str, float]:
        torch.manual_seed(5)
        out = {}
        for name in names:
            with named_generator(name):
                out[name] = torch.rand(()).item()
        out["after"] = torch.rand(()).item()
        return out

    both, one = draws(["a", "b"]), draws(["b"])
    assert both["b"] == one["b"] and both["a"] != both["b"] and both["after"] == one["after"]


# ---------------------------------------------------------------- losses
def setup(shards: Path, run: Path, *overrides: str) -> tuple:
    cfg = tiny_recipe("distillation", shards, run, *overrides)
    model = build_objective(cfg, start=True)
    stream = build_stream(cfg, model, open_samples(cfg))
    rows = {k: v[:4] for k, v in placed(model, stream.first(), torch.device("cpu")).items() if k[:5] != "mask_"}
    batch = rows | stream.batches.collated(rows)
    model.double()
    for seed, student in enumerate(model.students.values()):
        noise(student, seed)
    return model.eval(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


@pytest.mark.slow
def test_prototypes(shards: Path, tmp_path: Path):
    """Patches of 8 pixels, with a teacher whose patches have 4 pixels; computed crop by crop."""
    model, batch = setup(
        shards, tmp_path / "run", *variants("distillation", shards)[1], "objective.teacher_temperature=0.2"
    )
    teacher, student = model.teacher, model.students["model"]
    assert batch["mask"].shape == (4, 2, 64) and batch["mask"].sum() > 0
    t_cls, t_patch, s_global, s_local, s_patch, masks, spread = [], [], [], [], [], [], [[], []]
    for i in range(4):
        for g in range(2):
            crop = batch["global"][i, g][None]
            features = teacher["backbone"](crop)
            t_cls.append(teacher["dino_head"](features.cls)[0])
            cells = (
                F.avg_pool2d(features.tokens.transpose(1, 2).view(1, 48, 8, 8), 2).flatten(2).transpose(1, 2)[0]
            )  # [16, D]
            hidden = (
                batch["mask"][i, g].view(8, 8)[1::2, 1::2].flatten()
            )  # the cell under a centre between four: the one after
            masks.append(hidden)
            t_patch += [teacher["ibot_head"](cell[None])[0] for cell in cells[hidden]]
            own = student["backbone"](crop)
            s_global.append(student["dino_head"](own.cls)[0])
            s_patch += [student["ibot_head"](token[None])[0] for token in own.tokens[0][hidden]]
            spread[g].append(own.cls[0])
        s_local += [student["dino_head"](student["backbone"](crop[None]).cls)[0] for crop in batch["local"][i]]
    p_cls, p_patch = naive_sinkhorn(torch.stack(t_cls), 0.2), naive_sinkhorn(torch.stack(t_patch), 0.2)
    local, glob = naive_dino(
        torch.stack(s_global).view(4, 2, -1), torch.stack(s_local).view(4, 2, -1), p_cls.view(4, 2, -1), 0.1
    )
    ibot = naive_ibot(torch.stack(s_patch), p_patch, torch.stack(masks), 0.1)
    expected = local + glob + ibot + 0.1 * sum(naive_koleo(torch.stack(rows)) for rows in spread)
    loss, logs = model(batch, 0)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(logs["model/ibot"], ibot.detach(), rtol=1e-6, atol=0)
    parameters = list(student.parameters())
    for one, other in zip(*(torch.autograd.grad(x, parameters) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


def test_features(shards: Path, tmp_path: Path):
    model, batch = setup(
        shards,
        tmp_path / "run",
        "objective.patch_weight=0.5",
        "objective.relation_weight=0.7",
        "objective.relation_temperature=0.2",
    )
    teacher, student, crops = model.teacher["backbone"], model.students["model"], batch["global"].flatten(0, 1)
    seen = [teacher(crop[None]) for crop in crops]
    cls = torch.cat([f.cls for f in seen])
    cells = torch.cat(
        [F.avg_pool2d(f.tokens.transpose(1, 2).view(1, 48, 8, 8), 2).flatten(2).transpose(1, 2)[0] for f in seen]
    )
    z, z_cells = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-6).sqrt() for x in (cls, cells))

    def away(x: Tensor, y: Tensor) -> Tensor:
        return 1 - (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))

    own = [student["backbone"](crop[None]) for crop in crops]
    terms = [away(student["cls_head"](f.cls)[0], z[n]) for n, f in enumerate(own)]
    for i in range(4):
        for crop in batch["local"][i]:
            terms.append(
                away(student["cls_head"](student["backbone"](crop[None]).cls)[0], (z[2 * i] + z[2 * i + 1]) / 2)
            )
    patches = torch.cat(
        [away(student["patch_head"](f.tokens[0]), z_cells[16 * n : 16 * n + 16]) for n, f in enumerate(own)]
    )
    relations = naive_relations(torch.cat([f.cls for f in own]), z, 0.2)
    expected = torch.stack(terms).mean() + 0.5 * patches.mean() + 0.7 * relations
    loss, _ = model(batch, 0)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_students_do_not_know_of_each_other(shards: Path, tmp_path: Path):
    """With and without the other students, losses and weights after some steps are equal, although all students have
    drop path."""
    results = []
    for name, students in [
        ("all", SMALL_STUDENTS),
        ("two", SMALL_STUDENTS.replace("vit dim=24 depth=2 heads=2 image_size=32 patch_size=4 drop_path=0.5, ", "")),
        ("one", "objective.students=[]"),
    ]:
        run = train(
            tiny_recipe(
                "distillation",
                shards,
                tmp_path / name,
                *variants("distillation", shards)[1],
                students,
                "model.drop_path=0.5",
                "objective.local_size=32",
                "steps=3",
            )
        )
        exported = {
            p.name: load_export(p / "3")[0].state_dict() for p in (run / "export").iterdir() if not p.name.isdigit()
        }
        results.append(exported | {"model": load_export(run / "export" / "3")[0].state_dict()})
    everything, two, one = results
    assert (
        set(everything) == {"vit", "convnext_micro", "model"}
        and set(two) == {"convnext_micro", "model"}
        and set(one) == {"model"}
    )
    for fewer in (two, one):
        for name, state in fewer.items():
            assert all(torch.equal(value, everything[name][key]) for key, value in state.items()), name


# ---------------------------------------------------------------- teachers
@pytest.mark.slow
def test_a_teacher_of_transformers(shards: Path, tmp_path: Path):
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers as hf

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "patch_size": 8,
    }
    hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**sizes, num_register_tokens=4)).save_pretrained(tmp_path / "hf")
    options = [f"objective.teacher={tmp_path / 'hf'}", SMALL_STUDENTS, "objective.local_size=32", "steps=2"]
    run = train(tiny_recipe("distillation", shards, tmp_path / "run", *options))
    for path in (run / "export" / "2", run / "export" / "vit" / "2", run / "export" / "convnext_micro" / "2"):
        encoder, about = load_export(path)
        assert encoder(torch.randn(1, 3, 32, 32)).cls.isfinite().all() and about["step"] == 2
    assert about["student"] == "convnext_micro"


@pytest.mark.slow
@pytest.mark.parametrize(("unit", "norms"), [("true", "true"), ("false", "false")])
def test_a_teachers_heads_are_those_of_its_run(shards: Path, tmp_path: Path, unit: str, norms: str):
    """Sizes of the heads, weights, batch norms, which use their running statistics, and whether prototypes are
    normalised; the students' new heads are of the same kind."""
    options = ["objective.gram_teacher=none", "objective.gram_size=512", f"objective.unit_prototypes={unit}"]
    options += [f"objective.head_norms={norms}"]
    options += ["objective.ibot_prototypes=32", "objective.ibot_hidden=48", "objective.ibot_bottleneck=16", "steps=1"]
    run = train(tiny_recipe("dinov3", shards, tmp_path / "run", *options))
    source = build_objective(tiny_recipe("dinov3", shards, tmp_path / "x", *options, f"init.run={run}"), start=True)
    teacher = ["objective.loss=prototypes", f"objective.teacher={run}"]
    model = build_objective(tiny_recipe("distillation", shards, tmp_path / "x", *teacher), start=True)
    x = normal(5, 32).float()
    for module in source.teacher.modules():
        if isinstance(module, BatchNorm):
            module.batch_statistics = False
    source.teacher.eval()
    for name in ("dino_head", "ibot_head"):
        expected, student = source.teacher[name](x), model.students["model"][name]
        assert torch.equal(model.teacher[name](x), expected)
        assert student(x).shape == expected.shape and student.normalised == (unit == "true")


@pytest.mark.slow
def test_a_teacher_of_any_kind(shards: Path, tmp_path: Path):
    """A convolutional network whose cells are larger than the student's; a ViT whose patches do not divide local
    crops, which a teacher does not get."""
    for name, options, size, grid in (
        ("convnext_micro", {"image_size": 64}, 64, (2, 2)),
        ("resnet_micro", {}, 64, (8, 8)),
        ("vit", {"dim": 32, "heads": 2, "depth": 1, "patch_size": 14, "image_size": 56}, 56, (4, 4)),
    ):
        cfg = model_config(name, options, "")
        about = {"step": 1, "objective": "mae", "pool": "cls"}
        export.write(tmp_path / name, build_model(cfg), about, [0.5] * 3, [0.25] * 3)
        sizes = [f"objective.teacher={tmp_path / name}", f"model.image_size={size}"]
        cfg = tiny_recipe("distillation", shards, tmp_path / "run", *sizes)
        objective = build_objective(cfg, start=True)
        batch = next(build_stream(cfg, objective, open_samples(cfg)))
        assert set(batch) == {"id", "global", "local"}  # no masks: features are compared on all patches
        there = placed(objective, batch, torch.device("cpu"))
        assert objective.teacher["backbone"](there["global"].flatten(0, 1)).grid == grid
        loss, _ = objective(there, 0)
        assert loss.isfinite()


def test_refusals(shards: Path, tmp_path: Path):
    cases = [
        (
            ["objective.students=[convnext_micro]"],
            ConfigError,
            "objective.local_size = 16 pixels is less than one cell .32. of convnext_micro",
        ),
        (["objective.loss=prototypes"], UserError, "has no dino_head, only a backbone; write objective.loss=features"),
        (["objective.students=[convnext_micro]", "model.image_size=40"], ConfigError, "= 40 pixels .* cells of 32"),
        (
            ["objective.local_size=20"],
            ConfigError,
            "local_size = 20 pixels does not divide into model.s patches of 8",
        ),
        (["objective.students=[gpt_micro]"], ConfigError, "gpt_micro: reads text, but model.in_channels = 3"),
        (["objective.students=[vit_tiny depth=1 in_channels=1]"], ConfigError, "vit_tiny: reads images of 1 channels"),
        (
            ["model.in_channels=1", "data.mean=[0.5]", "data.std=[0.2]"],
            ConfigError,
            "objective.teacher = .*: reads images of 3 channels, but .* = 1",
        ),
        (["objective.students=[vit_smal]"], ConfigError, "no such model; did you mean"),
        (["objective.students=[vit_small depht=3]"], ConfigError, "no such key; did you mean"),
    ]
    for overrides, kind, message in cases:
        with pytest.raises(kind, match=message):
            build_objective(tiny_recipe("distillation", shards, tmp_path / "run", *overrides), start=True)
    cfg = tiny_recipe("distillation", shards, tmp_path / "run")
    cfg.objective.teacher = ""
    with pytest.raises(ConfigError, match=r"objective\.teacher is empty"):
        build_objective(cfg)


@pytest.mark.slow
def test_students_are_scored(shards: Path, tmp_path: Path):
    scored = [f"eval.gallery={shards}", f"eval.test={shards}", "eval.final=[knn]", "eval.pixels=false"]
    run = train(
        tiny_recipe(
            "distillation", shards, tmp_path / "run", SMALL_STUDENTS, "objective.local_size=32", "steps=1", *scored
        )
    )
    from launch import watch
    from launch.due_evaluations import due, name_of
    from pretrain.recipes.recipe import load
    from pretrain.run_folder.jsonl_rows import read_rows

    board = Board(run / "tensorboard")
    (run / "results.jsonl").unlink()  # the rows of the training's own scoring, which are not written twice
    for job in due(run, load(run)):
        watch.score(run, load(run), *job, board, "cpu")
        assert name_of(job[0]) == read_rows(run / "results.jsonl")[-1]["model"]
    rows = {(r["model"], r["step"]) for r in read_rows(run / "results.jsonl")}
    assert rows == {
        ("untrained", 0),
        ("pretrained", 1),
        ("vit", 0),
        ("vit", 1),
        ("convnext_micro", 0),
        ("convnext_micro", 1),
    }
    assert "| test | knn | accuracy |" in (run / "export" / "vit" / "1" / "README.md").read_text()


TIMM = ["convnext_atto", "mobilenetv3_small_050", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]


@pytest.mark.parametrize("architecture", sampled(TIMM, "convnext_atto", others=pytest.mark.slow))
@torch.no_grad()
def test_networks_of_timm(tmp_path: Path, architecture: str):
    """Tokens are at the right positions, another input size works (except for Swin), and timm opens the exports."""
    import timm

    from pretrain.interchange import export

    cfg = families.Timm(architecture=architecture, image_size=224 if "swin" in architecture else 64)
    cfg.name = "timm"
    body = build_model(cfg).eval()
    x = torch.randn(2, 3, body.image_size, body.image_size)
    features, side = body(x), body.image_size // body.patch_size
    assert features.grid == (side, side) and features.tokens.shape == (2, side * side, body.embed_dim)
    assert features.cls.shape == (2, body.embed_dim) and features.cls.isfinite().all()
    if "swin" not in architecture:
        assert body([x, x[..., :32, :32]])[1].grid == (32 // body.patch_size, 32 // body.patch_size)
    export.write(tmp_path / "out", body, {"step": 1, "objective": "distillation", "pool": "cls"}, [0.5] * 3, [0.25] * 3)
    assert torch.equal(load_export(tmp_path / "out")[0](x).tokens, features.tokens)
    assert opened_by(tmp_path / "out")[0] == "timm"
    if "vit" not in architecture:  # whose size timm is to be told
        theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        torch.testing.assert_close(theirs.forward_features(x), body.network.forward_features(x))
    assert release(tmp_path / "out", ["timm"])[0].endswith("opened again, features within 0e+00 of ours")
    for options in ({"mask": torch.zeros(2, 4)}, {"layers": 2}):
        with pytest.raises(ValueError, match="a network of timm takes no mask"):
            body(x, **options)


def test_batch_norms_of_timm():
    """In one process they compute what timm's do, in training and in evaluation; others are refused."""
    import timm

    for architecture in ("test_resnet", "test_efficientnet"):
        body: Any = build_model(families.Timm(architecture, image_size=32))
        theirs = timm.create_model(architecture, num_classes=0)
        theirs.load_state_dict(body.network.state_dict())
        x = torch.randn(4, 3, 32, 32)
        for mode in (True, False):
            assert torch.equal(body.train(mode)(x).cls, theirs.train(mode)(x))
        assert all(torch.equal(theirs.state_dict()[k], v) for k, v in body.network.state_dict().items())
        norms = [m for m in body.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms and all(isinstance(m, BatchNorm) for m in norms)
    for norm in (timm.layers.SplitBatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)):
        with pytest.raises(ValueError, match=r"0 is a \w*BatchNorm2d whose statistics cannot be those of all ranks"):
            timm_network.synchronise(nn.Sequential(norm))


@pytest.mark.slow
def test_students_of_timm(shards: Path, tmp_path: Path):
    options = [
        "objective.students=[timm architecture=mobilenetv3_small_050 image_size=32]",
        "objective.local_size=32",
        "steps=2",
    ]
    run = train(tiny_recipe("distillation", shards, tmp_path / "run", *options))
    encoder, about = load_export(run / "export" / "timm" / "2")
    assert encoder.cfg.architecture == "mobilenetv3_small_050" and about["student"] == "timm"
    assert "timm.create_model" in (run / "export" / "timm" / "2" / "README.md").read_text()
    with pytest.raises(ConfigError, match="timm has no such model"):
        build_objective(
            tiny_recipe("distillation", shards, tmp_path / "x", "objective.students=[timm architecture=nothing]")
        )
