"""Semantic segmentation with test-time augmentation: scales and flips, averaged."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.modeling import DatasetMapperTTA
from fvcore.transforms import HFlipTransform
from torch import nn


class SemanticSegmentorWithTTA(nn.Module):
    """Averages the semantic scores of a model over the scales ``TEST.AUG.MIN_SIZES`` and, with ``TEST.AUG.FLIP``, mirrored images.

    Args:
        cfg: the model's config.
        model: returns ``sem_seg`` ``[K, H, W]`` at the size of ``height`` and ``width`` of its input dict.
        tta_mapper: makes the augmented copies of an input dict, default ``DatasetMapperTTA(cfg)``.
        batch_size: augmented copies given to the model at once.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, tta_mapper=None, batch_size: int = 1):
        super().__init__()
        self.model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.image_format = cfg.INPUT.FORMAT
        self.tta_mapper = DatasetMapperTTA(cfg) if tta_mapper is None else tta_mapper
        self.batch_size = batch_size

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """As the model's own, with ``sem_seg`` only: the mean over the copies, ``[K, height, width]``."""
        return [self._one_image(self._complete(x)) for x in batched_inputs]

    def _complete(self, x: dict[str, Any]) -> dict[str, Any]:
        x = dict(x)
        if "image" not in x:
            image = read_image(x["file_name"], self.image_format)
            x["image"] = torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous()
        x.setdefault("height", x["image"].shape[1])
        x.setdefault("width", x["image"].shape[2])
        return x

    def _one_image(self, x: dict[str, Any]) -> dict[str, Any]:
        copies = self.tta_mapper(x)
        flipped = [any(isinstance(t, HFlipTransform) for t in copy.pop("transforms").transforms) for copy in copies]
        total = None
        for start in range(0, len(copies), self.batch_size):
            outputs = self.model(copies[start : start + self.batch_size])
            for output, is_flipped in zip(outputs, flipped[start:]):
                scores = output["sem_seg"].flip(2) if is_flipped else output["sem_seg"]
                # clone once: the sum is taken in place and must not change the model's output
                total = scores.clone() if total is None else total.add_(scores)
        return {"sem_seg": total / len(copies)}
