"""Cityscapes with fine annotations: panoptic segmentation."""

from __future__ import annotations

import os

from detectron2.data.catalog import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES, panoptic_metadata
from detectron2.data.datasets.cityscapes import how_to_make, list_cityscapes_images, require_label_train_ids
from detectron2.data.datasets.coco_panoptic import convert_segments
from detectron2.data.datasets.files import read_json, require_file
from detectron2.utils.file_io import PathManager

__all__ = ["load_cityscapes_panoptic", "register_all_cityscapes_panoptic"]


def load_cityscapes_panoptic(image_dir: str, gt_dir: str, gt_json: str, meta: dict) -> list[dict]:
    """Read Cityscapes in COCO's panoptic format, as ``csCreatePanopticImgs`` writes it.

    Args:
        image_dir: folder of a split, e.g. ``leftImg8bit/train``.
        gt_dir: folder of the panoptic PNGs, e.g. ``gtFine/cityscapes_panoptic_train``.
        gt_json: e.g. ``gtFine/cityscapes_panoptic_train.json``.
        meta: the two id maps, see :func:`detectron2.data.datasets.coco_panoptic.convert_segments`.

    Returns:
        dicts with ``file_name, image_id, sem_seg_file_name, pan_seg_file_name, segments_info`` (category ids are train
        ids).

    Raises:
        FileNotFoundError: a file or folder is missing; the message says how to make it.
        ValueError: an image has no annotation, or there is an unknown category id.
    """
    if not PathManager.isfile(gt_json) or not PathManager.isdir(gt_dir):
        raise FileNotFoundError(f"{gt_json} or {gt_dir} does not exist. {how_to_make('csCreatePanopticImgs')}")
    content = read_json(gt_json, "panoptic annotation file")
    annotation_of = {a["image_id"]: a for a in content["annotations"]}
    # The label maps lie in the folder of the split: gtFine/train beside leftImg8bit/train.
    label_root = os.path.join(os.path.dirname(os.path.normpath(gt_dir)), os.path.basename(os.path.normpath(image_dir)))
    dataset_dicts = []
    for city, name in list_cityscapes_images(image_dir):
        if name not in annotation_of:
            raise ValueError(f"{gt_json} has no annotation of the image {name}")
        annotation = annotation_of[name]
        dataset_dicts.append(
            {
                "file_name": os.path.join(image_dir, city, f"{name}_leftImg8bit.png"),
                "image_id": "_".join(name.split("_")[:3]),
                "sem_seg_file_name": os.path.join(label_root, city, f"{name}_gtFine_labelTrainIds.png"),
                "pan_seg_file_name": os.path.join(gt_dir, annotation["file_name"]),
                "segments_info": convert_segments(annotation["segments_info"], meta, f"{name} in {gt_json}"),
            }
        )
    require_label_train_ids(dataset_dicts[0]["sem_seg_file_name"])
    require_file(dataset_dicts[0]["pan_seg_file_name"], "panoptic PNG")
    return dataset_dicts


def register_all_cityscapes_panoptic(root: str) -> None:
    """Register ``cityscapes_fine_panoptic_{train,val}`` below the folder ``root``."""
    meta = panoptic_metadata(CITYSCAPES_CATEGORIES, [c["trainId"] for c in CITYSCAPES_CATEGORIES])
    for split in ("train", "val"):
        name = f"cityscapes_fine_panoptic_{split}"
        image_root = os.path.join(root, "cityscapes/leftImg8bit", split)
        gt_root = os.path.join(root, "cityscapes/gtFine")
        panoptic_root = os.path.join(gt_root, f"cityscapes_panoptic_{split}")
        panoptic_json = f"{panoptic_root}.json"

        def load(image_root=image_root, panoptic_root=panoptic_root, panoptic_json=panoptic_json) -> list[dict]:
            return load_cityscapes_panoptic(image_root, panoptic_root, panoptic_json, meta)

        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(
            panoptic_root=panoptic_root,
            image_root=image_root,
            panoptic_json=panoptic_json,
            gt_dir=os.path.join(gt_root, split),
            evaluator_type="cityscapes_panoptic_seg",
            ignore_label=255,
            label_divisor=1000,
            **meta,
        )
