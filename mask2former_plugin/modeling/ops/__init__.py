"""Multi-scale deformable attention: one function, the implementation chosen by the device."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from mask2former_plugin.modeling.ops.cpu import ms_deform_attn_cpu, ms_deform_attn_from_logits_cpu
from mask2former_plugin.modeling.ops.reference import ms_deform_attn_reference
from mask2former_plugin.modeling.ops.sampling import locations_and_weights

Implementation = Callable[[Tensor, Sequence[tuple[int, int]], Tensor, Tensor], Tensor]

# by device type, beside Triton on CUDA; the reference serves every other device
IMPLEMENTATIONS: dict[str, Implementation] = {"cpu": ms_deform_attn_cpu}
TRITON_DEVICE_TYPE = "cuda"

logger = logging.getLogger(__name__)


def _exporting() -> bool:
    """Whether an exporter is looking. Before PyTorch 2.7 one that goes through Dynamo looks like a compiler."""
    if hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_exporting()
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


@functools.cache
def _has_triton(device: torch.device) -> bool:
    """Whether Triton can serve a CUDA device; if not, the log says once why."""
    try:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 7:
            raise ImportError(f"the GPU has compute capability {major}.{minor}, Triton needs 7.0")
        importlib.import_module("mask2former_plugin.modeling.ops.triton")
    except ImportError as error:
        logger.info(
            "deformable attention on %s samples with grid_sample, which is slower and takes more memory, since Triton "
            "cannot be used: %s. CUDA builds of PyTorch for Linux bring it along; elsewhere install triton "
            "(triton-windows on Windows).",
            device,
            error,
        )
        return False
    return True


@torch.compiler.assume_constant_result
def _uses_triton(device: torch.device) -> bool:
    return _has_triton(device)


def _triton_for(device: torch.device) -> ModuleType | None:
    if device.type != TRITON_DEVICE_TYPE or torch.jit.is_tracing() or _exporting() or not _uses_triton(device):
        return None
    # found by the compiler, too, which cannot keep a module that a function gives
    from mask2former_plugin.modeling.ops import triton

    return triton


def implementation_for(device: torch.device) -> Implementation:
    """The fastest implementation for a device, compiled or not; for tracing and export the reference, made of plain
    operators."""
    if torch.jit.is_tracing() or _exporting():
        return ms_deform_attn_reference
    module = _triton_for(device)
    if module is not None:
        return module.ms_deform_attn_triton
    return IMPLEMENTATIONS.get(device.type, ms_deform_attn_reference)


def _check(value: Tensor, spatial_shapes: Sequence[tuple[int, int]], **samples: Tensor) -> None:
    """The shapes fit together; ``samples`` are places and weights, by the names that the caller knows them by."""
    if value.dim() != 4:
        raise ValueError(f"value must be [B, S, M, D], got {tuple(value.shape)}")
    batch, length, heads, _ = value.shape
    if sum(h * w for h, w in spatial_shapes) != length:
        raise ValueError(
            f"value has {length} tokens, but spatial_shapes {list(spatial_shapes)} describe another number"
        )
    (places_name, places), (weights_name, weights) = samples.items()
    expected = (batch, *places.shape[1:2], heads, len(spatial_shapes), *places.shape[4:5])
    if tuple(places.shape) != (*expected, 2) or tuple(weights.shape) != expected:
        raise ValueError(
            f"{places_name} must be [B, T, M, L, P, 2] and {weights_name} [B, T, M, L, P] "
            f"with B={batch}, M={heads}, L={len(spatial_shapes)}, got {tuple(places.shape)} and {tuple(weights.shape)}"
        )
    if 0 in expected[2:]:
        raise ValueError(f"{places_name} of shape {tuple(places.shape)}: M, L and P must be at least 1")


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
    _check(value, spatial_shapes, sampling_locations=sampling_locations, attention_weights=attention_weights)
    return implementation_for(value.device)(value, spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_from_logits(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], points: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """:func:`ms_deform_attn` from what a layer predicts, without locations and weights in memory (grid_sample apart).

    Args:
        value: ``[B, S, M, D]``, as there.
        spatial_shapes: (height, width) of each level, as there.
        points: ``[T, 2]``, place of each query, (x, y) in [0, 1], at least float32. Constants: no gradient.
        offsets: ``[B, T, M, L, P, 2]``, (x, y) of the samples from there, in pixels of each level.
        logits: ``[B, T, M, L, P]``; the weights are their softmax over all samples of a query and head.

    Returns:
        ``[B, T, M * D]`` in the dtype of ``value``.

    Raises:
        ValueError: the shapes don't fit together, or the points require a gradient.
    """
    _check(value, spatial_shapes, offsets=offsets, logits=logits)
    if tuple(points.shape) != (offsets.shape[1], 2):
        raise ValueError(f"points must be [T, 2] with T={offsets.shape[1]}, got {tuple(points.shape)}")
    if points.requires_grad:
        raise ValueError("points must be constants: no gradient for them is computed")
    module = _triton_for(value.device)
    if module is not None:
        return module.ms_deform_attn_from_logits_triton(value, spatial_shapes, points, offsets, logits)
    if implementation_for(value.device) is ms_deform_attn_cpu:
        return ms_deform_attn_from_logits_cpu(value, spatial_shapes, points, offsets, logits)
    locations, weights = locations_and_weights(spatial_shapes, points, offsets, logits)
    return ms_deform_attn(value, spatial_shapes, locations, weights)


__all__ = [
    "implementation_for",
    "ms_deform_attn",
    "ms_deform_attn_cpu",
    "ms_deform_attn_from_logits",
    "ms_deform_attn_from_logits_cpu",
    "ms_deform_attn_reference",
]
