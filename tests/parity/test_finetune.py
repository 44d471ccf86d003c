"""Fine-tuning against the formula of its loss and against timm's augmentations, and its exports against transformers'
classes for image classification."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from common.errors import ConfigError, DataError, UserError
from data_pipeline.build.build_shards import build
from data_pipeline.views import rand_augment
from data_pipeline.views.mixing import pair_numbers
from data_pipeline.views.rand_augment import OPERATIONS, RandAugment, erased
from eval import logistic
from eval.run import evaluate
from pretrain.build import build_objective, open_samples, views
from pretrain.checkpoint.load import load_model
from pretrain.checkpoint.open_store import run_store
from pretrain.checkpoint.store import checkpoint_name
from pretrain.estimate import plan
from pretrain.interchange import export
from pretrain.interchange.weight_sources import classifier_of
from pretrain.models import presets
from pretrain.objectives.finetune import mixed
from pretrain.ops.low_rank import add_low_rank, merge_low_rank
from pretrain.recipes.recipe import load
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.train import train
from tests.conftest import tiny_recipe
from tests.parity.test_catalogue import agrees, made
from tests.parity.test_losses import normal
from tests.tars import jpeg, write_tar

# pixels outside of the box, label; the pairs are mixed up, pasted, and mixed up
SHARES = torch.tensor([[0.3, 0.3], [0.3, 0.3], [1.0, 0.8125], [1.0, 0.8125], [0.9, 0.9], [0.9, 0.9]])
BOXES = torch.tensor([[0] * 4, [0] * 4, [4, 20, 20, 32], [4, 20, 20, 32], [0] * 4, [0] * 4])
MIXED: dict[str, Any] = {"classes": 5, "pool": "mean", "label_smoothing": 0.2}


def mixed_batch() -> dict[str, Tensor]:
    shares = SHARES.double()
    return {
        "image": normal(6, 3, 32, 32),
        "label": torch.tensor([0, 4, 1, 1, 3, 2]),
        "mix_share": shares,
        "mix_box": BOXES,
    }


def naive_finetune(model: Any, batch: dict[str, Tensor]) -> Tensor:
    total: Any = 0
    for n, image in enumerate(batch["image"]):
        partner = n + 1 if n % 2 == 0 else n - 1
        pixels, share = batch["mix_share"][n]
        top, bottom, left, right = batch["mix_box"][n].tolist()
        x = pixels * image + (1 - pixels) * batch["image"][partner]
        is_pasted = torch.zeros(32, 32, dtype=torch.bool)
        is_pasted[top:bottom, left:right] = True
        x = torch.where(is_pasted, batch["image"][partner], x)
        logits = model.head.weight @ model.backbone(x[None]).tokens[0].mean(0) + model.head.bias
        target = torch.full((5,), 0.2 / 5, dtype=torch.float64)
        target = target + 0.8 * (
            share * torch.eye(5, dtype=torch.float64)[batch["label"][n]]
            + (1 - share) * torch.eye(5, dtype=torch.float64)[batch["label"][partner]]
        )
        total = total - sum(t * (z.exp() / logits.exp().sum()).log() for t, z in zip(target, logits, strict=True))
    return total / len(batch["image"])


def test_it_computes_its_formula():
    agrees(made("finetune", **MIXED), mixed_batch(), naive_finetune, constant=("mix_share",))


def test_without_mixing_it_is_the_cross_entropy():
    model = made("finetune", classes=5, pool="cls", mixup=0.0, cutmix=0.0, label_smoothing=0.1)
    batch = {"image": normal(3, 3, 32, 32), "label": torch.tensor([0, 4, 1])}  # an odd number
    logits = model.head(model.backbone(batch["image"]).cls)
    loss, logs = model(batch, 0)
    expected = nn.functional.cross_entropy(logits, batch["label"], label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert logs["accuracy"] == (logits.argmax(1) == batch["label"]).float().mean()


def test_segmentation_computes_its_formula():
    """With bilinear weights of its own; some pixels have no class."""
    mask = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (2, 32, 32)))
    mask[0, :9], mask[1, :, 30:] = -100, -100
    batch = {"image": normal(2, 3, 32, 32), "mask": mask}

    def naive(model: Any, batch: dict[str, Tensor]) -> Tensor:
        side = 32 // model.backbone.patch_size
        place = ((torch.arange(32).double() + 0.5) / model.backbone.patch_size - 0.5).clamp(0, side - 1)
        weights = (1 - (place[:, None] - torch.arange(side)).abs()).clamp(min=0)  # [32, side]
        total: Any = 0
        for image, classes in zip(batch["image"], batch["mask"], strict=True):
            maps = (model.backbone(image[None]).tokens[0] @ model.head.weight.T + model.head.bias).view(side, side, 3)
            logits = torch.einsum("yi,xj,ijk->yxk", weights, weights, maps)
            p = logits.exp() / logits.exp().sum(-1, keepdim=True)
            total = total - sum(p[..., k][classes == k].log().sum() for k in range(3))
        return total / (batch["mask"] >= 0).sum()

    agrees(made("finetune_segmentation", classes=3), batch, naive)


@pytest.mark.parametrize(
    "kind", [{"mixup_alpha": 0.8}, {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}], ids=["mixup", "cutmix"]
)
def test_a_pair_is_mixed_as_timm_mixes_a_batch_of_two(kind: dict[str, float], monkeypatch: pytest.MonkeyPatch):
    from timm.data.mixup import Mixup
    from timm.loss import SoftTargetCrossEntropy

    model = made("finetune", classes=5, label_smoothing=0.1)
    images, label = normal(2, 3, 32, 32), torch.tensor([3, 1])
    np.random.seed(1)
    theirs, target = Mixup(**kind, label_smoothing=0.1, num_classes=5)(images.clone(), label)
    np.random.seed(1)  # draw the same λ, and the same box
    np.random.rand()
    share = np.random.beta(*[max(kind.values())] * 2)
    box = [0, 0, 0, 0]
    if "cutmix_alpha" in kind:
        side = int(32 * np.sqrt(1 - share))
        y, x = np.random.randint(0, 32), np.random.randint(0, 32)
        box = [y - side // 2, y + (side + 1) // 2, x - side // 2, x + (side + 1) // 2]
        box = np.clip(box, 0, 32).tolist()
    pixels = 1.0 if any(box) else share
    share = 1 - (box[1] - box[0]) * (box[3] - box[2]) / 1024 if any(box) else share
    shares, boxes = torch.tensor([[pixels, share]] * 2), torch.tensor([box] * 2)
    torch.testing.assert_close(mixed(images, shares[:, 0], boxes), theirs)
    expected = SoftTargetCrossEntropy()(model.logits(theirs), target.double())
    loss, _ = model({"image": images, "label": label, "mix_share": shares, "mix_box": boxes}, 0)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


# ---------------------------------------------------------------- augmentations
def sample(slot: int, step: int = 3) -> dict[str, Any]:
    return {"seed": 5, "step": step, "slot": slot}


def test_the_two_of_a_pair_have_the_same_numbers():
    kinds = set()
    for pair in range(200):
        first, second = (pair_numbers(sample(2 * pair + n), 32, 0.8, 1.0) for n in (0, 1))
        assert all(np.array_equal(first[key], second[key]) for key in first)
        (pixels, share), (top, bottom, left, right) = first["mix_share"], first["mix_box"]
        pasted = pixels == 1 and share < 1
        kinds.add(pasted)
        assert 0 <= top <= bottom <= 32 and 0 <= left <= right <= 32 and 0 <= share <= 1
        if pasted:
            assert share == pytest.approx(1 - (bottom - top) * (right - left) / 1024, abs=1e-6)
        else:
            assert pixels == share and not first["mix_box"].any()
    assert kinds == {True, False}
    assert not np.array_equal(
        pair_numbers(sample(0), 32, 0.8, 0)["mix_share"], pair_numbers(sample(0, 4), 32, 0.8, 0)["mix_share"]
    )
    assert all(pair_numbers(sample(2 * n), 32, 0.8, 0)["mix_share"][0] < 1 for n in range(20))
    assert all(pair_numbers(sample(2 * n), 32, 0, 1.0)["mix_share"][0] == 1 for n in range(20))


THEIRS = {
    "auto_contrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert", "rotate": "Rotate",
    "posterize": "PosterizeIncreasing", "solarize": "SolarizeIncreasing", "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing", "contrast": "ContrastIncreasing", "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing", "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_timms(name: str, photos: Path, monkeypatch: pytest.MonkeyPatch):
    from timm.data import auto_augment

    assert list(THEIRS.values()) == auto_augment._RAND_INCREASING_TRANSFORMS and list(THEIRS) == list(OPERATIONS)
    image, fill = Image.open(photos / "flower" / "03.jpg"), (124, 116, 104)
    options = {"img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
    for magnitude in (0.0, 3.3, 9.0, 9.9):
        for sign in (1.0, -1.0):
            monkeypatch.setattr(random, "random", lambda sign=sign: 0.4 if sign > 0 else 0.6)
            expected = auto_augment.AugmentOp(THEIRS[name], prob=1.0, magnitude=magnitude, hparams=options)(image)
            ours = OPERATIONS[name](image, magnitude / 10, sign, fill)
            assert np.array_equal(np.asarray(ours), np.asarray(expected)), (magnitude, sign)


def test_the_strongest_posterize_keeps_nothing(photos: Path):
    image = Image.open(photos / "flower" / "03.jpg")
    assert not np.asarray(OPERATIONS["posterize"](image, 1.0, 1.0, (0, 0, 0))).any()


def test_rand_augment_draws_two_operations(photos: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, float, float]] = []

    def record(name: str) -> rand_augment.Operation:
        return lambda image, strength, sign, fill: calls.append((name, strength, sign)) or image  # type: ignore[func-returns-value]

    monkeypatch.setattr(rand_augment, "OPERATIONS", {name: record(name) for name in OPERATIONS})
    view, rng = np.asarray(Image.open(photos / "china" / "00.jpg")).transpose(2, 0, 1), np.random.default_rng(0)
    augment, count = RandAugment(9.0, (0.485, 0.456, 0.406)), 2000
    assert augment.fill == (124, 116, 104)
    for _ in range(count):
        assert np.array_equal(augment(view, rng), view)
    assert len(calls) / count == pytest.approx(1.0, abs=0.07)  # half of two
    assert {name for name, _, _ in calls} == set(OPERATIONS) and {sign for _, _, sign in calls} == {-1.0, 1.0}
    strengths = np.array([strength for _, strength, _ in calls])
    assert strengths.max() == 1.0 and strengths.mean() == pytest.approx(0.9, abs=0.01) and 0.03 < strengths.std() < 0.06


def test_random_erasing():
    view, mean, std = np.full((3, 40, 40), 7, np.uint8), (0.5, 0.4, 0.3), (0.1, 0.2, 0.1)
    rng = np.random.default_rng(0)
    assert erased(view, 0.0, mean, std, rng) is view
    views = [erased(view, 0.25, mean, std, rng) for _ in range(400)]
    changed = [(one != 7).any(0) for one in views if one is not view]
    assert len(changed) / 400 == pytest.approx(0.25, abs=0.07) and (view == 7).all()
    for region in changed:
        rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
        area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert region.sum() > 0.95 * area and 0.01 < area / 1600 < 0.36
    pixels = np.concatenate([one[:, (one != 7).all(0)] for one in views if one is not view], axis=1)
    assert pixels.mean(1) == pytest.approx(255 * np.array(mean), rel=0.02)
    assert pixels.std(1) == pytest.approx(255 * np.array(std), rel=0.1)  # of the second a part is cut off


# ---------------------------------------------------------------- classes, labels, pairs
@pytest.mark.slow
def test_classes_come_from_the_shards_and_the_feature_from_the_export(shards: Path, tmp_path: Path):
    start = train(tiny_recipe("mae", shards, tmp_path / "mae", "steps=1")) / "export" / "1"
    auto = ["objective.classes=auto", "steps=1"]
    run = train(tiny_recipe("finetune", shards, tmp_path / "run", *auto, f"init.backbone={start}"))
    stored = load(run)
    assert stored.objective.classes == 2 and stored.objective.pool == "mean"  # type: ignore[attr-defined]
    assert json.loads((run / "export" / "1" / "config.json").read_text())["id2label"] == {"0": "china", "1": "flower"}
    random_start = train(tiny_recipe("finetune", shards, tmp_path / "other", *auto))
    assert load(random_start).objective.pool == "cls"  # type: ignore[attr-defined]


def test_shards_that_name_no_classes_need_a_number(shards: Path, tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"objective.classes = auto: not all shards name classes; write objective.class"
    ):
        build_objective(tiny_recipe("finetune", shards, tmp_path, "objective.classes=auto"))


def test_more_classes_than_the_head_has_are_refused(photos: Path, shards: Path, tmp_path: Path):
    (tmp_path / "images").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "images" / name).symlink_to(photos / "china")
    build(tmp_path / "images", tmp_path / "three")
    with pytest.raises(ConfigError, match=r"objective.classes = 2: the shards have 3; write objective.classes=3"):
        train(tiny_recipe("finetune", shards, tmp_path / "run", f"data.train={tmp_path / 'three'}"))


def test_a_label_that_the_head_does_not_have_ends_the_run(shards: Path, tmp_path: Path):
    members = [member for n in range(20) for member in ((f"{n}.jpg", jpeg(n)), (f"{n}.cls", b"2" if n == 7 else b"1"))]
    write_tar(tmp_path / "a.tar", members)  # its manifest names no classes
    with pytest.raises(
        DataError, match=r"a sample has the label 2, but objective.classes = 2, so that labels are 0 to 1"
    ):
        train(tiny_recipe("finetune", shards, tmp_path / "run", f"data.train={tmp_path / 'a.tar'}"))


def test_an_odd_number_of_samples_has_no_pairs(shards: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"data.batch = 15: is odd, but mixup and CutMix need pairs"):
        train(tiny_recipe("finetune", shards, tmp_path / "run", "data.batch=15"))
    model = made("finetune", **MIXED)
    with pytest.raises(
        ConfigError, match=r"5 samples are in one forward of a process, but mixup and CutMix need pairs"
    ):
        model({key: value[:5] for key, value in mixed_batch().items()}, 0)


def test_images_of_other_channels_have_no_rand_augment(shards: Path, tmp_path: Path):
    grey = ["model.in_channels=1", "data.mean=[0.5]", "data.std=[0.25]"]
    refused = "objective.rand_augment = 9: changes the colours of three channels of uint8, not of"
    with pytest.raises(ConfigError, match=f"{refused} 1 of uint8"):
        train(tiny_recipe("finetune", shards, tmp_path / "run", *grey))
    with pytest.raises(ConfigError, match=f"{refused} 3 of uint16"):
        train(tiny_recipe("finetune", shards, tmp_path / "run", "data.pixel_dtype=uint16"))
    train(tiny_recipe("finetune", shards, tmp_path / "run", *grey, "objective.rand_augment=0", "steps=1"))


# ---------------------------------------------------------------- exports
HEADS: list[tuple[str, dict[str, Any], str, str]] = [  # (family, options of the model, feature, class of transformers)
    ("ViT", {}, "mean", "Dinov2ForImageClassification"),
    ("ViT", {}, "cls", "Dinov2ForImageClassification"),
    ("ViT", {"registers": 2}, "mean", "Dinov2WithRegistersForImageClassification"),
    ("ResNet", {"widths": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}, "cls", "ResNetForImageClassification"),
    ("ViT", {"positions": "rope"}, "mean", ""),
]


@pytest.mark.parametrize(("family", "options", "pool", "name"), HEADS)
@torch.no_grad()
def test_transformers_computes_the_same_logits(
    family: str, options: dict[str, Any], pool: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    sizes = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 4} if family == "ViT" else {}
    cfg = getattr(presets, family)(**sizes, **options)
    cfg.name = family.lower()
    model: Any = made("finetune", cfg, classes=3, pool=pool).float().eval()
    one = model.exports()["model"]
    state, classifier = export.contents(one, None, None)
    assert classifier is not None
    classifier = classifier._replace(names=["oak", "beech", "elm"])
    about = {"step": 1, "objective": "finetune", "pool": pool}
    export.write(tmp_path / "out", one.backbone, about, [0.5] * 3, [0.25] * 3, state, classifier=classifier)
    images = normal(4, 3, 32, 32).float()
    expected = model.logits(images)
    assert expected.std(0).min() > 1e-3  # the logits depend on the image
    if name:
        theirs, report = transformers.AutoModelForImageClassification.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
        assert type(theirs).__name__ == name and not any(report[k] for k in ("missing_keys", "unexpected_keys"))
        torch.testing.assert_close(theirs.eval()(images).logits, expected, rtol=1e-5, atol=1e-5)
        assert theirs.config.id2label == {0: "oak", 1: "beech", 2: "elm"}
    body = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()  # the backbone alone opens as before
    ours, facts = export.load(tmp_path / "out")
    tokens = body(images).last_hidden_state
    tokens = tokens.flatten(2).transpose(1, 2) if family == "ResNet" else tokens
    torch.testing.assert_close(tokens[:, -ours(images).tokens.shape[1] :], ours(images).tokens, rtol=1e-4, atol=1e-5)
    head, features = classifier_of(tmp_path / "out"), ours(images)
    feature = features.cls if facts["pool"] == "cls" else features.tokens.mean(1)
    torch.testing.assert_close(feature @ head.weight.T + head.bias, expected, rtol=1e-5, atol=1e-5)
    assert head.names == ["oak", "beech", "elm"]


@pytest.mark.slow
def test_an_export_without_a_classifier_says_so(shards: Path, tmp_path: Path):
    run = train(tiny_recipe("mae", shards, tmp_path / "run", "steps=1"))
    with pytest.raises(UserError, match=r"holds no classifier; name an export of a run of `finetune`"):
        evaluate(run / "export" / "1", ["classifier"], [], [str(shards)], device="cpu")
    with pytest.raises(UserError, match=r"pixels: has no classifier"):
        evaluate("pixels", ["classifier"], [], [str(shards)], device="cpu")


@pytest.mark.slow
def test_a_run_is_scored_on_every_held_out_image(shards: Path, tmp_path: Path):
    """The accuracy of each export, of all 48 images, equals that of its own logits on the central crops; it rises."""
    options = ["steps=40", "export=20", f"eval.val={shards}", f"eval.test={shards}", "eval.pixels=false"]
    plain = [f"objective.{key}=0" for key in ("rand_augment", "random_erasing", "mixup", "cutmix")]
    cfg = tiny_recipe(
        "finetune", shards, tmp_path / "run", *options, *plain, "eval.quick=[classifier]", "eval.final=[classifier]"
    )
    run = train(cfg)
    rows = [row for row in read_rows(run / "results.jsonl") if row["metric"] == "accuracy"]
    assert {(row["split"], row["step"]) for row in rows} == {("val", n) for n in (0, 20, 40)} | {
        ("test", 0),
        ("test", 40),
    }
    assert all(row["count"] == 48 and row["gallery_count"] == 0 for row in rows)
    by_step = {row["step"]: row["value"] for row in rows if row["split"] == "val"}
    assert by_step[40] > 0.8 > by_step[0]
    from eval.features import open_encoder

    encoder, _ = open_encoder(str(run / "export" / "40"), device="cpu")
    found, head = encoder.labelled([str(shards)]), classifier_of(run / "export" / "40")
    logits = found.features[0:48] @ head.weight.T + head.bias
    assert by_step[40] == pytest.approx(float((logits.argmax(1) == found.classes).double().mean()), abs=1e-6)
    assert "ForImageClassification" in (run / "export" / "40" / "README.md").read_text()


@pytest.mark.slow
def test_the_head_starts_from_a_logistic_regression(shards: Path, tmp_path: Path):
    """What `logistic.save` writes classifies as the regression does, also in transformers, and is the first head."""
    start, saved = tmp_path / "start", tmp_path / "probe"
    start = train(tiny_recipe("mae", shards, start, "steps=1", "model.patch_size=8")) / "export" / "1"
    options = {"logistic": {"save": str(saved), "costs": [1.0]}}
    rows = evaluate(start, ["logistic"], [str(shards)], [str(shards)], options=options, device="cpu")
    again = evaluate(saved, ["classifier"], [], [str(shards)], device="cpu")
    assert rows[0]["metric"] == again[0]["metric"] == "accuracy" and rows[0]["value"] == again[0]["value"]
    head = classifier_of(saved)
    assert head.names == ["china", "flower"] and head.weight.std() > 1e-3
    options["logistic"]["save"] = str(tmp_path / "larger")  # whose features are those of larger images
    rows = evaluate(start, ["logistic"], [str(shards)], [str(shards)], image_size=64, options=options, device="cpu")
    again = evaluate(tmp_path / "larger", ["classifier"], [], [str(shards)], device="cpu")
    assert rows[0]["value"] == again[0]["value"] and export.load(tmp_path / "larger")[0].image_size == 64
    options["logistic"]["save"] = str(saved)
    cfg = tiny_recipe("finetune", shards, tmp_path / "run", f"objective.head_from={saved}", "objective.pool=mean")
    objective: Any = build_objective(cfg, start=True)
    assert torch.equal(objective.head.weight, head.weight) and torch.equal(objective.head.bias, head.bias)
    assert not torch.equal(build_objective(cfg).head.weight, head.weight)  # a run that resumes does not read it
    with pytest.raises(UserError, match=r"logistic.save = .*: exists already; name a new folder"):
        evaluate(start, ["logistic"], [str(shards)], [str(shards)], options=options, device="cpu")
    with pytest.raises(UserError, match=r"logistic.save = x: pixels is no export of an image model"):
        evaluate("pixels", ["logistic"], [str(shards)], [str(shards)], options={"logistic": {"save": "x"}})
    for wrong, text in (
        (
            "objective.classes=5 objective.pool=mean",
            r"classifies 32 features as 2 classes, but this run 32 as 5; name a classifier of",
        ),
        ("objective.pool=cls", r"reads the feature mean, but this run cls; write objective.pool=mean"),
    ):
        cfg = tiny_recipe("finetune", shards, tmp_path / "run", f"objective.head_from={saved}", *wrong.split())
        with pytest.raises(ConfigError, match=f"objective.head_from = .*: {text}"):
            build_objective(cfg, start=True)
    shutil.copytree(saved, tmp_path / "other")
    fields = json.loads((tmp_path / "other" / "config.json").read_text())
    fields["id2label"] = {"0": "flower", "1": "china"}
    (tmp_path / "other" / "config.json").write_text(json.dumps(fields))
    cfg = tiny_recipe("finetune", shards, tmp_path / "run", "objective.pool=mean")
    cfg.objective.head_from = str(tmp_path / "other")
    samples = open_samples(cfg)
    with pytest.raises(
        ConfigError, match="its classes are flower, china …, but those of the shards are china, flower …"
    ):
        views(cfg, build_objective(cfg), samples)


def test_classes_without_names_are_in_the_order_of_their_numbers():
    names = sorted(map(str, range(12)))
    assert [names[n] for n in logistic.label_order(names, [])] == [str(n) for n in range(12)]
    assert logistic.label_order(["b", "c", "a"], ["c", "b", "a"]) == [1, 0, 2]
    assert logistic.label_order(["new", "10", "9"], ["9"]) == [2, 1, 0]


def test_a_set_of_other_classes_is_refused(shards: Path, tmp_path: Path):
    run = train(tiny_recipe("finetune", shards, tmp_path / "run", "steps=1", "objective.classes=9"))
    rows = evaluate(run / "export" / "1", ["classifier"], [], [str(shards)], device="cpu")
    assert {row["metric"] for row in rows} == {"accuracy", "balanced_accuracy", "top5"}  # of nine classes
    write_tar(tmp_path / "a.tar", [("0.jpg", jpeg()), ("0.cls", b"55")])
    with pytest.raises(DataError, match=r"has the classes 55 …, but the classifier has china, flower, 2 …"):
        evaluate(run / "export" / "1", ["classifier"], [], [str(tmp_path / "a.tar")], device="cpu")


# ---------------------------------------------------------------- low-rank updates
def test_a_low_rank_update_is_that_of_the_paper():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).double()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    network = nn.Sequential(nn.ModuleDict({"fc": layer})).double()
    add_low_rank(network, rank=2, alpha=6.0)
    adapted: Any = network[0]["fc"]  # type: ignore[index]
    adapted.double()
    x = normal(3, 6)
    torch.testing.assert_close(adapted(x), x @ weight.T + bias)  # nothing changes at first
    nn.init.normal_(adapted.up.weight)
    a, b = adapted.down.weight, adapted.up.weight  # A [2, 6], B [4, 2] of the paper
    naive = torch.stack([weight @ row + bias + 6 / 2 * (b @ (a @ row)) for row in x])
    torch.testing.assert_close(adapted(x), naive)
    assert [name for name, p in network.named_parameters() if p.requires_grad] == ["0.fc.down.weight", "0.fc.up.weight"]
    state = merge_low_rank(network.state_dict(), alpha=6.0)
    assert sorted(state) == ["0.fc.bias", "0.fc.weight"]
    torch.testing.assert_close(x @ state["0.fc.weight"].T + state["0.fc.bias"], naive)


@pytest.mark.parametrize(
    ("parts", "updated"),
    [
        ([], {f"blocks.{n}.{name}" for n in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}),
        (["qkv", "fc2"], {f"blocks.{n}.{name}" for n in (0, 1) for name in ("attn.qkv", "mlp.fc2")}),
        (["blocks.1.attn"], {"blocks.1.attn.qkv", "blocks.1.attn.proj"}),
    ],
)
def test_updates_are_of_the_layers_that_the_recipe_names(parts: list[str], updated: set[str]):
    objective = made("finetune", classes=3, lora=2, lora_layers=parts)
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    adapters = {f"backbone.{layer}.{end}.weight" for layer in updated for end in ("down", "up")}
    assert trained == adapters | {"head.weight", "head.bias"}
    merged = merge_low_rank(objective.backbone.state_dict(), alpha=16)
    assert merged.keys() == made("finetune", classes=3).backbone.state_dict().keys()


def test_a_name_of_no_layer_is_answered_with_the_names():
    with pytest.raises(
        ValueError,
        match=r"objective.lora_layers = \['attn', 'q'\]: no linear layer has q in its name; write some of attn, blocks, "
        r"fc1, fc2, mlp, proj, qkv",
    ):
        made("finetune", classes=3, lora=2, lora_layers=["attn", "q"])


@pytest.mark.slow
def test_the_merged_export_computes_what_was_trained(shards: Path, tmp_path: Path):
    """Only the updates and the head are trained; the backbone of the export has the names and the features of a plain
    one, and the checkpoint exports to the same."""
    start = train(tiny_recipe("simclr", shards, tmp_path / "start", "steps=1")) / "export" / "1"
    lora = ["objective.lora=2", "objective.lora_alpha=4", f"init.backbone={start}", "steps=3", "optim.lr=1e-2"]
    run = train(tiny_recipe("finetune", shards, tmp_path / "run", *lora))
    loaded, _ = export.load(run / "export" / "3")
    before, _ = export.load(start)
    frozen = [
        name
        for name in before.state_dict()
        if not name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"))
    ]
    assert loaded.state_dict().keys() == before.state_dict().keys()
    changed = {name for name, value in before.state_dict().items() if not torch.equal(value, loaded.state_dict()[name])}
    assert changed == before.state_dict().keys() - {*frozen}
    objective: Any = build_objective(load(run))
    load_model(run_store(run, load(run)), checkpoint_name(3), objective)
    images = normal(4, 3, 32, 32).float()
    objective.eval()
    head = classifier_of(run / "export" / "3")
    torch.testing.assert_close(
        loaded(images).cls @ head.weight.T + head.bias, objective.logits(images), rtol=1e-5, atol=1e-6
    )
    assert export.holds(run / "export" / "3", objective.exports()["model"], 3)
    with torch.no_grad():
        objective.head.bias.add_(0.1)
    assert not export.holds(run / "export" / "3", objective.exports()["model"], 3)


@pytest.mark.slow
def test_few_parameters_are_trained(shards: Path):
    cfg = load(
        "mae_finetune_vitb16", [f"data.train={shards}", "objective.lora=8", "data.batch=2", "parallel.mode=single"]
    )
    traced = plan.trace(cfg)
    assert 0.01 < traced.trained / (traced.trained + traced.frozen) < 0.05


def test_a_network_without_linear_layers_has_no_low_rank_updates():
    with pytest.raises(
        ValueError, match=r"objective.lora = 2: this model has no linear layers; write objective.lora=null"
    ):
        made("finetune", "resnet", classes=3, lora=2)
