"""Cityscapes with fine annotations: instances (from the polygons or the PNGs) and semantic segmentation."""

from __future__ import annotations

import logging
import multiprocessing
import os
from typing import Callable, NamedTuple

import numpy as np
import pycocotools.mask as mask_util

from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES
from detectron2.data.datasets.files import read_json, require_file, require_folder
from detectron2.data.detection_utils import read_label_map
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

__all__ = ["load_cityscapes_instances", "load_cityscapes_semantic"]

logger = logging.getLogger(__name__)

_IMAGE_SUFFIX = "_leftImg8bit.png"
_THINGS = [c for c in CITYSCAPES_CATEGORIES if c["isthing"]]
_CLASS_OF_NAME = {c["name"]: i for i, c in enumerate(_THINGS)}
_CLASS_OF_ID = {c["id"]: i for i, c in enumerate(_THINGS)}
# A region of several objects that can't be told apart: "cargroup" for "car".
_GROUP_SUFFIX = "group"
# The only annotated label that lies on another object without hiding it.
_OVERLAY_LABEL = "license plate"
# Below this number of images the processes cost more than they bring.
_POOL_MIN_IMAGES = 200


class _Files(NamedTuple):
    image: str
    instance_ids: str
    train_ids: str
    polygons: str


def list_cityscapes_images(image_dir: str) -> list[tuple[str, str]]:
    """(city, name without suffix) of all images in ``image_dir/<city>/``, in order.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
    """
    require_folder(image_dir, "Cityscapes image folder")
    found = []
    for city in sorted(PathManager.ls(image_dir)):
        folder = os.path.join(image_dir, city)
        if PathManager.isdir(folder):
            names = sorted(n for n in PathManager.ls(folder) if n.endswith(_IMAGE_SUFFIX))
            found += [(city, n.removesuffix(_IMAGE_SUFFIX)) for n in names]
    if not found:
        raise FileNotFoundError(f"There are no images {os.path.join(image_dir, '<city>', '*' + _IMAGE_SUFFIX)}")
    return found


def _list_files(image_dir: str, gt_dir: str) -> list[_Files]:
    require_folder(gt_dir, "Cityscapes annotation folder")
    files = []
    for city, name in list_cityscapes_images(image_dir):
        annotation = os.path.join(gt_dir, city, f"{name}_gtFine")
        files.append(
            _Files(
                image=os.path.join(image_dir, city, name + _IMAGE_SUFFIX),
                instance_ids=f"{annotation}_instanceIds.png",
                train_ids=f"{annotation}_labelTrainIds.png",
                polygons=f"{annotation}_polygons.json",
            )
        )
    return files


def load_cityscapes_instances(
    image_dir: str, gt_dir: str, from_json: bool = True, to_polygons: bool = True
) -> list[dict]:
    """Read the instances of the eight thing classes.

    Args:
        image_dir, gt_dir: folders of a split, e.g. ``leftImg8bit/train`` and ``gtFine/train``.
        from_json: from the annotators' polygons, in which parts that are hidden by other objects are cut away; needs
            shapely. Else from the ``*_instanceIds.png``.
        to_polygons: masks as polygons (from PNG: needs OpenCV; holes are lost), else as RLE (only from PNG).

    Returns:
        dataset dicts whose category ids are contiguous, in the order of ``thing_classes``.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: RLE asked for from polygons.
    """
    if from_json and not to_polygons:
        raise ValueError("Cityscapes masks as RLE come from the PNGs: use from_json=False with to_polygons=False")
    files = _list_files(image_dir, gt_dir)
    logger.info("Reading the instances of %d Cityscapes images in %s", len(files), gt_dir)
    read = _read_polygons if from_json else (_read_png_as_polygons if to_polygons else _read_png_as_rle)
    dataset_dicts = _map_files(read, files)
    logger.info("Loaded %d images from %s", len(dataset_dicts), image_dir)
    return dataset_dicts


def _map_files(read: Callable[[_Files], dict], files: list[_Files]) -> list[dict]:
    processes = max((os.cpu_count() or 1) // comm.get_local_size(), 1)
    if len(files) < _POOL_MIN_IMAGES or processes == 1:
        return [read(f) for f in files]
    with multiprocessing.Pool(processes) as pool:
        return pool.map(read, files, chunksize=16)


def _record(files: _Files, height: int, width: int, annotations: list[dict]) -> dict:
    return {
        "file_name": files.image,
        "image_id": os.path.basename(files.image),
        "height": height,
        "width": width,
        "annotations": annotations,
    }


def _read_polygons(files: _Files) -> dict:
    """Objects are listed from back to front; each keeps what the later ones leave of it."""
    import shapely

    content = read_json(files.polygons, "Cityscapes polygon file")
    annotations = []
    in_front: list[shapely.Geometry] = []
    for obj in reversed(content["objects"]):
        name = obj["label"]
        if obj.get("deleted") or name == _OVERLAY_LABEL or len(obj["polygon"]) < 3:
            continue
        # Corners are pixel indices: shifted to the middle of the pixels and widened by half a pixel, the area covers
        # them.
        outline = shapely.Polygon(np.asarray(obj["polygon"], dtype=np.float64) + 0.5).buffer(0.5, quad_segs=4)
        hidden_by, in_front = in_front, [*in_front, outline]
        class_name = name.removesuffix(_GROUP_SUFFIX)
        if class_name not in _CLASS_OF_NAME:
            continue
        hiding = [g for g in hidden_by if g.intersects(outline)]
        visible = outline.difference(shapely.union_all(hiding)) if hiding else outline
        parts = [p for p in shapely.get_parts(visible) if isinstance(p, shapely.Polygon) and not p.is_empty]
        if not parts:
            continue
        annotations.append(
            {
                "iscrowd": int(name.endswith(_GROUP_SUFFIX)),
                "category_id": _CLASS_OF_NAME[class_name],
                "bbox": list(visible.bounds),
                "bbox_mode": BoxMode.XYXY_ABS,
                "segmentation": [np.asarray(p.exterior.coords).ravel().tolist() for p in parts],
            }
        )
    return _record(files, content["imgHeight"], content["imgWidth"], annotations)


def _read_png(files: _Files, encode: Callable[[np.ndarray], list | dict]) -> dict:
    """Ids below 1000 are regions of a class, others are class id times 1000 plus a number."""
    require_file(files.instance_ids, "Cityscapes instance PNG")
    ids = read_label_map(files.instance_ids)
    annotations = []
    for instance_id in np.unique(ids).tolist():
        class_id = instance_id // 1000 if instance_id >= 1000 else instance_id
        if class_id not in _CLASS_OF_ID:
            continue
        mask = ids == instance_id
        ys, xs = np.nonzero(mask)
        x0, y0, x1, y1 = (int(v) for v in (xs.min(), ys.min(), xs.max(), ys.max()))
        segmentation = encode(mask.astype(np.uint8))
        if x1 <= x0 or y1 <= y0 or not segmentation:
            continue
        annotations.append(
            {
                "iscrowd": int(instance_id < 1000),
                "category_id": _CLASS_OF_ID[class_id],
                "bbox": [x0, y0, x1, y1],
                "bbox_mode": BoxMode.XYXY_ABS,
                "segmentation": segmentation,
            }
        )
    return _record(files, *ids.shape, annotations)


def _read_png_as_rle(files: _Files) -> dict:
    return _read_png(files, lambda mask: mask_util.encode(np.asfortranarray(mask)))


def _read_png_as_polygons(files: _Files) -> dict:
    return _read_png(files, _outlines)


def _outlines(mask: np.ndarray) -> list[list[int]]:
    import cv2

    contours = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[-2]
    return [c.ravel().tolist() for c in contours if len(c) >= 3]


def load_cityscapes_semantic(image_dir: str, gt_dir: str) -> list[dict]:
    """Pair the images with their label maps of the 19 train ids.

    Args:
        image_dir, gt_dir: folders of a split, e.g. ``leftImg8bit/train`` and ``gtFine/train``.

    Returns:
        dicts with ``file_name, sem_seg_file_name, height, width``.

    Raises:
        FileNotFoundError: a folder, or the label map of the first image is missing; the message says how to make them.
    """
    dataset_dicts = []
    for files in _list_files(image_dir, gt_dir):
        content = read_json(files.polygons, "Cityscapes polygon file")
        dataset_dicts.append(
            {
                "file_name": files.image,
                "sem_seg_file_name": files.train_ids,
                "height": content["imgHeight"],
                "width": content["imgWidth"],
            }
        )
    require_label_train_ids(dataset_dicts[0]["sem_seg_file_name"])
    return dataset_dicts


def how_to_make(tool: str) -> str:
    """A sentence on how to make missing files with a tool of the Cityscapes authors."""
    return (
        "Make such files with the tools of the Cityscapes authors: pip install cityscapesscripts, then "
        f"CITYSCAPES_DATASET=<folder of leftImg8bit and gtFine> {tool}"
    )


def require_label_train_ids(path: str) -> None:
    """Raise FileNotFoundError if this label map of train ids is missing; the message says how to make them."""
    if not PathManager.isfile(path):
        raise FileNotFoundError(f"The label map {path} does not exist. {how_to_make('csCreateTrainIdLabelImgs')}")
