"""Test-time augmentation: scales and flips, averaged; semantic as published, instance and panoptic query by query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.modeling import DatasetMapperTTA
from fvcore.transforms import HFlipTransform
from torch import nn

from mask2former_plugin.modeling.inference import SemanticTask, needed_queries, run_tasks
from mask2former_plugin.modeling.inference.light_outputs import LabelMap
from mask2former_plugin.modeling.inference.query_fusion import FusedPasses, Pass
from mask2former_plugin.modeling.inference.semantic import ScoreTiles, mean_scores
from mask2former_plugin.modeling.inference.tasks import full_precision
from mask2former_plugin.modeling.inference.upsampling import first_largest
from mask2former_plugin.modeling.mask_logits import mask_logits_of
from mask2former_plugin.modeling.meta_arch import MaskFormer


def build_model_with_TTA(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """The model with the test-time augmentation that suits the tasks that are on."""
    inner = _without_wrapper(model)
    if isinstance(inner, MaskFormer) and (inner.panoptic_on or inner.instance_on):
        return MaskClassificationWithTTA(cfg, model)
    return SemanticSegmentorWithTTA(cfg, model)


def _without_wrapper(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


class WithTTA(nn.Module):
    """One image at a time: makes the augmented copies of an input dict.

    Args:
        cfg: the model's config.
        model: a model or its ``DistributedDataParallel`` wrapper.
        tta_mapper: makes the augmented copies, default ``DatasetMapperTTA(cfg)``.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, tta_mapper=None) -> None:
        super().__init__()
        self.model = _without_wrapper(model)
        self.image_format = cfg.INPUT.FORMAT
        self.tta_mapper = DatasetMapperTTA(cfg) if tta_mapper is None else tta_mapper
        self.train(self.model.training)  # evaluators restore the mode of the whole, some models refuse training mode

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Results like the model's own, one dict per image."""
        return [self._one_image(self._complete(x)) for x in batched_inputs]

    def _complete(self, x: dict[str, Any]) -> dict[str, Any]:
        x = dict(x)
        if "image" not in x:
            image = read_image(x["file_name"], self.image_format)
            x["image"] = torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous()
        x.setdefault("height", x["image"].shape[1])
        x.setdefault("width", x["image"].shape[2])
        return x

    def _copies(self, x: dict[str, Any]) -> tuple[list[dict[str, Any]], list[bool]]:
        """The augmented copies, and which of them are mirrored."""
        copies = self.tta_mapper(x)
        flipped = [any(isinstance(t, HFlipTransform) for t in copy.pop("transforms").transforms) for copy in copies]
        return copies, flipped

    def _one_image(self, x: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    @torch.no_grad()
    def _pass(self, x: dict[str, Any], flipped: bool) -> Pass:
        """What a :class:`MaskFormer` says of one copy."""
        images = self.model.preprocess([x])
        outputs = self.model.sem_seg_head(self.model.backbone(images.tensor))
        masks = mask_logits_of(outputs)
        padded_size = tuple(images.tensor.shape[-2:])
        return Pass(outputs["pred_logits"][0], masks, padded_size, tuple(images.image_sizes[0]), flipped)

    def _mean(self, scores: Sequence[tuple[ScoreTiles, bool]], size: tuple[int, int]) -> torch.Tensor:
        """Mean scores ``[K, H, W]``, or their classes if the model is set to give these."""
        with full_precision(self.model.device):
            return mean_scores(scores, size, label_map=self._gives_label_maps)

    @property
    def _gives_label_maps(self) -> bool:
        return isinstance(self.model, MaskFormer) and self.model.semantic_label_map


class SemanticSegmentorWithTTA(WithTTA):
    """Averages the semantic scores of a model over the scales ``TEST.AUG.MIN_SIZES`` and, with ``TEST.AUG.FLIP``, their
    mirror images.

    Args:
        cfg: the model's config.
        model: returns ``sem_seg`` ``[K, H, W]`` at the size of ``height`` and ``width`` of its input dict.
        tta_mapper: makes the augmented copies of an input dict, default ``DatasetMapperTTA(cfg)``.
        batch_size: augmented copies given to the model at once; a :class:`MaskFormer` gets one, unless in windows.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, tta_mapper=None, batch_size: int = 1) -> None:
        super().__init__(cfg, model, tta_mapper)
        self.batch_size = batch_size

    def _one_image(self, x: dict[str, Any]) -> dict[str, Any]:
        """``sem_seg`` only: the mean over the copies, ``[K, height, width]``, or its best classes."""
        copies, flipped = self._copies(x)
        if isinstance(self.model, MaskFormer) and self.model.windows is None:
            size, masks_first = (x["height"], x["width"]), self.model.sem_seg_postprocess_before_inference
            # of each pass its masks are kept, of no pass scores at full size
            passes = (self._pass(*copy) for copy in zip(copies, flipped))
            scores = [(one.scores(size, masks_first=masks_first), one.flipped) for one in passes]
            return {SemanticTask.name: self._mean(scores, size)}
        wanted = self._gives_label_maps
        if wanted:
            self.model.semantic_label_map = False
        try:
            mean = self._sum(copies, flipped).div_(len(copies))
        finally:
            if wanted:
                self.model.semantic_label_map = True
        return {SemanticTask.name: first_largest(mean).as_subclass(LabelMap) if wanted else mean}

    def _sum(self, copies: list[dict[str, Any]], flipped: list[bool]) -> torch.Tensor:
        total = None
        for start in range(0, len(copies), self.batch_size):
            outputs = self.model(copies[start : start + self.batch_size])
            for output, is_flipped in zip(outputs, flipped[start:]):
                if total is None:
                    total = torch.zeros_like(output["sem_seg"])
                # class by class: a mirrored copy of all scores would need their memory once more
                for sum_, scores in zip(total, output["sem_seg"]):
                    sum_ += scores.flip(1) if is_flipped else scores
        return total


class MaskClassificationWithTTA(WithTTA):
    """A :class:`MaskFormer` over the scales ``TEST.AUG.MIN_SIZES`` and, with ``TEST.AUG.FLIP``, mirrored images.

    Semantic scores are averaged over the copies, as :class:`SemanticSegmentorWithTTA` does. Averages of finished
    instances or segments would not be instances or segments, so these two tasks are averaged before they are decided:
    queries of different copies that mean the same object are grouped, see :func:`group_queries`, class and mask
    probabilities of a group are averaged, see :class:`FusedPasses`, and the model's own inference runs on the means.

    Args:
        cfg: the model's config.
        model: the model, with at least one task on.
        tta_mapper: makes the augmented copies of an input dict, default ``DatasetMapperTTA(cfg)``.
    """

    def _one_image(self, x: dict[str, Any]) -> dict[str, Any]:
        if self.model.windows is not None:
            raise ValueError(
                "test-time augmentation of instances and panoptic segments does not work in windows: set "
                "TEST.AUG.ENABLED or MODEL.MASK_FORMER.TEST.WINDOW.ENABLED to False"
            )
        size = (x["height"], x["width"])
        passes = [self._pass(*copy) for copy in zip(*self._copies(x))]
        result = {}
        if self.model.semantic_on:
            result[SemanticTask.name] = self._mean([(one.scores(size), one.flipped) for one in passes], size)
        fused = FusedPasses(passes)
        tasks = self.model.inference_tasks(fused.class_logits(), size)
        tasks = [task for task in tasks if not isinstance(task, SemanticTask)]
        if tasks:
            groups = needed_queries(tasks)
            result.update(run_tasks(tasks, groups, fused.masks(groups, size)))
        return result
