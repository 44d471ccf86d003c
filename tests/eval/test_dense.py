"""Segmentation, patch k-NN and depth: metrics against torchmetrics and hand-made examples, sliding windows, losses and
schedules against formulas, and scores on drawn scenes whose classes and depths are known."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from common.errors import ConfigError, Damaged, DataError, UserError
from data_pipeline.formats.pixel_maps import MASKS, read_map
from data_pipeline.parts.part import About
from data_pipeline.views.augmentations import generators
from data_pipeline.views.dense_views import random_crop
from eval import depth, patch_knn, segmentation, segmenter
from eval.dense_data import DEPTHS, Pairs
from eval.features import Encoder
from eval.run import evaluate
from pretrain.build import build_objective
from pretrain.checkpoint.load import load_model
from pretrain.checkpoint.open_store import run_store
from pretrain.checkpoint.store import checkpoint_name
from pretrain.interchange import export
from pretrain.interchange.weight_sources import segmenter_of
from pretrain.models.layers import Features
from pretrain.objectives import finetune_segmentation
from pretrain.ops.cross_entropy import IGNORED
from pretrain.recipes.recipe import load
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.train import train
from tests.tars import jpeg, write_tar

COLORS = np.array([[30, 30, 30], [220, 40, 40], [40, 220, 40], [40, 40, 220]], np.uint8)  # of the classes


class Patches(torch.nn.Module):
    """The mean colour of each patch of 4 × 4 pixels, as features."""

    embed_dim, image_size, patch_size, max_layers = 3, 32, 4, 1

    def forward(self, x: Tensor) -> Features:
        maps = F.avg_pool2d(x, 4)
        tokens = maps.flatten(2).transpose(1, 2)
        return Features(tokens.mean(1), tokens, tokens[:, :0], (maps.shape[-2], maps.shape[-1]))


def patches(cache: Path) -> Encoder:
    encoder = Encoder(Patches(), "patches", 32, [0.5] * 3, [0.5] * 3)
    encoder.cache = cache
    return encoder


def png(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    return out.getvalue()


def npy(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def scenes(path: Path, count: int, seed: int, further: list[tuple[str, bytes]] = []) -> str:  # noqa: B006
    """Shards of images of 32 × 48 pixels with two rectangles, their masks, and depths: 1, 2, 3 and 4 metres for the
    classes."""
    rng, members = np.random.default_rng(seed), list(further)
    for n in range(count):
        mask = np.zeros((32, 48), np.uint8)
        for _ in range(2):
            top, left = 4 * rng.integers(0, 5), 4 * rng.integers(0, 8)
            mask[top : top + 16, left : left + 16] = rng.integers(1, 4)
        mask[:2] = 255  # not scored
        image = COLORS[np.where(mask == 255, 0, mask)]
        metres = np.where(mask == 255, 0, 1000 * (mask.astype(np.uint16) + 1)).astype(np.uint16)
        key = f"{seed}-{n:03d}"
        members += [(f"{key}.webp", _webp(image)), (f"{key}.mask.png", png(mask)), (f"{key}.depth.png", png(metres))]
    write_tar(path, members)
    return str(path)


def _webp(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "WEBP", lossless=True)
    return out.getvalue()


# ---------------------------------------------------------------- metrics
def test_miou_equals_torchmetrics():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 4, (5, 20, 30)), torch.from_numpy(rng.integers(0, 5, (5, 20, 30)))
    predicted[predicted == 3] = 1  # class 3 is never predicted, class 4 never true, class 5 neither
    truth[rng.random(truth.shape) < 0.2] = 255
    theirs = MulticlassJaccardIndex(6, average="macro", ignore_index=255)
    theirs.update(predicted, torch.from_numpy(truth))
    confusion = sum(
        segmentation.confusion_of(p, segmentation.class_map(t, segmentation.Config()), 6)
        for p, t in zip(predicted, truth, strict=True)
    )
    assert segmentation.scores(confusion)["miou"] == pytest.approx(float(theirs.compute()), abs=1e-6)
    by_hand = torch.tensor([[2, 1, 0], [0, 3, 0], [1, 0, 0]])  # unions 4, 4, 1
    scores = segmentation.scores(by_hand)
    assert scores == {"miou": pytest.approx((2 / 4 + 3 / 4 + 0) / 3), "pixel_accuracy": pytest.approx(5 / 7)}


def test_class_numbers():
    values = np.array([[0, 1, 2, 255]])
    assert segmentation.class_map(values, segmentation.Config()).tolist() == [[0, 1, 2, -1]]
    assert segmentation.class_map(values, segmentation.Config(zero_is_void=True)).tolist() == [[-1, 0, 1, -1]]
    assert segmentation.class_map(values, segmentation.Config(ignore=[1])).tolist() == [[0, -1, 2, 255]]


def test_windows_cover_every_pixel():
    image = np.random.default_rng(0).random((3, 21, 34), np.float32)
    found = segmentation.slide(lambda windows: torch.from_numpy(windows), image, 16, 5)
    torch.testing.assert_close(found, torch.from_numpy(image))
    constant = segmentation.slide(lambda windows: torch.full((len(windows), 2, 4, 4), 7.0), image, 16, 16)
    assert constant.shape == (2, 21, 34) and torch.equal(constant, torch.full_like(constant, 7.0))
    assert segmentation._starts(683, 512, 341) == [0, 171] and segmentation._starts(512, 512, 341) == [0]
    assert segmentation._starts(1000, 512, 341) == [0, 341, 488]
    logits = torch.randn(40, 5, 6)
    whole = F.interpolate(logits[None], size=(11, 9), mode="bilinear")[0].argmax(0)
    assert torch.equal(segmentation.upsampled_argmax(logits, (11, 9)), whole)


def test_the_label_of_a_patch_is_its_most_frequent_class():
    values = torch.tensor([[[0, 1, 2, 2], [1, 1, -1, 2], [-1, -1, 0, 1], [-1, 2, 1, 0]]])
    assert patch_knn.majority(values, (2, 2), 3).tolist() == [[1, 2, -1, 0]]


def test_depth_metrics_by_hand():
    found = depth.errors(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[2.0, 3.0, 0.0]]))
    assert found["rmse"] == pytest.approx(0.5**0.5) and found["abs_rel"] == pytest.approx(0.25)
    assert (found["delta1"], found["delta2"], found["delta3"]) == (0.5, 0.5, 0.5)
    assert found["log10"] == pytest.approx(math.log10(2) / 2)
    assert found["silog"] == pytest.approx(100 * (math.log(2) ** 2 / 2 - math.log(2) ** 2 / 4) ** 0.5)


def test_depth_bins_and_loss():
    cfg = depth.Config()
    logits = torch.zeros(1, depth.BINS, 2, 1)
    logits[0, 100, 0], logits[0, 255, 1] = 1e7, 1e7
    expected = torch.linspace(0.001, 10, 256)[[100, 255]]
    torch.testing.assert_close(depth.depth_of(logits, cfg).flatten(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(depth.depth_of(logits * 0, cfg)[0, 0, 0, 0], torch.tensor(5.0005))
    truth, predicted = torch.rand(50).double() * 5 + 0.1, torch.rand(50).double() * 5 + 0.1
    assert float(depth.sig_loss(truth, truth)) < 1e-5
    g = (np.log(predicted.numpy() + 0.001) - np.log(truth.numpy() + 0.001)).astype(np.float64)
    assert float(depth.sig_loss(predicted, truth)) == pytest.approx((g.var(ddof=1) + 0.15 * g.mean() ** 2) ** 0.5)
    assert float(depth.sig_loss(predicted, truth, True)) == pytest.approx(0.15**0.5 * abs(g.mean()))


def test_one_cycle_equals_torch():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        3e-4,
        90,
        pct_start=1 / 3,
        div_factor=25,
        final_div_factor=1000,
        base_momentum=0.85,
        max_momentum=0.95,
    )
    for step in range(90):
        group = optimizer.param_groups[0]
        assert depth.one_cycle(step, 90, 3e-4) == pytest.approx((group["lr"], group["betas"][0]), rel=1e-6)
        optimizer.step()
        if step < 89:
            theirs.step()
    least = depth.Config.__dataclass_fields__["steps"].metadata["limits"].low
    assert all(depth.one_cycle(step, int(least), 1.0)[0] > 0 for step in range(int(least)))


# ---------------------------------------------------------------- views
def test_image_and_map_stay_aligned():
    values = np.random.default_rng(0).integers(0, 200, (40, 60)).astype(np.int32)
    image = np.repeat(values.astype(np.uint8)[..., None], 3, 2)
    flips = set()
    for seed in range(6):
        draws = [np.random.default_rng([seed, k]) for k in range(2)]
        out, cropped = random_crop(image, values, (24, 40), (40 / 24, 40 / 24), -1, draws.__getitem__)
        assert out.shape == (3, 24, 40) and np.array_equal(out[0], cropped)
        flips.add(bool((np.diff(cropped[0]) == 0).any()))
    padded, mask = random_crop(image, values, (24, 40), (0.5, 0.5), -1, draws.__getitem__)
    assert padded.shape == (3, 24, 40) and (mask == -1).any() and not padded[:, mask == -1].any()
    assert (
        len({np.random.default_rng([seed, 0]).random(4)[3] < 0.5 for seed in range(6)}) == 2
    )  # with and without a flip


def test_the_training_views_of_segmentation_stay_aligned():
    """The gray level of the images is their class: it is also that of the mask's view, at each zoom and place."""
    mask = np.kron(np.random.default_rng(0).integers(0, 5, (4, 6)), np.ones((15, 15))).astype(np.uint8)
    image = np.repeat(40 * mask[..., None], 3, 2)
    cfg = finetune_segmentation.Config(classes=5, void_numbers=[4], zoom_range=[0.75, 1.5])
    view = finetune_segmentation.FineTuneSegmentation.views(cfg, About(image_size=32, channels=3))
    sizes = set()
    for seed in range(12):
        found = view({"image": image, "mask": mask}, generators((seed, 0)))
        pixels, classes = found["image"].astype(float)[0], found["mask"]
        known = classes != IGNORED
        assert pixels.shape == classes.shape == (32, 32) and classes[known].max() < 4
        assert (np.round(pixels / 40) == classes)[known].mean() > 0.85  # but for pixels at borders, which are blurred
        sizes.add(int(known.sum()))
    assert len(sizes) > 6
    with pytest.raises(Damaged, match=r"its mask has \(10, 90\) pixels, but its image \(60, 90\)"):
        view({"image": image, "mask": mask[:10]}, generators((0, 0)))


def test_maps_are_read_as_they_are_stored():
    sixteen = np.array([[0, 1], [40_000, 65_535]], np.uint16)
    assert read_map(png(sixteen), "depth.png").tolist() == sixteen.tolist()
    palette = Image.fromarray(np.array([[3, 7]], np.uint8)).convert("P")
    out = io.BytesIO()
    palette.save(out, "PNG")
    assert read_map(out.getvalue(), "png").shape == (1, 2)
    assert read_map(npy(np.array([[0.5, 2]], np.float16)), "depth.npy").tolist() == [[0.5, 2]]
    with pytest.raises(Damaged, match="its map is a picture of RGB"):
        read_map(jpeg(), "png")
    with pytest.raises(Damaged, match=r"its map holds float64 \[2\]"):
        read_map(npy(np.zeros(2)), "npy")


def test_masks_of_true_and_false_are_classes():
    mask = np.array([[True, False]])
    assert read_map(npy(mask), "mask.npy").astype(int).tolist() == [[1, 0]]
    image = np.repeat(mask.astype(np.uint8)[..., None], 3, 2)
    crop, classes = random_crop(
        image, read_map(npy(mask), "mask.npy"), (1, 2), (1, 1), -1, lambda k: np.random.default_rng(0)
    )
    assert sorted(classes[0]) == [0, 1] and np.array_equal(crop[0], classes)


# ---------------------------------------------------------------- scores
@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    folder = tmp_path_factory.mktemp("rooms")
    odd = [
        ("a.webp", _webp(np.zeros((8, 8, 3), np.uint8))),  # no map
        ("b.webp", _webp(np.zeros((8, 8, 3), np.uint8))),
        *((f"b.{kind}.png", png(np.zeros((9, 9), np.uint8))) for kind in ("mask", "depth")),  # of another size
    ]
    return [scenes(folder / "train.tar", 20, 1)], [scenes(folder / "test.tar", 8, 2, odd)]


def test_masks_without_a_class_have_no_score(tmp_path: Path):
    mask = np.full((8, 8), 255, np.uint8)
    write_tar(tmp_path / "void.tar", [("a.jpg", jpeg(size=8)), ("a.mask.png", png(mask))])
    pairs = Pairs(patches(tmp_path), [str(tmp_path / "void.tar")], "", MASKS, "segmentation.member")
    with pytest.raises(
        DataError, match=r"hold 0 classes, but two or more .* in patch_knn.ignore = \[255\] are no classes"
    ):
        patch_knn.run(patches(tmp_path), *[[str(tmp_path / "void.tar")]] * 2, patch_knn.Config())
    with pytest.raises(DataError, match=r"segmenter.size = 30: must be a multiple"):
        segmentation.window_size(patches(tmp_path), segmenter.Config(size=30), "segmenter")
    head = torch.nn.Conv2d(3, 2, 1)
    with pytest.raises(DataError, match=r"void.tar: no pixel of the masks has a class from 0 to 1"):
        segmentation.score(pairs.encoder, head, pairs, 2, 32, segmentation.Scored(), 1)


@pytest.mark.slow
def test_segmentation_of_scenes(rooms: tuple[list[str], list[str]], tmp_path: Path):
    cfg = segmentation.Config(steps=150, rate=5e-2, batch=8, size=32)
    scores = segmentation.run(patches(tmp_path), *rooms, cfg)
    assert scores["miou"] > 0.9 and scores["pixel_accuracy"] > 0.95
    counts = {key: scores[key] for key in ("classes", "size", "gallery_count", "count", "left_out", "passed_over")}
    assert counts == {"classes": 4, "size": 32, "gallery_count": 20, "count": 8, "left_out": 1, "passed_over": 1}


def test_patch_knn_of_scenes(rooms: tuple[list[str], list[str]], tmp_path: Path):
    """All patches lie inside one class, so the nearest ones give every pixel its class."""
    scores = patch_knn.run(patches(tmp_path), *rooms, patch_knn.Config(size=32, batch=3))
    assert scores["miou"] > 0.8 and scores["k"] in (1, 3, 10, 30) and scores["count"] == 8
    few = patch_knn.run(patches(tmp_path), *rooms, patch_knn.Config(size=32, patches=60, k=[3]))
    assert 0.3 < few["miou"] <= scores["miou"] + 0.02 and few["k"] == 3


@pytest.mark.slow
def test_fine_tuned_segmentation_of_scenes(rooms: tuple[list[str], list[str]], tmp_path: Path):
    """The head of the export is scored; without it, or with too few classes, an error says what to do."""
    (gallery,), query = rooms
    model = ["model=vit", "model.dim=32", "model.depth=1", "model.heads=2", "model.image_size=32", "model.patch_size=4"]
    options = [
        f"data.train={gallery}",
        f"run={tmp_path / 'run'}",
        "data.workers=0",
        "log.flops=false",
        "data.bad_share=0.1",
    ]
    options += ["steps=60", "optim.lr.value=1e-2", "optim.layer_decay=1", "threads=1", f"eval.test={query[0]}"]
    cfg = load("finetune_segmentation_cpu", [*model, *options, "objective.classes=4"])
    run = train(cfg)
    rows = {(row["step"], row["metric"]): row for row in read_rows(run / "results.jsonl")}
    assert rows[60, "miou"]["value"] > 0.8 > 0.4 > rows[0, "miou"]["value"]
    assert (rows[60, "miou"]["count"], rows[60, "classes"]["value"]) == (8, 4)
    assert "A segmentation model" in (run / "export" / "60" / "README.md").read_text()
    head = segmenter_of(run / "export" / "60")
    assert export.holds(run / "export" / "60", (objective := loaded(run)).exports()["model"], 60)
    assert torch.equal(head.weight, objective.head.weight)
    with pytest.raises(UserError, match="holds no classifier; name an export of a run of `finetune`"):
        evaluate(run / "export" / "60", ["classifier"], [], query)
    with pytest.raises(UserError, match="patches: has no segmentation head; name an export of a run of"):
        segmenter.run(patches(tmp_path), [], query, segmenter.Config())
    with pytest.raises(
        DataError, match=r"a mask has the class 3, but objective.classes = 3, so that classes are 0 to 2"
    ):
        train(load("finetune_segmentation_cpu", [*model, *options, "objective.classes=3", "overwrite=true"]))
    with pytest.raises(ConfigError, match=r"objective.classes = null: write objective.classes=NUMBER"):
        build_objective(load("finetune_segmentation_cpu", [*model, *options]))
    with pytest.raises(
        ConfigError, match=r"objective.zoom_range = \[2.0, 1.0\]: write two numbers, the smaller one first"
    ):
        train(
            load("finetune_segmentation_cpu", [*model, *options, "objective.classes=4", "objective.zoom_range=[2,1]"])
        )


def loaded(run: Path) -> Any:
    """The objective of a run with the weights of its last checkpoint."""
    objective = build_objective(cfg := load(run))
    load_model(run_store(run, cfg), checkpoint_name(60), objective)
    return objective


@pytest.mark.slow
def test_depth_of_scenes(rooms: tuple[list[str], list[str]], tmp_path: Path):
    cfg = depth.Config(steps=200, rate=3e-2, batch=8, farthest=5.0)
    scores = depth.run(patches(tmp_path), *rooms, cfg)
    assert scores["rmse"] < 0.45 and scores["delta1"] > 0.8 and scores["count"] == 8 and scores["left_out"] == 1
    assert depth.metres(np.array([[500, 20_000]], np.uint16), cfg).tolist() == [[0.5, 0]]
    assert depth.metres(np.array([[1.5, np.nan, 0]], np.float16), cfg).tolist() == [[1.5, 0, 0]]


def test_a_short_training_of_a_depth_head_is_not_spent_on_the_scale(rooms: tuple[list[str], list[str]], tmp_path: Path):
    """In 90 steps, fewer than the 100 of the published code whose loss has the term of the mean only."""
    cfg = depth.Config(steps=90, rate=3e-2, batch=4, farthest=5.0)
    scores = depth.run(patches(tmp_path), *rooms, cfg)
    assert scores["rmse"] < 0.6


def test_the_class_token_tells_each_patch_what_the_image_is(tmp_path: Path):
    """The depth of all pixels is that of a corner, which the features of other patches do not show."""
    members = []
    for n in range(24):
        image, metres = np.zeros((32, 32, 3), np.uint8), np.full((32, 32), 1 + 2 * (n % 2), np.float16)
        image[28:, 28:] = COLORS[1 + n % 2]
        members += [(f"{n:02d}.webp", _webp(image)), (f"{n:02d}.depth.npy", npy(metres))]
    write_tar(tmp_path / "0.tar", members)
    shards = [str(tmp_path / "0.tar")]
    rmse = {
        given: depth.run(
            patches(tmp_path),
            shards,
            shards,
            depth.Config(steps=100, rate=3e-2, batch=8, farthest=5.0, class_token=given),
        )["rmse"]
        for given in (False, True)
    }
    assert rmse[False] > 0.9
    assert rmse[True] < 0.3


def test_crops_of_depth_are_not_scaled(monkeypatch: pytest.MonkeyPatch):
    """As images are not scaled for the score, every pixel of a crop is one of the image, beside its neighbours."""
    monkeypatch.setattr(depth, "ROTATION", 0.0)
    number = np.arange(24 * 36, dtype=np.float32).reshape(24, 36) + 1
    image = np.repeat(number.astype(np.uint8)[..., None], 3, 2)
    for seed in range(20):
        _, crop = depth.training_view(image, number, (12, 20), generators((0, seed)))
        assert (np.diff(crop, axis=0) == 36).all() and (abs(np.diff(crop, axis=1)) == 1).all()
    view, crop = depth.training_view(image, number, (28, 32), generators((0, 0)))
    assert view.shape == (3, 28, 32) and (crop > 0).sum() == 24 * 32  # padded below


def test_rows(rooms: tuple[list[str], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("eval.features.open_encoder", lambda *_: (patches(tmp_path), {"step": 3}))
    rows = evaluate("any", ["patch_knn"], *rooms)
    (row,) = (row for row in rows if row["metric"] == "miou")
    assert (row["count"], row["unit"], row["gallery_count"], row["passed_over"]) == (8, "images", 20, 1)
    with pytest.raises(UserError, match="bytes: reads texts, which depth does not score; choose"):
        monkeypatch.undo()
        evaluate("bytes", ["depth"], *rooms)


def test_errors(rooms: tuple[list[str], list[str]], shards: Path, tmp_path: Path):
    encoder = patches(tmp_path)
    for name, says in (
        ("segmentation.member", "and no map for segmentation; put NAME.mask.png beside NAME.jpg"),
        ("depth.member", "and no map for depth"),
    ):
        endings = MASKS if "seg" in name else DEPTHS
        with pytest.raises(DataError, match=re.escape(says)):
            Pairs(encoder, [str(shards)], "", endings, name)
    with pytest.raises(DataError, match="no shards are named for depth"):
        Pairs(encoder, [], "", DEPTHS, "depth.member")
    with pytest.raises(
        DataError, match=re.escape("segmentation.size = 30: must be a multiple of the model's patch size 4")
    ):
        segmentation.run(encoder, *rooms, segmentation.Config(size=30))
    with pytest.raises(DataError, match=re.escape("segmentation.classes = 2: the masks hold larger class numbers")):
        segmentation.run(encoder, *rooms, segmentation.Config(size=32, classes=2, steps=3))
    with pytest.raises(DataError, match="no depth is between depth"):
        depth.run(encoder, *rooms, depth.Config(steps=1, nearest=6))
