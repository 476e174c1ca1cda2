"""Mapillary Vistas: the instance JSON, which its panoptic annotations contain."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mask2former_plugin.data.datasets.published import dataset_facts
from mask2former_plugin.data.preparation import files
from mask2former_plugin.data.preparation.coco import read_panoptic_json, segment_numbers
from mask2former_plugin.data.preparation.instance_json import annotation, write_instance_json
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
    categories = [{"id": index, "name": facts["classes"][index - 1]} for index in facts["thing_ids"]]
    jobs = {}
    for split, folder in folders.items():
        json_file = folder / "panoptic_2018.json"
        content = read_panoptic_json(json_file, dict(enumerate(facts["classes"], start=1)))
        images = {image["id"]: image for image in content["images"]}
        files.require_partners([Path(entry["file_name"]).stem for entry in content["annotations"]], folder, ".png")
        jobs[split] = {}
        for entry in content["annotations"]:
            if entry["image_id"] not in images:
                raise ValueError(f"{json_file}: {entry['file_name']} is of image {entry['image_id']!r}, which it lacks")
            things = [segment for segment in entry["segments_info"] if segment["category_id"] in facts["thing_ids"]]
            image = images[entry["image_id"]]
            jobs[split][image["file_name"]] = (folder / entry["file_name"], image, things)
    for split, split_jobs in jobs.items():
        path = base / f"mapillary_vistas_instance_{split}.json"
        description = f"Mapillary Vistas instances {split}"
        write_instance_json(path, _instance_annotations, split_jobs, categories, options, description)


def _instance_annotations(
    job: tuple[Path, dict[str, Any], list[dict[str, Any]]],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    png, image, things = job
    numbers = segment_numbers(png, [segment["id"] for segment in things])
    found = {region.label: region for region in regions(numbers)}
    missing = [segment["id"] for number, segment in enumerate(things, start=1) if number not in found]
    if missing:
        raise ValueError(f"{png} has no pixels of the segments {missing} that its JSON lists")
    entry = {"id": image["id"], "file_name": image["file_name"], "width": numbers.shape[1], "height": numbers.shape[0]}
    return entry, [
        annotation(found[number], image["id"], segment["category_id"], segment["iscrowd"])
        for number, segment in enumerate(things, start=1)
    ]
