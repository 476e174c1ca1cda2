"""Linear layers for many tokens: the faster of the CPU's two matrix products, in pieces that stay in the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former_plugin.modeling.ops.sampling import traced

# fewer rows than this gain nothing
_LEAST_ROWS = 256
# values of a hidden layer that is computed at once: 8 MB in float32
_CACHED_VALUES = 2**21
_HAS_BOTH = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def _uses_convolution(x: Tensor, weight: Tensor) -> bool:
    return (
        _HAS_BOTH
        and not traced()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= _LEAST_ROWS * x.shape[-1]
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, equal up to rounding; for many tokens in float32 on a CPU about twice as fast, both ways.

    ``F.linear`` calls MKL there, which uses half the width of the vector units of CPUs that are not Intel's. The same
    product as a 1×1 convolution of a channels-last map goes through oneDNN, which goes by what the CPU can do.

    Args:
        x: ``[..., C]``.
        weight: ``[N, C]``.
        bias: ``[N]``.

    Returns:
        ``[..., N]``.
    """
    if not _uses_convolution(x, weight):
        return F.linear(x, weight, bias)
    row_of_pixels = x.contiguous().view(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # channels last
    product = F.conv2d(row_of_pixels, weight[:, :, None, None], bias)
    return product.permute(0, 2, 3, 1).view(*x.shape[:-1], -1)


def rectified(x: Tensor) -> Tensor:
    """ReLU of an intermediate result that nobody else reads; in its place without gradients."""
    return F.relu(x, inplace=not torch.is_grad_enabled())


class Linear(nn.Linear):
    """``nn.Linear`` through :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return linear(x, self.weight, self.bias)


def token_wise(function: Callable[[Tensor], Tensor], x: Tensor, hidden: int) -> Tensor:
    """``function(x)``; without gradients on a CPU piece by piece, so that wide intermediate results stay in its cache.

    Args:
        function: treats every token for itself, ``[..., C]`` to ``[..., N]``.
        x: ``[..., C]``.
        hidden: width of the widest intermediate result.
    """
    length = max(_LEAST_ROWS, _CACHED_VALUES // hidden)
    if torch.is_grad_enabled() or traced() or x.device.type != "cpu" or x.numel() <= length * x.shape[-1]:
        return function(x)
    pieces = [function(piece) for piece in x.flatten(0, -2).split(length)]
    return torch.cat(pieces).unflatten(0, x.shape[:-1])
