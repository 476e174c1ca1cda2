"""Installs mask2former_plugin; Python only, nothing is compiled."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

setup(
    name="mask2former_plugin",
    version="0.1.0",
    description="MaskFormer and Mask2Former for Detectron2: semantic, instance and panoptic segmentation, installed with pip alone",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.9",
    packages=find_namespace_packages(include=["mask2former_plugin", "mask2former_plugin.*"]),
    package_data={"": ["*.json"]},
    install_requires=[
        "torch>=2.4",
        "numpy",
        "scipy",
        "pillow",
        "opencv-python-headless",
        "pycocotools>=2.0.6",
        "faster-coco-eval>=1.6",
        "fvcore",
        "iopath",
        "omegaconf",
        "yacs",
        "pyyaml",
        "cloudpickle",
        "tabulate",
        "termcolor",
        "tqdm",
        "matplotlib",
        "tensorboard",
        "safetensors",
        "shapely",
    ],
    extras_require={
        "test": ["pytest", "transformers", "h5py", "cityscapesscripts"],
        "datasets": ["h5py"],
        "cityscapes": ["cityscapesscripts"],
    },
)
