"""Semantic inference: class scores of every pixel, summed over the queries."""

from __future__ import annotations

import torch
from torch import Tensor

from mask2former_plugin.modeling.inference.upsampling import ImageMasks, RowResize, strips


def class_probabilities(class_logits: Tensor) -> Tensor:
    """Softmax over the classes, at least in float32."""
    return class_logits.softmax(-1, dtype=torch.promote_types(class_logits.dtype, torch.float32))


class SemanticTask:
    """Σ over queries of class probability · mask probability, without "no object" (MaskFormer, section 3.4).

    Args:
        class_logits: ``[Q, K+1]``.
        size: height and width of the result.
    """

    name = "sem_seg"

    def __init__(self, class_logits: Tensor, size: tuple[int, int]) -> None:
        self.queries = torch.arange(class_logits.shape[0], device=class_logits.device)
        self._weights = class_probabilities(class_logits)[:, :-1].T
        self._scores = self._weights.new_empty((self._weights.shape[0], *size))

    def update(self, start: int, logits: Tensor, probability: Tensor) -> None:
        """Take the rows from ``start`` on: mask logits and mask probabilities of ``queries``, ``[Q, rows, W]``."""
        self._scores[:, start : start + probability.shape[1]] = self.scores(probability)

    def scores(self, probability: Tensor) -> Tensor:
        """Class scores ``[K, rows, W]`` from mask probabilities ``[Q, rows, W]``."""
        return (self._weights @ probability.flatten(1)).unflatten(1, probability.shape[1:])

    def result(self) -> Tensor:
        """Scores, not normalised, ``[K, H, W]``."""
        return self._scores


def resized_scores(class_logits: Tensor, masks: ImageMasks, output_size: tuple[int, int]) -> Tensor:
    """Class scores at the size of ``masks``, then resized, ``[K, *output_size]``: postprocessing after inference."""
    task = SemanticTask(class_logits, output_size)
    resize = RowResize(masks.size, output_size, masks.logits.dtype)
    num_maps = masks.logits.shape[0] + class_logits.shape[1]
    for start, stop in strips(output_size[0], max(output_size[1], masks.size[1]), num_maps, masks.logits.device):
        needed = resize.source_rows(start, stop)
        scores = task.scores(masks.rows(*needed).sigmoid())
        task.result()[:, start:stop] = resize(scores, start, stop)
    return task.result()
