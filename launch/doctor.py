"""The command `doctor`: list the packages, devices and programs that are found or missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil

from common.output import say

REQUIRED = (
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
# {optional package: the extra of `unlabeled` that installs it}
EXTRAS = {
    "s3fs": "s3",
    "gcsfs": "gs",
    "adlfs": "az",
    "aiohttp": "http",
    "obstore": "obstore",
    "pyarrow": "parquet",
    "tokenizers": "text",
    "av": "video",
    "tifffile": "tiff",
    "pydicom": "radiology",
    "nibabel": "radiology",
    "submitit": "slurm",
    "trackio": "trackio",
    "wandb": "wandb",
    "mlflow-skinny": "mlflow",
    "deepspeed": "deepspeed",
    "xformers": "xformers",
    "transformers": "dev",
    "timm": "dev",
    "lightly": "dev",
}


def report() -> int:
    """Print one line for each package, device and program. Returns 1 if a required package is missing, otherwise 0."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB memory"
    say(f"python      {platform.python_version()} on {machine}")
    missing = [name for name in REQUIRED if not _print_version(name, "pip install unlabeled")]
    for name, extra in EXTRAS.items():
        _print_version(name, f"pip install 'unlabeled[{extra}]'")
    if "torch" not in missing:
        _print_devices()
    for program, use in (("apt-get", "the demo's photographs"), ("sbatch", "Slurm")):
        say(f"{program:<12}{'found' if shutil.which(program) else 'not found'} (for {use})")
    return 1 if missing else 0


def _print_version(name: str, install_command: str) -> bool:
    """Print the version of a package, or the command that installs it. Returns whether it is installed."""
    try:
        say(f"{name:<24}{importlib.metadata.version(name)}")
        return True
    except importlib.metadata.PackageNotFoundError:
        say(f"{name:<24}missing: {install_command}")
        return False


def _print_devices() -> None:
    import torch

    from pretrain.parallel.device import bf16_possible

    for i in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(i).total_memory / 2**30
        say(f"cuda:{i}      {torch.cuda.get_device_name(i)}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        say("cuda        none found; training runs on the CPU")
    bf16 = "in hardware" if bf16_possible(torch.device("cpu")) else "not in hardware"
    say(f"cpu         bfloat16 {bf16}, {torch.get_num_threads()} threads")
