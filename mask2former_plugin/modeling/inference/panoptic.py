"""Panoptic inference: every pixel goes to the query that explains it best."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from mask2former_plugin.modeling.inference.semantic import class_probabilities
from mask2former_plugin.modeling.inference.upsampling import Buffers, ImageMasks, Tiles, pieces

_ROUNDING = 1e-5  # of a product of probabilities, relative; some hundred times what float32 makes of it


class PanopticTask:
    """Segments from the queries that survive their class score (MaskFormer, section 3.4).

    A pixel belongs to the query with the largest score · mask probability. A query becomes a segment if it has
    pixels, and if these are at least ``overlap_threshold`` of the pixels where its own mask probability is 0.5 or
    more. Stuff segments of one class are merged.

    Args:
        class_logits: ``[Q, K+1]``.
        size: height and width of the result.
        thing_classes: contiguous ids of the thing classes.
        object_mask_threshold: class scores must be above it.
        overlap_threshold: see above.
        require_mask: True: a pixel of a segment needs mask probability 0.5 or more, else it is void (Mask2Former);
            False: the best query gets the pixel in any case (MaskFormer).
        mask_threshold: another probability in the place of 0.5.
    """

    name = "panoptic_seg"

    def __init__(
        self,
        class_logits: Tensor,
        size: tuple[int, int],
        *,
        thing_classes: Collection[int],
        object_mask_threshold: float,
        overlap_threshold: float,
        require_mask: bool = True,
        mask_threshold: float = 0.5,
    ) -> None:
        scores, labels = class_probabilities(class_logits).max(-1)
        keep = (labels != class_logits.shape[1] - 1) & (scores > object_mask_threshold)
        self.queries = keep.nonzero()[:, 0]
        self._scores, self._labels = scores[keep], labels[keep]
        self._thing_classes = thing_classes
        self._overlap_threshold = overlap_threshold
        self._require_mask = require_mask
        self._mask_threshold = mask_threshold
        # 0 is void, k + 1 the k-th kept query
        self._owner = torch.zeros(size, dtype=torch.int32, device=class_logits.device)
        # of each kept query: pixels where it is best, pixels of its own mask, pixels where it is both
        self._best, self._own, self._both = torch.zeros(
            (3, len(self.queries)), dtype=torch.int64, device=class_logits.device
        )

    def run(self, masks: ImageMasks) -> tuple[Tensor, list[dict]]:
        """Ids ``[H, W]`` int32, 0 = void; per segment ``id``, ``isthing`` and ``category_id`` (contiguous).

        Args:
            masks: logits of ``queries``.
        """
        if len(self.queries):
            self._assign(masks)
        ids = torch.zeros(len(self.queries) + 1, dtype=torch.int32)
        segments: list[dict] = []
        labels = self._labels.tolist()
        for number, group in enumerate(self.groups(), start=1):
            category = labels[group[0]]
            segments.append({"id": number, "isthing": category in self._thing_classes, "category_id": category})
            ids[[k + 1 for k in group]] = number
        ids = ids.to(self._owner.device)
        for start, stop in Tiles.of(masks.size, masks.device).rows:
            band = self._owner[start:stop]
            band.copy_(ids.index_select(0, band.flatten()).view(band.shape))
        return self._owner, segments

    def _assign(self, masks: ImageMasks) -> None:
        """Give the pixels to the queries and count them, computing only what the bounds leave open."""
        tiles = Tiles.of(masks.size, masks.device)
        low, high = (bound.sigmoid() for bound in masks.bounds(tiles.rows, tiles.columns))
        all_mask, no_mask = low >= self._mask_threshold, high < self._mask_threshold
        scores = self._scores.cpu()[:, None]
        may_win = ~(scores * high < (scores * low).amax(0) * (1 - _ROUNDING))
        # computed are masks that end in the tile, and those that may win; not a sole winner that is clear everywhere
        ends = ~(all_mask | no_mask)
        sole = (may_win.sum(0) == 1) & ~(may_win & ends).any(0)
        needed = ends | (may_win & ~sole)
        areas = tiles.areas
        self._best += (areas * (may_win & sole)).sum(1).to(masks.device)
        self._both += (areas * (may_win & sole & all_mask)).sum(1).to(masks.device)
        self._own += (areas * (all_mask & ~needed)).sum(1).to(masks.device)
        buffers = Buffers(masks.device)
        for t, (tile_rows, columns) in enumerate(tiles):
            owner = self._owner[:, slice(*columns)]
            if sole[t]:
                winner = int(may_win[:, t].nonzero())
                owner[slice(*tile_rows)] = winner + 1 if all_mask[winner, t] or not self._require_mask else 0
            positions = needed[:, t].nonzero()[:, 0].to(masks.device)
            for rows in pieces(tile_rows, columns, len(positions), masks.device) if len(positions) else ():
                probability = masks.block(rows, columns, positions, buffers).sigmoid_()
                sure = buffers("sure", probability.shape, probability.dtype)
                torch.ge(probability, self._mask_threshold, out=sure)
                self._own[positions] += sure.flatten(1).sum(1).long()
                if not sole[t]:
                    self._compete(positions, probability, sure, owner[slice(*rows)])

    def _compete(self, positions: Tensor, probability: Tensor, sure: Tensor, owner: Tensor) -> None:
        """The best of some queries gets the pixel.

        Args:
            positions: of the queries, ``[n]``.
            probability: of their masks, ``[n, rows, columns]``; used up.
            sure: 1 where it reaches the threshold, else 0; used up.
            owner: ``[rows, columns]``; written.
        """
        number = len(positions)
        value = probability.mul_(self._scores[positions, None, None])
        # torch's argmax takes many times as long as these passes. The code of a pixel is 2 · (n - k) + sure of its
        # first best query k.
        rank = torch.arange(number, 0, -1, device=positions.device)
        best = torch.eq(value, value.amax(0), out=value)
        code = best.mul_(sure.add_(2.0 * rank[:, None, None])).amax(0).long()
        counts = torch.bincount(code.flatten(), minlength=2 * number + 2).view(-1, 2)[rank]
        self._best[positions] += counts.sum(1)
        self._both[positions] += counts[:, 1]
        meaning = torch.zeros((number + 1, 2), dtype=torch.int32, device=positions.device)
        meaning[rank, 1] = positions.int() + 1
        if not self._require_mask:
            meaning[:, 0] = meaning[:, 1]
        owner.copy_(meaning.flatten().index_select(0, code.flatten()).view(owner.shape))

    def groups(self) -> list[list[int]]:
        """Of each segment, in the order of their ids, the positions in ``queries`` of the queries it is made of."""
        groups: list[list[int]] = []
        merged: dict[int, list[int]] = {}
        labels = self._labels.tolist()
        counts = zip(self._best.tolist(), self._own.tolist(), self._both.tolist())
        for k, (best, own, both) in enumerate(counts):
            if best == 0 or own == 0 or (self._require_mask and both == 0) or best / own < self._overlap_threshold:
                continue
            if labels[k] in merged:
                merged[labels[k]].append(k)
                continue
            groups.append([k])
            if labels[k] not in self._thing_classes:
                merged[labels[k]] = groups[-1]
        return groups
