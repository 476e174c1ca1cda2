"""The projection of feature maps to the width of a decoder."""

from __future__ import annotations

from detectron2.layers import Conv2d
from fvcore.nn import weight_init
from torch import nn


def input_projection(in_channels: int, hidden_dim: int, enforce: bool) -> nn.Module:
    """1×1 convolution, or nothing (no parameters) where the width is right already and ``enforce`` is off."""
    if in_channels == hidden_dim and not enforce:
        return nn.Sequential()
    conv = Conv2d(in_channels, hidden_dim, kernel_size=1)
    weight_init.c2_xavier_fill(conv)
    return conv
