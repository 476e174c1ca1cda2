"""Shared test set-up: picks the Detectron2, registers markers, keeps the random state of tests apart."""

import random

import numpy as np
import pytest
import torch

import mask2former_plugin  # noqa: F401  (makes detectron2 importable)
from detectron2.data import DatasetCatalog, MetadataCatalog
from mask2former_plugin.detectron2_runtime import is_embedded


def pytest_configure(config):
    config.addinivalue_line("markers", "embedded_only: holds for the embedded Detectron2 slice only")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_collection_modifyitems(items):
    for item in items:
        if "embedded_only" in item.keywords and not is_embedded():
            item.add_marker(pytest.mark.skip(reason="tests the embedded Detectron2 slice; upstream is in use"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _own_datasets():
    """What a test module registers is gone after it: another may use the same names for other folders."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)
