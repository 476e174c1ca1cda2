"""Matrix products of tiles, through the faster of the CPU's two libraries."""

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
