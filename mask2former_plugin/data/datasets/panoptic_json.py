"""Datasets in the COCO panoptic format: a JSON of segments and a folder of RGB-coded PNGs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mask2former_plugin.data.datasets.paths import require_files


@dataclass(frozen=True)
class PanopticClasses:
    """Categories in the order of the contiguous ids: things by dataset id, then stuff by dataset id."""

    things: Sequence[Mapping[str, Any]]
    stuff: Sequence[Mapping[str, Any]]

    @classmethod
    def from_categories(cls, categories: Sequence[Mapping[str, Any]], source: str) -> PanopticClasses:
        """Sort the ``categories`` of a panoptic JSON; a ValueError names ``source`` if one lacks a field."""
        for category in categories:
            missing = [key for key in ("id", "name", "isthing") if key not in category]
            if missing:
                raise ValueError(f"{source}: category {dict(category)} has no {missing[0]!r}")
        ordered = sorted(categories, key=lambda category: category["id"])
        return cls([c for c in ordered if c["isthing"]], [c for c in ordered if not c["isthing"]])

    @property
    def all(self) -> list[Mapping[str, Any]]:
        return [*self.things, *self.stuff]

    def metadata(self) -> dict[str, Any]:
        """Names and id maps as ``coco_2017_*_panoptic_with_sem_seg`` has them: the stuff fields cover things too."""
        ids = {category["id"]: index for index, category in enumerate(self.all)}
        return {
            "thing_classes": [category["name"] for category in self.things],
            "stuff_classes": [category["name"] for category in self.all],
            "thing_dataset_id_to_contiguous_id": {category["id"]: ids[category["id"]] for category in self.things},
            "stuff_dataset_id_to_contiguous_id": ids,
        }


def load_panoptic_json(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    panoptic_root: str | os.PathLike,
    thing_ids: Mapping[int, int],
    stuff_ids: Mapping[int, int],
    sem_seg_root: str | os.PathLike | None = None,
) -> list[dict[str, Any]]:
    """Dataset dicts of a panoptic JSON, in the order of its annotations.

    Args:
        json_file: COCO panoptic JSON; its ``images`` give the image files, their sizes if they have any.
        thing_ids, stuff_ids: category id to contiguous id; what is in ``thing_ids`` is a thing.
        sem_seg_root: folder of label maps with the names of the panoptic PNGs; None: no ``sem_seg_file_name``.

    Returns:
        Dicts with ``file_name, image_id, pan_seg_file_name, segments_info`` (``category_id`` contiguous, ``isthing``),
        and ``height``, ``width``, ``sem_seg_file_name`` where known.

    Raises:
        ValueError: an annotation of an image or category that the JSON does not list.
        FileNotFoundError: some of the files do not exist.
    """
    with open(json_file, encoding="utf-8") as file:
        content = json.load(file)
    images = {image["id"]: image for image in content["images"]}
    contiguous = {**stuff_ids, **thing_ids}
    samples = []
    for annotation in content["annotations"]:
        image_id = annotation["image_id"]
        if image_id not in images:
            raise ValueError(
                f"{json_file}: annotation {annotation['file_name']} is of image {image_id!r}, "
                "which 'images' does not list"
            )
        image = images[image_id]
        sample = {
            "file_name": os.path.join(image_root, image["file_name"]),
            "image_id": image_id,
            "pan_seg_file_name": os.path.join(panoptic_root, annotation["file_name"]),
            "segments_info": [
                _contiguous_segment(segment, contiguous, thing_ids, f"{json_file}, {annotation['file_name']}")
                for segment in annotation["segments_info"]
            ],
        }
        sample.update({key: image[key] for key in ("height", "width") if key in image})
        if sem_seg_root is not None:
            sample["sem_seg_file_name"] = os.path.join(sem_seg_root, annotation["file_name"])
        samples.append(sample)
    if not samples:
        raise ValueError(f"{json_file} has no annotations")
    keys = ("file_name", "pan_seg_file_name", "sem_seg_file_name")
    require_files(json_file, (sample[key] for key in keys for sample in samples if key in sample))
    return samples


def _contiguous_segment(
    segment: Mapping[str, Any], contiguous: Mapping[int, int], thing_ids: Mapping[int, int], source: str
) -> dict[str, Any]:
    category = segment["category_id"]
    if category not in contiguous:
        raise ValueError(
            f"{source}: segment {segment['id']} has category_id {category}, "
            f"which is none of the {len(contiguous)} categories"
        )
    return {**segment, "category_id": contiguous[category], "isthing": category in thing_ids}
