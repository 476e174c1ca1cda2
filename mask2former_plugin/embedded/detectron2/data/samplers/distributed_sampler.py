"""Samplers for one or many processes: endless for training, each element once for inference."""

from __future__ import annotations

import itertools
import logging
import math
from collections import defaultdict
from typing import Iterator

import torch
from torch.utils.data.sampler import Sampler

from detectron2.utils import comm

__all__ = ["TrainingSampler", "RandomSubsetTrainingSampler", "InferenceSampler", "RepeatFactorTrainingSampler"]

logger = logging.getLogger(__name__)


def _check_size(size: int) -> int:
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"size must be an int, got {type(size).__name__}")
    if size <= 0:
        raise ValueError(f"size must be positive, got {size}: is the dataset empty?")
    return size


def _agree_on_seed(seed: int | None) -> int:
    """The given seed, or a random one that all processes share if it is None or negative (``cfg.SEED`` by default)."""
    return comm.shared_random_seed() if seed is None or seed < 0 else int(seed)


class TrainingSampler(Sampler):
    """An endless stream of indices: one random order of the dataset after the other.

    All processes draw the same stream, and the process of rank ``r`` among ``n`` takes every ``n``-th index from the
    ``r``-th on.

    Args:
        size: number of elements.
        shuffle: random orders, or 0, 1, 2, … again and again.
        seed: of the random orders. None or a negative number (as ``cfg.SEED`` is by default) means a new random seed,
            the same on all processes.
    """

    def __init__(self, size: int, shuffle: bool = True, seed: int | None = None):
        self._size = _check_size(size)
        self._shuffle = shuffle
        self._seed = _agree_on_seed(seed)
        self._rank = comm.get_rank()
        self._world_size = comm.get_world_size()

    def __iter__(self) -> Iterator[int]:
        yield from itertools.islice(self._endless(), self._rank, None, self._world_size)

    def _endless(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            yield from self._one_pass(generator)

    def _one_pass(self, generator: torch.Generator) -> list[int]:
        if self._shuffle:
            return torch.randperm(self._size, generator=generator).tolist()
        return list(range(self._size))


class RandomSubsetTrainingSampler(TrainingSampler):
    """Like TrainingSampler, over a random subset that is chosen once.

    Args:
        size: number of elements of the whole dataset.
        subset_ratio: share of the elements to use, in (0, 1].
        shuffle: random orders of the subset.
        seed_shuffle: seed of the orders.
        seed_subset: seed of the choice. For both, None or negative means random and shared.
    """

    def __init__(
        self,
        size: int,
        subset_ratio: float,
        shuffle: bool = True,
        seed_shuffle: int | None = None,
        seed_subset: int | None = None,
    ):
        if not 0 < subset_ratio <= 1:
            raise ValueError(f"subset_ratio must lie in (0, 1], got {subset_ratio}")
        super().__init__(size, shuffle, seed_shuffle)
        self._size_subset = int(size * subset_ratio)
        if self._size_subset == 0:
            raise ValueError(f"subset_ratio {subset_ratio} of {size} elements leaves none")
        generator = torch.Generator().manual_seed(_agree_on_seed(seed_subset))
        self._indices_subset = torch.randperm(size, generator=generator)[: self._size_subset]
        logger.info("Training on a random subset of %d of %d elements", self._size_subset, size)

    def _one_pass(self, generator: torch.Generator) -> list[int]:
        if self._shuffle:
            order = torch.randperm(self._size_subset, generator=generator)
            return self._indices_subset[order].tolist()
        return self._indices_subset.tolist()


class RepeatFactorTrainingSampler(TrainingSampler):
    """Like TrainingSampler, but each element comes as many times per pass as its repeat factor says, on average.

    Source: Gupta et al., LVIS (https://arxiv.org/abs/1908.03195), appendix B.2.

    Args:
        repeat_factors: float tensor of shape (N,); the fraction is rounded up or down at random, anew in each pass.
        shuffle: random order in each pass.
        seed: None or negative means random and shared.
    """

    def __init__(self, repeat_factors: torch.Tensor, *, shuffle: bool = True, seed: int | None = None):
        super().__init__(len(repeat_factors), shuffle, seed)
        self._int_part = torch.trunc(repeat_factors)
        self._frac_part = repeat_factors - self._int_part

    @staticmethod
    def repeat_factors_from_category_frequency(
        dataset_dicts: list[dict], repeat_thresh: float, sqrt: bool = True
    ) -> torch.Tensor:
        """Repeat factor of each image: that of its rarest category ``c``, ``max(1, sqrt(repeat_thresh / f(c)))``.

        Args:
            dataset_dicts: with ``annotations`` that have ``category_id``.
            repeat_thresh: categories in a smaller share ``f(c)`` of the images are repeated.
            sqrt: take the square root of the ratio.

        Returns:
            float tensor of shape (len(dataset_dicts),); 1 for images without annotations.
        """
        categories = [{a["category_id"] for a in d["annotations"]} for d in dataset_dicts]
        images_with: dict[int, int] = defaultdict(int)
        for category in itertools.chain.from_iterable(categories):
            images_with[category] += 1

        def factor(category: int) -> float:
            ratio = repeat_thresh * len(dataset_dicts) / images_with[category]
            return max(1.0, math.sqrt(ratio) if sqrt else ratio)

        factors = {category: factor(category) for category in images_with}
        return torch.tensor([max((factors[c] for c in cs), default=1.0) for cs in categories], dtype=torch.float32)

    def _one_pass(self, generator: torch.Generator) -> list[int]:
        round_up = torch.rand(len(self._frac_part), generator=generator) < self._frac_part
        repeats = (self._int_part + round_up).long()
        indices = torch.repeat_interleave(torch.arange(len(repeats)), repeats)
        if self._shuffle:
            indices = indices[torch.randperm(len(indices), generator=generator)]
        return indices.tolist()


class InferenceSampler(Sampler):
    """Each index exactly once, in order: process ``r`` gets the ``r``-th contiguous part.

    Args:
        size: number of elements of the dataset, over all processes. The first ``size % world_size`` processes get one
            more.
    """

    def __init__(self, size: int):
        self._size = _check_size(size)
        self._local_indices = self._get_local_indices(size, comm.get_world_size(), comm.get_rank())

    @staticmethod
    def _get_local_indices(total_size: int, world_size: int, rank: int) -> range:
        share, rest = divmod(total_size, world_size)
        start = rank * share + min(rank, rest)
        return range(start, start + share + (rank < rest))

    def __iter__(self) -> Iterator[int]:
        yield from self._local_indices

    def __len__(self) -> int:
        return len(self._local_indices)
