"""COCO's panoptic format: one RGB PNG of segment ids per image, and a JSON file that describes the segments."""

from __future__ import annotations

import os
from typing import Any

from detectron2.data.catalog import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json, load_sem_seg
from detectron2.data.datasets.files import read_json, require_file, require_folder

__all__ = ["load_coco_panoptic_json", "merge_to_panoptic", "register_coco_panoptic", "register_coco_panoptic_separated"]


def convert_segments(segments_info: list[dict], meta: dict, where: str) -> list[dict]:
    """Segments with contiguous category ids and a bool ``isthing``; the given ones are left as they are.

    Args:
        segments_info: of the JSON file.
        meta: with ``thing_dataset_id_to_contiguous_id`` and ``stuff_dataset_id_to_contiguous_id``.
        where: start of the error message.

    Raises:
        ValueError: a category id is in neither map.
    """
    things, stuff = meta["thing_dataset_id_to_contiguous_id"], meta["stuff_dataset_id_to_contiguous_id"]
    converted = []
    for segment in segments_info:
        category_id = segment["category_id"]
        isthing = category_id in things
        if not isthing and category_id not in stuff:
            raise ValueError(
                f"{where} has a segment of category id {category_id}, which is in neither map of the metadata "
                f"(things: {sorted(things)}, stuff: {sorted(stuff)})"
            )
        converted.append({**segment, "category_id": (things if isthing else stuff)[category_id], "isthing": isthing})
    return converted


def load_coco_panoptic_json(json_file: str, image_dir: str, gt_dir: str, meta: dict) -> list[dict]:
    """Read a COCO panoptic file into dataset dicts.

    Args:
        json_file: path.
        image_dir: folder of the images. Their names come from ``images`` in the file; images that are not listed there
            have the name of the PNG with the extension jpg.
        gt_dir: folder of the PNGs.
        meta: the two id maps, see :func:`convert_segments`.

    Returns:
        dicts with ``file_name, image_id, pan_seg_file_name, segments_info``.

    Raises:
        FileNotFoundError: file, folder, or the first image or PNG is missing.
        ValueError: the file is empty, or has an unknown category id.
    """
    content = read_json(json_file, "panoptic annotation file")
    if not isinstance(content, dict) or "annotations" not in content:
        raise ValueError(f"{json_file} is not a COCO panoptic file: it has no 'annotations'")
    require_folder(image_dir, "image folder")
    require_folder(gt_dir, "folder of panoptic PNGs")
    image_names = {image["id"]: image["file_name"] for image in content.get("images", [])}
    dataset_dicts = []
    for annotation in content["annotations"]:
        png = annotation["file_name"]
        image_id = annotation["image_id"]
        image_name = image_names.get(image_id, os.path.splitext(png)[0] + ".jpg")
        dataset_dicts.append(
            {
                "file_name": os.path.join(image_dir, image_name),
                "image_id": int(image_id) if str(image_id).isdigit() else image_id,
                "pan_seg_file_name": os.path.join(gt_dir, png),
                "segments_info": convert_segments(annotation["segments_info"], meta, f"{png} in {json_file}"),
            }
        )
    if not dataset_dicts:
        raise ValueError(f"{json_file} has no annotations")
    require_file(dataset_dicts[0]["file_name"], "image")
    require_file(dataset_dicts[0]["pan_seg_file_name"], "panoptic PNG")
    return dataset_dicts


def register_coco_panoptic(
    name: str,
    metadata: dict[str, Any],
    image_root: str,
    panoptic_root: str,
    panoptic_json: str,
    instances_json: str | None = None,
) -> None:
    """Register a COCO panoptic dataset.

    Args:
        name: of the dataset.
        metadata: class names and the two id maps, see :func:`convert_segments`.
        image_root, panoptic_root, panoptic_json: see :func:`load_coco_panoptic_json`.
        instances_json: COCO instance file of the same images, for the evaluation of instances.
    """
    DatasetCatalog.register(name, lambda: load_coco_panoptic_json(panoptic_json, image_root, panoptic_root, metadata))
    MetadataCatalog.get(name).set(
        panoptic_root=panoptic_root,
        image_root=image_root,
        panoptic_json=panoptic_json,
        json_file=instances_json,
        evaluator_type="coco_panoptic_seg",
        ignore_label=255,
        label_divisor=1000,
        **metadata,
    )


def register_coco_panoptic_separated(
    name: str,
    metadata: dict[str, Any],
    image_root: str,
    panoptic_root: str,
    panoptic_json: str,
    sem_seg_root: str,
    instances_json: str,
) -> None:
    """Register a panoptic dataset whose things come as instances and whose stuff comes as label maps.

    Two datasets are made: ``<name>_separated`` with both, and ``<name>_stuffonly`` with the label maps only.

    Args:
        name, metadata, image_root, panoptic_root, panoptic_json, instances_json: see :func:`register_coco_panoptic`.
        sem_seg_root: folder of the label maps of stuff classes.
    """
    both, stuff = f"{name}_separated", f"{name}_stuffonly"
    DatasetCatalog.register(
        both,
        lambda: merge_to_panoptic(
            load_coco_json(instances_json, image_root, both), load_sem_seg(sem_seg_root, image_root)
        ),
    )
    MetadataCatalog.get(both).set(
        panoptic_root=panoptic_root,
        image_root=image_root,
        panoptic_json=panoptic_json,
        sem_seg_root=sem_seg_root,
        json_file=instances_json,
        evaluator_type="coco_panoptic_seg",
        ignore_label=255,
        **metadata,
    )
    DatasetCatalog.register(stuff, lambda: load_sem_seg(sem_seg_root, image_root))
    MetadataCatalog.get(stuff).set(
        sem_seg_root=sem_seg_root,
        image_root=image_root,
        evaluator_type="sem_seg",
        ignore_label=255,
        **metadata,
    )


def merge_to_panoptic(detection_dicts: list[dict], sem_seg_dicts: list[dict]) -> list[dict]:
    """Join two lists of dataset dicts of the same images by ``file_name``.

    Args:
        detection_dicts: with ``annotations``; their order stays.
        sem_seg_dicts: with ``sem_seg_file_name``; there must be one for each of ``detection_dicts``.

    Raises:
        ValueError: an image has no label map, or there is nothing to join.
    """
    if not sem_seg_dicts:
        raise ValueError("There are no label maps to join with the instances")
    label_of = {d["file_name"]: d for d in sem_seg_dicts}
    for d in detection_dicts:
        if d["file_name"] not in label_of:
            raise ValueError(f"Image {d['file_name']} has instances but no label map")
    return [{**d, **label_of[d["file_name"]]} for d in detection_dicts]
