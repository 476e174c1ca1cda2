"""Panoptic quality (Kirillov et al., CVPR 2019) and the COCO panoptic format: ids in PNGs, segments in JSON.

The numbers are those of the reference implementation (panopticapi): same matching, same treatment of void and crowd.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

VOID = 0
MAX_ID = (1 << 24) - 1  # three bytes of a PNG pixel


def rgb2id(color: np.ndarray | Sequence[int]) -> np.ndarray | int:
    """Segment ids from colours: R + 256 G + 65536 B.

    Args:
        color: an array (..., 3), or three numbers of any integer type.

    Returns:
        int32 array of shape (...), or an int.
    """
    if isinstance(color, np.ndarray) and color.ndim > 1:
        if color.shape[-1] != 3:
            raise ValueError(f"expected colours in the last axis, got an array of shape {color.shape}")
        channels = color.astype(np.int32)
        return channels[..., 0] | channels[..., 1] << 8 | channels[..., 2] << 16
    red, green, blue = (int(channel) for channel in color)
    return red | green << 8 | blue << 16


def id2rgb(id_map: np.ndarray | int) -> np.ndarray | list[int]:
    """Colours from segment ids, the inverse of :func:`rgb2id`.

    Args:
        id_map: an array of ids below 2^24, or one id.

    Returns:
        uint8 array of shape (..., 3), or three ints.
    """
    if isinstance(id_map, np.ndarray) and id_map.ndim:
        ids = np.ascontiguousarray(id_map, dtype="<u4")
        return np.ascontiguousarray(ids[..., None].view(np.uint8)[..., :3])
    number = int(id_map)
    return [number & 255, number >> 8 & 255, number >> 16 & 255]


def save_json(d: object, file: str) -> None:
    """Write ``d`` to the path ``file`` as JSON."""
    with open(file, "w") as stream:
        json.dump(d, stream)


class IdGenerator:
    """Unused colours and ids for the segments of one image, close to the colour of their category.

    A stuff category has one segment and always its own colour; things get colours around it.
    """

    MAX_DISTANCE_START = 30
    TRIES_PER_DISTANCE = 20

    def __init__(self, categories: Mapping[int, Mapping]) -> None:
        """
        Args:
            categories: by id; ``color`` (three numbers 0..255) and ``isthing`` are used.
        """
        self.categories = categories
        self.taken_colors = {(0, 0, 0)}
        self.taken_colors.update(tuple(c["color"]) for c in categories.values() if not c["isthing"])

    def get_color(self, cat_id: int) -> tuple[int, int, int]:
        """A colour for a new segment of this category."""
        category = self.categories[cat_id]
        base = tuple(int(channel) for channel in category["color"])
        if not category["isthing"]:
            return base
        color, distance, tries = base, self.MAX_DISTANCE_START, 0
        while color in self.taken_colors:
            shift = np.random.randint(-distance, distance + 1, size=3)
            color = tuple(np.clip(np.add(base, shift), 0, 255).tolist())
            tries += 1
            if tries % self.TRIES_PER_DISTANCE == 0:
                distance = min(255, distance + 10)
        self.taken_colors.add(color)
        return color

    def get_id(self, cat_id: int) -> int:
        """An id for a new segment of this category."""
        return rgb2id(self.get_color(cat_id))

    def get_id_and_color(self, cat_id: int) -> tuple[int, tuple[int, int, int]]:
        color = self.get_color(cat_id)
        return rgb2id(color), color


@dataclass
class PQStatCat:
    """Counts of one category: matched, surplus and missed segments, and the sum of the matches' IoU."""

    iou: float = 0.0
    tp: int = 0
    fp: int = 0
    fn: int = 0

    def __iadd__(self, other: PQStatCat) -> PQStatCat:
        self.iou += other.iou
        self.tp += other.tp
        self.fp += other.fp
        self.fn += other.fn
        return self


class PQStat:
    """Counts per category; ``+=`` adds those of other images."""

    def __init__(self) -> None:
        self.pq_per_cat: dict[int, PQStatCat] = defaultdict(PQStatCat)

    def __getitem__(self, category_id: int) -> PQStatCat:
        return self.pq_per_cat[category_id]

    def __iadd__(self, other: PQStat) -> PQStat:
        for category_id, counts in other.pq_per_cat.items():
            self.pq_per_cat[category_id] += counts
        return self

    def pq_average(self, categories: Mapping[int, Mapping], isthing: bool | None) -> tuple[dict, dict]:
        """Panoptic (pq), segmentation (sq) and recognition quality (rq), in 0..1.

        Args:
            categories: by id, with ``isthing``.
            isthing: only things, only stuff, or None for all.

        Returns:
            The means over the categories that occur in truth or prediction, with their number ``n`` (NaN if none
            occurs), and the values per category id (0 for those that don't occur).
        """
        per_class = {}
        occurring = []
        for category_id, category in categories.items():
            if isthing is not None and bool(category["isthing"]) != isthing:
                continue
            counts = self.pq_per_cat.get(category_id, PQStatCat())
            total = counts.tp + counts.fp / 2 + counts.fn / 2
            values = {
                "pq": counts.iou / total if total else 0.0,
                "sq": counts.iou / counts.tp if counts.tp else 0.0,
                "rq": counts.tp / total if total else 0.0,
            }
            per_class[category_id] = values
            if total:
                occurring.append(values)
        count = len(occurring)
        means = {key: sum(v[key] for v in occurring) / count if count else float("nan") for key in ("pq", "sq", "rq")}
        return {**means, "n": count}, per_class


def match_segments(
    true_map: np.ndarray,
    true_segments: Sequence[Mapping],
    predicted_map: np.ndarray,
    predicted_segments: Sequence[Mapping],
) -> PQStat:
    """Match the segments of one image.

    A predicted and a true segment of the same category match if their IoU exceeds one half, predicted pixels on void
    not counted; there is at most one such pair per segment. Crowd segments match nothing. A prediction without a match
    is forgiven if more than half of it lies on void and on the crowd segment of its category (the last one in
    ``true_segments``, as in the reference). Areas are counted in the maps; a predicted segment without pixels is none.

    Args:
        true_map, predicted_map: (H, W) segment ids, 0 for void.
        true_segments: dicts with ``id``, ``category_id``, optionally ``iscrowd``.
        predicted_segments: dicts with ``id`` and ``category_id``; every id in ``predicted_map`` must be listed.

    Returns:
        The counts per category.

    Raises:
        ValueError: maps of different size, ids out of range, listed twice or not listed.
    """
    if true_map.shape != predicted_map.shape:
        raise ValueError(f"the prediction is {predicted_map.shape} (height, width), the ground truth {true_map.shape}")
    true_index = _index_segments(true_map, true_segments, "the ground truth")
    predicted_index = _index_segments(predicted_map, predicted_segments, "the prediction")
    rows, columns = len(true_segments) + 2, len(predicted_segments) + 2
    both_indices = (true_index * columns + predicted_index).ravel()
    pairs = np.bincount(both_indices, minlength=rows * columns).reshape(rows, columns)
    if pairs[:, 0].any():
        missing = np.unique(predicted_map[predicted_index == 0]).tolist()
        raise ValueError(f"the predicted map holds the segment ids {missing}, which its segments_info doesn't list")

    common, on_void = pairs[2:, 2:], pairs[1, 2:]
    true_area, predicted_area = pairs[2:].sum(axis=1), pairs[:, 2:].sum(axis=0)
    union = true_area[:, None] + predicted_area - common - on_void
    iou = np.divide(common, union, out=np.zeros(common.shape), where=common > 0)
    true_category = np.array([segment["category_id"] for segment in true_segments], dtype=np.int64)
    predicted_category = np.array([segment["category_id"] for segment in predicted_segments], dtype=np.int64)
    crowd = np.array([bool(segment.get("iscrowd", 0)) for segment in true_segments], dtype=bool)
    matched = (iou > 0.5) & (true_category[:, None] == predicted_category) & ~crowd[:, None]

    stat = PQStat()
    for row, column in np.argwhere(matched):
        counts = stat[int(true_category[row])]
        counts.tp += 1
        counts.iou += float(iou[row, column])
    for category in true_category[~matched.any(axis=1) & ~crowd]:
        stat[int(category)].fn += 1
    crowd_row = {int(true_category[row]): row for row in np.flatnonzero(crowd)}
    for column in np.flatnonzero(~matched.any(axis=0) & (predicted_area > 0)):
        category = int(predicted_category[column])
        forgiven = on_void[column]
        if category in crowd_row:
            forgiven = forgiven + common[crowd_row[category], column]
        if forgiven / predicted_area[column] <= 0.5:
            stat[category].fp += 1
    return stat


def _index_segments(id_map: np.ndarray, segments: Sequence[Mapping], whose: str) -> np.ndarray:
    """Replace ids by small numbers: 0 for an id that isn't listed, 1 for void, 2.. for the segments in their order."""
    ids = np.array([segment["id"] for segment in segments], dtype=np.int64)
    lowest, highest = (int(id_map.min()), int(id_map.max())) if id_map.size else (0, 0)
    if lowest < 0 or highest > MAX_ID or (len(ids) and not 0 < ids.min() <= ids.max() <= MAX_ID):
        raise ValueError(
            f"segment ids of {whose} must lie in 1..{MAX_ID} (0 is void), found {lowest}..{highest} in its map"
        )
    if len(np.unique(ids)) < len(ids):
        raise ValueError(f"segments_info of {whose} lists an id twice: {sorted(ids.tolist())}")
    # Of the pages of this table only those that are written or looked up become real memory.
    index_of_id = np.zeros(max(highest, int(ids.max(initial=0))) + 1, dtype=np.int32)
    index_of_id[VOID] = 1
    index_of_id[ids] = np.arange(2, len(ids) + 2)
    return np.take(index_of_id, id_map)
