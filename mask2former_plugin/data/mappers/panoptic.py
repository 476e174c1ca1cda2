"""Mapper "mask_former_panoptic": one target per segment of a panoptic map, with semantic labels beside it."""

from __future__ import annotations

from typing import Any

from mask2former_plugin.data.mappers import steps
from mask2former_plugin.data.mappers.base import require_field
from mask2former_plugin.data.mappers.semantic import MaskFormerSemanticDatasetMapper


class MaskFormerPanopticDatasetMapper(MaskFormerSemanticDatasetMapper):
    """Needs ``pan_seg_file_name`` and ``segments_info``; adds ``sem_seg`` where ``sem_seg_file_name`` is given.

    Targets are the segments that are no crowd, in their order, those that the crop has emptied included (see
    ``drop_empty_masks``).
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        sample, image = self.begin(dataset_dict)
        name = type(self).__name__
        label_file = sample.pop("sem_seg_file_name", None)
        panoptic = steps.read_panoptic_map(
            require_field(sample, "pan_seg_file_name", name), image.shape[:2], sample["file_name"]
        )
        image, labels, transforms = self.augment(sample, image, label_file)
        panoptic = transforms.apply_segmentation(panoptic)
        self.put_image(sample, image)
        if labels is not None:
            self.put_labels(sample, labels, label_file)
        classes, masks = steps.segment_targets(steps.rgb_to_id(panoptic), sample["segments_info"])
        masks = steps.pad_to_square(masks, self.size_divisibility, 0, sample["file_name"])
        return self.set_targets(sample, classes, masks)
