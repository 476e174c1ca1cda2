"""The semantic evaluator against per-class loops, its files and errors; run-length codes against pycocotools."""

import json

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator

pytestmark = pytest.mark.embedded_only

NAMES = ["road", "car", "sky", "rare", "never"]
SIZES = [(40, 60), (33, 81), (50, 50)]


def random_labels(rng, height, width, values):
    cells = rng.choice(values, size=(-(-height // 9), -(-width // 9)))
    return np.kron(cells, np.ones((9, 9), dtype=np.int64))[:height, :width]


def register(name, tmp_path, truths, dtype=np.uint8, **metadata):
    records = []
    for number, truth in enumerate(truths):
        path = tmp_path / f"{name}_{number}.png"
        Image.fromarray(truth.astype(dtype)).save(path)
        records.append({"file_name": f"/images/{number}.jpg", "sem_seg_file_name": str(path), "image_id": number})
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(**{"stuff_classes": NAMES, "ignore_label": 255, **metadata})
    return records


@pytest.fixture
def dataset(tmp_path, request):
    """Random label files, and predictions that are right in most places."""
    rng = np.random.RandomState(2)
    truths = [random_labels(rng, *size, values=[0, 1, 2, 255]) for size in SIZES]
    predictions = []
    for truth in truths:
        other = random_labels(rng, *truth.shape, values=[0, 1, 2, 3])
        keep = (rng.rand(*truth.shape) < 0.7) & (truth != 255)
        predictions.append(np.where(keep, truth, other))
    name = f"sem_seg_{request.node.name}"
    records = register(name, tmp_path, truths)
    yield name, records, truths, predictions
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def scores_of(labels):
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels), len(NAMES)).permute(2, 0, 1).float()
    return one_hot + torch.rand(one_hot.shape) * 0.5


def run(name, records, outputs, **kwargs):
    evaluator = SemSegEvaluator(name, **kwargs)
    evaluator.reset()
    for record, output in zip(records, outputs):
        evaluator.process([record], [{"sem_seg": output}])
    return evaluator.evaluate()["sem_seg"]


def slow_boundary(mask):
    distance = max(1, round(0.02 * np.hypot(*mask.shape)))
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    return mask & (cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)[1:-1, 1:-1] == 0)


def slow_results(truths, predictions):
    results, ious, accuracies, pixels = {}, [], [], []
    for index, name in enumerate(NAMES):
        sums = np.zeros(6)
        for truth, prediction in zip(truths, predictions):
            valid = truth != 255
            a, b = (truth == index) & valid, (prediction == index) & valid
            c, d = slow_boundary(a), slow_boundary(b)
            sums += (a & b).sum(), (a | b).sum(), a.sum(), (c & d).sum(), (c | d).sum(), 0
        occurs = sums[2] > 0
        iou = 100 * sums[0] / sums[1] if occurs else np.nan
        boundary = 100 * sums[3] / sums[4] if occurs else np.nan
        results[f"IoU-{name}"] = iou
        results[f"BoundaryIoU-{name}"] = boundary
        results[f"min(IoU, B-Iou)-{name}"] = min(iou, boundary) if occurs else np.nan
        results[f"ACC-{name}"] = 100 * sums[0] / sums[2] if occurs else np.nan
        if occurs:
            ious.append(iou)
            accuracies.append(results[f"ACC-{name}"])
            pixels.append(sums[2])
    results["mIoU"], results["mACC"] = np.mean(ious), np.mean(accuracies)
    results["fwIoU"] = np.average(ious, weights=pixels)
    results["pACC"] = np.average(accuracies, weights=pixels)
    return results


def test_numbers_equal_per_class_loops(dataset):
    name, records, truths, predictions = dataset
    expected = slow_results(truths, predictions)
    results = run(name, records, [scores_of(prediction) for prediction in predictions])
    assert results == pytest.approx(expected, nan_ok=True)
    assert all(type(value) is float for value in results.values())
    assert np.isnan(results["IoU-rare"])  # predicted, but not in the ground truth


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_label_maps_as_predictions(dataset, dtype):
    name, records, truths, predictions = dataset
    results = run(name, records, [torch.from_numpy(prediction).to(dtype) for prediction in predictions])
    assert results == pytest.approx(slow_results(truths, predictions), nan_ok=True)


def test_perfect_and_worst_boundary(dataset):
    name, records, truths, _ = dataset
    perfect = run(name, records, [torch.from_numpy(np.where(truth == 255, 4, truth)) for truth in truths])
    assert perfect["mIoU"] == perfect["pACC"] == perfect["BoundaryIoU-road"] == perfect["BoundaryIoU-sky"] == 100.0
    # One class in half of an image; the prediction is shifted by more than the width of the boundary.
    truth = np.zeros((100, 100), dtype=np.int64)
    truth[:, 50:] = 1
    expected = slow_results([truth], [np.roll(truth, 20, axis=1)])
    from detectron2.evaluation.sem_seg_evaluation import boundary_counts

    both, predicted, true = boundary_counts(np.roll(truth, 20, axis=1), truth, len(NAMES))
    assert 100 * both[1] / (predicted[1] + true[1] - both[1]) == pytest.approx(expected["BoundaryIoU-car"])


def test_sixteen_bit_labels_and_another_ignore_label(tmp_path):
    names = [f"class{index}" for index in range(900)]
    rng = np.random.RandomState(0)
    truth = random_labels(rng, 40, 50, [0, 255, 256, 899, 65535])
    records = register("sem_seg_16bit", tmp_path, [truth], np.uint16, stuff_classes=names, ignore_label=65535)
    try:
        prediction = np.where(truth == 65535, 0, truth)
        prediction[:, :20] = 255
        results = run("sem_seg_16bit", records, [torch.from_numpy(prediction)])
        for label in (0, 255, 256, 899):
            a, b = truth == label, (prediction == label) & (truth != 65535)
            assert results[f"IoU-class{label}"] == pytest.approx(100 * (a & b).sum() / (a | b).sum())
    finally:
        DatasetCatalog.remove("sem_seg_16bit")
        MetadataCatalog.remove("sem_seg_16bit")


def test_nothing_but_ignored_pixels(tmp_path):
    records = register("sem_seg_void", tmp_path, [np.full((8, 9), 255)])
    try:
        results = run("sem_seg_void", records, [torch.zeros(8, 9, dtype=torch.int64)])
        assert all(np.isnan(value) for value in results.values())
    finally:
        DatasetCatalog.remove("sem_seg_void")
        MetadataCatalog.remove("sem_seg_void")


def test_files(dataset, tmp_path):
    name, records, _, predictions = dataset
    MetadataCatalog.get(name).stuff_dataset_id_to_contiguous_id = {10 * (index + 1): index for index in range(5)}
    output = tmp_path / "out"
    results = run(name, records, [scores_of(prediction) for prediction in predictions], output_dir=str(output))
    saved = torch.load(output / "sem_seg_evaluation.pth", weights_only=True)
    assert saved == pytest.approx(results, nan_ok=True)
    entries = json.loads((output / "sem_seg_predictions.json").read_text())
    for record, prediction in zip(records, predictions):
        mine = [entry for entry in entries if entry["file_name"] == record["file_name"]]
        assert [entry["category_id"] for entry in mine] == [10 * (k + 1) for k in np.unique(prediction)]
        for entry in mine:
            mask = mask_util.decode(entry["segmentation"])
            assert (mask == (prediction == entry["category_id"] // 10 - 1)).all()


def test_own_loading_function(dataset):
    name, records, truths, predictions = dataset
    asked = []

    def load(file_name, dtype):
        asked.append(file_name)
        return truths[len(asked) - 1].astype(dtype)

    results = run(name, records, [torch.from_numpy(p) for p in predictions], sem_seg_loading_fn=load)
    assert asked == [record["sem_seg_file_name"] for record in records]
    assert results == pytest.approx(slow_results(truths, predictions), nan_ok=True)


def test_errors_name_file_and_ids(dataset, tmp_path):
    name, records, truths, _ = dataset
    evaluator = SemSegEvaluator(name)
    good = torch.zeros(SIZES[0], dtype=torch.int64)

    def process(output, record=records[0]):
        evaluator.process([record], [{"sem_seg": output}])

    with pytest.raises(ValueError, match=r"0\.jpg.*\(40, 61\).*_0\.png.*\(40, 60\)"):
        process(torch.zeros(5, 40, 61))
    with pytest.raises(ValueError, match="scores for 6 classes.*has 5"):
        process(torch.zeros(6, 40, 60))
    with pytest.raises(ValueError, match=r"holds 0\.\.5"):
        process(torch.where(good == 0, 5, 0).index_fill(0, torch.tensor([0]), 0))
    with pytest.raises(ValueError, match="integer label map"):
        process(good.float())
    with pytest.raises(KeyError, match="unknown.jpg"):
        process(good, {"file_name": "unknown.jpg"})
    Image.fromarray(np.where(truths[0] == 2, 77, truths[0]).astype(np.uint8)).save(records[0]["sem_seg_file_name"])
    with pytest.raises(ValueError, match=r"_0\.png.*\[77\].*0\.\.4.*255"):
        process(good)
    Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8)).save(records[0]["sem_seg_file_name"])
    with pytest.raises(ValueError, match=r"_0\.png.*\(40, 60, 3\)"):
        process(good)
    with pytest.raises(ValueError, match="num_classes=3"):
        SemSegEvaluator(name, num_classes=3)
    # A failed image must not have left traces in the counts.
    assert evaluator._conf_matrix.sum() == 0


@pytest.mark.parametrize("shape", [(7, 12, 9), (1, 1, 1), (3, 1, 20), (3, 20, 1), (0, 4, 4)])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_run_length_codes_equal_pycocotools(shape, density):
    from detectron2.evaluation import rle

    masks = torch.rand(shape) < density
    expected = [mask_util.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in masks]
    for given in (masks, masks.to(torch.uint8) * 3, masks.float(), masks.to(torch.int64)):
        codes = rle.encode_masks(given)
        assert [code["counts"].encode() for code in codes] == [code["counts"] for code in expected]
        assert [code["size"] for code in codes] == [code["size"] for code in expected]


def test_run_length_codes_of_several_masks_at_once():
    """The way that GPUs take: several masks per step."""
    from detectron2.evaluation.rle import _run_ends

    masks = torch.rand(5, 6, 8) < 0.4
    ends, owner = _run_ends(masks)
    for index, mask in enumerate(masks):
        flat = np.concatenate(([0], mask.numpy().T.ravel().astype(int)))
        assert (ends[owner == index] == np.flatnonzero(np.diff(flat))).all()


def test_evaluating_again_gives_the_same(dataset, monkeypatch):
    """Also with several processes, whose counts are added."""
    from detectron2.evaluation import sem_seg_evaluation

    monkeypatch.setattr(sem_seg_evaluation, "gather", lambda own: [own, own])
    name, records, _, predictions = dataset
    evaluator = SemSegEvaluator(name)
    for record, prediction in zip(records, predictions):
        evaluator.process([record], [{"sem_seg": torch.from_numpy(prediction)}])
    counts = evaluator._conf_matrix.copy()
    first = evaluator.evaluate()
    np.testing.assert_equal(dict(evaluator.evaluate()["sem_seg"]), dict(first["sem_seg"]))
    assert (evaluator._conf_matrix == counts).all()
