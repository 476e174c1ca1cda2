"""Test-time augmentation: one image in several sizes, and flipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fvcore.transforms.transform import HFlipTransform, NoOpTransform, TransformList

from detectron2.config import CfgNode, configurable


class DatasetMapperTTA:
    """Makes several versions of a model input.

    Every version is a copy of the input with another ``image`` and with ``transforms``, which lead from the original
    image (of ``height`` × ``width``) to it.
    """

    @configurable
    def __init__(self, min_sizes: Sequence[int], max_size: int, flip: bool):
        """
        Args:
            min_sizes: lengths of the shorter side, one version each.
            max_size: limit of the longer side.
            flip: add the mirror image of every version.
        """
        self.min_sizes = min_sizes
        self.max_size = max_size
        self.flip = flip

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {"min_sizes": cfg.TEST.AUG.MIN_SIZES, "max_size": cfg.TEST.AUG.MAX_SIZE, "flip": cfg.TEST.AUG.FLIP}

    def __call__(self, dataset_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """
        Args:
            dataset_dict: ``image`` (C, H, W), and ``height``, ``width`` of the original image if it had another size.

        Returns:
            the versions by size, each followed by its mirror image.
        """
        from detectron2.data.transforms import ResizeShortestEdge, ResizeTransform

        image = np.ascontiguousarray(dataset_dict["image"].permute(1, 2, 0).numpy())
        height, width = image.shape[:2]
        original = (dataset_dict.get("height", height), dataset_dict.get("width", width))
        first = NoOpTransform() if original == (height, width) else ResizeTransform(*original, height, width)

        versions = []
        for min_size in self.min_sizes:
            resize = ResizeShortestEdge(min_size, self.max_size).get_transform(image)
            resized = resize.apply_image(image)
            versions.append(_version(dataset_dict, resized, [first, resize]))
            if self.flip:
                mirror = HFlipTransform(resized.shape[1])
                versions.append(_version(dataset_dict, mirror.apply_image(resized), [first, resize, mirror]))
        return versions


def _version(dataset_dict: dict[str, Any], image: np.ndarray, transforms: list[Any]) -> dict[str, Any]:
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return {**dataset_dict, "image": tensor, "transforms": TransformList(transforms)}
