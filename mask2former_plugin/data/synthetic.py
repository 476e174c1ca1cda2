"""Generates a small panoptic dataset in COCO's layout: textured shapes over textured backgrounds, with overlaps, crowds and tiny objects."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

MANIFEST = "synthetic_dataset.json"
_FORMAT_VERSION = 1
_MIN_VISIBLE = 12  # pixels; what is left of an object below that is void
_VOID = 0


@dataclass(frozen=True)
class Category:
    """A class as COCO's panoptic json lists it; ids have gaps, as COCO's have."""

    id: int
    name: str
    isthing: int
    color: tuple[int, int, int]


CATEGORIES = (
    Category(1, "ball", 1, (231, 120, 47)),
    Category(3, "box", 1, (118, 84, 196)),
    Category(4, "tent", 1, (232, 228, 214)),
    Category(9, "star", 1, (226, 62, 92)),
    Category(92, "grass", 0, (84, 150, 62)),
    Category(95, "sand", 0, (212, 186, 124)),
    Category(100, "water", 0, (56, 118, 186)),
    Category(112, "brick", 0, (146, 82, 70)),
)
_THINGS = tuple(c for c in CATEGORIES if c.isthing)
_STUFF = tuple(c for c in CATEGORIES if not c.isthing)
_CONTIGUOUS = {c.id: index for index, c in enumerate(CATEGORIES)}


@dataclass(frozen=True)
class SyntheticOptions:
    """What is generated; equal options give equal files.

    Attributes:
        train_images, val_images: number of images of the two splits.
        height, width: of the images, in pixels.
        seed: of the random numbers.
    """

    train_images: int = 400
    val_images: int = 60
    height: int = 120
    width: int = 160
    seed: int = 0


def manifest(options: SyntheticOptions) -> str:
    """Content of the file :data:`MANIFEST` in a dataset; equal for equal datasets."""
    return json.dumps({"format": _FORMAT_VERSION, **asdict(options)})


def generate(root: str | Path, options: SyntheticOptions = SyntheticOptions(), *, progress: bool = True) -> Path:
    """Write the dataset below ``root`` unless it lies there already.

    Layout, for ``split`` in train and val: ``<split>/*.jpg``, ``annotations/instances_<split>.json``, ``annotations/panoptic_<split>.json``,
    ``panoptic_<split>/*.png`` (segment ids as RGB) and ``panoptic_semseg_<split>/*.png`` (contiguous class ids, 255 = void).

    Returns:
        ``root``. A dataset with other options that this function wrote earlier is replaced.

    Raises:
        FileExistsError: ``root`` holds files that this function did not write.
    """
    root = Path(root)
    if root.is_dir() and any(root.iterdir()):
        if not (root / MANIFEST).is_file():
            raise FileExistsError(f"{root} exists and is no synthetic dataset (it has no {MANIFEST}); choose another folder")
        if (root / MANIFEST).read_text() == manifest(options):
            return root
        shutil.rmtree(root)
    # written beside and renamed at the end: an interrupted run leaves no half dataset behind
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "annotations").mkdir(parents=True)
    for index, (split, count) in enumerate((("train", options.train_images), ("val", options.val_images))):
        rng = np.random.default_rng([options.seed, index])
        _write_split(partial, split, count, options, rng, progress)
    (partial / MANIFEST).write_text(manifest(options))
    if root.is_dir():
        root.rmdir()
    partial.rename(root)
    return root


def _write_split(root: Path, split: str, count: int, options: SyntheticOptions, rng: np.random.Generator, progress: bool) -> None:
    folders = {kind: root / f"{kind}{split}" for kind in ("", "panoptic_", "panoptic_semseg_")}
    for folder in folders.values():
        folder.mkdir()
    images, panoptic, instances = [], [], []
    for image_id in tqdm(range(1, count + 1), desc=f"generating {split}", disable=not progress):
        stem = f"{image_id:06d}"
        scene = Scene(options.height, options.width, rng)
        segments = scene.segments()
        cv2.imwrite(str(folders[""] / f"{stem}.jpg"), scene.image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
        rgb = np.stack([scene.ids % 256, scene.ids // 256 % 256, scene.ids // 65536], axis=2).astype(np.uint8)
        cv2.imwrite(str(folders["panoptic_"] / f"{stem}.png"), rgb[:, :, ::-1])
        semantic = np.full(scene.ids.shape, 255, dtype=np.uint8)
        for segment in segments:
            mask = scene.ids == segment["id"]
            semantic[mask] = _CONTIGUOUS[segment["category_id"]]
            if _is_thing(segment["category_id"]):
                instances.append(_instance(mask, segment, image_id, len(instances) + 1))
        cv2.imwrite(str(folders["panoptic_semseg_"] / f"{stem}.png"), semantic)
        images.append({"id": image_id, "file_name": f"{stem}.jpg", "height": options.height, "width": options.width})
        panoptic.append({"image_id": image_id, "file_name": f"{stem}.png", "segments_info": segments})
    categories = [{"id": c.id, "name": c.name, "isthing": c.isthing, "color": list(c.color)} for c in CATEGORIES]
    info = {"description": "synthetic shapes, generated by mask2former_plugin"}
    things = [{"id": c.id, "name": c.name, "supercategory": "thing"} for c in _THINGS]
    _write_json(root, f"panoptic_{split}", {"info": info, "images": images, "annotations": panoptic, "categories": categories})
    _write_json(root, f"instances_{split}", {"info": info, "images": images, "annotations": instances, "categories": things})


def _write_json(root: Path, stem: str, content: dict) -> None:
    (root / "annotations" / f"{stem}.json").write_text(json.dumps(content))


def _is_thing(category_id: int) -> bool:
    return bool(CATEGORIES[_CONTIGUOUS[category_id]].isthing)


def _instance(mask: np.ndarray, segment: dict, image_id: int, annotation_id: int) -> dict:
    """COCO annotation: RLE for crowds and what polygons can't say (holes), polygons otherwise, as COCO mixes them."""
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    segmentation = None
    if not segment["iscrowd"]:
        segmentation = _polygons(mask, rle)
    if segmentation is None:
        segmentation = {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": segment["category_id"],
        "iscrowd": segment["iscrowd"],
        "area": segment["area"],
        "bbox": segment["bbox"],
        "segmentation": segmentation,
    }


def _polygons(mask: np.ndarray, rle: dict) -> list[list[float]] | None:
    """Outlines along the pixels' edges, None if they do not give the mask back (IoU below 0.98)."""
    doubled = mask.astype(np.uint8).repeat(2, 0).repeat(2, 1)
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = [((c.reshape(-1) + 0.5) / 2).tolist() for c in contours if len(c) >= 3]
    if not polygons:
        return None
    drawn = coco_mask.merge(coco_mask.frPyObjects(polygons, *mask.shape))
    return polygons if coco_mask.iou([drawn], [rle], [0])[0, 0] >= 0.98 else None


class Scene:
    """One generated image.

    Attributes:
        image: RGB, ``[H, W, 3]`` uint8.
        ids: panoptic segment ids, ``[H, W]`` int64, 0 = void.
    """

    def __init__(self, height: int, width: int, rng: np.random.Generator):
        self._rng = rng
        self.image = np.zeros((height, width, 3), dtype=np.float32)
        self.ids = np.zeros((height, width), dtype=np.int64)
        self._categories: dict[int, tuple[Category, int]] = {}
        self._paint_background()
        if rng.random() < 0.25:
            self._paint_crowd()
        for _ in range(rng.integers(2, 7)):
            self._paint_object(_THINGS[rng.integers(len(_THINGS))], self._log_uniform(0.05, 0.27))
        for _ in range(rng.integers(0, 3)):
            self._paint_object(_THINGS[rng.integers(len(_THINGS))], self._log_uniform(0.03, 0.05))
        self._finish()

    def segments(self) -> list[dict]:
        """``segments_info`` of COCO's panoptic json; too small remains of objects become void in :attr:`ids`."""
        result = []
        for segment_id, (category, crowd) in self._categories.items():
            ys, xs = np.nonzero(self.ids == segment_id)
            if len(ys) < _MIN_VISIBLE:
                self.ids[ys, xs] = _VOID
                continue
            x, y = int(xs.min()), int(ys.min())
            box = [x, y, int(xs.max()) + 1 - x, int(ys.max()) + 1 - y]
            result.append({"id": segment_id, "category_id": category.id, "iscrowd": crowd, "area": len(ys), "bbox": box})
        return result

    def _new_id(self, category: Category, crowd: int = 0) -> int:
        # spread over all three bytes of the PNG's colours
        segment_id = int(self._rng.integers(1, 1 << 24))
        while segment_id in self._categories:
            segment_id = int(self._rng.integers(1, 1 << 24))
        self._categories[segment_id] = (category, crowd)
        return segment_id

    def _log_uniform(self, low: float, high: float) -> float:
        return math.exp(self._rng.uniform(math.log(low), math.log(high))) * max(self.ids.shape)

    def _paint(self, mask: np.ndarray, category: Category, segment_id: int) -> None:
        self.image[mask] = _texture(category, self.ids.shape, self._rng)[mask]
        self.ids[mask] = segment_id

    def _paint_background(self) -> None:
        """One to three bands of stuff with wavy borders."""
        height, width = self.ids.shape
        count = int(self._rng.integers(1, 4))
        kinds = self._rng.permutation(len(_STUFF))[:count]
        columns = np.arange(width)
        top = np.zeros(width)
        for index, kind in enumerate(kinds):
            bottom = np.full(width, float(height))
            if index < count - 1:
                wave = self._rng.uniform(2, 8) * np.sin(columns * self._rng.uniform(0.02, 0.08) + self._rng.uniform(0, 6.3))
                bottom = height * (index + 1) / count + self._rng.uniform(-0.1, 0.1) * height + wave
            rows = np.arange(height)[:, None]
            category = _STUFF[kind]
            self._paint((rows >= top) & (rows < bottom), category, self._new_id(category))
            top = bottom

    def _paint_object(self, category: Category, radius: float) -> None:
        height, width = self.ids.shape
        centre = self._rng.uniform(0, 1, 2) * (width, height)
        self._paint(self._shape(category, centre, radius), category, self._new_id(category))

    def _paint_crowd(self) -> None:
        """Many small objects of one class that share one segment with ``iscrowd`` 1."""
        height, width = self.ids.shape
        category = _THINGS[self._rng.integers(len(_THINGS))]
        centre = self._rng.uniform(0.2, 0.8, 2) * (width, height)
        mask = np.zeros(self.ids.shape, dtype=bool)
        for _ in range(self._rng.integers(7, 13)):
            offset = self._rng.normal(0, 0.07, 2) * max(height, width)
            mask |= self._shape(category, centre + offset, self._log_uniform(0.02, 0.035))
        self._paint(mask, category, self._new_id(category, crowd=1))

    def _shape(self, category: Category, centre: np.ndarray, radius: float) -> np.ndarray:
        corners = _CORNERS[category.name](self._rng)
        angle = self._rng.uniform(0, 2 * math.pi)
        rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        points = corners @ rotation.T * radius + centre
        mask = np.zeros(self.ids.shape, dtype=np.uint8)
        cv2.fillPoly(mask, [np.round(points * 16).astype(np.int32)], 1, shift=4)
        return mask.astype(bool)

    def _finish(self) -> None:
        """Uneven light and sensor noise over everything."""
        height, width = self.ids.shape
        slope = self._rng.uniform(-0.15, 0.15, 2)
        light = 1 + slope[0] * np.linspace(-1, 1, width)[None, :] + slope[1] * np.linspace(-1, 1, height)[:, None]
        image = self.image * light[:, :, None] + self._rng.normal(0, 4, self.image.shape)
        self.image = np.clip(image, 0, 255).astype(np.uint8)


def _regular(count: int, squeeze: float = 1.0) -> np.ndarray:
    angles = np.arange(count) * 2 * math.pi / count
    return np.stack([np.cos(angles), squeeze * np.sin(angles)], axis=1)


def _star_corners(rng: np.random.Generator) -> np.ndarray:
    radii = np.where(np.arange(10) % 2, rng.uniform(0.4, 0.5), 1.0)
    return _regular(10) * radii[:, None]


_CORNERS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "ball": lambda rng: _regular(24, rng.uniform(0.8, 1.0)),
    "box": lambda rng: np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (0.85, rng.uniform(0.5, 0.85)),
    "tent": lambda rng: np.array([[-0.9, 0.7], [0.9, 0.7], [rng.uniform(-0.3, 0.3), -1.0]]),
    "star": _star_corners,
}


def _texture(category: Category, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Float RGB picture ``[H, W, 3]`` of a class: its colour, varied, times its pattern."""
    height, width = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pattern = _PATTERNS[category.name](x, y, rng)
    color = np.array(category.color) + rng.normal(0, 14, 3)
    return (color * pattern[:, :, None]).astype(np.float32)


def _blotches(shape: tuple[int, int], cell: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    height, width = shape
    coarse = rng.normal(0, strength, (height // cell + 2, width // cell + 2)).astype(np.float32)
    return 1 + cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def _stripes(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, period: float, strength: float) -> np.ndarray:
    angle = rng.uniform(0, math.pi)
    return 1 + strength * np.sign(np.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / period))


def _bricks(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    row = y // 6
    joint = (y % 6 == 0) | ((x + row % 2 * 6 + rng.integers(12)) % 12 == 0)
    return np.where(joint, 1.35, 1.0) * _blotches(x.shape, 6, 0.05, rng)


_PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "ball": lambda x, y, rng: _blotches(x.shape, 12, 0.1, rng),
    "box": lambda x, y, rng: _stripes(x, y, rng, rng.uniform(5, 9), 0.2),
    "tent": lambda x, y, rng: 1 - 0.35 * ((x // 4 + y // 4) % 2),
    "star": lambda x, y, rng: 1 + 0.25 * np.sin(x * 0.9) * np.sin(y * 0.9),
    "grass": lambda x, y, rng: _blotches(x.shape, 2, 0.18, rng),
    "sand": lambda x, y, rng: 1 + rng.normal(0, 0.07, x.shape),
    "water": lambda x, y, rng: 1 + 0.13 * np.sin(y * 0.8 + 2 * np.sin(x * 0.1 + rng.uniform(0, 6.3))),
    "brick": _bricks,
}
