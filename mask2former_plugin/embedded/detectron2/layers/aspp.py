"""Atrous spatial pyramid pooling (DeepLabv3, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from fvcore.nn import weight_init
from torch import nn
from torch.nn import functional as F

from detectron2.layers.batch_norm import get_norm
from detectron2.layers.blocks import DepthwiseSeparableConv2d, Norm
from detectron2.layers.wrappers import Conv2d


class ASPP(nn.Module):
    """Parallel convolutions of different dilation and a pooled branch, joined by a 1×1 convolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dilations: Sequence[int],
        *,
        norm: Norm,
        activation: Callable,
        pool_kernel_size: tuple[int, int] | None = None,
        dropout: float = 0.0,
        use_depthwise_separable_conv: bool = False,
    ):
        """
        Args:
            dilations: of the three 3×3 branches.
            norm: of every branch but the pooled one, and of the projection.
            activation: copied for every convolution.
            pool_kernel_size: average over windows of this size, which must divide the input; None: over everything.
            dropout: after the projection.
            use_depthwise_separable_conv: in the 3×3 branches.
        """
        super().__init__()
        assert len(dilations) == 3, f"ASPP takes 3 dilations, got {list(dilations)}"
        self.pool_kernel_size = pool_kernel_size
        self.dropout = dropout

        def conv(channels: int, **kwargs: int) -> Conv2d:
            layer = Conv2d(
                channels,
                out_channels,
                bias=not norm,
                norm=get_norm(norm, out_channels),
                activation=deepcopy(activation),
                **kwargs,
            )
            weight_init.c2_xavier_fill(layer)
            return layer

        self.convs = nn.ModuleList([conv(in_channels, kernel_size=1)])
        for dilation in dilations:
            if use_depthwise_separable_conv:
                branch = DepthwiseSeparableConv2d(
                    in_channels,
                    out_channels,
                    kernel_size=3,
                    padding=dilation,
                    dilation=dilation,
                    norm1=norm,
                    activation1=deepcopy(activation),
                    norm2=norm,
                    activation2=deepcopy(activation),
                )
            else:
                branch = conv(in_channels, kernel_size=3, padding=dilation, dilation=dilation)
            self.convs.append(branch)
        # No normalisation after global pooling: there is one value per channel and image.
        pool = nn.AdaptiveAvgPool2d(1) if pool_kernel_size is None else nn.AvgPool2d(pool_kernel_size, stride=1)
        pooled = Conv2d(in_channels, out_channels, 1, bias=True, activation=deepcopy(activation))
        weight_init.c2_xavier_fill(pooled)
        self.convs.append(nn.Sequential(pool, pooled))
        self.project = conv(5 * out_channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H, W)."""
        size = x.shape[-2:]
        if self.pool_kernel_size is not None and any(s % k for s, k in zip(size, self.pool_kernel_size)):
            raise ValueError(f"pool_kernel_size {self.pool_kernel_size} must divide the input size {tuple(size)}")
        branches = [conv(x) for conv in self.convs]
        branches[-1] = F.interpolate(branches[-1], size=size, mode="bilinear", align_corners=False)
        out = self.project(torch.cat(branches, dim=1))
        return F.dropout(out, self.dropout, training=self.training) if self.dropout > 0 else out
