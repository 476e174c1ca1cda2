"""ResNet backbones of DeepLab: a stem of three 3×3 convolutions, dilated ``res4``, multi-grid ``res5``."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.layers.blocks import Norm
from detectron2.modeling.backbone.build import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicStem, ResNet, build_stages, conv_norm


class DeepLabStem(CNNBlockBase):
    """Three 3×3 convolutions, the first of stride 2, and maximum pooling of stride 2 (the "c" of R101c)."""

    def __init__(self, in_channels: int = 3, out_channels: int = 128, norm: Norm = "BN"):
        """``norm``: see ``get_norm``."""
        super().__init__(in_channels, out_channels, 4)
        width = out_channels // 2
        self.conv1 = conv_norm(in_channels, width, 3, stride=2, norm=norm)
        self.conv2 = conv_norm(width, width, 3, norm=norm)
        self.conv3 = conv_norm(width, out_channels, 3, norm=norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu_(conv(x))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


STEMS = {"basic": BasicStem, "deeplab": DeepLabStem}


@BACKBONE_REGISTRY.register()
def build_resnet_deeplab_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """The ResNet of ``cfg.MODEL.RESNETS`` with the keys of ``add_deeplab_config``.

    ``STEM_TYPE`` is basic or deeplab; ``RES4_DILATION`` 1 or 2 and ``RES5_DILATION`` 1, 2 or 4 replace strides by
    dilation; ``RES5_MULTI_GRID`` multiplies the dilation of the three blocks of ``res5``.
    """
    options = cfg.MODEL.RESNETS
    if options.STEM_TYPE not in STEMS:
        raise ValueError(f"MODEL.RESNETS.STEM_TYPE must be one of {list(STEMS)}, is '{options.STEM_TYPE}'")
    assert options.RES4_DILATION in (1, 2), f"MODEL.RESNETS.RES4_DILATION must be 1 or 2, is {options.RES4_DILATION}"
    assert options.RES5_DILATION in (1, 2, 4), (
        f"MODEL.RESNETS.RES5_DILATION must be 1, 2 or 4, is {options.RES5_DILATION}"
    )
    assert options.RES4_DILATION == 1 or options.RES5_DILATION == 4, (
        f"MODEL.RESNETS.RES5_DILATION must be 4 where RES4_DILATION is 2; it is {options.RES5_DILATION}"
    )
    stem = STEMS[options.STEM_TYPE](input_shape.channels, options.STEM_OUT_CHANNELS, options.NORM)
    stages = build_stages(cfg, res4_dilation=options.RES4_DILATION, res5_multi_grid=options.RES5_MULTI_GRID)
    return ResNet(stem, stages, out_features=options.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
