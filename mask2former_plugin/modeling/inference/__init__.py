"""Inference: class and mask logits of one image become results; full-size maps exist only in strips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mask2former_plugin.modeling.inference.instance import InstanceTask
from mask2former_plugin.modeling.inference.panoptic import PanopticTask
from mask2former_plugin.modeling.inference.semantic import SemanticTask, resized_scores
from mask2former_plugin.modeling.inference.upsampling import ImageMasks

__all__ = [
    "ImageMasks",
    "InstanceTask",
    "PanopticTask",
    "SemanticTask",
    "Task",
    "needed_queries",
    "resized_scores",
    "run_tasks",
]


class Task(Protocol):
    """A result that is built from strips of mask logits.

    Attributes:
        name: key of the result in the model's output.
        queries: ascending indices of the queries whose masks it needs.
    """

    name: str
    queries: Tensor

    def update(self, start: int, logits: Tensor, probability: Tensor) -> None: ...

    def result(self) -> Any: ...


def needed_queries(tasks: Sequence[Task]) -> Tensor:
    """The queries that any of the tasks needs, ascending."""
    return torch.unique(torch.cat([task.queries for task in tasks]))


def run_tasks(tasks: Sequence[Task], queries: Tensor, masks: ImageMasks) -> dict[str, Any]:
    """Results by task name, from one pass over the strips.

    Args:
        tasks: made for results of the size of ``masks``.
        queries: ascending query indices of the masks, from :func:`needed_queries`.
        masks: logits of these queries.
    """
    # None: the task needs all of them and gets them without a copy
    positions = [None if len(t.queries) == len(queries) else torch.searchsorted(queries, t.queries) for t in tasks]
    if len(queries):
        for start, stop in masks.strips():
            logits = masks.rows(start, stop)
            probability = logits.sigmoid()
            for task, position in zip(tasks, positions):
                chosen = (logits, probability) if position is None else (logits[position], probability[position])
                task.update(start, *chosen)
    return {task.name: task.result() for task in tasks}
