"""COCO-Stuff 10k, release 1.0: images and label maps sorted into its train and test split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mask2former_plugin.data.preparation import files
from mask2former_plugin.data.preparation.jobs import Options, write_files

SPLITS = ("train", "test")
LAYOUT = """
coco/coco_stuff_10k/
  images/*.jpg
  annotations/*.mat
  imageLists/{train,test}.txt     names of images, one per line
"""
CLASSES = 171
UNLABELLED = 1


def prepare_semantic(root: Path, splits: Sequence[str], options: Options) -> None:
    """``images`` and ``annotations`` to ``images_detectron2/{train,test}`` and ``annotations_detectron2/{train,test}``.

    In the MATLAB files 1 is unlabelled, which becomes 255, and 2 … 172 are the classes, which become 0 … 170.
    """
    _hdf5()
    base = root / "coco/coco_stuff_10k"
    lists = {split: base / f"imageLists/{split}.txt" for split in splits}
    files.require([base / "images", base / "annotations", *lists.values()], LAYOUT)
    images, maps = {}, {}
    for split, path in lists.items():
        stems = path.read_text(encoding="utf-8").split()
        files.require_partners(stems, base / "images", ".jpg")
        files.require_partners(stems, base / "annotations", ".mat")
        for stem in stems:
            image = base / f"images_detectron2/{split}/{stem}.jpg"
            images[image] = (base / f"images/{stem}.jpg", image)
            labels = base / f"annotations_detectron2/{split}/{stem}.png"
            maps[labels] = (base / f"annotations/{stem}.mat", labels)
    write_files(_copy, images, options, "COCO-Stuff 10k images")
    write_files(_write_label_map, maps, options, "COCO-Stuff 10k label maps")


def _hdf5():
    """The module h5py, which reads MATLAB files of version 7.3; nothing else needs it."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError("COCO-Stuff 10k has its labels in MATLAB files; to read them: pip install h5py") from error
    return h5py


def _copy(job: tuple[Path, Path]) -> None:
    files.copy(*job)


def _write_label_map(job: tuple[Path, Path]) -> None:
    source, path = job
    try:
        with _hdf5().File(source, "r") as file:
            labels = np.asarray(file["S"])
    except (OSError, KeyError) as error:
        raise ValueError(f"{source} is no MATLAB 7.3 file with a label map S: {error}") from error
    if labels.min() < UNLABELLED or labels.max() > UNLABELLED + CLASSES:
        raise ValueError(
            f"{source} has the labels {labels.min()} … {labels.max()}; those of release 1.0 are {UNLABELLED} … "
            f"{UNLABELLED + CLASSES}, and other releases number them differently"
        )
    # MATLAB stores columns first; in 8 bits, -1 is 255
    files.write_image(path, (labels.T.astype(np.int64) - UNLABELLED - 1).astype(np.uint8))
