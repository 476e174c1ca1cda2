"""DETR's decoder on one feature map (MaskFormer, section 3.3)."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from mask2former_plugin.modeling.layers.mlp import MLP
from mask2former_plugin.modeling.layers.position_encoding import sine_position_encoding
from mask2former_plugin.modeling.layers.transformer import TransformerDecoder, TransformerEncoder
from mask2former_plugin.modeling.mask_logits import MaskLogits, MaskPrediction
from mask2former_plugin.modeling.transformer_decoders.projection import input_projection
from mask2former_plugin.modeling.transformer_decoders.registry import TRANSFORMER_DECODER_REGISTRY


class _EncoderDecoder(nn.Module):
    """Gives the stacks their published names, ``transformer.encoder`` and ``transformer.decoder``."""

    def __init__(self, encoder: TransformerEncoder, decoder: TransformerDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder


@TRANSFORMER_DECODER_REGISTRY.register()
class StandardTransformerDecoder(nn.Module):
    """Queries attend to all pixels of one map; every layer predicts if deep supervision is on, else the last."""

    multi_scale_input = False

    @configurable
    def __init__(
        self,
        in_channels: int,
        mask_classification: bool = True,
        *,
        num_classes: int,
        hidden_dim: int,
        num_queries: int,
        nheads: int,
        dropout: float,
        dim_feedforward: int,
        enc_layers: int,
        dec_layers: int,
        pre_norm: bool,
        deep_supervision: bool,
        mask_dim: int,
        enforce_input_project: bool,
    ) -> None:
        """
        Args:
            in_channels: channels of the feature map.
            mask_classification: predict a class for every query; without it the predictions hold masks only.
            num_classes: classes without "no object".
            hidden_dim: width of the transformer.
            num_queries: number of queries.
            nheads: heads.
            dropout: dropout of attention and feed-forward.
            dim_feedforward: hidden width of the feed-forward layers.
            enc_layers: encoder layers on the feature map before the decoder.
            dec_layers: decoder layers.
            pre_norm: normalise before attention and feed-forward instead of after.
            deep_supervision: hand out the predictions of all layers.
            mask_dim: channels of the per-pixel embeddings.
            enforce_input_project: project the feature map even if its width is right.
        """
        super().__init__()
        shape = (hidden_dim, nheads, dim_feedforward, dropout, pre_norm)
        self.transformer = _EncoderDecoder(
            TransformerEncoder(enc_layers, *shape), TransformerDecoder(dec_layers, *shape)
        )
        self.deep_supervision = deep_supervision
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.input_proj = input_projection(in_channels, hidden_dim, enforce_input_project)
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1) if mask_classification else None
        self.mask_embed = MLP(hidden_dim, hidden_dim, mask_dim, 3)

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int, mask_classification: bool = True) -> dict[str, Any]:
        model = cfg.MODEL.MASK_FORMER
        return {
            "in_channels": in_channels,
            "mask_classification": mask_classification,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "hidden_dim": model.HIDDEN_DIM,
            "num_queries": model.NUM_OBJECT_QUERIES,
            "nheads": model.NHEADS,
            "dropout": model.DROPOUT,
            "dim_feedforward": model.DIM_FEEDFORWARD,
            "enc_layers": model.ENC_LAYERS,
            "dec_layers": model.DEC_LAYERS,
            "pre_norm": model.PRE_NORM,
            "deep_supervision": model.DEEP_SUPERVISION,
            "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
            "enforce_input_project": model.ENFORCE_INPUT_PROJ,
        }

    def forward(self, x: Tensor, mask_features: Tensor, mask: None = None) -> MaskPrediction:
        """
        Args:
            x: ``[B, in_channels, h, w]``.
            mask_features: per-pixel embeddings, ``[B, mask_dim, H, W]``.
            mask: there is no padding mask in this architecture; only None.

        Returns:
            the prediction of the last layer, with those of the earlier layers under ``aux_outputs`` (empty without deep
            supervision).
        """
        if mask is not None:
            raise ValueError(
                "padding masks are not supported: images are padded with zeros and attended to as they are"
            )
        x = self.input_proj(x)
        memory = x.flatten(2).transpose(1, 2)
        pos = sine_position_encoding(x.shape[-2:], x.shape[1], device=x.device, dtype=x.dtype).flatten(0, 1)
        memory = self.transformer.encoder(memory, pos)
        query_pos = self.query_embed.weight
        start = query_pos.new_zeros(()).expand(x.shape[0], *query_pos.shape)
        outputs = self.transformer.decoder(start, query_pos, memory + pos, memory)
        if not self.deep_supervision:
            outputs = outputs[-1:]
        *auxiliary, prediction = [self._predict(output, mask_features) for output in outputs]
        prediction["aux_outputs"] = auxiliary
        return prediction

    def _predict(self, output: Tensor, mask_features: Tensor) -> MaskPrediction:
        prediction = MaskPrediction(mask_logits=MaskLogits(self.mask_embed(output), mask_features))
        if self.class_embed is not None:
            prediction["pred_logits"] = self.class_embed(output)
        return prediction
