"""Steps that the training mappers share: reading files, checking labels, padding, masks and instances.

Arrays before the augmentations are numpy (H, W[, C]), results are torch tensors. Every error names the file.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import detection_utils
from detectron2.data.transforms import Transform
from detectron2.structures import Boxes, Instances
from detectron2.structures.masks import polygons_to_bitmask
from pycocotools import mask as mask_util

IMAGE_PAD_VALUE = 128
_MAX_COUNTED_ID = 1 << 20  # ids above are sorted instead of counted


# ---------------------------------------------------------------------------------------------------- samples and files


def copy_sample(dataset_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Copy of a dataset dict that a mapper may change, except for ``annotations``, which are shared and only read."""
    sample = {key: copy.deepcopy(value) for key, value in dataset_dict.items() if key != "annotations"}
    if "annotations" in dataset_dict:
        sample["annotations"] = dataset_dict["annotations"]
    return sample


def read_file(path: str, image_format: str | None) -> np.ndarray:
    """Image file as an array, (H, W) or (H, W, C).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be decoded.
    """
    try:
        return detection_utils.read_image(path, format=image_format)
    except FileNotFoundError:
        raise FileNotFoundError(f"File {path} does not exist") from None
    except (OSError, SyntaxError) as error:  # Pillow reports broken PNGs as SyntaxError
        raise ValueError(f"File {path} cannot be read as an image: {error}") from error


def read_image(sample: dict[str, Any], image_format: str) -> np.ndarray:
    """The image of a sample; its size is compared with ``height`` and ``width``, which are filled in if absent."""
    image = read_file(sample["file_name"], image_format)
    detection_utils.check_image_size(sample, image)
    return image


def read_label_map(path: str, image_size: tuple[int, int] | None = None, image_file: str = "") -> np.ndarray:
    """Class ids of a single-channel label file of 8, 16 or 32 bits, as an integer array (H, W).

    Args:
        path: PNG or TIFF; a palette image gives its indices.
        image_size: (height, width) that it must have.
        image_file: the image that this size is from, for the error message.

    Raises:
        ValueError: several channels, no integers, or another size than the image.
    """
    labels = read_file(path, None)
    if labels.ndim != 2 or labels.dtype.kind not in "uib":
        kind = f"{labels.shape[2]} channels" if labels.ndim == 3 else f"values of type {labels.dtype}"
        raise ValueError(
            f"Label file {path} has {kind}; needed is one channel of integer class ids (PNG or TIFF, not colours)"
        )
    _check_size("Label file", path, labels.shape, image_size, image_file)
    return labels


def read_panoptic_map(path: str, image_size: tuple[int, int], image_file: str) -> np.ndarray:
    """Panoptic PNG as uint8 RGB (H, W, 3); ``rgb_to_id`` turns it into segment ids after the augmentations."""
    rgb = read_file(path, "RGB")
    _check_size("Panoptic file", path, rgb.shape[:2], image_size, image_file)
    return rgb


def _check_size(what: str, path: str, size: Sequence[int], image_size: Sequence[int] | None, image_file: str) -> None:
    if image_size is not None and tuple(size) != tuple(image_size):
        raise ValueError(
            f"{what} {path} is {size[1]}x{size[0]} (width x height), "
            f"but its image {image_file} is {image_size[1]}x{image_size[0]}"
        )


def rgb_to_id(rgb: np.ndarray) -> np.ndarray:
    """Segment ids (H, W) int32 of a uint8 panoptic RGB map: R + 256 G + 256² B (COCO panoptic format)."""
    channels = rgb.astype(np.int32)
    return channels[..., 0] + 256 * channels[..., 1] + 65536 * channels[..., 2]


# -------------------------------------------------------------------------------------------------------------- tensors


def to_chw(image: np.ndarray) -> torch.Tensor:
    """Image (H, W, C) as a contiguous tensor (C, H, W) of the same type."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def pad_to_square(tensor: torch.Tensor, side: int, value: int, image_file: str) -> torch.Tensor:
    """Pad (..., H, W) at the right and at the bottom to side x side; ``side`` <= 0 leaves it as it is.

    The originals crop a larger image silently; here that is an error.
    """
    if side <= 0:
        return tensor
    height, width = tensor.shape[-2:]
    if max(height, width) > side:
        raise ValueError(
            f"{image_file} is {width}x{height} after the augmentations, larger than the square of "
            f"INPUT.SIZE_DIVISIBILITY {side}: raise INPUT.SIZE_DIVISIBILITY (or set it to -1), or make the images "
            "smaller by INPUT.CROP.SIZE or INPUT.MAX_SIZE_TRAIN"
        )
    return F.pad(tensor, (0, side - width, 0, side - height), value=value)


# ---------------------------------------------------------------------------------------------------- classes and masks


def check_class_ids(ids: Iterable[int], num_classes: int | None, source: str, ignore_label: int | None = None) -> None:
    """Raise a ValueError if an id is neither in [0, num_classes) nor the ignore label; None checks nothing."""
    if num_classes is None:
        return
    for value in ids:
        if not 0 <= value < num_classes and value != ignore_label:
            ignore = "there is no ignore label" if ignore_label is None else f"the ignore label is {ignore_label}"
            raise ValueError(
                f"{source} contains class id {int(value)}, but there are {num_classes} classes "
                f"(ids 0..{num_classes - 1}) and {ignore}: "
                "correct the labels, MODEL.SEM_SEG_HEAD.NUM_CLASSES or the ignore_label of the dataset"
            )


def present_ids(labels: np.ndarray) -> np.ndarray:
    """Sorted distinct values of an integer array; counting instead of sorting where the values allow it."""
    if labels.size == 0:
        return np.empty(0, dtype=np.int64)
    if labels.min() < 0 or labels.max() > _MAX_COUNTED_ID:
        return np.unique(labels).astype(np.int64)
    return np.flatnonzero(np.bincount(labels.ravel()))


def semantic_targets(labels: torch.Tensor, ignore_label: int | None) -> tuple[list[int], torch.Tensor]:
    """Classes of a label map (H, W), ascending and without the ignore label, and their masks [n, H, W] bool."""
    array = labels.numpy()
    classes = [int(value) for value in present_ids(array) if value != ignore_label]
    return classes, _compare(array, classes)


def segment_targets(segment_ids: np.ndarray, segments: Sequence[Mapping[str, Any]]) -> tuple[list[int], torch.Tensor]:
    """Classes and masks [n, H, W] bool of the segments that are no crowd, in order; absent ones give empty masks."""
    kept = [segment for segment in segments if not segment.get("iscrowd", 0)]
    return [segment["category_id"] for segment in kept], _compare(segment_ids, [segment["id"] for segment in kept])


def _compare(array: np.ndarray, values: Sequence[int]) -> torch.Tensor:
    masks = np.empty((len(values), *array.shape), dtype=bool)
    for mask, value in zip(masks, values):
        np.equal(array, value, out=mask)
    return torch.from_numpy(masks)


def make_instances(
    classes: Sequence[int], masks: torch.Tensor, *, boxes: Boxes | None = None, drop_empty: bool = False
) -> Instances:
    """Targets of one image: ``gt_classes`` int64 [n], ``gt_masks`` bool [n, H, W] and, if given, ``gt_boxes``.

    ``drop_empty`` leaves out masks without a pixel (``INPUT.DROP_EMPTY_MASKS``).
    """
    instances = Instances(tuple(masks.shape[-2:]))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    instances.gt_masks = masks
    if boxes is not None:
        instances.gt_boxes = boxes
    return instances[masks.flatten(1).any(dim=1)] if drop_empty else instances


# ---------------------------------------------------------------------------------------------------------- annotations


def without_crowds(annotations: Iterable[Mapping[str, Any]], image_file: str) -> list[Mapping[str, Any]]:
    """Annotations that are no crowd regions, each with a segmentation."""
    kept = [item for item in annotations if not item.get("iscrowd", 0)]
    for item in kept:
        if not item.get("segmentation"):
            raise ValueError(f"An annotation of {image_file} (category_id {item['category_id']}) has no segmentation")
    return kept


def transform_segmentation(
    segmentation: Any, transforms: Transform, image_size: tuple[int, int], image_file: str
) -> list[np.ndarray] | np.ndarray:
    """One COCO segmentation after the augmentations: polygons stay polygons, [(2k,) float64, ...]; RLE becomes a mask.

    Args:
        segmentation: list of polygons, or an RLE dict, compressed or not.
        image_size: (height, width) before the augmentations, which an RLE must have.
    """
    if isinstance(segmentation, Mapping):
        _check_size("RLE mask of", image_file, segmentation["size"], image_size, image_file)
        if isinstance(segmentation["counts"], list):
            segmentation = mask_util.frPyObjects(dict(segmentation), *image_size)
        # 1 is the object; what a transform pads segmentations with (255) is not
        return transforms.apply_segmentation(mask_util.decode(segmentation)) == 1
    # float64: in-place coordinate transforms would cut fractions off integer polygons
    polygons = [np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation]
    return [polygon.reshape(-1) for polygon in transforms.apply_polygons(polygons)]


def rasterize(segmentation: list[np.ndarray] | np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Mask (H, W) bool of what ``transform_segmentation`` gives."""
    if isinstance(segmentation, np.ndarray):
        return segmentation
    return polygons_to_bitmask(segmentation, *image_size)


def bounding_box(segmentation: list[np.ndarray] | np.ndarray) -> tuple[float, float, float, float]:
    """XYXY box around a transformed segmentation, (0, 0, 0, 0) if nothing is left; a mask's x1 and y1 are exclusive."""
    if isinstance(segmentation, np.ndarray):
        rows, columns = np.flatnonzero(segmentation.any(axis=1)), np.flatnonzero(segmentation.any(axis=0))
        if rows.size == 0:
            return 0.0, 0.0, 0.0, 0.0
        return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
    if not segmentation:
        return 0.0, 0.0, 0.0, 0.0
    points = np.concatenate(segmentation).reshape(-1, 2)
    return (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())


def stack_masks(masks: Sequence[np.ndarray], image_size: tuple[int, int]) -> torch.Tensor:
    """Masks (H, W) as one bool tensor [n, H, W], n = 0 included."""
    stacked = np.stack(masks) if masks else np.zeros((0, *image_size), dtype=bool)
    return torch.from_numpy(np.ascontiguousarray(stacked, dtype=bool))
