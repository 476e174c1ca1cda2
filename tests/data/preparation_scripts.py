"""Runs the scripts in ``datasets/``, and reads and writes their files."""

import contextlib
import json
import runpy
import sys
from pathlib import Path
from unittest import mock

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from mask2former_plugin.data.datasets import register_published_datasets

SCRIPTS = Path(__file__).parents[2] / "datasets"


def run_script(name, root, *arguments, workers=1):
    command = [name, "--root", str(root), "--workers", str(workers), *arguments]
    with mock.patch.object(sys, "argv", command):
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)


def load(path):
    return np.asarray(Image.open(path))


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def read_json(path):
    return json.loads(path.read_text())


def panoptic_png(ids):
    """RGB (H, W, 3) of segment ids."""
    ids = np.asarray(ids)
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1)


def panoptic_ids(path):
    red, green, blue = np.moveaxis(load(path).astype(np.int64), -1, 0)
    return red + 256 * green + 65536 * blue


def times(root):
    """Time of the last change of every file."""
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@contextlib.contextmanager
def registered_at(root, *names):
    """The published ``names`` with their files below ``root``."""

    def register(folder):
        for name in names:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_published_datasets(folder)

    register(root)
    try:
        yield
    finally:
        register(None)
