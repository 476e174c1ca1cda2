"""From names of datasets to data loaders."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, Callable, Sequence

import torch
import torch.utils.data as torchdata
from tabulate import tabulate

from detectron2.config import configurable
from detectron2.data.catalog import DatasetCatalog, MetadataCatalog
from detectron2.data.common import AspectRatioGroupedDataset, DatasetFromList, MapDataset, ToIterableDataset
from detectron2.data.dataset_mapper import DatasetMapper
from detectron2.data.detection_utils import check_metadata_consistency
from detectron2.data.samplers import (
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.missing import needs_upstream

__all__ = [
    "build_batch_data_loader",
    "build_detection_test_loader",
    "build_detection_train_loader",
    "get_detection_dataset_dicts",
    "load_proposals_into_dataset",
    "print_instances_class_histogram",
]

logger = logging.getLogger(__name__)


def filter_images_with_only_crowd_annotations(dataset_dicts: list[dict]) -> list[dict]:
    """Keep the images that have at least one annotation that is not a crowd region."""
    kept = [d for d in dataset_dicts if any(a.get("iscrowd", 0) == 0 for a in d["annotations"])]
    logger.info(
        "Left out %d of %d images without usable annotations", len(dataset_dicts) - len(kept), len(dataset_dicts)
    )
    return kept


def load_proposals_into_dataset(dataset_dicts: list[dict], proposal_file: str) -> list[dict]:
    """Needs upstream Detectron2."""
    needs_upstream("Loading precomputed proposals")


def print_instances_class_histogram(dataset_dicts: list[dict], class_names: Sequence[str]) -> None:
    """Log a table of the number of instances (crowd regions aside) per class.

    Raises:
        ValueError: a ``category_id`` is not an index into ``class_names``; the message has the image.
    """
    counts: Counter[int] = Counter()
    for d in dataset_dicts:
        for a in d["annotations"]:
            if a.get("iscrowd", 0):
                continue
            if not 0 <= a["category_id"] < len(class_names):
                raise ValueError(
                    f"Image {d.get('file_name')} has an instance of class id {a['category_id']}, but the dataset has "
                    f"{len(class_names)} classes (ids 0 to {len(class_names) - 1})"
                )
            counts[a["category_id"]] += 1
    cells: list[Any] = []
    for i, name in enumerate(class_names):
        cells += [name if len(name) <= 13 else f"{name[:11]}..", counts[i]]
    columns = min(6, len(cells))
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns or 1)]
    table = tabulate(rows, headers=["category", "#instances"] * (columns // 2), tablefmt="pipe", numalign="left")
    logger.info("%d instances in %d classes:\n%s", sum(counts.values()), len(class_names), table)


def get_detection_dataset_dicts(
    names: str | Sequence[str],
    filter_empty: bool = True,
    min_keypoints: int = 0,
    proposal_files: Sequence[str] | None = None,
    check_consistency: bool = True,
) -> list[dict] | torchdata.Dataset:
    """Load registered datasets as one.

    Args:
        names: one name or several.
        filter_empty: leave out images that have no instance, or crowd regions only (if the dataset has instances at
            all).
        min_keypoints: must be 0; keypoints need upstream.
        proposal_files: must be None; proposals need upstream.
        check_consistency: all datasets must have the same ``thing_classes``.

    Returns:
        list of dataset dicts; or a torch Dataset where the catalog gave torch Datasets.

    Raises:
        AssertionError: no name given, or nothing left to use; the message names the dataset.
        KeyError: unknown name.
    """
    if min_keypoints > 0:
        needs_upstream("Selecting images by keypoints")
    if proposal_files:
        needs_upstream("Loading precomputed proposals")
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise AssertionError("No dataset given: set DATASETS.TRAIN / DATASETS.TEST to the names of registered datasets")
    datasets = [DatasetCatalog.get(name) for name in names]
    if any(isinstance(d, torchdata.Dataset) for d in datasets):
        return _concatenate(datasets, names)
    for name, dicts in zip(names, datasets):
        if len(dicts) == 0:
            raise AssertionError(f"Dataset {name!r} is empty")
    dataset_dicts = [d for dicts in datasets for d in dicts]

    has_instances = "annotations" in dataset_dicts[0]
    if filter_empty and has_instances:
        dataset_dicts = filter_images_with_only_crowd_annotations(dataset_dicts)
        if not dataset_dicts:
            raise AssertionError(
                f"No image of {', '.join(map(repr, names))} has a usable annotation: none at all, or crowd regions only"
            )
    if check_consistency and has_instances:
        class_names = MetadataCatalog.get(names[0]).get("thing_classes")
        if class_names is not None:
            check_metadata_consistency("thing_classes", names)
            print_instances_class_histogram(dataset_dicts, class_names)
    return dataset_dicts


def _concatenate(datasets: list[Any], names: list[str]) -> torchdata.Dataset:
    if len(datasets) == 1:
        return datasets[0]
    if all(isinstance(d, torchdata.IterableDataset) for d in datasets):
        return torchdata.ChainDataset(datasets)
    if any(isinstance(d, torchdata.IterableDataset) for d in datasets):
        raise TypeError(f"Of the datasets {', '.join(names)} some are iterable and some are not; they can't be joined")
    return torchdata.ConcatDataset(datasets)


def trivial_batch_collator(batch: list) -> list:
    """Leave a batch the list that it is."""
    return batch


def worker_init_reset_seed(worker_id: int) -> None:
    """Seed Python, numpy and torch in a DataLoader worker from torch's seed of that worker."""
    seed_all_rng(torch.initial_seed() % 2**31 + worker_id)


def build_batch_data_loader(
    dataset: torchdata.Dataset,
    sampler: torchdata.Sampler | None,
    total_batch_size: int,
    *,
    aspect_ratio_grouping: bool = False,
    num_workers: int = 0,
    collate_fn: Callable[[list], Any] | None = None,
    drop_last: bool = True,
    single_gpu_batch_size: int | None = None,
    prefetch_factor: int | None = 2,
    persistent_workers: bool = False,
    pin_memory: bool = False,
    seed: int | None = None,
    **kwargs: Any,
):
    """A loader of batches.

    Args:
        dataset: map-style (then with a sampler) or iterable (then without).
        sampler: gives the indices of this process.
        total_batch_size: over all processes; must be a multiple of their number.
        aspect_ratio_grouping: batches of wide or of tall images only; elements must be dicts with ``width`` and
            ``height``.
        num_workers: per process.
        collate_fn: makes a batch of a list; default: the list.
        drop_last: leave out an unfinished batch at the end.
        single_gpu_batch_size: size of the batches of this process instead of ``total_batch_size``.
        seed: of the loader's generator, from which the workers get their seeds.
        prefetch_factor, persistent_workers, pin_memory, kwargs: as in torch's DataLoader.

    Raises:
        ValueError: the batch sizes don't fit.
    """
    batch_size = _local_batch_size(total_batch_size, single_gpu_batch_size)
    if isinstance(dataset, torchdata.IterableDataset):
        if sampler is not None:
            raise ValueError("An iterable dataset has its own order; sampler must be None")
    else:
        # a chunk of the batch size per worker: batches and their order don't depend on the number of workers
        dataset = ToIterableDataset(dataset, sampler, shard_chunk_size=batch_size)
    kwargs |= {
        "num_workers": num_workers,
        "worker_init_fn": worker_init_reset_seed,
        "pin_memory": pin_memory,
        "generator": None if seed is None else torch.Generator().manual_seed(seed),
    }
    if num_workers > 0:
        kwargs |= {"prefetch_factor": prefetch_factor, "persistent_workers": persistent_workers}
    if not aspect_ratio_grouping:
        return torchdata.DataLoader(
            dataset,
            batch_size=batch_size,
            drop_last=drop_last,
            collate_fn=collate_fn or trivial_batch_collator,
            **kwargs,
        )
    if not drop_last:
        raise ValueError(
            "aspect_ratio_grouping always leaves out unfinished batches; it can't be used with drop_last=False"
        )
    elements = torchdata.DataLoader(dataset, batch_size=None, collate_fn=trivial_batch_collator, **kwargs)
    batches = AspectRatioGroupedDataset(elements, batch_size)
    return batches if collate_fn is None else MapDataset(batches, collate_fn)


def _local_batch_size(total_batch_size: int | None, single_gpu_batch_size: int | None) -> int:
    if single_gpu_batch_size is not None:
        if total_batch_size:
            raise ValueError("Give either total_batch_size or single_gpu_batch_size (with total_batch_size 0 or None)")
        batch_size = single_gpu_batch_size
    else:
        world_size = comm.get_world_size()
        if total_batch_size <= 0 or total_batch_size % world_size:
            raise ValueError(
                f"The total batch size (SOLVER.IMS_PER_BATCH) must be a positive multiple of the number of processes "
                f"({world_size}), got {total_batch_size}"
            )
        batch_size = total_batch_size // world_size
    if batch_size <= 0:
        raise ValueError(f"The batch size must be positive, got {batch_size}")
    return batch_size


def _build_train_sampler(cfg, dataset: list[dict]) -> torchdata.Sampler:
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return TrainingSampler(len(dataset), seed=cfg.SEED)
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return RepeatFactorTrainingSampler(factors, seed=cfg.SEED)
    if name == "RandomSubsetTrainingSampler":
        if "RANDOM_SUBSET_RATIO" not in cfg.DATALOADER:
            raise ValueError(
                "RandomSubsetTrainingSampler needs the config key DATALOADER.RANDOM_SUBSET_RATIO, in (0, 1]"
            )
        return RandomSubsetTrainingSampler(len(dataset), cfg.DATALOADER.RANDOM_SUBSET_RATIO, seed_shuffle=cfg.SEED)
    if name in ("WeightedTrainingSampler", "WeightedCategoryTrainingSampler"):
        needs_upstream(f"DATALOADER.SAMPLER_TRAIN {name!r}")
    raise ValueError(
        f"Unknown DATALOADER.SAMPLER_TRAIN {name!r}; known: TrainingSampler, RepeatFactorTrainingSampler, "
        "RandomSubsetTrainingSampler"
    )


def _train_loader_from_config(cfg, mapper=None, *, dataset=None, sampler=None) -> dict[str, Any]:
    if dataset is None:
        dataset = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    if mapper is None:
        mapper = DatasetMapper(cfg, True)
    if sampler is None and not isinstance(dataset, torchdata.IterableDataset):
        logger.info("Using the training sampler %s", cfg.DATALOADER.SAMPLER_TRAIN)
        sampler = _build_train_sampler(cfg, dataset)
    return {
        "dataset": dataset,
        "sampler": sampler,
        "mapper": mapper,
        "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
    }


def _mapped(dataset: list | torchdata.Dataset, mapper: Callable | None) -> torchdata.Dataset:
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset, copy=False)
    return dataset if mapper is None else MapDataset(dataset, mapper)


@configurable(from_config=_train_loader_from_config)
def build_detection_train_loader(
    dataset: list | torchdata.Dataset,
    *,
    mapper: Callable[[dict], Any] | None,
    sampler: torchdata.Sampler | None = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Callable[[list], Any] | None = None,
    **kwargs: Any,
):
    """An endless loader of training batches. Call it as here, or as ``(cfg, mapper=…, dataset=…, sampler=…)``.

    Args:
        dataset: list of dataset dicts, or a torch Dataset (map-style or iterable).
        mapper: makes a model input of a dataset dict; elements for which it gives None are replaced by others.
        sampler: gives the indices of this process; default TrainingSampler. None for an iterable dataset.
        total_batch_size: over all processes.
        aspect_ratio_grouping: batches of wide or of tall images only; elements must be dicts with ``width`` and
            ``height``.
        num_workers: per process.
        collate_fn: makes a batch of a list; default: the list.
        kwargs: see :func:`build_batch_data_loader`.

    Returns:
        iterable of batches.
    """
    dataset = _mapped(dataset, mapper)
    if sampler is None and not isinstance(dataset, torchdata.IterableDataset):
        sampler = TrainingSampler(len(dataset))
    return build_batch_data_loader(
        dataset,
        sampler,
        total_batch_size,
        aspect_ratio_grouping=aspect_ratio_grouping,
        num_workers=num_workers,
        collate_fn=collate_fn,
        **kwargs,
    )


def _test_loader_from_config(cfg, dataset_name: str | Sequence[str], mapper=None) -> dict[str, Any]:
    names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name)
    if cfg.MODEL.LOAD_PROPOSALS:
        needs_upstream("MODEL.LOAD_PROPOSALS")
    dataset = get_detection_dataset_dicts(names, filter_empty=False)
    return {
        "dataset": dataset,
        "mapper": DatasetMapper(cfg, False) if mapper is None else mapper,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "sampler": None if isinstance(dataset, torchdata.IterableDataset) else InferenceSampler(len(dataset)),
    }


@configurable(from_config=_test_loader_from_config)
def build_detection_test_loader(
    dataset: list | torchdata.Dataset,
    *,
    mapper: Callable[[dict], Any],
    sampler: torchdata.Sampler | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    collate_fn: Callable[[list], Any] | None = None,
) -> torchdata.DataLoader:
    """A loader that gives each element once. Call it as here, or as ``(cfg, dataset_name, mapper=None)``.

    Args:
        dataset: list of dataset dicts, or a torch Dataset (map-style or iterable).
        mapper: makes a model input of a dataset dict.
        sampler: gives the indices of this process; default InferenceSampler, which splits the dataset over processes.
            None for an iterable dataset.
        batch_size: per process.
        num_workers: per process.
        collate_fn: makes a batch of a list; default: the list.
    """
    dataset = _mapped(dataset, mapper)
    if isinstance(dataset, torchdata.IterableDataset):
        if sampler is not None:
            raise ValueError("An iterable dataset has its own order; sampler must be None")
    elif sampler is None:
        sampler = InferenceSampler(len(dataset))
    return torchdata.DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=False,
        num_workers=num_workers,
        collate_fn=collate_fn or trivial_batch_collator,
    )
