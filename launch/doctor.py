"""What is installed here, what is missing, and the command that installs it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil

NEEDED = (
    "torch",
    "torchvision",
    "webdataset",
    "fsspec",
    "tensorboard",
    "safetensors",
    "numpy",
    "pillow",
    "simplejpeg",
    "xxhash",
    "opencv-python-headless",
    "PyYAML",
)
EXTRAS = {
    "s3fs": "s3",
    "gcsfs": "gs",
    "adlfs": "az",
    "aiohttp": "http",
    "obstore": "obstore",
    "pyarrow": "parquet",
    "tokenizers": "text",
    "av": "video",
    "submitit": "slurm",
    "deepspeed": "deepspeed",
    "xformers": "xformers",
    "transformers": "dev",
    "timm": "dev",
    "lightly": "dev",
}


def report() -> int:
    """Print a line per fact; 1 where something that is needed is missing, else 0."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    print(
        f"python      {platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB memory"
    )
    missing = [name for name in NEEDED if not _line(name, "pip install unlabeled")]
    for name, extra in EXTRAS.items():
        _line(name, f"pip install 'unlabeled[{extra}]'")
    if "torch" not in missing:
        _devices()
    for tool, use in (("apt-get", "the demo's photographs"), ("sbatch", "Slurm")):
        print(f"{tool:<12}{'found' if shutil.which(tool) else 'not found'} (for {use})")
    return 1 if missing else 0


def _line(name: str, command: str) -> bool:
    try:
        print(f"{name:<24}{importlib.metadata.version(name)}")
        return True
    except importlib.metadata.PackageNotFoundError:
        print(f"{name:<24}missing: {command}")
        return False


def _devices() -> None:
    import torch

    from pretrain.parallel.device import bf16_possible

    for i in range(torch.cuda.device_count()):
        print(
            f"cuda:{i}      {torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
        )
    if not torch.cuda.is_available():
        print("cuda        none found; training runs on the CPU")
    bf16 = "in hardware" if bf16_possible(torch.device("cpu")) else "not in hardware"
    print(f"cpu         bfloat16 {bf16}, {torch.get_num_threads()} threads")
