"""Points on masks: drawing them, where they fall, sampling logits there, preferring the uncertain ones (PointRend)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# A draw of more values than this (8 MB) is repeated when needed instead of being kept until then, or made in pieces.
_KEPT_VALUES = 2**21


class DeferredRand:
    """``torch.rand(*shape)`` whose place in the random stream is fixed now and whose values are wanted later.

    Matching all predictions at once needs their points before the points of the losses, while one seed shall give the
    numbers of matching and loss taking turns. Large draws are thrown away and repeated from the saved generator
    state, so that memory does not grow with the number of predictions.
    """

    def __init__(self, *shape: int, device: torch.device) -> None:
        self._shape, self._device = shape, device
        self._state = None
        repeatable = device.type in ("cpu", "cuda")
        if repeatable and torch.Size(shape).numel() > _KEPT_VALUES:
            self._state = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
            torch.rand(*shape, device=device)
        else:
            self._values = torch.rand(*shape, device=device)

    def values(self) -> Tensor:
        """The values, the same at every call."""
        if self._state is None:
            return self._values
        generator = torch.Generator(self._device)
        generator.set_state(self._state)
        return torch.rand(*self._shape, device=self._device, generator=generator)


class LossPoints:
    """Random points of the mask losses of one prediction: candidates of every mask, then further points of every mask.

    Args:
        masks: number of masks.
        candidates: candidates of each.
        others: further points of each.
        deferred: fix their place in the random stream now; otherwise they are drawn when they are asked for, first
            the candidates.
    """

    def __init__(self, masks: int, candidates: int, others: int, device: torch.device, deferred: bool) -> None:
        self._shapes = (masks, candidates, 2), (masks, others, 2)
        self._device = device
        self._draws = [DeferredRand(*shape, device=device) for shape in self._shapes] if deferred else None

    def candidates(self) -> Iterator[Tensor]:
        """``[n, candidates, 2]`` of some masks after the other, all of them in the end."""
        masks, number, _ = self._shapes[0]
        at_once = max(1, _KEPT_VALUES // (2 * max(number, 1)))
        if self._draws is not None:
            yield from self._draws[0].values().split(at_once)
            return
        # a CPU's random numbers are one stream: pieces of a draw are the draw
        for start in range(0, max(masks, 1), at_once):
            yield torch.rand(min(at_once, masks - start), number, 2, device=self._device)

    def others(self) -> Tensor:
        """``[masks, others, 2]``."""
        return torch.rand(*self._shapes[1], device=self._device) if self._draws is None else self._draws[1].values()


def bilinear_corners(
    points: Tensor, size: tuple[int, int], padded_size: tuple[int, int], steps: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """The four pixels around each point and their weights: bilinear, ``align_corners=False``, zeros outside.

    Args:
        points: ``[P, 2]``, (x, y) in [0, 1] of the padded size.
        size: height and width of the map.
        padded_size: height and width that it would have after padding right and bottom.
        steps: how far apart the pixels of neighbouring rows and of neighbouring columns lie; by default row by row.

    Returns:
        where the pixels lie in the map, integers ``[P, 4]``, and their weights, 0 outside of the map, ``[P, 4]``.
    """
    integers = torch.int32 if size[0] * size[1] < 2**31 else torch.int64
    steps = steps or (size[1], 1)
    axes = []
    for place, length, padded, step in zip(points.unbind(1)[::-1], size, padded_size, steps):
        position = (place * padded).sub_(0.5)
        lower = position.floor()
        upper_share = position.sub_(lower)
        upper = lower + 1
        axis = []
        for cell, share in ((lower, 1 - upper_share), (upper, upper_share)):
            inside = cell.clamp(0, length - 1)
            axis.append((inside.to(integers).mul_(step), share * (inside == cell)))
        axes.append(axis)
    corners = list(itertools.product(*axes))
    index = torch.stack([row + column for (row, _), (column, _) in corners], dim=1)
    return index, torch.stack([row * column for (_, row), (_, column) in corners], dim=1)


def in_order_of_rows(points: Tensor) -> Tensor:
    """The same points ``[P, 2]`` from top to bottom on a CPU, whose caches like that; as they are elsewhere."""
    if points.device.type != "cpu":
        return points
    # NumPy sorts 16 bits by counting, in 40 µs where torch takes 600
    order = np.argsort((points[:, 1] * (2**16 - 1)).int().numpy().astype(np.uint16), kind="stable")
    pairs = torch.view_as_complex(points)  # a pair of coordinates moves as one number
    return torch.view_as_real(pairs.index_select(0, torch.from_numpy(order)))


def sample_rows(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows of a table: ``[N, C]``, ``[P, K]``, ``[P, K]`` to ``[P, C]``."""
    return F.embedding_bag(index, table, mode="sum", per_sample_weights=weights)


def sample_features(features: Tensor, points: Tensor) -> Tensor:
    """Features of one image at points, ``[C, H, W]`` and ``[P, 2]`` to ``[P, C]``; bilinear, zeros outside.

    A sample is a weighted sum of four rows of a table, which is much faster on CPUs than ``grid_sample``; the table is
    a copy unless the channels of a pixel lie side by side.
    """
    index, weights = bilinear_corners(points.to(features.dtype), features.shape[1:], features.shape[1:])
    return sample_rows(features.flatten(1).T.contiguous(), index, weights)


def sample_logits(logits: Tensor, points: Tensor) -> Tensor:
    """Logits ``[N, h, w]`` at points ``[N, P, 2]``, (x, y) in [0, 1]; bilinear, zero outside; gives ``[N, P]``."""
    grid = (2 * points.to(logits.dtype)).sub_(1)
    return F.grid_sample(logits.unsqueeze(1), grid.unsqueeze(1), align_corners=False)[:, 0, 0]


@torch.no_grad()
def uncertain_points(logits: Tensor, candidates: Tensor, number: int) -> Tensor:
    """The candidates whose logit is nearest to zero (Mask2Former, section 3.3; PointRend).

    Args:
        logits: ``[N, h, w]``.
        candidates: ``[N, M, 2]``.
        number: how many candidates of each mask are taken.

    Returns:
        ``[N, number, 2]``, in no particular order; which of several equally uncertain ones are taken is not defined.
    """
    chosen = _least(sample_logits(logits, candidates).abs_(), number)
    pairs = torch.view_as_complex(candidates)  # a pair of coordinates moves as one number
    return torch.view_as_real(pairs.gather(1, chosen))


def _least(values: Tensor, number: int) -> Tensor:
    """Places of the smallest values of each row, ``[N, M]`` to ``[N, number]``, unordered."""
    if values.device.type != "cpu" or not 0 < number < values.shape[1] or not len(values):
        return values.topk(number, dim=1, largest=False, sorted=False).indices
    # partial sorting with the CPU's vector units, which topk does not use
    return torch.from_numpy(np.argpartition(values.numpy(), number - 1, axis=1)[:, :number])
