"""Multi-scale deformable attention: one function, the implementation chosen by the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mask2former_plugin.modeling.ops.cpu import ms_deform_attn_cpu
from mask2former_plugin.modeling.ops.reference import ms_deform_attn_reference

Implementation = Callable[[Tensor, Sequence[tuple[int, int]], Tensor, Tensor], Tensor]

# by device type; the reference serves every other device
IMPLEMENTATIONS: dict[str, Implementation] = {"cpu": ms_deform_attn_cpu}


def _exporting() -> bool:
    """Whether an exporter is looking. Before PyTorch 2.7 one that goes through Dynamo looks like a compiler."""
    if hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_exporting()
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def implementation_for(device: torch.device) -> Implementation:
    """The fastest implementation for a device, compiled or not; for tracing and export the reference, made of plain
    operators."""
    if torch.jit.is_tracing() or _exporting():
        return ms_deform_attn_reference
    return IMPLEMENTATIONS.get(device.type, ms_deform_attn_reference)


def ms_deform_attn(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear samples from several feature maps (Deformable DETR, equation 3).

    Args:
        value: ``[B, S, M, D]``, the tokens of all levels one after the other, row by row, for M heads.
        spatial_shapes: (height, width) of each of the L levels, Python integers; S = sum of height·width.
        sampling_locations: ``[B, T, M, L, P, 2]``, (x, y) in [0, 1] of each level, ``align_corners=False``, zeros
            outside. Interpolation happens in the precision of this tensor, so it should be at least float32.
        attention_weights: ``[B, T, M, L, P]``.

    Returns:
        ``[B, T, M * D]`` in the dtype of ``value``.

    Raises:
        ValueError: the shapes don't fit together.
    """
    batch, length, heads, _ = value.shape
    if sum(h * w for h, w in spatial_shapes) != length:
        raise ValueError(
            f"value has {length} tokens, but spatial_shapes {list(spatial_shapes)} describe another number"
        )
    expected = (batch, sampling_locations.shape[1], heads, len(spatial_shapes), sampling_locations.shape[4])
    if tuple(sampling_locations.shape) != (*expected, 2) or tuple(attention_weights.shape) != expected:
        raise ValueError(
            "sampling_locations must be [B, T, M, L, P, 2] and attention_weights [B, T, M, L, P] "
            f"with B={batch}, M={heads}, L={len(spatial_shapes)}, "
            f"got {tuple(sampling_locations.shape)} and {tuple(attention_weights.shape)}"
        )
    return implementation_for(value.device)(value, spatial_shapes, sampling_locations, attention_weights)


__all__ = ["implementation_for", "ms_deform_attn", "ms_deform_attn_cpu", "ms_deform_attn_reference"]
