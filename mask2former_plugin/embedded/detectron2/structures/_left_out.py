"""Names of upstream structures that the embedded slice knows but does not have."""

from __future__ import annotations

from typing import Any

from detectron2.utils.missing import needs_upstream


class Keypoints:
    """Needs upstream Detectron2."""

    def __init__(self, *args: Any, **kwargs: Any):
        needs_upstream("Keypoints")


class RotatedBoxes:
    """Needs upstream Detectron2."""

    def __init__(self, *args: Any, **kwargs: Any):
        needs_upstream("RotatedBoxes")


class ROIMasks:
    """Needs upstream Detectron2."""

    def __init__(self, *args: Any, **kwargs: Any):
        needs_upstream("ROIMasks")


def heatmaps_to_keypoints(*args: Any, **kwargs: Any) -> Any:
    needs_upstream("heatmaps_to_keypoints")


def pairwise_iou_rotated(*args: Any, **kwargs: Any) -> Any:
    needs_upstream("pairwise_iou_rotated")
