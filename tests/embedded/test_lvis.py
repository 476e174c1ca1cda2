"""LVIS v1: registration, loading, and average precision against a slow reference."""

import json
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import get_lvis_instances_meta, load_lvis_json
from detectron2.evaluation import LVISEvaluator
from detectron2.structures import Boxes, BoxMode, Instances

HEIGHT, WIDTH = 60, 80
FREQUENCY = "rcf"


@pytest.mark.parametrize(
    ("name", "json_file"),
    [
        ("lvis_v1_train", "lvis/lvis_v1_train.json"),
        ("lvis_v1_val", "lvis/lvis_v1_val.json"),
        ("lvis_v1_test_dev", "lvis/lvis_v1_image_info_test_dev.json"),
        ("lvis_v1_test_challenge", "lvis/lvis_v1_image_info_test_challenge.json"),
    ],
)
def test_registration(name, json_file):
    assert name in DatasetCatalog
    metadata = MetadataCatalog.get(name)
    assert metadata.evaluator_type == "lvis"
    assert metadata.json_file.endswith(json_file) and metadata.image_root.endswith("coco/")
    assert len(metadata.thing_classes) == len(set(metadata.thing_classes)) == 1203
    assert (metadata.thing_classes[0], metadata.thing_classes[-1]) == ("aerosol_can", "zucchini")
    assert metadata.class_image_count[:2] == [{"id": 1, "image_count": 64}, {"id": 2, "image_count": 364}]
    assert [entry["id"] for entry in metadata.class_image_count] == list(range(1, 1204))


@pytest.mark.embedded_only
def test_what_is_left_out_says_so():
    with pytest.raises(NotImplementedError, match="LVIS v0.5.*pip install"):
        get_lvis_instances_meta("lvis_v0.5_val")
    with pytest.raises(ValueError, match="'animals'.*lvis_v1"):
        get_lvis_instances_meta("animals")


def lvis_image(image_id, neg=(), not_exhaustive=()):
    return {
        "id": image_id,
        "coco_url": f"http://images.cocodataset.org/val2017/{image_id:012d}.jpg",
        "height": HEIGHT,
        "width": WIDTH,
        "neg_category_ids": list(neg),
        "not_exhaustive_category_ids": list(not_exhaustive),
    }


def lvis_annotation(number, image_id, category_id, box):
    x, y, w, h = (float(value) for value in box)
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "area": w * h,
        "bbox": [x, y, w, h],
        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
    }


def write_lvis(path, images, annotations, categories=6):
    entries = [{"id": k, "name": f"class {k}", "frequency": FREQUENCY[k % 3]} for k in range(1, categories + 1)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": entries}))
    return str(path)


@pytest.mark.embedded_only  # upstream needs the package lvis
class TestLoading:
    def test_dicts(self, tmp_path):
        annotation = lvis_annotation(5, 7, 4, (1, 2, 10, 20))
        images = [lvis_image(7, neg=[3], not_exhaustive=[4]), lvis_image(2)]
        path = write_lvis(tmp_path / "x.json", images, [annotation])
        empty, sample = load_lvis_json(path, "images/", extra_annotation_keys=["area"])
        assert empty["image_id"] == 2 and empty["annotations"] == []
        assert sample == {
            "file_name": "images/val2017/000000000007.jpg",
            "height": HEIGHT,
            "width": WIDTH,
            "image_id": 7,
            "not_exhaustive_category_ids": [4],
            "neg_category_ids": [3],
            "annotations": [
                {
                    "bbox": [1, 2, 10, 20],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": 3,
                    "area": 200,
                    "segmentation": annotation["segmentation"],
                }
            ],
        }

    def test_test_images_have_no_annotations(self, tmp_path):
        (tmp_path / "x.json").write_text(json.dumps({"images": [lvis_image(1)]}))
        (sample,) = load_lvis_json(str(tmp_path / "x.json"), "")
        assert sample["annotations"] == []

    def test_errors(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="none.json"):
            load_lvis_json(str(tmp_path / "none.json"), "")
        annotation = lvis_annotation(5, 1, 4, (1, 2, 10, 20))
        annotation["segmentation"] = [[1, 1, 2, 2]]
        path = write_lvis(tmp_path / "x.json", [lvis_image(1)], [annotation])
        with pytest.raises(ValueError, match="x.json: annotation 5 .*three points"):
            load_lvis_json(path, "")
        image = {key: value for key, value in lvis_image(1).items() if key != "coco_url"}
        with pytest.raises(ValueError, match="image 1 has no coco_url"):
            load_lvis_json(write_lvis(tmp_path / "x.json", [image], []), "")
        (tmp_path / "x.json").write_text("[]")
        with pytest.raises(ValueError, match="no 'images'"):
            load_lvis_json(str(tmp_path / "x.json"), "")


# ----------------------------------------------------------------------------------------------------------- evaluation


@pytest.fixture
def evaluate(tmp_path):
    """Evaluates ``{image id: [(box, class from 1, score)]}``."""

    def run(images, annotations, predictions, **arguments):
        name = f"lvis_test_{tmp_path.name}"
        json_file = write_lvis(tmp_path / "gt.json", images, annotations)
        MetadataCatalog.pop(name, None)
        MetadataCatalog.get(name).set(json_file=json_file)
        try:
            evaluator = LVISEvaluator(name, distributed=False, output_dir=str(tmp_path), **arguments)
            evaluator.reset()
            for image_id, found in predictions.items():
                evaluator.process([{"image_id": image_id}], [{"instances": as_instances(found)}])
            return evaluator.evaluate()
        finally:
            MetadataCatalog.pop(name, None)

    return run


def as_instances(found):
    instances = Instances((HEIGHT, WIDTH))
    instances.pred_masks = torch.zeros(len(found), HEIGHT, WIDTH, dtype=torch.bool)
    for mask, ((x, y, w, h), _, _) in zip(instances.pred_masks, found):
        mask[y : y + h, x : x + w] = True
    xywh = torch.tensor([box for box, _, _ in found], dtype=torch.float32).reshape(-1, 4)
    instances.pred_boxes = Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1))
    instances.pred_classes = torch.tensor([category - 1 for _, category, _ in found], dtype=torch.int64)
    instances.scores = torch.tensor([score for _, _, score in found], dtype=torch.float64)
    return instances


def iou(a, b):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    return intersection / (a[2] * a[3] + b[2] * b[3] - intersection)


def reference_ap(images, annotations, predictions, category, threshold, max_dets):
    """Average precision of one class, straight from LVIS' definition."""
    boxes = defaultdict(list)
    for annotation in annotations:
        if annotation["category_id"] == category:
            boxes[annotation["image_id"]].append(annotation["bbox"])
    count = sum(map(len, boxes.values()))
    if not count:
        return None
    judged = []  # (score, right)
    for image in images:
        best = sorted(predictions[image["id"]], key=lambda p: -p[2])[:max_dets]
        if not boxes[image["id"]] and category not in image["neg_category_ids"]:
            continue
        free = list(boxes[image["id"]])
        for box, label, score in best:
            if label != category:
                continue
            partner = max(free, key=lambda other: iou(box, other), default=None)
            if partner is not None and iou(box, partner) >= threshold:
                free.remove(partner)
                judged.append((score, True))
            elif category not in image["not_exhaustive_category_ids"]:
                judged.append((score, False))
    right = np.cumsum([hit for _, hit in sorted(judged, key=lambda j: -j[0])])
    precision, recall = right / np.arange(1, len(right) + 1), right / count
    return np.mean([max(precision[recall >= level], default=0.0) for level in np.linspace(0, 1, 101)])


@pytest.mark.embedded_only  # upstream needs the package lvis, which does not run with today's NumPy
@pytest.mark.parametrize("max_dets", [None, 4])
def test_average_precision(evaluate, max_dets):
    rng = np.random.default_rng(3)
    images, annotations, predictions = [], [], defaultdict(list)
    for image_id in range(1, 9):
        present = rng.choice(6, 2, replace=False) + 1
        absent = [int(k) for k in range(1, 7) if k not in present and rng.random() < 0.4]
        images.append(lvis_image(image_id, absent, [int(present[0])] if rng.random() < 0.5 else []))
        for category in map(int, rng.choice(present, 3)):
            x, y, w, h = (int(v) for v in (*rng.integers(0, 30, 2), *rng.integers(8, 25, 2)))
            annotations.append(lvis_annotation(len(annotations) + 1, image_id, category, (x, y, w, h)))
            for _ in range(rng.integers(0, 3)):
                predictions[image_id].append(((x + int(rng.integers(0, 4)), y, w, h), category, float(rng.random())))
        present_now = {a["category_id"] for a in annotations if a["image_id"] == image_id}
        images[-1]["not_exhaustive_category_ids"] = [
            k for k in images[-1]["not_exhaustive_category_ids"] if k in present_now
        ]
        for category in map(int, rng.integers(1, 7, 3)):
            predictions[image_id].append(((int(rng.integers(0, 50)), 5, 12, 14), category, float(rng.random())))

    thresholds = np.linspace(0.5, 0.95, 10)
    limit = max_dets or 300
    table = {
        k: [reference_ap(images, annotations, predictions, k, t, limit) for t in thresholds] for k in range(1, 7)
    }
    table = {k: np.array(row) for k, row in table.items() if row[0] is not None}

    def mean(frequency=FREQUENCY, index=slice(None)):
        return 100 * np.mean([row[index] for k, row in table.items() if FREQUENCY[k % 3] in frequency])

    expected = {"AP": mean(), "AP50": mean(index=0), "AP75": mean(index=5)}
    expected |= {f"AP{frequency}": mean(frequency) for frequency in FREQUENCY}
    assert 5 < expected["AP"] < 95
    results = evaluate(images, annotations, predictions, max_dets_per_image=max_dets)
    for task in ("bbox", "segm"):
        assert {key: results[task][key] for key in expected} == pytest.approx(expected)


@pytest.mark.embedded_only
def test_sizes_and_classes_without_ground_truth(evaluate, tmp_path):
    annotations = [lvis_annotation(1, 1, 1, (0, 0, 10, 10)), lvis_annotation(2, 1, 3, (20, 10, 40, 40))]
    # the large one is missed; class 2 is neither annotated nor ruled out, so its prediction does not count
    predictions = {1: [((0, 0, 10, 10), 1, 0.9), ((50, 0, 9, 9), 2, 0.95)]}
    results = evaluate([lvis_image(1)], annotations, predictions)
    assert set(results) == {"bbox", "segm"}
    segm = results["segm"]
    assert (segm["APs"], segm["APm"], segm["APc"], segm["APr"], segm["AP"]) == (100, 0, 100, 0, 50)
    assert math.isnan(segm["APl"]) and math.isnan(segm["APf"])
    saved = json.loads((tmp_path / "lvis_instances_results.json").read_text())
    assert [entry["category_id"] for entry in saved] == [1, 2]


@pytest.mark.embedded_only
def test_nothing_predicted(evaluate):
    annotations = [lvis_annotation(1, 1, 1, (0, 0, 10, 10))]
    results = evaluate([lvis_image(1)], annotations, {1: []}, tasks=["segm"])
    assert set(results) == {"segm"} and all(math.isnan(value) for value in results["segm"].values())
