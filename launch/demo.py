"""The quick start: real photographs → shards → a ViT trained without labels → scores against pixels and the untrained network → a report."""

from __future__ import annotations

import shutil
from pathlib import Path

from data_pipeline.build import build
from data_pipeline.demo_data import fetch
from launch.local import train
from pretrain.recipe import load
from pretrain.run_folder import read_rows

FOLDER = Path("runs/demo-data")


def demo(source: str = "auto", overrides: list[str] | None = None) -> int:
    """Everything that `make demo` does; the exit code of the training."""
    name = fetch(FOLDER / "images", source)
    shards = FOLDER / f"shards-{name}"
    for split in ("train", "val", "test"):
        if not (shards / split / "manifest.json").is_file():
            shutil.rmtree(shards / split, ignore_errors=True)
            build(FOLDER / "images" / split, shards / split)
    both = f"[{shards / 'train'}, {shards / 'val'}]"
    recipe = load(
        "demo",
        [
            f"data.train={both}",  # without their labels
            f"eval.gallery={shards / 'train'}",
            f"eval.val={shards / 'val'}",
            f"eval.test_gallery={both}",
            f"eval.test={shards / 'test'}",
            *(overrides or []),
        ],
    )
    code = train(recipe)
    if code:
        return code
    from eval import report, results  # imports torch: not before training is over

    run = Path(recipe.run)
    path = report.write(run)
    print(f"\n{results.table(read_rows(run / 'results.jsonl'))}\n\nreport: {path}")
    return 0
