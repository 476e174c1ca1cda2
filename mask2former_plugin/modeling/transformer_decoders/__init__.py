"""Transformer decoders: from feature maps and per-pixel embeddings to classes and factored masks."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn

from mask2former_plugin.modeling.recomputation import recompute_activations
from mask2former_plugin.modeling.transformer_decoders.masked import MultiScaleMaskedTransformerDecoder
from mask2former_plugin.modeling.transformer_decoders.registry import TRANSFORMER_DECODER_REGISTRY
from mask2former_plugin.modeling.transformer_decoders.standard import StandardTransformerDecoder


def build_transformer_decoder(cfg: CfgNode, in_channels: int, mask_classification: bool = True) -> nn.Module:
    """The decoder that ``MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME`` names.

    Args:
        in_channels: channels of the feature maps that it reads.
        mask_classification: whether it predicts a class for every query.

    Raises:
        ValueError: it has no layers to recompute, though ``MODEL.MASK_FORMER.USE_CHECKPOINT`` asks for it.
    """
    decoder_class = TRANSFORMER_DECODER_REGISTRY.get(cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME)
    decoder = decoder_class(cfg, in_channels, mask_classification)
    if cfg.MODEL.MASK_FORMER.USE_CHECKPOINT:
        recompute_activations(decoder, "MODEL.MASK_FORMER.USE_CHECKPOINT")
    return decoder


__all__ = [
    "MultiScaleMaskedTransformerDecoder",
    "StandardTransformerDecoder",
    "TRANSFORMER_DECODER_REGISTRY",
    "build_transformer_decoder",
]
