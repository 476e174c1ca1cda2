"""Loaders and registration of datasets in common formats, and the built-in datasets."""

from detectron2.data.datasets.coco import convert_to_coco_json, load_coco_json, load_sem_seg, register_coco_instances
from detectron2.data.datasets.coco_panoptic import register_coco_panoptic, register_coco_panoptic_separated
from detectron2.data.datasets.lvis import get_lvis_instances_meta, load_lvis_json, register_lvis_instances
from detectron2.data.datasets.upstream_only import load_voc_instances, register_pascal_voc

from detectron2.data.datasets import builtin  # isort: skip  (registers the built-in datasets with the functions above)

__all__ = [
    "builtin",
    "convert_to_coco_json",
    "get_lvis_instances_meta",
    "load_coco_json",
    "load_lvis_json",
    "load_sem_seg",
    "load_voc_instances",
    "register_coco_instances",
    "register_coco_panoptic",
    "register_coco_panoptic_separated",
    "register_lvis_instances",
    "register_pascal_voc",
]
