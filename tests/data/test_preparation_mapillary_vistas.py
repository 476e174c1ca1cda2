"""Mapillary Vistas' instance JSON on a tree of the published layout."""

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from ground_truth import ground_truth_outputs
from preparation_scripts import (
    load,
    panoptic_ids,
    panoptic_png,
    read_json,
    registered_at,
    run_script,
    save,
    times,
    write_json,
)
from pycocotools import mask as mask_util

from mask2former_plugin.evaluation import InstanceSegEvaluator

SCRIPT = "prepare_mapillary_vistas_ins_seg.py"
FOLDERS = {"train": "training", "val": "validation"}
ROAD, PERSON, CAR, SKY = 14, 20, 56, 28  # ids of the panoptic JSON
# segment id, category, crowd and box y0, y1, x0, x1; later ones cover earlier ones
SEGMENTS = (
    (14, ROAD, 0, (0, 20, 0, 30)),
    (28, SKY, 0, (0, 6, 0, 30)),
    (56 + 256, CAR, 0, (8, 16, 2, 14)),
    (20 + 3 * 65536, PERSON, 0, (4, 20, 9, 13)),
    (20 + 4 * 65536, PERSON, 1, (5, 9, 20, 30)),
)


def segment_map():
    result = np.zeros((20, 30), dtype=np.int64)
    for segment_id, _, _, (y0, y1, x0, x1) in SEGMENTS:
        result[y0:y1, x0:x1] = segment_id
    return result


@pytest.fixture
def tree(tmp_path):
    segments = [{"id": s, "category_id": c, "iscrowd": crowd, "area": 1, "bbox": []} for s, c, crowd, _ in SEGMENTS]
    for folder in FOLDERS.values():
        base = tmp_path / "mapillary_vistas" / folder
        content = {"images": [], "annotations": [], "categories": []}
        for stem, step in (("_0Vv1zNrZR-abc", 1), ("zB-40_xyz", -1)):
            save(base / f"images/{stem}.jpg", np.zeros((20, 30, 3)))
            save(base / f"labels/{stem}.png", np.zeros((20, 30)))
            save(base / f"panoptic/{stem}.png", panoptic_png(segment_map()[:, ::step]))
            content["images"].append({"id": stem, "file_name": f"{stem}.jpg", "width": 30, "height": 20})
            entry = {"image_id": stem, "file_name": f"{stem}.png", "segments_info": segments}
            content["annotations"].append(entry)
        write_json(base / "panoptic/panoptic_2018.json", content)
    return tmp_path


def test_instances(tree):
    run_script(SCRIPT, tree, workers=2)
    content = read_json(tree / "mapillary_vistas/mapillary_vistas_instance_train.json")
    assert content["images"] == [
        {"id": stem, "file_name": f"{stem}.jpg", "width": 30, "height": 20} for stem in ("_0Vv1zNrZR-abc", "zB-40_xyz")
    ]
    assert len(content["categories"]) == 37
    assert [c["id"] for c in content["categories"]] == sorted(c["id"] for c in content["categories"])
    names = {c["id"]: c["name"] for c in content["categories"]}
    assert (names[1], names[PERSON], names[CAR], names[63]) == ("Bird", "Person", "Car", "Wheeled Slow")
    assert ROAD not in names and SKY not in names

    annotations = content["annotations"]
    assert [a["id"] for a in annotations] == [1, 2, 3, 4, 5, 6]
    assert [a["category_id"] for a in annotations] == [CAR, PERSON, PERSON] * 2
    assert [a["iscrowd"] for a in annotations] == [0, 0, 1] * 2
    # what is seen of them: the person stands before the car
    assert [a["area"] for a in annotations[:3]] == [8 * 12 - 8 * 4, 16 * 4, 4 * 10]
    assert [a["bbox"] for a in annotations[:3]] == [[2, 8, 12, 8], [9, 4, 4, 16], [20, 5, 10, 4]]
    for index, annotation in enumerate(annotations):
        mask = (segment_map() == SEGMENTS[2 + index % 3][0])[:, :: 1 if index < 3 else -1]
        expected = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
        assert annotation["segmentation"] == {"size": [20, 30], "counts": expected["counts"].decode()}


def test_registered_dataset_scores_its_ground_truth_as_perfect(tree, tmp_path):
    run_script(SCRIPT, tree)
    name = "mapillary_vistas_panoptic_val"
    with registered_at(tree, name):
        evaluator = InstanceSegEvaluator(name, distributed=False, output_dir=str(tmp_path / "out"))
        evaluator.reset()
        for sample in DatasetCatalog.get(name):
            evaluator.process([sample], [ground_truth_outputs(sample, MetadataCatalog.get(name))])
        results = evaluator.evaluate()["segm"]
    assert results["AP"] == pytest.approx(100)
    assert results["AP-Person"] == pytest.approx(100) and results["AP-Car"] == pytest.approx(100)
    assert np.isnan(results["AP-Bird"])


def test_a_second_run_writes_nothing(tree):
    run_script(SCRIPT, tree, "--splits", "val")
    before = times(tree)
    run_script(SCRIPT, tree)
    after = times(tree)
    assert {path.name for path in after if before.get(path) != after[path]} == {"mapillary_vistas_instance_train.json"}


def test_an_interrupted_run_goes_on(tree):
    panoptic = tree / "mapillary_vistas/training/panoptic"
    good = (panoptic / "zB-40_xyz.png").read_bytes()
    (panoptic / "zB-40_xyz.png").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="zB-40_xyz.png cannot be read as an image"):
        run_script(SCRIPT, tree)
    (panoptic / "zB-40_xyz.png").write_bytes(good)
    # the first image is not read again
    (panoptic / "_0Vv1zNrZR-abc.png").write_bytes(b"nothing")
    run_script(SCRIPT, tree)
    content = read_json(tree / "mapillary_vistas/mapillary_vistas_instance_train.json")
    assert [a["area"] for a in content["annotations"]] == [64, 64, 40] * 2


def test_a_segment_without_pixels_is_left_out(tree, caplog):
    path = tree / "mapillary_vistas/validation/panoptic/zB-40_xyz.png"
    ids = panoptic_ids(path)
    ids[ids == SEGMENTS[2][0]] = ROAD
    save(path, panoptic_png(ids))
    run_script(SCRIPT, tree, "--splits", "val")
    content = read_json(tree / "mapillary_vistas/mapillary_vistas_instance_val.json")
    assert [a["category_id"] for a in content["annotations"]] == [CAR, PERSON, PERSON, PERSON, PERSON]
    assert f"zB-40_xyz.png has no pixels of segment {SEGMENTS[2][0]}" in caplog.text
    assert load(path).shape == (20, 30, 3)


def test_errors(tree, tmp_path):
    with pytest.raises(SystemExit, match="(?s)panoptic_2018.json does not exist.*release 1.2.*panoptic_2018.json"):
        run_script(SCRIPT, tmp_path / "none")
    path = tree / "mapillary_vistas/validation/panoptic/panoptic_2018.json"
    content = read_json(path)
    content["annotations"][0]["segments_info"] = [{"id": 3, "category_id": 124}]
    write_json(path, content)
    with pytest.raises(SystemExit, match="segment 3 has the category_id 124, which is none of the 65 categories"):
        run_script(SCRIPT, tree)
    content["annotations"][0] = {"image_id": "other", "file_name": "zB-40_xyz.png", "segments_info": []}
    write_json(path, content)
    with pytest.raises(SystemExit, match="zB-40_xyz.png is of image 'other', which it lacks"):
        run_script(SCRIPT, tree)
    assert not list((tree / "mapillary_vistas").glob("*.json"))
