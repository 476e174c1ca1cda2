"""A table of the machine and the library versions, for log files and bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch
from tabulate import tabulate

import detectron2

__all__ = ["collect_env_info"]

_PACKAGES = (
    "torchvision", "numpy", "pillow", "fvcore", "iopath", "omegaconf", "pycocotools", "faster-coco-eval",
    "opencv-python", "opencv-python-headless", "scipy", "safetensors", "timm", "mask2former-plugin",
)  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_rows() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("GPU available", "No")]
    rows = [
        ("GPU available", "Yes"),
        ("CUDA of torch", str(torch.version.cuda)),
        ("cuDNN", str(torch.backends.cudnn.version())),
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        rows.append((f"GPU {index}", f"{properties.name} ({memory}, compute {properties.major}.{properties.minor})"))
    return rows


def collect_env_info() -> str:
    """Describe platform, Python, torch, GPUs and the libraries that matter; libraries that are missing are left out."""
    rows = [
        ("platform", platform.platform()),
        ("CPU cores", str(os.cpu_count())),
        ("Python", sys.version.replace("\n", "")),
        ("detectron2", f"{detectron2.__version__} (embedded) @{os.path.dirname(detectron2.__file__)}"),
        ("torch", f"{torch.__version__} @{os.path.dirname(torch.__file__)}"),
        ("torch debug build", str(torch.version.debug)),
        *_cuda_rows(),
        ("DETECTRON2_DATASETS", os.environ.get("DETECTRON2_DATASETS", "not set")),
    ]
    versions = ((package, _version(package)) for package in _PACKAGES)
    rows += [(package, version) for package, version in versions if version is not None]
    return f"{tabulate(rows)}\n{torch.__config__.show()}"
