"""Mapillary Vistas: the instance JSON, which its panoptic annotations contain."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mask2former_plugin.data.datasets.published import dataset_facts
from mask2former_plugin.data.preparation import files
from mask2former_plugin.data.preparation.coco import read_panoptic_json, segment_numbers
from mask2former_plugin.data.preparation.coco_json import instance_annotation, instance_content, write_coco_json
from mask2former_plugin.data.preparation.jobs import Options
from mask2former_plugin.data.preparation.regions import regions

logger = logging.getLogger(__name__)

SPLITS = {"train": "training", "val": "validation"}
LAYOUT = """
mapillary_vistas/                                          release 1.2, 65 classes
  {training,validation}/images/*.jpg
  {training,validation}/labels/*.png
  {training,validation}/panoptic/*.png, panoptic_2018.json
"""


def prepare_instances(root: Path, splits: Sequence[str], options: Options) -> None:
    """``panoptic`` to ``mapillary_vistas_instance_{train,val}.json``: RLE masks of the 37 thing classes.

    Image and category ids are those of the panoptic JSON, so that predictions of a panoptic model can be compared with
    it; area and box are those of the mask in the PNG.
    """
    base = root / "mapillary_vistas"
    folders = {split: base / SPLITS[split] / "panoptic" for split in splits}
    files.require([folder / "panoptic_2018.json" for folder in folders.values()], LAYOUT)
    facts = dataset_facts("mapillary_vistas")
    names = dict(enumerate(facts["classes"], start=1))
    categories = [{"id": index, "name": names[index]} for index in facts["thing_ids"]]
    content = partial(instance_content, categories=categories)
    jobs = {split: _jobs(folder, names, facts["thing_ids"]) for split, folder in folders.items()}
    for split, split_jobs in jobs.items():
        path = base / f"mapillary_vistas_instance_{split}.json"
        description = f"Mapillary Vistas instances {split}"
        write_coco_json(path, _instances_of_image, split_jobs, content, options, description)


@dataclass(frozen=True)
class _Job:
    """One image: its panoptic PNG, its entry in the panoptic JSON, and those of its segments that are things."""

    png: Path
    image: dict[str, Any]
    things: list[dict[str, Any]]


def _jobs(folder: Path, names: Mapping[int, str], thing_ids: Collection[int]) -> dict[str, _Job]:
    """What is to be done for each image of a split, by the name of its file."""
    json_file = folder / "panoptic_2018.json"
    content = read_panoptic_json(json_file, names)
    files.require_partners([Path(entry["file_name"]).stem for entry in content["annotations"]], folder, ".png")
    images = {image["id"]: image for image in content["images"]}
    jobs = {}
    for entry in content["annotations"]:
        if entry["image_id"] not in images:
            raise ValueError(f"{json_file}: {entry['file_name']} is of image {entry['image_id']!r}, which it lacks")
        image = images[entry["image_id"]]
        things = [segment for segment in entry["segments_info"] if segment["category_id"] in thing_ids]
        jobs[image["file_name"]] = _Job(folder / entry["file_name"], image, things)
    return jobs


def _instances_of_image(job: _Job) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    numbers = segment_numbers(job.png, [segment["id"] for segment in job.things])
    height, width = numbers.shape
    annotations = []
    found = {region.label: region for region in regions(numbers)}
    for number, segment in enumerate(job.things, start=1):
        if number in found:
            iscrowd = segment.get("iscrowd", 0)
            annotations.append(instance_annotation(found[number], job.image["id"], segment["category_id"], iscrowd))
        else:
            logger.warning("%s has no pixels of segment %s, which is left out", job.png, segment["id"])
    image = {"id": job.image["id"], "file_name": job.image["file_name"], "width": width, "height": height}
    return image, annotations
