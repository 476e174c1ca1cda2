"""ADE20K's scene parsing benchmark: label maps with void 255, panoptic PNGs with their JSON, and an instance JSON."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mask2former_plugin.data.datasets.published import dataset_facts
from mask2former_plugin.data.preparation import files
from mask2former_plugin.data.preparation.instance_json import (
    annotation,
    finished_images,
    progress_file,
    write_instance_json,
)
from mask2former_plugin.data.preparation.jobs import Options, collect, write_files
from mask2former_plugin.data.preparation.regions import Region, regions

logger = logging.getLogger(__name__)

SPLITS = {"train": "training", "val": "validation"}
FOLDER = "ADEChallengeData2016"
LAYOUT = """
ADEChallengeData2016/
  images/{training,validation}/*.jpg                 ADEChallengeData2016.zip
  annotations/{training,validation}/*.png            ADEChallengeData2016.zip
  annotations_instance/{training,validation}/*.png   annotations_instance.tar (panoptic and instance only)
"""
CLASSES = 150
# In the palette of the label maps this class has the colour of another; segment ids begin with the colour of the class.
_UNIQUE_COLORS = {48: [140, 140, 200]}
_COLOR_REACH = 30


@dataclass(frozen=True)
class _Sources:
    """Files of one image.

    Attributes:
        stem: name of the image without extension, which is also its id.
        semantic: 0 = none, 1 … 150 = class.
        instances: R = number of the thing class from 1, G = number of the instance in the image, 0 = none.
        panoptic: PNG to be written.
    """

    stem: str
    semantic: Path
    instances: Path
    panoptic: Path

    def image(self, size: Sequence[int]) -> dict[str, Any]:
        """Entry of the image in a COCO JSON; ``size`` is height and width."""
        return {"id": self.stem, "file_name": f"{self.stem}.jpg", "width": size[1], "height": size[0]}


def prepare_semantic(root: Path, splits: Sequence[str], options: Options) -> None:
    """``annotations`` to ``annotations_detectron2``: class - 1, so that 0 (none of the 150) becomes 255."""
    base = root / FOLDER
    folders = [SPLITS[split] for split in splits]
    files.require([base / "annotations" / folder for folder in folders], LAYOUT)
    jobs = {}
    for folder in folders:
        for stem in files.stems(base / "annotations" / folder, ".png"):
            path = base / "annotations_detectron2" / folder / f"{stem}.png"
            jobs[path] = (base / "annotations" / folder / path.name, path)
    write_files(_write_label_map, jobs, options, "ADE20K label maps")


def _write_label_map(job: tuple[Path, Path]) -> None:
    source, path = job
    files.write_image(path, _read_semantic(source) - np.uint8(1))


def prepare_panoptic(root: Path, splits: Sequence[str], options: Options) -> None:
    """Label and instance maps to ``ade20k_panoptic_{train,val}`` and its JSON, COCO's panoptic format.

    The categories are all 150 classes with the ids 0 … 149. Each stuff class is one segment of the image, each instance
    one of its thing class, painted over the stuff; pixels of thing classes without an instance stay void. As published,
    area and box of a stuff segment are those before instances cover it.
    """
    facts = dataset_facts("ade20k")
    colors = _colors()
    categories = [
        {"id": index, "name": name, "isthing": int(index in facts["thing_ids"]), "color": colors[index]}
        for index, name in enumerate(facts["classes"])
    ]
    for split, sources in _sources(root, splits):
        json_file = root / FOLDER / f"ade20k_panoptic_{split}.json"
        jobs = {f"{source.stem}.jpg": source for source in sources}
        pngs = {name: source.panoptic for name, source in jobs.items()}
        complete = finished_images(json_file) == set(jobs) and all(map(files.is_complete, pngs.values()))
        if complete and not options.overwrite:
            logger.info("%s is complete", json_file)
            continue
        progress = progress_file(json_file)
        results = collect(_write_panoptic, jobs, progress, options, f"ADE20K panoptic {split}", pngs)
        images, annotations = zip(*results)
        files.write_json(json_file, {"images": images, "annotations": annotations, "categories": categories})
        progress.unlink()


def _write_panoptic(source: _Sources) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the PNG of an image; returns the image's entry and its annotation."""
    semantic = _read_semantic(source.semantic)
    things = _thing_classes()
    stuff = semantic.copy()
    stuff[np.isin(semantic, things)] = 0
    found = [(region.label - 1, region) for region in regions(stuff)]
    size, instances = _instances(source)
    if size != semantic.shape:
        raise ValueError(f"{source.instances} is {size}, {source.semantic} {semantic.shape} (height, width)")
    found += instances
    rgb = np.zeros((*semantic.shape, 3), dtype=np.uint8)
    colors = _SegmentColors(_colors())
    segments = []
    for category, region in found:
        color = colors.new(category)
        rgb[region.box][region.mask] = color
        segments.append(
            {
                "id": color[0] + 256 * color[1] + 65536 * color[2],
                "category_id": category,
                "area": region.area,
                "bbox": region.bbox,
                "iscrowd": 0,
            }
        )
    files.write_image(source.panoptic, rgb)
    image = source.image(semantic.shape)
    return image, {"image_id": source.stem, "file_name": source.panoptic.name, "segments_info": segments}


def prepare_instances(root: Path, splits: Sequence[str], options: Options) -> None:
    """Instance maps to ``ade20k_instance_{train,val}.json``: RLE masks of 100 classes with the ids of the panoptic JSON."""
    facts = dataset_facts("ade20k")
    categories = [{"id": index, "name": name} for index, name in zip(facts["thing_ids"], facts["instance_classes"])]
    for split, sources in _sources(root, splits):
        write_instance_json(
            root / FOLDER / f"ade20k_instance_{split}.json",
            _instance_annotations,
            {f"{source.stem}.jpg": source for source in sources},
            categories,
            options,
            f"ADE20K instances {split}",
        )


def _instance_annotations(source: _Sources) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    size, found = _instances(source)
    return source.image(size), [annotation(region, source.stem, category) for category, region in found]


# ---------------------------------------------------------------------------------------------------------------- input


def _sources(root: Path, splits: Sequence[str]) -> Iterator[tuple[str, list[_Sources]]]:
    """The files of each split, all splits checked before the first one is worked on."""
    base = root / FOLDER
    kinds = ("images", "annotations", "annotations_instance")
    files.require([base / kind / SPLITS[split] for split in splits for kind in kinds], LAYOUT)
    result = {}
    for split in splits:
        images, semantic, instances = (base / kind / SPLITS[split] for kind in kinds)
        stems = files.stems(images, ".jpg")
        files.require_partners(stems, semantic, ".png")
        files.require_partners(stems, instances, ".png")
        panoptic = base / f"ade20k_panoptic_{split}"
        result[split] = [_Sources(s, *(folder / f"{s}.png" for folder in (semantic, instances, panoptic))) for s in stems]
    yield from result.items()


def _read_semantic(path: Path) -> np.ndarray:
    labels = files.read_label_map(path)
    if labels.max() > CLASSES:
        raise ValueError(f"{path} has the label {labels.max()}; those of the scene parsing benchmark are 0 … {CLASSES}")
    return labels


def _instances(source: _Sources) -> tuple[tuple[int, int], list[tuple[int, Region]]]:
    """Height and width; category (0 … 149) and region of each instance, ordered by its number in the image."""
    pixels = files.read_image(source.instances, "RGB")
    things = dataset_facts("ade20k")["thing_ids"]
    found = []
    for region in regions(pixels[..., 1]):
        numbers = np.unique(pixels[..., 0][region.box][region.mask])
        if len(numbers) > 1 or not 1 <= numbers[0] <= len(things):
            raise ValueError(
                f"{source.instances}: instance {region.label} (green) must have one class of 1 … {len(things)} (red), "
                f"it has {numbers.tolist()}"
            )
        found.append((things[numbers[0] - 1], region))
    return pixels.shape[:2], found


def _thing_classes() -> list[int]:
    """Labels of the thing classes in the label maps."""
    return [index + 1 for index in dataset_facts("ade20k")["thing_ids"]]


# --------------------------------------------------------------------------------------------------------------- output


def _colors() -> list[list[int]]:
    """150 colours of which no two are equal."""
    return [_UNIQUE_COLORS.get(index, color) for index, color in enumerate(dataset_facts("ade20k")["colors"])]


class _SegmentColors:
    """Colours of the segments of one image, all different: that of the class first, then random ones near to it.

    The published files take theirs from a random generator without seed; here equal input gives equal files.
    """

    def __init__(self, colors: Sequence[Sequence[int]]):
        self._colors = colors
        self._used = {(0, 0, 0)}
        self._reserved = {tuple(color) for color in colors}
        self._rng = np.random.default_rng(0)

    def new(self, category: int) -> list[int]:
        color = tuple(self._colors[category])
        while color in self._used:
            change = self._rng.integers(-_COLOR_REACH, _COLOR_REACH + 1, 3)
            color = tuple(np.clip(np.add(self._colors[category], change), 0, 255).tolist())
            if color in self._reserved:
                color = (0, 0, 0)
        self._used.add(color)
        return list(color)
