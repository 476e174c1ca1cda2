"""Registry of backbones."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling._lookup import lookup
from detectron2.modeling.backbone.backbone import Backbone
from detectron2.utils.registry import Registry

BACKBONE_REGISTRY = Registry("BACKBONE")
BACKBONE_REGISTRY.__doc__ = (
    "Callables ``(cfg, input_shape: ShapeSpec) -> Backbone``, chosen by ``MODEL.BACKBONE.NAME``."
)


def build_backbone(cfg: CfgNode, input_shape: ShapeSpec | None = None) -> Backbone:
    """Build ``cfg.MODEL.BACKBONE.NAME``.

    Args:
        input_shape: its channels are those of the image; by default as many as ``MODEL.PIXEL_MEAN`` has.
    """
    if input_shape is None:
        input_shape = ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN))
    name = cfg.MODEL.BACKBONE.NAME
    backbone = lookup(BACKBONE_REGISTRY, name, "MODEL.BACKBONE.NAME")(cfg, input_shape)
    assert isinstance(backbone, Backbone), f"'{name}' must give a Backbone, gave {type(backbone).__name__}"
    return backbone
