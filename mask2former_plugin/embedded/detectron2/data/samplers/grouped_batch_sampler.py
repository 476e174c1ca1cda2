"""Batches of indices from the same group."""

from __future__ import annotations

from collections import defaultdict
from typing import Iterator, Sequence

from torch.utils.data.sampler import BatchSampler, Sampler

__all__ = ["GroupedBatchSampler"]


class GroupedBatchSampler(BatchSampler):
    """Batches whose elements have the same group id, each in the order of the sampler.

    Args:
        sampler: gives indices.
        group_ids: group of each index.
        batch_size: length of each batch; an unfinished batch at the end is not given.
    """

    def __init__(self, sampler: Sampler, group_ids: Sequence[int], batch_size: int):
        if not isinstance(sampler, Sampler):
            raise TypeError(f"sampler must be a torch Sampler, got {type(sampler).__name__}")
        self.sampler = sampler
        self.group_ids = [int(g) for g in group_ids]
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        open_batches: dict[int, list[int]] = defaultdict(list)
        for idx in self.sampler:
            group = self.group_ids[idx]
            open_batches[group].append(idx)
            if len(open_batches[group]) == self.batch_size:
                yield open_batches.pop(group)

    def __len__(self) -> int:
        raise NotImplementedError("The number of batches depends on the order that the sampler will give")
