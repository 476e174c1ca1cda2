"""Pixel decoder with a multi-scale deformable attention encoder (Mask2Former, section 3.1)."""

from __future__ import annotations

import math
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from fvcore.nn import weight_init
from torch import Tensor, nn

from mask2former_plugin.modeling.layers.deformable_attention import MSDeformAttn, reference_points
from mask2former_plugin.modeling.layers.linear import Linear, linear_add, linear_relu, recomputes_pieces, token_wise
from mask2former_plugin.modeling.layers.plain import has_hooked_parts, is_plain
from mask2former_plugin.modeling.layers.position_encoding import sine_position_encoding
from mask2former_plugin.modeling.pixel_decoders.fpn import (
    NUM_DECODER_LEVELS,
    PixelFeatures,
    lateral_conv,
    output_conv,
    plus_upsampled,
    select_levels,
)
from mask2former_plugin.modeling.recomputation import RunsLayers

# fixed in the published models, whatever the config says
FEEDFORWARD = 1024
NUM_POINTS = 4


class DeformableEncoderLayer(RunsLayers):
    """Deformable self-attention and feed-forward, each followed by residual and norm."""

    def __init__(
        self, width: int, num_levels: int, num_heads: int, num_points: int, feedforward: int, dropout: float
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.self_attn = MSDeformAttn(width, num_levels, num_heads, num_points)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = Linear(width, feedforward)
        self.linear2 = Linear(feedforward, width)
        self.norm2 = nn.LayerNorm(width)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor, pos: Tensor, sizes: list[tuple[int, int]], points: Tensor) -> Tensor:
        """Tokens ``[B, S, C]`` with position encoding ``[S, C]`` and places ``[S, 2]`` to ``[B, S, C]``."""
        if type(self.self_attn) is not MSDeformAttn or has_hooked_parts(self):
            # what somebody has put in there, or hung on a part, waits to be called: once, for all tokens
            return self._feed(self.norm1(x + self.dropout(self.self_attn(x + pos, x, sizes, points))))
        attended = self.run_lean(self._attend, x, pos, sizes, points)
        hidden = self.linear1.out_features
        # GPUs are quicker with memory than with products
        recomputes = self.recomputing() or (self.runs_lean() and x.device.type == "cpu")
        if recomputes and not recomputes_pieces(self, x, hidden):
            return self.run_lean(self._finish, x, attended)
        return token_wise(self._finish, x, attended, hidden=hidden, module=self)

    def _attend(self, x: Tensor, pos: Tensor, sizes: list[tuple[int, int]], points: Tensor) -> Tensor:
        return self.self_attn.attend(x + pos, x, sizes, points)

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        return self._feed(self.norm1(linear_add(attended, self.self_attn.output_proj, self.dropout, x)))

    def _feed(self, x: Tensor) -> Tensor:
        hidden = self.dropout(linear_relu(x, self.linear1))
        return self.norm2(linear_add(hidden, self.linear2, self.dropout, x))


class _LayerStack(nn.Module):
    """Gives the layers their published name, ``encoder.layers``."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class DeformableEncoder(nn.Module):
    """Deformable encoder over several maps that are given from coarse to fine."""

    def __init__(
        self,
        num_levels: int,
        num_layers: int,
        width: int,
        num_heads: int,
        num_points: int,
        feedforward: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.encoder = _LayerStack(
            [
                DeformableEncoderLayer(width, num_levels, num_heads, num_points, feedforward, dropout)
                for _ in range(num_layers)
            ]
        )
        self.level_embed = nn.Parameter(torch.empty(num_levels, width))
        nn.init.normal_(self.level_embed)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps ``[B, C, H_l, W_l]`` to maps of the same shapes."""
        sizes = [(m.shape[2], m.shape[3]) for m in maps]
        x = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
        # the places need at least float32, whatever the features are
        points = reference_points(sizes, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        pos = torch.cat(
            [
                sine_position_encoding(size, x.shape[2], device=x.device, dtype=x.dtype).flatten(0, 1)
                + embed.to(x.dtype)
                for size, embed in zip(sizes, self.level_embed)
            ]
        )
        for layer in self.encoder.layers:
            x = layer(x, pos, sizes, points)
        levels = x.split([h * w for h, w in sizes], dim=1)
        return [level.unflatten(1, size).permute(0, 3, 1, 2) for level, size in zip(levels, sizes)]


@SEM_SEG_HEADS_REGISTRY.register()
class MSDeformAttnPixelDecoder(RunsLayers):
    """Deformable encoder on the coarse levels, FPN steps down to the stride of the masks.

    FPN modules are numbered from the finest level (1).
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        transformer_dropout: float,
        transformer_nheads: int,
        transformer_dim_feedforward: int,
        transformer_enc_layers: int,
        transformer_in_features: list[str],
        conv_dim: int,
        mask_dim: int,
        common_stride: int,
        norm: str = "",
    ) -> None:
        """
        Args:
            input_shape: channels and stride of the levels to use.
            transformer_dropout: dropout of attention output and feed-forward.
            transformer_nheads: heads.
            transformer_dim_feedforward: hidden width of the feed-forward layers.
            transformer_enc_layers: number of encoder layers.
            transformer_in_features: the levels that the encoder sees.
            conv_dim: channels of the encoder and of the intermediate maps.
            mask_dim: channels of the per-pixel embeddings.
            common_stride: stride of the per-pixel embeddings.
            norm: norm of the FPN convolutions, as in Detectron2.

        Raises:
            ValueError: an encoder level is not among the inputs, or there are too few levels to reach
                ``common_stride``.
        """
        super().__init__()
        levels = select_levels(input_shape, list(input_shape), "input_shape")
        key = "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"
        encoded = select_levels(input_shape, transformer_in_features, key)
        self.transformer_in_features = list(encoded)[::-1]
        self.mask_dim = mask_dim
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(encoded[name].channels, conv_dim, kernel_size=1), nn.GroupNorm(32, conv_dim))
            for name in self.transformer_in_features
        )
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        self.transformer = DeformableEncoder(
            len(encoded),
            transformer_enc_layers,
            conv_dim,
            transformer_nheads,
            NUM_POINTS,
            transformer_dim_feedforward,
            transformer_dropout,
        )
        finest = min(shape.stride for shape in encoded.values())
        num_fpn = max(int(math.log2(finest) - math.log2(common_stride)), 0)
        if num_fpn > len(levels):
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE {common_stride} needs {num_fpn} levels below stride {finest}, "
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES has {list(levels)}"
            )
        self.fpn_features = list(levels)[:num_fpn]
        for number, name in enumerate(self.fpn_features, start=1):
            self.add_module(f"adapter_{number}", lateral_conv(levels[name].channels, conv_dim, norm))
            self.add_module(f"layer_{number}", output_conv(conv_dim, conv_dim, norm))
        self.mask_features = Conv2d(conv_dim, mask_dim, kernel_size=1)
        weight_init.c2_xavier_fill(self.mask_features)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": select_levels(input_shape, head.IN_FEATURES, "MODEL.SEM_SEG_HEAD.IN_FEATURES"),
            "transformer_dropout": cfg.MODEL.MASK_FORMER.DROPOUT,
            "transformer_nheads": cfg.MODEL.MASK_FORMER.NHEADS,
            "transformer_dim_feedforward": FEEDFORWARD,
            "transformer_enc_layers": head.TRANSFORMER_ENC_LAYERS,
            "transformer_in_features": head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES,
            "conv_dim": head.CONVS_DIM,
            "mask_dim": head.MASK_DIM,
            "common_stride": head.COMMON_STRIDE,
            "norm": head.NORM,
        }

    def forward_features(self, features: dict[str, Tensor]) -> PixelFeatures:
        """
        Args:
            features: backbone maps by name, ``[B, C_i, H_i, W_i]``; sizes need not be multiples of each other.

        Returns:
            per-pixel embeddings ``[B, mask_dim, H, W]`` at the common stride, the coarsest encoded map, and the three
            coarsest maps ``[B, conv_dim, h, w]`` from coarse to fine.
        """
        pairs = zip(self.input_proj, self.transformer_in_features)
        maps = self.transformer([self.run_lean(project, features[name]) for project, name in pairs])
        embedding = None
        for number in range(len(self.fpn_features), 0, -1):
            feature = features[self.fpn_features[number - 1]]
            layer = self.get_submodule(f"layer_{number}")
            if self.runs_lean() and is_plain(layer, Conv2d):
                # in two parts, so that in the backward pass large maps of one are there at a time
                convolved = self.run_lean(self._convolve_finer_level, number, feature, maps[-1])
                finer, embedding = self.run_lean(self._finish_finer_level, number, convolved)
            else:
                finer = self.run_lean(self._add_finer_level, number, feature, maps[-1])
            maps.append(finer)
        if embedding is None:
            embedding = self.mask_features(maps[-1])
        return embedding, maps[0], maps[:NUM_DECODER_LEVELS]

    def _add_finer_level(self, number: int, feature: Tensor, coarser: Tensor) -> Tensor:
        lateral = self.get_submodule(f"adapter_{number}")(feature)
        return self.get_submodule(f"layer_{number}")(plus_upsampled(lateral, coarser, "bilinear"))

    def _convolve_finer_level(self, number: int, feature: Tensor, coarser: Tensor) -> Tensor:
        lateral = self.get_submodule(f"adapter_{number}")(feature)
        return nn.Conv2d.forward(self.get_submodule(f"layer_{number}"), plus_upsampled(lateral, coarser, "bilinear"))

    def _finish_finer_level(self, number: int, convolved: Tensor) -> tuple[Tensor, Tensor | None]:
        """Norm and activation, and the embeddings of the finest level."""
        layer = self.get_submodule(f"layer_{number}")
        x = layer.activation(convolved if layer.norm is None else layer.norm(convolved))
        return x, self.mask_features(x) if number == 1 else None

    def forward(self, features: dict[str, Tensor]) -> PixelFeatures:
        """See :meth:`forward_features`."""
        return self.forward_features(features)
