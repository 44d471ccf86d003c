"""How well the patches of the demo's network separate materials, before and after training: the area under the ROC curve
with which the similarities of a patch distinguish its own image of a mosaic from the three others, as in `gram.py`.

    python benchmarks/demo_patches.py RUN SHARDS

RUN is a run folder, such as `runs/demo`, and SHARDS the shards of the test images, such as
`runs/demo-data/shards-materials/test`. The mosaics have 128 pixels and four images of different materials.

    demo.patch_auc.untrained     of the export of step 0
    demo.patch_auc.pretrained    of the last export
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from gram import load_images, mosaics, patches, separation
from steps import emit

from pretrain.interchange.export import load as load_export
from pretrain.run_folder.export_folders import exports

MOSAICS = 60


def patch_auc(export: Path, images: torch.Tensor, materials: torch.Tensor) -> float:
    """The mean of `separation` over mosaics [M, 3, H, W], whose label numbers are [M, h, w] on any grid that the
    network's patches divide."""
    network, facts = load_export(export)
    areas = []
    for image, labels in zip(images.split(1), materials.split(1), strict=True):
        tokens = patches(network, facts, image.numpy())[0]
        times = round((len(tokens) / labels[0].numel()) ** 0.5)
        labels = labels[0].repeat_interleave(times, 0).repeat_interleave(times, 1).flatten()
        areas.append(separation(tokens @ tokens.T, labels))
    return float(torch.stack(areas).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("shards", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images, materials = map(torch.from_numpy, mosaics(*load_images(options.shards), MOSAICS))
    found = exports(options.run)
    for name, step in (("untrained", min(found)), ("pretrained", max(found))):
        area = patch_auc(found[step], images, materials)
        emit(f"demo.patch_auc.{name}", area, "area under the ROC curve", f"step {step}")


if __name__ == "__main__":
    main()
