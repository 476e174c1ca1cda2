"""Class names, colors and ids of the built-in datasets; the tables lie in the folder ``categories``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TABLES = Path(__file__).parent / "categories"


def _read_table(name: str) -> Any:
    return json.loads((_TABLES / f"{name}.json").read_text(encoding="utf-8"))


#: 133 categories of COCO panoptic, the 80 things first: id, name, isthing, color (RGB).
COCO_CATEGORIES: list[dict[str, Any]] = _read_table("coco")
#: The 19 evaluated categories of Cityscapes: id, trainId, name, isthing, color (RGB).
CITYSCAPES_CATEGORIES: list[dict[str, Any]] = [{**c, "color": tuple(c["color"])} for c in _read_table("cityscapes")]
#: Names of the 150 classes of ADE20K's scene parsing benchmark, in the order of the label maps.
ADE20K_SEM_SEG_CATEGORIES: list[str] = _read_table("ade20k")
_LVIS_V1 = _read_table("lvis_v1")
#: Names of the 1203 categories of LVIS v1 (the first synonym), in the order of their ids from 1.
LVIS_V1_CLASSES: list[str] = _LVIS_V1["classes"]
#: In how many of its training images each category occurs.
LVIS_V1_IMAGE_COUNTS: list[int] = _LVIS_V1["image_counts"]

# Color of the class "things" in label maps of stuff only.
_THINGS_COLOR = [82, 18, 128]


def _coco_things() -> dict[str, Any]:
    things = [c for c in COCO_CATEGORIES if c["isthing"]]
    return {
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(things)},
        "thing_classes": [c["name"] for c in things],
        "thing_colors": [c["color"] for c in things],
    }


def _coco_panoptic_separated() -> dict[str, Any]:
    """Stuff counts from 1; 0 means any thing."""
    stuff = [c for c in COCO_CATEGORIES if not c["isthing"]]

    def plain(name: str) -> str:
        return name.removesuffix("-merged").removesuffix("-other")

    return {
        "stuff_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(stuff, start=1)} | {0: 0},
        "stuff_classes": ["things", *(plain(c["name"]) for c in stuff)],
        "stuff_colors": [_THINGS_COLOR, *(c["color"] for c in stuff)],
        **_coco_things(),
    }


def panoptic_metadata(categories: list[dict], contiguous_ids: list[int]) -> dict[str, Any]:
    """Metadata in which things and stuff share one range of contiguous ids, and both lists of classes hold all of them.

    Args:
        categories: with ``id, name, isthing, color``.
        contiguous_ids: one per category.
    """
    names, colors = [c["name"] for c in categories], [c["color"] for c in categories]
    pairs = list(zip(categories, contiguous_ids))
    return {
        "thing_classes": names,
        "thing_colors": colors,
        "stuff_classes": list(names),
        "stuff_colors": list(colors),
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for c, i in pairs if c["isthing"]},
        "stuff_dataset_id_to_contiguous_id": {c["id"]: i for c, i in pairs if not c["isthing"]},
    }


def _get_builtin_metadata(dataset_name: str) -> dict[str, Any]:
    """Metadata of a family of built-in datasets: ``coco``, ``coco_panoptic_standard``, ``coco_panoptic_separated``,
    ``cityscapes``.

    Raises:
        KeyError: another name.
    """
    if dataset_name == "coco":
        return _coco_things()
    if dataset_name == "coco_panoptic_standard":
        return panoptic_metadata(COCO_CATEGORIES, list(range(len(COCO_CATEGORIES))))
    if dataset_name == "coco_panoptic_separated":
        return _coco_panoptic_separated()
    if dataset_name == "cityscapes":
        return {
            "thing_classes": [c["name"] for c in CITYSCAPES_CATEGORIES if c["isthing"]],
            "stuff_classes": [c["name"] for c in CITYSCAPES_CATEGORIES],
        }
    raise KeyError(
        f"There is no built-in metadata for {dataset_name!r}; known: coco, coco_panoptic_standard, "
        "coco_panoptic_separated, cityscapes"
    )
