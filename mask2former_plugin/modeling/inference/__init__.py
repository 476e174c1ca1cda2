"""Inference: class and mask logits of one image become results; full-size maps exist only in tiles."""

from mask2former_plugin.modeling.inference.instance import InstanceTask
from mask2former_plugin.modeling.inference.panoptic import PanopticTask
from mask2former_plugin.modeling.inference.semantic import SemanticTask
from mask2former_plugin.modeling.inference.tasks import Task, needed_queries, run_tasks
from mask2former_plugin.modeling.inference.upsampling import ImageMasks

__all__ = ["ImageMasks", "InstanceTask", "PanopticTask", "SemanticTask", "Task", "needed_queries", "run_tasks"]
