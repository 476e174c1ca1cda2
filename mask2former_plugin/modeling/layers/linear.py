"""Linear layers for many tokens: the faster of the CPU's two matrix products, fused with what follows, in pieces that
stay in the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mask2former_plugin.modeling.layers.plain import has_hooked_parts, is_plain
from mask2former_plugin.modeling.ops.sampling import traced

# fewer rows than this gain nothing
_LEAST_ROWS = 256
# values of a hidden layer that is computed at once: 8 MB in float32
_CACHED_VALUES = 2**21
_HAS_BOTH = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
_HAS_FUSED = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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
    if fuses(x, weight):
        return fused_linear(x, weight, bias)
    if not _uses_convolution(x, weight):
        return F.linear(x, weight, bias)
    row_of_pixels = x.contiguous().view(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # channels last
    product = F.conv2d(row_of_pixels, weight[:, :, None, None], bias)
    return product.permute(0, 2, 3, 1).view(*x.shape[:-1], -1)


def fuses(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of these can be one step of oneDNN together with what follows it: on CPUs without gradients.

    In float32, and in bfloat16 where the CPU calculates with it and the weights are kept in it.
    """
    return (
        _HAS_FUSED
        and not torch.is_grad_enabled()
        and not traced()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and _fuses_in(x.dtype)
        and x.numel() > 0
        and torch.backends.mkldnn.enabled
    )


def _fuses_in(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return calculates_in_bfloat16()
    return dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


@functools.cache
def calculates_in_bfloat16() -> bool:
    """Whether the CPU has products in it."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, then: str = "none") -> Tensor:
    """The linear layer of what :func:`fuses`, ``then`` "none" or "relu"; sums are kept in float32."""
    # anything else than dense rows takes oneDNN a thousand times as long
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), _dense(weight), bias, then, [], "")


def _dense(weight: Tensor) -> Tensor:
    """``weight`` with dense rows or dense columns."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a linear layer is nothing but its weights, and nobody else reads its result."""
    return is_plain(layer, nn.Linear, Linear)


def linear_relu(x: Tensor, layer: nn.Linear) -> Tensor:
    """``relu(layer(x))``."""
    plain = is_plain_linear(layer)
    if plain and fuses(x, layer.weight):
        return fused_linear(x, layer.weight, layer.bias, then="relu")
    return F.relu(layer(x), inplace=plain and not torch.is_grad_enabled())


def linear_add(x: Tensor, layer: nn.Linear, dropout: nn.Dropout, addend: Tensor) -> Tensor:
    """``addend + dropout(layer(x))``."""
    added = dropout(layer(x))
    wide_enough = added.dtype == torch.promote_types(added.dtype, addend.dtype)
    if not torch.is_grad_enabled() and wide_enough and is_plain_linear(layer):
        return added.add_(addend)
    return addend + added


class Linear(nn.Linear):
    """``nn.Linear`` through :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return linear(x, self.weight, self.bias)


def token_wise(
    function: Callable[..., Tensor], *inputs: Tensor, hidden: int, module: nn.Module | None = None
) -> Tensor:
    """``function(*inputs)``; on a CPU piece by piece, so that wide intermediate results stay in its cache.

    Given the module, a piece is computed again in the backward pass, so that nothing but the inputs is kept. Hooks on
    parts of the function's module see all tokens at once.

    Args:
        function: a method that treats every token for itself, ``[..., C_i]`` to ``[..., N]``.
        inputs: ``[..., C_i]``, the other dimensions equal.
        hidden: width of the widest intermediate result.
        module: whose parameters it uses; without it, and with active dropout in it, training makes no pieces.
    """
    x, length = inputs[0], _piece(hidden)
    if traced() or x.device.type != "cpu" or x.numel() <= length * x.shape[-1] or _is_watched(function):
        return function(*inputs)
    tokens = [i.flatten(0, -2) for i in inputs]
    if not torch.is_grad_enabled():
        result = torch.cat([function(*piece) for piece in zip(*(t.split(length) for t in tokens))])
    elif module is not None and recomputes_pieces(module, x, hidden):
        parameters = [p for p in module.parameters() if p.requires_grad]
        result = _InPieces.apply(function, length, len(tokens), *tokens, *parameters)
    else:
        return function(*inputs)
    return result.unflatten(0, x.shape[:-1])


def recomputes_pieces(module: nn.Module, x: Tensor, hidden: int) -> bool:
    """Whether :func:`token_wise` keeps nothing but the inputs: on CPUs, given tokens enough for several pieces.

    Not under autocast and not with active dropout, either of which would have to be repeated, too.
    """
    return (
        torch.is_grad_enabled()
        and not traced()
        and x.device.type == "cpu"
        and x.numel() > _piece(hidden) * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and not any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in module.modules())
    )


def _is_watched(method: Callable[..., Tensor]) -> bool:
    owner = getattr(method, "__self__", None)
    return isinstance(owner, nn.Module) and has_hooked_parts(owner)


def _piece(hidden: int) -> int:
    return max(_LEAST_ROWS, _CACHED_VALUES // hidden)


class _InPieces(torch.autograd.Function):
    """A token-wise function a piece at a time, each piece computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], length: int, number: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.function, ctx.length, ctx.number = function, length, number
        return torch.cat([function(*piece) for piece in zip(*(t.split(length) for t in tensors[:number]))])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: within a recomputed layer they can't be had twice
        tokens, parameters = saved[: ctx.number], saved[ctx.number :]
        sums: list[Tensor | None] = [None] * len(parameters)
        grad_tokens = [torch.empty_like(t) if t.requires_grad else None for t in tokens]
        for start in range(0, len(grad_output), ctx.length):
            rows = slice(start, start + ctx.length)
            # there was no autocast in the forward pass
            with torch.enable_grad(), torch.autocast("cpu", enabled=False):
                piece = [t[rows].detach().requires_grad_(t.requires_grad) for t in tokens]
                output = ctx.function(*piece)
                wanted = [t for t in piece if t.requires_grad]
                found = torch.autograd.grad(output, (*wanted, *parameters), grad_output[rows], allow_unused=True)
            for target, grad in zip((g for g in grad_tokens if g is not None), found):
                target[rows] = grad
            for i, grad in enumerate(found[len(wanted) :]):
                if grad is not None:
                    sums[i] = grad if sums[i] is None else sums[i].add_(grad)
        return None, None, None, *grad_tokens, *sums
