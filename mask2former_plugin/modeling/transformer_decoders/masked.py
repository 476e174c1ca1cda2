"""Multi-scale decoder with masked attention (Mask2Former, sections 3.2 and 3.3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from mask2former_plugin.modeling.layers.attention import MultiheadAttention
from mask2former_plugin.modeling.layers.linear import Linear, linear, linear_relu
from mask2former_plugin.modeling.layers.mlp import MLP
from mask2former_plugin.modeling.layers.position_encoding import sine_position_encoding
from mask2former_plugin.modeling.layers.transformer import xavier_init
from mask2former_plugin.modeling.mask_logits import MaskLogits, MaskPrediction
from mask2former_plugin.modeling.ops.sampling import traced
from mask2former_plugin.modeling.recomputation import RunsLayers
from mask2former_plugin.modeling.transformer_decoders.projection import input_projection
from mask2former_plugin.modeling.transformer_decoders.registry import TRANSFORMER_DECODER_REGISTRY

NUM_LEVELS = 3


class SelfAttentionLayer(nn.Module):
    """Self-attention of the queries with residual and norm."""

    def __init__(self, width: int, num_heads: int, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = MultiheadAttention(width, num_heads)
        self.norm = nn.LayerNorm(width)
        xavier_init(self)

    def forward(self, x: Tensor, query_pos: Tensor) -> Tensor:
        """Queries ``[B, Q, C]`` and their positions ``[Q, C]`` to ``[B, Q, C]``."""
        value = self.norm(x) if self.pre_norm else x
        query = value + query_pos
        x = x + self.self_attn(query, query, value)
        return x if self.pre_norm else self.norm(x)


class CrossAttentionLayer(nn.Module):
    """Attention from the queries to one feature map with residual and norm."""

    def __init__(self, width: int, num_heads: int, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.multihead_attn = MultiheadAttention(width, num_heads)
        self.norm = nn.LayerNorm(width)
        xavier_init(self)

    def forward(self, x: Tensor, query_pos: Tensor, keys: Tensor, memory: Tensor, allowed: Tensor) -> Tensor:
        """Queries ``[B, Q, C]``, memory ``[B, S, C]`` with (``keys``) and without position, mask ``[B, 1, Q, S]``."""
        query = (self.norm(x) if self.pre_norm else x) + query_pos
        x = x + self.multihead_attn(query, keys, memory, allowed)
        return x if self.pre_norm else self.norm(x)


class FeedForwardLayer(nn.Module):
    """Feed-forward with residual and norm."""

    def __init__(self, width: int, feedforward: int, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.linear1 = Linear(width, feedforward)
        self.linear2 = Linear(feedforward, width)
        self.norm = nn.LayerNorm(width)
        xavier_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, Q, C]`` to the same."""
        x = x + self.linear2(linear_relu(self.norm(x) if self.pre_norm else x, self.linear1))
        return x if self.pre_norm else self.norm(x)


@torch.no_grad()
def allowed_places(embed: Tensor, features: Tensor) -> Tensor:
    """Where each query may attend: where its mask is at least one half likely, or everywhere if that is nowhere.

    Args:
        embed: mask embeddings, ``[B, Q, C]``.
        features: per-pixel embeddings at the size of the attended map, ``[B, C, S]``. Multiplying after the resize
            equals resizing the product, for a fraction of the work.

    Returns:
        bool, ``[B, 1, Q, S]``; no row is all False.
    """
    # on CPUs the many places as the weights of a linear layer
    linear_in_places = embed.device.type == "cpu" and not traced()
    logits = torch.stack([linear(e, f.t()) for e, f in zip(embed, features)]) if linear_in_places else embed @ features
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # compared faster
    inside = logits.amax(dim=2, keepdim=True) >= 0  # sigmoid >= 0.5
    return (logits >= torch.where(inside, 0.0, -torch.inf)).unsqueeze(1)


@TRANSFORMER_DECODER_REGISTRY.register()
class MultiScaleMaskedTransformerDecoder(RunsLayers):
    """Queries attend, layer by layer and level by level, to the inside of the masks that they predicted before."""

    multi_scale_input = True
    _version = 2  # in checkpoints: tells the original code that the queries have their present name

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
        dim_feedforward: int,
        dec_layers: int,
        pre_norm: bool,
        mask_dim: int,
        enforce_input_project: bool,
    ) -> None:
        """
        Args:
            in_channels: channels of the feature maps.
            mask_classification: must be True.
            num_classes: classes without "no object".
            hidden_dim: width of the transformer.
            num_queries: number of queries.
            nheads: heads.
            dim_feedforward: hidden width of the feed-forward layers.
            dec_layers: number of layers; one prediction is made before the first and one after each.
            pre_norm: normalise before attention and feed-forward instead of after.
            mask_dim: channels of the per-pixel embeddings.
            enforce_input_project: project the feature maps even if their width is right.

        Raises:
            ValueError: ``mask_classification`` is False, or ``dec_layers`` is negative.
        """
        super().__init__()
        if not mask_classification:
            raise ValueError(
                "MultiScaleMaskedTransformerDecoder predicts classes and masks; it cannot do without the classes"
            )
        if dec_layers < 0:
            raise ValueError(
                "MODEL.MASK_FORMER.DEC_LAYERS counts the prediction before the first layer and must be at least 1"
            )
        self.num_layers = dec_layers
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(hidden_dim, nheads, pre_norm) for _ in range(dec_layers)
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(hidden_dim, nheads, pre_norm) for _ in range(dec_layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FeedForwardLayer(hidden_dim, dim_feedforward, pre_norm) for _ in range(dec_layers)
        )
        self.decoder_norm = nn.LayerNorm(hidden_dim)
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(NUM_LEVELS, hidden_dim)
        self.input_proj = nn.ModuleList(
            input_projection(in_channels, hidden_dim, enforce_input_project) for _ in range(NUM_LEVELS)
        )
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP(hidden_dim, hidden_dim, mask_dim, 3)
        # what too few layers never read is frozen, as DistributedDataParallel waits for every gradient
        for project in self.input_proj[dec_layers:]:
            project.requires_grad_(False)
        if dec_layers == 0:
            self.query_embed.requires_grad_(False)
            self.level_embed.requires_grad_(False)

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
            "dim_feedforward": model.DIM_FEEDFORWARD,
            # the key counts the prediction from the learned queries as a layer
            "dec_layers": model.DEC_LAYERS - 1,
            "pre_norm": model.PRE_NORM,
            "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
            "enforce_input_project": model.ENFORCE_INPUT_PROJ,
        }

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # the first published checkpoints call the queries static_query
        for key in [k for k in state_dict if k.startswith(f"{prefix}static_query.")]:
            new_key = key.replace(f"{prefix}static_query.", f"{prefix}query_feat.", 1)
            if new_key not in state_dict:
                state_dict[new_key] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: list[Tensor], mask_features: Tensor, mask: None = None) -> MaskPrediction:
        """
        Args:
            x: three maps ``[B, in_channels, h, w]`` from coarse to fine.
            mask_features: per-pixel embeddings, ``[B, mask_dim, H, W]``.
            mask: there is no padding mask in this architecture; only None.

        Returns:
            the prediction after the last layer, with the earlier ones under ``aux_outputs``, the first being that of
            the learned queries.

        Raises:
            ValueError: there are not three maps, or a padding mask is given.
        """
        if mask is not None:
            raise ValueError(
                "padding masks are not supported: images are padded with zeros and attended to as they are"
            )
        if len(x) != NUM_LEVELS:
            raise ValueError(f"MultiScaleMaskedTransformerDecoder reads {NUM_LEVELS} feature maps, got {len(x)}")
        keys, memories, mask_levels = [], [], []
        for level, project, embed in zip(x, self.input_proj, self.level_embed.weight):
            level = project(level)
            size = level.shape[-2:]
            memory = level.flatten(2).transpose(1, 2) + embed.to(level.dtype)
            pos = sine_position_encoding(size, memory.shape[2], device=level.device, dtype=level.dtype)
            keys.append(memory + pos.flatten(0, 1))
            memories.append(memory)
            resized = F.interpolate(mask_features.detach(), size=size, mode="bilinear", align_corners=False)
            mask_levels.append(resized.flatten(2))

        query_pos = self.query_embed.weight
        output = self.query_feat.weight.expand(mask_features.shape[0], -1, -1)
        predictions = [self._predict(output, mask_features)]
        for number in range(self.num_layers):
            level = number % NUM_LEVELS
            allowed = allowed_places(predictions[-1]["mask_logits"].embed, mask_levels[level])
            cross_attention = self.transformer_cross_attention_layers[number]
            output = self.run_lean(cross_attention, output, query_pos, keys[level], memories[level], allowed)
            output = self.run_layer(self.transformer_self_attention_layers[number], output, query_pos)
            output = self.run_layer(self.transformer_ffn_layers[number], output)
            predictions.append(self._predict(output, mask_features))
        *auxiliary, prediction = predictions
        prediction["aux_outputs"] = auxiliary
        return prediction

    def _predict(self, output: Tensor, mask_features: Tensor) -> MaskPrediction:
        output = self.decoder_norm(output)
        mask_logits = MaskLogits(self.mask_embed(output), mask_features)
        return MaskPrediction(pred_logits=self.class_embed(output), mask_logits=mask_logits)
