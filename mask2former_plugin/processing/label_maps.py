"""Segmentation maps as binary masks with classes, the targets of mask classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mask2former_plugin.processing.images import as_list

InstanceClasses = Mapping[int, int]


def as_label_map(segmentation_map: Any, name: str) -> np.ndarray:
    """A segmentation map as an integer array ``[H, W]``.

    Raises:
        ValueError: it has other dimensions or no integers.
    """
    if isinstance(segmentation_map, Image.Image) and segmentation_map.mode == "1":
        segmentation_map = segmentation_map.convert("L")
    labels = np.asarray(segmentation_map.cpu() if isinstance(segmentation_map, Tensor) else segmentation_map)
    if labels.ndim == 3 and 1 in (labels.shape[0], labels.shape[2]):
        labels = labels.squeeze(0 if labels.shape[0] == 1 else 2)
    if labels.ndim != 2 or labels.dtype.kind not in "iub":
        raise ValueError(
            f"{name}: shape {labels.shape} of {labels.dtype}; a segmentation map has two dimensions and integer ids"
        )
    return labels.astype(np.int64)


def map_list(segmentation_maps: Any, number: int) -> list[np.ndarray] | None:
    """One segmentation map for each of ``number`` images, from a list or one alone; None stays None.

    Raises:
        ValueError: there is another number of maps.
    """
    if segmentation_maps is None:
        return None
    if not isinstance(segmentation_maps, (list, tuple)):
        # a batch has one dimension more than a map, unlike images, which have channels
        is_batch = getattr(segmentation_maps, "ndim", 2) == 3 and segmentation_maps.shape[0] == number > 1
        segmentation_maps = list(segmentation_maps) if is_batch else as_list(segmentation_maps)
    if len(segmentation_maps) != number:
        raise ValueError(f"{number} images, but {len(segmentation_maps)} segmentation_maps")
    return [as_label_map(one, f"segmentation map {i}") for i, one in enumerate(segmentation_maps)]


def class_lookups(
    instance_id_to_semantic_id: InstanceClasses | Sequence[InstanceClasses] | None, number: int
) -> list[InstanceClasses | None]:
    """The mapping from ids to classes of each image.

    Raises:
        ValueError: a list of another length.
    """
    if instance_id_to_semantic_id is None or isinstance(instance_id_to_semantic_id, Mapping):
        return [instance_id_to_semantic_id] * number
    if len(instance_id_to_semantic_id) != number:
        raise ValueError(f"{number} images, but {len(instance_id_to_semantic_id)} instance_id_to_semantic_id")
    return list(instance_id_to_semantic_id)


def masks_and_classes(
    labels: np.ndarray,
    classes: InstanceClasses | None,
    *,
    ignore_index: int | None,
    reduce_labels: bool,
    padded_size: tuple[int, int],
    name: str,
) -> tuple[Tensor, Tensor]:
    """Binary masks and their classes, in ascending order of the ids.

    Args:
        labels: ids ``[H, W]``.
        classes: class of each id; None: the ids are classes.
        ignore_index: id that gives no mask.
        reduce_labels: id 0, and class 0, give no mask; the other classes are counted from 0. What is ``ignore_index``
            before stays ignored, and no class becomes it.
        padded_size: height and width of the masks; zeros are added below and to the right.
        name: of the map, for errors.

    Returns:
        float32 ``[n, *padded_size]`` and int64 ``[n]``.

    Raises:
        ValueError: ``reduce_labels`` without ``ignore_index``.
        KeyError: an id without a class.
    """
    if reduce_labels and ignore_index is None:
        raise ValueError("do_reduce_labels needs ignore_index, the id of what is no class (usually 255)")
    ignored = {ignore_index} | ({0} if reduce_labels else set())
    found: list[tuple[int, int]] = []
    for number in np.unique(labels).tolist():
        if number in ignored:
            continue
        if classes is not None and number not in classes:
            raise KeyError(f"{name}: id {number} is not in instance_id_to_semantic_id")
        category = number if classes is None else int(classes[number])
        if reduce_labels:
            if category in ignored:  # a segment of the background
                continue
            category -= 1
        found.append((number, category))
    height, width = labels.shape
    masks = torch.zeros((len(found), *padded_size))
    for mask, (number, _) in zip(masks, found):
        mask[:height, :width] = torch.from_numpy(labels == number)
    return masks, torch.tensor([category for _, category in found], dtype=torch.int64)
