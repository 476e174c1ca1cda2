"""Where queries sample and with which weights, from the offsets and logits that a deformable attention layer predicts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def traced() -> bool:
    """Whether a compiler or tracer is looking: it gets plain operators, whose kernels it chooses itself."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _level_sizes(spatial_shapes: Sequence[tuple[int, int]], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(width, height) of each level, ``[L, 2]``; filled on the device, since a copy from the host would wait for it."""
    numbers = [
        torch.full((1,), n, device=device, dtype=dtype) for height, width in spatial_shapes for n in (width, height)
    ]
    return torch.cat(numbers).unflatten(0, (-1, 2))


def locations_and_weights(
    spatial_shapes: Sequence[tuple[int, int]], points: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """
    Args:
        spatial_shapes: (height, width) of each level.
        points: ``[T, 2]``.
        offsets: ``[B, T, M, L, P, 2]``, in pixels of each level.
        logits: ``[B, T, M, L, P]``.

    Returns:
        locations ``[B, T, M, L, P, 2]`` and attention weights ``[B, T, M, L, P]`` in the dtype of ``points``.
    """
    sizes = _level_sizes(spatial_shapes, device=offsets.device, dtype=points.dtype)
    locations = points[:, None, None, None] + offsets.to(points.dtype) / sizes[:, None]
    return locations, logits.to(points.dtype).flatten(3).softmax(3).view_as(logits)
