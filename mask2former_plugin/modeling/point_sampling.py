"""Points on masks: drawing them, where they fall, sampling logits there, preferring the uncertain ones (PointRend)."""

from __future__ import annotations

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
    points: Tensor, size: tuple[int, int], padded_size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four pixels around each point and their weights: bilinear, ``align_corners=False``, zeros outside.

    Args:
        points: ``[P, 2]``, (x, y) in [0, 1] of the padded size.
        size: height and width of the map.
        padded_size: height and width that it would have after padding right and bottom.

    Returns:
        rows ``[P, 2]`` and columns ``[P, 2]``, int64 within the map, and their weights ``[P, 2]`` each, 0 outside; the
        weight of a pixel is the product.
    """
    found = []
    for place, length, padded in zip(points.unbind(1)[::-1], size, padded_size):
        position = place * padded - 0.5
        cell = position.floor()
        share = position - cell
        cells = torch.stack((cell, cell + 1), dim=1)
        weights = torch.stack((1 - share, share), dim=1)
        inside = cells.clamp(0, length - 1)
        found.append((inside.long(), weights * (cells == inside)))
    (rows, row_weights), (columns, column_weights) = found
    return rows, columns, row_weights, column_weights


def sample_rows(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows of a table: ``[N, C]``, ``[P, K]``, ``[P, K]`` to ``[P, C]``."""
    return F.embedding_bag(index, table, mode="sum", per_sample_weights=weights)


def sample_logits(logits: Tensor, points: Tensor) -> Tensor:
    """Logits ``[N, h, w]`` at points ``[N, P, 2]``, (x, y) in [0, 1]; bilinear, zero outside; gives ``[N, P]``."""
    grid = 2.0 * points.to(logits.dtype) - 1.0
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
