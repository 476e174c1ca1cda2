"""MaskFormer and Mask2Former for Detectron2."""

from mask2former_plugin.detectron2_runtime import ensure_detectron2

ensure_detectron2()
