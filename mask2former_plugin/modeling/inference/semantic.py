"""Semantic inference: class scores of every pixel, summed over the queries, or the class that has most."""

from __future__ import annotations

import torch
from torch import Tensor

from mask2former_plugin.modeling.inference.label_map import BestClasses, label_tiles
from mask2former_plugin.modeling.inference.light_outputs import LabelMap
from mask2former_plugin.modeling.inference.upsampling import (
    AxisResize,
    Buffers,
    ImageMasks,
    Tiles,
    empty_result,
    resize_block,
)
from mask2former_plugin.modeling.layers.products import product


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
        device = masks.device
        tiles = label_tiles(self._size, masks) if self._label_map else Tiles.of(self._size, device, all_masks=True)
        axes = [AxisResize([lengths], masks.dtype) for lengths in zip(masks.size, self._size)]
        rows, columns = (
            [axis.weights(target, device) for target in targets]
            for axis, targets in zip(axes, (tiles.rows, tiles.columns))
        )
        parts = [(source, other, (weights, others)) for source, weights in rows for other, others in columns]
        resized = masks.size != self._size
        if self._label_map:
            result = torch.empty(self._size, dtype=torch.int64, device=device)
            best = BestClasses(self.weights, masks, [source for source, _ in rows], [source for source, _ in columns])
            for t, ((rows, columns), (_, _, weights)) in enumerate(zip(tiles, parts)):
                best.put(t, result[slice(*rows), slice(*columns)], weights if resized else None)
            return result.as_subclass(LabelMap)
        result = empty_result((len(self.weights), *self._size), self.weights.dtype, device)
        buffers = Buffers(device)
        for (rows, columns), (row_source, column_source, weights) in zip(tiles, parts):
            probability = masks.block(row_source, column_source, buffers=buffers).sigmoid_()
            scores = product(self.weights, probability.flatten(1)).view(-1, *probability.shape[1:])
            result[:, slice(*rows), slice(*columns)] = resize_block(scores, *weights) if resized else scores
        return result
