"""Drawing of predictions over the frames of a video, with colours that stay with their objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as mask_util
import torch

from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import ColorMode, VisImage, Visualizer, _create_text_labels

MIN_MASK_IOU = 0.5
MIN_BOX_IOU = 0.6
FRAMES_TO_LIVE = 8

__all__ = ["VideoVisualizer"]


@dataclass
class _TrackedObject:
    """Something seen in one of the last frames."""

    label: int
    box: np.ndarray | None  # XYXY
    mask: dict | None  # run-length code
    color: tuple[float, float, float] | None = None
    frames_to_live: int = FRAMES_TO_LIVE


class VideoVisualizer:
    """Draws frame after frame. Objects keep their colour: by overlap with the frames before, or by the field ``ID``."""

    def __init__(self, metadata: Metadata, instance_mode: ColorMode = ColorMode.IMAGE) -> None:
        """
        Args:
            metadata: of the dataset whose classes are drawn.
            instance_mode: IMAGE or IMAGE_BW.
        """
        if instance_mode not in (ColorMode.IMAGE, ColorMode.IMAGE_BW):
            raise ValueError(f"videos are drawn in the mode IMAGE or IMAGE_BW, not {instance_mode}")
        self.metadata = metadata
        self._instance_mode = instance_mode
        self._tracked: list[_TrackedObject] = []
        self._color_of_id: dict[int, tuple[float, float, float]] = {}
        self._colors_given = 0

    def draw_instance_predictions(self, frame: np.ndarray, predictions: Instances) -> VisImage:
        """Draw the instances of one frame.

        Args:
            frame: (H, W, 3) RGB, 0..255.
            predictions: with any of ``pred_boxes``, ``scores``, ``pred_classes``, ``pred_masks``; with ``ID``, colours
                follow that number; with ``COLOR`` (N colours in 0..1), those are used.
        """
        visualizer = Visualizer(frame, self.metadata)
        if len(predictions) == 0:
            return visualizer.output
        boxes = visualizer._convert_boxes(predictions.pred_boxes) if predictions.has("pred_boxes") else None
        masks = predictions.pred_masks.cpu().numpy() if predictions.has("pred_masks") else None
        scores = predictions.scores.tolist() if predictions.has("scores") else None
        classes = predictions.pred_classes.tolist() if predictions.has("pred_classes") else [0] * len(predictions)
        if predictions.has("COLOR"):
            colors = list(predictions.COLOR)
        elif predictions.has("ID"):
            colors = self._assign_colors_by_id(predictions)
        else:
            colors = self._assign_colors(_objects(classes, boxes, masks))
        labels = _create_text_labels(classes, scores, self.metadata.get("thing_classes"))
        alpha = 0.5
        if self._instance_mode == ColorMode.IMAGE_BW:
            covered = masks.astype(bool).any(axis=0) if masks is not None else None
            visualizer.output.reset_image(visualizer._create_grayscale_image(covered))
            alpha = 0.3
        return visualizer.overlay_instances(
            boxes=boxes if masks is None else None, masks=masks, labels=labels, assigned_colors=colors, alpha=alpha
        )

    def draw_sem_seg(
        self, frame: np.ndarray, sem_seg: torch.Tensor | np.ndarray, area_threshold: int | None = None
    ) -> VisImage:
        """Draw a label map (H, W); the colours are those of the classes."""
        return Visualizer(frame, self.metadata).draw_sem_seg(sem_seg, area_threshold=area_threshold)

    def draw_panoptic_seg_predictions(
        self,
        frame: np.ndarray,
        panoptic_seg: torch.Tensor | np.ndarray,
        segments_info: Sequence[dict],
        area_threshold: int | None = None,
        alpha: float = 0.5,
    ) -> VisImage:
        """Draw a panoptic map (H, W) and its segments, as :meth:`Visualizer.draw_panoptic_seg` takes them."""
        visualizer = Visualizer(frame, self.metadata)
        if isinstance(panoptic_seg, torch.Tensor):
            panoptic_seg = panoptic_seg.cpu().numpy()
        if self._instance_mode == ColorMode.IMAGE_BW:
            covered = np.isin(panoptic_seg, [info["id"] for info in segments_info])
            visualizer.output.reset_image(visualizer._create_grayscale_image(covered))
        stuff = [info for info in segments_info if not info["isthing"]]
        visualizer.draw_panoptic_seg(panoptic_seg, stuff, area_threshold, alpha)
        things = [(info, panoptic_seg == info["id"]) for info in segments_info if info["isthing"]]
        things = [(info, mask) for info, mask in things if mask.any()]
        if not things:
            return visualizer.output
        infos, masks = zip(*things)
        classes = [info["category_id"] for info in infos]
        scores = [info["score"] for info in infos] if all("score" in info for info in infos) else None
        return visualizer.overlay_instances(
            masks=list(masks),
            labels=_create_text_labels(classes, scores, self.metadata.get("thing_classes")),
            assigned_colors=self._assign_colors(_objects(classes, None, masks)),
            alpha=alpha,
        )

    def _assign_colors(self, instances: Sequence[_TrackedObject]) -> list[tuple[float, float, float]]:
        """Colours of a frame's objects: of the tracked object of the same class that overlaps most, or new ones."""
        overlap = _overlaps(self._tracked, instances)
        unmatched = dict(enumerate(self._tracked))
        for flat in np.argsort(-overlap, axis=None, kind="stable"):
            old, new = np.unravel_index(flat, overlap.shape)
            if overlap[old, new] <= 0:
                break
            if old in unmatched and instances[new].color is None:
                instances[new].color = unmatched.pop(old).color
        for instance in instances:
            if instance.color is None:
                instance.color = self._next_color()
        for lost in unmatched.values():
            lost.frames_to_live -= 1
        self._tracked = [*instances, *(lost for lost in unmatched.values() if lost.frames_to_live > 0)]
        return [instance.color for instance in instances]

    def _assign_colors_by_id(self, instances: Instances) -> list[tuple[float, float, float]]:
        colors = []
        for number in map(int, instances.ID):
            if number not in self._color_of_id:
                self._color_of_id[number] = self._next_color()
            colors.append(self._color_of_id[number])
        return colors

    def _next_color(self) -> tuple[float, float, float]:
        palette = colormap(rgb=True, maximum=1)
        color = tuple(palette[self._colors_given % len(palette)].tolist())
        self._colors_given += 1
        return color


def _objects(
    classes: Sequence[int], boxes: np.ndarray | None, masks: Sequence[np.ndarray] | None
) -> list[_TrackedObject]:
    codes = None if masks is None else [mask_util.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    return [
        _TrackedObject(label, None if boxes is None else boxes[i], None if codes is None else codes[i])
        for i, label in enumerate(classes)
    ]


def _overlaps(old: Sequence[_TrackedObject], new: Sequence[_TrackedObject]) -> np.ndarray:
    """IoU of every old with every new object, 0 where it is too small or the classes differ."""
    overlap = np.zeros((len(old), len(new)))
    if not overlap.size:
        return overlap
    if all(tracked.mask is not None for tracked in (*old, *new)):
        overlap[:] = mask_util.iou([t.mask for t in old], [t.mask for t in new], [0] * len(new))
        overlap[overlap <= MIN_MASK_IOU] = 0
    elif all(tracked.box is not None for tracked in (*old, *new)):
        xywh = [
            np.array([[*t.box[:2], *(t.box[2:] - t.box[:2])] for t in side], dtype=np.float64) for side in (old, new)
        ]
        overlap[:] = mask_util.iou(*xywh, [0] * len(new))
        overlap[overlap <= MIN_BOX_IOU] = 0
    same = np.array([[a.label == b.label for b in new] for a in old])
    return overlap * same
