"""COCO: label maps of all 133 classes from the panoptic annotations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from mask2former_plugin.data.datasets.panoptic_json import PanopticClasses
from mask2former_plugin.data.mappers.steps import rgb_to_id
from mask2former_plugin.data.preparation import files
from mask2former_plugin.data.preparation.jobs import Options, write_files

SPLITS = ("train", "val")
LAYOUT = """
coco/
  annotations/panoptic_{train,val}2017.json   annotations of panoptic_annotations_trainval2017.zip
  panoptic_{train,val}2017/*.png              its inner zip files, unpacked
"""
VOID = 255


def prepare_semantic(root: Path, splits: Sequence[str], options: Options) -> None:
    """``panoptic_*`` to ``panoptic_semseg_*``: 0 … 132, things first, both in the order of their ids; void is 255."""
    base = root / "coco"
    inputs = {s: (base / f"annotations/panoptic_{s}2017.json", base / f"panoptic_{s}2017") for s in splits}
    files.require([path for paths in inputs.values() for path in paths], LAYOUT)
    classes = PanopticClasses.from_categories(COCO_CATEGORIES, "COCO_CATEGORIES").metadata()
    contiguous = classes["stuff_dataset_id_to_contiguous_id"]
    jobs = {}
    for split, (json_file, folder) in inputs.items():
        annotations = read_panoptic_json(json_file, contiguous)["annotations"]
        files.require_partners([Path(entry["file_name"]).stem for entry in annotations], folder, ".png")
        for entry in annotations:
            path = base / f"panoptic_semseg_{split}2017" / entry["file_name"]
            labels = {segment["id"]: contiguous[segment["category_id"]] for segment in entry["segments_info"]}
            jobs[path] = (folder / entry["file_name"], labels, path)
    write_files(_write_label_map, jobs, options, "COCO label maps")


def read_panoptic_json(json_file: Path, categories: Mapping[int, Any]) -> dict[str, Any]:
    """Content of a panoptic JSON; a ValueError names what is missing, or a segment of none of the ``categories``."""
    content = json.loads(json_file.read_text(encoding="utf-8"))
    for key in ("images", "annotations"):
        if key not in content:
            raise ValueError(f"{json_file} is no panoptic JSON: it has no {key!r}")
    for entry in content["annotations"]:
        for segment in entry["segments_info"]:
            if segment["category_id"] not in categories:
                raise ValueError(
                    f"{json_file}, {entry['file_name']}: segment {segment['id']} has the category_id "
                    f"{segment['category_id']}, which is none of the {len(categories)} categories of this dataset"
                )
    return content


def segment_numbers(path: Path, segment_ids: Sequence[int]) -> np.ndarray:
    """Map (H, W) of the position from 1 of each pixel's segment in ``segment_ids``; 0 for pixels of none of them."""
    ids = rgb_to_id(files.read_image(path, "RGB"))
    numbers = np.zeros(1 << 24, dtype=np.int32)  # a page of it is only touched where an id lies
    numbers[np.asarray(segment_ids, dtype=np.int64)] = np.arange(1, len(segment_ids) + 1)
    return numbers[ids]


def _write_label_map(job: tuple[Path, Mapping[int, int], Path]) -> None:
    source, labels, path = job
    palette = np.array([VOID, *labels.values()], dtype=np.uint8)
    files.write_image(path, palette[segment_numbers(source, list(labels))])
