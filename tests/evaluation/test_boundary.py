"""Boundary regions and boundary PQ against slow, obvious references."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from mask2former_plugin.evaluation.boundary import boundary_distance, boundary_pixels, mask_boundary
from mask2former_plugin.evaluation.panoptic_evaluation import evaluate_files
from mask2former_plugin.evaluation.panoptic_quality import match_segments, summarize


def slow_boundary(mask, distance):
    """Pixels of the mask that a whole square around them does not lie in."""
    height, width = mask.shape
    result = np.zeros(mask.shape, dtype=bool)
    for y, x in np.argwhere(mask):
        rows, columns = range(y - distance, y + distance + 1), range(x - distance, x + distance + 1)
        inside = all(0 <= r < height and 0 <= c < width and mask[r, c] for r in rows for c in columns)
        result[y, x] = not inside
    return result


@pytest.mark.parametrize("size, ratio, distance", [((30, 40), 0.02, 1), ((30, 40), 0.06, 3), ((300, 400), 0.02, 10)])
def test_distance_is_a_part_of_the_diagonal(size, ratio, distance):
    assert boundary_distance(*size, ratio) == distance


def test_distance_is_at_least_one_pixel():
    assert boundary_distance(4, 4, 1e-6) == 1


def test_ratio_must_be_positive():
    with pytest.raises(ValueError, match="dilation ratio must be positive, got 0"):
        boundary_distance(10, 10, 0)


@pytest.mark.parametrize("ratio", [0.02, 0.06, 0.2])
def test_boundary_equals_the_definition(ratio):
    rng = np.random.default_rng(1)
    labels = np.kron(rng.integers(0, 3, (4, 5)), np.ones((7, 8))).astype(np.uint16)[:25, :37]
    distance = boundary_distance(*labels.shape, ratio)
    of_all = boundary_pixels(labels, ratio)
    for label in range(3):
        mask = labels == label
        expected = slow_boundary(mask, distance)
        np.testing.assert_array_equal(mask_boundary(mask, ratio), expected)
        # all labels at once is the same as one after the other
        np.testing.assert_array_equal(of_all & mask, expected)


def slow_counts(true_map, true_segments, predicted_map, predicted_segments, category, ratio):
    """(IoU sum, tp, fp, fn) of one category, segment by segment, from the definition."""
    void = true_map == 0
    distance = None if ratio is None else max(1, round(ratio * math.hypot(*true_map.shape)))

    def overlap(true_mask, predicted_mask):
        predicted_mask = predicted_mask & ~void
        union = (true_mask | predicted_mask).sum()
        return (true_mask & predicted_mask).sum() / union if union else 0.0

    total, matched_true, matched_predicted = 0.0, set(), set()
    for t in true_segments:
        for p in predicted_segments:
            if t["iscrowd"] or not t["category_id"] == p["category_id"] == category:
                continue
            masks = (true_map == t["id"], predicted_map == p["id"])
            iou = overlap(*masks)
            if distance is not None:
                iou = min(iou, overlap(*(slow_boundary(mask, distance) for mask in masks)))
            if iou > 0.5:
                total += iou
                matched_true.add(t["id"])
                matched_predicted.add(p["id"])
    missed = [
        t for t in true_segments if t["category_id"] == category and not t["iscrowd"] and t["id"] not in matched_true
    ]
    surplus = 0
    for p in predicted_segments:
        mask = predicted_map == p["id"]
        if p["category_id"] != category or p["id"] in matched_predicted or not mask.any():
            continue
        crowds = [t["id"] for t in true_segments if t["iscrowd"] and t["category_id"] == category]
        surplus += (mask & (void | np.isin(true_map, crowds))).sum() / mask.sum() <= 0.5
    return total, len(matched_true), surplus, len(missed)


def blobs(rng, size, count, background):
    """Ellipses on a background segment, ids 1 … count + 1; 0 is void."""
    ids = np.full(size, background)
    y, x = np.mgrid[: size[0], : size[1]]
    for i in range(2, count + 2):
        centre, radius = rng.uniform(0, size), rng.uniform(6, 14, 2)
        ids[((y - centre[0]) / radius[0]) ** 2 + ((x - centre[1]) / radius[1]) ** 2 < 1] = i
    return ids


def random_case(rng, background=0, crowds=True):
    true_map = blobs(rng, (34, 46), 5, background)
    predicted_map = np.roll(true_map, (1, 1), (0, 1))
    predicted_map[predicted_map == 0] = 9
    classes = {i: int(rng.choice([3, 13])) for i in range(10)}
    present = [np.unique(m)[np.unique(m) > 0].tolist() for m in (true_map, predicted_map)]
    true_segments = [
        {"id": i, "category_id": classes[i], "iscrowd": int(crowds and i == present[0][-1])} for i in present[0]
    ]
    predicted_segments = [{"id": i, "category_id": classes[i]} for i in present[1]]
    return true_map, true_segments, predicted_map, predicted_segments


@pytest.mark.parametrize("ratio", [None, 0.06, 0.12])
@pytest.mark.parametrize("background", [0, 1])
def test_panoptic_counts_equal_the_definition(ratio, background):
    rng = np.random.default_rng(5)
    matched = 0
    for _ in range(3):
        case = random_case(rng, background)
        counts = match_segments(*case, {3: 0, 13: 1}, ratio)
        for category, row in ((3, 0), (13, 1)):
            np.testing.assert_allclose(counts.table[row], slow_counts(*case, category, ratio))
            matched += counts.table[row][1]
    assert matched > 0


def test_boundaries_are_stricter_than_masks():
    case = random_case(np.random.default_rng(0), background=1, crowds=False)
    plain, boundary = (match_segments(*case, {3: 0, 13: 1}, ratio) for ratio in (None, 0.02))
    assert summarize(boundary, [True, False])["PQ"] < summarize(plain, [True, False])["PQ"]


def test_perfect_prediction_is_perfect_at_the_boundary():
    true_map, true_segments, _, _ = random_case(np.random.default_rng(2), background=1, crowds=False)
    counts = match_segments(true_map, true_segments, true_map, true_segments, {3: 0, 13: 1}, 0.02)
    assert summarize(counts, [True, False])["PQ"] == 100.0


def test_true_pixels_of_no_listed_segment_are_not_void():
    """As in the reference implementation of PQ: predicted pixels there count against the prediction."""
    true_map = np.array([[1, 1, 1, 5, 5, 0]])
    segments = [{"id": 1, "category_id": 3}]
    counts = match_segments(true_map, segments, true_map * 0 + 1, segments, {3: 0})
    assert counts.table.tolist() == [[3 / 5, 1, 0, 0]]


def test_what_does_not_fit_is_named():
    ids = np.array([[1, 1], [2, 2]])
    segments = [{"id": 1, "category_id": 3}, {"id": 2, "category_id": 3}]
    with pytest.raises(ValueError, match="the prediction holds the negative id -1"):
        match_segments(ids, segments, ids - 2, segments, {3: 0})
    with pytest.raises(ValueError, match=r"prediction holds the segment ids \[2\], which segments_info lacks"):
        match_segments(ids, segments, ids, segments[:1], {3: 0})
    with pytest.raises(ValueError, match=r"prediction must be positive and different, got \[1, 1\]"):
        match_segments(ids, segments, ids, [segments[0], segments[0]], {3: 0})
    with pytest.raises(ValueError, match=r"category ids \[3\], which the dataset does not list"):
        match_segments(ids, segments, ids, segments, {4: 0})
    with pytest.raises(ValueError, match=r"prediction is \(1, 2\).*ground truth \(2, 2\)"):
        match_segments(ids, segments, ids[:1], segments, {3: 0})


def write_panoptic(folder, name, cases):
    """COCO panoptic files of (map, segments) pairs, with categories 3 (thing) and 13 (stuff)."""
    (folder / name).mkdir()
    annotations = []
    for i, (ids, segments) in enumerate(cases):
        rgb = np.stack([ids % 256, ids // 256, ids * 0], axis=2).astype(np.uint8)
        Image.fromarray(rgb).save(folder / name / f"{i}.png")
        annotations.append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})
    categories = [{"id": 3, "name": "dog", "isthing": 1}, {"id": 13, "name": "sky", "isthing": 0}]
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"annotations": annotations, "categories": categories}))
    return path


def test_files_give_the_sum_over_images(tmp_path):
    rng = np.random.default_rng(7)
    cases = [random_case(rng) for _ in range(2)]
    gt = write_panoptic(tmp_path, "gt", [case[:2] for case in cases])
    predictions = write_panoptic(tmp_path, "predictions", [case[2:] for case in cases])
    results = evaluate_files(gt, predictions, dilation_ratio=0.06)
    for key, ratio in (("panoptic_seg", None), ("panoptic_seg_boundary", 0.06)):
        qualities = []
        for category in (3, 13):
            iou, tp, fp, fn = np.sum([slow_counts(*case, category, ratio) for case in cases], axis=0)
            qualities.append(100 * iou / (tp + fp / 2 + fn / 2))
        assert results[key]["PQ"] == pytest.approx(np.mean(qualities))
        assert [results[key]["PQ_th"], results[key]["PQ_st"]] == pytest.approx(qualities)
        assert [results[key]["PQ-dog"], results[key]["PQ-sky"]] == pytest.approx(qualities)


def test_missing_predictions_are_named(tmp_path):
    cases = [random_case(np.random.default_rng(7)) for _ in range(2)]
    gt = write_panoptic(tmp_path, "gt", [case[:2] for case in cases])
    predictions = write_panoptic(tmp_path, "predictions", [case[2:] for case in cases[:1]])
    with pytest.raises(ValueError, match="predictions.json has no prediction for 1 images of .*gt.json: 1"):
        evaluate_files(gt, predictions)
