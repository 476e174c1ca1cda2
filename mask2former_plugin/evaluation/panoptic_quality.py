"""Panoptic quality and boundary panoptic quality of id maps, image by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mask2former_plugin.evaluation.boundary import boundary_pixels

VOID = 0
_FIELDS = ("iou", "tp", "fp", "fn")


class PanopticCounts:
    """What PQ needs, per category: the sum of the matches' IoU, matched, surplus and missed segments.

    Args:
        num_categories: number of rows.
    """

    def __init__(self, num_categories: int) -> None:
        self.table = np.zeros((num_categories, len(_FIELDS)))

    def __iadd__(self, other: PanopticCounts) -> PanopticCounts:
        self.table += other.table
        return self

    def add(self, field: str, categories: np.ndarray, values: np.ndarray | float = 1.0) -> None:
        """Add to one of "iou", "tp", "fp", "fn" of the categories, which may repeat."""
        np.add.at(self.table[:, _FIELDS.index(field)], categories, values)

    def per_category(self) -> np.ndarray:
        """PQ, SQ and RQ ``[num_categories, 3]`` in percent; NaN in all three for what occurs nowhere."""
        iou, tp, fp, fn = self.table.T
        weight = tp + fp / 2 + fn / 2
        occurs = weight > 0
        ratios = [(iou, weight, occurs), (iou, tp, tp > 0), (tp, weight, occurs)]
        result = np.where(occurs, 0.0, np.nan)[:, None].repeat(3, axis=1)
        for column, (numerator, denominator, where) in enumerate(ratios):
            np.divide(numerator, denominator, out=result[:, column], where=where)
        return 100 * result


def summarize(counts: PanopticCounts, is_thing: Sequence[bool]) -> dict[str, float]:
    """Means over the categories that occur: PQ, SQ, RQ of all (no suffix), of things (``_th``) and of stuff (``_st``).

    Args:
        is_thing: per category.

    Returns:
        Percent; NaN where no category occurs.
    """
    values = counts.per_category()
    thing = np.asarray(is_thing, dtype=bool)
    result = {}
    for suffix, chosen in (("", np.ones_like(thing)), ("_th", thing), ("_st", ~thing)):
        occurring = values[chosen & ~np.isnan(values[:, 0])]
        means = occurring.mean(axis=0) if len(occurring) else np.full(3, np.nan)
        result.update({f"{name}{suffix}": float(mean) for name, mean in zip(("PQ", "SQ", "RQ"), means)})
    return result


def match_segments(
    true_map: np.ndarray,
    true_segments: Sequence[Mapping[str, Any]],
    predicted_map: np.ndarray,
    predicted_segments: Sequence[Mapping[str, Any]],
    category_index: Mapping[int, int],
    dilation_ratio: float | None = None,
) -> PanopticCounts:
    """Match the segments of one image (Kirillov et al., CVPR 2019).

    A predicted and a true segment of one category match if their IoU exceeds one half; predicted pixels on void don't
    count. Crowd segments match nothing. A prediction without a match is forgiven if more than half of it lies on void
    and on the crowd segment of its category. With ``dilation_ratio`` the IoU is the smaller one of mask IoU and
    boundary IoU, in the match and in the sum (boundary PQ, Cheng et al., CVPR 2021); what is forgiven stays as it is.

    Args:
        true_map, predicted_map: ``[H, W]`` segment ids, 0 for void.
        true_segments, predicted_segments: dicts with ``id``, ``category_id`` and, true ones, ``iscrowd``.
        category_index: from category id to row of the counts.
        dilation_ratio: width of the boundary in parts of the diagonal; None: plain PQ.

    Raises:
        ValueError: sizes differ, an id is missing in the segments or listed twice, or a category is unknown.
    """
    if true_map.shape != predicted_map.shape:
        raise ValueError(f"the prediction is {predicted_map.shape} (height, width), the ground truth {true_map.shape}")
    true_index = _index_map(true_map, true_segments, "the ground truth")
    predicted_index = _index_map(predicted_map, predicted_segments, "the prediction")
    if (predicted_index > len(predicted_segments)).any():
        missing = np.unique(predicted_map[predicted_index > len(predicted_segments)]).tolist()
        raise ValueError(f"the map of the prediction holds the segment ids {missing}, which segments_info lacks")
    # rows: void, the true segments, pixels of no listed segment (which are not void); columns: void, the predicted
    shape = (len(true_segments) + 2, len(predicted_segments) + 1)
    pixels = _pair_counts(true_index, predicted_index, shape)
    iou = _iou(pixels)
    if dilation_ratio is not None:
        iou = np.minimum(iou, _boundary_iou(true_index, predicted_index, shape, dilation_ratio))

    true_category = _categories(true_segments, category_index, "the ground truth")
    predicted_category = _categories(predicted_segments, category_index, "the prediction")
    crowd = np.array([bool(segment.get("iscrowd", 0)) for segment in true_segments], dtype=bool)
    matched = (iou > 0.5) & (true_category[:, None] == predicted_category) & ~crowd[:, None]

    counts = PanopticCounts(len(category_index))
    rows, columns = np.nonzero(matched)
    counts.add("tp", true_category[rows])
    counts.add("iou", true_category[rows], iou[rows, columns])
    counts.add("fn", true_category[~matched.any(axis=1) & ~crowd])
    area = pixels[:, 1:].sum(axis=0)
    crowd_row = {category: row for row, category in enumerate(true_category.tolist()) if crowd[row]}
    # a segment without pixels is none
    for column in np.flatnonzero(~matched.any(axis=0) & (area > 0)):
        category = int(predicted_category[column])
        forgiven = pixels[0, column + 1]
        if category in crowd_row:
            forgiven = forgiven + pixels[crowd_row[category] + 1, column + 1]
        if 2 * forgiven <= area[column]:
            counts.add("fp", np.array([category]))
    return counts


def _index_map(ids: np.ndarray, segments: Sequence[Mapping[str, Any]], whose: str) -> np.ndarray:
    """Positions of the ids in the list of segments, from 1 on; 0 is void, what is not listed comes after the last."""
    listed = np.array([segment["id"] for segment in segments], dtype=np.int64)
    if len(listed) and (listed.min() <= VOID or len(np.unique(listed)) < len(listed)):
        raise ValueError(f"segment ids of {whose} must be positive and different, got {sorted(listed.tolist())}")
    if ids.size and ids.min() < VOID:
        raise ValueError(f"the map of {whose} holds the negative id {ids.min()}")
    # ids have three bytes: a table is faster than sorting the pixels
    table = np.full(max(int(ids.max(initial=0)), int(listed.max(initial=0))) + 1, len(listed) + 1, dtype=np.uint16)
    table[VOID] = 0
    table[listed] = np.arange(1, len(listed) + 1)
    return np.take(table, ids)


def _categories(segments: Sequence[Mapping[str, Any]], index: Mapping[int, int], whose: str) -> np.ndarray:
    unknown = sorted({segment["category_id"] for segment in segments} - index.keys())
    if unknown:
        raise ValueError(f"{whose} has segments of the category ids {unknown}, which the dataset does not list")
    return np.array([index[segment["category_id"]] for segment in segments], dtype=np.int64)


def _pair_counts(true_index: np.ndarray, predicted_index: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Number of pixels of each pair of indices, ``shape``."""
    pairs = true_index.astype(np.int64) * shape[1] + predicted_index
    return np.bincount(pairs.ravel(), minlength=shape[0] * shape[1]).reshape(shape)


def _iou(pixels: np.ndarray) -> np.ndarray:
    """IoU of true and predicted segments; what a prediction has on void (row 0) is in no union."""
    common = pixels[1:-1, 1:]
    union = pixels[1:-1].sum(axis=1)[:, None] + pixels[1:, 1:].sum(axis=0) - common
    return np.divide(common, union, out=np.zeros(common.shape), where=common > 0)


def _boundary_iou(
    true_index: np.ndarray, predicted_index: np.ndarray, shape: tuple[int, int], dilation_ratio: float
) -> np.ndarray:
    """IoU of the boundary regions of true and predicted segments; again without the predicted pixels on void."""
    in_true = boundary_pixels(true_index, dilation_ratio)
    in_predicted = boundary_pixels(predicted_index, dilation_ratio)
    both = in_true & in_predicted
    common = _pair_counts(true_index[both], predicted_index[both], shape)[1:-1, 1:]
    true_area = np.bincount(true_index[in_true], minlength=shape[0])[1:-1]
    counted = in_predicted & (true_index != VOID)
    predicted_area = np.bincount(predicted_index[counted], minlength=shape[1])[1:]
    union = true_area[:, None] + predicted_area - common
    return np.divide(common, union, out=np.zeros(common.shape), where=common > 0)
