"""Semantic segmentation with one prediction per pixel: the model around a head, and the head of Panoptic FPN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from fvcore.nn import weight_init
from torch import nn
from torch.nn import functional as F

from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.layers.blocks import Norm
from detectron2.modeling._lookup import lookup
from detectron2.modeling.backbone import Backbone, build_backbone
from detectron2.modeling.meta_arch.build import META_ARCH_REGISTRY
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import ImageList
from detectron2.utils.registry import Registry

SEM_SEG_HEADS_REGISTRY = Registry("SEM_SEG_HEADS")
SEM_SEG_HEADS_REGISTRY.__doc__ = (
    "Callables ``(cfg, input_shape: dict[str, ShapeSpec]) -> nn.Module``, chosen by ``MODEL.SEM_SEG_HEAD.NAME``."
)


def build_sem_seg_head(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build ``cfg.MODEL.SEM_SEG_HEAD.NAME`` for features of the given shapes."""
    head_class = lookup(SEM_SEG_HEADS_REGISTRY, cfg.MODEL.SEM_SEG_HEAD.NAME, "MODEL.SEM_SEG_HEAD.NAME")
    return head_class(cfg, input_shape)


@META_ARCH_REGISTRY.register()
class SemanticSegmentor(nn.Module):
    """Backbone and head with per-pixel class scores.

    The head is called with ``(features, targets)`` and returns ``(scores, losses)``; it has ``ignore_value``.
    """

    @configurable
    def __init__(
        self, *, backbone: Backbone, sem_seg_head: nn.Module, pixel_mean: Sequence[float], pixel_std: Sequence[float]
    ):
        """``pixel_mean`` and ``pixel_std`` have one value per image channel, on the scale of the images (0 to 255)."""
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.register_buffer(
            "pixel_mean", torch.tensor(pixel_mean, dtype=torch.float32).view(-1, 1, 1), persistent=False
        )
        self.register_buffer("pixel_std", torch.tensor(pixel_std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "sem_seg_head": build_sem_seg_head(cfg, backbone.output_shape()),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]:
        """
        Args:
            batched_inputs: one dict per image: ``image`` (C, H, W); in training ``sem_seg``, class ids (H, W);
                optionally ``height`` and ``width`` of the result.

        Returns:
            in training the losses by name; otherwise one dict per image with ``sem_seg``, scores (K, height, width).
        """
        images = [(inputs["image"].to(self.device) - self.pixel_mean) / self.pixel_std for inputs in batched_inputs]
        batch = self._to_batch(images, 0.0)
        targets = self._targets(batched_inputs) if self.training else None
        scores, losses = self.sem_seg_head(self.backbone(batch.tensor), targets)
        if self.training:
            return losses
        results = []
        for score, inputs, image_size in zip(scores, batched_inputs, batch.image_sizes):
            height, width = inputs.get("height", image_size[0]), inputs.get("width", image_size[1])
            results.append({"sem_seg": sem_seg_postprocess(score, image_size, height, width)})
        return results

    def _to_batch(self, tensors: list[torch.Tensor], pad_value: float) -> ImageList:
        return ImageList.from_tensors(
            tensors,
            self.backbone.size_divisibility,
            pad_value=pad_value,
            padding_constraints=self.backbone.padding_constraints,
        )

    def _targets(self, batched_inputs: list[dict[str, Any]]) -> torch.Tensor:
        for inputs in batched_inputs:
            if "sem_seg" not in inputs:
                source = inputs.get("file_name", "an image")
                raise ValueError(
                    f"training needs the labels 'sem_seg' of every image; {source} has only {sorted(inputs)}"
                )
        labels = [inputs["sem_seg"].to(self.device) for inputs in batched_inputs]
        return self._to_batch(labels, self.sem_seg_head.ignore_value).tensor


@SEM_SEG_HEADS_REGISTRY.register()
class SemSegFPNHead(nn.Module):
    """Semantic head of Panoptic FPN (Kirillov et al. 2019, section 3): levels brought to one stride and added."""

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        num_classes: int,
        conv_dims: int,
        common_stride: int,
        loss_weight: float = 1.0,
        norm: Norm = None,
        ignore_value: int = -1,
    ):
        """
        Args:
            input_shape: features to use.
            num_classes: number of scores per pixel.
            conv_dims: channels inside.
            common_stride: stride of the scores; the features have this stride or 2, 4, … times it.
            loss_weight: factor on the loss.
            norm: see ``get_norm``.
            ignore_value: label without loss.
        """
        super().__init__()
        shapes = sorted(input_shape.items(), key=lambda item: item[1].stride)
        if not shapes:
            raise ValueError("SemSegFPNHead needs at least one feature (MODEL.SEM_SEG_HEAD.IN_FEATURES)")
        self.in_features = [name for name, _ in shapes]
        self.ignore_value = ignore_value
        self.common_stride = common_stride
        self.loss_weight = loss_weight
        for name, shape in shapes:
            doublings = int(math.log2(shape.stride / common_stride))
            channels, steps = shape.channels, []
            for _ in range(max(1, doublings)):
                conv = Conv2d(
                    channels,
                    conv_dims,
                    kernel_size=3,
                    padding=1,
                    bias=not norm,
                    norm=get_norm(norm, conv_dims),
                    activation=F.relu,
                )
                weight_init.c2_msra_fill(conv)
                steps.append(conv)
                if doublings > 0:
                    steps.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
                channels = conv_dims
            self.add_module(name, nn.Sequential(*steps))
        self.predictor = Conv2d(conv_dims, num_classes, kernel_size=1)
        weight_init.c2_msra_fill(self.predictor)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        options = cfg.MODEL.SEM_SEG_HEAD
        missing = [name for name in options.IN_FEATURES if name not in input_shape]
        if missing:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES names {missing}, but the backbone gives {sorted(input_shape)}"
            )
        return {
            "input_shape": {name: input_shape[name] for name in options.IN_FEATURES},
            "num_classes": options.NUM_CLASSES,
            "conv_dims": options.CONVS_DIM,
            "common_stride": options.COMMON_STRIDE,
            "loss_weight": options.LOSS_WEIGHT,
            "norm": options.NORM,
            "ignore_value": options.IGNORE_VALUE,
        }

    def forward(
        self, features: dict[str, torch.Tensor], targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Training: ``(None, losses)`` for labels (N, H, W). Else ``(scores (N, K, H, W), {})`` at the input size."""
        scores = self.layers(features)
        if self.training:
            return None, self.losses(scores, targets)
        return F.interpolate(scores, scale_factor=self.common_stride, mode="bilinear", align_corners=False), {}

    def layers(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Class scores at the common stride."""
        total = None
        for name in self.in_features:
            level = getattr(self, name)(features[name])
            if total is None:
                total = level
                continue
            if level.shape != total.shape:  # the input size is not a multiple of the largest stride
                level = F.interpolate(level, size=total.shape[-2:], mode="bilinear", align_corners=False)
            total = total + level
        return self.predictor(total)

    def losses(self, predictions: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean cross entropy over the labelled pixels at the input size; 0 if there are none."""
        # float32: the upsampling and the logarithm lose too much in half precision.
        scores = F.interpolate(
            predictions.float(), scale_factor=self.common_stride, mode="bilinear", align_corners=False
        )
        scores = scores[..., : targets.shape[-2], : targets.shape[-1]]
        total = F.cross_entropy(scores, targets, reduction="sum", ignore_index=self.ignore_value)
        count = (targets != self.ignore_value).sum().clamp(min=1)
        return {"loss_sem_seg": total / count * self.loss_weight}
