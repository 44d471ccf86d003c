"""What int8 weights cost an encoder on the demo's textures: scores, features, size and speed beside the full one.

    python benchmarks/int8.py FOLDER [--pretrain 210] [--model EXPORT]

The export is that of `--model`, or SimCLR's after as many steps of the recipe `demo`, as in finetune.py. Both models are
scored by the same protocols at 64 pixels on the demo's test images, by `unlabeled quantize` itself, whose file int8.json
has all layers.

    int8.{knn,linear}.{fp32,int8}       accuracy; both with the features of the last block only
    int8.features                       relative error of the pooled features
    int8.layer.NAME                     the same if only this linear layer is int8, of the four that lose most
    int8.{bytes,latency,throughput}     int8 / fp32; bytes of the file and of the fp32 weights
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from finetune import pretrained
from learning import SIZE
from steps import emit

from eval.int8_scores import compare

SHOWN = 4  # layers
SAMPLES = 32  # images on which the losses of layers are computed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pretrain", type=int, default=210, help="steps of SimCLR")
    parser.add_argument("--model", type=Path, help="an exported folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder / "materials"
    model = options.model or pretrained(folder, options.pretrain)
    known, asked = (str(folder / "shards" / part) for part in ("train", "test"))
    protocols = {"linear": {"steps": 500, "layers": [1]}}
    found = compare(model, ["knn", "linear"], [known], [asked], SIZE, protocols, None, SAMPLES, reduce_range=False)
    for protocol, metrics in found["scores"].items():
        for kind, accuracy in metrics["accuracy"].items():
            emit(f"int8.{protocol}.{kind}", accuracy, "accuracy", "the same images and features")
    emit("int8.features", found["features"], "relative error", f"{SAMPLES} images")
    for layer in found["layers"][:SHOWN]:
        versus = f"its own output {layer['own']:.4f}, largest input / rms {layer['outliers']:.1f}"
        emit(f"int8.layer.{layer['layer']}", layer["features"], "relative error", versus)
    for name, key in (("bytes", "bytes"), ("latency", "latency_ms"), ("throughput", "throughput")):
        full, small = (found[key][kind] for kind in ("fp32", "int8"))
        emit(f"int8.{name}", small / full, "share", f"{full:,} to {small:,}")


if __name__ == "__main__":
    main()
