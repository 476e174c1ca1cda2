"""The class with the largest score at every pixel, from the few classes and queries of a tile that may decide it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mask2former_plugin.modeling.inference.upsampling import (
    Buffers,
    ImageMasks,
    Range,
    Tiles,
    first_largest,
    resize_block,
)

# Of a sum of products of probabilities, relative; far more than what float32 makes of it.
_ROUNDING = 1e-4
# Queries that together account for this part of what may change the order of the classes in a tile count as constant.
_CONSTANT = 5e-4
# From this part of the undecided pixels of a tile on it is faster to compute all of them.
_UNDECIDED = 0.1
# Cells of the prediction's grid that a tile covers vertically: bounds of larger ones tell less, smaller ones cost more
# calls. Least and most rows; there are half as many columns more.
_CELLS = 6
_ROWS = {"cpu": (64, 128)}
_ROWS_GPU = (256, 512)


def label_tiles(size: tuple[int, int], masks: ImageMasks) -> Tiles:
    """Tiles of a label map that suit the device and the enlargement of the masks."""
    least, most = _ROWS.get(masks.device.type, _ROWS_GPU)
    rows = min(max(_CELLS * size[0] // max(1, masks.logits.shape[-2]), least), most)
    return Tiles(tuple(size), (rows, rows + rows // 2))


class BestClasses:
    """Decides tiles by bounds, then by few queries, and at the pixels that this leaves undecided by all queries.

    The bounds of the mask probabilities in a tile bound the score of each class there; what stays below the best lower
    bound is out. Of the rest only differences matter. A query whose probability p lies within m ± r contributes
    w·m ± w·r to a class of weight w, and to the difference of two classes an uncertainty of at most
    r · (max w - min w). Queries with the least of it are replaced by their constant w·m. Where the best class leads by
    more than the sum of these uncertainties and rounding, it is the best class of all queries, too; the other pixels
    are computed from all of them.

    Args:
        weights: class probabilities ``[K, Q]``.
        masks: logits of all queries.
        row_ranges, column_ranges: the tiles are all their pairs, row by row, at the size of the masks.
    """

    def __init__(
        self, weights: Tensor, masks: ImageMasks, row_ranges: Sequence[Range], column_ranges: Sequence[Range]
    ) -> None:
        low, high = (bound.sigmoid() for bound in masks.bounds(row_ranges, column_ranges))
        weights = weights.cpu()
        may_win = ~(weights @ high < (weights @ low).amax(0) * (1 - _ROUNDING))
        self._masks = masks
        self._tiles = [(rows, columns) for rows in row_ranges for columns in column_ranges]
        self._may_win = may_win.T.contiguous().numpy()
        self._middle, self._reach = ((part / 2).T.contiguous().numpy() for part in (high + low, high - low))
        self._weights = weights.numpy()
        self._buffers = Buffers(masks.device)

    def put(self, tile: int, target: Tensor, resize: tuple[Tensor, Tensor] | None = None) -> None:
        """Write the classes of a tile.

        Args:
            tile: its number.
            target: of any type that holds the numbers of the classes, ``[H, W]``.
            resize: weights of rows and of columns, if scores are to be resized from the size of the masks.
        """
        classes = np.flatnonzero(self._may_win[tile])
        if len(classes) == 1:
            target.fill_(int(classes[0]))
            return
        ranges, device = self._tiles[tile], self._masks.device
        weights = self._weights[classes]
        queries, offset, error = self._plan(tile, weights)
        weights = torch.from_numpy(weights).to(device)
        queries, offset = torch.from_numpy(queries).to(device), torch.from_numpy(offset).to(device)
        probability = self._masks.block(*ranges, queries, self._buffers).sigmoid_()
        scores = torch.addmm(offset[:, None], weights[:, queries], probability.flatten(1))
        size = probability.shape[1:]
        values = self._resized(scores, size, resize)
        if len(queries) < weights.shape[1]:
            best = values.amax(0)
            undecided = (values >= best - (best * _ROUNDING + error)).sum(0) > 1
            places = _sources(undecided, resize).flatten().nonzero()[:, 0]
            if len(places) > _UNDECIDED * undecided.numel():
                probability = self._masks.block(*ranges, buffers=self._buffers)
                scores = weights @ probability.sigmoid_().flatten(1)
            elif len(places):
                scores[:, places] = weights @ self._masks.pixels(*ranges, places).sigmoid_()
            if len(places):
                values = self._resized(scores, size, resize)
        target.copy_(first_largest(values, torch.from_numpy(classes).to(device)))

    def _plan(self, tile: int, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Which queries have to be computed to decide between some classes.

        Args:
            tile: its number.
            weights: of the classes, ``[c, Q]``.

        Returns:
            The queries, ascending ``[n]``; what the others contribute to each class if they are in the middle of their
            bounds, ``[c]``; how far the differences of two classes may be from that.
        """
        uncertainty = (weights.max(0) - weights.min(0)) * self._reach[tile]
        order = np.argsort(uncertainty)
        total = np.cumsum(uncertainty[order], dtype=np.float64)
        constant = int(np.searchsorted(total, _CONSTANT * total[-1], side="right"))
        error = float(total[constant - 1]) if constant else 0.0
        if 2 * constant < len(order):  # hardly fewer queries, and some pixels twice
            constant, error = 0, 0.0
        others = order[:constant]
        return np.sort(order[constant:]), weights[:, others] @ self._middle[tile, others], error

    def _resized(self, scores: Tensor, size: Sequence[int], resize: tuple[Tensor, Tensor] | None) -> Tensor:
        scores = scores.view(-1, *size)
        return scores if resize is None else resize_block(scores, *resize)


def _sources(places: Tensor, resize: tuple[Tensor, Tensor] | None) -> Tensor:
    """The pixels from which some pixels ``[H, W]`` are resized, bool ``[h, w]``."""
    if resize is None:
        return places
    rows, columns = ((weights > 0).to(weights.dtype) for weights in resize)
    return rows.T @ places.to(rows.dtype) @ columns > 0
