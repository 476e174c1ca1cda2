"""Datasets as wrappers: list in one byte tensor, mapped, sampled stream, grouped by aspect ratio."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
import random
from typing import Any, Callable, Iterable, Iterator

import numpy as np
import torch
from torch.utils import data as torchdata

from detectron2.utils.serialize import PicklableWrapper

__all__ = ["MapDataset", "DatasetFromList", "AspectRatioGroupedDataset", "ToIterableDataset"]

logger = logging.getLogger(__name__)


def _worker_share(items: Iterable, chunk_size: int) -> Iterator:
    """The items that belong to this DataLoader worker: chunk ``k`` goes to worker ``k % num_workers``.

    With chunks of the batch size, the loader (which asks its workers in turn) gives the batches of a single process.
    """
    worker = torchdata.get_worker_info()
    if worker is None or worker.num_workers == 1:
        return iter(items)
    return (x for i, x in enumerate(items) if i // chunk_size % worker.num_workers == worker.id)


class _MapIterableDataset(torchdata.IterableDataset):
    """A stream with a function applied; results that are None are left out."""

    def __init__(self, dataset: Iterable, map_func: Callable):
        self._dataset = dataset
        self._map_func = PicklableWrapper(map_func)

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator:
        for x in map(self._map_func, self._dataset):
            if x is not None:
                yield x


class MapDataset(torchdata.Dataset):
    """A dataset with a function applied to each element.

    Args:
        dataset: map-style or iterable dataset. For an iterable one, the constructor returns an iterable dataset.
        map_func: the function. If it returns None (bad sample), another element takes the place of this one, chosen at
            random with a fixed seed; in an iterable dataset the element is skipped.
    """

    def __new__(cls, dataset, map_func):
        if isinstance(dataset, torchdata.IterableDataset):
            return _MapIterableDataset(dataset, map_func)
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple:
        return self._dataset, self._map_func

    def __init__(self, dataset, map_func: Callable):
        self._dataset = dataset
        self._map_func = PicklableWrapper(map_func)
        self._rng = random.Random(42)
        self._good = set(range(len(dataset)))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, idx: int) -> Any:
        """Raises RuntimeError if the function returned None for every element."""
        current = int(idx)
        failures = 0
        while True:
            result = self._map_func(self._dataset[current])
            if result is not None:
                self._good.add(current)
                return result
            failures += 1
            self._good.discard(current)
            if not self._good:
                raise RuntimeError(f"No element of the dataset ({len(self)}) can be used: the mapper gave None for all")
            if failures >= 3:
                logger.warning("The mapper gave None for %d elements in a row, starting with index %d", failures, idx)
            current = self._rng.choice(sorted(self._good))


class _TorchSerializedList:
    """Elements of a list, each pickled, one behind the other in a byte tensor.

    A tensor is one block of memory that worker processes share; a list of Python objects is copied by their reference
    counts.
    """

    def __init__(self, lst: list):
        parts = [np.frombuffer(pickle.dumps(x, protocol=-1), dtype=np.uint8) for x in lst]
        self._ends = torch.from_numpy(np.cumsum([len(p) for p in parts], dtype=np.int64))
        self._bytes = torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.uint8)
        logger.info("Serialized %d elements into %.2f MiB", len(lst), len(self._bytes) / 1024**2)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, idx: int) -> Any:
        if idx < 0:
            idx += len(self)
        if not 0 <= idx < len(self):
            raise IndexError(f"index out of range for a dataset of {len(self)} elements")
        start = int(self._ends[idx - 1]) if idx else 0
        return pickle.loads(memoryview(self._bytes[start : int(self._ends[idx])].numpy()))


_serialize_method: Callable[[list], Any] = _TorchSerializedList


@contextlib.contextmanager
def set_default_dataset_from_list_serialize_method(new: Callable[[list], Any]) -> Iterator[None]:
    """Within this context, ``DatasetFromList(lst, serialize=True)`` stores ``new(lst)``."""
    global _serialize_method
    old, _serialize_method = _serialize_method, new
    try:
        yield
    finally:
        _serialize_method = old


class DatasetFromList(torchdata.Dataset):
    """A list as a torch Dataset.

    Args:
        lst: the elements.
        copy: give a deep copy of the element each time (only matters without serialization).
        serialize: keep the elements pickled in one byte tensor that worker processes share. Or a function that takes
            the list and returns a sequence to keep instead.
    """

    def __init__(self, lst: list, copy: bool = True, serialize: bool | Callable[[list], Any] = True):
        if not isinstance(serialize, bool) and not callable(serialize):
            raise TypeError(f"serialize must be a bool or a function, got {serialize!r}")
        self._serialized = serialize is not False
        self._copy = copy
        method = _serialize_method if serialize is True else serialize
        self._lst = method(lst) if self._serialized else lst

    def __len__(self) -> int:
        return len(self._lst)

    def __getitem__(self, idx: int) -> Any:
        element = self._lst[idx]
        # unpickling makes a fresh object already
        return copy.deepcopy(element) if self._copy and not self._serialized else element


class ToIterableDataset(torchdata.IterableDataset):
    """The elements of a map-style dataset in the order of a sampler, as a stream.

    Args:
        dataset: map-style dataset.
        sampler: iterable of indices.
        shard_sampler: split the indices over the DataLoader's workers. Without it each worker gives all of them.
        shard_chunk_size: how many consecutive indices a worker takes at a time; the batch size keeps batches as they
            are with one process.
    """

    def __init__(
        self,
        dataset: torchdata.Dataset,
        sampler: Iterable[int],
        shard_sampler: bool = True,
        shard_chunk_size: int = 1,
    ):
        if isinstance(dataset, torchdata.IterableDataset):
            raise TypeError("dataset is an iterable dataset already; ToIterableDataset takes a map-style one")
        if not isinstance(sampler, Iterable):
            raise TypeError(f"sampler must give indices when iterated, got {type(sampler).__name__}")
        self.dataset = dataset
        self.sampler = sampler
        self.shard_sampler = shard_sampler
        self.shard_chunk_size = shard_chunk_size

    def __iter__(self) -> Iterator:
        indices = _worker_share(self.sampler, self.shard_chunk_size) if self.shard_sampler else self.sampler
        for idx in indices:
            yield self.dataset[idx]

    def __len__(self) -> int:
        return len(self.sampler)


class AspectRatioGroupedDataset(torchdata.IterableDataset):
    """Batches in which all images are wide, or none is, so that they need little padding.

    Args:
        dataset: iterable of dicts with ``width`` and ``height``.
        batch_size: length of the lists that this dataset gives. Elements that don't fill a batch wait for the next
            pass.
    """

    def __init__(self, dataset: Iterable[dict], batch_size: int):
        self.dataset = dataset
        self.batch_size = batch_size
        self._buckets: tuple[list, list] = ([], [])

    def __iter__(self) -> Iterator[list[dict]]:
        for element in self.dataset:
            bucket = self._buckets[0 if element["width"] > element["height"] else 1]
            bucket.append(element)
            if len(bucket) == self.batch_size:
                batch = list(bucket)
                # empty before yielding: a caller that stops here must not leave a full bucket behind
                bucket.clear()
                yield batch
