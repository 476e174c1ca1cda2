"""Backbones: the interface, the registry and ResNet."""

from typing import NoReturn

from detectron2.modeling.backbone.backbone import Backbone
from detectron2.modeling.backbone.build import BACKBONE_REGISTRY, build_backbone
from detectron2.modeling.backbone.resnet import (
    BasicStem,
    BottleneckBlock,
    ResNet,
    ResNetBlockBase,
    build_resnet_backbone,
    make_stage,
)
from detectron2.utils.missing import missing_name

__all__ = [
    "BACKBONE_REGISTRY",
    "Backbone",
    "BasicStem",
    "BottleneckBlock",
    "ResNet",
    "ResNetBlockBase",
    "build_backbone",
    "build_resnet_backbone",
    "make_stage",
]

_UPSTREAM_ONLY = ("FPN", "MViT", "RegNet", "SimpleFeaturePyramid", "SwinTransformer", "ViT", "get_vit_lr_decay_rate")


def __getattr__(name: str) -> NoReturn:
    missing_name(__name__, _UPSTREAM_ONLY, name)
