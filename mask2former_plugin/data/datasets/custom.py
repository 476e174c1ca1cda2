"""The user's own datasets, from the config alone, and checks that model and datasets fit together.

``DATASETS.CUSTOM`` maps a dataset name to its options; the names can then stand in ``DATASETS.TRAIN`` and ``TEST``::

    DATASETS:
      CUSTOM:
        street_train:
          FORMAT: semantic_folder
          IMAGES: street/train/images
          LABELS: street/train/labels
          CLASSES: street/classes.json
      TRAIN: ("street_train",)

Relative paths start at ``$DETECTRON2_DATASETS`` (default ``./datasets``), ``~`` is the home directory. The formats:

``semantic_folder`` (``evaluator_type`` "sem_seg")
    ``IMAGES``, ``LABELS``: folders; files belong together by their path without extension. Labels are PNG or TIFF of
    one channel.
    ``CLASSES``: list of names, or a JSON with that list or with ``{"classes", "ignore_label", "colors"}``.
    Optional: ``IGNORE_LABEL`` (255), ``COLORS`` (RGB lists), ``IMAGE_EXTENSIONS``.
``coco_instances`` (``evaluator_type`` "coco")
    ``IMAGES``: folder; ``JSON``: COCO instance annotations.
``coco_panoptic`` (``evaluator_type`` "coco_panoptic_seg")
    ``IMAGES``: folder; ``PANOPTIC_JSON``, ``PANOPTIC_ROOT``: COCO panoptic annotations.
    Optional: ``INSTANCES_JSON`` (for AP), ``SEM_SEG_ROOT`` (label maps of contiguous ids, for mIoU), ``COLORS``.
    Contiguous ids count the things by category id and then the stuff by category id.
``class_names`` (``evaluator_type`` "sem_seg")
    ``CLASSES`` and, optional, ``IGNORE_LABEL``, ``COLORS`` as above, and no images: names for predictions, nothing to
    train or evaluate on.
"""

from __future__ import annotations

import colorsys
import json
import logging
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from mask2former_plugin.data.datasets.coco_instances import evaluable, is_evaluable, problem_of
from mask2former_plugin.data.datasets.panoptic_json import PanopticClasses, load_panoptic_json
from mask2former_plugin.data.datasets.paths import require_files, resolve
from mask2former_plugin.data.datasets.semantic_folder import IMAGE_EXTENSIONS, load_semantic_folder
from mask2former_plugin.data.names import unknown_name

logger = logging.getLogger(__name__)

DEFAULT_IGNORE_LABEL = 255
LABEL_DIVISOR = 1000
_INSTANCE_EVALUATORS = ("coco", "cityscapes_instance", "lvis")


@dataclass(frozen=True)
class DatasetOptions:
    """Options of one dataset, as written in the config."""

    name: str
    values: Mapping[str, Any]

    def directory(self, key: str) -> Path | None:
        return self._path(key, Path.is_dir, "folder")

    def file(self, key: str) -> Path | None:
        return self._path(key, Path.is_file, "file")

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Value of an option, which must be of the given type."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or isinstance(value, bool):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"Dataset {self.name!r}: {key} must be {names}, got {value!r}")
        return value

    def _path(self, key: str, exists: Callable[[Path], bool], what: str) -> Path | None:
        value = self.get(key, str)
        if value is None:
            return None
        path = resolve(value)
        if not exists(path):
            problem = f"is no {what}" if path.exists() else "does not exist"
            raise FileNotFoundError(
                f"Dataset {self.name!r}: {key} {value!r}: {path.absolute()} {problem} "
                "(relative paths start at $DETECTRON2_DATASETS, by default ./datasets)"
            )
        return path


# A format prepares a dataset: it checks the options, and gives the loader and the metadata.
Prepared = tuple[Callable[[], list[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class DatasetFormat:
    """One value of ``FORMAT``."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    prepare: Callable[[DatasetOptions, Path], Prepared]


def _prepare_semantic_folder(options: DatasetOptions, output_dir: Path) -> Prepared:
    image_root, label_root = options.directory("IMAGES"), options.directory("LABELS")
    classes, ignore_label, colors = _read_classes(options)
    extensions = tuple(
        "." + str(e).lower().lstrip(".") for e in options.get("IMAGE_EXTENSIONS", (list, tuple), IMAGE_EXTENSIONS)
    )
    metadata = {
        "stuff_classes": classes,
        "stuff_colors": _check_colors(options, colors, len(classes)),
        "ignore_label": ignore_label,
        "image_root": str(image_root),
        "sem_seg_root": str(label_root),
        "evaluator_type": "sem_seg",
    }
    return partial(load_semantic_folder, options.name, image_root, label_root, extensions), metadata


def _prepare_class_names(options: DatasetOptions, output_dir: Path) -> Prepared:
    classes, ignore_label, colors = _read_classes(options)
    colors = _check_colors(options, colors, len(classes))

    def load() -> list[dict[str, Any]]:
        raise ValueError(
            f"Dataset {options.name!r} holds names of classes and no images; set DATASETS.TRAIN and DATASETS.TEST"
        )

    metadata = {
        "stuff_classes": classes,
        "stuff_colors": colors,
        "thing_classes": classes,
        "thing_colors": colors,
        "ignore_label": ignore_label,
        "evaluator_type": "sem_seg",
    }
    return load, metadata


def _prepare_coco_instances(options: DatasetOptions, output_dir: Path) -> Prepared:
    image_root, json_file = options.directory("IMAGES"), options.file("JSON")
    content = _read_instances(options, "JSON", json_file)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    metadata = {
        "thing_classes": [category["name"] for category in categories],
        "thing_dataset_id_to_contiguous_id": {category["id"]: index for index, category in enumerate(categories)},
        "json_file": str(_evaluation_json(options, json_file, content, categories, output_dir)),
        "image_root": str(image_root),
        "evaluator_type": "coco",
    }

    def load() -> list[dict[str, Any]]:
        samples = load_coco_json(str(json_file), str(image_root), options.name)
        require_files(json_file, (sample["file_name"] for sample in samples))
        return samples

    return load, metadata


def _prepare_coco_panoptic(options: DatasetOptions, output_dir: Path) -> Prepared:
    image_root, panoptic_root = options.directory("IMAGES"), options.directory("PANOPTIC_ROOT")
    panoptic_json, sem_seg_root = options.file("PANOPTIC_JSON"), options.directory("SEM_SEG_ROOT")
    content = _read_json(options, "PANOPTIC_JSON", panoptic_json, ("images", "annotations", "categories"))
    classes = PanopticClasses.from_categories(content["categories"], str(panoptic_json))
    given = [category.get("color") for category in classes.all]
    colors = _check_colors(options, options.get("COLORS", (list, tuple), given if all(given) else None), len(given))
    metadata = {
        **classes.metadata(),
        "thing_colors": colors[: len(classes.things)],
        "stuff_colors": colors,
        "ignore_label": DEFAULT_IGNORE_LABEL,
        "label_divisor": LABEL_DIVISOR,
        "image_root": str(image_root),
        "panoptic_root": str(panoptic_root),
        "panoptic_json": str(panoptic_json),
        "evaluator_type": "coco_panoptic_seg",
    }
    instances_json = options.file("INSTANCES_JSON")
    if instances_json is not None:
        content = _read_instances(options, "INSTANCES_JSON", instances_json)
        metadata["json_file"] = str(_evaluation_json(options, instances_json, content, classes.things, output_dir))
    if sem_seg_root is not None:
        metadata["sem_seg_root"] = str(sem_seg_root)
    loader = partial(
        load_panoptic_json,
        panoptic_json,
        image_root,
        panoptic_root,
        metadata["thing_dataset_id_to_contiguous_id"],
        metadata["stuff_dataset_id_to_contiguous_id"],
        sem_seg_root,
    )
    return loader, metadata


FORMATS = {
    "semantic_folder": DatasetFormat(
        ("IMAGES", "LABELS", "CLASSES"), ("IGNORE_LABEL", "COLORS", "IMAGE_EXTENSIONS"), _prepare_semantic_folder
    ),
    "coco_instances": DatasetFormat(("IMAGES", "JSON"), (), _prepare_coco_instances),
    "coco_panoptic": DatasetFormat(
        ("IMAGES", "PANOPTIC_JSON", "PANOPTIC_ROOT"),
        ("INSTANCES_JSON", "SEM_SEG_ROOT", "COLORS"),
        _prepare_coco_panoptic,
    ),
    "class_names": DatasetFormat(("CLASSES",), ("IGNORE_LABEL", "COLORS"), _prepare_class_names),
}


def register_custom_datasets(cfg: CfgNode) -> None:
    """Register every dataset of ``DATASETS.CUSTOM``. A second call with the same options does nothing.

    Files are looked for now and read later, except for class names, which come from the JSON at once.

    Datasets that neither ``DATASETS.TRAIN`` nor ``TEST`` names may lack their files, as those of a base config do where
    only its model is wanted: they are left out with a warning.

    Raises:
        ValueError: unknown format or option, a missing option, a value of the wrong kind, or a name that is taken.
        FileNotFoundError: a file or folder of a dataset in ``DATASETS.TRAIN`` or ``TEST`` does not exist.
    """
    used = {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}
    for name, values in cfg.DATASETS.CUSTOM.items():
        if not isinstance(values, Mapping):
            raise ValueError(f"DATASETS.CUSTOM.{name} must hold options such as FORMAT and IMAGES, got {values!r}")
        try:
            _register(name, dict(values), Path(cfg.OUTPUT_DIR))
        except FileNotFoundError as error:
            if name in used:
                raise
            logger.warning("%s; DATASETS.TRAIN and TEST do not use the dataset: it is left out", error)


def _register(name: str, values: dict[str, Any], output_dir: Path) -> None:
    dataset_format = _check_options(name, values)
    # where relative paths start is part of what the dataset is
    identity = {**values, "DETECTRON2_DATASETS": str(resolve("").absolute())}
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name).get("custom_options")
        if known == identity:
            return
        differing = sorted(key for key in {*(known or {}), *identity} if (known or {}).get(key) != identity.get(key))
        how = f"with other options ({', '.join(differing)})" if known else "by something else than DATASETS.CUSTOM"
        raise ValueError(f"Dataset {name!r} is already registered {how}; choose another name")
    loader, metadata = dataset_format.prepare(DatasetOptions(name, values), output_dir)
    DatasetCatalog.register(name, loader)
    MetadataCatalog.get(name).set(custom_options=identity, **metadata)


def _check_options(name: str, values: Mapping[str, Any]) -> DatasetFormat:
    if "FORMAT" not in values:
        raise ValueError(f"Dataset {name!r}: FORMAT is missing; it is one of {', '.join(FORMATS)}")
    format_name = values["FORMAT"]
    if format_name not in FORMATS:
        raise ValueError(f"Dataset {name!r}: {unknown_name('FORMAT', format_name, FORMATS)}")
    dataset_format = FORMATS[format_name]
    known = ("FORMAT", *dataset_format.required, *dataset_format.optional)
    for key in values:
        if key not in known:
            raise ValueError(f"Dataset {name!r}: {unknown_name(f'option of {format_name}', key, known)}")
    missing = [key for key in dataset_format.required if values.get(key) in (None, "")]
    if missing:
        raise ValueError(f"Dataset {name!r}: {format_name} needs {' and '.join(missing)}")
    return dataset_format


def _read_json(options: DatasetOptions, key: str, path: Path, fields: Sequence[str] = ()) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Dataset {options.name!r}: {key} {path} is no JSON: {error}") from error
    for field in fields:
        if not isinstance(content, dict) or field not in content:
            raise ValueError(f"Dataset {options.name!r}: {key} {path} has no {field!r}")
    return content


def _read_instances(options: DatasetOptions, key: str, path: Path) -> dict[str, Any]:
    content = _read_json(options, key, path, ("images", "annotations", "categories"))
    problem = problem_of(content)
    if problem:
        raise ValueError(f"Dataset {options.name!r}: {key} {path}: {problem}")
    return content


def _read_classes(options: DatasetOptions) -> tuple[list[str], int, Sequence | None]:
    """Names, ignore label and colours of a semantic dataset; what the config says wins over the JSON."""
    content: Any = options.get("CLASSES", (list, tuple, str))
    if isinstance(content, str):
        path = options.file("CLASSES")
        content = _read_json(options, "CLASSES", path)
    fields = content if isinstance(content, dict) else {"classes": content}
    names = fields.get("classes")
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"Dataset {options.name!r}: CLASSES {options.values['CLASSES']!r} must give a list of class names, "
            f"got {names!r}"
        )
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if list(names).count(name) > 1})
        raise ValueError(f"Dataset {options.name!r}: CLASSES names {', '.join(twice)} twice")
    ignore_label = options.get("IGNORE_LABEL", int, fields.get("ignore_label", DEFAULT_IGNORE_LABEL))
    if not isinstance(ignore_label, int):
        raise ValueError(
            f"Dataset {options.name!r}: the ignore_label of CLASSES must be a number, got {ignore_label!r}"
        )
    return list(names), ignore_label, options.get("COLORS", (list, tuple), fields.get("colors"))


def _check_colors(options: DatasetOptions, colors: Sequence | None, count: int) -> list[list[int]]:
    if colors is None:
        return distinct_colors(count)
    rgb = [list(color) for color in colors]
    if len(rgb) != count or not all(len(c) == 3 and all(isinstance(v, int) and 0 <= v <= 255 for v in c) for c in rgb):
        raise ValueError(f"Dataset {options.name!r}: COLORS must be {count} lists [R, G, B] of 0..255, one per class")
    return rgb


def distinct_colors(count: int) -> list[list[int]]:
    """Fixed RGB colours: hues a golden section apart, two brightnesses."""
    hues = [(index * 0.618034) % 1.0 for index in range(count)]
    return [
        [round(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.65, 0.95 if i % 2 == 0 else 0.7)]
        for i, hue in enumerate(hues)
    ]


def _evaluation_json(
    options: DatasetOptions,
    path: Path,
    content: dict[str, Any],
    categories: Sequence[Mapping[str, Any]],
    output_dir: Path,
) -> Path:
    """Instance JSON that COCOEvaluator scores right: the given one, or a corrected copy of it in ``OUTPUT_DIR``.

    The evaluator takes all categories of the JSON for classes, while converters from panoptic annotations list stuff
    too; pycocotools counts an object with the id 0 as missed, and needs box, area and ``iscrowd``.
    """
    only_these = {category["id"] for category in content["categories"]} == {category["id"] for category in categories}
    if only_these and is_evaluable(content):
        return path
    text = json.dumps(evaluable(content, [dict(category) for category in categories]))
    target = output_dir / "datasets" / f"{options.name}_{zlib.crc32(text.encode()):08x}.json"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial_file = target.with_suffix(f".{os.getpid()}.partial")
        partial_file.write_text(text)
        partial_file.replace(target)  # several processes may do the same at once
    return target


# --------------------------------------------------------------------------------------------------------------- checks


def num_dataset_classes(metadata: Metadata) -> int | None:
    """Number of classes that a model for this dataset predicts; None if the metadata does not say it."""
    field = "thing_classes" if metadata.get("evaluator_type") in _INSTANCE_EVALUATORS else "stuff_classes"
    classes = metadata.get(field)
    return len(classes) if classes else None


def check_num_classes(cfg: CfgNode) -> None:
    """Compare ``MODEL.SEM_SEG_HEAD`` with the datasets of ``DATASETS.TRAIN`` and ``TEST``, before the work starts.

    ``NUM_CLASSES`` must be the number of classes. ``IGNORE_VALUE`` must be the ignore label of the training labels
    where it is used: in the loss of the per-pixel baselines, and for crops with ``SINGLE_CATEGORY_MAX_AREA`` below 1.
    Panoptic results need a dataset that tells things from stuff.

    Raises:
        ValueError: they differ; the message has both numbers.
    """
    head = cfg.MODEL.SEM_SEG_HEAD
    problems = []
    if cfg.MODEL.META_ARCHITECTURE == "MaskFormer" and cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON:
        for name in cfg.DATASETS.TRAIN[:1]:  # the model has its metadata
            if MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id") is None:
                problems.append(
                    f"MODEL.MASK_FORMER.TEST.PANOPTIC_ON is True, but dataset {name!r} of DATASETS.TRAIN does not tell "
                    "things from stuff; choose a panoptic dataset or switch it off"
                )
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            count = num_dataset_classes(MetadataCatalog.get(name))
            if count is not None and count != head.NUM_CLASSES:
                problems.append(
                    f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {head.NUM_CLASSES}, "
                    f"but dataset {name!r} of DATASETS.{key} has {count} classes"
                )
    crop = cfg.INPUT.CROP
    if head.NAME.startswith("PerPixel") or (crop.ENABLED and crop.SINGLE_CATEGORY_MAX_AREA < 1.0):
        for name in cfg.DATASETS.TRAIN:
            label = MetadataCatalog.get(name).get("ignore_label")
            if label is not None and label != head.IGNORE_VALUE:
                problems.append(
                    f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {head.IGNORE_VALUE}, "
                    f"but the ignore label of dataset {name!r} is {label}"
                )
    if problems:
        raise ValueError("; ".join(dict.fromkeys(problems)))
