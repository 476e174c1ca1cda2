"""Datasets of the published configs that Detectron2 does not register itself, under the published names.

Nothing is read before a dataset is used. The layout below ``$DETECTRON2_DATASETS`` is the published one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, load_sem_seg
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from mask2former_plugin.data.datasets.panoptic_json import PanopticClasses, load_panoptic_json
from mask2former_plugin.data.datasets.paths import datasets_root

IGNORE_LABEL = 255
ADE20K_FULL_IGNORE_LABEL = 65535
MAPILLARY_IGNORE_LABEL = 65  # the class "Unlabeled" of the label files
LABEL_DIVISOR = 1000
_SPLITS = {"train": "training", "val": "validation"}  # folders of ADE20K and Mapillary


def register_published_datasets(root: Path | None = None) -> None:
    """Register what is not registered yet; ``root`` defaults to ``$DETECTRON2_DATASETS``."""
    root = datasets_root() if root is None else root
    _register_ade20k(root / "ADEChallengeData2016")
    _register_ade20k_full(root / "ADE20K_2021_17_01")
    _register_coco_panoptic(root / "coco")
    _register_coco_stuff_10k(root / "coco/coco_stuff_10k")
    _register_mapillary(root / "mapillary_vistas")


def _add(name: str, loader: Callable[[], list[dict[str, Any]]], **metadata: Any) -> None:
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, loader)
        MetadataCatalog.get(name).set(**metadata)


def _add_semantic(name: str, images: Path, labels: Path, extension: str = "png", **metadata: Any) -> None:
    loader = partial(load_sem_seg, str(labels), str(images), gt_ext=extension, image_ext="jpg")
    _add(name, loader, image_root=str(images), sem_seg_root=str(labels), evaluator_type="sem_seg", **metadata)


def _add_panoptic(
    name: str,
    images: Path,
    panoptic_root: Path,
    panoptic_json: Path,
    sem_seg_root: Path,
    **metadata: Any,
) -> None:
    loader = partial(
        load_panoptic_json,
        panoptic_json,
        images,
        panoptic_root,
        metadata["thing_dataset_id_to_contiguous_id"],
        metadata["stuff_dataset_id_to_contiguous_id"],
        sem_seg_root,
    )
    _add(
        name,
        loader,
        image_root=str(images),
        panoptic_root=str(panoptic_root),
        panoptic_json=str(panoptic_json),
        sem_seg_root=str(sem_seg_root),
        label_divisor=LABEL_DIVISOR,
        **metadata,
    )


def dataset_facts(name: str) -> dict[str, Any]:
    """Classes, colours and ids of ``ade20k``, ``ade20k_full``, ``coco_stuff_10k`` or ``mapillary_vistas``."""
    return json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))


def _register_ade20k(root: Path) -> None:
    facts = dataset_facts("ade20k")
    things = facts["thing_ids"]
    panoptic = {
        "thing_classes": [facts["classes"][i] for i in things],
        "thing_colors": [facts["colors"][i] for i in things],
        "stuff_classes": facts["classes"],
        "stuff_colors": facts["colors"],
        "thing_dataset_id_to_contiguous_id": {i: i for i in things},
        "stuff_dataset_id_to_contiguous_id": {i: i for i in range(len(facts["classes"]))},
    }
    for split, folder in _SPLITS.items():
        images, instances = root / "images" / folder, root / f"ade20k_instance_{split}.json"
        _add_panoptic(
            f"ade20k_panoptic_{split}",
            images,
            root / f"ade20k_panoptic_{split}",
            root / f"ade20k_panoptic_{split}.json",
            root / "annotations_detectron2" / folder,
            json_file=str(instances),
            evaluator_type="ade20k_panoptic_seg",
            ignore_label=IGNORE_LABEL,
            **panoptic,
        )
        name = f"ade20k_instance_{split}"
        _add(
            name,
            partial(load_coco_json, str(instances), str(images), name),
            json_file=str(instances),
            image_root=str(images),
            evaluator_type="coco",
            thing_classes=facts["instance_classes"],
            thing_dataset_id_to_contiguous_id={dataset_id: index for index, dataset_id in enumerate(things)},
        )
        semantic = MetadataCatalog.get(f"ade20k_sem_seg_{split}")  # Detectron2's own, which has no colours
        if semantic.get("stuff_colors") is None:
            semantic.stuff_colors = facts["colors"]


def _register_ade20k_full(root: Path) -> None:
    classes = dataset_facts("ade20k_full")["classes"]
    for split, folder in _SPLITS.items():
        images, labels = root / "images_detectron2" / folder, root / "annotations_detectron2" / folder
        _add_semantic(
            f"ade20k_full_sem_seg_{split}",
            images,
            labels,
            "tif",
            stuff_classes=classes,
            ignore_label=ADE20K_FULL_IGNORE_LABEL,
        )


def _register_coco_panoptic(root: Path) -> None:
    classes = PanopticClasses.from_categories(COCO_CATEGORIES, "COCO_CATEGORIES")
    colors = [category["color"] for category in classes.all]
    for split in ("train", "val"):
        _add_panoptic(
            f"coco_2017_{split}_panoptic_with_sem_seg",
            root / f"{split}2017",
            root / f"panoptic_{split}2017",
            root / f"annotations/panoptic_{split}2017.json",
            root / f"panoptic_semseg_{split}2017",
            json_file=str(root / f"annotations/instances_{split}2017.json"),
            evaluator_type="coco_panoptic_seg",
            ignore_label=IGNORE_LABEL,
            thing_colors=colors[: len(classes.things)],
            stuff_colors=colors,
            **classes.metadata(),
        )


def _register_coco_stuff_10k(root: Path) -> None:
    facts = dataset_facts("coco_stuff_10k")
    for split in ("train", "test"):
        _add_semantic(
            f"coco_2017_{split}_stuff_10k_sem_seg",
            root / f"images_detectron2/{split}",
            root / f"annotations_detectron2/{split}",
            stuff_classes=facts["classes"],
            stuff_dataset_id_to_contiguous_id={dataset_id: index for index, dataset_id in enumerate(facts["ids"])},
            ignore_label=IGNORE_LABEL,
        )


def _register_mapillary(root: Path) -> None:
    facts = dataset_facts("mapillary_vistas")
    classes, colors = facts["classes"], facts["colors"]
    contiguous = {index + 1: index for index in range(len(classes))}
    for split, folder in _SPLITS.items():
        images, labels, panoptic_root = (root / folder / part for part in ("images", "labels", "panoptic"))
        _add_semantic(
            f"mapillary_vistas_sem_seg_{split}",
            images,
            labels,
            stuff_classes=classes,
            stuff_colors=colors,
            ignore_label=MAPILLARY_IGNORE_LABEL,
        )
        _add_panoptic(
            f"mapillary_vistas_panoptic_{split}",
            images,
            panoptic_root,
            panoptic_root / "panoptic_2018.json",
            labels,
            # the published registration has none: its preparation script is missing
            json_file=str(root / f"mapillary_vistas_instance_{split}.json"),
            evaluator_type="mapillary_vistas_panoptic_seg",
            ignore_label=MAPILLARY_IGNORE_LABEL,
            thing_classes=classes,
            thing_colors=colors,
            stuff_classes=classes,
            stuff_colors=colors,
            thing_dataset_id_to_contiguous_id={dataset_id: contiguous[dataset_id] for dataset_id in facts["thing_ids"]},
            stuff_dataset_id_to_contiguous_id=contiguous,
        )
