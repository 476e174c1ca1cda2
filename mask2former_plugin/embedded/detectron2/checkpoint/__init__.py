"""Saving and loading of models and training states."""

from fvcore.common.checkpoint import Checkpointer, PeriodicCheckpointer

from detectron2.checkpoint import catalog as _catalog  # noqa: F401  (registers catalog://)
from detectron2.checkpoint.detection_checkpoint import DetectionCheckpointer

__all__ = ["Checkpointer", "DetectionCheckpointer", "PeriodicCheckpointer"]
