"""Binary cross-entropy and dice of matched masks at points, in memory that hardly grows with the number of masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mask2former_plugin.modeling.mask_logits import multiply
from mask2former_plugin.modeling.point_sampling import sample_logits
from mask2former_plugin.modeling.target_masks import Masks, decoded, sample_mask

# values of the dense logits, or samples, that exist at once: 8 MB in float32
_VALUES_AT_ONCE = 2**21


@dataclass(frozen=True)
class MatchedMasks:
    """What the matched masks are compared with, and where.

    Attributes:
        pairs: image and target of each of the R masks, ascending.
        points: ``[R, P, 2]``, (x, y) in [0, 1] of the padded size, in any order.
        places: ``[R]`` int64, where in ``points`` the points of each mask are.
        truth: masks of each image.
        padded_size: height and width of the padded images.
    """

    pairs: Sequence[tuple[int, int]]
    points: Tensor
    places: Tensor
    truth: Sequence[Masks]
    padded_size: tuple[int, int]


@dataclass
class _Chunk:
    """Some masks of one image, those of a target next to each other."""

    image: int
    start: int
    stop: int
    targets: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)  # masks of each target


def _chunks(pairs: Sequence[tuple[int, int]], at_once: int) -> Iterator[_Chunk]:
    chunk = None
    for number, (image, target) in enumerate(pairs):
        if chunk is None or image != chunk.image or number - chunk.start == at_once:
            if chunk is not None:
                yield chunk
            chunk = _Chunk(image, number, number)
        if not chunk.targets or chunk.targets[-1] != target:
            chunk.targets.append(target)
            chunk.counts.append(0)
        chunk.counts[-1] += 1
        chunk.stop = number + 1
    if chunk is not None:
        yield chunk


class _PointLosses(torch.autograd.Function):
    """Dense logits of a few masks at a time, multiplied out again in the backward pass; only the inputs are kept."""

    @staticmethod
    def forward(ctx: Any, embed: Tensor, features: Tensor, masks: MatchedMasks) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(embed, features)
        ctx.masks = masks
        cross_entropy, dice = embed.new_empty((2, len(embed)))
        for chunk, _, logits, truth in _samples(embed, features, masks):
            rows = slice(chunk.start, chunk.stop)
            cross_entropy[rows] = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
            probability = logits.sigmoid()
            overlap, total = _overlap_and_total(probability, truth)
            dice[rows] = 1 - (2 * overlap + 1) / (total + 1)
        return cross_entropy, dice

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_cross_entropy: Tensor, grad_dice: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        embed, features = ctx.saved_tensors
        grad_embed = torch.zeros_like(embed)
        grad_table = embed.new_zeros((features.shape[0], features[0, 0].numel(), features.shape[1]))
        for chunk, points, logits, truth in _samples(embed, features, ctx.masks):
            rows = slice(chunk.start, chunk.stop)
            probability = logits.sigmoid()
            overlap, total = _overlap_and_total(probability, truth)
            # d dice / d probability = (2 overlap + 1) / (total + 1)² − 2 truth / (total + 1)
            slope = truth * (-2 / (total + 1))[:, None] + ((2 * overlap + 1) / (total + 1) ** 2)[:, None]
            grad = slope.mul_(grad_dice[rows, None]).mul_(probability * (1 - probability))
            grad.addcmul_(probability - truth, grad_cross_entropy[rows, None] / truth.shape[1])
            dense = _to_pixels(grad, points, features.shape[-2:])
            torch.mm(dense, features[chunk.image].flatten(1).T, out=grad_embed[rows])
            grad_table[chunk.image].addmm_(dense.T, embed[rows])
        return grad_embed, grad_table.transpose(1, 2).unflatten(2, features.shape[-2:]), None


def _samples(
    embed: Tensor, features: Tensor, masks: MatchedMasks
) -> Iterator[tuple[_Chunk, Tensor, Tensor, Tensor]]:
    """Some masks after the other: their points ``[k, P, 2]``, logits and truth there, ``[k, P]``."""
    at_once = max(1, _VALUES_AT_ONCE // max(features[0, 0].numel(), masks.points.shape[1]))
    for chunk in _chunks(masks.pairs, at_once):
        points = masks.points.index_select(0, masks.places[chunk.start : chunk.stop]).to(embed.dtype)
        logits = sample_logits(multiply(embed[chunk.start : chunk.stop], features[chunk.image]), points)
        truth = [
            sample_mask(decoded(masks.truth[chunk.image], slice(target, target + 1))[0], own, masks.padded_size)
            for target, own in zip(chunk.targets, points.split(chunk.counts))
        ]
        yield chunk, points, logits, torch.cat(truth)


def _overlap_and_total(probability: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    return (probability * truth).sum(1), probability.sum(1) + truth.sum(1)


def _to_pixels(grad: Tensor, points: Tensor, size: tuple[int, int]) -> Tensor:
    """The transpose of :func:`sample_logits`: gradients at points ``[k, P]`` to those of the maps, ``[k, h·w]``."""
    maps = grad.new_empty((1,)).expand(len(grad), 1, *size)
    grid = (2 * points - 1).unsqueeze(1)
    bilinear, zeros = 0, 0
    values = grad[:, None, None]
    wanted = (True, False)
    gradient = torch.ops.aten.grid_sampler_2d_backward(values, maps, grid, bilinear, zeros, False, wanted)[0]
    return gradient.flatten(1)


def point_losses(embed: Tensor, features: Tensor, masks: MatchedMasks) -> tuple[Tensor, Tensor]:
    """Mean binary cross-entropy and dice loss of each matched mask at its points, ``[R]`` each.

    Args:
        embed: mask embeddings of the matched masks, ``[R, C]``.
        features: per-pixel embeddings, ``[B, C, H, W]``, fastest channels-last.
        masks: what they are compared with.
    """
    return _PointLosses.apply(embed, features, masks)
