"""Focal and dice losses of matched masks on all pixels, in memory that hardly grows with the number of masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mask2former_plugin.modeling.layers.linear import linear
from mask2former_plugin.modeling.matched_masks import MatchedMasks, Product

FOCAL_ALPHA = 0.25  # weight of the pixels inside of a mask; those outside weigh 1 - FOCAL_ALPHA
# values of the logits at the size of the features that exist at once: 8 MB in float32
_VALUES_AT_ONCE = 2**21
# values at full size that are worked on together; on a CPU its cache holds a few times as many
_VALUES_IN_CACHE, _VALUES_ON_DEVICE = 2**18, 2**24


class _Upsampling:
    """Bilinear upsampling, ``align_corners=False``, as two matrix products, strip by strip, and its transpose.

    Args:
        size: height and width of the maps.
        full_size: height and width that they get.
        like: a tensor of their device and dtype.
    """

    def __init__(self, size: tuple[int, int], full_size: tuple[int, int], like: Tensor) -> None:
        self.full_size = full_size
        # interpolate itself tells its weights, of each source pixel
        vertical, horizontal = (
            F.interpolate(torch.eye(length, dtype=like.dtype)[None], size=full, mode="linear", align_corners=False)[0]
            for length, full in zip(size, full_size)
        )
        self._vertical = vertical.T.contiguous()
        self._device = like.device
        self._wider, self._narrower = horizontal.T.contiguous().to(like.device), horizontal.to(like.device)
        self._strips: dict[int, list[tuple[slice, slice, Tensor]]] = {}

    def strips(self, rows: int) -> list[tuple[slice, slice, Tensor]]:
        """Rows of the full size, the rows of the maps that they are made of, and the weights of these."""
        if rows not in self._strips:
            self._strips[rows] = self._find_strips(rows)
        return self._strips[rows]

    def _find_strips(self, rows: int) -> list[tuple[slice, slice, Tensor]]:
        found = []
        for start in range(0, self.full_size[0], rows):
            weights = self._vertical[start : start + rows]
            used = weights.any(0).nonzero()
            source = slice(int(used[0]), int(used[-1]) + 1)
            found.append((slice(start, start + len(weights)), source, weights[:, source].to(self._device)))
        return found

    def widen(self, maps: Tensor) -> Tensor:
        """``[k, h, w]`` to ``[k, h, W]``."""
        return linear(maps, self._wider)

    def narrow(self, gradient: Tensor) -> Tensor:
        """The transpose of :meth:`widen`."""
        return linear(gradient, self._narrower)


class _Pixels:
    """Pixels of one strip of the masks of one target.

    With s = −logit inside and logit outside of the target, σ(s) is the probability of being wrong, and the focal loss
    of a pixel is its weight · log(1 + exp(s)) · σ(s)².

    Attributes:
        truth: ``[P]``, 1 inside.
        wrong: σ(s), ``[k, P]``.
        cross_entropy: log(1 + exp(s)), ``[k, P]``.
    """

    def __init__(self, logits: Tensor, truth: Tensor) -> None:
        self.truth = truth
        signed = logits.mul_(1 - 2 * truth)
        self.wrong = signed.sigmoid()
        self.cross_entropy = F.softplus(signed)

    def sums(self) -> Tensor:
        """Focal loss, overlap of probability and truth, and the areas of both, ``[4, k]``."""
        focal = self.cross_entropy.mul_(self.wrong).mul_(self.wrong)
        focal = (1 - FOCAL_ALPHA) * focal.sum(1) - (1 - 2 * FOCAL_ALPHA) * (focal @ self.truth)
        area = self.truth.sum()
        missed = self.wrong @ self.truth
        # what is probable: the errors outside, and inside what is not missed
        probable = self.wrong.sum(1) - 2 * missed + area
        return torch.stack((focal, area - missed, probable, area.expand_as(focal)))

    def gradient(self, focal: Tensor, overlap: Tensor, total: Tensor) -> Tensor:
        """By the logits, ``[k, P]``, given those by the focal loss, the overlap and the sum of the areas, ``[k]``."""
        right = 1 - self.wrong
        # the focal loss by s: weight · σ(s)² · (σ(s) + 2 · log(1 + exp(s)) · (1 − σ(s))); by the logit: with its sign
        gradient = torch.add(self.wrong, self.cross_entropy.mul_(right), alpha=2).mul_(self.wrong)
        gradient.mul_((1 - FOCAL_ALPHA) - self.truth).mul_(focal[:, None])
        gradient.addcmul_(right, total[:, None]).addcmul_(right.mul_(self.truth), overlap[:, None])
        return gradient.mul_(self.wrong)


class _DenseLosses(torch.autograd.Function):
    """Full-size maps of a few rows of a few masks at a time, made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, embed: Tensor, features: Tensor, masks: MatchedMasks) -> tuple[Tensor, Tensor]:
        ctx.masks = masks
        product, upsampling = Product(embed, features), _Upsampling(features.shape[-2:], masks.padded_size, features)
        sums = embed.new_zeros((4, len(embed)))
        for chunk in masks.chunks(_at_once(features)):
            logits, found = product.logits(chunk), sums[:, chunk.rows]
            for target, own in chunk.of_targets():
                truth, wide = masks.target(chunk.image, target), upsampling.widen(logits[own])
                for pixels, _, _ in _strips(upsampling, wide, truth):
                    found[:, own] += pixels.sums()
        focal, overlap, probable, area = sums
        total = probable + area + 1
        ctx.save_for_backward(embed, features, overlap, total)
        return focal / (masks.padded_size[0] * masks.padded_size[1]), 1 - (2 * overlap + 1) / total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_focal: Tensor, grad_dice: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        embed, features, overlap, total = ctx.saved_tensors
        masks: MatchedMasks = ctx.masks
        with torch.autocast(embed.device.type, enabled=False):  # a caller's own may still be on
            slopes = torch.stack(
                (
                    grad_focal / (masks.padded_size[0] * masks.padded_size[1]),
                    grad_dice * (-2 / total),
                    grad_dice * (2 * overlap + 1) / total**2,
                )
            )
            upsampling = _Upsampling(features.shape[-2:], masks.padded_size, features)
            product = Product(embed, features)
            product.start_gradients()
            for chunk in masks.chunks(_at_once(features)):
                logits, found = product.logits(chunk), slopes[:, chunk.rows]
                for target, own in chunk.of_targets():
                    truth, wide = masks.target(chunk.image, target), upsampling.widen(logits[own])
                    gradient = torch.zeros_like(wide)
                    for pixels, source, weights in _strips(upsampling, wide, truth):
                        strip = pixels.gradient(*found[:, own]).unflatten(1, (len(weights), -1))
                        gradient[:, source] += weights.T @ strip
                    logits[own] = upsampling.narrow(gradient)
                product.add_gradient(chunk, logits.flatten(1))
        return *product.gradients(), None


def _at_once(features: Tensor) -> int:
    return max(1, _VALUES_AT_ONCE // features[0, 0].numel())


def _strips(upsampling: _Upsampling, wide: Tensor, truth: Tensor) -> Iterator[tuple[_Pixels, slice, Tensor]]:
    """Pixels of one strip after the other, with the rows of the maps that it is made of and their weights.

    Args:
        wide: logits of the masks of one target, ``[k, h, W]``.
        truth: the target, uint8, not padded.
    """
    at_once = _VALUES_IN_CACHE if wide.device.type == "cpu" else _VALUES_ON_DEVICE
    masks, _, width = wide.shape
    for rows, source, weights in upsampling.strips(max(1, at_once // (masks * width))):
        inside = wide.new_zeros((len(weights), width))
        own = truth[rows]
        inside[: own.shape[0], : own.shape[1]] = own
        logits = weights @ wide[:, source]
        yield _Pixels(logits.flatten(1), inside.flatten()), source, weights


def dense_losses(embed: Tensor, features: Tensor, masks: MatchedMasks) -> tuple[Tensor, Tensor]:
    """Focal loss, mean over the pixels of the padded image, and dice loss of each matched mask, ``[R]`` each.

    Args:
        embed: mask embeddings of the matched masks, ``[R, C]``.
        features: per-pixel embeddings, ``[B, C, H, W]``, fastest channels-last.
        masks: what they are compared with.
    """
    return _DenseLosses.apply(embed, features, masks)
