"""Feature pyramid pixel decoder (MaskFormer, section 4.1)."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from fvcore.nn import weight_init
from torch import Tensor, nn

NUM_DECODER_LEVELS = 3

PixelFeatures = tuple[Tensor, Optional[Tensor], list[Tensor]]  # evaluated at import, where Python 3.9 has no |
"""Per-pixel embeddings, encoder features (None without an encoder), maps for the decoder from coarse to fine."""


def select_levels(input_shape: dict[str, ShapeSpec], names: list[str], key: str) -> dict[str, ShapeSpec]:
    """The named levels of ``input_shape``, from the finest to the coarsest.

    Raises:
        ValueError: a name is missing in ``input_shape``; the message names the config ``key``.
    """
    missing = [name for name in names if name not in input_shape]
    if missing or not names:
        raise ValueError(f"{key} asks for {list(names)}, but there is only {sorted(input_shape)}")
    return dict(sorted(((name, input_shape[name]) for name in names), key=lambda level: level[1].stride))


def lateral_conv(in_channels: int, out_channels: int, norm: str) -> Conv2d:
    """1×1 convolution and norm, no activation."""
    conv = Conv2d(in_channels, out_channels, kernel_size=1, bias=norm == "", norm=get_norm(norm, out_channels))
    weight_init.c2_xavier_fill(conv)
    return conv


def output_conv(in_channels: int, out_channels: int, norm: str) -> Conv2d:
    """3×3 convolution, norm and ReLU."""
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=3,
        padding=1,
        bias=norm == "",
        norm=get_norm(norm, out_channels),
        activation=F.relu_ if norm else F.relu,  # the gradients of norms don't need their results
    )
    weight_init.c2_xavier_fill(conv)
    return conv


def upsampled_like(x: Tensor, lateral: Tensor, mode: str) -> Tensor:
    """``x`` resized to the size of ``lateral``, in its memory layout: sums of different layouts are slow."""
    channels_last = lateral.is_contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    corners = None if mode == "nearest" else False
    return F.interpolate(x, size=lateral.shape[-2:], mode=mode, align_corners=corners)


def plus_upsampled(lateral: Tensor, coarser: Tensor, mode: str) -> Tensor:
    """``lateral`` plus ``coarser`` in its size."""
    upsampled = upsampled_like(coarser, lateral, mode)
    # one large map less; no gradient needs its values
    return upsampled.add_(lateral) if upsampled.dtype == lateral.dtype else lateral + upsampled


@SEM_SEG_HEADS_REGISTRY.register()
class BasePixelDecoder(nn.Module):
    """FPN: from the coarsest level down, lateral 1×1 convolution + nearest upsampling, then a 3×3 convolution.

    Modules are numbered from the finest level (1); the coarsest has no lateral convolution.
    """

    @configurable
    def __init__(self, input_shape: dict[str, ShapeSpec], *, conv_dim: int, mask_dim: int, norm: str = "") -> None:
        """
        Args:
            input_shape: channels and stride of the levels to use.
            conv_dim: channels of the intermediate maps.
            mask_dim: channels of the per-pixel embeddings.
            norm: norm of the convolutions, as in Detectron2; "" for none (the convolutions then have a bias).
        """
        super().__init__()
        levels = select_levels(input_shape, list(input_shape), "input_shape")
        self.in_features = list(levels)
        self.mask_dim = mask_dim
        top = len(levels)
        for number, shape in enumerate(levels.values(), start=1):
            if number == top:
                self.add_module(
                    f"layer_{number}", output_conv(self.top_channels(shape.channels, conv_dim), conv_dim, norm)
                )
            else:
                self.add_module(f"adapter_{number}", lateral_conv(shape.channels, conv_dim, norm))
                self.add_module(f"layer_{number}", output_conv(conv_dim, conv_dim, norm))
        self.mask_features = Conv2d(conv_dim, mask_dim, kernel_size=3, padding=1)
        weight_init.c2_xavier_fill(self.mask_features)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": select_levels(input_shape, head.IN_FEATURES, "MODEL.SEM_SEG_HEAD.IN_FEATURES"),
            "conv_dim": head.CONVS_DIM,
            "mask_dim": head.MASK_DIM,
            "norm": head.NORM,
        }

    def top_channels(self, channels: int, conv_dim: int) -> int:
        """Channels that the coarsest 3×3 convolution sees, given those of the backbone level."""
        return channels

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What enters the coarsest convolution, and the encoder features for the transformer decoder."""
        return x, None

    def forward_features(self, features: dict[str, Tensor]) -> PixelFeatures:
        """
        Args:
            features: backbone maps by name, ``[B, C_i, H_i, W_i]``; sizes need not be multiples of each other.

        Returns:
            per-pixel embeddings ``[B, mask_dim, H, W]`` at the finest level, encoder features (None here), and the
            three coarsest maps ``[B, conv_dim, h, w]`` from coarse to fine.
        """
        top = len(self.in_features)
        x, encoder_features = self.encode(features[self.in_features[-1]])
        maps = [self.get_submodule(f"layer_{top}")(x)]
        for number in range(top - 1, 0, -1):
            lateral = self.get_submodule(f"adapter_{number}")(features[self.in_features[number - 1]])
            x = plus_upsampled(lateral, maps[-1], "nearest")
            maps.append(self.get_submodule(f"layer_{number}")(x))
        return self.mask_features(maps[-1]), encoder_features, maps[:NUM_DECODER_LEVELS]

    def forward(self, features: dict[str, Tensor]) -> PixelFeatures:
        """See :meth:`forward_features`."""
        return self.forward_features(features)
