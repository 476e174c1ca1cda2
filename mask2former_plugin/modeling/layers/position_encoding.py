"""Sine encoding of positions in a feature map."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _axis_encoding(length: int, channels: int, device: torch.device, dtype: torch.dtype, temperature: float) -> Tensor:
    """Sines and cosines, alternating, of the positions 1..length scaled to (0, 2π], ``[length, channels]``."""
    position = torch.arange(1, length + 1, device=device, dtype=dtype)
    position = position / (length + 1e-6) * (2 * math.pi)
    pair = torch.arange(channels, device=device, dtype=dtype).div(2, rounding_mode="floor")
    angle = position[:, None] / temperature ** (2 * pair / channels)
    return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=2).flatten(1)


def sine_position_encoding(
    size: tuple[int, int], channels: int, *, device: torch.device, dtype: torch.dtype, temperature: float = 10000.0
) -> Tensor:
    """Normalised sine position encoding of DETR without padding, one map for the whole batch.

    The first half of the channels encodes y, the second half x. Sines are taken per row and per column, not per pixel,
    which makes the encoding cheap enough to be computed where it is needed.

    Args:
        size: (height, width) of the feature map.
        channels: number of channels, a multiple of 4.
        dtype: of the result; the computation has at least the precision of float32.

    Returns:
        ``[height, width, channels]``.

    Raises:
        ValueError: ``channels`` is no multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"a sine position encoding needs a multiple of 4 channels, got {channels}")
    height, width = size
    precise = torch.promote_types(dtype, torch.float32)
    rows = _axis_encoding(height, channels // 2, device, precise, temperature).to(dtype)
    columns = _axis_encoding(width, channels // 2, device, precise, temperature).to(dtype)
    return torch.cat((rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)), dim=2)
