"""Matched masks of many predictions as products that are made, and differentiated, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mask2former_plugin.modeling.layers.products import product
from mask2former_plugin.modeling.mask_logits import multiply
from mask2former_plugin.modeling.target_masks import Masks, decoded


@dataclass(frozen=True)
class MatchedMasks:
    """What the matched masks are compared with.

    Attributes:
        pairs: image and target of each of the R masks, ascending.
        truth: masks of each image.
        padded_size: height and width of the padded images.
    """

    pairs: Sequence[tuple[int, int]]
    truth: Sequence[Masks]
    padded_size: tuple[int, int]

    def chunks(self, at_once: int) -> Iterator[Chunk]:
        """All masks, at most so many at once, those of a chunk from one image."""
        chunk = None
        for number, (image, target) in enumerate(self.pairs):
            if chunk is None or image != chunk.image or number - chunk.start == at_once:
                if chunk is not None:
                    yield chunk
                chunk = Chunk(image, number, number)
            if not chunk.targets or chunk.targets[-1] != target:
                chunk.targets.append(target)
                chunk.counts.append(0)
            chunk.counts[-1] += 1
            chunk.stop = number + 1
        if chunk is not None:
            yield chunk

    def target(self, image: int, number: int) -> Tensor:
        """One target as uint8 of 0 and 1, ``[h, w]``, not padded."""
        return decoded(self.truth[image], slice(number, number + 1))[0]


@dataclass
class Chunk:
    """Some masks of one image, those of a target next to each other.

    Attributes:
        image: of which image.
        start: the first of the masks.
        stop: the first behind them.
        targets: the targets that they are matched with.
        counts: how many masks each of these targets has.
    """

    image: int
    start: int
    stop: int
    targets: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    @property
    def rows(self) -> slice:
        """The masks among all."""
        return slice(self.start, self.stop)

    def of_targets(self) -> Iterator[tuple[int, slice]]:
        """Each target with its masks among those of the chunk."""
        start = 0
        for target, count in zip(self.targets, self.counts):
            yield target, slice(start, start + count)
            start += count


class Product:
    """Dense logits of chunks of masks, and the gradients of their factors.

    Args:
        embed: mask embeddings of the matched masks, ``[R, C]``.
        features: per-pixel embeddings, ``[B, C, H, W]``, fastest channels-last.
    """

    def __init__(self, embed: Tensor, features: Tensor) -> None:
        self.embed, self.features = embed, features

    def logits(self, chunk: Chunk) -> Tensor:
        """``[k, H, W]``."""
        return multiply(self.embed[chunk.rows], self.features[chunk.image])

    def start_gradients(self) -> None:
        """Zeros, to which :meth:`add_gradient` adds."""
        features = self.features
        self._grad_embed = torch.zeros_like(self.embed)
        self._grad_table = features.new_zeros((features.shape[0], features[0, 0].numel(), features.shape[1]))

    def add_gradient(self, chunk: Chunk, gradient: Tensor) -> None:
        """Takes the gradient of the logits of a chunk, ``[k, H·W]``."""
        self._grad_embed[chunk.rows] = product(gradient, self.features[chunk.image].flatten(1).T)
        self._grad_table[chunk.image].addmm_(gradient.T, self.embed[chunk.rows])

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of the embeddings and of the features."""
        return self._grad_embed, self._grad_table.transpose(1, 2).unflatten(2, self.features.shape[-2:])
