"""Mask logits kept as the product they are, so that nobody computes a pixel that nobody reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former_plugin.modeling.layers.products import product
from mask2former_plugin.modeling.point_sampling import sample_features


@dataclass(frozen=True, eq=False)
class MaskLogits:
    """The two factors of the mask logits ``embed[b, q, :] · features[b, :, y, x]`` (Mask2Former, section 3.1).

    Resizing and point sampling are linear in the features, hence they commute with the product: each method below
    equals the same operation on :meth:`dense`, up to rounding.

    Attributes:
        embed: mask embeddings, ``[B, Q, C]``.
        features: per-pixel embeddings, ``[B, C, H, W]``, usually at stride 4.
    """

    embed: Tensor
    features: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the dense logits."""
        return self.features.shape[-2], self.features.shape[-1]

    def dense(self) -> Tensor:
        """All logits, ``[B, Q, H, W]``."""
        return (self.embed @ self.features.flatten(2)).unflatten(2, self.size)

    def resize(self, size: tuple[int, int]) -> Tensor:
        """Logits at another size, ``[B, Q, h, w]``; bilinear, ``align_corners=False``."""
        return self.with_size(size).dense()

    def with_size(self, size: tuple[int, int]) -> MaskLogits:
        """The same factors with the features resized to ``size``; bilinear, ``align_corners=False``."""
        if tuple(size) == self.size:
            return self
        return MaskLogits(self.embed, F.interpolate(self.features, size=size, mode="bilinear", align_corners=False))

    def at(self, points: Tensor) -> Tensor:
        """Logits at points, ``[B, Q, P]``.

        Args:
            points: ``[B, P, 2]``, (x, y) in [0, 1] of the image; bilinear with zeros outside, ``align_corners=False``.
                The features are sampled in at least float32, because half precision cannot tell neighbouring pixels of
                a large map apart.
        """
        features = self.features.to(torch.promote_types(self.features.dtype, torch.float32))
        logits = [e.to(f.dtype) @ sample_features(f, p).T for e, f, p in zip(self.embed, features, points)]
        return torch.stack(logits)

    def select(self, batch: Tensor, query: Tensor) -> Tensor:
        """Dense logits of N chosen (image, query) pairs, ``[N, H, W]``, in the order given.

        Args:
            batch: ``[N]`` image indices; ascending order saves a copy, indices on the CPU save a wait for the device.
            query: ``[N]`` query indices.
        """
        if batch.numel() == 0:
            # an empty result that stays on the graph: every parameter still gets a (zero) gradient without targets
            return (self.embed.sum() + self.features.sum()) * self.embed.new_zeros((0, *self.size))
        images = batch.tolist()
        order = sorted(range(len(images)), key=images.__getitem__)
        rearranged = order != list(range(len(images)))
        rows = self.embed[batch, query]
        if rearranged:
            rows = rows[order]
        dense = multiply_out(rows, [images.count(image) for image in range(self.embed.shape[0])], self.features)
        if rearranged:
            dense = dense[sorted(range(len(order)), key=order.__getitem__)]
        return dense


def multiply_out(rows: Tensor, counts: Sequence[int], features: Tensor) -> Tensor:
    """Dense logits ``[N, H, W]`` of mask embeddings ``[N, C]``, ``counts[0]`` of the first image and so on."""
    if not len(rows):
        return rows.new_zeros((0, *features.shape[-2:]))
    parts = [multiply(r, f) for r, f in zip(rows.split(counts), features) if r.shape[0]]
    return torch.cat(parts)


def multiply(rows: Tensor, features: Tensor) -> Tensor:
    """Embeddings ``[N, C]`` times the features of one image ``[C, H, W]``: ``[N, H, W]``."""
    return product(rows, features.flatten(1)).unflatten(1, features.shape[-2:])


class MaskPrediction(dict):
    """What a decoder predicts: ``pred_logits`` ``[B, Q, K+1]``, ``mask_logits``, and ``aux_outputs``, a list of them.

    ``prediction["pred_masks"]`` gives the dense ``[B, Q, H, W]`` logits of the published interface; they are computed
    when asked for.
    """

    def __missing__(self, key: str) -> Tensor:
        if key == "pred_masks" and "mask_logits" in self:
            self[key] = self["mask_logits"].dense()
            return self[key]
        raise KeyError(key)


def mask_logits_of(prediction: Mapping) -> MaskLogits:
    """The mask logits of a prediction; dense ``pred_masks`` become the factors identity · masks."""
    if "mask_logits" in prediction:
        return prediction["mask_logits"]
    masks = prediction["pred_masks"]
    identity = torch.eye(masks.shape[1], dtype=masks.dtype, device=masks.device)
    return MaskLogits(identity.expand(masks.shape[0], -1, -1), masks)
