"""LVIS v1: its instance files, classes and registration."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from typing import Any, Sequence

from detectron2.data.catalog import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import LVIS_V1_CLASSES, LVIS_V1_IMAGE_COUNTS
from detectron2.data.datasets.files import read_json
from detectron2.structures import BoxMode
from detectron2.utils.missing import needs_upstream

logger = logging.getLogger(__name__)


def get_lvis_instances_meta(dataset_name: str) -> dict[str, Any]:
    """``thing_classes`` (1203) and ``class_image_count`` (``id, image_count`` in the training images) of LVIS v1.

    Raises:
        ValueError: the name is not that of an LVIS dataset.
    """
    if "cocofied" in dataset_name or "v0.5" in dataset_name:
        needs_upstream("LVIS v0.5 and LVIS with COCO's classes")
    if "v1" not in dataset_name:
        raise ValueError(f"There is no built-in metadata for {dataset_name!r}; here are the classes of lvis_v1_* only")
    return {
        "thing_classes": list(LVIS_V1_CLASSES),
        "class_image_count": [{"id": i, "image_count": n} for i, n in enumerate(LVIS_V1_IMAGE_COUNTS, start=1)],
    }


def load_lvis_json(
    json_file: str,
    image_root: str,
    dataset_name: str | None = None,
    extra_annotation_keys: Sequence[str] | None = None,
) -> list[dict]:
    """Read an LVIS instance file into dataset dicts.

    Args:
        json_file: path.
        image_root: folder of COCO's images; the last two parts of an image's ``coco_url`` are its path below it.
        dataset_name: if given, the metadata of this dataset gets LVIS' classes (see :func:`get_lvis_instances_meta`).
        extra_annotation_keys: further keys of the annotations to keep, besides box, mask and category.

    Returns:
        dicts in the order of the image ids: ``file_name, height, width, image_id, not_exhaustive_category_ids,
        neg_category_ids, annotations``, each annotation with ``bbox`` (with ``bbox_mode`` XYWH_ABS), ``category_id``
        from 0, and ``segmentation`` (polygons). The category ids per image are those of the file, from 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file breaks the format.
    """
    if dataset_name is not None:
        MetadataCatalog.get(dataset_name).set(**get_lvis_instances_meta(dataset_name))
    content = read_json(json_file)
    if not isinstance(content, dict) or "images" not in content:
        raise ValueError(f"{json_file} is not an LVIS file: it has no 'images'")
    keys = ["bbox", "category_id", *(extra_annotation_keys or ())]
    annotations_of: dict[Any, list[dict]] = defaultdict(list)
    for annotation in content.get("annotations", []):
        annotations_of[annotation["image_id"]].append(_convert_annotation(annotation, keys, json_file))
    dataset_dicts = []
    for image in sorted(content["images"], key=lambda image: image["id"]):
        if "coco_url" not in image:
            raise ValueError(f"{json_file}: image {image['id']} has no coco_url; the files of LVIS v1 have it")
        dataset_dicts.append(
            {
                "file_name": os.path.join(image_root, *image["coco_url"].split("/")[-2:]),
                "height": image["height"],
                "width": image["width"],
                "image_id": image["id"],
                "not_exhaustive_category_ids": image.get("not_exhaustive_category_ids", []),
                "neg_category_ids": image.get("neg_category_ids", []),
                "annotations": annotations_of[image["id"]],
            }
        )
    logger.info("Loaded %d images in LVIS format from %s", len(dataset_dicts), json_file)
    return dataset_dicts


def _convert_annotation(annotation: dict, keys: Sequence[str], json_file: str) -> dict:
    polygons = annotation["segmentation"]
    if not polygons or any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
        raise ValueError(f"{json_file}: annotation {annotation['id']} has no polygon, or one of less than three points")
    obj = {key: annotation[key] for key in keys}
    return obj | {"bbox_mode": BoxMode.XYWH_ABS, "category_id": obj["category_id"] - 1, "segmentation": polygons}


def register_lvis_instances(name: str, metadata: dict, json_file: str, image_root: str) -> None:
    """Register an LVIS instance file as a dataset.

    Args:
        name: of the dataset.
        metadata: further metadata; may be empty.
        json_file, image_root: see :func:`load_lvis_json`.
    """
    DatasetCatalog.register(name, lambda: load_lvis_json(json_file, image_root, name))
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="lvis", **metadata)
