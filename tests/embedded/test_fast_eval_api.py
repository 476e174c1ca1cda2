"""The fast COCO evaluation against pycocotools, for image ids that are text."""

import contextlib
import io

import numpy as np
import pytest
from detectron2.evaluation import fast_eval_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

pytestmark = pytest.mark.embedded_only


def scene(ids, rng):
    annotations, results = [], []
    for image_id in ids:
        for category in rng.integers(1, 4, 4).tolist():
            x, y, w, h = rng.integers(5, 60, 4).tolist()
            number = len(annotations) + 1
            annotation = {"id": number, "image_id": image_id, "category_id": category, "bbox": [x, y, w, h]}
            annotations.append({**annotation, "area": w * h, "iscrowd": int(rng.random() < 0.1)})
            box = [x + int(rng.integers(0, 6)), y, w, h]
            results.append({"image_id": image_id, "category_id": category, "bbox": box, "score": float(rng.random())})
        results.append({"image_id": image_id, "category_id": 1, "bbox": [70, 70, 20, 20], "score": float(rng.random())})
    ground_truth = COCO()
    ground_truth.dataset = {
        "images": [{"id": image_id, "height": 128, "width": 128} for image_id in ids],
        "categories": [{"id": k, "name": str(k)} for k in (1, 2, 3)],
        "annotations": annotations,
    }
    ground_truth.createIndex()
    return ground_truth, ground_truth.loadRes(results)


def evaluate(function, ground_truth, predictions, image_ids):
    evaluation = function(ground_truth, predictions, "bbox")
    if image_ids is not None:
        evaluation.params.imgIds = image_ids
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("some", [None, ["ADE_val_00000009", "ADE_val_00000002"]])
def test_text_as_image_id(some):
    ids = [f"ADE_val_{number:08d}" for number in (9, 2, 11, 5)]
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth, predictions = scene(ids, np.random.default_rng(4))
        expected = evaluate(COCOeval, ground_truth, predictions, some)
        found = evaluate(fast_eval_api.COCOeval_opt, ground_truth, predictions, some)
    np.testing.assert_allclose(found[:12], expected)
    assert 10 < 100 * expected[0] < 90
    assert {image["id"] for image in ground_truth.dataset["images"]} == set(ids)
