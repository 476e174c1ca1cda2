"""Panoptic inference: every pixel goes to the query that explains it best."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from mask2former_plugin.modeling.inference.semantic import class_probabilities


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
        self._counts = torch.zeros((3, len(self.queries)), dtype=torch.int64, device=class_logits.device)

    def update(self, start: int, logits: Tensor, probability: Tensor) -> None:
        """Take the rows from ``start`` on: mask logits and mask probabilities of ``queries``, ``[Q, rows, W]``."""
        number = len(self.queries)
        if number == 0:
            return
        owner = (self._scores[:, None, None] * probability).argmax(0)
        sure = probability.gather(0, owner[None])[0] >= self._mask_threshold
        self._counts[0] += torch.bincount(owner.flatten(), minlength=number)
        self._counts[1] += (probability >= self._mask_threshold).flatten(1).sum(1)
        self._counts[2] += torch.bincount(owner[sure], minlength=number)
        owner += 1
        if self._require_mask:
            owner *= sure
        self._owner[start : start + owner.shape[0]] = owner

    def groups(self) -> list[list[int]]:
        """Of each segment, in the order of their ids, the positions in ``queries`` of the queries it is made of."""
        groups: list[list[int]] = []
        merged: dict[int, list[int]] = {}
        labels = self._labels.tolist()
        for k, (best, own, both) in enumerate(self._counts.T.tolist()):
            if best == 0 or own == 0 or (self._require_mask and both == 0) or best / own < self._overlap_threshold:
                continue
            if labels[k] in merged:
                merged[labels[k]].append(k)
                continue
            groups.append([k])
            if labels[k] not in self._thing_classes:
                merged[labels[k]] = groups[-1]
        return groups

    def result(self) -> tuple[Tensor, list[dict]]:
        """Ids ``[H, W]`` int32, 0 = void; per segment ``id``, ``isthing`` and ``category_id`` (contiguous)."""
        ids = torch.zeros(len(self.queries) + 1, dtype=torch.int32)
        segments: list[dict] = []
        labels = self._labels.tolist()
        for number, group in enumerate(self.groups(), start=1):
            category = labels[group[0]]
            segments.append({"id": number, "isthing": category in self._thing_classes, "category_id": category})
            ids[[k + 1 for k in group]] = number
        return ids.to(self._owner.device)[self._owner.long()], segments
