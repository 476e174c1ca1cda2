"""Image processor: images and segmentation maps to tensors, predictions to maps and segments (docs/huggingface.md)."""

from mask2former_plugin.processing.image_processor import ImageProcessor

__all__ = ["ImageProcessor"]
