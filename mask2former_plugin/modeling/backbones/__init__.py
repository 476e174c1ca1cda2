"""Backbones beside Detectron2's own."""

from mask2former_plugin.modeling.backbones.swin import D2SwinTransformer

__all__ = ["D2SwinTransformer"]
