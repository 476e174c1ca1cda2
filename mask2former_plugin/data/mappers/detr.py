"""Mapper "detr_panoptic": DETR's augmentations for COCO panoptic, as MaskFormer uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T

from mask2former_plugin.data.mappers import steps
from mask2former_plugin.data.mappers.augmentations import detr_crop, detr_flip_resize
from mask2former_plugin.data.mappers.base import TrainingMapper, require_field


class DETRPanopticDatasetMapper(TrainingMapper):
    """Needs ``pan_seg_file_name`` and ``segments_info``; one target per segment that is no crowd, emptied ones too.

    Args:
        crop_gen: augmentations that half of the images get before the last of ``tfm_gens``; None: no image.
        tfm_gens: Detectron2 augmentations.
    """

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        crop_gen: Sequence | None,
        tfm_gens: Sequence,
        image_format: str,
        num_classes: int | None = None,
        drop_empty_masks: bool = False,
    ):
        super().__init__(is_train, image_format, num_classes, drop_empty_masks)
        self.crop_gen = crop_gen
        self.tfm_gens = tfm_gens

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        return {**cls.common_config(cfg, is_train), "crop_gen": detr_crop(cfg), "tfm_gens": detr_flip_resize(cfg)}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        sample, image = self.begin(dataset_dict)
        panoptic_file = require_field(sample, "pan_seg_file_name", type(self).__name__)
        panoptic = steps.read_panoptic_map(panoptic_file, image.shape[:2], sample["file_name"])
        aug_input = T.AugInput(image)
        transforms = T.AugmentationList(self._draw_list())(aug_input)
        sample["image"] = steps.to_chw(aug_input.image)
        segment_ids = steps.rgb_to_id(transforms.apply_segmentation(panoptic))
        return self.set_targets(sample, *steps.segment_targets(segment_ids, sample["segments_info"]))

    def _draw_list(self) -> list:
        if self.crop_gen is None or np.random.rand() > 0.5:
            return list(self.tfm_gens)
        return [*self.tfm_gens[:-1], *self.crop_gen, *self.tfm_gens[-1:]]
