"""What Detectron2's evaluators lack."""

from mask2former_plugin.evaluation.boundary_ap import BoundaryCOCOEvaluator, BoundaryInstanceSegEvaluator
from mask2former_plugin.evaluation.build import build_evaluator
from mask2former_plugin.evaluation.instance_evaluation import (
    InstanceSegEvaluator,
    RunLengthCOCOEvaluator,
    RunLengthLVISEvaluator,
)
from mask2former_plugin.evaluation.light import light_outputs
from mask2former_plugin.evaluation.panoptic_evaluation import BoundaryPanopticEvaluator
from mask2former_plugin.evaluation.semantic_pq import SemanticPQEvaluator

__all__ = [
    "BoundaryCOCOEvaluator",
    "BoundaryInstanceSegEvaluator",
    "BoundaryPanopticEvaluator",
    "InstanceSegEvaluator",
    "RunLengthCOCOEvaluator",
    "RunLengthLVISEvaluator",
    "SemanticPQEvaluator",
    "build_evaluator",
    "light_outputs",
]
