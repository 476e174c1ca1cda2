"""Binary cross-entropy and dice of matched masks at points, in memory that hardly grows with the number of masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mask2former_plugin.modeling.matched_masks import Chunk, MatchedMasks, Product
from mask2former_plugin.modeling.point_sampling import sample_logits
from mask2former_plugin.modeling.target_masks import sample_mask

# values of the dense logits, or samples, that exist at once: 8 MB in float32
_VALUES_AT_ONCE = 2**21
_VALUES_OF_POINT = 4  # its place, logit and truth


class _PointLosses(torch.autograd.Function):
    """Dense logits of a few masks at a time, multiplied out again in the backward pass; only the inputs are kept."""

    @staticmethod
    def forward(
        ctx: Any, embed: Tensor, features: Tensor, masks: MatchedMasks, points: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(embed, features)
        ctx.masks, ctx.points = masks, points
        cross_entropy, dice = embed.new_empty((2, len(embed)))
        for chunk, _, logits, truth in _samples(Product(embed, features), masks, points):
            cross_entropy[chunk.rows] = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
            probability = logits.sigmoid()
            overlap, total = _overlap_and_total(probability, truth)
            dice[chunk.rows] = 1 - (2 * overlap + 1) / (total + 1)
        return cross_entropy, dice

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_cross_entropy: Tensor, grad_dice: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        embed, features = ctx.saved_tensors
        with torch.autocast(embed.device.type, enabled=False):  # a caller's own may still be on
            product = Product(embed, features)
            product.start_gradients()
            for chunk, points, logits, truth in _samples(product, ctx.masks, ctx.points):
                rows = chunk.rows
                probability = logits.sigmoid()
                overlap, total = _overlap_and_total(probability, truth)
                # d dice / d probability = (2 overlap + 1) / (total + 1)² − 2 truth / (total + 1)
                slope = truth * (-2 / (total + 1))[:, None] + ((2 * overlap + 1) / (total + 1) ** 2)[:, None]
                grad = slope.mul_(grad_dice[rows, None]).mul_(probability * (1 - probability))
                grad.addcmul_(probability - truth, grad_cross_entropy[rows, None] / truth.shape[1])
                product.add_gradient(chunk, _to_pixels(grad, points, product.features.shape[-2:]))
        return *product.gradients(), None, None


def _samples(
    product: Product, masks: MatchedMasks, points: Sequence[Tensor]
) -> Iterator[tuple[Chunk, Tensor, Tensor, Tensor]]:
    """Some masks after the other: their points ``[k, P, 2]``, logits and truth there, ``[k, P]``."""
    values = max([product.features[0, 0].numel(), *(_VALUES_OF_POINT * len(some) for some in points[:1])])
    for chunk in masks.chunks(max(1, _VALUES_AT_ONCE // values)):
        places = torch.stack(points[chunk.rows]).to(product.embed.dtype)
        logits = sample_logits(product.logits(chunk), places)
        truth = [
            sample_mask(masks.target(chunk.image, target), places[own], masks.padded_size)
            for target, own in chunk.of_targets()
        ]
        yield chunk, places, logits, torch.cat(truth)


def _overlap_and_total(probability: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    return (probability * truth).sum(1), probability.sum(1) + truth.sum(1)


def _to_pixels(grad: Tensor, points: Tensor, size: tuple[int, int]) -> Tensor:
    """The transpose of :func:`sample_logits`: gradients at points ``[k, P]`` to those of the maps, ``[k, h·w]``."""
    maps = grad.new_empty((1,)).expand(len(grad), 1, *size)
    grid = (2 * points).sub_(1).unsqueeze(1)
    bilinear, zeros = 0, 0
    values = grad[:, None, None]
    wanted = (True, False)
    gradient = torch.ops.aten.grid_sampler_2d_backward(values, maps, grid, bilinear, zeros, False, wanted)[0]
    return gradient.flatten(1)


def point_losses(
    embed: Tensor, features: Tensor, masks: MatchedMasks, points: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean binary cross-entropy and dice loss of each matched mask at its points, ``[R]`` each.

    Args:
        embed: mask embeddings of the matched masks, ``[R, C]``.
        features: per-pixel embeddings, ``[B, C, H, W]``, fastest channels-last.
        masks: what they are compared with.
        points: where, (x, y) in [0, 1] of the padded size, ``[P, 2]`` for each of the R masks.
    """
    return _PointLosses.apply(embed, features, masks, points)
