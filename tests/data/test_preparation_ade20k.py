"""ADE20K's preparation on two images of the published layout."""

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES
from detectron2.evaluation import COCOEvaluator, COCOPanopticEvaluator
from ground_truth import ground_truth_outputs
from preparation_scripts import load, panoptic_ids, read_json, registered_at, run_script, save, times
from pycocotools import mask as mask_util

from mask2former_plugin.evaluation import InstanceSegEvaluator

SEMANTIC, PANOPTIC, INSTANCE = (f"prepare_ade20k_{task}_seg.py" for task in ("sem", "pan", "ins"))
FOLDERS = {"train": "training", "val": "validation"}
WALL, SKY, BED, CAR = 1, 3, 8, 21  # labels of the scene parsing benchmark, of which bed and car are things
THING_NUMBER = {BED: 1, CAR: 9}  # in the red channel of the instance maps
# boxes y0, y1, x0, x1
BEDS = ((4, 9, 2, 8), (4, 9, 8, 12))
CAR_BOX = (0, 3, 15, 20)


def labels():
    """12 x 20: wall, sky above it, two beds, a car and a corner that is none of the classes."""
    result = np.full((12, 20), WALL)
    result[:4] = SKY
    for (y0, y1, x0, x1), label in ((BEDS[0], BED), (BEDS[1], BED), (CAR_BOX, CAR)):
        result[y0:y1, x0:x1] = label
    result[10:, 18:] = 0
    return result


def instances():
    """The right bed is number 1, the left one 5; the car, which covers sky, has no number: it is not annotated."""
    result = np.zeros((12, 20, 3))
    for (y0, y1, x0, x1), number in zip(BEDS, (5, 1)):
        result[y0:y1, x0:x1] = (THING_NUMBER[BED], number, 77)
    result[4:5, 2:3] = 0
    return result


@pytest.fixture
def tree(tmp_path):
    base = tmp_path / "ADEChallengeData2016"
    for split, folder in FOLDERS.items():
        for number, flip in ((1, False), (2, True)):
            stem = f"ADE_{split}_{number:08d}"
            step = -1 if flip else 1
            save(base / f"images/{folder}/{stem}.jpg", np.zeros((12, 20, 3)))
            save(base / f"annotations/{folder}/{stem}.png", labels()[:, ::step])
            save(base / f"annotations_instance/{folder}/{stem}.png", instances()[:, ::step])
    return tmp_path


def test_semantic(tree):
    run_script(SEMANTIC, tree)
    base = tree / "ADEChallengeData2016/annotations_detectron2"
    assert sorted(path.relative_to(base).as_posix() for path in base.rglob("*.*")) == [
        f"{folder}/ADE_{split}_0000000{number}.png" for split, folder in FOLDERS.items() for number in (1, 2)
    ]
    made = load(base / "training/ADE_train_00000001.png")
    assert made.dtype == np.uint8 and made.ndim == 2
    # as D2 reads them: 0 = wall … 149, 255 = none
    expected = np.select([labels() == 0], [255], labels() - 1)
    np.testing.assert_array_equal(made, expected)
    np.testing.assert_array_equal(load(base / "validation/ADE_val_00000002.png"), expected[:, ::-1])


def test_panoptic(tree):
    run_script(PANOPTIC, tree, "--splits", "val")
    base = tree / "ADEChallengeData2016"
    assert not (base / "ade20k_panoptic_train.json").exists()
    content = read_json(base / "ade20k_panoptic_val.json")
    stems = ["ADE_val_00000001", "ADE_val_00000002"]
    assert content["images"] == [{"id": s, "file_name": f"{s}.jpg", "width": 20, "height": 12} for s in stems]
    assert [a["image_id"] for a in content["annotations"]] == stems
    assert [a["file_name"] for a in content["annotations"]] == [f"{s}.png" for s in stems]

    categories = content["categories"]
    assert [c["id"] for c in categories] == list(range(150))
    assert [c["name"] for c in categories] == list(ADE20K_SEM_SEG_CATEGORIES)
    assert sum(c["isthing"] for c in categories) == 100 and categories[BED - 1]["isthing"] == 1
    colors = [tuple(c["color"]) for c in categories]
    assert len(set(colors)) == 150 and colors[0] == (120, 120, 120) and colors[48] == (140, 140, 200)

    segments = content["annotations"][0]["segments_info"]
    # stuff by class, then instances by number: the right bed before the left one, which lacks a pixel
    described = [[s["category_id"], s["area"], s["bbox"], s["iscrowd"]] for s in segments]
    wall_area = 8 * 20 - 5 * 10 - 2 * 2
    assert described == [
        [WALL - 1, wall_area, [0, 4, 20, 8], 0],
        [SKY - 1, 4 * 20 - 3 * 5, [0, 0, 20, 4], 0],
        [BED - 1, 20, [8, 4, 4, 5], 0],
        [BED - 1, 29, [2, 4, 6, 5], 0],
    ]
    ids = [s["id"] for s in segments]
    assert ids[0] == sum(c * 256**i for i, c in enumerate(categories[WALL - 1]["color"]))
    assert len(set(ids)) == 4 and 0 not in ids
    # the second bed has a colour near to that of beds, and of no other class
    second = np.array([ids[3] % 256, ids[3] // 256 % 256, ids[3] // 65536])
    assert np.abs(second - categories[BED - 1]["color"]).max() <= 30 and tuple(second) not in colors

    expected = np.zeros((12, 20), dtype=np.int64)  # the car without instance and the corner stay void
    expected[labels() == WALL], expected[labels() == SKY] = ids[0], ids[1]
    expected[4:9, 8:12], expected[4:9, 2:8] = ids[2], ids[3]
    expected[4, 2] = 0
    np.testing.assert_array_equal(panoptic_ids(base / "ade20k_panoptic_val/ADE_val_00000001.png"), expected)


def test_instances_are_painted_over_stuff(tree):
    """Area and box of the stuff stay those before, as in the published files."""
    path = tree / "ADEChallengeData2016/annotations_instance/validation/ADE_val_00000001.png"
    covering = np.zeros((12, 20, 3))
    covering[:4] = (THING_NUMBER[CAR], 3, 0)
    save(path, covering)
    run_script(PANOPTIC, tree, "--splits", "val")
    base = tree / "ADEChallengeData2016"
    wall, sky, car = read_json(base / "ade20k_panoptic_val.json")["annotations"][0]["segments_info"]
    assert (sky["area"], sky["bbox"]) == (65, [0, 0, 20, 4])
    assert (car["category_id"], car["area"], car["bbox"]) == (CAR - 1, 80, [0, 0, 20, 4])
    ids = panoptic_ids(base / "ade20k_panoptic_val/ADE_val_00000001.png")
    assert (ids[:4] == car["id"]).all() and not (ids == sky["id"]).any()


def test_many_instances_have_different_colors(tree):
    crowd = np.zeros((16, 20, 3))
    crowd[:12] = np.dstack([np.full(240, 4), np.arange(240), np.zeros(240)]).reshape(12, 20, 3)  # 239 persons
    crowd[0, 0] = 0
    base = tree / "ADEChallengeData2016"
    save(base / "annotations_instance/training/ADE_train_00000001.png", crowd)
    save(base / "annotations/training/ADE_train_00000001.png", np.full((16, 20), 13))
    run_script(PANOPTIC, tree, "--splits", "train")
    content = read_json(base / "ade20k_panoptic_train.json")
    segments = content["annotations"][0]["segments_info"]
    assert [s["category_id"] for s in segments] == [12] * 239
    ids = {s["id"] for s in segments}
    assert len(ids) == 239
    assert ids | {0} == set(np.unique(panoptic_ids(base / "ade20k_panoptic_train/ADE_train_00000001.png")))
    of_classes = {c["color"][0] + 256 * c["color"][1] + 65536 * c["color"][2] for c in content["categories"]}
    assert len(ids & of_classes) == 1


def test_instances(tree):
    run_script(INSTANCE, tree)
    base = tree / "ADEChallengeData2016"
    content = read_json(base / "ade20k_instance_train.json")
    assert len(content["categories"]) == 100 and content["categories"][0] == {"id": 7, "name": "bed"}
    assert [image["id"] for image in content["images"]] == ["ADE_train_00000001", "ADE_train_00000002"]
    annotations = content["annotations"]
    assert [a["id"] for a in annotations] == [1, 2, 3, 4]
    assert {a["category_id"] for a in annotations} == {BED - 1} and {a["iscrowd"] for a in annotations} == {0}
    assert [a["image_id"][-1] for a in annotations] == ["1", "1", "2", "2"]
    assert [a["bbox"] for a in annotations] == [[8, 4, 4, 5], [2, 4, 6, 5], [8, 4, 4, 5], [12, 4, 6, 5]]
    assert [a["area"] for a in annotations] == [20, 29, 20, 29]
    for annotation, number in zip(annotations, (1, 5)):
        expected = mask_util.encode(np.asfortranarray(instances()[..., 1] == number, dtype=np.uint8))
        assert annotation["segmentation"] == {"size": [12, 20], "counts": expected["counts"].decode()}
    assert [a["id"] for a in read_json(base / "ade20k_instance_val.json")["annotations"]] == [1, 2, 3, 4]


def test_registered_datasets_load_and_score_their_ground_truth_as_perfect(tree, tmp_path):
    for script in (SEMANTIC, PANOPTIC, INSTANCE):
        run_script(script, tree)
    names = ("ade20k_panoptic_train", "ade20k_panoptic_val", "ade20k_instance_train", "ade20k_instance_val")
    with registered_at(tree, *names):
        (first, _) = DatasetCatalog.get("ade20k_instance_val")
        assert [a["category_id"] for a in first["annotations"]] == [0, 0]
        metadata = MetadataCatalog.get("ade20k_panoptic_val")
        out = str(tmp_path / "out")
        evaluators = [
            COCOPanopticEvaluator("ade20k_panoptic_val", out),
            InstanceSegEvaluator("ade20k_panoptic_val", distributed=False, output_dir=out),
        ]
        results = {}
        for evaluator in evaluators:
            evaluator.reset()
            for sample in DatasetCatalog.get("ade20k_panoptic_val"):
                assert (load(sample["sem_seg_file_name"]) == 255).sum() == 4
                evaluator.process([sample], [ground_truth_outputs(sample, metadata)])
            results.update(evaluator.evaluate())
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)
    assert isinstance(evaluators[1], COCOEvaluator) and results["segm"]["AP-bed"] == pytest.approx(100)


# ------------------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("script", [SEMANTIC, PANOPTIC, INSTANCE])
def test_a_second_run_writes_nothing(tree, script):
    run_script(script, tree)
    before = times(tree)
    run_script(script, tree)
    assert times(tree) == before
    run_script(script, tree, "--overwrite")
    after = times(tree)
    made = {path for path in before if after[path] != before[path]}
    assert after.keys() == before.keys() and made and not any("annotations/" in str(path) for path in made)


def test_processes_and_interruption_give_the_same_files(tree):
    """A run that ends at a broken input goes on where it stopped; the result is that of one run."""
    base = tree / "ADEChallengeData2016"
    broken = base / "annotations_instance/training/ADE_train_00000002.png"
    good = broken.read_bytes()
    broken.write_bytes(good[: len(good) // 2])
    with pytest.raises(SystemExit, match="error: .*ADE_train_00000002.png cannot be read as an image"):
        run_script(PANOPTIC, tree)
    assert not (base / "ade20k_panoptic_train.json").exists()
    assert len((base / "ade20k_panoptic_train.progress.jsonl").read_text().splitlines()) == 1
    first = base / "ade20k_panoptic_train/ADE_train_00000001.png"
    before = times(base)[first]

    broken.write_bytes(good)
    run_script(PANOPTIC, tree)
    assert times(base)[first] == before
    assert not list(base.glob("*.jsonl")) and not list(base.rglob(".*"))
    outputs = [path for path in sorted(base.glob("ade20k_panoptic_*/*")) + sorted(base.glob("*.json"))]
    assert len(outputs) == 6
    resumed = [path.read_bytes() for path in outputs]
    run_script(PANOPTIC, tree, "--overwrite", workers=2)
    assert [path.read_bytes() for path in outputs] == resumed


@pytest.mark.parametrize("rest", [0, 0.5])
@pytest.mark.parametrize("script", [SEMANTIC, PANOPTIC])
def test_incomplete_files_are_made_again(tree, script, rest):
    run_script(script, tree)
    folder = {SEMANTIC: "annotations_detectron2/validation", PANOPTIC: "ade20k_panoptic_val"}[script]
    path = tree / "ADEChallengeData2016" / folder / "ADE_val_00000002.png"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * rest)])
    run_script(script, tree)
    assert path.read_bytes() == content


@pytest.mark.parametrize("damage", ["cut off", "an image is missing"])
def test_an_incomplete_json_is_made_again(tree, damage):
    run_script(INSTANCE, tree)
    path = tree / "ADEChallengeData2016/ade20k_instance_val.json"
    content = path.read_text()
    path.write_text(content[:100] if damage == "cut off" else content.replace("ADE_val_00000002.jpg", "other.jpg"))
    run_script(INSTANCE, tree)
    assert path.read_text() == content


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("script", [SEMANTIC, PANOPTIC, INSTANCE])
def test_missing_input_shows_the_layout(tmp_path, script):
    with pytest.raises(SystemExit) as error:
        run_script(script, tmp_path)
    message = str(error.value)
    assert message.startswith("error: ") and "does not exist" in message and str(tmp_path) in message
    assert "annotations_instance/{training,validation}/*.png" in message
    assert not list(tmp_path.iterdir())


def test_missing_partners_are_named(tree):
    (tree / "ADEChallengeData2016/annotations_instance/validation/ADE_val_00000001.png").unlink()
    with pytest.raises(SystemExit, match=r"annotations_instance/validation lacks \*.png for 1 images: ADE_val_0*1"):
        run_script(PANOPTIC, tree)
    assert not list((tree / "ADEChallengeData2016").glob("ade20k_*"))


@pytest.mark.parametrize(("red", "message"), [([101], "not .101."), ([0], "not .0."), ([1, 4], "not .1, 4.")])
def test_wrong_instance_classes(tree, red, message):
    wrong = np.zeros((12, 20, 3))
    for column, value in enumerate(red):
        wrong[0, column] = (value, 7, 0)
    save(tree / "ADEChallengeData2016/annotations_instance/validation/ADE_val_00000001.png", wrong)
    for script in (PANOPTIC, INSTANCE):
        with pytest.raises(SystemExit, match=f"ADE_val_00000001.png: instance 7 .*1 … 100, {message}"):
            run_script(script, tree)


def test_wrong_label_maps(tree):
    path = tree / "ADEChallengeData2016/annotations/training/ADE_train_00000001.png"
    save(path, np.full((12, 20), 151))
    with pytest.raises(SystemExit, match="ADE_train_00000001.png has the label 151"):
        run_script(SEMANTIC, tree)
    save(path, np.zeros((12, 20, 3)))
    with pytest.raises(SystemExit, match="ADE_train_00000001.png is no label map"):
        run_script(SEMANTIC, tree)
    save(path, np.ones((12, 21)))
    with pytest.raises(SystemExit, match=r"ADE_train_00000001.png is \(12, 20\), .*\(12, 21\)"):
        run_script(PANOPTIC, tree)
