"""JSON files in COCO's formats, made image by image."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mask2former_plugin.data.preparation import files
from mask2former_plugin.data.preparation.jobs import Item, Options, Result, collect
from mask2former_plugin.data.preparation.regions import Region

logger = logging.getLogger(__name__)


def write_coco_json(
    path: Path,
    function: Callable[[Item], Result],
    jobs: Mapping[str, Item],
    content: Callable[[list[Result]], dict[str, Any]],
    options: Options,
    description: str,
    pngs: Mapping[str, Path] | None = None,
) -> None:
    """Write a JSON file unless it is there already, with all of its images.

    Args:
        function: makes the result of an image.
        jobs: what it needs, by the name of the image's file.
        content: makes the file's content from the results.
        pngs: the files that ``function`` writes beside, by the name of the image's file.
    """
    if not options.overwrite and _images(path) == set(jobs) and all(map(files.is_complete, (pngs or {}).values())):
        logger.info("%s is complete", path)
        return
    journal = path.with_suffix(".progress.jsonl")
    results = collect(function, jobs, journal, options, description, pngs)
    files.write_json(path, content(results))
    journal.unlink()


def _images(json_file: Path) -> set[str]:
    """File names of the images in a COCO JSON; none if it does not exist or was cut off."""
    if not json_file.is_file():
        return set()
    try:
        content = json.loads(json_file.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        logger.warning("%s is incomplete and is made again", json_file)
        return set()
    return {image["file_name"] for image in content["images"]}


def instance_annotation(region: Region, image_id: int | str, category_id: int, iscrowd: int = 0) -> dict[str, Any]:
    """Annotation of a region with an RLE mask, without ``id``."""
    return {
        "image_id": image_id,
        "category_id": category_id,
        "iscrowd": iscrowd,
        "area": region.area,
        "bbox": region.bbox,
        "segmentation": region.rle(),
    }


def instance_content(
    results: Sequence[tuple[dict[str, Any], Sequence[dict[str, Any]]]], categories: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Content of an instance JSON from each image's entry and annotations, which are numbered from 1."""
    annotations = [annotation for _, of_image in results for annotation in of_image]
    return {
        "images": [image for image, _ in results],
        "categories": list(categories),
        "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations, start=1)],
    }
