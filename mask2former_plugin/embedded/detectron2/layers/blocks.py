"""Building blocks of convolutional networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Union

import torch
from fvcore.nn import weight_init
from torch import nn

from detectron2.layers.batch_norm import FrozenBatchNorm2d, get_norm
from detectron2.layers.wrappers import Conv2d

Norm = Union[str, Callable[[int], nn.Module], None]  # evaluated at import, where Python 3.9 has no |


class CNNBlockBase(nn.Module):
    """A block that knows its channels and its stride.

    Attributes:
        in_channels, out_channels: of the feature maps.
        stride: by which the block shrinks height and width.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def freeze(self) -> CNNBlockBase:
        """Stop training of all parameters and of batch statistics; returns the block itself."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        FrozenBatchNorm2d.convert_frozen_batchnorm(self)
        return self


class DepthwiseSeparableConv2d(nn.Module):
    """A k×k convolution per channel, then a 1×1 convolution across channels (Xception, section 2)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        padding: int = 1,
        dilation: int = 1,
        *,
        norm1: Norm = None,
        activation1: Callable | None = None,
        norm2: Norm = None,
        activation2: Callable | None = None,
    ):
        """``norm1`` and ``activation1`` follow the depthwise convolution, the others the pointwise one."""
        super().__init__()
        self.depthwise = Conv2d(
            in_channels,
            in_channels,
            kernel_size=kernel_size,
            padding=padding,
            dilation=dilation,
            groups=in_channels,
            bias=not norm1,
            norm=get_norm(norm1, in_channels),
            activation=activation1,
        )
        self.pointwise = Conv2d(
            in_channels,
            out_channels,
            kernel_size=1,
            bias=not norm2,
            norm=get_norm(norm2, out_channels),
            activation=activation2,
        )
        weight_init.c2_msra_fill(self.depthwise)
        weight_init.c2_msra_fill(self.pointwise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pointwise(self.depthwise(x))
