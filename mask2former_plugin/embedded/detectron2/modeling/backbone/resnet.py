"""ResNet backbones (He et al. 2016; ResNeXt with groups)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from fvcore.nn import weight_init
from torch import nn
from torch.nn import functional as F

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.layers.blocks import Norm
from detectron2.modeling.backbone.backbone import Backbone
from detectron2.modeling.backbone.build import BACKBONE_REGISTRY
from detectron2.utils.missing import needs_upstream

ResNetBlockBase = CNNBlockBase

BLOCKS_PER_STAGE = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
FIRST_BOTTLENECK_DEPTH = 50


def conv_norm(in_channels: int, out_channels: int, kernel_size: int, *, norm: Norm, **kwargs: int) -> Conv2d:
    """Padded convolution without bias, then ``norm``; Kaiming initialisation. ``kwargs``: stride, dilation, groups."""
    padding = kernel_size // 2 * kwargs.get("dilation", 1)
    conv = Conv2d(
        in_channels, out_channels, kernel_size, padding=padding, bias=False, norm=get_norm(norm, out_channels), **kwargs
    )
    weight_init.c2_msra_fill(conv)
    return conv


class _ResidualBlock(CNNBlockBase):
    """``relu(residual(x) + shortcut(x))``; the shortcut is a 1×1 convolution where the number of channels changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm):
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = conv_norm(in_channels, out_channels, 1, stride=stride, norm=norm)

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.residual(x)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class BasicBlock(_ResidualBlock):
    """Two 3×3 convolutions (ResNet-18 and -34)."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, norm: Norm = "BN"):
        """``norm``: see ``get_norm``."""
        super().__init__(in_channels, out_channels, stride, norm)
        self.conv1 = conv_norm(in_channels, out_channels, 3, stride=stride, norm=norm)
        self.conv2 = conv_norm(out_channels, out_channels, 3, norm=norm)

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(F.relu_(self.conv1(x)))


class BottleneckBlock(_ResidualBlock):
    """1×1, 3×3 and 1×1 convolution (ResNet-50 and deeper)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm: Norm = "BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
    ):
        """
        Args:
            bottleneck_channels: of the 3×3 convolution.
            num_groups: of the 3×3 convolution.
            norm: see ``get_norm``.
            stride_in_1x1: the first 1×1 convolution has the stride (original ResNets), not the 3×3 one (torchvision's).
            dilation: of the 3×3 convolution.
        """
        super().__init__(in_channels, out_channels, stride, norm)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv_norm(in_channels, bottleneck_channels, 1, stride=stride_1x1, norm=norm)
        self.conv2 = conv_norm(
            bottleneck_channels,
            bottleneck_channels,
            3,
            stride=stride_3x3,
            groups=num_groups,
            dilation=dilation,
            norm=norm,
        )
        self.conv3 = conv_norm(bottleneck_channels, out_channels, 1, norm=norm)

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv3(F.relu_(self.conv2(F.relu_(self.conv1(x)))))


class BasicStem(CNNBlockBase):
    """7×7 convolution of stride 2 and maximum pooling of stride 2."""

    def __init__(self, in_channels: int = 3, out_channels: int = 64, norm: Norm = "BN"):
        """``norm``: see ``get_norm``."""
        super().__init__(in_channels, out_channels, 4)
        self.conv1 = conv_norm(in_channels, out_channels, 7, stride=2, norm=norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class ResNet(Backbone):
    """A stem and stages ``res2``, ``res3``, …, each a sequence of blocks.

    Stages behind the last one asked for are dropped.
    """

    def __init__(
        self,
        stem: CNNBlockBase,
        stages: Sequence[Sequence[CNNBlockBase]],
        num_classes: int | None = None,
        out_features: Sequence[str] | None = None,
        freeze_at: int = 0,
    ):
        """
        Args:
            stem: first module; has ``stride`` and ``out_channels``.
            stages: blocks of each stage.
            num_classes: adds average pooling and a linear classifier, feature ``linear``.
            out_features: any of ``stem``, ``res2``, …, ``linear``; default: the last.
            freeze_at: see ``freeze``.
        """
        super().__init__()
        names = [f"res{i}" for i in range(2, 2 + len(stages))]
        known = ["stem", *names] + (["linear"] if num_classes is not None else [])
        out_features = list(out_features) if out_features is not None else known[-1:]
        unknown = [name for name in out_features if name not in known]
        assert out_features and not unknown, f"unknown ResNet features {unknown or out_features}; there are {known}"
        if "linear" not in out_features:
            # The rest would cost time, memory and, in distributed training, unused parameters.
            names = names[: max(known.index(name) for name in out_features)]

        self.stem = stem
        self.num_classes = num_classes
        self.stages: list[nn.Sequential] = []
        self.stage_names = tuple(names)
        self._out_features = out_features
        self._out_feature_strides = {"stem": stem.stride}
        self._out_feature_channels = {"stem": stem.out_channels}
        stride, channels = stem.stride, stem.out_channels
        for name, blocks in zip(names, stages):
            assert len(blocks) > 0, f"stage {name} has no blocks"
            stage = nn.Sequential(*blocks)
            self.add_module(name, stage)
            self.stages.append(stage)
            stride *= math.prod(block.stride for block in blocks)
            channels = blocks[-1].out_channels
            self._out_feature_strides[name] = stride
            self._out_feature_channels[name] = channels
        if num_classes is not None and "linear" in out_features:
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.linear = nn.Linear(channels, num_classes)
            nn.init.normal_(self.linear.weight, std=0.01)
        self.freeze(freeze_at)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images (N, C, H, W) to the features asked for."""
        assert x.dim() == 4, f"a ResNet takes images (N, C, H, W), got the shape {tuple(x.shape)}"
        features = {}
        x = self.stem(x)
        if "stem" in self._out_features:
            features["stem"] = x
        for name, stage in zip(self.stage_names, self.stages):
            x = stage(x)
            if name in self._out_features:
                features[name] = x
        if "linear" in self._out_features:
            features["linear"] = self.linear(self.avgpool(x).flatten(1))
        return features

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature map; those of the last stage for ``linear``."""
        last = (self.stage_names or ("stem",))[-1]
        shapes = {}
        for name in self._out_features:
            source = last if name == "linear" else name
            shapes[name] = ShapeSpec(
                channels=self.num_classes if name == "linear" else self._out_feature_channels[source],
                stride=self._out_feature_strides[source],
            )
        return shapes

    def freeze(self, freeze_at: int = 0) -> ResNet:
        """Freeze the first modules: 1 is the stem, 2 adds ``res2`` and so on; 0 is none. Returns the network."""
        if freeze_at >= 1:
            self.stem.freeze()
        for index, stage in enumerate(self.stages, start=2):
            if freeze_at >= index:
                for block in stage:
                    block.freeze()
        return self

    @staticmethod
    def make_stage(
        block_class: type[CNNBlockBase], num_blocks: int, *, in_channels: int, out_channels: int, **kwargs: Any
    ) -> list[CNNBlockBase]:
        """Blocks of one stage.

        Args:
            kwargs: arguments of every block; ``<name>_per_block`` is a list with one value per block.
        """
        common, per_block = {}, {}
        for key, value in kwargs.items():
            if not key.endswith("_per_block"):
                common[key] = value
                continue
            name = key.removesuffix("_per_block")
            assert len(value) == num_blocks, f"{key} has {len(value)} values for {num_blocks} blocks"
            assert name not in kwargs, f"give either {name} or {key}"
            per_block[name] = value
        blocks = []
        for index in range(num_blocks):
            own = {name: values[index] for name, values in per_block.items()}
            blocks.append(block_class(in_channels=in_channels, out_channels=out_channels, **common, **own))
            in_channels = out_channels
        return blocks

    @staticmethod
    def make_default_stages(
        depth: int, block_class: type[CNNBlockBase] | None = None, **kwargs: Any
    ) -> list[list[CNNBlockBase]]:
        """The four stages of ResNet-18, -34, -50, -101 or -152 behind a stem of 64 channels.

        Args:
            block_class: other blocks than those that belong to ``depth``.
            kwargs: further arguments of the blocks, not those that ``depth`` decides.
        """
        num_blocks = _blocks_per_stage(depth)
        is_bottleneck = depth >= FIRST_BOTTLENECK_DEPTH
        block_class = block_class or (BottleneckBlock if is_bottleneck else BasicBlock)
        in_channels, stages = 64, []
        for index, count in enumerate(num_blocks):
            width = 64 * 2**index
            out_channels = 4 * width if is_bottleneck else width
            if is_bottleneck:
                kwargs["bottleneck_channels"] = width
            strides = [1 if index == 0 else 2] + [1] * (count - 1)
            stages.append(
                ResNet.make_stage(
                    block_class,
                    count,
                    stride_per_block=strides,
                    in_channels=in_channels,
                    out_channels=out_channels,
                    **kwargs,
                )
            )
            in_channels = out_channels
        return stages


def _blocks_per_stage(depth: int) -> tuple[int, ...]:
    if depth not in BLOCKS_PER_STAGE:
        raise KeyError(f"no ResNet of depth {depth} (MODEL.RESNETS.DEPTH); there are {sorted(BLOCKS_PER_STAGE)}")
    return BLOCKS_PER_STAGE[depth]


def make_stage(*args: Any, **kwargs: Any) -> list[CNNBlockBase]:
    """Old name of ``ResNet.make_stage``."""
    return ResNet.make_stage(*args, **kwargs)


def build_stages(
    cfg: CfgNode, *, res4_dilation: int = 1, res5_multi_grid: Sequence[int] | None = None
) -> list[list[CNNBlockBase]]:
    """The four stages that ``cfg.MODEL.RESNETS`` describes.

    Args:
        res4_dilation: dilation of ``res4``; ``res5`` has ``RES5_DILATION``. A dilated stage has stride 1.
        res5_multi_grid: factors on the dilation of the blocks of ``res5`` (DeepLabv3, section 3.2.1).
    """
    options = cfg.MODEL.RESNETS
    num_blocks = _blocks_per_stage(options.DEPTH)
    if any(options.DEFORM_ON_PER_STAGE):
        needs_upstream("Deformable convolution in ResNets (MODEL.RESNETS.DEFORM_ON_PER_STAGE)")
    dilations = (1, 1, res4_dilation, options.RES5_DILATION)
    if options.DEPTH < FIRST_BOTTLENECK_DEPTH:
        required = {"RES2_OUT_CHANNELS": 64, "NUM_GROUPS": 1, "RES5_DILATION": 1}
        for key, value in required.items():
            assert options[key] == value, (
                f"set MODEL.RESNETS.{key} to {value} for ResNet-{options.DEPTH}; it is {options[key]}"
            )
        assert res4_dilation == 1 and res5_multi_grid is None, (
            f"ResNet-{options.DEPTH} has no dilated blocks; use depth 50 or more, or build_resnet_backbone"
        )
    stages = []
    in_channels = options.STEM_OUT_CHANNELS
    for index, (count, dilation) in enumerate(zip(num_blocks, dilations)):
        out_channels = options.RES2_OUT_CHANNELS * 2**index
        first_stride = 1 if index == 0 or dilation > 1 else 2
        arguments: dict[str, Any] = {"stride_per_block": [first_stride] + [1] * (count - 1), "norm": options.NORM}
        block_class: type[CNNBlockBase] = BasicBlock
        if options.DEPTH >= FIRST_BOTTLENECK_DEPTH:
            block_class = BottleneckBlock
            grid = res5_multi_grid if index == 3 and res5_multi_grid is not None else [1] * count
            arguments["dilation_per_block"] = [dilation * factor for factor in grid]
            arguments["bottleneck_channels"] = options.NUM_GROUPS * options.WIDTH_PER_GROUP * 2**index
            arguments["num_groups"] = options.NUM_GROUPS
            arguments["stride_in_1x1"] = options.STRIDE_IN_1X1
        stages.append(
            ResNet.make_stage(block_class, count, in_channels=in_channels, out_channels=out_channels, **arguments)
        )
        in_channels = out_channels
    return stages


@BACKBONE_REGISTRY.register()
def build_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """The ResNet of ``cfg.MODEL.RESNETS``, frozen as ``cfg.MODEL.BACKBONE.FREEZE_AT`` says."""
    options = cfg.MODEL.RESNETS
    assert options.RES5_DILATION in (1, 2), f"MODEL.RESNETS.RES5_DILATION must be 1 or 2, is {options.RES5_DILATION}"
    stem = BasicStem(in_channels=input_shape.channels, out_channels=options.STEM_OUT_CHANNELS, norm=options.NORM)
    return ResNet(stem, build_stages(cfg), out_features=options.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
