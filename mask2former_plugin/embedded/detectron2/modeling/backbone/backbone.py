"""What every backbone offers."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from typing import Any

import torch
from torch import nn

from detectron2.layers import ShapeSpec


class Backbone(nn.Module, metaclass=ABCMeta):
    """A network from images to feature maps.

    Subclasses set ``_out_features`` (names), ``_out_feature_channels`` and ``_out_feature_strides`` (by name), or
    override ``output_shape``.
    """

    def __init__(self) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Images (N, C, H, W) to feature maps by name."""

    @property
    def size_divisibility(self) -> int:
        """Height and width of the input must be multiples of it; 0 if any size will do."""
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Further wishes for ``ImageList.from_tensors``: ``size_divisibility``, ``square_size``."""
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature map."""
        return {
            name: ShapeSpec(channels=self._out_feature_channels[name], stride=self._out_feature_strides[name])
            for name in self._out_features
        }
