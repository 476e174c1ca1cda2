"""Matrix products of tiles and over many rows, through the faster of the CPU's two libraries."""

from __future__ import annotations

import torch
from torch import Tensor

# multiply-adds from which on oneDNN's longer way to the kernel pays
_LEAST_WORK = 2**22
_HAS_BOTH = (
    torch.backends.mkl.is_available()
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def _uses_onednn(first: Tensor, second: Tensor) -> bool:
    return (
        _HAS_BOTH
        and first.device.type == "cpu"
        and first.dtype == second.dtype == torch.float32
        and first.numel() * second.shape[1] >= _LEAST_WORK
        and torch.backends.mkldnn.enabled
        and not (torch.is_grad_enabled() and (first.requires_grad or second.requires_grad))
    )


def product(first: Tensor, second: Tensor) -> Tensor:
    """``first @ second``, ``[M, C]`` and ``[C, N]``, equal up to rounding; contiguous.

    ``torch.mm`` calls MKL on CPUs, which uses half the width of the vector units of CPUs that are not Intel's. oneDNN
    goes by what the CPU can do and reads the second factor as it lies. ``linear`` does the same for tokens, whose
    layout is the other way round and whose gradients are wanted. For shapes that come again and again: oneDNN makes a
    kernel for each.
    """
    if not _uses_onednn(first, second):
        return torch.mm(first, second)
    return torch.ops.mkldnn._linear_pointwise(first.contiguous(), second.T, None, "none", [], "")


def summed_products(first: Tensor, second: Tensor) -> Tensor:
    """``firstᵀ @ second``, ``[P, N]`` and ``[P, M]`` to ``[N, M]``, equal up to rounding; for many rows, few columns.

    The gradient of the weights of a 1×1 convolution of channels-last maps is such a sum, and it is oneDNN's.
    """
    if not _uses_onednn(first, second):
        return first.T @ second
    maps, gradient = (x.contiguous().view(1, 1, *x.shape).permute(0, 3, 1, 2) for x in (second, first))
    weight = second.new_empty((1,)).expand(first.shape[1], second.shape[1], 1, 1)
    wanted = (False, True, False)
    return torch.ops.aten.convolution_backward(
        gradient, maps, weight, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, wanted
    )[1][:, :, 0, 0]
