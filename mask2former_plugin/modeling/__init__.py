"""The networks; importing this registers them with Detectron2."""

from mask2former_plugin.modeling.backbones import D2SwinTransformer
from mask2former_plugin.modeling.heads import MaskFormerHead, PerPixelBaselineHead, PerPixelBaselinePlusHead
from mask2former_plugin.modeling.mask_logits import MaskLogits, MaskPrediction
from mask2former_plugin.modeling.pixel_decoders import (
    BasePixelDecoder,
    MSDeformAttnPixelDecoder,
    TransformerEncoderPixelDecoder,
    build_pixel_decoder,
)
from mask2former_plugin.modeling.target_masks import RunLengthMasks
from mask2former_plugin.modeling.transformer_decoders import (
    TRANSFORMER_DECODER_REGISTRY,
    MultiScaleMaskedTransformerDecoder,
    StandardTransformerDecoder,
    build_transformer_decoder,
)

__all__ = [
    "BasePixelDecoder",
    "D2SwinTransformer",
    "MSDeformAttnPixelDecoder",
    "MaskFormerHead",
    "MaskLogits",
    "MaskPrediction",
    "MultiScaleMaskedTransformerDecoder",
    "PerPixelBaselineHead",
    "PerPixelBaselinePlusHead",
    "RunLengthMasks",
    "StandardTransformerDecoder",
    "TRANSFORMER_DECODER_REGISTRY",
    "TransformerEncoderPixelDecoder",
    "build_pixel_decoder",
    "build_transformer_decoder",
]
