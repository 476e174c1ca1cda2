"""Reads what evaluators write: ``sem_seg_predictions.json``, ``coco_instances_results.json`` and panoptic files."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from mask2former_plugin.data.mappers.steps import read_file, rgb_to_id


def read_json(path: str | Path, fields: Sequence[str] = ()) -> Any:
    """Content of a JSON file; a ValueError names the file if it is no JSON or no dict with these fields."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    for field in fields:
        if not isinstance(content, dict) or field not in content:
            raise ValueError(f"{path} has no {field!r}")
    return content


def read_id_map(path: str | Path) -> np.ndarray:
    """Segment ids ``[H, W]`` int32 of a panoptic PNG."""
    return rgb_to_id(read_file(str(path), "RGB"))


def semantic_predictions(json_file: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Entries of a ``sem_seg_predictions.json`` by image file.

    Raises:
        ValueError: the file is no list of ``file_name``, ``category_id`` and ``segmentation``.
    """
    entries = read_json(json_file)
    fields = ("file_name", "category_id", "segmentation")
    if not isinstance(entries, list) or not all(isinstance(e, dict) and all(f in e for f in fields) for e in entries):
        raise ValueError(f"{json_file} must hold a list of dicts with {', '.join(fields)}")
    result: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        result[entry["file_name"]].append(entry)
    return dict(result)


def semantic_map(entries: Iterable[Mapping[str, Any]], to_contiguous: Mapping[int, int] | None = None) -> np.ndarray:
    """Class map ``[H, W]`` uint16 from the entries of one image; pixels in no entry are class 0, as published.

    Args:
        entries: at least one.
        to_contiguous: from the category ids of the file to contiguous ids; None: they are contiguous.

    Raises:
        ValueError: a category is unknown.
    """
    labels = None
    for entry in entries:
        category = entry["category_id"]
        if to_contiguous is not None:
            if category not in to_contiguous:
                raise ValueError(f"{entry['file_name']}: the dataset does not know the category id {category}")
            category = to_contiguous[category]
        mask = coco_mask.decode(entry["segmentation"]).astype(bool)
        if labels is None:
            labels = np.zeros(mask.shape, dtype=np.uint16)
        labels[mask] = category
    if labels is None:
        raise ValueError("no entries to draw a class map from")
    return labels


class ImageIndex:
    """Finds the record of an image by its file: by the whole path, or, where that is unknown, by a unique file name.

    Args:
        records: dataset dicts with ``file_name``.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self._by_path: dict[str, Mapping[str, Any]] = {}
        self._by_name: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for record in records:
            self._by_path[record["file_name"]] = record
            self._by_name[Path(record["file_name"]).name].append(record)

    def __len__(self) -> int:
        return len(self._by_path)

    def find(self, file_name: str) -> Mapping[str, Any]:
        """The record; a ValueError if there is none, or several that the name can't tell apart."""
        if file_name in self._by_path:
            return self._by_path[file_name]
        candidates = self._by_name.get(Path(file_name).name, [])
        if len(candidates) != 1:
            problem = "no image of this dataset" if not candidates else f"the name of {len(candidates)} images"
            raise ValueError(f"{file_name} is {problem}; predictions and dataset don't belong together")
        return candidates[0]
