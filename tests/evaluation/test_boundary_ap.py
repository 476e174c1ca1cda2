"""Boundary AP against faster-coco-eval's own boundary mode and against IoUs written out."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mask2former_plugin.evaluation.boundary import mask_boundary
from mask2former_plugin.evaluation.boundary_ap import (
    BoundaryCOCOeval,
    BoundaryCOCOEvaluator,
    BoundaryInstanceSegEvaluator,
    evaluate_files,
    evaluate_masks,
)

SIZE = (70, 90)


def ellipse(rng, size=SIZE):
    y, x = np.mgrid[: size[0], : size[1]]
    centre, radius = rng.uniform(0.2, 0.8, 2) * size, rng.uniform(8, 25, 2)
    return (((y - centre[0]) / radius[0]) ** 2 + ((x - centre[1]) / radius[1]) ** 2 < 1).astype(np.uint8)


def encode(mask):
    code = coco_mask.encode(np.asfortranarray(mask))
    return {"size": code["size"], "counts": code["counts"].decode()}


@pytest.fixture
def dataset():
    """COCO annotations of four images with crowds, and shifted, partly wrong predictions."""
    rng = np.random.default_rng(3)
    annotations, results = [], []
    for image in range(1, 5):
        for _ in range(5):
            mask, category = ellipse(rng), int(rng.choice([2, 7]))
            segmentation = encode(mask)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category,
                    "iscrowd": int(rng.random() < 0.2),
                    "segmentation": segmentation,
                    "area": int(mask.sum()),
                    "bbox": coco_mask.toBbox(segmentation).tolist(),
                }
            )
            shifted = np.roll(mask, tuple(rng.integers(0, 3, 2)), (0, 1))
            wrong = rng.random() < 0.2
            results.append(
                {
                    "image_id": image,
                    "category_id": 9 - category if wrong else category,
                    "score": float(rng.random()),
                    "segmentation": encode(shifted),
                    "bbox": [0.0, 0.0, 1.0, 1.0],
                }
            )
    images = [{"id": i, "height": SIZE[0], "width": SIZE[1], "file_name": f"{i}.jpg"} for i in range(1, 5)]
    categories = [{"id": 2, "name": "cat"}, {"id": 7, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}, results


@pytest.fixture
def files(dataset, tmp_path):
    paths = tmp_path / "gt.json", tmp_path / "dt.json"
    for path, content in zip(paths, dataset):
        path.write_text(json.dumps(content))
    return paths


@pytest.mark.parametrize("ratio", [0.02, 0.05])
def test_equal_to_faster_coco_eval(dataset, files, ratio):
    faster = pytest.importorskip("faster_coco_eval")
    truth = faster.COCO(copy.deepcopy(dataset[0]))
    results = [{key: value for key, value in result.items() if key != "bbox"} for result in dataset[1]]
    try:
        reference = faster.COCOeval_faster(
            truth,
            truth.loadRes(results),
            "boundary",
            print_function=lambda *_: None,
            boundary_dilation_ratio=ratio,
            boundary_cpu_count=1,
        )
    except TypeError:
        pytest.skip("this faster-coco-eval has no boundary mode")
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    ours = evaluate_files(*files, ratio)
    expected = [100 * value if value >= 0 else math.nan for value in reference.stats[:6]]
    assert list(ours.values()) == pytest.approx(expected, nan_ok=True, abs=1e-6)


def test_iou_is_the_smaller_one_of_mask_and_boundary(files, dataset):
    evaluation = evaluate_masks(COCO(str(files[0])), dataset[1], 0.04)
    assert isinstance(evaluation, BoundaryCOCOeval)
    compared = 0
    for (image, category), ious in evaluation.ious.items():
        truths = [a for a in dataset[0]["annotations"] if (a["image_id"], a["category_id"]) == (image, category)]
        results = [r for r in dataset[1] if (r["image_id"], r["category_id"]) == (image, category)]
        results.sort(key=lambda result: -result["score"])
        for row, result in zip(ious, results):
            for value, truth in zip(row, truths):
                masks = [coco_mask.decode(item["segmentation"]).astype(bool) for item in (result, truth)]
                pairs = [masks, [mask_boundary(mask, 0.04) for mask in masks]]
                if truth["iscrowd"]:
                    # the part of the prediction that the crowd covers, whatever its contour
                    assert value == pytest.approx((masks[0] & masks[1]).sum() / masks[0].sum())
                    continue
                expected = [(d & g).sum() / (d | g).sum() for d, g in pairs]
                if expected[0] >= 0.5:
                    assert value == pytest.approx(min(expected))
                    compared += 1
    assert compared > 5


def test_without_ratio_it_is_mask_ap(files):
    plain, boundary = evaluate_files(*files, None), evaluate_files(*files)
    assert 0 < boundary["AP"] < plain["AP"]


def test_perfect_masks_have_boundary_ap_100(dataset, tmp_path):
    truth = {**dataset[0], "annotations": [a for a in dataset[0]["annotations"] if not a["iscrowd"]]}
    results = [{**a, "score": 0.5} for a in truth["annotations"]]
    for name, content in (("gt.json", truth), ("dt.json", results)):
        (tmp_path / name).write_text(json.dumps(content))
    assert evaluate_files(tmp_path / "gt.json", tmp_path / "dt.json")["AP"] == pytest.approx(100)


def test_files_that_do_not_fit_are_named(files, dataset, tmp_path):
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps([{key: v for key, v in r.items() if key != "segmentation"} for r in dataset[1]]))
    with pytest.raises(ValueError, match="boxes.json has results without 'segmentation'"):
        evaluate_files(files[0], boxes)
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    with pytest.raises(ValueError, match="empty.json must hold a list of COCO results, at least one"):
        evaluate_files(files[0], empty)
    foreign = tmp_path / "foreign.json"
    foreign.write_text(json.dumps([{**dataset[1][0], "image_id": 77}]))
    with pytest.raises(ValueError, match="foreign.json has 1 images that .*gt.json lacks, such as id 77"):
        evaluate_files(files[0], foreign)


@pytest.mark.parametrize("evaluator_class", [BoundaryCOCOEvaluator, BoundaryInstanceSegEvaluator])
def test_evaluators_report_it_beside_mask_ap(dataset, files, evaluator_class, tmp_path):
    name = f"boundary_ap_{evaluator_class.__name__}"
    contiguous = {2: 0, 7: 1}
    MetadataCatalog.get(name).set(
        json_file=str(files[0]), thing_classes=["cat", "dog"], thing_dataset_id_to_contiguous_id=contiguous
    )
    try:
        evaluator = evaluator_class(name, distributed=False, dilation_ratio=0.05)
        evaluator.reset()
        for image in range(1, 5):
            results = [r for r in dataset[1] if r["image_id"] == image]
            instances = Instances(SIZE)
            masks = np.stack([coco_mask.decode(r["segmentation"]) for r in results])
            instances.pred_masks = torch.from_numpy(masks) > 0
            instances.pred_boxes = Boxes(torch.zeros(len(results), 4))
            instances.scores = torch.tensor([r["score"] for r in results], dtype=torch.float64)
            instances.pred_classes = torch.tensor([contiguous[r["category_id"]] for r in results])
            evaluator.process([{"image_id": image}], [{"instances": instances}])
        results = evaluator.evaluate()
    finally:
        MetadataCatalog.remove(name)
    expected = evaluate_files(*files, 0.05)
    assert {key: results["segm_boundary"][key] for key in expected} == pytest.approx(expected, nan_ok=True)
    assert results["segm"]["AP"] == pytest.approx(evaluate_files(*files, None)["AP"])
    assert "AP-dog" in results["segm_boundary"]
