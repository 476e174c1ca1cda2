"""PQ and mIoU of semantic predictions against sums over classes written out."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as coco_mask

from mask2former_plugin.evaluation.semantic_pq import SemanticPQEvaluator, evaluate_file

NAME = "semantic_pq_test"
IGNORE = 255
CLASSES = ("wall", "sky", "tree", "road")
DATASET_IDS = (3, 5, 8, 9)


def class_map(rng, size):
    return np.kron(rng.integers(0, len(CLASSES) - 1, (5, 6)), np.ones((8, 8), dtype=int))[: size[0], : size[1]]


@pytest.fixture
def images():
    """(truth, prediction): shifted, with ignored corners and a class that is predicted but never there."""
    rng = np.random.default_rng(4)
    pairs = []
    for size in ((33, 40), (38, 45), (40, 48)):
        truth = class_map(rng, size)
        prediction = np.roll(truth, (2, 2), (0, 1))
        truth[:10, :20] = IGNORE
        prediction[-3:, -4:] = 3
        pairs.append((truth, prediction))
    return pairs


@pytest.fixture
def dataset(images, tmp_path):
    """The truth, registered, with dataset ids that differ from the contiguous ones."""
    records = []
    for i, (truth, _) in enumerate(images):
        path = tmp_path / f"labels{i}.png"
        Image.fromarray(truth.astype(np.uint8)).save(path)
        records.append({"file_name": f"/photos/image{i}.jpg", "sem_seg_file_name": str(path)})
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(
        stuff_classes=list(CLASSES),
        ignore_label=IGNORE,
        stuff_dataset_id_to_contiguous_id={dataset_id: i for i, dataset_id in enumerate(DATASET_IDS)},
    )
    yield records
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.fixture
def predictions(images, tmp_path):
    """Writes ``sem_seg_predictions.json`` of the predictions, without the classes to leave out."""

    def write(left_out=(), folder="/elsewhere"):
        entries = []
        for i, (_, prediction) in enumerate(images):
            for label in np.unique(prediction).tolist():
                if label not in left_out:
                    code = coco_mask.encode(np.asfortranarray(prediction == label, dtype=np.uint8))
                    code["counts"] = code["counts"].decode()
                    name = f"{folder}/image{i}.jpg"
                    entries.append({"file_name": name, "category_id": DATASET_IDS[label], "segmentation": code})
        path = tmp_path / "sem_seg_predictions.json"
        path.write_text(json.dumps(entries))
        return path

    return write


def slow_results(images):
    """PQ, SQ, RQ and mIoU in percent, class by class."""
    rows, ious = [], []
    for label in range(len(CLASSES)):
        total = tp = fp = fn = both = either = 0
        for truth, prediction in images:
            t, p, void = truth == label, prediction == label, truth == IGNORE
            both += (t & p).sum()
            either += (t | (p & ~void)).sum()
            iou = (t & p).sum() / max(1, (t | (p & ~void)).sum())
            if iou > 0.5:
                total, tp = total + iou, tp + 1
                continue
            fn += t.any()
            fp += p.any() and (p & void).sum() / p.sum() <= 0.5
        weight = tp + fp / 2 + fn / 2
        if weight:
            rows.append([total / weight, total / max(1, tp), tp / weight])
        if either:
            ious.append(both / either)
    return [100 * value for value in (*np.mean(rows, axis=0), np.mean(ious))]


def headline(results):
    return [results[key] for key in ("PQ", "SQ", "RQ", "mIoU")]


def test_file_equals_the_definition(dataset, images, predictions):
    results = evaluate_file(NAME, predictions())
    assert headline(results) == pytest.approx(slow_results(images))
    assert 0 < results["RQ"] < 100
    # predicted and never there: counts as 0, as in the published tool
    assert results["IoU-road"] == 0


def test_unassigned_pixels_are_class_0(dataset, images, predictions):
    left_out = [(truth, np.where(prediction == 2, 0, prediction)) for truth, prediction in images]
    results = evaluate_file(NAME, predictions(left_out=[2]))
    assert headline(results) == pytest.approx(slow_results(left_out))


def test_evaluator_equals_the_file(dataset, images, predictions):
    evaluator = SemanticPQEvaluator(NAME)
    for record, (_, prediction) in zip(dataset, images):
        scores = torch.nn.functional.one_hot(torch.from_numpy(prediction), len(CLASSES)).permute(2, 0, 1).float()
        evaluator.process([{"file_name": record["file_name"]}], [{"sem_seg": scores}])
    assert evaluator.evaluate()["sem_seg_pq"] == pytest.approx(evaluate_file(NAME, predictions()), nan_ok=True)


def test_boundary_pq_is_lower(dataset, predictions):
    assert evaluate_file(NAME, predictions(), dilation_ratio=0.04)["PQ"] < evaluate_file(NAME, predictions())["PQ"]


def test_unknown_category_names_file_and_id(dataset, predictions):
    path = predictions()
    entries = json.loads(path.read_text())
    entries[0]["category_id"] = 77
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="image0.jpg: the dataset does not know the category id 77"):
        evaluate_file(NAME, path)


def test_unknown_image_is_named(dataset, predictions):
    path = predictions()
    path.write_text(path.read_text().replace("image1", "holiday"))
    with pytest.raises(ValueError, match="/elsewhere/holiday.jpg is no image of this dataset"):
        evaluate_file(NAME, path)


def test_file_of_another_kind_is_refused(dataset, tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps([{"image_id": 3, "bbox": [0, 0, 1, 1]}]))
    with pytest.raises(ValueError, match="boxes.json must hold a list of dicts with file_name, category_id"):
        evaluate_file(NAME, path)
    path.write_text("{")
    with pytest.raises(ValueError, match="boxes.json is no JSON"):
        evaluate_file(NAME, path)
