"""Ground-truth masks as they come: binary, unpadded, read as if padded with zeros to the size of the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_masks(masks: Tensor, points: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """Values of masks at points, bilinear, zero outside: ``grid_sample(align_corners=False)`` of the padded masks.

    Args:
        masks: ``[n, h, w]``, bool, integer or float.
        points: (x, y) in [0, 1] of the padded size; ``[P, 2]`` for all masks or ``[n, P, 2]``, a set for each.
        padded_size: height and width that the masks would have after padding right and bottom.

    Returns:
        ``[n, P]`` in the dtype of the points.
    """
    height, width = masks.shape[-2:]
    if masks.numel() == 0:
        return points.new_zeros((masks.shape[0], points.shape[-2]))
    pixels = masks.flatten(1)
    grid = 2.0 * points - 1.0
    x = (grid[..., 0] + 1.0) * (padded_size[1] / 2) - 0.5
    y = (grid[..., 1] + 1.0) * (padded_size[0] / 2) - 0.5
    left, top = x.floor(), y.floor()
    values = points.new_zeros((masks.shape[0], points.shape[-2]))
    for row in (top, top + 1):
        for column in (left, left + 1):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = (1 - (x - column).abs()) * (1 - (y - row).abs()) * inside
            index = torch.where(inside, row.long() * width + column.long(), 0)
            corner = pixels.index_select(1, index) if points.dim() == 2 else pixels.gather(1, index)
            values = torch.addcmul(values, corner.to(points.dtype), weight)
    return values


def resize_masks(masks: Tensor, size: tuple[int, int], padded_size: tuple[int, int]) -> Tensor:
    """The padded masks at another size, ``[n, *size]``, same dtype; nearest neighbour, without a padded copy."""
    height, width = masks.shape[-2:]
    if masks.shape[0] == 0:
        return masks.new_zeros((0, *size))
    rows, columns = (_nearest(padded, target, masks.device) for padded, target in zip(padded_size, size))
    resized = masks[:, rows.clamp(max=height - 1)][:, :, columns.clamp(max=width - 1)]
    return resized * ((rows < height)[:, None] & (columns < width))


def pad_masks(masks: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """The masks padded right and bottom with zeros, ``[n, *padded_size]``, same dtype."""
    return F.pad(masks, (0, padded_size[1] - masks.shape[-1], 0, padded_size[0] - masks.shape[-2]))


def common_size(masks: list[Tensor]) -> tuple[int, int]:
    """The smallest size that holds all the masks."""
    return max(m.shape[-2] for m in masks), max(m.shape[-1] for m in masks)


def _nearest(source: int, target: int, device: torch.device) -> Tensor:
    """Index of the source pixel of each target pixel, asked of ``interpolate`` itself so that rounding is the same."""
    positions = torch.arange(source, dtype=torch.float32, device=device)
    return F.interpolate(positions[None, None], size=target, mode="nearest")[0, 0].long()
