"""Boxes, masks, instances and image batches."""

from detectron2.structures._left_out import (
    Keypoints,
    ROIMasks,
    RotatedBoxes,
    heatmaps_to_keypoints,
    pairwise_iou_rotated,
)
from detectron2.structures.boxes import Boxes, BoxMode, pairwise_ioa, pairwise_iou, pairwise_point_box_distance
from detectron2.structures.image_list import ImageList
from detectron2.structures.instances import Instances
from detectron2.structures.masks import BitMasks, PolygonMasks, polygons_to_bitmask

__all__ = [
    "BitMasks",
    "BoxMode",
    "Boxes",
    "ImageList",
    "Instances",
    "Keypoints",
    "PolygonMasks",
    "ROIMasks",
    "RotatedBoxes",
    "heatmaps_to_keypoints",
    "pairwise_ioa",
    "pairwise_iou",
    "pairwise_iou_rotated",
    "pairwise_point_box_distance",
    "polygons_to_bitmask",
]
