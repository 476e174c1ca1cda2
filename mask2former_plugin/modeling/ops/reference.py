"""Multi-scale deformable attention in plain PyTorch, level by level; the yardstick of the other implementations."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn_reference(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """See :func:`mask2former_plugin.modeling.ops.ms_deform_attn`."""
    dtype = sampling_locations.dtype
    heads = value.shape[2]
    maps = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)  # [B·M, D, S]
    grids = (2 * sampling_locations - 1).transpose(1, 2).flatten(0, 1)  # [B·M, T, L, P, 2]
    weights = attention_weights.to(dtype).transpose(1, 2).flatten(0, 1)  # [B·M, T, L, P]
    # the accumulated level sums, [B·M, D, T]
    output = maps.new_zeros(())
    for level, (size, tokens) in enumerate(zip(spatial_shapes, maps.split([h * w for h, w in spatial_shapes], dim=2))):
        samples = F.grid_sample(
            tokens.unflatten(2, tuple(size)), grids[:, :, level], mode="bilinear", align_corners=False
        )
        output = output + (samples * weights[:, None, :, level]).sum(3)
    return output.unflatten(0, (-1, heads)).flatten(1, 2).transpose(1, 2).to(value.dtype)
