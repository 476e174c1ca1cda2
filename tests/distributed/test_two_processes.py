"""Two real processes: collectives, division of the data, and evaluators that give the results of one process."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
import torch.distributed as dist
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.samplers import InferenceSampler, RepeatFactorTrainingSampler, TrainingSampler
from detectron2.evaluation import COCOEvaluator, COCOPanopticEvaluator, SemSegEvaluator, inference_on_dataset
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from PIL import Image
from workers import run_in_processes

WORLD = 2
IMAGES = 5
SIZE = (24, 32)
THINGS, STUFF = [1, 2], [1, 2, 3]


# ---- in the workers --------------------------------------------------------------------------------------------------


def everything(root):
    """All that is asked of a worker, in one start."""
    return {"collectives": collectives(), "samplers": samplers(), "evaluators": evaluate(root)}


def collectives():
    rank = comm.get_rank()
    np.random.seed(rank)  # the seeds of the processes differ, the shared one must not
    losses = {"b": torch.tensor(10.0 * (rank + 1)), "a": torch.tensor(rank + 1.0)}
    reversed_group = dist.new_group([0, 1])
    return {
        "place": (rank, comm.get_world_size(), comm.is_main_process(), comm.get_local_rank(), comm.get_local_size()),
        "all_gather": comm.all_gather({"rank": rank, "text": "x" * (3 + 100 * rank)}),
        "gather": comm.gather([rank] * (rank + 1)),
        "gather_at_1": comm.gather(rank, dst=1),
        "in_group": comm.all_gather(rank, group=reversed_group),
        "seed": comm.shared_random_seed(),
        "mean": {k: v.item() for k, v in comm.reduce_dict(dict(losses)).items()},
        "sum": {k: v.item() for k, v in comm.reduce_dict(dict(losses), average=False).items()},
    }


def samplers():
    return {
        "training": list(islice(TrainingSampler(7, seed=3), 14)),
        "ordered": list(islice(TrainingSampler(7, shuffle=False), 7)),
        "agreed": list(islice(TrainingSampler(100), 50)),
        "repeat": list(islice(RepeatFactorTrainingSampler(torch.tensor([1.0, 2.0, 1.0]), seed=3), 8)),
        "inference": {n: list(InferenceSampler(n)) for n in (1, 4, 5)},
    }


def evaluate(root):
    """The results of all evaluators on the share of this process."""
    register(root)
    truth = {d["image_id"]: d for d in panoptic_truth()}
    ids = sorted(truth)
    loader = [[{"image_id": i, "file_name": f"{i}.jpg", "height": SIZE[0], "width": SIZE[1]}] for i in ids]
    loader = [loader[index] for index in InferenceSampler(len(loader))]
    results = {}
    for name, evaluator in (
        ("sem_seg", SemSegEvaluator("two_processes", output_dir=str(root / "out"))),
        ("panoptic", COCOPanopticEvaluator("two_processes", str(root / "out"))),
        ("instance", COCOEvaluator("two_processes", tasks=("segm",), output_dir=str(root / "out"))),
    ):
        results[name] = inference_on_dataset(lambda inputs: [predict(x) for x in inputs], loader, evaluator)
        comm.synchronize()
    return {name: {t: dict(m) for t, m in (r or {}).items()} for name, r in results.items()}


# ---- a tiny dataset: each image has a few rectangles of things and stuff ---------------------------------------------


def panoptic_truth():
    """Label maps with segments 1, 2 (things), 3 (stuff), 0 void; by image."""
    rng = np.random.default_rng(5)
    images = []
    for image_id in range(IMAGES):
        ids = np.full(SIZE, 3, np.int64)
        ids[:3] = 0
        for segment in (1, 2):
            top, left = rng.integers(3, 12), rng.integers(0, 16)
            ids[top : top + rng.integers(5, 10), left : left + rng.integers(5, 14)] = segment
        categories = {1: int(rng.integers(1, 3)), 2: int(rng.integers(1, 3)), 3: 3}
        images.append({"image_id": image_id, "ids": ids, "categories": categories})
    return images


def predict(inputs):
    """Ground truth that is shifted by a pixel or two, the second segment sometimes with the wrong class."""
    truth = panoptic_truth()[inputs["image_id"]]
    shifted = np.roll(truth["ids"], 1 + truth["image_id"] % 2, axis=1)
    categories = dict(truth["categories"])
    if truth["image_id"] == 2:
        categories[2] = 3 - categories[2]
    present = [s for s in (1, 2, 3) if (shifted == s).any()]
    semantic = torch.zeros(3, *SIZE)
    for segment in present:
        semantic[categories[segment] - 1][torch.from_numpy(shifted == segment)] = 1.0
    segments = [{"id": s, "isthing": s != 3, "category_id": categories[s] - 1} for s in present]
    things = [s for s in present if s != 3]
    instances = Instances(SIZE)
    instances.pred_masks = torch.from_numpy(np.stack([shifted == s for s in things]))
    instances.pred_boxes = Boxes(torch.zeros(len(things), 4))
    instances.scores = torch.linspace(0.9, 0.6, len(things)) - 0.01 * truth["image_id"]
    instances.pred_classes = torch.tensor([categories[s] - 1 for s in things])
    return {
        "sem_seg": semantic,
        "panoptic_seg": (torch.from_numpy(shifted.astype(np.int32)), segments),
        "instances": instances,
    }


def write_files(root):
    from pycocotools import mask as coco_mask

    (root / "panoptic").mkdir()
    (root / "semantic").mkdir()
    images, panoptic, instances = [], [], []
    categories = [{"id": i, "name": f"class{i}", "isthing": int(i in THINGS), "color": [i, i, i]} for i in (1, 2, 3)]
    for truth in panoptic_truth():
        image_id, ids = truth["image_id"], truth["ids"]
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", "height": SIZE[0], "width": SIZE[1]})
        Image.fromarray(np.stack([ids, ids * 0, ids * 0], -1).astype(np.uint8)).save(root / f"panoptic/{image_id}.png")
        labels = np.full(SIZE, 255, np.uint8)
        segments = []
        for segment, category in truth["categories"].items():
            mask = ids == segment
            if not mask.any():
                continue
            labels[mask] = category - 1
            common = {"category_id": category, "iscrowd": 0, "area": int(mask.sum()), "bbox": [0, 0, 1, 1]}
            segments.append({"id": segment, **common})
            if category in THINGS:
                rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
                rle["counts"] = rle["counts"].decode()
                instances.append({"id": len(instances) + 1, "image_id": image_id, "segmentation": rle, **common})
        Image.fromarray(labels).save(root / f"semantic/{image_id}.png")
        panoptic.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": segments})
    shared = {"images": images, "categories": categories, "info": {}}
    (root / "panoptic.json").write_text(json.dumps({**shared, "annotations": panoptic}))
    things = [c for c in categories if c["isthing"]]
    (root / "instances.json").write_text(json.dumps({**shared, "categories": things, "annotations": instances}))


def register(root):
    dicts = [
        {"image_id": i, "file_name": f"{i}.jpg", "sem_seg_file_name": str(root / f"semantic/{i}.png")}
        for i in range(IMAGES)
    ]
    DatasetCatalog.register("two_processes", lambda: dicts)
    MetadataCatalog.get("two_processes").set(
        stuff_classes=["class1", "class2", "class3"],
        thing_classes=["class1", "class2"],
        ignore_label=255,
        label_divisor=1000,
        thing_dataset_id_to_contiguous_id={1: 0, 2: 1},
        stuff_dataset_id_to_contiguous_id={1: 0, 2: 1, 3: 2},
        panoptic_json=str(root / "panoptic.json"),
        panoptic_root=str(root / "panoptic"),
        json_file=str(root / "instances.json"),
    )


# ---- in the test's own process ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("dataset")
    write_files(root)
    return root


@pytest.fixture(scope="module")
def workers(dataset, tmp_path_factory):
    return run_in_processes(everything, WORLD, tmp_path_factory.mktemp("results"), dataset)


def test_collectives(workers):
    first, second = (w["collectives"] for w in workers)
    assert first["place"] == (0, 2, True, 0, 2) and second["place"] == (1, 2, False, 1, 2)
    expected = [{"rank": 0, "text": "xxx"}, {"rank": 1, "text": "x" * 103}]
    assert first["all_gather"] == second["all_gather"] == expected
    assert first["in_group"] == second["in_group"] == [0, 1]
    assert (first["gather"], second["gather"]) == ([[0], [1, 1]], [])
    assert (first["gather_at_1"], second["gather_at_1"]) == ([], [0, 1])
    assert first["seed"] == second["seed"]
    assert first["mean"] == {"a": 1.5, "b": 15.0}
    assert first["sum"] == {"a": 3.0, "b": 30.0}


def merged(shares):
    """The order in which the processes together go through the data."""
    return [index for pair in zip(*shares, strict=True) for index in pair]


def test_training_samplers_divide_one_stream(workers):
    shares = [w["samplers"] for w in workers]
    stream = merged([s["training"] for s in shares])
    assert stream == list(islice(TrainingSampler(7, seed=3), 28)), "the stream of a single process"
    for start in range(0, 28, 7):
        assert sorted(stream[start : start + 7]) == list(range(7))
    assert merged([s["ordered"] for s in shares]) == [*range(7), *range(7)]
    assert sorted(merged([s["agreed"] for s in shares])) == list(range(100)), "a seed that nobody gave is agreed upon"
    stream = merged([s["repeat"] for s in shares])
    for start in range(0, 16, 4):
        assert sorted(stream[start : start + 4]) == [0, 1, 1, 2]


def test_inference_samplers_divide_every_image_once(workers):
    shares = [w["samplers"]["inference"] for w in workers]
    assert [s[1] for s in shares] == [[0], []]
    assert [s[4] for s in shares] == [[0, 1], [2, 3]]
    assert [s[5] for s in shares] == [[0, 1, 2], [3, 4]]


def test_evaluators_give_the_results_of_one_process(workers, dataset):
    single = evaluate(dataset)
    first, second = (w["evaluators"] for w in workers)
    assert second == {"sem_seg": {}, "panoptic": {}, "instance": {}}
    assert 10 < single["sem_seg"]["sem_seg"]["mIoU"] < 95
    assert 10 < single["panoptic"]["panoptic_seg"]["PQ"] < 95
    assert 10 < single["instance"]["segm"]["AP"] < 95
    for name, tasks in single.items():
        for task, metrics in tasks.items():
            assert first[name][task] == pytest.approx(metrics, nan_ok=True), f"{name}: {task}"
