"""Prediction files as model outputs: what a model gives, from what evaluators have written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import Boxes, Instances
from pycocotools import mask as coco_mask

from mask2former_plugin.evaluation.prediction_files import (
    ImageIndex,
    read_id_map,
    read_json,
    semantic_map,
    semantic_predictions,
)

Pairs = Iterator[tuple[Mapping[str, Any], dict[str, Any]]]


def predicted_outputs(dataset_name: str, json_file: str | Path, pred_folder: str | Path | None = None) -> Pairs:
    """Pairs of dataset record and output, in the order of the dataset; images without prediction are left out.

    Args:
        dataset_name: a registered dataset.
        json_file: ``coco_instances_results.json``, panoptic ``predictions.json`` or ``sem_seg_predictions.json``; its
            content decides.
        pred_folder: of the panoptic PNGs, by default the JSON's path without its extension.

    Raises:
        ValueError: the file is none of the three, or holds what the dataset does not know.
    """
    content = read_json(json_file)
    metadata, records = MetadataCatalog.get(dataset_name), DatasetCatalog.get(dataset_name)
    if isinstance(content, dict) and "annotations" in content:
        folder = Path(pred_folder) if pred_folder is not None else Path(json_file).with_suffix("")
        return _panoptic(content["annotations"], folder, metadata, records)
    if isinstance(content, list) and content and isinstance(content[0], dict):
        if {"image_id", "category_id", "score"} <= content[0].keys():
            return _instances(content, metadata, records)
        if {"file_name", "category_id", "segmentation"} <= content[0].keys():
            return _semantic(json_file, metadata, records)
    raise ValueError(
        f"{json_file} is neither coco_instances_results.json (a list with image_id, category_id, score), nor panoptic "
        "predictions.json (with 'annotations'), nor sem_seg_predictions.json (a list with file_name, category_id, "
        "segmentation)"
    )


def _panoptic(annotations: Sequence[dict], folder: Path, metadata: Metadata, records: Sequence[dict]) -> Pairs:
    by_image = {str(annotation["image_id"]): annotation for annotation in annotations}
    things, stuff = metadata.thing_dataset_id_to_contiguous_id, metadata.stuff_dataset_id_to_contiguous_id
    for record in records:
        annotation = by_image.get(str(record["image_id"]))
        if annotation is None:
            continue
        segments = []
        for segment in annotation["segments_info"]:
            isthing = segment["category_id"] in things
            category = _contiguous(segment["category_id"], things if isthing else stuff, metadata)
            segments.append({"id": segment["id"], "isthing": isthing, "category_id": category})
        ids = torch.from_numpy(read_id_map(folder / annotation["file_name"]))
        yield record, {"panoptic_seg": (ids, segments)}


def _instances(results: Sequence[dict], metadata: Metadata, records: Sequence[dict]) -> Pairs:
    by_image: dict[str, list[dict]] = defaultdict(list)
    for result in results:
        by_image[str(result["image_id"])].append(result)
    to_contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
    for record in records:
        found = by_image.get(str(record["image_id"]))
        if not found:
            continue
        instances = Instances((record["height"], record["width"]))
        x, y, width, height = torch.tensor([result["bbox"] for result in found]).T
        instances.pred_boxes = Boxes(torch.stack([x, y, x + width, y + height], dim=1))
        instances.scores = torch.tensor([result["score"] for result in found])
        instances.pred_classes = torch.tensor(
            [_contiguous(result["category_id"], to_contiguous, metadata) for result in found]
        )
        if all("segmentation" in result for result in found):
            masks = np.stack([coco_mask.decode(result["segmentation"]) for result in found])
            instances.pred_masks = torch.from_numpy(masks).bool()
        yield record, {"instances": instances}


def _semantic(json_file: str | Path, metadata: Metadata, records: Sequence[dict]) -> Pairs:
    index = ImageIndex(records)
    to_contiguous = metadata.get("stuff_dataset_id_to_contiguous_id")
    for file_name, entries in semantic_predictions(json_file).items():
        labels = semantic_map(entries, to_contiguous)
        yield index.find(file_name), {"sem_seg": torch.from_numpy(labels.astype(np.int64))}


def _contiguous(category: int, to_contiguous: Mapping[int, int] | None, metadata: Metadata) -> int:
    if to_contiguous is None:
        return category
    if category not in to_contiguous:
        raise ValueError(f"dataset {metadata.name!r} does not know the category id {category} of a prediction")
    return to_contiguous[category]
