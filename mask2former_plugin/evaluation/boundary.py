"""Boundary regions of masks, after Boundary IoU (Cheng et al., CVPR 2021)."""

from __future__ import annotations

import math

import cv2
import numpy as np

DEFAULT_DILATION_RATIO = 0.02  # of the image's diagonal; the paper takes 0.005 for Cityscapes


def boundary_distance(height: int, width: int, dilation_ratio: float = DEFAULT_DILATION_RATIO) -> int:
    """Width of the boundary region in pixels: ``dilation_ratio`` times the diagonal of the image, at least 1."""
    if not dilation_ratio > 0:
        raise ValueError(f"the dilation ratio must be positive, got {dilation_ratio}")
    return max(1, round(dilation_ratio * math.hypot(height, width)))


def boundary_pixels(labels: np.ndarray, dilation_ratio: float = DEFAULT_DILATION_RATIO) -> np.ndarray:
    """Pixels that have another label, or the outside of the image, within the boundary distance.

    These are the pixels that an erosion of each label's mask removes (a square of 2·distance + 1 pixels, nothing
    outside the image), for all labels at once: a pixel survives if and only if its whole square has one label.

    Args:
        labels: ``[H, W]`` uint8 below 255 or uint16 below 65535; a binary mask is a map of two labels.

    Returns:
        ``[H, W]`` bool.
    """
    side = 2 * boundary_distance(*labels.shape, dilation_ratio) + 1
    square = np.ones((side, side), np.uint8)
    # the largest value means "outside": it changes no minimum and every maximum
    rim = {"borderType": cv2.BORDER_CONSTANT, "borderValue": float(np.iinfo(labels.dtype).max)}
    return cv2.erode(labels, square, **rim) != cv2.dilate(labels, square, **rim)


def mask_boundary(mask: np.ndarray, dilation_ratio: float = DEFAULT_DILATION_RATIO) -> np.ndarray:
    """Pixels of a mask within the boundary distance of its contour.

    Args:
        mask: ``[H, W]`` bool, or numbers of which all but 0 belong to the mask.

    Returns:
        ``[H, W]`` bool.
    """
    mask = np.asarray(mask) != 0
    return mask & boundary_pixels(mask.astype(np.uint8), dilation_ratio)
