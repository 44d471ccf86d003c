"""Exported encoders as backbones of eva: the features of the protocols, and a task of eva itself on local tiles.

eva is installed in a folder of its own by `make eva`, and runs as its users run it, by its command and a config.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from common.errors import UserError
from eval.eva_model import backbone
from eval.features import open_encoder
from pretrain.interchange import export
from tests.parity.test_models import vit

ROOT = Path(__file__).parents[2]
EVA = ROOT / ".venv" / "eva"  # `make eva` installs it there
CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
TILES = {"NCT-CRC-HE-100K": 6, "CRC-VAL-HE-7K": 4}  # of each class
MEAN, STD = [0.3, 0.4, 0.6], [0.1, 0.2, 0.3]


def exported(target: Path, pool: str) -> Path:
    export.write(target, vit(), {"step": 1, "objective": "mae", "pool": pool}, MEAN, STD)
    return target


def given(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 [B, 3, H, W] as eva's `ResizeAndCrop` normalises them."""
    scaled = images.astype(np.float32).transpose(0, 2, 3, 1) / 255
    return torch.from_numpy((scaled - np.float32(mean)) / np.float32(std)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("pool", "mean", "std"), [("cls", (0.5,) * 3, (0.5,) * 3), ("mean", (0.7, 0.5, 0.2), (0.2, 0.3, 0.1))]
)
def test_features_are_those_of_the_protocols(
    tmp_path: Path, pool: str, mean: tuple[float, ...], std: tuple[float, ...]
):
    folder = exported(tmp_path / "export", pool)
    encoder, _ = open_encoder(str(folder), device="cpu")
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    expected = encoder(images)
    with torch.inference_mode():
        found = backbone(str(folder), mean=mean, std=std)(given(images, mean, std))
        (patches,) = backbone(str(folder), output="patches", mean=mean, std=std)(given(images, mean, std))
    torch.testing.assert_close(found, encoder.pooled(images), rtol=1e-4, atol=1e-5)
    assert patches.shape == (3, 32, 4, 4)
    torch.testing.assert_close(patches[:, :, 1, 2], expected.tokens[:, 1 * 4 + 2], rtol=1e-4, atol=1e-5)


def test_errors(tmp_path: Path):
    folder = exported(tmp_path / "export", "cls")
    with pytest.raises(UserError, match="bytes: reads texts, but eva's tasks give images"):
        backbone("bytes")
    with pytest.raises(UserError, match="reads 3 channels, but mean and std are of 1 and 3"):
        backbone(str(folder), mean=[0.5])
    with pytest.raises(UserError, match="output = cls: write pooled or patches"):
        backbone(str(folder), output="cls")  # type: ignore[arg-type]


def write_tiles(root: Path) -> dict[str, np.ndarray]:
    """Noise in a colour of each class, in the folders and the format of CRC: {name: uint8 [3, 32, 32]}."""
    rng, tiles = np.random.default_rng(0), {}
    colors = rng.permutation([(r, g, b) for r in (20, 100, 180) for g in (20, 100, 180) for b in (20, 180)])[:9]
    for part, count in TILES.items():
        for name, color in zip(CLASSES, colors, strict=True):
            target = root / part / name
            target.mkdir(parents=True)
            for number in range(count):
                pixels = (color + rng.integers(0, 60, (32, 32, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(target / f"{part}-{name}-{number}.tif")
                tiles[f"{part}-{name}-{number}"] = pixels.transpose(2, 0, 1)
    return tiles


def config(model: Path, tiles: Path, out: Path) -> dict:
    """The config of eva for CRC: features of a frozen backbone, then a linear head."""
    embeddings = str(out / "embeddings")
    adapter = {"path": "eval.eva_model.backbone", "arguments": {"model": str(model)}}
    writer = {
        "output_dir": embeddings,
        "dataloader_idx_map": {"0": "train", "1": "val"},
        "backbone": {"class_path": "eva.models.ModelFromFunction", "init_args": adapter},
    }
    transform = {"class_path": "eva.vision.data.transforms.ResizeAndCrop", "init_args": {"size": 32}}
    features = {"root": embeddings, "manifest_file": "manifest.csv"}
    loader = {"batch_size": 9, "num_workers": 0, "persistent_workers": False, "prefetch_factor": None}

    def of(split: str) -> dict:
        tile_options = {"root": str(tiles), "split": split, "transforms": transform}
        return {"class_path": "tests.eval.eva_tiles.Tiles", "init_args": tile_options}

    def embedded(split: str) -> dict:
        return {"class_path": "eva.datasets.EmbeddingsClassificationDataset", "init_args": features | {"split": split}}

    metrics = [{"class_path": "eva.metrics.MulticlassClassificationMetrics", "init_args": {"num_classes": 9}}]
    return {
        "trainer": {
            "class_path": "eva.Trainer",
            "init_args": {
                "default_root_dir": str(out / "logs"),
                "n_runs": 1,
                "max_steps": 200,
                "accelerator": "cpu",
                "checkpoint_type": "last",
                "logger": False,
                "callbacks": [{"class_path": "eva.callbacks.ClassificationEmbeddingsWriter", "init_args": writer}],
            },
        },
        "model": {
            "class_path": "eva.HeadModule",
            "init_args": {
                "head": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 32, "out_features": 9}},
                "criterion": "torch.nn.CrossEntropyLoss",
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.03}},
                "metrics": {"common": metrics},
            },
        },
        "data": {
            "class_path": "eva.DataModule",
            "init_args": {
                "datasets": {
                    "train": embedded("train"),
                    "val": embedded("val"),
                    "predict": [of("train"), of("val")],
                },
                "dataloaders": {"train": loader | {"shuffle": True}, "val": loader, "predict": loader},
            },
        },
    }


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.skipif(not EVA.is_dir(), reason="NO EVA HERE, SO IT IS NOT TESTED: `make eva` installs it")
def test_a_task_of_eva(tmp_path: Path):
    """eva computes the features of the protocols, and its linear head tells the planted classes apart."""
    folder = exported(tmp_path / "export", "cls")
    tiles = write_tiles(tmp_path / "tiles")
    (tmp_path / "crc.yaml").write_text(yaml.safe_dump(config(folder, tmp_path / "tiles", tmp_path / "out")))
    env = os.environ | {"PYTHONPATH": f"{EVA}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "eva", "predict_fit", "--config", str(tmp_path / "crc.yaml")]
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out" / "logs").rglob("results.json")
    (scores,) = json.loads(results.read_text())["metrics"]["val"]
    assert scores["val/MulticlassAccuracy"]["mean"] == 1.0
    written = {path.stem: torch.load(path)[0] for path in (tmp_path / "out" / "embeddings").rglob("*.pt")}
    assert written.keys() == tiles.keys()
    expected = open_encoder(str(folder), device="cpu")[0].pooled(np.stack([*tiles.values()]))
    torch.testing.assert_close(torch.stack([written[name] for name in tiles]), expected, rtol=1e-4, atol=1e-5)
