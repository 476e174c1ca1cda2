"""COCO's instance format, read and written, and semantic segmentation as folders of images and label maps."""

from __future__ import annotations

import datetime
import json
import logging
import os
from collections import defaultdict
from typing import Any, Sequence

import numpy as np
import pycocotools.mask as mask_util
from iopath.common.file_io import file_lock

from detectron2.data.catalog import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.files import read_json, require_folder
from detectron2.structures import BoxMode, PolygonMasks
from detectron2.utils.file_io import PathManager

__all__ = [
    "convert_to_coco_dict",
    "convert_to_coco_json",
    "load_coco_json",
    "load_sem_seg",
    "register_coco_instances",
]

logger = logging.getLogger(__name__)


def load_coco_json(
    json_file: str,
    image_root: str,
    dataset_name: str | None = None,
    extra_annotation_keys: Sequence[str] | None = None,
) -> list[dict]:
    """Read a COCO instance file into dataset dicts.

    Args:
        json_file: path.
        image_root: folder of the images; their ``file_name`` is relative to it.
        dataset_name: if given, category ids become contiguous (0 to K-1 in the order of the ids), and ``thing_classes``
            and ``thing_dataset_id_to_contiguous_id`` are put into the metadata of this dataset.
        extra_annotation_keys: further keys of the annotations to keep, besides box, mask, category and ``iscrowd``.

    Returns:
        dicts in the order of the image ids: ``file_name, height, width, image_id, annotations``, each annotation with
        ``iscrowd``, ``bbox`` (with ``bbox_mode`` XYWH_ABS), ``category_id`` and, where it has a mask, ``segmentation``
        (polygons or compressed RLE). Polygons of less than three points are left out, and instances that have no
        polygon left.

    Raises:
        FileNotFoundError: the file or the folder is missing.
        ValueError: the file breaks the format; the message has the file and the ids.
    """
    content = read_json(json_file)
    for key in ("images", "categories"):
        if not isinstance(content, dict) or key not in content:
            raise ValueError(f"{json_file} is not a COCO instance file: it has no {key!r}")
    if image_root:
        require_folder(image_root, "image folder")
    category_ids = {c["id"]: c["id"] for c in content["categories"]}
    if dataset_name is not None:
        category_ids = _set_thing_metadata(dataset_name, content["categories"])

    annotations_of: dict[Any, list[dict]] = defaultdict(list)
    annotations = content.get("annotations", [])
    _check_annotation_ids(annotations, json_file)
    for annotation in annotations:
        _require_keys(annotation, ("image_id", "category_id"), "annotation", json_file)
        annotations_of[annotation["image_id"]].append(annotation)

    keys = ["iscrowd", "bbox", "category_id", *(extra_annotation_keys or ())]
    dataset_dicts = []
    n_invalid = 0
    for image in content["images"]:
        _require_keys(image, ("id", "file_name", "height", "width"), "image", json_file)
    for image in sorted(content["images"], key=lambda image: image["id"]):
        objects = []
        for annotation in annotations_of.pop(image["id"], []):
            obj = _convert_annotation(annotation, keys, category_ids, json_file)
            if obj is None:
                n_invalid += 1
            else:
                objects.append(obj)
        dataset_dicts.append(
            {
                "file_name": os.path.join(image_root, image["file_name"]),
                "height": image["height"],
                "width": image["width"],
                "image_id": image["id"],
                "annotations": objects,
            }
        )
    if n_invalid:
        logger.warning("%s: left out %d instances without a polygon of three or more points", json_file, n_invalid)
    if annotations_of:
        logger.warning(
            "%s: left out the annotations of %d image ids that are not among its images, e.g. %s",
            json_file, len(annotations_of), next(iter(annotations_of)),
        )  # fmt: skip
    logger.info("Loaded %d images in COCO format from %s", len(dataset_dicts), json_file)
    return dataset_dicts


def _require_keys(entry: dict, keys: Sequence[str], kind: str, json_file: str) -> None:
    missing = [key for key in keys if key not in entry]
    if missing:
        raise ValueError(f"{json_file}: the {kind} with the id {entry.get('id', '(none)')} has no {', '.join(missing)}")


def _set_thing_metadata(dataset_name: str, categories: list[dict]) -> dict[int, int]:
    """Put the classes into the dataset's metadata; returns the map of category ids to contiguous ids."""
    categories = sorted(categories, key=lambda c: c["id"])
    contiguous = {c["id"]: i for i, c in enumerate(categories)}
    MetadataCatalog.get(dataset_name).set(
        thing_classes=[c["name"] for c in categories],
        thing_dataset_id_to_contiguous_id=contiguous,
    )
    return contiguous


def _check_annotation_ids(annotations: list[dict], json_file: str) -> None:
    seen = set()
    for annotation in annotations:
        if "id" not in annotation:
            continue
        if annotation["id"] in seen:
            raise ValueError(f"{json_file} has several annotations with the id {annotation['id']}; ids must be unique")
        seen.add(annotation["id"])


def _convert_annotation(
    annotation: dict, keys: Sequence[str], category_ids: dict[int, int], json_file: str
) -> dict | None:
    """One annotation of the file to one of a dataset dict, or None if it has polygons but no valid one."""
    where = f"Annotation {annotation.get('id', '(without id)')} of image {annotation['image_id']} in {json_file}"
    if annotation.get("ignore", 0):
        raise ValueError(
            f"{where} has the flag 'ignore', which is not part of COCO's format; use 'iscrowd' or leave it out"
        )
    if annotation["category_id"] not in category_ids:
        known = sorted(category_ids)
        raise ValueError(
            f"{where} has the category id {annotation['category_id']}, which is not among the categories of the file "
            f"({len(known)} ids{f' from {known[0]} to {known[-1]}' if known else ''})"
        )
    obj = {key: annotation[key] for key in keys if key in annotation}
    if "bbox" in obj and len(obj["bbox"]) != 4:
        raise ValueError(f"{where} has the box {obj['bbox']}; a box must be [x, y, width, height]")
    obj["bbox_mode"] = BoxMode.XYWH_ABS
    obj["category_id"] = category_ids[annotation["category_id"]]
    segmentation = annotation.get("segmentation")
    if segmentation:
        if isinstance(segmentation, dict):
            if isinstance(segmentation["counts"], list):
                segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
        else:
            segmentation = [p for p in segmentation if len(p) % 2 == 0 and len(p) >= 6]
            if not segmentation:
                return None
        obj["segmentation"] = segmentation
    return obj


def load_sem_seg(gt_root: str, image_root: str, gt_ext: str = "png", image_ext: str = "jpg") -> list[dict]:
    """Pair the images of one folder with the label maps of another by their names without extension.

    Args:
        gt_root, image_root: folders (not searched recursively).
        gt_ext, image_ext: extensions of the files.

    Returns:
        dicts with ``file_name`` and ``sem_seg_file_name``, ordered by name. Files without a partner are left out with a
        warning.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: there are no pairs.
    """
    require_folder(image_root, "image folder")
    require_folder(gt_root, "folder of label maps")
    images = _files_by_stem(image_root, image_ext)
    labels = _files_by_stem(gt_root, gt_ext)
    stems = sorted(images.keys() & labels.keys())
    if not stems:
        raise ValueError(
            f"No pairs of images and label maps: {len(images)} files *.{image_ext} in {image_root} and {len(labels)} "
            f"files *.{gt_ext} in {gt_root} have no names in common"
        )
    if len(stems) < max(len(images), len(labels)):
        logger.warning(
            "%d images in %s and %d label maps in %s: using the %d pairs",
            len(images),
            image_root,
            len(labels),
            gt_root,
            len(stems),
        )
    logger.info("Loaded %d images with semantic segmentation from %s", len(stems), image_root)
    return [{"file_name": images[s], "sem_seg_file_name": labels[s]} for s in stems]


def _files_by_stem(folder: str, extension: str) -> dict[str, str]:
    names = [name for name in PathManager.ls(folder) if name.endswith(extension)]
    return {os.path.splitext(name)[0]: os.path.join(folder, name) for name in names}


def convert_to_coco_dict(dataset_name: str) -> dict:
    """A registered instance dataset as the content of a COCO file.

    Category ids are the original ones if the metadata has ``thing_dataset_id_to_contiguous_id``; boxes are XYWH rounded
    to three digits; areas are those of the masks, or of the boxes where there is no mask; annotation ids count from 1.

    Returns:
        dict with ``info, images, categories, annotations`` (and ``licenses``: None) that ``json.dump`` can write.
    """
    dataset_dicts = DatasetCatalog.get(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    original_ids = {v: k for k, v in (metadata.get("thing_dataset_id_to_contiguous_id") or {}).items()}
    images, annotations = [], []
    for i, d in enumerate(dataset_dicts):
        image_id = d.get("image_id", i)
        images.append(
            {"id": image_id, "width": int(d["width"]), "height": int(d["height"]), "file_name": str(d["file_name"])}
        )
        for a in d.get("annotations", []):
            category_id = int(a["category_id"])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": original_ids.get(category_id, category_id),
                    "iscrowd": int(a.get("iscrowd", 0)),
                    **_geometry_to_coco(a),
                }
            )
    return {
        "info": {
            "date_created": str(datetime.datetime.now()),
            "description": f"Dataset {dataset_name}, converted from Detectron2's format",
        },
        "images": images,
        "categories": [{"id": original_ids.get(i, i), "name": n} for i, n in enumerate(metadata.thing_classes)],
        "annotations": annotations,
        "licenses": None,
    }


def _geometry_to_coco(annotation: dict) -> dict[str, Any]:
    """``bbox``, ``area`` and, if there is one, ``segmentation`` of an annotation."""
    bbox = [float(x) for x in annotation["bbox"]]
    # a rotated box keeps its five numbers; width and height are at the same place
    mode = BoxMode.XYWHA_ABS if len(bbox) == 5 else BoxMode.XYWH_ABS
    bbox = BoxMode.convert(bbox, BoxMode(annotation["bbox_mode"]), mode)
    result: dict[str, Any] = {"bbox": [round(x, 3) for x in bbox], "area": bbox[2] * bbox[3]}
    segmentation = annotation.get("segmentation")
    if segmentation is None:
        return result
    if isinstance(segmentation, list):
        polygons = [[float(x) for x in np.ravel(p)] for p in segmentation]
        return result | {"area": float(PolygonMasks([polygons]).area()[0]), "segmentation": polygons}
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
        counts = segmentation["counts"]
        rle = {
            "size": [int(x) for x in segmentation["size"]],
            "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
        }
        return result | {"area": float(mask_util.area(segmentation)), "segmentation": rle}
    raise TypeError(f"A segmentation must be a list of polygons or an RLE dict, got {type(segmentation).__name__}")


def convert_to_coco_json(dataset_name: str, output_file: str, allow_cached: bool = True) -> None:
    """Write a registered instance dataset as a COCO file (see :func:`convert_to_coco_dict`).

    Several processes may call this at the same time; the file appears complete or not at all.

    Args:
        dataset_name: name in the catalog.
        output_file: path on this machine.
        allow_cached: leave the file as it is if it exists.
    """
    os.makedirs(os.path.dirname(output_file) or ".", exist_ok=True)
    with file_lock(output_file):
        if allow_cached and os.path.exists(output_file):
            logger.warning(
                "Using the existing %s for dataset %s; delete it if the dataset has changed", output_file, dataset_name
            )
            return
        content = convert_to_coco_dict(dataset_name)
        temporary = f"{output_file}.tmp"
        with open(temporary, "w", encoding="utf-8") as f:
            json.dump(content, f)
        os.replace(temporary, output_file)
    logger.info("Wrote %d annotations of dataset %s to %s", len(content["annotations"]), dataset_name, output_file)


def register_coco_instances(name: str, metadata: dict, json_file: str, image_root: str) -> None:
    """Register a COCO instance file as a dataset.

    Args:
        name: of the dataset. If it is registered already, only the metadata is added.
        metadata: further metadata; may be empty.
        json_file, image_root: see :func:`load_coco_json`.
    """
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, lambda: load_coco_json(json_file, image_root, name))
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="coco", **metadata)
