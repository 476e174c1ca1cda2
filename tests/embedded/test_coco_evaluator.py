"""COCO average precision against pycocotools called by hand, and what happens at the edges."""

import contextlib
import io
import itertools
import json
import logging

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances

pytestmark = pytest.mark.embedded_only

HEIGHT, WIDTH = 120, 150
CATEGORIES = [{"id": 3, "name": "dog"}, {"id": 8, "name": "cat"}, {"id": 11, "name": "cow"}]


def random_mask(rng):
    """An ellipse of any size, small to large in COCO's sense."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    cy, cx, ry, rx = rng.randint(20, 100), rng.randint(20, 130), rng.randint(3, 70), rng.randint(3, 70)
    return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1


def annotation(number, image_id, category, mask, crowd=0):
    code = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "iscrowd": crowd,
        "area": float(mask.sum()),
        "bbox": mask_util.toBbox(code).tolist(),
        "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
    }


def make_dataset(name, tmp_path, annotations, images=6):
    content = {
        "info": {},
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH, "file_name": f"{i}.jpg"} for i in range(1, images + 1)],
        "categories": CATEGORIES,
    }
    if annotations is not None:
        content["annotations"] = annotations
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    register_coco_instances(name, {}, str(path), str(tmp_path))
    if annotations is not None:
        DatasetCatalog.get(name)  # fills in class names and the id map
    return str(path)


@pytest.fixture
def dataset(tmp_path, request):
    rng = np.random.RandomState(4)
    numbers = itertools.count(1)
    annotations = []
    for image_id in range(1, 7):
        for _ in range(rng.randint(0, 7)):
            crowd = int(rng.rand() < 0.15)
            annotations.append(annotation(next(numbers), image_id, int(rng.choice([3, 8])), random_mask(rng), crowd))
    name = f"coco_evaluator_{request.node.name}"
    path = make_dataset(name, tmp_path, annotations)
    yield name, path, annotations, rng
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def as_instances(masks, classes, scores):
    instances = Instances((HEIGHT, WIDTH))
    masks = torch.from_numpy(np.asarray(masks).reshape(-1, HEIGHT, WIDTH))
    instances.pred_masks = masks.float()
    instances.pred_boxes = BitMasks(masks).get_bounding_boxes()
    instances.pred_classes = torch.as_tensor(classes, dtype=torch.int64)
    instances.scores = torch.as_tensor(scores, dtype=torch.float32)
    return instances


def random_predictions(annotations, rng):
    """By image: shifted copies of the truth, some of a wrong class, and masks from nowhere."""
    predictions = {}
    for image_id in range(1, 7):
        masks, classes = [], []
        for truth in annotations:
            if truth["image_id"] == image_id and rng.rand() < 0.85:
                mask = mask_util.decode(truth["segmentation"]).astype(bool)
                masks.append(np.roll(mask, rng.randint(-4, 5), axis=rng.randint(2)))
                classes.append({3: 0, 8: 1}[truth["category_id"]] if rng.rand() < 0.9 else 2)
        for _ in range(2):
            masks.append(random_mask(rng))
            classes.append(rng.randint(3))
        predictions[image_id] = as_instances(masks, classes, rng.rand(len(masks)))
    return predictions


def run(evaluator, predictions, **kwargs):
    evaluator.reset()
    for image_id, instances in predictions.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate(**kwargs)


def by_hand(path, predictions, iou_type, image_ids=None, max_dets=100):
    """pycocotools' twelve numbers and its precision array."""
    results = []
    for image_id, instances in predictions.items():
        for index in range(len(instances)):
            mask = np.asfortranarray(instances.pred_masks[index].numpy().astype(np.uint8))
            x0, y0, x1, y1 = instances.pred_boxes.tensor[index].tolist()
            result = {
                "image_id": image_id,
                "category_id": [3, 8, 11][instances.pred_classes[index]],
                "score": float(instances.scores[index]),
            }
            if iou_type == "segm":
                result["segmentation"] = mask_util.encode(mask)
            else:
                result["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            results.append(result)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
        evaluation = COCOeval(truth, truth.loadRes(results), iou_type)
        evaluation.params.maxDets = [1, 10, max_dets]
        if image_ids is not None:
            evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats, evaluation.eval["precision"]


@pytest.mark.parametrize("use_fast_impl", [True, False])
def test_equal_to_pycocotools(dataset, use_fast_impl):
    name, path, annotations, rng = dataset
    predictions = random_predictions(annotations, rng)
    results = run(COCOEvaluator(name, use_fast_impl=use_fast_impl), predictions)
    assert list(results) == ["bbox", "segm"]
    for task, numbers in results.items():
        stats, precision = by_hand(path, predictions, task)
        expected = np.where(stats < 0, np.nan, 100 * stats)[:6]
        assert [numbers[key] for key in ("AP", "AP50", "AP75", "APs", "APm", "APl")] == pytest.approx(
            expected, nan_ok=True
        )
        assert 10 < numbers["AP"] < 95
        for index, category in enumerate(["dog", "cat"]):
            values = precision[:, :, index, 0, -1]
            assert numbers[f"AP-{category}"] == pytest.approx(100 * values[values > -1].mean())
        assert np.isnan(numbers["AP-cow"])  # not in the ground truth
        assert all(type(value) is float for value in numbers.values())


def test_chosen_task_images_and_number_of_detections(dataset):
    name, path, annotations, rng = dataset
    predictions = random_predictions(annotations, rng)
    results = run(COCOEvaluator(name, tasks=("segm",)), predictions, img_ids=[2, 4])
    assert list(results) == ["segm"]
    assert results["segm"]["AP"] == pytest.approx(100 * by_hand(path, predictions, "segm", [2, 4])[0][0])
    for use_fast_impl in (True, False):
        few = run(COCOEvaluator(name, max_dets_per_image=2, use_fast_impl=use_fast_impl), predictions)
        precision = by_hand(path, predictions, "bbox", max_dets=2)[1][:, :, :, 0, -1]
        assert few["bbox"]["AP"] == pytest.approx(100 * precision[precision > -1].mean())


def test_perfect_predictions(dataset):
    name, _, annotations, _ = dataset
    predictions = {}
    for image_id in range(1, 7):
        mine = [truth for truth in annotations if truth["image_id"] == image_id and not truth["iscrowd"]]
        masks = [mask_util.decode(truth["segmentation"]).astype(bool) for truth in mine]
        classes = [{3: 0, 8: 1}[truth["category_id"]] for truth in mine]
        predictions[image_id] = as_instances(masks, classes, [0.5] * len(mine))
    results = run(COCOEvaluator(name), predictions)
    assert results["bbox"]["AP"] == pytest.approx(100) and results["segm"]["AP"] == pytest.approx(100)


def test_files(dataset, tmp_path):
    name, path, annotations, rng = dataset
    predictions = random_predictions(annotations, rng)
    output = tmp_path / "out"
    run(COCOEvaluator(name, output_dir=str(output)), predictions)
    results = json.loads((output / "coco_instances_results.json").read_text())
    assert len(results) == sum(map(len, predictions.values()))
    first = predictions[1]
    for result, mask, label in zip(results, first.pred_masks, first.pred_classes):
        assert result["image_id"] == 1 and result["category_id"] == [3, 8, 11][label]
        assert (mask_util.decode(result["segmentation"]) == mask.numpy()).all()
    saved = torch.load(output / "instances_predictions.pth", weights_only=True)
    assert [prediction["image_id"] for prediction in saved] == [1, 2, 3, 4, 5, 6]


def test_instances_to_json():
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json

    instances = Instances((4, 5))
    instances.pred_boxes = Boxes(torch.tensor([[1.0, 0.5, 4.0, 3.0]]))
    instances.scores = torch.tensor([0.25])
    instances.pred_classes = torch.tensor([2])
    expected = {"image_id": 9, "category_id": 2, "bbox": [1.0, 0.5, 3.0, 2.5], "score": 0.25}
    assert instances_to_coco_json(instances, 9) == [expected]
    mask = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    code = mask_util.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    expected["segmentation"] = {"size": [4, 5], "counts": code["counts"].decode()}
    instances.pred_masks = mask[None].bool()
    assert instances_to_coco_json(instances, 9) == [expected]
    instances.remove("pred_masks")
    instances.pred_masks_rle = [expected["segmentation"]]
    assert instances_to_coco_json(instances, 9) == [expected]
    assert instances_to_coco_json(instances[:0], 9) == []
    with pytest.raises(NotImplementedError, match="upstream"):
        instances.pred_keypoints = torch.zeros(1, 17, 3)
        instances_to_coco_json(instances, 9)


def test_no_predictions(dataset, caplog):
    name, *_ = dataset
    evaluator = COCOEvaluator(name)
    with caplog.at_level(logging.WARNING):
        assert evaluator.evaluate() == {}
    assert "no predictions" in caplog.text
    results = run(evaluator, {1: as_instances([], [], []), 2: as_instances([], [], [])})
    assert set(results) == {"bbox"} and all(np.isnan(value) for value in results["bbox"].values())
    results = run(COCOEvaluator(name, tasks=["bbox", "segm"]), {1: as_instances([], [], [])})
    assert set(results) == {"bbox", "segm"}


@pytest.mark.parametrize("use_fast_impl", [True, False])
def test_ground_truth_without_instances(tmp_path, use_fast_impl):
    name = f"coco_evaluator_empty_{use_fast_impl}"
    make_dataset(name, tmp_path, [])
    try:
        rng = np.random.RandomState(0)
        predictions = {1: as_instances([random_mask(rng)], [1], [0.9])}
        results = run(COCOEvaluator(name, use_fast_impl=use_fast_impl), predictions)
        assert all(np.isnan(value) for task in ("bbox", "segm") for value in results[task].values())
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_dataset_without_annotations_writes_results_only(tmp_path):
    name = "coco_evaluator_test_split"
    make_dataset(name, tmp_path, None)
    MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id = {3: 0, 8: 1, 11: 2}
    try:
        predictions = {1: as_instances([random_mask(np.random.RandomState(0))], [1], [0.9])}
        assert run(COCOEvaluator(name, output_dir=str(tmp_path / "out")), predictions) == {}
        assert json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())[0]["category_id"] == 8
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_dataset_without_json_file_is_converted(tmp_path):
    name = "coco_evaluator_python_dataset"
    mask = random_mask(np.random.RandomState(1))
    code = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    record = {"file_name": "a.jpg", "image_id": 5, "height": HEIGHT, "width": WIDTH}
    x, y, w, h = mask_util.toBbox(code).tolist()
    truth = {
        "bbox": [x, y, x + w, y + h],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": 1,
        "segmentation": code,
        "iscrowd": 0,
    }
    DatasetCatalog.register(name, lambda: [{**record, "annotations": [truth]}])
    MetadataCatalog.get(name).thing_classes = ["a", "b"]
    try:
        with pytest.raises(ValueError, match="output_dir"):
            COCOEvaluator(name)
        results = run(COCOEvaluator(name, output_dir=str(tmp_path)), {5: as_instances([mask], [1], [0.9])})
        assert results["segm"]["AP"] == pytest.approx(100) and results["segm"]["AP-b"] == pytest.approx(100)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_a_config_in_the_place_of_tasks_is_ignored(dataset, caplog):
    """As older projects call it."""
    name, _, annotations, rng = dataset
    results = run(COCOEvaluator(name, get_cfg(), False), random_predictions(annotations, rng))
    assert list(results) == ["bbox", "segm"] and "config" in caplog.text


def test_errors(dataset):
    name, _, _, rng = dataset
    with pytest.raises(AssertionError, match=r"class 3.*0\.\.2"):
        run(COCOEvaluator(name), {1: as_instances([random_mask(rng)], [3], [0.5])})
    with pytest.raises(NotImplementedError, match="keypoints.*upstream"):
        COCOEvaluator(name, tasks=("keypoints",))
    with pytest.raises(NotImplementedError, match="proposals.*upstream"):
        COCOEvaluator(name).process([{"image_id": 1}], [{"proposals": None}])
    metadata = MetadataCatalog.get(name)
    names, metadata.__dict__["thing_classes"] = metadata.thing_classes, ["dog", "cat"]
    with pytest.raises(ValueError, match="2 thing_classes.*3 categories"):
        run(COCOEvaluator(name), {1: as_instances([random_mask(rng)], [0], [0.5])})
    metadata.__dict__["thing_classes"] = names
    metadata.__dict__["json_file"] = "/nowhere/instances.json"
    with pytest.raises(FileNotFoundError, match="/nowhere/instances.json"):
        COCOEvaluator(name)


def test_both_generations_of_the_helper(dataset):
    """Projects call it with ``use_fast_impl`` (before 2022) or with ``cocoeval_fn``."""
    from detectron2.evaluation.coco_evaluation import _evaluate_predictions_on_coco
    from detectron2.evaluation.fast_eval_api import COCOeval_opt

    name, path, annotations, rng = dataset
    evaluator = COCOEvaluator(name)
    for instances in random_predictions(annotations, rng).items():
        evaluator.process([{"image_id": instances[0]}], [{"instances": instances[1]}])
    results = [result for prediction in evaluator._predictions for result in prediction["instances"]]
    for result in results:
        result["category_id"] = [3, 8, 11][result["category_id"]]
    aps = []
    for arguments in (
        {"use_fast_impl": True},
        {"use_fast_impl": False},
        {"cocoeval_fn": COCOeval_opt},
        {"cocoeval_fn": COCOeval},
        {},
    ):
        coco_eval = _evaluate_predictions_on_coco(
            evaluator._coco_api,
            results,
            "segm",
            kpt_oks_sigmas=(),
            img_ids=None,
            max_dets_per_image=[1, 10, 100],
            **arguments,
        )
        aps.append(evaluator._derive_coco_results(coco_eval, "segm", class_names=["dog", "cat", "cow"])["AP"])
        assert coco_eval.stats[0] * 100 == pytest.approx(aps[-1])
    assert aps == pytest.approx([aps[0]] * 5)
    assert "bbox" in results[0]  # the caller's results stay as they are


@pytest.mark.parametrize("name", ["PascalVOCDetectionEvaluator", "RotatedCOCOEvaluator"])
def test_left_out_evaluators_say_so(name):
    import detectron2.evaluation

    with pytest.raises(NotImplementedError, match=f"{name}.*install"):
        getattr(detectron2.evaluation, name)("some_dataset")


def test_evaluating_again_gives_the_same(dataset):
    name, _, annotations, rng = dataset
    evaluator = COCOEvaluator(name, distributed=False)
    first = run(evaluator, random_predictions(annotations, rng))
    assert first["segm"]["AP"] > 0
    np.testing.assert_equal(dict(evaluator.evaluate()), dict(first))


def test_a_panoptic_dataset_without_instance_file_is_converted(tmp_path):
    name = "coco_evaluator_no_instances"
    box = {"bbox": [0, 0, 20, 30], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    record = {"file_name": "1.jpg", "height": HEIGHT, "width": WIDTH, "image_id": 1, "annotations": [box]}
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(json_file=None, thing_classes=["dog"])
    evaluator = COCOEvaluator(name, distributed=False, output_dir=str(tmp_path))
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[:30, :20] = True
    instances = as_instances([mask], [0], [0.9])
    instances.remove("pred_masks")
    assert run(evaluator, {1: instances})["bbox"]["AP"] == pytest.approx(100)
