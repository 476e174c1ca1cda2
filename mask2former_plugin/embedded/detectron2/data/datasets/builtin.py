"""Registers the built-in datasets COCO, LVIS v1, Cityscapes and ADE20K.

Their files are looked for below the folder that the environment variable DETECTRON2_DATASETS names (default
./datasets), when a dataset is loaded; registering touches no file.
"""

from __future__ import annotations

import functools
import os

from detectron2.data.catalog import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES, _get_builtin_metadata
from detectron2.data.datasets.cityscapes import load_cityscapes_instances, load_cityscapes_semantic
from detectron2.data.datasets.cityscapes_panoptic import register_all_cityscapes_panoptic
from detectron2.data.datasets.coco import load_sem_seg, register_coco_instances
from detectron2.data.datasets.coco_panoptic import register_coco_panoptic, register_coco_panoptic_separated
from detectron2.data.datasets.lvis import get_lvis_instances_meta, register_lvis_instances

_ANNOTATIONS = "coco/annotations"

# name: (folder of the images, annotation file)
_COCO_INSTANCES = {
    "coco_2014_train": ("coco/train2014", f"{_ANNOTATIONS}/instances_train2014.json"),
    "coco_2014_val": ("coco/val2014", f"{_ANNOTATIONS}/instances_val2014.json"),
    "coco_2014_minival": ("coco/val2014", f"{_ANNOTATIONS}/instances_minival2014.json"),
    "coco_2014_valminusminival": ("coco/val2014", f"{_ANNOTATIONS}/instances_valminusminival2014.json"),
    "coco_2017_train": ("coco/train2017", f"{_ANNOTATIONS}/instances_train2017.json"),
    "coco_2017_val": ("coco/val2017", f"{_ANNOTATIONS}/instances_val2017.json"),
    "coco_2017_test": ("coco/test2017", f"{_ANNOTATIONS}/image_info_test2017.json"),
    "coco_2017_test-dev": ("coco/test2017", f"{_ANNOTATIONS}/image_info_test-dev2017.json"),
    "coco_2017_val_100": ("coco/val2017", f"{_ANNOTATIONS}/instances_val2017_100.json"),
}

# name of the panoptic dataset: (name of the instance dataset of the same images, suffix of its panoptic files)
_COCO_PANOPTIC = {
    "coco_2017_train_panoptic": ("coco_2017_train", "train2017"),
    "coco_2017_val_panoptic": ("coco_2017_val", "val2017"),
    "coco_2017_val_100_panoptic": ("coco_2017_val_100", "val2017_100"),
}


def register_all_coco(root: str) -> None:
    """COCO 2014 and 2017: instances; 2017 also panoptic, as PNGs and as instances plus stuff label maps."""
    for name, (image_root, json_file) in _COCO_INSTANCES.items():
        register_coco_instances(
            name, _get_builtin_metadata("coco"), os.path.join(root, json_file), os.path.join(root, image_root)
        )
    for name, (instances, suffix) in _COCO_PANOPTIC.items():
        image_root, json_file = (os.path.join(root, p) for p in _COCO_INSTANCES[instances])
        panoptic_root = os.path.join(root, f"coco/panoptic_{suffix}")
        panoptic_json = os.path.join(root, f"{_ANNOTATIONS}/panoptic_{suffix}.json")
        register_coco_panoptic_separated(
            name,
            _get_builtin_metadata("coco_panoptic_separated"),
            image_root,
            panoptic_root,
            panoptic_json,
            os.path.join(root, f"coco/panoptic_stuff_{suffix}"),
            json_file,
        )
        register_coco_panoptic(
            name, _get_builtin_metadata("coco_panoptic_standard"), image_root, panoptic_root, panoptic_json, json_file
        )


def register_all_lvis(root: str) -> None:
    """LVIS v1, on COCO's images of 2017."""
    for split in ("train", "val", "image_info_test_dev", "image_info_test_challenge"):
        name = f"lvis_v1_{split.removeprefix('image_info_')}"
        # The trailing slash is part of upstream's metadata.
        annotations, images = os.path.join(root, f"lvis/lvis_v1_{split}.json"), os.path.join(root, "coco/")
        register_lvis_instances(name, get_lvis_instances_meta(name), annotations, images)


def register_all_cityscapes(root: str) -> None:
    """Cityscapes with fine annotations: instances and semantic segmentation."""
    metadata = _get_builtin_metadata("cityscapes")
    for split in ("train", "val", "test"):
        # The trailing slash is part of upstream's metadata.
        folders = {
            "image_dir": os.path.join(root, f"cityscapes/leftImg8bit/{split}/"),
            "gt_dir": os.path.join(root, f"cityscapes/gtFine/{split}/"),
        }
        name = f"cityscapes_fine_instance_seg_{split}"
        DatasetCatalog.register(name, functools.partial(load_cityscapes_instances, **folders))
        MetadataCatalog.get(name).set(evaluator_type="cityscapes_instance", **folders, **metadata)
        name = f"cityscapes_fine_sem_seg_{split}"
        DatasetCatalog.register(name, functools.partial(load_cityscapes_semantic, **folders))
        MetadataCatalog.get(name).set(evaluator_type="cityscapes_sem_seg", ignore_label=255, **folders, **metadata)


def register_all_ade20k(root: str) -> None:
    """ADE20K's scene parsing benchmark, with label maps as datasets/prepare_ade20k_sem_seg.py makes them."""
    for split, folder in (("train", "training"), ("val", "validation")):
        image_root = os.path.join(root, "ADEChallengeData2016/images", folder)
        sem_seg_root = os.path.join(root, "ADEChallengeData2016/annotations_detectron2", folder)
        name = f"ade20k_sem_seg_{split}"
        DatasetCatalog.register(
            name, functools.partial(load_sem_seg, sem_seg_root, image_root, gt_ext="png", image_ext="jpg")
        )
        MetadataCatalog.get(name).set(
            stuff_classes=list(ADE20K_SEM_SEG_CATEGORIES),
            image_root=image_root,
            sem_seg_root=sem_seg_root,
            evaluator_type="sem_seg",
            ignore_label=255,
        )


def _register_all(root: str) -> None:
    register_all_coco(root)
    register_all_lvis(root)
    register_all_cityscapes(root)
    register_all_cityscapes_panoptic(root)
    register_all_ade20k(root)


_register_all(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
