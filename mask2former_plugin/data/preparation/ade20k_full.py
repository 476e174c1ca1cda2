"""ADE20K-Full, release of 2021: images with a shorter side of at most 512 pixels, and label maps of 847 classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from mask2former_plugin.data.datasets.published import ADE20K_FULL_IGNORE_LABEL, dataset_facts
from mask2former_plugin.data.preparation import files
from mask2former_plugin.data.preparation.jobs import Options, write_files
from mask2former_plugin.serialization import load_checkpoint_file

SPLITS = {"train": "training", "val": "validation"}
FOLDER = "ADE20K_2021_17_01"
LAYOUT = """
ADE20K_2021_17_01/
  index_ade20k.pkl
  images/ADE/{training,validation}/**/ADE_*.jpg, ADE_*_seg.png
"""
SHORTEST_SIDE = 512


def prepare_semantic(root: Path, splits: Sequence[str], options: Options) -> None:
    """``images`` to ``images_detectron2/*.jpg`` and ``annotations_detectron2/*.tif`` (uint16, 65535 = no class).

    As published, every image is written anew with Pillow's JPEG quality (75), also one that keeps its size.
    """
    base = root / FOLDER
    files.require([base / "index_ade20k.pkl", base / "images"], LAYOUT)
    index = load_checkpoint_file(base / "index_ade20k.pkl")
    missing_keys = [key for key in ("filename", "folder") if key not in index]
    if missing_keys:
        raise ValueError(f"{base / 'index_ade20k.pkl'} is not ADE20K's index: it has no {missing_keys[0]!r}")
    image_jobs, label_jobs, missing = {}, {}, []
    for name, folder in zip(index["filename"], index["folder"]):
        # ADE_train_00000001.jpg, ADE_val_…; also what has another second word is for training
        split = "val" if name.split("_")[1:2] == ["val"] else "train"
        if split not in splits:
            continue
        stem = Path(name).stem
        image, segments = root / folder / f"{stem}.jpg", root / folder / f"{stem}_seg.png"
        missing += [path for path in (image, segments) if not path.is_file()]
        resized = base / "images_detectron2" / SPLITS[split] / f"{stem}.jpg"
        image_jobs[resized] = (image, resized)
        labels = base / "annotations_detectron2" / SPLITS[split] / f"{stem}.tif"
        label_jobs[labels] = (segments, labels)
    if missing:
        raise FileNotFoundError(f"{len(missing)} files of {base / 'index_ade20k.pkl'} do not exist, first {missing[0]}")
    write_files(_write_image, image_jobs, options, "ADE20K-Full images")
    write_files(_write_label_map, label_jobs, options, "ADE20K-Full label maps")


def _write_image(job: tuple[Path, Path]) -> None:
    source, path = job
    files.write_image(path, _shrink(files.read_image(source, "RGB"), cv2.INTER_LINEAR))


def _write_label_map(job: tuple[Path, Path]) -> None:
    source, path = job
    pixels = _shrink(files.read_image(source, "RGB"), cv2.INTER_NEAREST).astype(np.int64)
    labels = _label_of_class()[pixels[..., 0] // 10 * 256 + pixels[..., 1]]
    files.write_image(path, labels)


def _label_of_class() -> np.ndarray:
    """Label of every number that red and green can say."""
    labels = np.full(26 * 256, ADE20K_FULL_IGNORE_LABEL, dtype=np.uint16)
    class_ids = dataset_facts("ade20k_full")["ids"]
    labels[class_ids] = np.arange(len(class_ids))
    return labels


def _shrink(pixels: np.ndarray, interpolation: int) -> np.ndarray:
    """Pixels (H, W, C) with the shorter side brought to 512 if it is longer."""
    height, width = pixels.shape[:2]
    scale = SHORTEST_SIDE / min(height, width)
    if scale >= 1:
        return pixels
    return cv2.resize(pixels, (round(width * scale), round(height * scale)), interpolation=interpolation)
