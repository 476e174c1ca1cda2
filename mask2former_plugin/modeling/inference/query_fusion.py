"""Fuses several passes over one image, mirrored or resized, query by query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mask2former_plugin.modeling.inference.semantic import ScoreTiles, SemanticTask, class_probabilities
from mask2former_plugin.modeling.inference.upsampling import Buffers, ImageMasks, Range
from mask2former_plugin.modeling.mask_logits import MaskLogits

_POINTS_PER_SIDE = 112  # where masks are compared; as many points as the matcher of the training takes
_SAME_OBJECT = 0.5  # mask IoU above which two masks are the same object, as in panoptic quality


@dataclass(frozen=True)
class Pass:
    """What the network says of one version of an image.

    Attributes:
        class_logits: ``[Q, K+1]``.
        masks: of this image alone, B = 1.
        padded_size: height and width of the network's input.
        image_size: height and width of the version of the image inside it.
        flipped: the version is the mirror image, left and right exchanged.
    """

    class_logits: Tensor
    masks: MaskLogits
    padded_size: tuple[int, int]
    image_size: tuple[int, int]
    flipped: bool

    def sampled_masks(self) -> Tensor:
        """Mask probabilities ``[Q, P]`` on a grid of points that is the same for all versions of the image."""
        device = self.masks.features.device
        steps = (torch.arange(_POINTS_PER_SIDE, device=device, dtype=torch.float32) + 0.5) / _POINTS_PER_SIDE
        x = 1 - steps if self.flipped else steps
        y, x = torch.meshgrid(steps, x, indexing="ij")
        inside = torch.tensor([i / p for i, p in zip(self.image_size[::-1], self.padded_size[::-1])], device=device)
        points = torch.stack([x, y], dim=-1).flatten(0, 1) * inside
        return self.masks.at(points[None])[0].sigmoid()

    def image_masks(self, queries: Tensor, size: tuple[int, int]) -> ImageMasks:
        """Mask logits of some queries, ready to be resized to ``size``; still mirrored if the version is."""
        logits = self.masks.select(torch.zeros(len(queries), dtype=torch.int64), queries)
        return ImageMasks(logits, self.padded_size, self.image_size, size)

    def scores(self, size: tuple[int, int], *, masks_first: bool = True) -> ScoreTiles:
        """Class scores at ``size``; still mirrored if the version is.

        Args:
            masks_first: resize masks, not scores, from the size of the image.
        """
        task = SemanticTask(self.class_logits, size)
        masks = self.image_masks(task.queries, size if masks_first else self.image_size)
        return ScoreTiles(task.weights, masks, size)


def group_queries(class_probability: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Which queries of several passes mean the same thing.

    Queries of different passes have no common order, so every pass is assigned to the groups of the passes before it
    by the Hungarian algorithm. The similarity is mask IoU · agreement of the classes: IoU in its form for soft masks,
    Σab / (Σa² + Σb² - Σab), and the sum over the classes of the smaller probability; both are 1 for identical queries
    only. An assigned pair is the same object if its IoU is above 0.5, the rule of panoptic quality. What a later pass
    finds and no earlier one did (a query left over whose best class is an object) starts a group of its own: small
    objects are often seen at the larger scales only.

    Args:
        class_probability: of each pass, ``[Q, K+1]``, the last one "no object".
        masks: mask probabilities of each pass at the same points, ``[Q, P]``.

    Returns:
        ``[G, passes]`` int64: the query of each pass in each group, -1 where it has none. The first Q groups are the
        queries of the first pass in their order.
    """
    device = masks[0].device
    members = torch.arange(len(masks[0]), device=device)[:, None]
    class_sum, mask_sum = class_probability[0].clone(), masks[0].clone()
    for classes, mask in zip(class_probability[1:], masks[1:]):
        count = (members >= 0).sum(1, keepdim=True)
        iou = _soft_iou(mask_sum / count, mask)
        agreement = torch.stack([torch.minimum(one, classes).sum(1) for one in class_sum / count])
        groups, queries = linear_sum_assignment((iou * agreement).cpu().numpy(), maximize=True)
        groups, queries = torch.as_tensor(groups, device=device), torch.as_tensor(queries, device=device)
        same = iou[groups, queries] > _SAME_OBJECT
        groups, queries = groups[same], queries[same]
        column = torch.full((len(members), 1), -1, device=device)
        column[groups, 0] = queries
        class_sum[groups] += classes[queries]
        mask_sum[groups] += mask[queries]

        found = classes.argmax(1) != classes.shape[1] - 1
        found[queries] = False
        new = found.nonzero()
        absent = new.new_full((len(new), members.shape[1]), -1)
        members = torch.cat([torch.cat([members, column], dim=1), torch.cat([absent, new], dim=1)])
        class_sum, mask_sum = torch.cat([class_sum, classes[found]]), torch.cat([mask_sum, mask[found]])
    return members


def _soft_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of masks of values in 0..1, ``[N, P]`` and ``[M, P]`` → ``[N, M]``."""
    common = first @ second.T
    union = first.square().sum(1)[:, None] + second.square().sum(1) - common
    return common / union.clamp(min=torch.finfo(common.dtype).tiny)


class FusedPasses:
    """Groups of queries of several passes: their mean class and mask probabilities.

    The class probabilities of a group are the mean over all passes, and a pass that did not see the object says "no
    object": what few passes confirm gets a low score (as in weighted boxes fusion, Solovyev et al., 2021). Its mask is
    the mean over the passes that saw it. One pass alone stays what it is.

    Args:
        passes: over the same image.
    """

    def __init__(self, passes: Sequence[Pass]) -> None:
        self._passes = passes
        probabilities = [class_probabilities(one.class_logits) for one in passes]
        self._members = group_queries(probabilities, [one.sampled_masks() for one in passes])
        total = probabilities[0].new_zeros((len(self._members), probabilities[0].shape[1]))
        for classes, queries in zip(probabilities, self._members.T):
            seen = queries >= 0
            total[seen] += classes[queries[seen]]
            total[~seen, -1] += 1
        self._probability = total / len(passes)

    def class_logits(self) -> Tensor:
        """Logarithms of the mean class probabilities, ``[G, K+1]``: their softmax gives these back."""
        return self._probability.log()

    def masks(self, groups: Tensor, size: tuple[int, int]) -> FusedMasks:
        """Mask logits of some groups at a size."""
        parts = []
        for one, queries in zip(self._passes, self._members[groups].T):
            positions = (queries >= 0).nonzero()[:, 0]
            parts.append((one.image_masks(queries[positions], size), one.flipped, positions))
        return FusedMasks(parts, len(groups), size)


class FusedMasks:
    """Mask logits of groups at the size of the result, in tiles; used like :class:`ImageMasks`.

    Args:
        parts: per pass: masks, whether they are mirrored, and the group of each mask.
        number: of groups.
        size: height and width.
    """

    def __init__(self, parts: Sequence[tuple[ImageMasks, bool, Tensor]], number: int, size: tuple[int, int]) -> None:
        self.size = tuple(size)
        self.device, self.dtype = parts[0][0].device, parts[0][0].dtype
        self._parts = parts
        self._number = number

    def select(self, groups: Tensor) -> FusedMasks:
        """The masks of some of the groups."""
        parts = []
        for masks, flipped, positions in self._parts:
            new, old = (groups[:, None] == positions).nonzero().T
            parts.append((masks.select(old), flipped, new))
        return FusedMasks(parts, len(groups), self.size)

    def block(
        self, rows: Range, columns: Range, groups: Tensor | None = None, buffers: Buffers | None = None
    ) -> Tensor:
        """Logits of the mean probabilities of a part of the result, ``[G, rows, columns]``; see ImageMasks."""
        if groups is not None:
            return self.select(groups).block(rows, columns, buffers=buffers)
        shape = (self._number, rows[1] - rows[0], columns[1] - columns[0])
        total, count = torch.zeros(shape, dtype=self.dtype, device=self.device), self._count()
        for masks, flipped, positions in self._parts:
            probability = masks.block(rows, self._mirrored(columns) if flipped else columns, buffers=buffers).sigmoid_()
            total.index_add_(0, positions, probability.flip(2) if flipped else probability)
        return (total / count[:, None, None]).logit()

    def bounds(self, row_ranges: Sequence[Range], column_ranges: Sequence[Range]) -> tuple[Tensor, Tensor]:
        """Values that the logits do not fall below or exceed, two times ``[G, blocks]`` on the CPU; see ImageMasks."""
        total = torch.zeros((2, self._number, len(row_ranges) * len(column_ranges)), dtype=self.dtype)
        for masks, flipped, positions in self._parts:
            ranges = [self._mirrored(columns) for columns in column_ranges] if flipped else column_ranges
            for bound, sum_ in zip(masks.bounds(row_ranges, ranges), total):
                sum_.index_add_(0, positions.cpu(), bound.sigmoid())
        low, high = (total / self._count().cpu()[:, None]).logit()
        return low, high

    def _count(self) -> Tensor:
        """How many passes saw each group."""
        positions = torch.cat([positions for _, _, positions in self._parts])
        return torch.bincount(positions, minlength=self._number).to(self.dtype)

    def _mirrored(self, columns: Range) -> Range:
        return self.size[1] - columns[1], self.size[1] - columns[0]
