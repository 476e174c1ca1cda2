"""MaskFormer and Mask2Former for Detectron2: importing this makes ``detectron2`` importable and registers every class and dataset."""

# ruff: noqa: E402
from mask2former_plugin.detectron2_runtime import ensure_detectron2

ensure_detectron2()

from mask2former_plugin import modeling  # noqa: F401  (registers the models)
from mask2former_plugin.config import add_mask_former_config, add_maskformer2_config, load_config
from mask2former_plugin.data import datasets  # noqa: F401  (registers the published datasets)
from mask2former_plugin.modeling.meta_arch import MaskFormer
from mask2former_plugin.test_time_augmentation import MaskClassificationWithTTA, SemanticSegmentorWithTTA

__version__ = "0.1.0"
__all__ = [
    "MaskClassificationWithTTA",
    "MaskFormer",
    "SemanticSegmentorWithTTA",
    "add_mask_former_config",
    "add_maskformer2_config",
    "load_config",
]
