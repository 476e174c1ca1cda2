"""Instance annotations in COCO's format, made image by image."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mask2former_plugin.data.preparation.files import write_json
from mask2former_plugin.data.preparation.jobs import Item, Options, collect
from mask2former_plugin.data.preparation.regions import Region

logger = logging.getLogger(__name__)


def annotation(region: Region, image_id: int | str, category_id: int, iscrowd: int = 0) -> dict[str, Any]:
    """Annotation of a region; its ``id`` is given by :func:`write_instance_json`."""
    return {
        "image_id": image_id,
        "category_id": category_id,
        "iscrowd": iscrowd,
        "area": region.area,
        "bbox": region.bbox,
        "segmentation": region.rle(),
    }


def write_instance_json(
    path: Path,
    function: Callable[[Item], tuple[dict[str, Any], list[dict[str, Any]]]],
    jobs: Mapping[str, Item],
    categories: Sequence[Mapping[str, Any]],
    options: Options,
    description: str,
) -> None:
    """Write an instance JSON unless it is there with these images.

    Args:
        function: makes the entry of an image and its annotations.
        jobs: what it needs, by the name of the image's file.
    """
    if not options.overwrite and finished_images(path) == set(jobs):
        logger.info("%s is complete", path)
        return
    progress = progress_file(path)
    results = collect(function, jobs, progress, options, description)
    annotations = [entry for _, entries in results for entry in entries]
    write_json(
        path,
        {
            "images": [image for image, _ in results],
            "categories": list(categories),
            "annotations": [{"id": number, **entry} for number, entry in enumerate(annotations, start=1)],
        },
    )
    progress.unlink()


def finished_images(json_file: Path) -> set[str]:
    """File names of the images in a COCO JSON; none if it does not exist or was cut off."""
    if not json_file.is_file():
        return set()
    try:
        content = json.loads(json_file.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        logger.warning("%s is incomplete and is made again", json_file)
        return set()
    return {image["file_name"] for image in content["images"]}


def progress_file(json_file: Path) -> Path:
    """Where the results of the images are kept until all are there."""
    return json_file.with_suffix(".progress.jsonl")
