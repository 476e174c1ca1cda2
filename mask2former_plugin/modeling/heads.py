"""Segmentation heads: pixel decoder plus predictor, for mask classification and for the per-pixel baselines."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from fvcore.nn import weight_init
from torch import Tensor, nn

from mask2former_plugin.modeling.mask_logits import MaskPrediction
from mask2former_plugin.modeling.pixel_decoders import build_pixel_decoder
from mask2former_plugin.modeling.recomputation import recompute_activations
from mask2former_plugin.modeling.transformer_decoders import StandardTransformerDecoder, build_transformer_decoder

logger = logging.getLogger(__name__)

MULTI_SCALE = "multi_scale_pixel_decoder"


def transformer_in_channels(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> int:
    """Channels of the features that ``MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE`` names.

    Raises:
        ValueError: it is neither one of the special names nor a backbone output.
    """
    name = cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE
    if name in ("transformer_encoder", MULTI_SCALE):
        return cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM
    if name == "pixel_embedding":
        return cfg.MODEL.SEM_SEG_HEAD.MASK_DIM
    if name not in input_shape:
        raise ValueError(
            f"MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE is {name!r}; it must be 'transformer_encoder', "
            f"'pixel_embedding', {MULTI_SCALE!r} or one of the backbone outputs {sorted(input_shape)}"
        )
    return input_shape[name].channels


class _PixelDecoderHead(nn.Module):
    """A head with a ``pixel_decoder`` and a ``predictor`` that also reads checkpoints without the former's name.

    The names in the checkpoint decide, not its version: published files exist with either layout and with or without
    versions.
    """

    _version = 2  # in checkpoints: tells the original code that the pixel decoder's names have their prefix

    pixel_decoder: nn.Module
    predictor: nn.Module

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        current = (f"{prefix}predictor.", f"{prefix}pixel_decoder.")
        old = [key for key in state_dict if key.startswith(prefix) and not key.startswith(current)]
        for key in old:
            state_dict[f"{prefix}pixel_decoder.{key[len(prefix):]}"] = state_dict.pop(key)
        if old:
            logger.warning(
                "The weights of %s come from an old checkpoint: they now belong to its pixel_decoder.",
                type(self).__name__,
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


class _TransformerHead(_PixelDecoderHead):
    """A head whose predictor is a transformer decoder."""

    def __init__(self, pixel_decoder: nn.Module, predictor: nn.Module, in_feature: str) -> None:
        super().__init__()
        multi_scale = getattr(predictor, "multi_scale_input", None)
        if multi_scale is not None and multi_scale != (in_feature == MULTI_SCALE):
            needs = repr(MULTI_SCALE) if multi_scale else "a single feature map"
            raise ValueError(
                f"{type(predictor).__name__} needs MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE {needs}, got {in_feature!r}"
            )
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor
        self.transformer_in_feature = in_feature

    def predict(self, features: dict[str, Tensor], mask: None = None) -> MaskPrediction:
        """Runs pixel decoder and transformer decoder on the backbone maps."""
        mask_features, encoder_features, multi_scale = self.pixel_decoder.forward_features(features)
        if self.transformer_in_feature == MULTI_SCALE:
            x = multi_scale
        elif self.transformer_in_feature == "transformer_encoder":
            if encoder_features is None:
                raise ValueError(
                    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE is 'transformer_encoder', "
                    f"but {type(self.pixel_decoder).__name__} has no transformer encoder"
                )
            x = encoder_features
        elif self.transformer_in_feature == "pixel_embedding":
            x = mask_features
        else:
            x = features[self.transformer_in_feature]
        return self.predictor(x, mask_features, mask)


@SEM_SEG_HEADS_REGISTRY.register()
class MaskFormerHead(_TransformerHead):
    """Mask classification: a class and a mask for every query."""

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        pixel_decoder: nn.Module,
        transformer_predictor: nn.Module,
        transformer_in_feature: str,
    ) -> None:
        """
        Args:
            num_classes: classes without "no object".
            pixel_decoder: has ``forward_features``.
            transformer_predictor: a transformer decoder.
            transformer_in_feature: what the decoder reads: "transformer_encoder", "pixel_embedding",
                "multi_scale_pixel_decoder" or the name of a backbone map.

        Raises:
            ValueError: the decoder cannot read that.
        """
        super().__init__(pixel_decoder, transformer_predictor, transformer_in_feature)
        self.num_classes = num_classes

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        return {
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "pixel_decoder": build_pixel_decoder(cfg, input_shape),
            "transformer_predictor": build_transformer_decoder(cfg, transformer_in_channels(cfg, input_shape)),
            "transformer_in_feature": cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE,
        }

    def forward(self, features: dict[str, Tensor], mask: None = None) -> MaskPrediction:
        """Backbone maps by name to the predictions of the transformer decoder."""
        return self.predict(features, mask)


def per_pixel_loss(logits: Tensor, targets: Tensor, ignore_value: int) -> Tensor:
    """Mean cross entropy over the pixels with a label, in at least float32; 0 if there are none.

    Args:
        logits: ``[B, K, h, w]``, upsampled to the multiple of the targets' size that the stride asks for; what exceeds
            it is cut off.
        targets: ``[B, H, W]`` labels.
        ignore_value: label of the pixels that don't count.
    """
    height, width = targets.shape[-2:]
    logits = logits[..., :height, :width].to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, targets, reduction="sum", ignore_index=ignore_value)
    return total / (targets != ignore_value).sum().clamp(min=1)


@SEM_SEG_HEADS_REGISTRY.register()
class PerPixelBaselineHead(_PixelDecoderHead):
    """Per-pixel classification with the pixel decoder of MaskFormer (PerPixelBaseline)."""

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        pixel_decoder: nn.Module,
        loss_weight: float = 1.0,
        ignore_value: int = -1,
        common_stride: int = 4,
    ) -> None:
        """
        Args:
            num_classes: number of classes.
            pixel_decoder: has ``forward_features`` and ``mask_dim``.
            loss_weight: factor of the loss.
            ignore_value: label of the pixels that don't count.
            common_stride: stride of the per-pixel embeddings.
        """
        super().__init__()
        self.num_classes = num_classes
        self.ignore_value = ignore_value
        self.loss_weight = loss_weight
        self.common_stride = common_stride
        self.pixel_decoder = pixel_decoder
        self.predictor = Conv2d(pixel_decoder.mask_dim, num_classes, kernel_size=1)
        weight_init.c2_msra_fill(self.predictor)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.SEM_SEG_HEAD
        return {
            "num_classes": head.NUM_CLASSES,
            "pixel_decoder": build_pixel_decoder(cfg, input_shape),
            "loss_weight": head.LOSS_WEIGHT,
            "ignore_value": head.IGNORE_VALUE,
        }

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """
        Args:
            features: backbone maps by name.
            targets: labels ``[B, H, W]``, needed in training.

        Returns:
            ``(None, {"loss_sem_seg": loss})`` in training, else ``(logits [B, K, H, W], {})``.
        """
        mask_features, _, _ = self.pixel_decoder.forward_features(features)
        logits = upsample(self.predictor(mask_features), self.common_stride)
        if not self.training:
            return logits, {}
        return None, {"loss_sem_seg": per_pixel_loss(logits, targets, self.ignore_value) * self.loss_weight}


@SEM_SEG_HEADS_REGISTRY.register()
class PerPixelBaselinePlusHead(_TransformerHead):
    """Per-pixel classification with MaskFormer's transformer decoder: query k predicts class k (PerPixelBaseline+)."""

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        pixel_decoder: nn.Module,
        transformer_predictor: nn.Module,
        transformer_in_feature: str,
        deep_supervision: bool,
        loss_weight: float = 1.0,
        ignore_value: int = -1,
        common_stride: int = 4,
    ) -> None:
        """
        Args:
            num_classes: number of classes and of queries.
            pixel_decoder: has ``forward_features``.
            transformer_predictor: a transformer decoder without class predictions.
            transformer_in_feature: what the decoder reads, see :class:`MaskFormerHead`.
            deep_supervision: train the predictions of the earlier layers, too.
            loss_weight: factor of the loss.
            ignore_value: label of the pixels that don't count.
            common_stride: stride of the per-pixel embeddings.
        """
        super().__init__(pixel_decoder, transformer_predictor, transformer_in_feature)
        self.num_classes = num_classes
        self.ignore_value = ignore_value
        self.loss_weight = loss_weight
        self.common_stride = common_stride
        self.deep_supervision = deep_supervision

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head, model = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
        if model.NUM_OBJECT_QUERIES != head.NUM_CLASSES:
            raise ValueError(
                "PerPixelBaselinePlusHead has one query per class: set MODEL.MASK_FORMER.NUM_OBJECT_QUERIES "
                f"({model.NUM_OBJECT_QUERIES}) to MODEL.SEM_SEG_HEAD.NUM_CLASSES ({head.NUM_CLASSES})"
            )
        in_channels = transformer_in_channels(cfg, input_shape)
        decoder = StandardTransformerDecoder(cfg, in_channels, mask_classification=False)
        if model.USE_CHECKPOINT:
            recompute_activations(decoder, "MODEL.MASK_FORMER.USE_CHECKPOINT")
        return {
            "num_classes": head.NUM_CLASSES,
            "pixel_decoder": build_pixel_decoder(cfg, input_shape),
            "transformer_predictor": decoder,
            "transformer_in_feature": model.TRANSFORMER_IN_FEATURE,
            "deep_supervision": model.DEEP_SUPERVISION,
            "loss_weight": head.LOSS_WEIGHT,
            "ignore_value": head.IGNORE_VALUE,
        }

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """See :meth:`PerPixelBaselineHead.forward`; deep supervision adds ``loss_sem_seg_{i}`` for earlier layers."""
        prediction = self.predict(features)
        if not self.training:
            return upsample(prediction["mask_logits"].dense(), self.common_stride), {}
        losses = {"loss_sem_seg": self._loss(prediction, targets)}
        if self.deep_supervision:
            for number, auxiliary in enumerate(prediction["aux_outputs"]):
                losses[f"loss_sem_seg_{number}"] = self._loss(auxiliary, targets)
        return None, losses

    def _loss(self, prediction: MaskPrediction, targets: Tensor) -> Tensor:
        logits = upsample(prediction["mask_logits"].dense(), self.common_stride)
        return per_pixel_loss(logits, targets, self.ignore_value) * self.loss_weight


def upsample(logits: Tensor, factor: int) -> Tensor:
    """Bilinear upsampling of ``[B, K, h, w]`` by an integer factor."""
    return F.interpolate(logits, scale_factor=factor, mode="bilinear", align_corners=False)
