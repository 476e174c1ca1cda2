"""Wrapped datasets, samplers and data loaders."""

import itertools
import logging
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    MapDataset,
    MetadataCatalog,
    build_batch_data_loader,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import (
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm

# ---- datasets


def test_serialized_list_gives_equal_fresh_elements():
    elements = [{"a": np.arange(i), "b": "x" * i} for i in range(5)]
    dataset = DatasetFromList(elements)
    assert len(dataset) == 5
    for i in (0, 3, 4):
        element = dataset[i]
        np.testing.assert_array_equal(element["a"], np.arange(i))
        assert element["b"] == "x" * i and element is not elements[i]
        element["b"] = "changed"
        assert dataset[i]["b"] == "x" * i
    assert len(list(pickle.loads(pickle.dumps(dataset)))) == 5


def test_unserialized_list_copies_if_asked():
    elements = [[1], [2]]
    assert DatasetFromList(elements, copy=False, serialize=False)[0] is elements[0]
    copied = DatasetFromList(elements, copy=True, serialize=False)[0]
    assert copied == [1] and copied is not elements[0]


@pytest.mark.embedded_only
def test_serialized_list_ends():
    dataset = DatasetFromList([7, 8])
    assert dataset[-1] == 8
    with pytest.raises(IndexError):
        dataset[2]
    assert list(dataset) == [7, 8]
    assert len(DatasetFromList([])) == 0


def test_mapped_dataset_replaces_rejected_elements():
    dataset = MapDataset(DatasetFromList(list(range(10))), lambda x: x * 10 if x % 2 else None)
    results = [dataset[i] for i in range(10)]
    assert results[1::2] == [10, 30, 50, 70, 90]
    assert set(results) <= {10, 30, 50, 70, 90}


@pytest.mark.embedded_only
def test_mapped_dataset_without_any_usable_element():
    dataset = MapDataset(DatasetFromList([1, 2, 3]), lambda x: None)
    with pytest.raises(RuntimeError, match="No element"):
        dataset[0]


def test_aspect_ratio_groups():
    rng = np.random.RandomState(0)
    sizes = rng.randint(1, 9, (200, 2))
    elements = [{"width": int(w), "height": int(h), "i": i} for i, (w, h) in enumerate(sizes)]
    batches = list(AspectRatioGroupedDataset(elements, 3))
    wide = [e["i"] for e in elements if e["width"] > e["height"]]
    tall = [e["i"] for e in elements if e["width"] <= e["height"]]
    got_wide = [e["i"] for b in batches if b[0]["width"] > b[0]["height"] for e in b]
    got_tall = [e["i"] for b in batches if b[0]["width"] <= b[0]["height"] for e in b]
    assert got_wide == wide[: len(wide) // 3 * 3]
    assert got_tall == tall[: len(tall) // 3 * 3]
    assert {len(b) for b in batches} == {3}


# ---- samplers


@pytest.fixture
def as_process(monkeypatch):
    """Pretend to be one of several processes."""

    def pretend(rank, world_size):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: world_size)

    return pretend


def _take(sampler, n):
    return list(itertools.islice(sampler, n))


def test_training_sampler_is_a_stream_of_permutations():
    stream = _take(TrainingSampler(7, seed=3), 35)
    epochs = np.array(stream).reshape(5, 7)
    assert (np.sort(epochs, axis=1) == np.arange(7)).all()
    assert len({tuple(e) for e in epochs.tolist()}) == 5
    assert stream == _take(TrainingSampler(7, seed=3), 35)
    generator = torch.Generator().manual_seed(3)
    assert stream[:14] == [*torch.randperm(7, generator=generator), *torch.randperm(7, generator=generator)]
    assert _take(TrainingSampler(3, shuffle=False), 7) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.embedded_only
def test_negative_seed_is_random_and_follows_the_global_one():
    def draw(global_seed):
        np.random.seed(global_seed)
        torch.manual_seed(global_seed)
        return _take(TrainingSampler(1000, seed=-1), 50)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize("make", [
    lambda: TrainingSampler(11, seed=5),
    lambda: RepeatFactorTrainingSampler(torch.tensor([1.0, 2.5, 1.2]), seed=5),
    lambda: RandomSubsetTrainingSampler(30, 0.4, seed_shuffle=1, seed_subset=2),
])  # fmt: skip
def test_processes_share_one_stream(as_process, make):
    whole = _take(make(), 60)
    parts = []
    for rank in range(3):
        as_process(rank, 3)
        parts.append(_take(make(), 20))
    assert [x for step in zip(*parts) for x in step] == whole


def test_sampler_sizes_are_checked():
    with pytest.raises(TypeError):
        TrainingSampler(3.0)
    with pytest.raises(ValueError):
        TrainingSampler(0)


def test_repeat_factors():
    dicts = [{"annotations": [{"category_id": c} for c in cs]} for cs in ([0], [0], [0, 1], [])]
    got = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(dicts, 0.9)
    # category 0 in 3/4 of the images, 1 in 1/4
    assert got.tolist() == pytest.approx([(0.9 / 0.75) ** 0.5] * 2 + [(0.9 / 0.25) ** 0.5, 1.0])
    got = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(dicts, 0.5, sqrt=False)
    assert got.tolist() == [1, 1, 2, 1]


def test_repeat_factor_sampler_repeats_on_average():
    factors = torch.tensor([1.0, 3.0, 1.5])
    counts = np.bincount(_take(RepeatFactorTrainingSampler(factors, seed=0), 5500), minlength=3)
    assert counts / counts[0] == pytest.approx([1, 3, 1.5], abs=0.1)


def test_random_subset_is_fixed():
    sampler = RandomSubsetTrainingSampler(40, 0.25, seed_subset=1)
    subset = set(_take(sampler, 10))
    assert len(subset) == 10 and set(_take(sampler, 200)) == subset


def test_inference_sampler_covers_each_index_once(as_process):
    parts = []
    for rank in range(4):
        as_process(rank, 4)
        sampler = InferenceSampler(10)
        parts.append(list(sampler))
        assert len(sampler) == len(parts[-1])
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]


# ---- loaders


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_do_not_depend_on_workers(num_workers):
    dataset = DatasetFromList(list(range(23)))
    loader = build_batch_data_loader(dataset, InferenceSampler(23), 4, num_workers=num_workers, drop_last=False)
    assert [sorted(b) for b in loader] == [list(range(i, min(i + 4, 23))) for i in range(0, 23, 4)]
    assert len(loader) == 6


def test_train_loader_applies_mapper_and_collate():
    loader = build_detection_train_loader(
        [{"i": i} for i in range(5)],
        mapper=lambda d: d["i"] + 100,
        sampler=TrainingSampler(5, shuffle=False),
        total_batch_size=2,
        aspect_ratio_grouping=False,
        collate_fn=tuple,
    )
    assert _take(loader, 3) == [(100, 101), (102, 103), (104, 100)]


@pytest.mark.embedded_only
def test_wrong_batch_size(as_process):
    as_process(0, 3)
    with pytest.raises(ValueError, match="IMS_PER_BATCH.*processes.*3.*got 4"):
        build_batch_data_loader(DatasetFromList([1]), TrainingSampler(1, seed=0), 4)


@pytest.fixture
def registered(tmp_path):
    names = []

    def register(dicts, **metadata):
        name = f"loading_test_{len(names)}"
        names.append(name)
        DatasetCatalog.register(name, lambda: dicts)
        MetadataCatalog.get(name).set(**metadata)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _dicts(crowds):
    return [
        {
            "file_name": f"{i}.jpg",
            "width": 4,
            "height": 3,
            "annotations": [{"category_id": 0, "iscrowd": c} for c in cs],
        }
        for i, cs in enumerate(crowds)
    ]


def test_images_without_instances_are_left_out(registered):
    name = registered(_dicts([[0], [], [1], [1, 0]]), thing_classes=["a"])
    assert [d["file_name"] for d in get_detection_dataset_dicts(name)] == ["0.jpg", "3.jpg"]
    assert len(get_detection_dataset_dicts([name], filter_empty=False)) == 4
    assert len(get_detection_dataset_dicts([name, name])) == 4


def test_empty_datasets_are_errors(registered):
    empty = registered([])
    with pytest.raises(AssertionError, match=f"{empty}.*empty"):
        get_detection_dataset_dicts(empty)


@pytest.mark.embedded_only
def test_dataset_of_crowds_only_is_an_error(registered):
    crowds = registered(_dicts([[1], []]), thing_classes=["a"])
    with pytest.raises(AssertionError, match=crowds):
        get_detection_dataset_dicts(crowds)
    with pytest.raises(AssertionError, match="DATASETS.TRAIN"):
        get_detection_dataset_dicts([])


@pytest.mark.embedded_only
def test_datasets_must_fit_together(registered):
    first = registered(_dicts([[0]]), thing_classes=["a"])
    second = registered(_dicts([[0]]), thing_classes=["b"])
    with pytest.raises(ValueError, match=f"{first}.*{second}.*thing_classes"):
        get_detection_dataset_dicts([first, second])
    wrong_id = _dicts([[0]])
    wrong_id[0]["annotations"][0]["category_id"] = 5
    third = registered(wrong_id, thing_classes=["a"])
    with pytest.raises(ValueError, match="0.jpg.*class id 5"):
        get_detection_dataset_dicts(third)


def test_loaders_from_config(registered):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (registered(_dicts([[0], [], [0], [0]]), thing_classes=["a"]),)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = True
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SEED = 4
    batches = _take(build_detection_train_loader(cfg, mapper=lambda d: d), 6)
    names = [d["file_name"] for b in batches for d in b]
    assert [len(b) for b in batches] == [2] * 6
    order = _take(TrainingSampler(3, seed=4), 12)
    assert names == [["0.jpg", "2.jpg", "3.jpg"][i] for i in order]

    loader = build_detection_test_loader(cfg, cfg.DATASETS.TRAIN[0], mapper=lambda d: d["file_name"])
    assert list(loader) == [["0.jpg"], ["1.jpg"], ["2.jpg"], ["3.jpg"]]


@pytest.mark.embedded_only
def test_samplers_from_config(registered):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (registered(_dicts([[0], [0]]), thing_classes=["a"]),)
    cfg.DATALOADER.SAMPLER_TRAIN = "TrainSampler"
    with pytest.raises(ValueError, match="TrainSampler.*TrainingSampler"):
        build_detection_train_loader(cfg, mapper=lambda d: d)
    cfg.DATALOADER.SAMPLER_TRAIN = "WeightedTrainingSampler"
    with pytest.raises(NotImplementedError, match="WeightedTrainingSampler"):
        build_detection_train_loader(cfg, mapper=lambda d: d)
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.5
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    batch = next(iter(build_detection_train_loader(cfg, mapper=lambda d: d["file_name"], aspect_ratio_grouping=False)))
    assert sorted(batch) == ["0.jpg", "1.jpg"]


class _Stream(IterableDataset):
    def __iter__(self):
        yield from range(6)


def test_iterable_dataset(registered):
    name = registered(_Stream())
    assert isinstance(get_detection_dataset_dicts(name), IterableDataset)
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (name,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 3
    loader = build_detection_train_loader(cfg, mapper=lambda x: None if x == 1 else x, aspect_ratio_grouping=False)
    assert list(loader) == [[0, 2, 3]]


def test_histogram_counts_instances(registered, caplog):
    dicts = _dicts([[0, 1], [0]])
    dicts[1]["annotations"].append({"category_id": 1, "iscrowd": 0})
    name = registered(dicts, thing_classes=["sheep", "shepherd"])
    with caplog.at_level(logging.INFO):
        # upstream's logger does not propagate
        for logger_name in ("detectron2", "detectron2.data.build"):
            logging.getLogger(logger_name).propagate = True
        get_detection_dataset_dicts(name)
    table = [line.replace(" ", "") for line in caplog.text.splitlines() if "sheep" in line]
    assert any("|sheep|2|shepherd|1|" in line for line in table)
