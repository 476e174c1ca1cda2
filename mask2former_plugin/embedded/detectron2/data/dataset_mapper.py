"""The default dataset mapper: one dataset dict in, one model input out."""

from __future__ import annotations

import copy
import logging
import os
from typing import Any, Sequence

import numpy as np
import torch

from detectron2.config import configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.utils.missing import needs_upstream

__all__ = ["DatasetMapper"]

logger = logging.getLogger(__name__)


class DatasetMapper:
    """Read the image of a dataset dict, augment it with its annotations, and make tensors of them.

    The result is the dataset dict (a copy) with ``image`` (C, H, W) and, for training, ``sem_seg`` (H, W) int64 and /
    or ``instances``, where the dict had ``sem_seg_file_name`` / ``annotations``. For inference the ground truth is not
    read.

    Args:
        is_train: for training or inference.
        augmentations: augmentations or transforms.
        image_format: see :func:`detectron2.data.detection_utils.read_image`.
        use_instance_mask: keep the masks of the instances.
        use_keypoint: must be False; keypoints need upstream.
        instance_mask_format: "polygon" or "bitmask".
        keypoint_hflip_indices: must be None.
        precomputed_proposal_topk: must be None; proposals need upstream.
        recompute_boxes: make the boxes from the transformed masks (tight also after crops) instead of transforming
            them.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str,
        use_instance_mask: bool = False,
        use_keypoint: bool = False,
        instance_mask_format: str = "polygon",
        keypoint_hflip_indices: np.ndarray | None = None,
        precomputed_proposal_topk: int | None = None,
        recompute_boxes: bool = False,
    ):
        if use_keypoint or keypoint_hflip_indices is not None:
            needs_upstream("Training on keypoints")
        if precomputed_proposal_topk is not None:
            needs_upstream("Training on precomputed proposals")
        if recompute_boxes and not use_instance_mask:
            raise ValueError("recompute_boxes needs instance masks: set use_instance_mask=True")
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.use_instance_mask = use_instance_mask
        # Constant here; the code of subclasses, which is often a copy of upstream's, reads them.
        self.use_keypoint = use_keypoint
        self.keypoint_hflip_indices = keypoint_hflip_indices
        self.proposal_topk = precomputed_proposal_topk
        self.instance_mask_format = instance_mask_format
        self.recompute_boxes = recompute_boxes
        logger.info("Augmentations in %s: %s", "training" if is_train else "inference", self.augmentations)

    @classmethod
    def from_config(cls, cfg, is_train: bool = True) -> dict[str, Any]:
        if cfg.MODEL.LOAD_PROPOSALS:
            needs_upstream("MODEL.LOAD_PROPOSALS")
        augmentations = utils.build_augmentation(cfg, is_train)
        crop = is_train and cfg.INPUT.CROP.ENABLED
        if crop:
            augmentations.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
        return {
            "is_train": is_train,
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "use_instance_mask": cfg.MODEL.MASK_ON,
            "use_keypoint": cfg.MODEL.KEYPOINT_ON,
            "instance_mask_format": cfg.INPUT.MASK_FORMAT,
            "recompute_boxes": bool(crop and cfg.MODEL.MASK_ON),
        }

    def __call__(self, dataset_dict: dict) -> dict:
        """Map one dataset dict; the given one is left as it is.

        Raises:
            OSError: a file is missing or not an image.
            SizeMismatchError: image, dataset dict, label map or masks have different sizes.
        """
        dataset_dict = copy.deepcopy(dataset_dict)
        image = utils.read_image(dataset_dict["file_name"], format=self.image_format)
        utils.check_image_size(dataset_dict, image)
        label_file = dataset_dict.pop("sem_seg_file_name", None)
        labels = None
        if self.is_train and label_file is not None:
            labels = utils.read_label_map(label_file)
            if labels.shape != image.shape[:2]:
                raise utils.SizeMismatchError(
                    f"Label file {os.fspath(label_file)} is {labels.shape[1]}x{labels.shape[0]} (width x height), but "
                    f"its image {os.fspath(dataset_dict['file_name'])} is {image.shape[1]}x{image.shape[0]}"
                )
        if self.is_train and "annotations" in dataset_dict:
            _check_rle_sizes(dataset_dict["annotations"], dataset_dict)

        aug_input = T.AugInput(image, sem_seg=labels)
        transforms = self.augmentations(aug_input)
        image = aug_input.image
        planes = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
        dataset_dict["image"] = torch.as_tensor(np.ascontiguousarray(planes))
        if labels is not None:
            dataset_dict["sem_seg"] = torch.as_tensor(aug_input.sem_seg.astype(np.int64))
        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, image.shape[:2])
        return dataset_dict

    def _transform_annotations(
        self, dataset_dict: dict, transforms: T.Transform, image_shape: tuple[int, int]
    ) -> None:
        """Replace ``annotations`` in the dict by ``instances``; subclasses with other annotations override this.

        Args:
            dataset_dict: in the process of being mapped; changed in place.
            transforms: those of the image.
            image_shape: (height, width) after the transforms.
        """
        annotations = [a for a in dataset_dict.pop("annotations") if a.get("iscrowd", 0) == 0]
        for annotation in annotations:
            annotation.pop("keypoints", None)
            if not self.use_instance_mask:
                annotation.pop("segmentation", None)
            utils.transform_instance_annotations(annotation, transforms, image_shape)
        instances = utils.annotations_to_instances(annotations, image_shape, mask_format=self.instance_mask_format)
        if self.recompute_boxes and instances.has("gt_masks"):
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        dataset_dict["instances"] = utils.filter_empty_instances(instances)


def _check_rle_sizes(annotations: list[dict], dataset_dict: dict) -> None:
    expected = [dataset_dict["height"], dataset_dict["width"]]
    for annotation in annotations:
        mask = annotation.get("segmentation")
        if isinstance(mask, dict) and list(mask["size"]) != expected:
            raise utils.SizeMismatchError(
                f"A mask of image {os.fspath(dataset_dict['file_name'])} is {mask['size'][1]}x{mask['size'][0]} "
                f"(width x height), but the image is {expected[1]}x{expected[0]}"
            )
