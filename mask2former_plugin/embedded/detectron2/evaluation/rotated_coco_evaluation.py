"""Placeholder for rotated-box evaluation, which upstream Detectron2 has and this slice has not."""

from detectron2.evaluation.evaluator import DatasetEvaluator
from detectron2.utils.missing import needs_upstream


class RotatedCOCOEvaluator(DatasetEvaluator):
    """Importable name; making one raises NotImplementedError that says how to install upstream."""

    def __init__(self, *args, **kwargs) -> None:
        needs_upstream("RotatedCOCOEvaluator")
