"""Mappers "coco_instance_lsj" and "coco_panoptic_lsj": COCO recipes of Mask2Former with large-scale jitter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes

from mask2former_plugin.data.mappers import steps
from mask2former_plugin.data.mappers.augmentations import large_scale_jitter
from mask2former_plugin.data.mappers.base import TrainingMapper, require_field

_MIN_BOX_SIDE = 1e-5  # pixels; what is thinner after the crop is no target


class _LargeScaleJitterMapper(TrainingMapper):
    """Constructor of the two.

    Args:
        tfm_gens: Detectron2 augmentations.
    """

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        tfm_gens: Sequence,
        image_format: str,
        num_classes: int | None = None,
        drop_empty_masks: bool = False,
    ):
        super().__init__(is_train, image_format, num_classes, drop_empty_masks)
        self.tfm_gens = tfm_gens

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        return {**cls.common_config(cfg, is_train), "tfm_gens": large_scale_jitter(cfg)}

    def augment(self, sample: dict[str, Any], image: np.ndarray) -> T.Transform:
        """Store the augmented image in the sample and return the transform that was drawn."""
        aug_input = T.AugInput(image)
        transforms = T.AugmentationList(self.tfm_gens)(aug_input)
        sample["image"] = steps.to_chw(aug_input.image)
        return transforms


class COCOInstanceNewBaselineDatasetMapper(_LargeScaleJitterMapper):
    """Needs ``annotations``; targets have ``gt_boxes`` around what the crop leaves; emptied ones and crowds go.

    Adds ``padding_mask`` bool [H, W], True where the image is padding.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        sample, image = self.begin(dataset_dict)
        original_size, file_name = image.shape[:2], sample["file_name"]
        annotations = steps.without_crowds(require_field(sample, "annotations", type(self).__name__), file_name)
        transforms = self.augment(sample, image)
        size = tuple(sample["image"].shape[-2:])
        # segmentations are padded by another value than 1, whichever it is
        padding = transforms.apply_segmentation(np.ones(original_size, dtype=np.uint8)) != 1
        sample["padding_mask"] = torch.from_numpy(np.ascontiguousarray(padding))

        shapes = [
            steps.transform_segmentation(item["segmentation"], transforms, original_size, file_name)
            for item in annotations
        ]
        boxes = Boxes(torch.tensor([steps.bounding_box(shape) for shape in shapes], dtype=torch.float32).reshape(-1, 4))
        kept = boxes.nonempty(threshold=_MIN_BOX_SIDE)
        masks = [steps.rasterize(shape, size) for shape, keep in zip(shapes, kept.tolist()) if keep]
        classes = [item["category_id"] for item, keep in zip(annotations, kept.tolist()) if keep]
        return self.set_targets(sample, classes, steps.stack_masks(masks, size), boxes[kept])


class COCOPanopticNewBaselineDatasetMapper(_LargeScaleJitterMapper):
    """Needs ``pan_seg_file_name`` and ``segments_info``; one target with ``gt_boxes`` per segment that is no crowd.

    Segments that the crop has emptied are kept (see ``drop_empty_masks``).
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        sample, image = self.begin(dataset_dict)
        panoptic_file = require_field(sample, "pan_seg_file_name", type(self).__name__)
        panoptic = steps.read_panoptic_map(panoptic_file, image.shape[:2], sample["file_name"])
        transforms = self.augment(sample, image)
        panoptic = transforms.apply_segmentation(panoptic)
        classes, masks = steps.segment_targets(steps.rgb_to_id(panoptic), sample["segments_info"])
        return self.set_targets(sample, classes, masks, BitMasks(masks).get_bounding_boxes())
