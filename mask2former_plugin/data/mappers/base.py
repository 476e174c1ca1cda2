"""What all training mappers have in common: arguments from the config, reading the image, attaching the targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes

from mask2former_plugin.data.mappers import steps


class TrainingMapper:
    """Turns a Detectron2 dataset dict into a training sample.

    The result keeps the fields of the dict and has ``image`` uint8 [3, H, W] and ``instances`` with ``gt_classes``
    int64 [n] and ``gt_masks`` bool [n, H, W]. The dict itself is not changed.

    Args:
        is_train: must be True; evaluation uses ``detectron2.data.DatasetMapper(cfg, is_train=False)``.
        image_format: "RGB", "BGR" or another format of ``detectron2.data.detection_utils.read_image``.
        num_classes: class ids from here on are an error; None: unchecked.
        drop_empty_masks: leave out targets that the augmentations have emptied (published: keep them).
    """

    def __init__(self, is_train: bool, image_format: str, num_classes: int | None, drop_empty_masks: bool):
        if not is_train:
            raise ValueError(
                f"{type(self).__name__} is for training; "
                "evaluation uses detectron2.data.DatasetMapper(cfg, is_train=False)"
            )
        self.image_format = image_format
        self.num_classes = num_classes
        self.drop_empty_masks = drop_empty_masks

    @staticmethod
    def common_config(cfg: CfgNode, is_train: bool) -> dict[str, Any]:
        """Constructor arguments that every mapper reads from the config."""
        return {
            "is_train": is_train,
            "image_format": cfg.INPUT.FORMAT,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "drop_empty_masks": cfg.INPUT.DROP_EMPTY_MASKS,
        }

    def begin(self, dataset_dict: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        """Copy of the dict, and its image."""
        sample = steps.copy_sample(dataset_dict)
        return sample, steps.read_image(sample, self.image_format)

    def set_targets(
        self, sample: dict[str, Any], classes: Sequence[int], masks: torch.Tensor, boxes: Boxes | None = None
    ) -> dict[str, Any]:
        """Check the classes and put the targets into the sample."""
        steps.check_class_ids(classes, self.num_classes, f"The ground truth of {sample['file_name']}")
        sample["instances"] = steps.make_instances(classes, masks, boxes=boxes, drop_empty=self.drop_empty_masks)
        return sample


def require_field(sample: dict[str, Any], field: str, mapper: str) -> Any:
    """Take ``field`` out of a sample; a ValueError says which mapper needs it."""
    if field not in sample:
        raise ValueError(
            f"{sample['file_name']}: {mapper} needs {field!r}, which this dataset does not give; "
            "choose a dataset that has it or another INPUT.DATASET_MAPPER_NAME"
        )
    return sample.pop(field)


def dataset_ignore_label(cfg: CfgNode) -> int:
    """``ignore_label`` of the training datasets, which must agree on it."""
    labels = {name: MetadataCatalog.get(name).get("ignore_label") for name in cfg.DATASETS.TRAIN}
    if not labels:
        raise ValueError("DATASETS.TRAIN is empty; the ignore label of the mapper comes from its metadata")
    missing = [name for name, label in labels.items() if label is None]
    if missing:
        raise ValueError(
            f"Dataset {missing[0]!r} has no 'ignore_label' in its metadata: set MetadataCatalog.get(name).ignore_label"
        )
    if len(set(labels.values())) > 1:
        raise ValueError(f"The datasets of DATASETS.TRAIN have different ignore labels: {labels}")
    return next(iter(labels.values()))
