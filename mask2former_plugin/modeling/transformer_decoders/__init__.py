"""Transformer decoders: from feature maps and per-pixel embeddings to classes and factored masks."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn

from mask2former_plugin.modeling.transformer_decoders.masked import MultiScaleMaskedTransformerDecoder
from mask2former_plugin.modeling.transformer_decoders.registry import TRANSFORMER_DECODER_REGISTRY
from mask2former_plugin.modeling.transformer_decoders.standard import StandardTransformerDecoder


def build_transformer_decoder(cfg: CfgNode, in_channels: int, mask_classification: bool = True) -> nn.Module:
    """The decoder that ``MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME`` names.

    Args:
        in_channels: channels of the feature maps that it reads.
        mask_classification: whether it predicts a class for every query.
    """
    return TRANSFORMER_DECODER_REGISTRY.get(cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME)(
        cfg, in_channels, mask_classification
    )


__all__ = [
    "MultiScaleMaskedTransformerDecoder",
    "StandardTransformerDecoder",
    "TRANSFORMER_DECODER_REGISTRY",
    "build_transformer_decoder",
]
