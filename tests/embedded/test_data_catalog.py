"""Catalogs of datasets and their metadata."""

import pytest

from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture
def dataset():
    DatasetCatalog.register("animals_train", lambda: [{"file_name": "a.jpg"}])
    yield "animals_train"
    for catalog in (DatasetCatalog, MetadataCatalog):
        if "animals_train" in catalog:
            catalog.remove("animals_train")


def test_get_calls_the_registered_function(dataset):
    assert DatasetCatalog.get(dataset) == [{"file_name": "a.jpg"}]
    assert DatasetCatalog.get(dataset) is not DatasetCatalog.get(dataset)
    assert dataset in DatasetCatalog and dataset in DatasetCatalog.list()
    DatasetCatalog.remove(dataset)
    assert dataset not in DatasetCatalog.list()


def test_register_twice_or_not_callable(dataset):
    with pytest.raises(AssertionError, match="animals_train"):
        DatasetCatalog.register(dataset, lambda: [])
    with pytest.raises(AssertionError):
        DatasetCatalog.register("animals_list", [{"file_name": "a.jpg"}])
    assert "animals_list" not in DatasetCatalog


@pytest.mark.embedded_only
def test_unknown_name_gives_the_nearest_known(dataset):
    with pytest.raises(KeyError, match="animals_trian.*Nearest known names: animals_train"):
        DatasetCatalog.get("animals_trian")
    with pytest.raises(KeyError, match="ade20k_sem_seg_val"):
        DatasetCatalog.get("ade20k_semseg_val")


@pytest.mark.embedded_only
@pytest.mark.parametrize("name", ["lvis_v0.5_train", "voc_2007_train", "keypoints_coco_2017_val"])
def test_datasets_of_upstream_only_say_so(name):
    with pytest.raises(NotImplementedError, match=f"{name}.*pip install"):
        DatasetCatalog.get(name)


def test_metadata_is_one_object_per_name(dataset):
    meta = MetadataCatalog.get(dataset)
    assert meta.set(thing_classes=["cat", "dog"], ignore_label=255) is meta
    assert MetadataCatalog.get(dataset) is meta
    assert meta.name == dataset
    assert meta.thing_classes == ["cat", "dog"]
    assert meta.get("stuff_classes") is None and meta.get("stuff_classes", 3) == 3
    copy = meta.as_dict()
    assert copy == {"name": dataset, "thing_classes": ["cat", "dog"], "ignore_label": 255}
    copy["ignore_label"] = 0
    assert meta.ignore_label == 255


def test_metadata_keeps_its_values(dataset):
    meta = MetadataCatalog.get(dataset)
    meta.thing_classes = ["cat"]
    meta.thing_classes = ["cat"]
    with pytest.raises(AssertionError, match="thing_classes.*animals_train"):
        meta.thing_classes = ["dog"]
    del meta.thing_classes
    meta.thing_classes = ["dog"]
    with pytest.raises(AttributeError, match="thing_classes"):
        meta.stuff_classes  # noqa: B018  (the message lists what there is)
    with pytest.raises(AssertionError):
        MetadataCatalog.get("")


def test_old_metadata_names_lead_to_the_new(dataset):
    meta = MetadataCatalog.get(dataset).set(thing_classes=["cat"], stuff_classes=["sky"])
    assert meta.class_names == ["cat"]
    assert meta.stuff_class_names == ["sky"]
