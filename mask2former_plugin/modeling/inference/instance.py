"""Instance inference: the best pairs of query and class, with binary masks and their boxes."""

from __future__ import annotations

from collections.abc import Collection

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from mask2former_plugin.modeling.inference.semantic import class_probabilities


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
        self._scores, pairs = scores[keep], pairs[keep]
        self._classes = classes[pairs % number]
        # a query may give several instances; its mask is computed once
        self.queries, self._query_of = torch.unique(pairs // number, return_inverse=True)
        self._size = tuple(size)
        self._logit_threshold = torch.tensor(mask_threshold, dtype=torch.float64).logit().item()
        device, distinct = class_logits.device, len(self.queries)
        self._masks = torch.zeros((len(pairs), *size), dtype=torch.bool, device=device)
        self._rows = torch.zeros((distinct, size[0]), dtype=torch.bool, device=device)
        self._columns = torch.zeros((distinct, size[1]), dtype=torch.bool, device=device)
        self._area = torch.zeros(distinct, dtype=torch.float64, device=device)
        self._inside = torch.zeros_like(self._area)

    def update(self, start: int, logits: Tensor, probability: Tensor) -> None:
        """Take the rows from ``start`` on: mask logits and mask probabilities of ``queries``, ``[Q, rows, W]``."""
        mask = logits > self._logit_threshold
        rows = slice(start, start + mask.shape[1])
        self._masks[:, rows] = mask[self._query_of]
        self._rows[:, rows] = mask.any(2)
        self._columns |= mask.any(1)
        self._area += mask.flatten(1).sum(1)
        self._inside += (probability * mask).flatten(1).sum(1)

    def result(self) -> Instances:
        """Instances, unsorted.

        Returns:
            ``pred_masks`` bool ``[N, H, W]``, ``pred_boxes`` around the masks (zeros for an empty mask), ``scores`` and
            ``pred_classes``.
        """
        left, right = _extent(self._columns)
        top, bottom = _extent(self._rows)
        boxes = torch.stack([left, top, right, bottom], dim=1).to(torch.float32)
        mask_scores = (self._inside / (self._area + 1e-6)).to(self._scores.dtype)
        instances = Instances(self._size)
        instances.pred_masks = self._masks
        instances.pred_boxes = Boxes(boxes[self._query_of])
        instances.scores = self._scores * mask_scores[self._query_of]
        instances.pred_classes = self._classes
        return instances


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last True of each row of ``[N, L]``; 0, 0 where there is none."""
    length = occupied.shape[1]
    first = occupied.to(torch.uint8).argmax(1)
    end = length - occupied.flip(1).to(torch.uint8).argmax(1)
    return first, end * occupied.any(1)
