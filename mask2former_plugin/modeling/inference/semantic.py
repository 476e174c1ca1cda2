"""Semantic inference: class scores of every pixel, summed over the queries, or the class that has most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mask2former_plugin.modeling.inference.light_outputs import LabelMap
from mask2former_plugin.modeling.layers.products import product
from mask2former_plugin.modeling.inference.upsampling import (
    AxisResize,
    Buffers,
    ImageMasks,
    Range,
    Tiles,
    empty_result,
    first_largest,
    resize_block,
)

_ROUNDING = 1e-4  # of a sum of products of probabilities, relative; far more than what float32 makes of it


def class_probabilities(class_logits: Tensor) -> Tensor:
    """Softmax over the classes, at least in float32."""
    return class_logits.softmax(-1, dtype=torch.promote_types(class_logits.dtype, torch.float32))


class SemanticTask:
    """Σ over queries of class probability · mask probability, without "no object" (MaskFormer, section 3.4).

    Args:
        class_logits: ``[Q, K+1]``.
        size: height and width of the result. Masks of another size give scores of that size, which are then resized.
        label_map: give the class with the largest score, never scores of the whole image.

    Attributes:
        weights: class probabilities ``[K, Q]``.
    """

    name = "sem_seg"

    def __init__(self, class_logits: Tensor, size: tuple[int, int], *, label_map: bool = False) -> None:
        self.queries = torch.arange(class_logits.shape[0], device=class_logits.device)
        self.weights = class_probabilities(class_logits)[:, :-1].T.contiguous()
        self._size = tuple(size)
        self._label_map = label_map

    def run(self, masks: ImageMasks) -> Tensor:
        """Scores, not normalised, ``[K, H, W]``; or a :class:`LabelMap` ``[H, W]``.

        Args:
            masks: logits of all queries.
        """
        tiles, device = Tiles.of(self._size, masks.device, all_masks=True), masks.device
        resize = [AxisResize([lengths], masks.dtype) for lengths in zip(masks.size, self._size)]
        sources = [
            [axis.weights(target, device) for target in targets]
            for axis, targets in zip(resize, (tiles.rows, tiles.columns))
        ]
        if self._label_map:
            result = torch.empty(self._size, dtype=torch.int64, device=device)
            candidates = self._candidates(masks, *([source for source, _ in axis] for axis in sources))
        else:
            result = empty_result((len(self.weights), *self._size), self.weights.dtype, device)
        buffers = Buffers(device)
        for t, (rows, columns) in enumerate(tiles):
            target = result[..., slice(*rows), slice(*columns)]
            weights = self.weights
            if self._label_map:
                classes = candidates[:, t].nonzero()[:, 0].to(device)
                if len(classes) == 1:
                    target.copy_(classes)
                    continue
                weights = weights[classes]
            row, column = divmod(t, len(tiles.columns))
            (row_source, row_weights), (column_source, column_weights) = sources[0][row], sources[1][column]
            probability = masks.block(row_source, column_source, buffers=buffers).sigmoid_()
            scores = product(weights, probability.flatten(1)).view(-1, *probability.shape[1:])
            if masks.size != self._size:
                resized = buffers("resized", (len(weights), *target.shape[-2:]), scores.dtype)
                scores = resize_block(scores, row_weights, column_weights, resized)
            target.copy_(classes[first_largest(scores)] if self._label_map else scores)
        return result.as_subclass(LabelMap) if self._label_map else result

    def _candidates(self, masks: ImageMasks, row_ranges: Sequence[Range], column_ranges: Sequence[Range]) -> Tensor:
        """Which classes may be the largest anywhere in a tile, bool ``[K, tiles]`` on the CPU."""
        low, high = (bound.sigmoid() for bound in masks.bounds(row_ranges, column_ranges))
        weights = self.weights.cpu()
        return ~(weights @ high < (weights @ low).amax(0) * (1 - _ROUNDING))
