"""Multi-scale deformable self-attention (Deformable DETR, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mask2former_plugin.modeling.layers.linear import Linear, is_plain_linear, linear
from mask2former_plugin.modeling.ops import ms_deform_attn_from_logits
from mask2former_plugin.modeling.ops.sampling import traced


def reference_points(spatial_shapes: Sequence[tuple[int, int]], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Centres of all pixels of all levels, (x, y) in (0, 1), ``[S, 2]``, level after level, row by row."""
    levels = []
    for height, width in spatial_shapes:
        y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
        levels.append(torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), dim=2).flatten(0, 1))
    return torch.cat(levels)


class MSDeformAttn(nn.Module):
    """Each token samples a few points of every level around its own place and sums them with learned weights."""

    def __init__(self, embed_dim: int, num_levels: int, num_heads: int, num_points: int) -> None:
        """
        Args:
            embed_dim: channels of the tokens.
            num_levels: number of feature maps.
            num_heads: number of heads; must divide ``embed_dim``.
            num_points: sampling points per head and level.

        Raises:
            ValueError: ``num_heads`` does not divide ``embed_dim``.
        """
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"the attention width {embed_dim} must be a multiple of the number of heads {num_heads}")
        self.num_levels = num_levels
        self.num_heads = num_heads
        self.num_points = num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = Linear(embed_dim, samples * 2)
        self.attention_weights = Linear(embed_dim, samples)
        self.value_proj = Linear(embed_dim, embed_dim)
        self.output_proj = Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """At the start head h looks into direction 2πh/heads, point p lies p + 1 pixels away, all weights are equal."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=1)
        directions = directions / directions.abs().amax(dim=1, keepdim=True)
        distances = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = directions[:, None, None, :] * distances[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())

    def forward(
        self, query: Tensor, value: Tensor, spatial_shapes: Sequence[tuple[int, int]], points: Tensor
    ) -> Tensor:
        """
        Args:
            query: ``[B, T, C]``.
            value: ``[B, S, C]``, the tokens of all levels.
            spatial_shapes: (height, width) of each level, Python integers.
            points: ``[T, 2]``, place of each query, (x, y) in [0, 1], at least float32: half precision cannot tell
                neighbouring pixels of a large map apart.

        Returns:
            ``[B, T, C]``.
        """
        return self.output_proj(self.attend(query, value, spatial_shapes, points))

    def attend(
        self, query: Tensor, value: Tensor, spatial_shapes: Sequence[tuple[int, int]], points: Tensor
    ) -> Tensor:
        """The heads' results side by side, ``[B, T, C]``: what :meth:`forward` gives before the output projection."""
        samples = (self.num_heads, self.num_levels, self.num_points)
        values = self.value_proj(value).unflatten(2, (self.num_heads, -1))
        offsets, logits = self._predict(query, samples)
        return ms_deform_attn_from_logits(values, spatial_shapes, points, offsets, logits)

    def _predict(self, query: Tensor, samples: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Offsets ``[B, T, M, L, P, 2]`` and logits ``[B, T, M, L, P]``, of one product if the layers are plain."""
        both = (self.sampling_offsets, self.attention_weights)
        if not all(map(is_plain_linear, both)):
            offsets, logits = (layer(query) for layer in both)
            return offsets.unflatten(2, (*samples, 2)), logits.unflatten(2, samples)
        weights, biases = [x.weight for x in both], [x.bias for x in both]
        planes = query.device.type == "cpu" and not traced()
        if planes:  # x and y of all samples one after the other instead of in turns: they are copied at once
            weights[0] = weights[0].unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
            biases[0] = biases[0].unflatten(0, (-1, 2)).t().flatten()
        predicted = linear(query, torch.cat(weights), torch.cat(biases))
        offsets, logits = predicted.split([x.out_features for x in both], dim=2)
        offsets = offsets.unflatten(2, (2, *samples)).movedim(2, -1) if planes else offsets.unflatten(2, (*samples, 2))
        return offsets, logits.unflatten(2, samples)
