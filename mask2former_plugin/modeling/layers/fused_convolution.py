"""Convolutions that add and rectify in the same step, through the operators of oneDNN that ``torch.compile`` uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mask2former_plugin.modeling.layers.linear import calculates_in_bfloat16


def fuses_convolutions(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and this CPU have such convolutions in a precision."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and calculates_in_bfloat16()


def all_finite(*tensors: Tensor) -> bool:
    """Whether no value is NaN or infinite: oneDNN's ReLU makes 0 of NaN, which nobody would notice then.

    Of sums, which read everything once. A device is waited for.
    """
    return all(t.detach().sum(dtype=torch.promote_types(t.dtype, torch.float32)).isfinite() for t in tensors)


def fused_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv: Any, *, rectify: bool = True, addend: Tensor | None = None
) -> Tensor:
    """``relu(conv(x) + addend)``, in the place of the addend; without one, ``rectify`` False leaves out the ReLU.

    The ReLU makes 0 of NaN, see :func:`all_finite`.

    Args:
        x: ``[B, C, H, W]``.
        weight: ``[N, C / groups, kh, kw]``.
        bias: ``[N]``.
        conv: has ``padding``, ``stride``, ``dilation`` and ``groups``.
        addend: ``[B, N, H', W']``.
    """
    arguments = (x, weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups)
    if addend is not None:
        return torch.ops.mkldnn._convolution_pointwise_.binary(addend, *arguments, "add", 1.0, "relu", [], "")
    return torch.ops.mkldnn._convolution_pointwise(*arguments, "relu" if rectify else "none", [], "")
