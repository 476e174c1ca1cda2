"""Readers of dataset formats, and the built-in datasets."""

import json
import os
import subprocess
import sys

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image
from pycocotools.coco import COCO

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import (
    convert_to_coco_json,
    load_coco_json,
    load_sem_seg,
    register_coco_instances,
    register_coco_panoptic,
    register_coco_panoptic_separated,
)
from detectron2.data.datasets.builtin_meta import (
    ADE20K_SEM_SEG_CATEGORIES,
    CITYSCAPES_CATEGORIES,
    COCO_CATEGORIES,
    _get_builtin_metadata,
)
from detectron2.structures import BoxMode


@pytest.fixture
def forget():
    """Names to remove from the catalogs after the test."""
    names = []
    yield names
    for name in names:
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog:
                catalog.remove(name)


def _coco(**changes):
    mask = np.zeros((20, 30), np.uint8, order="F")
    mask[5:15, 10:20] = 1
    rle = mask_util.encode(mask)
    uncompressed = {"size": [20, 30], "counts": [205, *([10, 10] * 9), 10, 600 - 205 - 190]}
    content = {
        "images": [
            {"id": 9, "file_name": "b.jpg", "height": 20, "width": 30},
            {"id": 4, "file_name": "a.jpg", "height": 20, "width": 30},
            {"id": 5, "file_name": "c.jpg", "height": 20, "width": 30},
        ],
        "categories": [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 7, "bbox": [1.0, 2, 10, 5], "area": 50, "iscrowd": 0,
             "segmentation": [[1, 2, 11, 2, 11, 7, 1, 7], [1, 1, 2, 2]]},
            {"id": 2, "image_id": 9, "category_id": 3, "bbox": [10.0, 5, 10, 10], "area": 100, "iscrowd": 1,
             "segmentation": {"size": [20, 30], "counts": rle["counts"].decode()}},
            {"id": 3, "image_id": 4, "category_id": 3, "bbox": [10.0, 5, 10, 10], "area": 100, "iscrowd": 0,
             "segmentation": uncompressed, "colour": "red"},
            {"id": 4, "image_id": 4, "category_id": 3, "bbox": [0.0, 0, 2, 2], "area": 2, "iscrowd": 0,
             "segmentation": [[0, 0, 1, 1]]},
        ],
    }  # fmt: skip
    return {**content, **changes}


@pytest.fixture
def coco_file(tmp_path):
    def write(**changes):
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(_coco(**changes)))
        return str(path)

    return write


# ---- COCO instances


def test_load_coco(coco_file, tmp_path, forget):
    forget.append("coco_test")
    dicts = load_coco_json(coco_file(), str(tmp_path), "coco_test", extra_annotation_keys=["colour"])
    assert [(d["image_id"], os.path.basename(d["file_name"])) for d in dicts] == [
        (4, "a.jpg"),
        (5, "c.jpg"),
        (9, "b.jpg"),
    ]
    first, second, third = (d["annotations"] for d in dicts)
    assert second == []
    # the polygon of two points went, and so did the instance that had no other
    assert len(first) == 1 and first[0]["colour"] == "red"
    assert third[0]["segmentation"] == [[1, 2, 11, 2, 11, 7, 1, 7]]
    assert [a["category_id"] for a in third] == [1, 0]  # 7 -> 1, 3 -> 0
    assert third[0]["bbox_mode"] == BoxMode.XYWH_ABS and third[0]["bbox"] == [1, 2, 10, 5]
    assert [a["iscrowd"] for a in third] == [0, 1]
    np.testing.assert_array_equal(
        mask_util.decode(first[0]["segmentation"]), mask_util.decode(third[1]["segmentation"])
    )
    meta = MetadataCatalog.get("coco_test")
    assert meta.thing_classes == ["three", "seven"]
    assert meta.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}
    assert {a["category_id"] for d in load_coco_json(coco_file(), str(tmp_path)) for a in d["annotations"]} == {3, 7}


@pytest.mark.embedded_only
def test_coco_errors_name_file_and_id(coco_file, tmp_path):
    def annotation(**changes):
        return [{"id": 11, "image_id": 4, "category_id": 3, "bbox": [0, 0, 1, 1], **changes}]

    for changes, message in [
        (annotation(category_id=99), "Annotation 11 of image 4 in .*instances.json has the category id 99"),
        (annotation(ignore=1), "Annotation 11.*'ignore'"),
        (annotation(bbox=[]), "Annotation 11.*box"),
        (annotation() * 2, "instances.json has several annotations with the id 11"),
        ([{"id": 11, "bbox": [0, 0, 1, 1]}], "instances.json: the annotation with the id 11 has no image_id, category_id"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_coco_json(coco_file(annotations=changes), str(tmp_path))
    with pytest.raises(ValueError, match="instances.json: the image with the id 4 has no height, width"):
        load_coco_json(coco_file(images=[{"id": 4, "file_name": "4.jpg"}]), str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere.json.*DETECTRON2_DATASETS"):
        load_coco_json(str(tmp_path / "nowhere.json"), str(tmp_path))
    with pytest.raises(FileNotFoundError, match="image folder .*nowhere .*DETECTRON2_DATASETS"):
        load_coco_json(coco_file(), str(tmp_path / "nowhere"))
    (tmp_path / "broken.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="broken.json is not valid JSON"):
        load_coco_json(str(tmp_path / "broken.json"), "")
    with pytest.raises(ValueError, match="instances.json is not a COCO instance file.*'categories'"):
        path = tmp_path / "instances.json"
        path.write_text(json.dumps({"images": []}))
        load_coco_json(str(path), "")


@pytest.mark.embedded_only
def test_missing_files_name_the_dataset(tmp_path, forget):
    forget.append("nowhere_val")
    register_coco_instances("nowhere_val", {}, str(tmp_path / "x.json"), str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere_val.*x.json.*DETECTRON2_DATASETS"):
        DatasetCatalog.get("nowhere_val")


def test_coco_round_trip(coco_file, tmp_path, forget):
    forget.append("coco_round_trip")
    register_coco_instances("coco_round_trip", {"color": "red"}, coco_file(), str(tmp_path))
    output = str(tmp_path / "out" / "converted.json")
    convert_to_coco_json("coco_round_trip", output)
    converted, original = COCO(output), COCO(coco_file())
    assert converted.loadCats([3, 7]) == [{"id": 3, "name": "three"}, {"id": 7, "name": "seven"}]
    for image_id in (4, 5, 9):
        ours = converted.imgToAnns[image_id]
        theirs = [a for a in original.imgToAnns[image_id] if a["id"] != 4]
        assert [a["category_id"] for a in ours] == [a["category_id"] for a in theirs]
        assert [a["iscrowd"] for a in ours] == [a["iscrowd"] for a in theirs]
        assert [a["area"] for a in ours] == [a["area"] for a in theirs]
        assert [a["bbox"] for a in ours] == [a["bbox"] for a in theirs]
        for a, b in zip(ours, theirs):
            np.testing.assert_array_equal(converted.annToMask(a), original.annToMask(b))
    assert sorted(converted.anns) == [1, 2, 3]
    # a second call leaves the file, unless it is told not to
    os.truncate(output, 0)
    convert_to_coco_json("coco_round_trip", output)
    assert os.path.getsize(output) == 0
    convert_to_coco_json("coco_round_trip", output, allow_cached=False)
    assert os.path.getsize(output) > 0
    meta = MetadataCatalog.get("coco_round_trip")
    assert meta.evaluator_type == "coco" and meta.color == "red"


# ---- semantic segmentation


def test_load_sem_seg(tmp_path):
    for name in (
        "images/b.jpg",
        "images/a.jpg",
        "images/only.jpg",
        "labels/a.png",
        "labels/b.png",
        "labels/readme.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    got = load_sem_seg(str(tmp_path / "labels"), str(tmp_path / "images"))
    assert got == [
        {"file_name": str(tmp_path / f"images/{n}.jpg"), "sem_seg_file_name": str(tmp_path / f"labels/{n}.png")}
        for n in "ab"
    ]


@pytest.mark.embedded_only
def test_load_sem_seg_errors(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    with pytest.raises(FileNotFoundError, match="label maps .*labels.*DETECTRON2_DATASETS"):
        load_sem_seg(str(tmp_path / "labels"), str(tmp_path / "images"))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "b.png").touch()
    with pytest.raises(ValueError, match=r"1 files \*.jpg.*1 files \*.png.*no names in common"):
        load_sem_seg(str(tmp_path / "labels"), str(tmp_path / "images"))


# ---- panoptic

_PANOPTIC_META = {
    "thing_classes": ["cat", "sky"],
    "stuff_classes": ["cat", "sky"],
    "thing_dataset_id_to_contiguous_id": {17: 0},
    "stuff_dataset_id_to_contiguous_id": {90: 1},
}


@pytest.fixture
def panoptic_tree(tmp_path):
    for folder in ("images", "png"):
        (tmp_path / folder).mkdir()
    (tmp_path / "images" / "0007.jpg").touch()
    (tmp_path / "png" / "0007.png").touch()

    def write(category_id=17, **image):
        content = {
            "images": [{"id": 7, "file_name": "0007.jpg", **image}],
            "annotations": [
                {
                    "image_id": 7,
                    "file_name": "0007.png",
                    "segments_info": [
                        {"id": 5, "category_id": category_id, "iscrowd": 0},
                        {"id": 6, "category_id": 90, "iscrowd": 0},
                    ],
                }
            ],
        }
        (tmp_path / "panoptic.json").write_text(json.dumps(content))
        return str(tmp_path / "images"), str(tmp_path / "png"), str(tmp_path / "panoptic.json")

    return write


def test_panoptic(panoptic_tree, forget):
    forget.append("pan_test")
    image_root, panoptic_root, panoptic_json = panoptic_tree()
    register_coco_panoptic("pan_test", _PANOPTIC_META, image_root, panoptic_root, panoptic_json, "instances.json")
    (record,) = DatasetCatalog.get("pan_test")
    assert record["file_name"] == os.path.join(image_root, "0007.jpg")
    assert record["pan_seg_file_name"] == os.path.join(panoptic_root, "0007.png")
    assert record["image_id"] == 7
    assert record["segments_info"] == [
        {"id": 5, "category_id": 0, "iscrowd": 0, "isthing": True},
        {"id": 6, "category_id": 1, "iscrowd": 0, "isthing": False},
    ]
    meta = MetadataCatalog.get("pan_test")
    assert (meta.evaluator_type, meta.ignore_label, meta.label_divisor) == ("coco_panoptic_seg", 255, 1000)
    assert meta.json_file == "instances.json" and meta.panoptic_json == panoptic_json


@pytest.mark.embedded_only
def test_panoptic_images_need_not_be_jpg(panoptic_tree, forget, tmp_path):
    forget.append("pan_test")
    (tmp_path / "images" / "photo.png").touch()
    register_coco_panoptic("pan_test", _PANOPTIC_META, *panoptic_tree(file_name="photo.png"))
    assert DatasetCatalog.get("pan_test")[0]["file_name"].endswith("images/photo.png")


@pytest.mark.embedded_only
def test_panoptic_errors(panoptic_tree, forget, tmp_path):
    forget.append("pan_test")
    register_coco_panoptic("pan_test", _PANOPTIC_META, *panoptic_tree(category_id=18))
    with pytest.raises(ValueError, match="0007.png in .*panoptic.json.*category id 18"):
        DatasetCatalog.get("pan_test")
    panoptic_tree()
    os.remove(tmp_path / "images" / "0007.jpg")
    with pytest.raises(FileNotFoundError, match="pan_test.*0007.jpg"):
        DatasetCatalog.get("pan_test")


def test_panoptic_separated(tmp_path, coco_file, forget):
    forget += ["sep_separated", "sep_stuffonly"]
    (tmp_path / "labels").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jpg").touch()
        (tmp_path / "labels" / f"{name}.png").touch()
    register_coco_panoptic_separated("sep", {}, str(tmp_path), "pan", "pan.json", str(tmp_path / "labels"), coco_file())
    dicts = DatasetCatalog.get("sep_separated")
    assert [os.path.basename(d["sem_seg_file_name"]) for d in dicts] == ["a.png", "c.png", "b.png"]
    assert [len(d["annotations"]) for d in dicts] == [1, 0, 2]
    assert len(DatasetCatalog.get("sep_stuffonly")) == 3
    assert MetadataCatalog.get("sep_stuffonly").evaluator_type == "sem_seg"


# ---- Cityscapes


@pytest.fixture
def cityscapes(tmp_path):
    """One image of 40x60: a car half behind a person (who stands in front), a group of cars, a licence plate."""
    image_dir, gt_dir = tmp_path / "leftImg8bit" / "val", tmp_path / "gtFine" / "val"
    (image_dir / "bonn").mkdir(parents=True)
    (gt_dir / "bonn").mkdir(parents=True)
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(image_dir / "bonn" / "bonn_000001_000019_leftImg8bit.png")

    def rectangle(x0, y0, x1, y1):  # inclusive pixel indices
        return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]

    shapes = [
        ("sky", 23, (0, 0, 59, 39)),
        ("car", 26001, (10, 10, 29, 19)),
        ("cargroup", 26, (40, 10, 49, 19)),
        ("person", 24001, (20, 5, 24, 30)),
        ("license plate", None, (12, 16, 14, 17)),
        ("trailer", 30001, (45, 30, 50, 35)),
    ]
    objects = [{"label": name, "polygon": rectangle(*r)} for name, _, r in shapes]
    prefix = gt_dir / "bonn" / "bonn_000001_000019_gtFine"
    (gt_dir / "bonn" / f"{prefix.name}_polygons.json").write_text(
        json.dumps({"imgHeight": 40, "imgWidth": 60, "objects": objects})
    )
    ids = np.zeros((40, 60), np.uint16)
    for _, i, (x0, y0, x1, y1) in shapes:
        if i is not None:
            ids[y0 : y1 + 1, x0 : x1 + 1] = i
    Image.fromarray(ids).save(f"{prefix}_instanceIds.png")
    return str(image_dir), str(gt_dir), ids


def _by_class(annotations):
    return {(a["category_id"], a["iscrowd"]): a for a in annotations}


@pytest.mark.embedded_only
@pytest.mark.parametrize("options", [{}, {"from_json": False}, {"from_json": False, "to_polygons": False}])
def test_cityscapes_instances(cityscapes, options):
    from detectron2.data.datasets.cityscapes import load_cityscapes_instances

    image_dir, gt_dir, ids = cityscapes
    (record,) = load_cityscapes_instances(image_dir, gt_dir, **options)
    assert (record["height"], record["width"]) == (40, 60)
    assert record["file_name"].endswith("bonn_000001_000019_leftImg8bit.png")
    annotations = _by_class(record["annotations"])
    things = MetadataCatalog.get("cityscapes_fine_instance_seg_val").thing_classes
    person, car = things.index("person"), things.index("car")
    assert annotations.keys() == {(person, 0), (car, 0), (car, 1)}
    for key, instance_id in {(person, 0): 24001, (car, 0): 26001, (car, 1): 26}.items():
        a = annotations[key]
        expected = ids == instance_id
        segmentation = a["segmentation"]
        if isinstance(segmentation, list):
            shift = 0.0 if options else -0.5  # COCO's rasteriser counts from the middle of pixels
            polygons = [(np.array(p) + shift).tolist() for p in segmentation]
            segmentation = mask_util.merge(mask_util.frPyObjects(polygons, 40, 60))
        got = mask_util.decode(segmentation).astype(bool)
        assert (got & expected).sum() / (got | expected).sum() > 0.75
        ys, xs = np.nonzero(expected)
        box = BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
        np.testing.assert_allclose(box, [xs.min(), ys.min(), xs.max(), ys.max()], atol=1.01)


@pytest.mark.embedded_only
def test_cityscapes_hidden_parts_are_cut_away_exactly(cityscapes):
    """The car's area: its pixels, widened by half a pixel to either side, less those of the person."""
    shapely = pytest.importorskip("shapely")
    from detectron2.data.datasets.cityscapes import load_cityscapes_instances

    (record,) = load_cityscapes_instances(*cityscapes[:2])
    car = next(a for a in record["annotations"] if len(a["segmentation"]) == 2)
    areas = sorted(shapely.Polygon(np.array(p).reshape(-1, 2)).area for p in car["segmentation"])
    # Left part x in [10, 20], right part [25, 30], y in [10, 20]; the outer corners are rounded (radius 0.5, 4 chords
    # each).
    corner = 0.25 - 0.5 * np.sin(np.pi / 8)
    assert areas == pytest.approx([50 - 2 * corner, 100 - 2 * corner], abs=1e-3)


@pytest.mark.embedded_only
def test_cityscapes_is_the_same_from_several_processes(cityscapes, monkeypatch):
    from detectron2.data.datasets import cityscapes as module

    alone = module.load_cityscapes_instances(*cityscapes[:2])
    monkeypatch.setattr(module, "_POOL_MIN_IMAGES", 1)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    assert module.load_cityscapes_instances(*cityscapes[:2]) == alone


@pytest.mark.embedded_only
def test_cityscapes_semantic_needs_train_ids(cityscapes):
    from detectron2.data.datasets.cityscapes import load_cityscapes_semantic

    image_dir, gt_dir, ids = cityscapes
    with pytest.raises(FileNotFoundError, match="labelTrainIds.png.*csCreateTrainIdLabelImgs"):
        load_cityscapes_semantic(image_dir, gt_dir)
    label = os.path.join(gt_dir, "bonn", "bonn_000001_000019_gtFine_labelTrainIds.png")
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(label)
    (record,) = load_cityscapes_semantic(image_dir, gt_dir)
    assert record["sem_seg_file_name"] == label and (record["height"], record["width"]) == (40, 60)


@pytest.mark.embedded_only
def test_cityscapes_panoptic(cityscapes, tmp_path):
    from detectron2.data.datasets.cityscapes_panoptic import load_cityscapes_panoptic

    image_dir, gt_dir, _ = cityscapes
    panoptic_root = tmp_path / "gtFine" / "cityscapes_panoptic_val"
    meta = MetadataCatalog.get("cityscapes_fine_panoptic_val").as_dict()
    with pytest.raises(FileNotFoundError, match="csCreatePanopticImgs"):
        load_cityscapes_panoptic(image_dir, str(panoptic_root), f"{panoptic_root}.json", meta)
    panoptic_root.mkdir()
    (panoptic_root / "bonn_000001_000019_gtFine_panoptic.png").touch()
    label = os.path.join(gt_dir, "bonn", "bonn_000001_000019_gtFine_labelTrainIds.png")
    open(label, "w").close()
    segments = [{"id": 26001, "category_id": 26, "iscrowd": 0}, {"id": 23, "category_id": 23, "iscrowd": 0}]
    annotation = {
        "image_id": "bonn_000001_000019",
        "file_name": "bonn_000001_000019_gtFine_panoptic.png",
        "segments_info": segments,
    }
    (tmp_path / "gtFine" / "cityscapes_panoptic_val.json").write_text(json.dumps({"annotations": [annotation]}))
    (record,) = load_cityscapes_panoptic(image_dir, str(panoptic_root), f"{panoptic_root}.json", meta)
    assert record["image_id"] == "bonn_000001_000019"
    assert record["sem_seg_file_name"] == label
    assert [(s["id"], s["category_id"]) for s in record["segments_info"]] == [(26001, 13), (23, 10)]  # train ids


# ---- built-in


def test_tables():
    assert len(COCO_CATEGORIES) == 133 and len(CITYSCAPES_CATEGORIES) == 19 and len(ADE20K_SEM_SEG_CATEGORIES) == 150
    assert [c["isthing"] for c in COCO_CATEGORIES] == [1] * 80 + [0] * 53
    assert len({c["id"] for c in COCO_CATEGORIES}) == 133
    assert [c["trainId"] for c in CITYSCAPES_CATEGORIES] == list(range(19))
    assert [c["name"] for c in CITYSCAPES_CATEGORIES if c["isthing"]] == (
        ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    )


def test_builtin_metadata_of_panoptic_coco():
    standard = _get_builtin_metadata("coco_panoptic_standard")
    both = standard["thing_dataset_id_to_contiguous_id"] | standard["stuff_dataset_id_to_contiguous_id"]
    assert sorted(both.values()) == list(range(133))
    for category in COCO_CATEGORIES:
        assert standard["stuff_classes"][both[category["id"]]] == category["name"]
    separated = _get_builtin_metadata("coco_panoptic_separated")
    assert sorted(separated["stuff_dataset_id_to_contiguous_id"].values()) == list(range(54))
    assert separated["stuff_classes"][0] == "things" and "sky" in separated["stuff_classes"]
    assert separated["stuff_classes"][separated["stuff_dataset_id_to_contiguous_id"][187]] == "sky"
    assert len(separated["thing_classes"]) == 80
    with pytest.raises(KeyError):
        _get_builtin_metadata("imagenet")


@pytest.mark.parametrize("name, evaluator_type", [
    ("coco_2017_train", "coco"),
    ("coco_2014_val", "coco"),
    ("coco_2017_val_panoptic", "coco_panoptic_seg"),
    ("coco_2017_val_100_panoptic_separated", "coco_panoptic_seg"),
    ("cityscapes_fine_instance_seg_val", "cityscapes_instance"),
    ("cityscapes_fine_sem_seg_train", "cityscapes_sem_seg"),
    ("cityscapes_fine_panoptic_val", "cityscapes_panoptic_seg"),
    ("ade20k_sem_seg_train", "sem_seg"),
])  # fmt: skip
def test_builtin_names(name, evaluator_type):
    assert name in DatasetCatalog
    assert MetadataCatalog.get(name).evaluator_type == evaluator_type


def test_old_place_of_the_registration():
    from detectron2.data.datasets import register_coco

    assert register_coco.register_coco_instances is register_coco_instances


@pytest.mark.embedded_only
def test_left_out_datasets_say_so():
    from detectron2.data.datasets import register_pascal_voc

    with pytest.raises(NotImplementedError, match="VOC"):
        register_pascal_voc("a", "b", "train", 2007)


@pytest.mark.embedded_only
def test_root_of_the_builtin_datasets(tmp_path):
    code = (
        "import mask2former_plugin\n"
        "from detectron2.data import MetadataCatalog\n"
        "print(MetadataCatalog.get('ade20k_sem_seg_val').image_root)\n"
        "print(MetadataCatalog.get('coco_2017_val').json_file)\n"
    )
    env = {**os.environ, "DETECTRON2_DATASETS": "~/here", "HOME": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.split() == [
        f"{tmp_path}/here/ADEChallengeData2016/images/validation",
        f"{tmp_path}/here/coco/annotations/instances_val2017.json",
    ]
