"""Registrations under the published names: metadata, and loading from a tiny tree of the published layout."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES, COCO_CATEGORIES
from PIL import Image

from mask2former_plugin.data.datasets import register_published_datasets
from mask2former_plugin.data.datasets.custom import num_dataset_classes

# name without split: (splits, evaluator_type, number of model classes, things, ignore label)
PUBLISHED = {
    "ade20k_panoptic": (("train", "val"), "ade20k_panoptic_seg", 150, 100, 255),
    "ade20k_instance": (("train", "val"), "coco", 100, 100, None),
    "ade20k_full_sem_seg": (("train", "val"), "sem_seg", 847, None, 65535),
    "mapillary_vistas_sem_seg": (("train", "val"), "sem_seg", 65, None, 65),
    "mapillary_vistas_panoptic": (("train", "val"), "mapillary_vistas_panoptic_seg", 65, 37, 65),
}
NAMES = {f"{name}_{split}": facts[1:] for name, facts in PUBLISHED.items() for split in facts[0]}
NAMES |= {f"coco_2017_{split}_panoptic_with_sem_seg": ("coco_panoptic_seg", 133, 80, 255) for split in ("train", "val")}
NAMES |= {f"coco_2017_{split}_stuff_10k_sem_seg": ("sem_seg", 171, None, 255) for split in ("train", "test")}


@pytest.mark.parametrize("name", NAMES)
def test_metadata(name):
    evaluator_type, classes, things, ignore_label = NAMES[name]
    assert name in DatasetCatalog
    metadata = MetadataCatalog.get(name)
    assert metadata.evaluator_type == evaluator_type
    assert num_dataset_classes(metadata) == classes
    assert metadata.get("ignore_label") == ignore_label
    if things is not None:
        assert len(metadata.thing_dataset_id_to_contiguous_id) == things


def test_names_and_ids():
    ade = MetadataCatalog.get("ade20k_panoptic_val")
    assert ade.stuff_classes == list(ADE20K_SEM_SEG_CATEGORIES)
    assert [ade.stuff_classes[i] for i in ade.thing_dataset_id_to_contiguous_id] == ade.thing_classes
    assert ade.stuff_dataset_id_to_contiguous_id == {i: i for i in range(150)} and len(ade.stuff_colors) == 150
    ids = MetadataCatalog.get("ade20k_instance_val").thing_dataset_id_to_contiguous_id
    assert list(ids) == list(ade.thing_dataset_id_to_contiguous_id) and list(ids.values()) == list(range(100))
    assert MetadataCatalog.get("ade20k_sem_seg_val").stuff_colors == ade.stuff_colors

    coco = MetadataCatalog.get("coco_2017_val_panoptic_with_sem_seg")
    assert coco.stuff_classes == [c["name"] for c in COCO_CATEGORIES]
    assert coco.thing_classes == [c["name"] for c in COCO_CATEGORIES[:80]]
    assert coco.stuff_dataset_id_to_contiguous_id == {c["id"]: i for i, c in enumerate(COCO_CATEGORIES)}
    assert coco.thing_dataset_id_to_contiguous_id == {c["id"]: i for i, c in enumerate(COCO_CATEGORIES[:80])}

    stuff = MetadataCatalog.get("coco_2017_test_stuff_10k_sem_seg")
    gaps = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
    assert list(stuff.stuff_dataset_id_to_contiguous_id) == [i for i in range(1, 183) if i not in gaps]
    assert stuff.stuff_classes[:80] == coco.thing_classes

    vistas = MetadataCatalog.get("mapillary_vistas_panoptic_val")
    assert vistas.stuff_dataset_id_to_contiguous_id == {i + 1: i for i in range(65)}
    assert (vistas.stuff_classes[19], vistas.stuff_classes[27], vistas.stuff_classes[64]) == (
        "Person",
        "Sky",
        "Ego Vehicle",
    )
    assert vistas.thing_dataset_id_to_contiguous_id[20] == 19 and 28 not in vistas.thing_dataset_id_to_contiguous_id


def test_the_metadata_of_detectron2_is_left_alone():
    assert len(MetadataCatalog.get("coco_2017_val_panoptic").thing_classes) == 133


def test_registering_twice_keeps_what_is_there():
    register_published_datasets()
    name = "mapillary_vistas_sem_seg_val"
    DatasetCatalog.remove(name)
    DatasetCatalog.register(name, lambda: [{"file_name": "mine"}])
    try:
        register_published_datasets()
        assert DatasetCatalog.get(name) == [{"file_name": "mine"}]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
        register_published_datasets()


@pytest.fixture
def root(tmp_path):
    """An empty datasets root at which the published names are registered during the test."""
    for name in NAMES:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_published_datasets(tmp_path)
    yield tmp_path
    for name in NAMES:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_published_datasets()


def write(path, array=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8) if array is None else array).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("name", "image", "label"),
    [
        ("ade20k_full_sem_seg_val", "ADE20K_2021_17_01/images_detectron2/validation/x.jpg",
         "ADE20K_2021_17_01/annotations_detectron2/validation/x.tif"),
        ("coco_2017_test_stuff_10k_sem_seg", "coco/coco_stuff_10k/images_detectron2/test/x.jpg",
         "coco/coco_stuff_10k/annotations_detectron2/test/x.png"),
        ("mapillary_vistas_sem_seg_train", "mapillary_vistas/training/images/x.jpg",
         "mapillary_vistas/training/labels/x.png"),
    ],
)  # fmt: skip
def test_semantic_layouts(root, name, image, label):
    sample = {
        "file_name": write(root / image),
        "sem_seg_file_name": write(root / label, np.zeros((4, 4), dtype=np.uint16)),
    }
    assert DatasetCatalog.get(name) == [sample]


@pytest.mark.parametrize(
    ("name", "images", "panoptic", "json_file", "semantic", "category", "contiguous", "thing"),
    [
        ("coco_2017_val_panoptic_with_sem_seg", "coco/val2017", "coco/panoptic_val2017",
         "coco/annotations/panoptic_val2017.json", "coco/panoptic_semseg_val2017", 92, 80, False),
        ("ade20k_panoptic_train", "ADEChallengeData2016/images/training", "ADEChallengeData2016/ade20k_panoptic_train",
         "ADEChallengeData2016/ade20k_panoptic_train.json", "ADEChallengeData2016/annotations_detectron2/training",
         8, 8, True),
        ("mapillary_vistas_panoptic_val", "mapillary_vistas/validation/images", "mapillary_vistas/validation/panoptic",
         "mapillary_vistas/validation/panoptic/panoptic_2018.json", "mapillary_vistas/validation/labels", 20, 19, True),
    ],
)  # fmt: skip
def test_panoptic_layouts(root, name, images, panoptic, json_file, semantic, category, contiguous, thing):
    expected = {
        "file_name": write(root / images / "x.jpg"),
        "image_id": 5,
        "pan_seg_file_name": write(root / panoptic / "x.png"),
        "sem_seg_file_name": write(root / semantic / "x.png"),
        "segments_info": [{"id": 1, "category_id": contiguous, "isthing": thing, "iscrowd": 0}],
    }
    content = {
        "images": [{"id": 5, "file_name": "x.jpg"}],
        "annotations": [
            {"image_id": 5, "file_name": "x.png", "segments_info": [{"id": 1, "category_id": category, "iscrowd": 0}]}
        ],
    }
    (root / json_file).parent.mkdir(parents=True, exist_ok=True)
    (root / json_file).write_text(json.dumps(content))
    assert DatasetCatalog.get(name) == [expected]


def test_ade20k_instance_layout(root):
    path = write(root / "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg")
    metadata = MetadataCatalog.get("ade20k_instance_val")
    categories = [
        {"id": dataset_id, "name": metadata.thing_classes[index]}
        for dataset_id, index in metadata.thing_dataset_id_to_contiguous_id.items()
    ]
    annotation = {
        "id": 1,
        "image_id": "ADE_val_00000001",
        "category_id": 12,
        "iscrowd": 0,
        "bbox": [0, 0, 2, 2],
        "area": 4,
    }
    annotation["segmentation"] = [[0, 0, 2, 0, 2, 2, 0, 2]]
    image = {"id": "ADE_val_00000001", "file_name": "ADE_val_00000001.jpg", "height": 4, "width": 4}
    content = {"images": [image], "annotations": [annotation], "categories": categories}
    (root / "ADEChallengeData2016/ade20k_instance_val.json").write_text(json.dumps(content))
    (sample,) = DatasetCatalog.get("ade20k_instance_val")
    assert sample["file_name"] == path and [a["category_id"] for a in sample["annotations"]] == [3]
