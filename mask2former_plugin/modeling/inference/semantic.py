"""Semantic inference: class scores of every pixel, summed over the queries, or the class that has most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mask2former_plugin.modeling.inference.label_map import BestClasses, label_tiles
from mask2former_plugin.modeling.inference.light_outputs import LabelMap
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
        if not self._label_map:
            return mean_scores([(ScoreTiles(self.weights, masks, self._size), False)], self._size)
        tiles = label_tiles(self._size, masks)
        resized = masks.size != self._size
        axes = [AxisResize([lengths], masks.dtype) for lengths in zip(masks.size, self._size)]
        rows, columns = (
            [axis.weights(target, masks.device) for target in targets]
            for axis, targets in zip(axes, (tiles.rows, tiles.columns))
        )
        weights = [(one, other) for _, one in rows for _, other in columns]
        result = torch.empty(self._size, dtype=torch.int64, device=masks.device)
        best = BestClasses(self.weights, masks, [source for source, _ in rows], [source for source, _ in columns])
        for t, (rows, columns) in enumerate(tiles):
            best.put(t, result[slice(*rows), slice(*columns)], weights[t] if resized else None)
        return result.as_subclass(LabelMap)


class ScoreTiles:
    """Class scores of any part of a result.

    Args:
        weights: class probabilities ``[K, Q]``.
        masks: logits of all queries.
        size: height and width of the result; scores at the size of the masks are resized to it.
    """

    def __init__(self, weights: Tensor, masks: ImageMasks, size: tuple[int, int]) -> None:
        self._weights, self._masks = weights, masks
        self._axes = None
        if masks.size != size:
            self._axes = [AxisResize([lengths], masks.dtype) for lengths in zip(masks.size, size)]

    def block(self, rows: Range, columns: Range, buffers: Buffers) -> Tensor:
        """Scores ``[K, rows, columns]``."""
        resize = None
        if self._axes is not None:
            parts = [axis.weights(part, self._masks.device) for axis, part in zip(self._axes, (rows, columns))]
            (rows, columns), resize = zip(*parts)
        probability = self._masks.block(rows, columns, buffers=buffers).sigmoid_()
        scores = product(self._weights, probability.flatten(1)).view(-1, *probability.shape[1:])
        return scores if resize is None else resize_block(scores, *resize)

    @property
    def result_options(self) -> tuple[int, torch.dtype, torch.device]:
        """Number of classes, type and device of the scores."""
        return len(self._weights), self._weights.dtype, self._masks.device


def mean_scores(
    passes: Sequence[tuple[ScoreTiles, bool]], size: tuple[int, int], *, label_map: bool = False
) -> Tensor:
    """The mean of the scores of several versions of an image, ``[K, H, W]``, or its :class:`LabelMap` ``[H, W]``.

    Args:
        passes: of each version, its scores, and whether it is the mirror image, left and right exchanged.
        size: height and width of the result.
        label_map: give the class with the largest mean; scores of the whole image never exist.
    """
    number, dtype, device = passes[0][0].result_options
    if label_map:
        result = torch.empty(size, dtype=torch.int64, device=device)
    else:
        result = empty_result((number, *size), dtype, device)
    buffers = Buffers(device)
    for rows, columns in Tiles.of(size, device, all_masks=True):
        total = None
        for scores, mirrored in passes:
            if mirrored:
                part = scores.block(rows, (size[1] - columns[1], size[1] - columns[0]), buffers).flip(2)
            else:
                part = scores.block(rows, columns, buffers)
            total = part if total is None else total.add_(part)
        if len(passes) > 1:
            total.div_(len(passes))
        result[..., slice(*rows), slice(*columns)] = first_largest(total) if label_map else total
    return result.as_subclass(LabelMap) if label_map else result
