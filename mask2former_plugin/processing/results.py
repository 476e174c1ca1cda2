"""Predictions of a batch as semantic maps, instances and panoptic segments."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pycocotools.mask
import torch
from detectron2.structures import Instances
from torch import Tensor

from mask2former_plugin.modeling.inference import (
    ImageMasks,
    InstanceTask,
    PanopticTask,
    SemanticTask,
    needed_queries,
    run_tasks,
)
from mask2former_plugin.modeling.inference.light_outputs import RunLengths, dense_masks, mask_in_box
from mask2former_plugin.modeling.inference.semantic import class_probabilities
from mask2former_plugin.modeling.mask_logits import MaskLogits

Sizes = Sequence[Sequence[int]]
BACKGROUND = -1  # in maps of instances, whose ids start at 0


class Predictions:
    """Class and mask logits of a batch, whoever made them, with the sizes of its images.

    Args:
        outputs: with ``pred_logits`` and ``mask_logits`` or ``pred_masks`` (our heads), or with
            ``class_queries_logits`` and ``masks_queries_logits`` (Hugging Face), as attributes or as keys.
        target_sizes: height and width of each result; None: that of the prediction.
        pixel_mask: ``[B, H, W]``, 1 where an image is; crops the padding. None: the prediction covers the image.

    Raises:
        ValueError: other outputs; numbers of sizes or images differ.
    """

    def __init__(self, outputs: Any, target_sizes: Sizes | Tensor | None, pixel_mask: Tensor | None) -> None:
        self.class_logits, self._masks = _read(outputs)
        number = len(self.class_logits)
        for name, values in (("target_sizes", target_sizes), ("pixel_mask", pixel_mask)):
            if values is not None and len(values) != number:
                raise ValueError(f"{name} has {len(values)} entries for a batch of {number} images")
        grid = tuple(self._masks.size if isinstance(self._masks, MaskLogits) else self._masks.shape[-2:])
        self._padded_size = grid if pixel_mask is None else tuple(pixel_mask.shape[-2:])
        if pixel_mask is None:
            self._image_sizes = [grid] * number
        else:
            real = torch.as_tensor(pixel_mask) > 0
            self._image_sizes = list(zip(real.any(2).sum(1).tolist(), real.any(1).sum(1).tolist()))
        self.sizes = self._image_sizes if target_sizes is None else [(int(h), int(w)) for h, w in target_sizes]

    def __iter__(self) -> Iterator[tuple[int, Tensor, tuple[int, int]]]:
        """Index, class logits ``[Q, K+1]`` and size of the result of each image."""
        return iter(zip(range(len(self.class_logits)), self.class_logits, self.sizes))

    def image_masks(self, index: int, queries: Tensor) -> ImageMasks:
        """Mask logits of some queries of one image at the size of the result."""
        if isinstance(self._masks, MaskLogits):
            logits = self._masks.select(torch.full(queries.shape, index), queries)
        else:
            logits = self._masks[index, queries]
        return ImageMasks(logits, self._padded_size, self._image_sizes[index], self.sizes[index])

    def run(self, index: int, task: Any) -> Any:
        """The result of one task for one image."""
        queries = needed_queries([task])
        return run_tasks([task], queries, self.image_masks(index, queries))[task.name]


def _read(outputs: Any) -> tuple[Tensor, MaskLogits | Tensor]:
    def find(name: str) -> Any:
        if isinstance(outputs, Mapping):
            return outputs[name] if name in outputs else None
        return getattr(outputs, name, None)

    for classes, masks in (
        ("pred_logits", "mask_logits"),
        ("pred_logits", "pred_masks"),
        ("class_queries_logits", "masks_queries_logits"),
    ):
        found = find(classes), find(masks)
        if all(value is not None for value in found):
            return found[0].detach(), found[1]
    raise ValueError(
        "outputs must have pred_logits and mask_logits or pred_masks, or class_queries_logits and masks_queries_logits"
    )


class PostProcessing:
    """The three ways from predictions to results, for :class:`ImageProcessor`.

    Memory is that of the results: full-size masks of all queries at once never exist. Mask logits are resized, not
    class scores or finished maps, as in the original projects.
    """

    @torch.no_grad()
    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sizes | Tensor | None = None,
        return_segmentation_scores: bool = False,
        *,
        pixel_mask: Tensor | None = None,
    ) -> list[Any]:
        """Of each image the map of the most likely classes, int64 ``[h, w]``.

        Args:
            outputs: see :class:`Predictions`.
            target_sizes: see :class:`Predictions`.
            return_segmentation_scores: give dicts with ``segmentation`` and ``segmentation_scores`` float32
                ``[K, h, w]``, sums over the queries of class probability · mask probability.
            pixel_mask: see :class:`Predictions`.
        """
        predictions = Predictions(outputs, target_sizes, pixel_mask)
        results: list[Any] = []
        for index, class_logits, size in predictions:
            found = predictions.run(index, SemanticTask(class_logits, size, label_map=not return_segmentation_scores))
            labels = found.argmax(dim=0)
            scored = {"segmentation": labels, "segmentation_scores": found}
            results.append(scored if return_segmentation_scores else labels)
        return results

    @torch.no_grad()
    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: Sizes | Tensor | None = None,
        return_coco_annotation: bool = False,
        return_binary_maps: bool = False,
        *,
        pixel_mask: Tensor | None = None,
    ) -> list[dict[str, Any]]:
        """Of each image its instances, the best first.

        Candidates are as many pairs of query and class as there are queries, the most likely ones; their score is
        class probability · mean mask probability inside the mask.

        Args:
            outputs: see :class:`Predictions`.
            threshold: least score.
            mask_threshold: a mask is where the mask probability is above it.
            overlap_mask_area_threshold: counts for the map of ids only, where a pixel has one owner: an instance of
                which better ones leave less than this part gets no pixels and no entry (Panoptic Segmentation,
                Kirillov et al., 2019, section 6). Masks in the two other forms may overlap.
            target_sizes: see :class:`Predictions`.
            return_coco_annotation: give COCO's run lengths instead of a map.
            return_binary_maps: give binary masks instead of a map.
            pixel_mask: see :class:`Predictions`.

        Returns:
            ``segmentation``: ids int32 ``[h, w]``, -1 = background; or a list of COCO's
            ``{"size": [h, w], "counts": …}``; or bool ``[n, h, w]``. ``segments_info``: a list of ``id`` (from 0),
            ``label_id``, ``was_fused`` (False) and ``score``.

        Raises:
            ValueError: two forms at once.
        """
        if return_coco_annotation and return_binary_maps:
            raise ValueError("return_coco_annotation and return_binary_maps exclude each other")
        predictions = Predictions(outputs, target_sizes, pixel_mask)
        results = []
        for index, class_logits, size in predictions:
            likely = class_probabilities(class_logits)[:, :-1] >= threshold  # no score is above its class probability
            top_k = min(len(class_logits), int(likely.sum()))
            # as run lengths also for the other forms: ordering dense masks would double them
            task = InstanceTask(class_logits, size, top_k=top_k, mask_threshold=mask_threshold, encoded=True)
            instances = _kept(predictions.run(index, task), threshold)
            codes, device = instances.pred_masks_rle, class_logits.device
            if return_binary_maps:
                segmentation: Any = dense_masks(codes, size).to(device)
            elif return_coco_annotation:
                segmentation = list(codes)
            else:
                ids, painted = _id_map(codes, size, overlap_mask_area_threshold)
                segmentation, instances = ids.to(device), instances[painted]
            pairs = zip(instances.pred_classes.tolist(), instances.scores.tolist())
            info = [_segment(i, label, score, fused=False) for i, (label, score) in enumerate(pairs)]
            results.append({"segmentation": segmentation, "segments_info": info})
        return results

    @torch.no_grad()
    def post_process_panoptic_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        label_ids_to_fuse: Collection[int] | None = None,
        target_sizes: Sizes | Tensor | None = None,
        *,
        pixel_mask: Tensor | None = None,
    ) -> list[dict[str, Any]]:
        """Of each image a partition into segments, see :class:`PanopticTask`.

        Args:
            outputs: see :class:`Predictions`.
            threshold: class scores must be above it.
            mask_threshold: least mask probability of a segment's pixels, without the class score.
            overlap_mask_area_threshold: least visible part of a mask.
            label_ids_to_fuse: classes (stuff) of which an image has one segment at most; None: none.
            target_sizes: see :class:`Predictions`.
            pixel_mask: see :class:`Predictions`.

        Returns:
            ``segmentation``: ids int32 ``[h, w]``, 0 = void; ``segments_info``: a list of ``id`` (from 1, each once),
            ``label_id``, ``was_fused`` (the class is one of ``label_ids_to_fuse``) and ``score``, the class
            probability, of fused segments the largest.
        """
        fused = frozenset(label_ids_to_fuse or ())
        predictions = Predictions(outputs, target_sizes, pixel_mask)
        results = []
        for index, class_logits, size in predictions:
            task = PanopticTask(
                class_logits,
                size,
                thing_classes=frozenset(range(class_logits.shape[1] - 1)) - fused,
                object_mask_threshold=threshold,
                overlap_threshold=overlap_mask_area_threshold,
                mask_threshold=mask_threshold,
            )
            ids, segments = predictions.run(index, task)
            scores = class_probabilities(class_logits).amax(1)[task.queries]
            info = [
                _segment(s["id"], s["category_id"], scores[group].max().item(), fused=s["category_id"] in fused)
                for s, group in zip(segments, task.groups())
            ]
            results.append({"segmentation": ids, "segments_info": info})
        return results


def _segment(number: int, label: int, score: float, fused: bool) -> dict[str, Any]:
    return {"id": number, "label_id": label, "was_fused": fused, "score": round(score, 6)}


def _kept(instances: Instances, threshold: float) -> Instances:
    """Instances with pixels and a score of ``threshold`` or more, the best first."""
    keep = (instances.scores >= threshold) & instances.pred_boxes.nonempty()
    instances = instances[keep]
    return instances[instances.scores.argsort(descending=True, stable=True)]


def _id_map(codes: RunLengths, size: tuple[int, int], least_visible: float) -> tuple[Tensor, list[int]]:
    """Ids int32 ``[H, W]`` where a pixel belongs to the first mask that has it, and which masks got pixels."""
    ids = np.full(size, BACKGROUND, dtype=np.int32, order="F")  # column by column, as run lengths are
    painted: list[int] = []
    for i, code in enumerate(codes):
        box, inside = mask_in_box(code)
        visible = inside.astype(bool) & (ids[box] == BACKGROUND)
        area = np.count_nonzero(visible)
        if area and area / int(pycocotools.mask.area(code)) >= least_visible:
            np.copyto(ids[box], len(painted), where=visible)
            painted.append(i)
    return torch.from_numpy(np.ascontiguousarray(ids)), painted
