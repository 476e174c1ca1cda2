"""Mapper "mask_former_instance": one target per annotation, polygons or RLE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T

from mask2former_plugin.data.mappers import steps
from mask2former_plugin.data.mappers.augmentations import resize_crop_flip
from mask2former_plugin.data.mappers.base import TrainingMapper, require_field


class MaskFormerInstanceDatasetMapper(TrainingMapper):
    """Needs ``annotations``; crowds are dropped, objects that the crop has emptied are kept (see ``drop_empty_masks``).

    Args:
        augmentations: Detectron2 augmentations, applied to image and annotations.
        size_divisibility: side of the square that image (with 128) and masks are padded to; <= 0: none.
    """

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        augmentations: Sequence,
        image_format: str,
        size_divisibility: int,
        num_classes: int | None = None,
        drop_empty_masks: bool = False,
    ):
        super().__init__(is_train, image_format, num_classes, drop_empty_masks)
        self.augmentations = augmentations
        self.size_divisibility = size_divisibility

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        return {
            **cls.common_config(cfg, is_train),
            "augmentations": resize_crop_flip(cfg, category_aware=False),
            "size_divisibility": cfg.INPUT.SIZE_DIVISIBILITY,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        sample, image = self.begin(dataset_dict)
        original_size, file_name = image.shape[:2], sample["file_name"]
        annotations = steps.without_crowds(require_field(sample, "annotations", type(self).__name__), file_name)
        aug_input = T.AugInput(image)
        transforms = T.AugmentationList(self.augmentations)(aug_input)
        size = aug_input.image.shape[:2]
        masks = [
            steps.rasterize(
                steps.transform_segmentation(item["segmentation"], transforms, original_size, file_name), size
            )
            for item in annotations
        ]
        sample["image"] = steps.pad_to_square(
            steps.to_chw(aug_input.image), self.size_divisibility, steps.IMAGE_PAD_VALUE, file_name
        )
        stacked = steps.pad_to_square(steps.stack_masks(masks, size), self.size_divisibility, 0, file_name)
        return self.set_targets(sample, [item["category_id"] for item in annotations], stacked)
