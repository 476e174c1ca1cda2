"""DeepLab: config keys, the poly schedule and the dilated ResNets."""

from typing import NoReturn

from detectron2.projects.deeplab.build_solver import build_lr_scheduler
from detectron2.projects.deeplab.config import add_deeplab_config
from detectron2.projects.deeplab.resnet import build_resnet_deeplab_backbone
from detectron2.utils.missing import missing_name

__all__ = ["add_deeplab_config", "build_lr_scheduler", "build_resnet_deeplab_backbone"]

_UPSTREAM_ONLY = ("DeepLabV3Head", "DeepLabV3PlusHead")


def __getattr__(name: str) -> NoReturn:
    missing_name(__name__, _UPSTREAM_ONLY, name)
