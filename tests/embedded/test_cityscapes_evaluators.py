"""The Cityscapes evaluators against the official scripts, which read predictions from files."""

import contextlib
import copy
import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.data import MetadataCatalog
from detectron2.evaluation import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator
from detectron2.structures import Instances

pixel_script = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
instance_script = pytest.importorskip("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling")
from cityscapesscripts.helpers.labels import labels, name2label, trainId2label  # noqa: E402

pytestmark = pytest.mark.embedded_only

HEIGHT, WIDTH = 64, 128
THINGS = ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
FRAMES = ["aachen_000000_000019", "aachen_000001_000019", "bonn_000003_000007"]


@pytest.fixture
def dataset(tmp_path, request, monkeypatch):
    """Random frames: blocks of stuff, instances, groups (id below 1000), unlabelled parts."""
    if not hasattr(np, "in1d"):
        monkeypatch.setattr(
            np, "in1d", lambda a, b, invert=False: np.isin(np.ravel(a), b, invert=invert), raising=False
        )
    rng = np.random.RandomState(6)
    truths = {}
    for frame in FRAMES:
        stuff = rng.choice([0, 4, 7, 8, 11, 21, 23], size=(8, 8))
        ids = np.kron(stuff, np.ones((8, 16), dtype=np.int64))
        instances = ids.copy()
        for number in range(9):
            label = name2label[THINGS[rng.randint(8)]].id if number else 29  # 29: caravan, not evaluated
            y, x, h, w = rng.randint(50), rng.randint(100), rng.randint(8, 30), rng.randint(8, 40)
            ids[y : y + h, x : x + w] = label
            instances[y : y + h, x : x + w] = label if number == 3 else 1000 * label + number
        folder = tmp_path / "gtFine" / frame.split("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids.astype(np.uint8)).save(folder / f"{frame}_gtFine_labelIds.png")
        Image.fromarray(instances.astype(np.uint16)).save(folder / f"{frame}_gtFine_instanceIds.png")
        truths[frame] = ids, instances
    name = f"cityscapes_{request.node.name}"
    MetadataCatalog.get(name).set(gt_dir=str(tmp_path / "gtFine"), thing_classes=THINGS)
    yield name, truths, rng, tmp_path
    MetadataCatalog.remove(name)


def as_input(frame):
    return {"file_name": f"/leftImg8bit/val/{frame.split('_')[0]}/{frame}_leftImg8bit.png"}


def truth_file(tmp_path, frame, kind):
    return str(tmp_path / "gtFine" / frame.split("_")[0] / f"{frame}_gtFine_{kind}.png")


def quiet(script, **changes):
    args = copy.copy(script.args)
    args.JSONOutput, args.quiet = False, True
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def test_semantic_equals_the_official_script(dataset):
    name, truths, rng, tmp_path = dataset
    id_of = [trainId2label[k].id for k in range(19)]
    to_train = {label.id: label.trainId if 0 <= label.trainId < 19 else 0 for label in labels}
    evaluator = CityscapesSemSegEvaluator(name)
    predictions = []
    for frame, (ids, _) in truths.items():
        classes = np.vectorize(to_train.get)(ids)
        noise = np.kron(rng.randint(19, size=(16, 16)), np.ones((4, 8), dtype=np.int64))
        classes = np.where(rng.rand(HEIGHT, WIDTH) < 0.7, classes, noise)
        scores = (
            torch.nn.functional.one_hot(torch.from_numpy(classes), 19).permute(2, 0, 1)
            + torch.rand(19, HEIGHT, WIDTH) / 2
        )
        evaluator.process([as_input(frame)], [{"sem_seg": scores}])
        predictions.append(str(tmp_path / f"{frame}_pred.png"))
        Image.fromarray(np.array(id_of, dtype=np.uint8)[classes]).save(predictions[-1])
    expected = pixel_script.evaluateImgLists(
        predictions, [truth_file(tmp_path, frame, "labelIds") for frame in truths], quiet(pixel_script)
    )
    results = evaluator.evaluate()["sem_seg"]
    assert results == pytest.approx(
        {
            "IoU": 100 * expected["averageScoreClasses"],
            "iIoU": 100 * expected["averageScoreInstClasses"],
            "IoU_sup": 100 * expected["averageScoreCategories"],
            "iIoU_sup": 100 * expected["averageScoreInstCategories"],
        }
    )
    assert all(10 < value < 90 and type(value) is float for value in results.values())


def test_instances_equal_the_official_script(dataset, monkeypatch):
    name, truths, rng, tmp_path = dataset
    evaluator = CityscapesInstanceEvaluator(name)
    folder = tmp_path / "predictions"
    folder.mkdir()
    files = []
    for frame, (_, instances) in truths.items():
        masks, classes, scores, lines = [], [], [], []
        for number in np.unique(instances[instances >= 24]):
            label = labels[[entry.id for entry in labels].index(number // 1000 if number >= 1000 else number)].name
            if label not in THINGS:
                label = "car"
            for _ in range(rng.randint(3)):
                masks.append(np.roll(instances == number, rng.randint(-3, 4), axis=rng.randint(2)))
                classes.append(THINGS.index(label))
                scores.append(round(rng.rand(), 4))
        masks.append(np.zeros((HEIGHT, WIDTH), dtype=bool))  # empty: counts as nothing
        masks.append(rng.rand(HEIGHT, WIDTH) < 0.02)
        classes += [0, 1]
        scores += [0.9, 0.8]
        for index, (mask, label, score) in enumerate(zip(masks, classes, scores)):
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{frame}_{index}.png")
            lines.append(f"{frame}_{index}.png {name2label[THINGS[label]].id} {score}\n")
        files.append(str(folder / f"{frame}_pred.txt"))
        (folder / f"{frame}_pred.txt").write_text("".join(lines))
        output = Instances((HEIGHT, WIDTH))
        output.pred_masks = torch.from_numpy(np.array(masks)).float()
        output.pred_classes = torch.tensor(classes)
        output.scores = torch.tensor(scores, dtype=torch.float64)
        evaluator.process([as_input(frame)], [{"instances": output}])
    # The script's files aren't needed, and its JSON writer knows no NumPy numbers.
    monkeypatch.setattr(instance_script, "writeDict2JSON", lambda content, path: None)
    changes = {"predictionPath": os.path.abspath(folder), "gtInstancesFile": str(tmp_path / "gtInstances.json")}
    with contextlib.redirect_stdout(io.StringIO()):
        expected = instance_script.evaluateImgLists(
            files, [truth_file(tmp_path, frame, "instanceIds") for frame in truths], quiet(instance_script, **changes)
        )["averages"]
    results = evaluator.evaluate()["segm"]
    assert results == pytest.approx({"AP": 100 * expected["allAp"], "AP50": 100 * expected["allAp50%"]})
    assert 5 < results["AP"] < results["AP50"] < 100


def test_no_instances_at_all(dataset):
    name, truths, *_ = dataset
    evaluator = CityscapesInstanceEvaluator(name)
    assert np.isnan(evaluator.evaluate()["segm"]["AP"])
    for frame in truths:
        output = Instances((HEIGHT, WIDTH), scores=torch.zeros(0), pred_classes=torch.zeros(0, dtype=torch.int64))
        evaluator.process([as_input(frame)], [{"instances": output}])
    assert evaluator.evaluate()["segm"] == {"AP": 0.0, "AP50": 0.0}


def test_errors(dataset):
    name, truths, _, tmp_path = dataset
    evaluator = CityscapesSemSegEvaluator(name)
    with pytest.raises(ValueError, match=r"000019.*\(5, 5\).*\(64, 128\)"):
        evaluator.process([as_input(FRAMES[0])], [{"sem_seg": torch.zeros(19, 5, 5)}])
    with pytest.raises(ValueError, match="20 classes.*19"):
        evaluator.process([as_input(FRAMES[0])], [{"sem_seg": torch.zeros(20, HEIGHT, WIDTH)}])
    os.remove(truth_file(tmp_path, FRAMES[0], "labelIds"))
    with pytest.raises(FileNotFoundError, match="aachen_000000_000019_gtFine_labelIds.png"):
        evaluator.process([as_input(FRAMES[0])], [{"sem_seg": torch.zeros(19, HEIGHT, WIDTH)}])
