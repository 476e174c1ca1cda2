"""Several results from one prediction, tile by tile, in full precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from mask2former_plugin.modeling.inference.upsampling import ImageMasks


class Task(Protocol):
    """A result that is built from mask logits, tile by tile.

    Attributes:
        name: key of the result in the model's output.
        queries: ascending indices of the queries whose masks it needs.
    """

    name: str
    queries: Tensor

    def run(self, masks: ImageMasks) -> Any: ...


def needed_queries(tasks: Sequence[Task]) -> Tensor:
    """The queries that any of the tasks needs, ascending."""
    return torch.unique(torch.cat([task.queries for task in tasks]))


def run_tasks(tasks: Sequence[Task], queries: Tensor, masks: ImageMasks) -> dict[str, Any]:
    """Results by task name.

    Args:
        tasks: made for results of the size of ``masks``.
        queries: ascending query indices of the masks, from :func:`needed_queries`.
        masks: logits of these queries.
    """
    with full_precision(masks.device):
        return {task.name: task.run(masks_of_task(task, queries, masks)) for task in tasks}


def masks_of_task(task: Task, queries: Tensor, masks: ImageMasks) -> ImageMasks:
    """The masks of the queries that a task needs, from those of ``queries``; without a copy if it needs all."""
    if len(task.queries) == len(queries):
        return masks
    return masks.select(torch.searchsorted(queries, task.queries))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Resizing is a matrix product here: in bfloat16 or TF32 it would move the borders of masks."""
    backend = getattr(torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn, "matmul", None)
    with torch.autocast(device.type, enabled=False):
        if hasattr(backend, "fp32_precision"):
            before, backend.fp32_precision = backend.fp32_precision, "ieee"
            try:
                yield
            finally:
                backend.fp32_precision = before
        else:  # torch before 2.9
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
