"""Mapper "mask_former_semantic": one target per class of a label map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T

from mask2former_plugin.data.mappers import steps
from mask2former_plugin.data.mappers.augmentations import resize_crop_flip
from mask2former_plugin.data.mappers.base import TrainingMapper, dataset_ignore_label, require_field


class MaskFormerSemanticDatasetMapper(TrainingMapper):
    """Needs ``sem_seg_file_name``; adds ``sem_seg`` int64 [H, W]. Classes are sorted, the ignore label is no target.

    Args:
        augmentations: Detectron2 augmentations, applied to image and labels.
        ignore_label: label without a class.
        size_divisibility: side of the square that image (with 128) and labels (with the ignore label) are padded to;
            <= 0: none.
    """

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        augmentations: Sequence,
        image_format: str,
        ignore_label: int,
        size_divisibility: int,
        num_classes: int | None = None,
        drop_empty_masks: bool = False,
    ):
        super().__init__(is_train, image_format, num_classes, drop_empty_masks)
        self.augmentations = augmentations
        self.ignore_label = ignore_label
        self.size_divisibility = size_divisibility

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        return {
            **cls.common_config(cfg, is_train),
            "augmentations": resize_crop_flip(cfg, category_aware=True),
            "ignore_label": dataset_ignore_label(cfg),
            "size_divisibility": cfg.INPUT.SIZE_DIVISIBILITY,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        sample, image = self.begin(dataset_dict)
        if "annotations" in sample:
            raise ValueError(
                f"{sample['file_name']}: a semantic dataset has no 'annotations'; "
                "use mask_former_instance for instances"
            )
        label_file = require_field(sample, "sem_seg_file_name", type(self).__name__)
        image, labels, _ = self.augment(sample, image, label_file)
        self.put_image(sample, image)
        labels = self.put_labels(sample, labels, label_file)
        return self.set_targets(sample, *steps.semantic_targets(labels, self.ignore_label))

    def augment(
        self, sample: dict[str, Any], image: np.ndarray, label_file: str | None
    ) -> tuple[np.ndarray, np.ndarray | None, T.Transform]:
        """Augmented image (H, W, 3), augmented labels (H, W) if there is a file, and the transform that was drawn."""
        labels = None
        if label_file is not None:
            # float64, as published: 16-bit types cannot be resized, and the type decides the grid of nearest neighbours
            labels = steps.read_label_map(label_file, image.shape[:2], sample["file_name"]).astype(np.float64)
        elif any(getattr(augmentation, "single_category_max_area", 1.0) < 1.0 for augmentation in self.augmentations):
            raise ValueError(
                f"{sample['file_name']} has no 'sem_seg_file_name', which INPUT.CROP.SINGLE_CATEGORY_MAX_AREA < 1 "
                "needs: give the dataset semantic labels or set the key to 1.0"
            )
        aug_input = T.AugInput(image, sem_seg=labels)
        transforms = T.AugmentationList(self.augmentations)(aug_input)
        return aug_input.image, aug_input.sem_seg, transforms

    def put_image(self, sample: dict[str, Any], image: np.ndarray) -> None:
        """Store the padded image in the sample."""
        tensor = steps.to_chw(image)
        sample["image"] = steps.pad_to_square(
            tensor, self.size_divisibility, steps.IMAGE_PAD_VALUE, sample["file_name"]
        )

    def put_labels(self, sample: dict[str, Any], labels: np.ndarray, label_file: str) -> torch.Tensor:
        """Store the padded labels in the sample, after a check of their values, and return them."""
        tensor = torch.from_numpy(np.ascontiguousarray(labels.astype(np.int64)))
        steps.check_class_ids(
            steps.present_ids(tensor.numpy()), self.num_classes, f"Label file {label_file}", self.ignore_label
        )
        sample["sem_seg"] = steps.pad_to_square(tensor, self.size_divisibility, self.ignore_label, sample["file_name"])
        return sample["sem_seg"]
