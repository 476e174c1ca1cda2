"""Evaluation with small outputs: class maps and run lengths, where all evaluators of a run can take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from torch import nn

from mask2former_plugin.evaluation.boundary_ap import BoundaryCOCOEvaluator, BoundaryInstanceSegEvaluator
from mask2former_plugin.evaluation.instance_evaluation import (
    InstanceSegEvaluator,
    RunLengthCOCOEvaluator,
    RunLengthLVISEvaluator,
)
from mask2former_plugin.evaluation.panoptic_evaluation import BoundaryPanopticEvaluator
from mask2former_plugin.evaluation.semantic_pq import SemanticPQEvaluator
from mask2former_plugin.modeling.meta_arch import MaskFormer
from mask2former_plugin.test_time_augmentation import WithTTA

# Evaluators that read no class scores except for their argmax, and those that read no dense masks. Only these very
# classes: one that inherits from them may read more.
_TAKE_LABEL_MAPS = (
    BoundaryCOCOEvaluator,
    BoundaryInstanceSegEvaluator,
    BoundaryPanopticEvaluator,
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    InstanceSegEvaluator,
    RunLengthCOCOEvaluator,
    RunLengthLVISEvaluator,
    SemanticPQEvaluator,
    SemSegEvaluator,
)
_TAKE_RUN_LENGTHS = tuple(kind for kind in _TAKE_LABEL_MAPS if kind is not CityscapesInstanceEvaluator)


@contextmanager
def light_outputs(model: nn.Module, evaluators: Sequence[DatasetEvaluator]) -> Iterator[None]:
    """A :class:`MaskFormer` gives label maps and run lengths as long as the context lasts, where that is safe.

    The numbers stay what they are with scores and dense masks. An evaluator of another class than those that
    ``build_evaluator`` chooses says that it takes them by the attributes ``takes_label_maps`` and
    ``takes_run_lengths`` of its own class; inherited ones don't count.

    Args:
        model: the model, its ``DistributedDataParallel`` wrapper or the model with test-time augmentation; others stay
            as they are.
        evaluators: of the run.
    """
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    inner = inner.model if isinstance(inner, WithTTA) else inner
    if not isinstance(inner, MaskFormer):
        yield
        return
    kinds = {type(one) for one in _flat(evaluators)}
    before = inner.semantic_label_map, inner.instance_run_lengths
    inner.semantic_label_map |= all(k in _TAKE_LABEL_MAPS or vars(k).get("takes_label_maps") for k in kinds)
    inner.instance_run_lengths |= all(k in _TAKE_RUN_LENGTHS or vars(k).get("takes_run_lengths") for k in kinds)
    try:
        yield
    finally:
        inner.semantic_label_map, inner.instance_run_lengths = before


def _flat(evaluators: Sequence[DatasetEvaluator]) -> Iterator[DatasetEvaluator]:
    for one in evaluators:
        if isinstance(one, DatasetEvaluators):
            yield from _flat(one._evaluators)
        else:
            yield one
