"""Thin wrappers of PyTorch functions and layers.

No ``from __future__ import annotations`` here: TorchScript reads the annotations.
"""

from typing import Any, List, Optional, Tuple

import torch
from torch import nn
from torch.nn import functional as F

BatchNorm2d = nn.BatchNorm2d
ConvTranspose2d = nn.ConvTranspose2d
Linear = nn.Linear
interpolate = F.interpolate


def shapes_to_tensor(x: List[int], device: Optional[torch.device] = None) -> torch.Tensor:
    """Sizes as one integer tensor that keeps following the input under ``torch.jit.trace``."""
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing():
            return torch.stack([torch.as_tensor(size, device=device) for size in x])
    return torch.as_tensor(x, device=device)


def cat(tensors: List[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """``torch.cat`` that does not copy a single tensor."""
    assert isinstance(tensors, (list, tuple)), f"cat takes a list of tensors, got {type(tensors)}"
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat(tensors, dim)


def nonzero_tuple(x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    """Index of the nonzero entries, one tensor per dimension; a scalar counts as one entry."""
    return torch.atleast_1d(x).nonzero(as_tuple=True)


def cross_entropy(input: torch.Tensor, target: torch.Tensor, *, reduction: str = "mean", **kwargs: Any) -> torch.Tensor:
    """``F.cross_entropy`` whose mean over no targets is 0 (and differentiable) instead of NaN."""
    if target.numel() == 0 and reduction == "mean":
        return input.sum() * 0.0
    return F.cross_entropy(input, target, reduction=reduction, **kwargs)


def move_device_like(src: torch.Tensor, dst: torch.Tensor) -> torch.Tensor:
    """``src`` on the device of ``dst``."""
    return src.to(dst.device)


class Conv2d(nn.Conv2d):
    """Convolution, then optionally a normalisation and an activation.

    A normalisation is the submodule ``norm``: its parameters are called ``<name>.norm.*`` in checkpoints.
    """

    def __init__(self, *args: Any, norm: Optional[nn.Module] = None, activation: Any = None, **kwargs: Any):
        """
        Args:
            norm: layer applied to the result.
            activation: callable applied last.
            args, kwargs: those of ``torch.nn.Conv2d``.
        """
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x
