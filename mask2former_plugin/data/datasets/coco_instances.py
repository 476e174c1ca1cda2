"""COCO instance annotations of the user's own: what is wrong with them, and what evaluators need beside the masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pycocotools.mask as mask_util

_FIELDS = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("image_id", "category_id"),
}
_EVALUATED = ("id", "bbox", "area", "iscrowd")  # read by pycocotools and its relatives


def problem_of(content: Mapping[str, Any]) -> str | None:
    """What is wrong with a COCO instance JSON, None if nothing: the first missing field, doubled id or unusable mask.

    Annotations of unknown categories and boxes that are none are left to ``load_coco_json``, which names them.
    """
    for kind, fields in _FIELDS.items():
        for place, entry in enumerate(content[kind]):
            missing = [field for field in fields if field not in entry]
            if missing:
                return f"number {entry.get('id', place)} of its {kind} has no {missing[0]!r}"
    for kind in ("images", "categories"):
        ids = set()
        for entry in content[kind]:
            if not isinstance(entry["id"], int) and kind == "categories":
                return f"its category {entry['name']!r} has the id {entry['id']!r}, which is no number"
            if entry["id"] in ids:
                return f"several of its {kind} have the id {entry['id']!r}"
            ids.add(entry["id"])
    sizes = _sizes(content)
    for place, annotation in enumerate(content["annotations"]):
        if annotation["image_id"] in sizes:
            wrong = _problem_of_mask(annotation, sizes[annotation["image_id"]])
            if wrong:
                number, image = annotation.get("id", place), annotation["image_id"]
                return f"annotation {number} of image {image!r} {wrong}; correct it or leave it out"
    return None


def _sizes(content: Mapping[str, Any]) -> dict[Any, tuple[int, int]]:
    return {image["id"]: (image["height"], image["width"]) for image in content["images"]}


def _problem_of_mask(annotation: Mapping[str, Any], size: tuple[int, int]) -> str | None:
    mask = annotation.get("segmentation")
    if not mask:
        return None if annotation.get("iscrowd", 0) else "has no segmentation"
    if not isinstance(mask, Mapping):
        return None
    if not mask.keys() >= {"size", "counts"}:
        return "has run lengths without 'size' or 'counts'"
    if tuple(mask["size"]) != size:
        return f"has run lengths for {mask['size']}, its image is {list(size)} (height, width)"
    if isinstance(mask["counts"], list) and sum(mask["counts"]) != size[0] * size[1]:
        return f"has run lengths of {sum(mask['counts'])} pixels, its image has {size[0] * size[1]}"
    return None


def is_evaluable(content: Mapping[str, Any]) -> bool:
    """Whether evaluation finds all that it reads; an id of 0 would count the object as missed."""
    return all(item.get("id") and all(field in item for field in _EVALUATED) for item in content["annotations"])


def evaluable(content: Mapping[str, Any], categories: list[dict[str, Any]]) -> dict[str, Any]:
    """The same annotations of some categories alone, numbered from 1, each with box, area and ``iscrowd``."""
    ids, sizes = {category["id"] for category in categories}, _sizes(content)
    chosen = [a for a in content["annotations"] if a["category_id"] in ids and a["image_id"] in sizes]
    annotations = [{**_measured(a, sizes[a["image_id"]]), "id": number} for number, a in enumerate(chosen, start=1)]
    return {**content, "categories": categories, "annotations": annotations}


def _measured(annotation: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """With ``bbox`` and ``area`` of the mask where they are missing."""
    found: dict[str, Any] = {"iscrowd": 0}
    if "bbox" not in annotation or "area" not in annotation:
        mask = annotation["segmentation"]
        if not isinstance(mask, Mapping) or isinstance(mask["counts"], list):
            mask = mask_util.frPyObjects(mask, *size)
        mask = mask_util.merge(mask) if isinstance(mask, list) else mask
        found |= {"bbox": mask_util.toBbox(mask).tolist(), "area": float(mask_util.area(mask))}
    return {**found, **annotation}
