"""Feature pyramid pixel decoder with a transformer encoder on its coarsest level (MaskFormer, panoptic)."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from fvcore.nn import weight_init
from torch import Tensor, nn

from mask2former_plugin.modeling.layers.position_encoding import sine_position_encoding
from mask2former_plugin.modeling.layers.transformer import TransformerEncoder
from mask2former_plugin.modeling.pixel_decoders.fpn import BasePixelDecoder, select_levels


class _EncoderOnly(nn.Module):
    """Gives the encoder its published name, ``transformer.encoder``."""

    def __init__(self, encoder: TransformerEncoder) -> None:
        super().__init__()
        self.encoder = encoder


@SEM_SEG_HEADS_REGISTRY.register()
class TransformerEncoderPixelDecoder(BasePixelDecoder):
    """:class:`BasePixelDecoder` with DETR's encoder in front of the coarsest convolution."""

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        transformer_dropout: float,
        transformer_nheads: int,
        transformer_dim_feedforward: int,
        transformer_enc_layers: int,
        transformer_pre_norm: bool,
        conv_dim: int,
        mask_dim: int,
        norm: str = "",
    ) -> None:
        """
        Args:
            input_shape: channels and stride of the levels to use.
            transformer_dropout: dropout of attention and feed-forward.
            transformer_nheads: heads.
            transformer_dim_feedforward: hidden width of the feed-forward layers.
            transformer_enc_layers: number of encoder layers.
            transformer_pre_norm: normalise before attention and feed-forward instead of after.
            conv_dim: channels of the encoder and of the intermediate maps.
            mask_dim: channels of the per-pixel embeddings.
            norm: norm of the convolutions, as in Detectron2.
        """
        super().__init__(input_shape, conv_dim=conv_dim, mask_dim=mask_dim, norm=norm)
        coarsest = select_levels(input_shape, list(input_shape), "input_shape")[self.in_features[-1]]
        self.input_proj = Conv2d(coarsest.channels, conv_dim, kernel_size=1)
        weight_init.c2_xavier_fill(self.input_proj)
        self.transformer = _EncoderOnly(
            TransformerEncoder(
                transformer_enc_layers,
                conv_dim,
                transformer_nheads,
                transformer_dim_feedforward,
                transformer_dropout,
                transformer_pre_norm,
            )
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        model = cfg.MODEL.MASK_FORMER
        return {
            **super().from_config(cfg, input_shape),
            "transformer_dropout": model.DROPOUT,
            "transformer_nheads": model.NHEADS,
            "transformer_dim_feedforward": model.DIM_FEEDFORWARD,
            "transformer_enc_layers": cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS,
            "transformer_pre_norm": model.PRE_NORM,
        }

    def top_channels(self, channels: int, conv_dim: int) -> int:
        return conv_dim

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.input_proj(x)
        size = x.shape[-2:]
        pos = sine_position_encoding(size, x.shape[1], device=x.device, dtype=x.dtype)
        tokens = self.transformer.encoder(x.flatten(2).transpose(1, 2), pos.flatten(0, 1))
        encoded = tokens.unflatten(1, size).permute(0, 3, 1, 2)
        return encoded, encoded
