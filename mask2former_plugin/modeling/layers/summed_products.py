"""Products summed over many rows, through the faster of the CPU's two libraries."""

from __future__ import annotations

import torch
from torch import Tensor

# multiply-adds from which on oneDNN's longer way to the kernel pays
_LEAST_WORK = 2**22
_HAS_BOTH = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def _uses_onednn(first: Tensor, second: Tensor) -> bool:
    return (
        _HAS_BOTH
        and first.device.type == "cpu"
        and first.dtype == second.dtype == torch.float32
        and first.numel() * second.shape[1] >= _LEAST_WORK
        and torch.backends.mkldnn.enabled
        and not (torch.is_grad_enabled() and (first.requires_grad or second.requires_grad))
    )


def summed_products(first: Tensor, second: Tensor) -> Tensor:
    """``firstᵀ @ second``, ``[P, N]`` and ``[P, M]`` to ``[N, M]``, equal up to rounding; for many rows, few columns.

    ``torch.mm`` calls MKL on CPUs, which uses half the width of the vector units of CPUs that are not Intel's. The
    gradient of the weights of a 1×1 convolution of channels-last maps is the same sum, and it is oneDNN's.
    """
    if not _uses_onednn(first, second):
        return first.T @ second
    maps, gradient = (x.contiguous().view(1, 1, *x.shape).permute(0, 3, 1, 2) for x in (second, first))
    weight = second.new_empty((1,)).expand(first.shape[1], second.shape[1], 1, 1)
    wanted = (False, True, False)
    return torch.ops.aten.convolution_backward(
        gradient, maps, weight, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, wanted
    )[1][:, :, 0, 0]
