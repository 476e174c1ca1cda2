"""Pixel decoders: from backbone features to per-pixel embeddings and to the maps that the transformer decoder reads."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import nn

from mask2former_plugin.modeling.pixel_decoders.deformable import MSDeformAttnPixelDecoder
from mask2former_plugin.modeling.pixel_decoders.fpn import BasePixelDecoder
from mask2former_plugin.modeling.pixel_decoders.transformer_fpn import TransformerEncoderPixelDecoder
from mask2former_plugin.modeling.recomputation import recompute_activations


def build_pixel_decoder(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """The pixel decoder that ``MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME`` names.

    Args:
        input_shape: shapes of all backbone outputs.

    Raises:
        ValueError: the registered class has no ``forward_features`` and so is no pixel decoder, or has no layers to
            recompute, though ``MODEL.SEM_SEG_HEAD.USE_CHECKPOINT`` asks for it.
    """
    name = cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME
    decoder = SEM_SEG_HEADS_REGISTRY.get(name)(cfg, input_shape)
    if not callable(getattr(decoder, "forward_features", None)):
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME: {name} is no pixel decoder, it has no forward_features"
        )
    if cfg.MODEL.SEM_SEG_HEAD.USE_CHECKPOINT:
        recompute_activations(decoder, "MODEL.SEM_SEG_HEAD.USE_CHECKPOINT")
    return decoder


__all__ = ["BasePixelDecoder", "MSDeformAttnPixelDecoder", "TransformerEncoderPixelDecoder", "build_pixel_decoder"]
