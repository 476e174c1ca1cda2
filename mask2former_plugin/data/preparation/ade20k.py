"""ADE20K's scene parsing benchmark: label maps with void 255, panoptic PNGs with their JSON, and an instance JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mask2former_plugin.data.datasets.published import dataset_facts
from mask2former_plugin.data.preparation import files
from mask2former_plugin.data.preparation.coco_json import instance_annotation, instance_content, write_coco_json
from mask2former_plugin.data.preparation.jobs import Options, write_files
from mask2former_plugin.data.preparation.regions import Region, regions

SPLITS = {"train": "training", "val": "validation"}
FOLDER = "ADEChallengeData2016"
LAYOUT = """
ADEChallengeData2016/
  images/{training,validation}/*.jpg                 ADEChallengeData2016.zip
  annotations/{training,validation}/*.png            ADEChallengeData2016.zip
  annotations_instance/{training,validation}/*.png   annotations_instance.tar (panoptic and instance only)
"""
CLASSES = 150
# In the metadata this class has the colour of another one; segment ids are made from the colours of their classes.
_UNIQUE_COLORS = {48: (140, 140, 200)}
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

    The categories are all 150 classes, ids from 0. Each stuff class is one segment of the image, each instance one of
    its thing class, painted over the stuff; pixels of thing classes without an instance stay void. As published, area
    and box of a stuff segment are those before instances cover it.
    """
    facts = dataset_facts("ade20k")
    colors = _colors()
    categories = [
        {"id": index, "name": name, "isthing": int(index in facts["thing_ids"]), "color": colors[index]}
        for index, name in enumerate(facts["classes"])
    ]

    def content(results: Sequence[Any]) -> dict[str, Any]:
        images, annotations = zip(*results)
        return {"images": images, "annotations": annotations, "categories": categories}

    for split, jobs in _jobs(root, splits).items():
        path = root / FOLDER / f"ade20k_panoptic_{split}.json"
        pngs = {name: job.panoptic for name, job in jobs.items()}
        write_coco_json(path, _write_panoptic, jobs, content, options, f"ADE20K panoptic {split}", pngs)


def _write_panoptic(source: _Sources) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the PNG of an image; returns the image's entry and its annotation."""
    semantic = _read_semantic(source.semantic)
    things = [index + 1 for index in dataset_facts("ade20k")["thing_ids"]]
    stuff = np.where(np.isin(semantic, things), 0, semantic)
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
    """Instance maps to ``ade20k_instance_{train,val}.json``: RLE masks of 100 classes, ids as in the panoptic JSON."""
    facts = dataset_facts("ade20k")
    categories = [{"id": index, "name": name} for index, name in zip(facts["thing_ids"], facts["instance_classes"])]
    content = partial(instance_content, categories=categories)
    for split, jobs in _jobs(root, splits).items():
        path = root / FOLDER / f"ade20k_instance_{split}.json"
        write_coco_json(path, _instances_of_image, jobs, content, options, f"ADE20K instances {split}")


def _instances_of_image(source: _Sources) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    size, found = _instances(source)
    return source.image(size), [instance_annotation(region, source.stem, category) for category, region in found]


# ---------------------------------------------------------------------------------------------------------------- input


def _jobs(root: Path, splits: Sequence[str]) -> dict[str, dict[str, _Sources]]:
    """The files of all images by split and name of the image; everything is checked before work begins."""
    base = root / FOLDER
    kinds = ("images", "annotations", "annotations_instance")
    files.require([base / kind / SPLITS[split] for split in splits for kind in kinds], LAYOUT)
    jobs = {}
    for split in splits:
        images, semantic, instances = (base / kind / SPLITS[split] for kind in kinds)
        stems = files.stems(images, ".jpg")
        files.require_partners(stems, semantic, ".png")
        files.require_partners(stems, instances, ".png")
        folders = (semantic, instances, base / f"ade20k_panoptic_{split}")
        jobs[split] = {f"{s}.jpg": _Sources(s, *(folder / f"{s}.png" for folder in folders)) for s in stems}
    return jobs


def _read_semantic(path: Path) -> np.ndarray:
    labels = files.read_label_map(path)
    if labels.max() > CLASSES:
        raise ValueError(f"{path} has the label {labels.max()}; those of the benchmark are 0 … {CLASSES}")
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
                f"{source.instances}: instance {region.label} (green) must be of one class (red), 1 … {len(things)}, "
                f"not {numbers.tolist()}"
            )
        found.append((things[numbers[0] - 1], region))
    return pixels.shape[:2], found


# --------------------------------------------------------------------------------------------------------------- output


def _colors() -> list[tuple[int, int, int]]:
    """150 colours of which no two are equal."""
    colors = dataset_facts("ade20k")["colors"]
    return [_UNIQUE_COLORS.get(index, tuple(color)) for index, color in enumerate(colors)]


class _SegmentColors:
    """Colours for the segments of one image, all different: that of the class first, then random ones near to it.

    The published files take theirs from a random generator without a seed; here equal input gives equal files.
    """

    def __init__(self, class_colors: Sequence[tuple[int, int, int]]):
        self._class_colors = class_colors
        self._taken = {(0, 0, 0), *class_colors}  # black is void
        self._begun: set[int] = set()
        self._rng = np.random.default_rng(0)

    def new(self, category: int) -> tuple[int, int, int]:
        color = self._class_colors[category]
        if category in self._begun:
            while color in self._taken:
                change = self._rng.integers(-_COLOR_REACH, _COLOR_REACH + 1, 3)
                color = tuple(np.clip(self._class_colors[category] + change, 0, 255).tolist())
        self._begun.add(category)
        self._taken.add(color)
        return color
