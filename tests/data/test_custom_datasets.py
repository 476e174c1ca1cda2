"""Datasets from the config alone: three formats, their errors, and the checks against the model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, SemSegEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as mask_util

from mask2former_plugin.config import load_config
from mask2former_plugin.data.datasets.custom import check_num_classes, register_custom_datasets
from mask2former_plugin.data.mappers import build_mapper
from ground_truth import evaluate_ground_truth


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    before = set(DatasetCatalog.list())
    yield tmp_path
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def config(root, **datasets):
    """What a YAML with these datasets gives."""
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump({"DATASETS": {"CUSTOM": datasets}, "OUTPUT_DIR": str(root / "output")}))
    return load_config(path)


def register(root, **datasets):
    cfg = config(root, **datasets)
    cfg.DATASETS.TRAIN = tuple(datasets)
    register_custom_datasets(cfg)
    return cfg


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


# ------------------------------------------------------------------------------------------------------ semantic_folder


def street(root, names=("a", "city/b", "city/c"), ignore=11):
    rng = np.random.default_rng(1)
    for name in names:
        write(root / f"street/images/{name}.jpg", rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
        labels = rng.integers(0, 3, (20, 30), dtype=np.uint8)
        labels[:4] = ignore
        write(root / f"street/labels/{name}.png", labels)
    (root / "street/classes.json").write_text(
        json.dumps(
            {"classes": ["sky", "road", "car"], "ignore_label": ignore, "colors": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}
        )
    )
    return {
        "FORMAT": "semantic_folder",
        "IMAGES": "street/images",
        "LABELS": "street/labels",
        "CLASSES": "street/classes.json",
    }


def test_semantic_folder(root):
    register(root, street_train=street(root))
    samples = DatasetCatalog.get("street_train")
    assert samples == [
        {"file_name": f"{root}/street/images/{n}.jpg", "sem_seg_file_name": f"{root}/street/labels/{n}.png"}
        for n in ("a", "city/b", "city/c")
    ]
    metadata = MetadataCatalog.get("street_train")
    assert metadata.stuff_classes == ["sky", "road", "car"] and metadata.stuff_colors[2] == [7, 8, 9]
    assert metadata.ignore_label == 11 and metadata.evaluator_type == "sem_seg"


def test_semantic_folder_with_everything_in_the_config(root):
    options = street(root)
    options |= {"CLASSES": ["x", "y", "z"], "IGNORE_LABEL": 7, "COLORS": [[0, 0, 0], [9, 9, 9], [5, 5, 5]]}
    options |= {"IMAGES": str(root / "street/images"), "IMAGE_EXTENSIONS": ["jpg"]}
    write(root / "street/images/extra.png", np.zeros((4, 4, 3), dtype=np.uint8))  # not among the extensions
    register(root, plain=options)
    metadata = MetadataCatalog.get("plain")
    assert (metadata.stuff_classes, metadata.ignore_label, metadata.stuff_colors[1]) == (["x", "y", "z"], 7, [9, 9, 9])
    assert len(DatasetCatalog.get("plain")) == 3


def test_semantic_folder_defaults(root):
    register(root, plain={**street(root), "CLASSES": ["x", "y", "z"]})
    metadata = MetadataCatalog.get("plain")
    assert metadata.ignore_label == 255
    assert len({tuple(color) for color in metadata.stuff_colors}) == 3


def test_home_directory_is_expanded(root, monkeypatch):
    options = street(root)
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root / "elsewhere"))
    register(root, at_home={key: f"~/{value}" if "/" in value else value for key, value in options.items()})
    assert DatasetCatalog.get("at_home")[0]["file_name"] == str(root / "street/images/a.jpg")


def test_semantic_folder_is_evaluated_by_detectron2(root):
    """Test loader and SemSegEvaluator as Detectron2 has them: the ground truth as prediction is perfect."""
    cfg = register(root, street_val=street(root))
    cfg.INPUT.MIN_SIZE_TEST = 20
    mapper = DatasetMapper(cfg, is_train=False)
    evaluator = SemSegEvaluator("street_val", distributed=False)
    evaluator.reset()
    for sample in DatasetCatalog.get("street_val"):
        inputs = mapper(sample)
        labels = np.asarray(Image.open(sample["sem_seg_file_name"])).copy()
        labels[labels == 11] = 2  # ignored, whatever is predicted there
        evaluator.process(
            [inputs], [{"sem_seg": torch.nn.functional.one_hot(torch.from_numpy(labels).long(), 3).permute(2, 0, 1)}]
        )
    assert evaluator.evaluate()["sem_seg"]["mIoU"] == pytest.approx(100)


def test_sixteen_bit_labels_are_evaluated(root):
    options = {**street(root, ["a"]), "IGNORE_LABEL": 60000}
    labels = np.random.default_rng(0).integers(0, 3, (20, 30)).astype(np.uint16)
    labels[0] = 60000
    write(root / "street/labels/a.png", labels)
    cfg = register(root, deep=options)
    cfg.INPUT.MIN_SIZE_TEST = 20
    evaluator = SemSegEvaluator("deep", distributed=False)
    evaluator.reset()
    inputs = DatasetMapper(cfg, is_train=False)(DatasetCatalog.get("deep")[0])
    predicted = torch.from_numpy(np.where(labels == 60000, 0, labels).astype(np.int64))
    evaluator.process([inputs], [{"sem_seg": torch.nn.functional.one_hot(predicted, 3).permute(2, 0, 1)}])
    assert evaluator.evaluate()["sem_seg"]["mIoU"] == pytest.approx(100)


def test_files_without_partner_are_named(root):
    register(root, lonely=street(root))
    (root / "street/labels/city/b.png").unlink()
    write(root / "street/labels/z.png", np.zeros((2, 2), dtype=np.uint8))
    with pytest.raises(
        ValueError, match=r"'lonely': 1 images without a label map \(city/b\) and 1 label maps without an image \(z\)"
    ):
        DatasetCatalog.get("lonely")


def test_two_images_of_one_name(root):
    register(root, twice=street(root))
    write(root / "street/images/a.png", np.zeros((2, 2, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="a.jpg and .*a.png have the same name"):
        DatasetCatalog.get("twice")


def test_no_images(root):
    options = street(root)
    (root / "nothing").mkdir()
    register(root, bare={**options, "IMAGES": "nothing"})
    with pytest.raises(ValueError, match="'bare': no images"):
        DatasetCatalog.get("bare")


# --------------------------------------------------------------------------------------------------------- registration


def test_registering_again(root):
    options = street(root)
    register(root, again=options)
    register(root, again=options)
    with pytest.raises(ValueError, match="'again' is already registered with other options .IGNORE_LABEL."):
        register(root, again={**options, "IGNORE_LABEL": 3})
    with pytest.raises(ValueError, match="'coco_2017_val' is already registered by something else"):
        register(root, coco_2017_val=options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"IMAGES": "street/imagse"},
            FileNotFoundError,
            "'bad': IMAGES 'street/imagse': .*/street/imagse does not exist",
        ),
        ({"LABELS": "street/classes.json"}, FileNotFoundError, "LABELS 'street/classes.json': .* is no folder"),
        (
            {"CLASSES": "street/names.json"},
            FileNotFoundError,
            "CLASSES 'street/names.json': .*/street/names.json does not exist",
        ),
        ({"LABEL": "street/labels"}, ValueError, "Unknown option of semantic_folder 'LABEL'. Did you mean 'LABELS'"),
        (
            {"FORMAT": "semantic_folders"},
            ValueError,
            "Unknown FORMAT 'semantic_folders'. Did you mean 'semantic_folder'",
        ),
        ({"FORMAT": None}, ValueError, "'bad': Unknown FORMAT None"),
        ({"LABELS": None}, ValueError, "'bad': semantic_folder needs LABELS"),
        ({"IGNORE_LABEL": "none"}, ValueError, "IGNORE_LABEL must be int, got 'none'"),
        ({"CLASSES": ["a", 3]}, ValueError, "must give a list of class names"),
        ({"CLASSES": ["a", "b", "a"]}, ValueError, "CLASSES names a twice"),
        ({"COLORS": [[0, 0, 0]]}, ValueError, "COLORS must be 3 lists"),
        ({"COLORS": [[0, 0, 0], [0, 0, 0], [0, 0, 256]]}, ValueError, "of 0..255"),
    ],
)
def test_wrong_options(root, change, error, message):
    options = {**street(root), **change}
    with pytest.raises(error, match=message):
        register(root, bad=options)
    assert "bad" not in DatasetCatalog


def test_missing_files_matter_where_the_dataset_is_used(root, caplog):
    mine = street(root)
    inherited = {**mine, "IMAGES": "camvid/images"}
    cfg = config(root, mine=mine, inherited=inherited)
    cfg.DATASETS.TRAIN = ("mine",)
    register_custom_datasets(cfg)
    assert "mine" in DatasetCatalog and "inherited" not in DatasetCatalog
    assert "'inherited': IMAGES 'camvid/images'" in caplog.text and "left out" in caplog.text
    cfg.DATASETS.TEST = ("inherited",)
    with pytest.raises(FileNotFoundError, match="'inherited': IMAGES 'camvid/images'"):
        register_custom_datasets(cfg)


def test_missing_format_and_plain_value(root):
    with pytest.raises(
        ValueError, match="'bad': FORMAT is missing; it is one of semantic_folder, coco_instances, coco_panoptic"
    ):
        register(root, bad={"IMAGES": "x"})
    cfg = config(root)
    cfg.DATASETS.CUSTOM = CfgNode({"bad": "street"}, new_allowed=True)
    with pytest.raises(ValueError, match="DATASETS.CUSTOM.bad must hold options"):
        register_custom_datasets(cfg)


def test_broken_json(root):
    options = street(root)
    (root / "street/classes.json").write_text("{")
    with pytest.raises(ValueError, match="'bad': CLASSES .*classes.json is no JSON"):
        register(root, bad=options)


# --------------------------------------------------------------------------------------------------- COCO, both formats

CATEGORIES = [
    {"id": 40, "name": "grass", "isthing": 0, "color": [0, 200, 0]},
    {"id": 7, "name": "dog", "isthing": 1, "color": [10, 0, 0]},
    {"id": 3, "name": "sky", "isthing": 0, "color": [0, 0, 250]},
    {"id": 9, "name": "cat", "isthing": 1, "color": [20, 0, 0]},
]
CONTIGUOUS = {7: 0, 9: 1, 3: 2, 40: 3}


def zoo(root, all_categories=True, first_id=1):
    """Two images; a segment per quadrant (dog, cat, sky, grass), as panoptic, instance and semantic annotations."""
    rng = np.random.default_rng(2)
    images, panoptic, instances = [], [], []
    for index in (1, 2):
        height, width = 40 + 4 * index, 60
        name = f"{index:04d}"
        write(root / f"zoo/images/{name}.jpg", rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        images.append({"id": index, "file_name": f"{name}.jpg", "height": height, "width": width})
        ids = np.zeros((height, width), dtype=np.int64)
        semantic = np.full((height, width), 255, dtype=np.uint8)
        segments = []
        for corner, category in enumerate((7, 9, 3, 40)):
            rows = slice(1, 20) if corner < 2 else slice(21, height)
            columns = slice(2, 28) if corner % 2 else slice(30, 59)
            ids[rows, columns] = segment_id = 1000 * index + 257 * (corner + 1)
            semantic[rows, columns] = CONTIGUOUS[category]
            segments.append(
                {"id": segment_id, "category_id": category, "iscrowd": 0, "area": int((ids == segment_id).sum())}
            )
            if category in (7, 9):
                rle = mask_util.encode(np.asfortranarray((ids == segment_id).astype(np.uint8)))
                box = mask_util.toBbox(rle).tolist()
                rle["counts"] = rle["counts"].decode()
                common = {"image_id": index, "category_id": category, "iscrowd": 0, "bbox": box}
                instances.append(
                    {**common, "id": len(instances) + first_id, "segmentation": rle, "area": segments[-1]["area"]}
                )
        rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        write(root / f"zoo/panoptic/{name}.png", rgb)
        write(root / f"zoo/semantic/{name}.png", semantic)
        panoptic.append({"image_id": index, "file_name": f"{name}.png", "segments_info": segments})
    categories = CATEGORIES if all_categories else [c for c in CATEGORIES if c["isthing"]]
    for name, content, listed in (("panoptic", panoptic, CATEGORIES), ("instances", instances, categories)):
        (root / f"zoo/{name}.json").write_text(
            json.dumps({"images": images, "annotations": content, "categories": listed})
        )
    return {
        "FORMAT": "coco_panoptic",
        "IMAGES": "zoo/images",
        "PANOPTIC_JSON": "zoo/panoptic.json",
        "PANOPTIC_ROOT": "zoo/panoptic",
        "INSTANCES_JSON": "zoo/instances.json",
        "SEM_SEG_ROOT": "zoo/semantic",
    }


def test_coco_panoptic(root):
    options = zoo(root, all_categories=False)
    register(root, zoo_val=options)
    metadata = MetadataCatalog.get("zoo_val")
    assert metadata.thing_classes == ["dog", "cat"] and metadata.stuff_classes == ["dog", "cat", "sky", "grass"]
    assert metadata.thing_dataset_id_to_contiguous_id == {7: 0, 9: 1}
    assert metadata.stuff_dataset_id_to_contiguous_id == CONTIGUOUS
    assert metadata.thing_colors == [[10, 0, 0], [20, 0, 0]] and metadata.stuff_colors[2:] == [[0, 0, 250], [0, 200, 0]]
    assert (metadata.ignore_label, metadata.label_divisor) == (255, 1000)
    assert metadata.evaluator_type == "coco_panoptic_seg"
    assert metadata.json_file == str(root / "zoo/instances.json")  # lists the things only: used as it is
    assert metadata.panoptic_root == str(root / "zoo/panoptic") and metadata.sem_seg_root == str(root / "zoo/semantic")
    first, second = DatasetCatalog.get("zoo_val")
    assert first["file_name"] == str(root / "zoo/images/0001.jpg") and second["image_id"] == 2
    assert (first["height"], first["width"]) == (44, 60)
    assert first["pan_seg_file_name"] == str(root / "zoo/panoptic/0001.png")
    assert first["sem_seg_file_name"] == str(root / "zoo/semantic/0001.png")
    assert [(s["category_id"], s["isthing"]) for s in first["segments_info"]] == [
        (0, True),
        (1, True),
        (2, False),
        (3, False),
    ]


def test_coco_panoptic_without_the_optional_parts(root):
    options = zoo(root)
    del options["INSTANCES_JSON"], options["SEM_SEG_ROOT"]
    register(root, zoo_val=options)
    metadata = MetadataCatalog.get("zoo_val")
    assert metadata.get("json_file") is None and metadata.get("sem_seg_root") is None
    assert "sem_seg_file_name" not in DatasetCatalog.get("zoo_val")[0]


def test_instances_that_list_stuff_categories_are_filtered(root):
    options = zoo(root)
    for _ in range(2):
        register(root, zoo_val=options)
    json_file = MetadataCatalog.get("zoo_val").json_file
    assert json_file.startswith(str(root / "output"))
    content = json.loads(open(json_file).read())
    assert [category["id"] for category in content["categories"]] == [7, 9]
    assert len(content["annotations"]) == 4 and len(list((root / "output/datasets").iterdir())) == 1


@pytest.mark.parametrize(("all_categories", "first_id"), [(True, 1), (False, 1), (False, 0)])
def test_ground_truth_as_prediction_is_perfect(root, all_categories, first_id):
    """Also with stuff categories in the instance JSON, and with an annotation id 0, which pycocotools calls missed."""
    register(root, zoo_val=zoo(root, all_categories, first_id))
    results = evaluate_ground_truth("zoo_val", root / "evaluation")
    panoptic = results["panoptic_seg"]
    assert [panoptic[key] for key in ("PQ", "SQ", "RQ", "PQ_th", "PQ_st")] == pytest.approx([100] * 5)
    assert results["segm"]["AP"] == pytest.approx(100) and results["bbox"]["AP"] == pytest.approx(100)
    assert results["sem_seg"]["mIoU"] == pytest.approx(100)


@pytest.mark.parametrize(
    "mapper_name", ["mask_former_panoptic", "coco_panoptic_lsj", "detr_panoptic", "mask_former_semantic"]
)
def test_coco_panoptic_goes_through_the_mappers(root, mapper_name):
    cfg = register(root, zoo_train=zoo(root))
    cfg.DATASETS.TRAIN = ("zoo_train",)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 4
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.IMAGE_SIZE, cfg.INPUT.MIN_SCALE = (32,), 64, 0.5
    cfg.INPUT.DATASET_MAPPER_NAME = mapper_name
    mapper = build_mapper(cfg)
    for sample in DatasetCatalog.get("zoo_train"):
        assert sorted(mapper(sample)["instances"].gt_classes.tolist()) == [0, 1, 2, 3]


def test_coco_instances(root):
    zoo(root, all_categories=False)
    cfg = register(
        root, zoo_instances={"FORMAT": "coco_instances", "IMAGES": "zoo/images", "JSON": "zoo/instances.json"}
    )
    metadata = MetadataCatalog.get("zoo_instances")
    assert metadata.thing_classes == ["dog", "cat"] and metadata.evaluator_type == "coco"
    samples = DatasetCatalog.get("zoo_instances")
    assert [a["category_id"] for a in samples[0]["annotations"]] == [0, 1]
    cfg.DATASETS.TRAIN, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = ("zoo_instances",), 2
    cfg.INPUT.DATASET_MAPPER_NAME, cfg.INPUT.IMAGE_SIZE, cfg.INPUT.MIN_SCALE = "coco_instance_lsj", 64, 0.9
    assert build_mapper(cfg)(samples[1])["instances"].gt_classes.tolist() == [0, 1]
    check_num_classes(cfg)


@pytest.mark.parametrize("first_id", [0, 1])
def test_coco_instances_ground_truth_is_perfect(root, first_id):
    zoo(root, all_categories=False, first_id=first_id)
    register(root, zoo_instances={"FORMAT": "coco_instances", "IMAGES": "zoo/images", "JSON": "zoo/instances.json"})
    copied = MetadataCatalog.get("zoo_instances").json_file != str(root / "zoo/instances.json")
    assert copied == (first_id == 0)
    evaluator = COCOEvaluator("zoo_instances", ("segm",), distributed=False, output_dir=str(root))
    evaluator.reset()
    for sample in DatasetCatalog.get("zoo_instances"):
        instances = Instances((sample["height"], sample["width"]))
        instances.pred_masks = torch.from_numpy(
            np.stack([mask_util.decode(a["segmentation"]) for a in sample["annotations"]])
        )
        instances.pred_boxes = Boxes(torch.zeros(2, 4))
        instances.scores = torch.ones(2)
        instances.pred_classes = torch.tensor([a["category_id"] for a in sample["annotations"]])
        evaluator.process([sample], [{"instances": instances}])
    assert evaluator.evaluate()["segm"]["AP"] == pytest.approx(100)


def change(root, kind, number, **fields):
    """Change an entry of the instances JSON; a field of value None goes."""
    path = root / "zoo/instances.json"
    content = json.loads(path.read_text())
    entry = content[kind][number]
    entry.update(fields)
    content[kind][number] = {key: value for key, value in entry.items() if value is not None}
    path.write_text(json.dumps(content))


INSTANCES = {"FORMAT": "coco_instances", "IMAGES": "zoo/images", "JSON": "zoo/instances.json"}


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("images", {"height": None}, "number 2 of its images has no 'height'"),
        ("images", {"id": 1}, "several of its images have the id 1"),
        ("categories", {"name": None}, "number 9 of its categories has no 'name'"),
        ("categories", {"id": 7}, "several of its categories have the id 7"),
        ("categories", {"id": "9"}, "category 'cat' has the id '9', which is no number"),
        ("annotations", {"image_id": None}, "number 2 of its annotations has no 'image_id'"),
        ("annotations", {"segmentation": []}, "annotation 2 of image 1 has no segmentation"),
        ("annotations", {"segmentation": None}, "annotation 2 of image 1 has no segmentation"),
        ("annotations", {"segmentation": {"counts": "abc"}}, "annotation 2 of image 1 has run lengths without 'size'"),
        (
            "annotations",
            {"segmentation": {"size": [5, 6], "counts": [30]}},
            r"annotation 2 of image 1 has run lengths for \[5, 6\], its image is",
        ),
        ("annotations", {"segmentation": "short"}, "annotation 2 of image 1 has run lengths of 7 pixels, its image"),
    ],
)
@pytest.mark.parametrize("panoptic", [False, True])
def test_instances_json_errors(root, kind, fields, message, panoptic):
    options = zoo(root, all_categories=False)
    if fields.get("segmentation") == "short":
        image = json.loads((root / "zoo/instances.json").read_text())["images"][0]
        fields = {"segmentation": {"size": [image["height"], image["width"]], "counts": [3, 4]}}
    change(root, kind, 1, **fields)
    with pytest.raises(ValueError, match=f"'wrong': .*JSON .*/zoo/instances.json: .*{message}"):
        register(root, wrong=options if panoptic else INSTANCES)


def test_missing_images_are_named_before_the_work_starts(root):
    zoo(root, all_categories=False)
    change(root, "images", 1, file_name="deep/gone.jpg")
    register(root, zoo_instances=INSTANCES)
    with pytest.raises(FileNotFoundError, match="zoo/instances.json names 1 files .*: .*/zoo/images/deep/gone.jpg$"):
        DatasetCatalog.get("zoo_instances")
    (root / "zoo/images/deep").mkdir()
    (root / "zoo/images/deep/gone.jpg").touch()
    assert len(DatasetCatalog.get("zoo_instances")) == 2


@pytest.mark.parametrize("missing", ["id", "bbox", "area", "iscrowd"])
def test_instances_without_what_only_the_evaluation_reads(root, missing):
    """A corrected copy has it, equal to what was there."""
    zoo(root, all_categories=False)
    complete = json.loads((root / "zoo/instances.json").read_text())["annotations"]
    change(root, "annotations", 1, **{missing: None})
    register(root, zoo_instances=INSTANCES)
    copied = json.loads(Path(MetadataCatalog.get("zoo_instances").json_file).read_text())["annotations"]
    assert copied == complete


def test_box_and_area_of_polygons(root):
    zoo(root, all_categories=False)
    polygons = [[2, 3, 8, 3, 8, 9, 2, 9], [10, 3, 12, 3, 12, 9, 10, 9]]
    change(root, "annotations", 1, segmentation=polygons, bbox=None, area=None)
    register(root, zoo_instances=INSTANCES)
    copied = json.loads(Path(MetadataCatalog.get("zoo_instances").json_file).read_text())["annotations"][1]
    assert copied["bbox"] == [2, 3, 10, 6] and copied["area"] == 48


def test_panoptic_json_errors(root):
    options = zoo(root)
    path = root / "zoo/panoptic.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segments_info"][0]["category_id"] = 55
    path.write_text(json.dumps(content))
    register(root, unknown_category=options)
    with pytest.raises(
        ValueError, match="panoptic.json, 0001.png: segment 1257 has category_id 55, which is none of the 4"
    ):
        DatasetCatalog.get("unknown_category")
    content["annotations"][0]["image_id"] = 77
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="0001.png is of image 77"):
        DatasetCatalog.get("unknown_category")
    del content["categories"][1]["isthing"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="panoptic.json: category .*'dog'.* has no 'isthing'"):
        register(root, no_isthing=options)
    path.write_text("[]")
    with pytest.raises(ValueError, match="'no_categories': PANOPTIC_JSON .*panoptic.json has no 'images'"):
        register(root, no_categories=options)


def test_panoptic_files_missing(root):
    options = zoo(root)
    register(root, zoo_val=options)
    (root / "zoo/semantic/0001.png").unlink()
    with pytest.raises(FileNotFoundError, match="panoptic.json names 1 files that do not exist: .*semantic/0001.png$"):
        DatasetCatalog.get("zoo_val")


# --------------------------------------------------------------------------------------------------------------- checks


def test_number_of_classes_is_checked(root):
    cfg = register(root, street_train=street(root), zoo_val=zoo(root))
    cfg.DATASETS.TRAIN, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = ("street_train",), 19
    with pytest.raises(
        ValueError, match="NUM_CLASSES is 19, but dataset 'street_train' of DATASETS.TRAIN has 3 classes"
    ):
        check_num_classes(cfg)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    check_num_classes(cfg)
    cfg.DATASETS.TEST = ("zoo_val",)
    with pytest.raises(ValueError, match="NUM_CLASSES is 3, but dataset 'zoo_val' of DATASETS.TEST has 4 classes"):
        check_num_classes(cfg)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ade20k_sem_seg_val", 150),
        ("coco_2017_val", 80),
        ("coco_2017_val_panoptic", 133),
        ("cityscapes_fine_sem_seg_val", 19),
        ("cityscapes_fine_instance_seg_val", 8),
        ("cityscapes_fine_panoptic_val", 19),
    ],
)
def test_number_of_classes_of_built_in_datasets(root, name, count):
    cfg = config(root)
    cfg.DATASETS.TEST, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = (name,), count
    check_num_classes(cfg)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = count + 1
    with pytest.raises(ValueError, match=f"is {count + 1}, but dataset '{name}' of DATASETS.TEST has {count} classes"):
        check_num_classes(cfg)


def test_ignore_value_is_checked_where_it_is_used(root):
    cfg = register(root, street_train=street(root))
    cfg.DATASETS.TRAIN, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = ("street_train",), 3
    cfg.MODEL.SEM_SEG_HEAD.NAME = "MaskFormerHead"
    check_num_classes(cfg)
    cfg.MODEL.SEM_SEG_HEAD.NAME = "PerPixelBaselineHead"
    with pytest.raises(ValueError, match="IGNORE_VALUE is 255, but the ignore label of dataset 'street_train' is 11"):
        check_num_classes(cfg)
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 11
    check_num_classes(cfg)


def test_panoptic_results_need_things(root):
    cfg = register(root, street_train=street(root))
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    check_num_classes(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = "MaskFormer", True
    with pytest.raises(ValueError, match="PANOPTIC_ON is True, but dataset 'street_train' .* does not tell things"):
        check_num_classes(cfg)
