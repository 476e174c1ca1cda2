"""What Detectron2's evaluators lack."""

from mask2former_plugin.evaluation.build import build_evaluator
from mask2former_plugin.evaluation.instance_evaluation import InstanceSegEvaluator

__all__ = ["InstanceSegEvaluator", "build_evaluator"]
