"""Instance inference: the best pairs of query and class, with binary masks and their boxes."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from torch import Tensor

from mask2former_plugin.modeling.inference.instance_masks import DenseMasks, RunLengthMasks
from mask2former_plugin.modeling.inference.semantic import class_probabilities
from mask2former_plugin.modeling.inference.upsampling import Buffers, ImageMasks, Tiles, pieces


class InstanceTask:
    """The ``top_k`` pairs of query and class with the largest class probability (Mask2Former, section 3).

    The score of an instance is class probability · mean mask probability inside its mask.

    Args:
        class_logits: ``[Q, K+1]``.
        size: height and width of the result.
        top_k: pairs kept; all if there are fewer.
        thing_classes: contiguous ids of the classes that may be instances; None: all.
        things_first: True: ``top_k`` among thing classes; False: stuff is dropped afterwards, so that fewer remain
            (published).
        mask_threshold: a mask is where the mask probability is above it.
        encoded: give COCO's run lengths, never dense masks.
        canvas: height and width of the masks in run lengths, and the corner of the result in them.
    """

    name = "instances"

    def __init__(
        self,
        class_logits: Tensor,
        size: tuple[int, int],
        *,
        top_k: int,
        thing_classes: Collection[int] | None = None,
        things_first: bool = False,
        mask_threshold: float = 0.5,
        encoded: bool = False,
        canvas: tuple[tuple[int, int], tuple[int, int]] | None = None,
    ) -> None:
        probability = class_probabilities(class_logits)[:, :-1]
        classes = torch.arange(probability.shape[1], device=probability.device)
        is_thing = torch.ones_like(classes, dtype=torch.bool)
        if thing_classes is not None:
            is_thing = torch.isin(
                classes, torch.tensor(sorted(thing_classes), dtype=torch.int64, device=classes.device)
            )
        if things_first:
            probability, classes, is_thing = probability[:, is_thing], classes[is_thing], is_thing[is_thing]
        scores, pairs = probability.flatten().topk(min(top_k, probability.numel()), sorted=False)
        number = max(1, len(classes))
        keep = is_thing[pairs % number]
        scores, pairs = scores[keep], pairs[keep]
        # a query may give several instances; its mask is computed once
        self.queries, query_of = torch.unique(pairs // number, return_inverse=True)
        order = _first_of_each_first(query_of.tolist(), len(self.queries))
        # the first masks are those of the queries, the others repeat them
        self._sources = query_of[order]
        self._scores, self._classes = scores[order], classes[pairs[order] % number]
        self._size = tuple(size)
        self._encoded = encoded
        self._canvas = canvas or (self._size, (0, 0))
        self._threshold = torch.tensor(mask_threshold, dtype=torch.float64).logit().item()

    def run(self, masks: ImageMasks) -> Instances:
        """Instances, unsorted.

        Args:
            masks: logits of ``queries``.

        Returns:
            ``pred_masks`` bool ``[N, H, W]``, or ``pred_masks_rle``, a list of COCO's run lengths; ``pred_boxes``
            around the masks (zeros for an empty mask), ``scores`` and ``pred_classes``.
        """
        distinct, device, threshold = len(self.queries), masks.device, self._threshold
        if self._encoded:
            kept: DenseMasks | RunLengthMasks = RunLengthMasks(self._canvas[0], device, self._canvas[1])
        else:
            kept = DenseMasks(len(self._sources), self._size, device)
        area, inside = torch.zeros((2, distinct), dtype=torch.float64, device=device)
        # the largest logit of each row and of each column tells where a mask begins and ends
        row_peaks, column_peaks = (
            torch.full((distinct, length), -math.inf, dtype=masks.dtype, device=device) for length in self._size
        )
        buffers = Buffers(device)
        # a tile where the bound says that there is no mask is left out
        tiles = Tiles.of(self._size, device)
        occupied = ~(masks.bounds(tiles.rows, tiles.columns)[1] < threshold)
        occupied = occupied.unflatten(1, (len(tiles.rows), len(tiles.columns)))
        order = product(enumerate(tiles.columns), enumerate(tiles.rows))  # run lengths go down the columns
        for (column, columns), (row, tile_rows) in order:
            positions = occupied[:, row, column].nonzero()[:, 0].to(device)
            for rows in pieces(tile_rows, columns, len(positions), device) if len(positions) else ():
                logits = masks.block(rows, columns, positions, buffers)
                mask = torch.gt(logits, threshold, out=buffers("mask", logits.shape, torch.bool))
                kept.put(positions, rows, columns, mask)
                for peaks, (start, stop), dim in ((row_peaks, rows, 2), (column_peaks, columns, 1)):
                    part = peaks[:, start:stop]
                    part[positions] = torch.maximum(part[positions], logits.amax(dim))
                area[positions] += mask.view(torch.uint8).flatten(1).sum(1, dtype=torch.int32)
                # outside of the mask the probability becomes 0
                probability = F.threshold_(logits, threshold, -math.inf).sigmoid_()
                inside[positions] += probability.flatten(1).sum(1)

        left, right = _extent(column_peaks > threshold)
        top, bottom = _extent(row_peaks > threshold)
        boxes = torch.stack([left, top, right, bottom], dim=1)
        mask_scores = (inside / (area + 1e-6)).to(self._scores.dtype)
        instances = Instances(self._size)
        instances.set(kept.field, kept.result(self._sources.tolist(), boxes))
        instances.pred_boxes = Boxes(boxes[self._sources].to(torch.float32))
        instances.scores = self._scores * mask_scores[self._sources]
        instances.pred_classes = self._classes
        return instances


def _first_of_each_first(groups: Sequence[int], number: int) -> list[int]:
    """An order of the entries that begins with one of each group 0 … ``number`` - 1."""
    first: dict[int, int] = {}
    rest = []
    for i, group in enumerate(groups):
        if first.setdefault(group, i) != i:
            rest.append(i)
    return [first[group] for group in range(number)] + rest


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last True of each row of ``[N, L]``; 0, 0 where there is none."""
    length = occupied.shape[1]
    first = occupied.to(torch.uint8).argmax(1)
    end = length - occupied.flip(1).to(torch.uint8).argmax(1)
    return first, end * occupied.any(1)
