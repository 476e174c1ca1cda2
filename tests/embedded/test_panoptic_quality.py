"""Panoptic quality and its evaluator, against a slow reference and, where it is installed, panopticapi."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOPanopticEvaluator

pytestmark = pytest.mark.embedded_only

CATEGORIES = [
    {"id": 7, "isthing": 1, "name": "dog", "color": [200, 30, 30]},
    {"id": 9, "isthing": 1, "name": "cat", "color": [30, 200, 30]},
    {"id": 12, "isthing": 0, "name": "sky", "color": [30, 30, 200]},
    {"id": 40, "isthing": 0, "name": "sea", "color": [120, 120, 20]},
]
BY_ID = {category["id"]: category for category in CATEGORIES}


def random_ids(rng, count):
    return np.unique(rng.randint(1, 2**24, size=2 * count + 2))[rng.permutation(count)].tolist()


def random_truth(rng, height, width, crowds=True):
    """Blocky segments, with void between them, crowd segments, several segments of a category."""
    count = rng.randint(1, 12)
    ids = random_ids(rng, count)
    cells = rng.choice([0, *ids], size=(-(-height // 4), -(-width // 4)))
    truth = np.kron(cells, np.ones((4, 4), dtype=np.int64))[:height, :width]
    segments = []
    for number in ids:
        category = int(rng.choice([7, 9, 12, 40]))
        crowd = int(crowds and category in (7, 9) and rng.rand() < 0.3)
        area = int((truth == number).sum())
        if area:
            segments.append(
                {"id": number, "category_id": category, "iscrowd": crowd, "area": area, "bbox": [0, 0, 1, 1]}
            )
    return truth, segments


def random_prediction(rng, truth, segments):
    """The truth with wrong categories, merged segments, void, noise, and other ids."""
    prediction = np.zeros_like(truth)
    ids = random_ids(rng, len(segments) + 2)
    listed = []
    for number, segment in zip(ids, segments):
        if rng.rand() < 0.15:
            continue
        prediction[(truth == segment["id"]) & (rng.rand(*truth.shape) < rng.choice([0.4, 0.6, 0.9, 1.0]))] = number
        category = segment["category_id"] if rng.rand() < 0.8 else int(rng.choice([7, 9, 12, 40]))
        listed.append({"id": number, "category_id": category})
    for number in ids[len(segments) :]:
        y, x = rng.randint(truth.shape[0]), rng.randint(truth.shape[1])
        prediction[y : y + 6, x : x + 6] = number
        listed.append({"id": number, "category_id": int(rng.choice([7, 9, 12, 40]))})
    return prediction, [segment for segment in listed if (prediction == segment["id"]).any()]


def slow_counts(truth, true_segments, prediction, predicted_segments):
    """The definition, mask by mask: {category: [sum of IoU, matches, surplus, missed]}."""
    counts = {category: [0.0, 0, 0, 0] for category in BY_ID}
    matched = set()
    for true in true_segments:
        if true.get("iscrowd"):
            continue
        found = False
        for predicted in predicted_segments:
            if predicted["category_id"] != true["category_id"]:
                continue
            a, b = truth == true["id"], prediction == predicted["id"]
            iou = (a & b).sum() / (a | (b & (truth != 0))).sum()
            if iou > 0.5:
                counts[true["category_id"]][0] += iou
                counts[true["category_id"]][1] += 1
                matched.add(predicted["id"])
                found = True
        counts[true["category_id"]][3] += not found
    for predicted in predicted_segments:
        if predicted["id"] in matched:
            continue
        forgiven = truth == 0
        crowds = [t["id"] for t in true_segments if t.get("iscrowd") and t["category_id"] == predicted["category_id"]]
        if crowds:
            forgiven |= truth == crowds[-1]
        mask = prediction == predicted["id"]
        counts[predicted["category_id"]][2] += (mask & forgiven).sum() / mask.sum() <= 0.5
    return counts


def as_lists(stat):
    return {
        category: [stat[category].iou, stat[category].tp, stat[category].fp, stat[category].fn] for category in BY_ID
    }


def assert_same_counts(actual, expected):
    for category in BY_ID:
        assert actual[category][1:] == expected[category][1:]
        assert actual[category][0] == pytest.approx(expected[category][0], abs=1e-12)


def test_matching_equals_the_definition():
    from detectron2.evaluation.panoptic_quality import match_segments

    rng = np.random.RandomState(3)
    seen = np.zeros(3)
    for _ in range(60):
        truth, true_segments = random_truth(rng, 29, 37)
        prediction, predicted_segments = random_prediction(rng, truth, true_segments)
        expected = slow_counts(truth, true_segments, prediction, predicted_segments)
        assert_same_counts(as_lists(match_segments(truth, true_segments, prediction, predicted_segments)), expected)
        seen += np.sum([counts[1:] for counts in expected.values()], axis=0)
    assert (seen > 20).all()  # the random maps do contain matches, surplus and missed segments


def test_average_and_sum():
    from detectron2.evaluation.panoptic_quality import PQStat

    first, second = PQStat(), PQStat()
    first[7].tp, first[7].iou, first[12].fn = 1, 0.8, 2
    second[7].tp, second[7].iou, second[7].fp = 1, 0.7, 1
    first += second
    mean, per_class = first.pq_average(BY_ID, None)
    assert per_class[7] == pytest.approx({"pq": 1.5 / 2.5, "sq": 0.75, "rq": 2 / 2.5})
    assert mean == pytest.approx({"pq": 0.3, "sq": 0.375, "rq": 0.4, "n": 2})
    assert first.pq_average(BY_ID, True)[0]["pq"] == pytest.approx(0.6)
    assert list(first.pq_average(BY_ID, False)[1]) == [12, 40]
    empty = PQStat().pq_average(BY_ID, None)[0]
    assert empty["n"] == 0 and np.isnan([empty["pq"], empty["sq"], empty["rq"]]).all()


def test_ids_and_colours():
    from detectron2.evaluation.panoptic_quality import IdGenerator, id2rgb, rgb2id

    ids = np.random.RandomState(0).randint(0, 2**24, size=(5, 7))
    colors = id2rgb(ids)
    assert colors.dtype == np.uint8 and colors.shape == (5, 7, 3)
    assert (colors[..., 0] == ids % 256).all() and (colors[..., 2] == ids // 65536).all()
    assert (rgb2id(colors) == ids).all()
    assert rgb2id(np.array([255, 254, 253], dtype=np.uint8)) == 255 + 254 * 256 + 253 * 65536  # no overflow of uint8
    assert id2rgb(70000) == [70000 % 256, 70000 // 256 % 256, 70000 // 65536]
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        rgb2id(np.zeros((4, 4), dtype=np.uint8))

    generator = IdGenerator(BY_ID)
    things = [generator.get_id(7) for _ in range(300)]
    assert len(set(things)) == 300 and 0 not in things
    assert things[0] == rgb2id([200, 30, 30])
    assert generator.get_id(12) == generator.get_id(12) == rgb2id([30, 30, 200])
    number, color = generator.get_id_and_color(9)
    assert rgb2id(color) == number and color == (30, 200, 30)


def test_bad_maps():
    from detectron2.evaluation.panoptic_quality import match_segments

    truth = np.zeros((4, 4), dtype=np.int32)
    segment = {"id": 3, "category_id": 7}
    with pytest.raises(ValueError, match=r"\(4, 5\).*\(4, 4\)"):
        match_segments(truth, [], np.zeros((4, 5), dtype=np.int32), [])
    with pytest.raises(ValueError, match=r"\[3\].*doesn't list"):
        match_segments(truth, [], np.full((4, 4), 3), [])
    with pytest.raises(ValueError, match="twice"):
        match_segments(truth, [], np.full((4, 4), 3), [segment, segment])
    with pytest.raises(ValueError, match="-1"):
        match_segments(truth, [], np.full((4, 4), -1), [])
    with pytest.raises(ValueError, match="16777215"):
        match_segments(truth, [], np.full((4, 4), 2**24), [{"id": 2**24, "category_id": 7}])


@pytest.fixture
def dataset(tmp_path, request):
    """A registered panoptic dataset of random images on disk."""
    from detectron2.evaluation.panoptic_quality import id2rgb

    rng = np.random.RandomState(11)
    root = tmp_path / "panoptic"
    root.mkdir()
    annotations, truths = [], {}
    for image_id in range(1, 6):
        truth, segments = random_truth(rng, 24, 32)
        Image.fromarray(id2rgb(truth)).save(root / f"{image_id:03d}.png")
        annotations.append({"image_id": image_id, "file_name": f"{image_id:03d}.png", "segments_info": segments})
        truths[image_id] = truth, segments
    content = {"images": [{"id": i} for i in truths], "annotations": annotations, "categories": CATEGORIES}
    path = tmp_path / "panoptic.json"
    path.write_text(json.dumps(content))
    name = f"panoptic_quality_{request.node.name}"
    MetadataCatalog.get(name).set(
        panoptic_json=str(path),
        panoptic_root=str(root),
        label_divisor=1000,
        thing_dataset_id_to_contiguous_id={7: 0, 9: 1},
        stuff_dataset_id_to_contiguous_id={12: 0, 40: 1},
    )
    yield name, truths, rng, tmp_path
    MetadataCatalog.remove(name)


CONTIGUOUS = {7: (0, True), 9: (1, True), 12: (0, False), 40: (1, False)}


def as_output(prediction, segments):
    infos = []
    for segment in segments:
        category, isthing = CONTIGUOUS[segment["category_id"]]
        infos.append({"id": segment["id"], "category_id": category, "isthing": np.bool_(isthing)})
    return {"panoptic_seg": (torch.from_numpy(prediction.astype(np.int32)), infos)}


def as_input(image_id):
    return {"image_id": image_id, "file_name": f"/somewhere/{image_id:03d}.jpg"}


def expected_results(all_counts):
    total = {category: np.sum([counts[category] for counts in all_counts], axis=0) for category in BY_ID}
    results = {}
    for suffix, chosen in (("", [7, 9, 12, 40]), ("_th", [7, 9]), ("_st", [12, 40])):
        rows = [
            (iou / (tp + fp / 2 + fn / 2), iou / max(tp, 1), tp / (tp + fp / 2 + fn / 2))
            for iou, tp, fp, fn in map(total.get, chosen)
            if tp + fp + fn
        ]
        for key, values in zip(("PQ", "SQ", "RQ"), zip(*rows)):
            results[key + suffix] = 100 * np.mean(values)
    return results


def test_evaluator_and_its_files(dataset):
    name, truths, rng, tmp_path = dataset
    evaluator = COCOPanopticEvaluator(name, output_dir=str(tmp_path / "out"))
    evaluator.reset()
    counts, given = [], {}
    for image_id, (truth, segments) in truths.items():
        prediction, predicted = random_prediction(rng, truth, segments)
        output = as_output(prediction, predicted)
        evaluator.process([as_input(image_id)], [output])
        assert all("isthing" in info for info in output["panoptic_seg"][1])  # the model's own list stays as it was
        counts.append(slow_counts(truth, segments, prediction, predicted))
        given[image_id] = prediction, predicted
    results = evaluator.evaluate()["panoptic_seg"]
    expected = expected_results(counts)
    assert list(results) == ["PQ", "SQ", "RQ", "PQ_th", "SQ_th", "RQ_th", "PQ_st", "SQ_st", "RQ_st"]
    assert results == pytest.approx(expected)
    assert all(type(value) is float for value in results.values())

    written = json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"]
    assert [annotation["image_id"] for annotation in written] == list(truths)
    for annotation in written:
        colors = np.array(Image.open(tmp_path / "out" / "predictions" / annotation["file_name"])).astype(int)
        prediction, predicted = given[annotation["image_id"]]
        assert (colors @ [1, 256, 65536] == prediction).all()
        assert annotation["segments_info"] == predicted

    evaluator.reset()
    for image_id, (truth, segments) in truths.items():
        ordinary = [segment for segment in segments if not segment["iscrowd"]]
        prediction = np.where(np.isin(truth, [segment["id"] for segment in ordinary]), truth, 0)
        evaluator.process([as_input(image_id)], [as_output(prediction, ordinary)])
    assert evaluator.evaluate()["panoptic_seg"] == pytest.approx(dict.fromkeys(expected, 100.0))


def test_label_map_without_segments_info(dataset):
    name, truths, _, _ = dataset
    evaluator = COCOPanopticEvaluator(name)
    evaluator.reset()
    counts = []
    # Contiguous ids of things and stuff must not overlap for this format, so use one map for both.
    MetadataCatalog.get(name).stuff_dataset_id_to_contiguous_id.update({12: 2, 40: 3})
    evaluator = COCOPanopticEvaluator(name)
    contiguous = {7: 0, 9: 1, 12: 2, 40: 3}
    for image_id, (truth, segments) in truths.items():
        labels = np.full(truth.shape, -1)
        for number, segment in enumerate(segments):
            labels[truth == segment["id"]] = contiguous[segment["category_id"]] * 1000 + number
        evaluator.process([as_input(image_id)], [{"panoptic_seg": (torch.from_numpy(labels), None)}])
        counts.append(slow_counts(truth, segments, truth, segments))
    assert evaluator.evaluate()["panoptic_seg"] == pytest.approx(expected_results(counts))


def test_empty_predictions_and_unseen_images(dataset, caplog):
    name, truths, _, _ = dataset
    evaluator = COCOPanopticEvaluator(name)
    nothing = torch.zeros(24, 32, dtype=torch.int32)
    evaluator.process([as_input(2)], [{"panoptic_seg": (nothing, [])}])
    with caplog.at_level(logging.WARNING):
        results = evaluator.evaluate()["panoptic_seg"]
    assert results["PQ"] == 0.0
    assert "1 of the 5 images" in caplog.text
    evaluator.reset()
    assert np.isnan(evaluator.evaluate()["panoptic_seg"]["PQ"])


def test_same_image_twice_counts_once(dataset):
    name, truths, _, _ = dataset
    truth, segments = truths[1]
    results = []
    for times in (1, 2):
        evaluator = COCOPanopticEvaluator(name)
        evaluator.process([as_input(1)] * times, [as_output(truth, segments)] * times)
        results.append(evaluator._stats["1"].pq_per_cat)
    assert results[0] == results[1] and len(evaluator._stats) == 1


def test_errors_name_what_is_wrong(dataset, tmp_path):
    name, truths, _, _ = dataset
    evaluator = COCOPanopticEvaluator(name)
    truth, segments = truths[1]

    def process(output, image_id=1):
        evaluator.process([as_input(image_id)], [output])

    with pytest.raises(ValueError, match=r"image 1 .*001.jpg.*\(10, 10\).*\(24, 32\)"):
        process({"panoptic_seg": (torch.zeros(10, 10, dtype=torch.int32), [])})
    with pytest.raises(ValueError, match="category 5 is no thing"):
        process(
            {"panoptic_seg": (torch.ones(24, 32, dtype=torch.int32), [{"id": 1, "category_id": 5, "isthing": True}])}
        )
    with pytest.raises(ValueError, match="category id 5 is not among"):
        process({"panoptic_seg": (torch.ones(24, 32, dtype=torch.int32), [{"id": 1, "category_id": 5}])})
    with pytest.raises(ValueError, match="no annotation"):
        process(as_output(truth, segments), image_id=77)
    (tmp_path / "panoptic" / "001.png").unlink()
    with pytest.raises(FileNotFoundError, match="001.png"):
        process(as_output(truth, segments))
    Image.fromarray(np.zeros((24, 32), dtype=np.uint8)).save(tmp_path / "panoptic" / "001.png")
    with pytest.raises(ValueError, match="001.png.*RGB"):
        process(as_output(truth, segments))
    (tmp_path / "panoptic.json").unlink()
    with pytest.raises(FileNotFoundError, match="panoptic.json"):
        COCOPanopticEvaluator(name)


def test_equal_to_panopticapi(tmp_path):
    evaluation = pytest.importorskip("panopticapi.evaluation")
    from detectron2.evaluation.panoptic_quality import PQStat, id2rgb, match_segments

    rng = np.random.RandomState(5)
    pairs, ours = [], PQStat()
    for kind in ("truth", "prediction"):
        (tmp_path / kind).mkdir()
    for number in range(25):
        truth, segments = random_truth(rng, 40, 52)
        prediction, predicted = random_prediction(rng, truth, segments)
        file_name = f"{number}.png"
        Image.fromarray(id2rgb(truth)).save(tmp_path / "truth" / file_name)
        Image.fromarray(id2rgb(prediction)).save(tmp_path / "prediction" / file_name)
        pairs.append(
            (
                {"image_id": number, "file_name": file_name, "segments_info": segments},
                {"image_id": number, "file_name": file_name, "segments_info": [dict(segment) for segment in predicted]},
            )
        )
        ours += match_segments(truth, segments, prediction, predicted)
    theirs = evaluation.pq_compute_single_core(0, pairs, str(tmp_path / "truth"), str(tmp_path / "prediction"), BY_ID)
    assert_same_counts(as_lists(ours), as_lists(theirs))
    for isthing in (None, True, False):
        for mine, other in zip(ours.pq_average(BY_ID, isthing), theirs.pq_average(BY_ID, isthing)):
            assert mine == pytest.approx(other, abs=1e-12) if "pq" in mine else mine.keys() == other.keys()
