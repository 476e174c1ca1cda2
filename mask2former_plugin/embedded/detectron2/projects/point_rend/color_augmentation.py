"""Colour distortion of SSD (Liu et al. 2016)."""

from __future__ import annotations

import random

import numpy as np
from fvcore.transforms.transform import Transform


class ColorAugSSDTransform(Transform):
    """Random brightness, contrast, saturation and hue of 8-bit images, each with probability one half.

    Draws anew at every ``apply_image`` from Python's ``random``. Contrast comes before or after the rest, at random.
    """

    def __init__(
        self,
        img_format: str,
        brightness_delta: int = 32,
        contrast_low: float = 0.5,
        contrast_high: float = 1.5,
        saturation_low: float = 0.5,
        saturation_high: float = 1.5,
        hue_delta: int = 18,
    ):
        """
        Args:
            img_format: channel order of the images, "BGR" or "RGB".
            brightness_delta: largest shift of the values.
            contrast_low, contrast_high: bounds of the factor on the values.
            saturation_low, saturation_high: bounds of the factor on the saturation.
            hue_delta: largest shift of the hue, in units of 2 degrees.
        """
        super().__init__()
        assert img_format in ("BGR", "RGB"), f"the colour augmentation takes BGR or RGB images, not '{img_format}'"
        self.is_rgb = img_format == "RGB"
        self.brightness_delta = brightness_delta
        self.contrast_low = contrast_low
        self.contrast_high = contrast_high
        self.saturation_low = saturation_low
        self.saturation_high = saturation_high
        self.hue_delta = hue_delta

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Unchanged."""
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Unchanged."""
        return segmentation

    def apply_image(self, img: np.ndarray, interp: str | None = None) -> np.ndarray:
        """Distort an image (H, W, 3) with values from 0 to 255; gives uint8. ``interp`` has no effect."""
        img = np.asarray(img)
        # All steps treat the three channels alike or go through HSV, but rounding to HSV depends on the order.
        if self.is_rgb:
            img = img[..., ::-1]
        img = self.brightness(img)
        if _coin():
            img = self.hue(self.saturation(self.contrast(img)))
        else:
            img = self.contrast(self.hue(self.saturation(img)))
        if self.is_rgb:
            img = img[..., ::-1]
        return np.ascontiguousarray(img, dtype=np.uint8)

    def brightness(self, img: np.ndarray) -> np.ndarray:
        """Shift all values, or not."""
        if _coin():
            return _linear(img, shift=random.uniform(-self.brightness_delta, self.brightness_delta))
        return img

    def contrast(self, img: np.ndarray) -> np.ndarray:
        """Scale all values, or not."""
        if _coin():
            return _linear(img, factor=random.uniform(self.contrast_low, self.contrast_high))
        return img

    def saturation(self, img: np.ndarray) -> np.ndarray:
        """Scale the saturation, or not."""
        if _coin():
            hsv = _to_hsv(img)
            hsv[..., 1] = _linear(hsv[..., 1], factor=random.uniform(self.saturation_low, self.saturation_high))
            return _to_bgr(hsv)
        return img

    def hue(self, img: np.ndarray) -> np.ndarray:
        """Turn the hue, or not."""
        if _coin():
            hsv = _to_hsv(img)
            hsv[..., 0] = (hsv[..., 0].astype(int) + random.randint(-self.hue_delta, self.hue_delta)) % 180
            return _to_bgr(hsv)
        return img


def _coin() -> bool:
    return random.randrange(2) == 1


def _linear(values: np.ndarray, factor: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return (values.astype(np.float32) * factor + shift).clip(0, 255).astype(np.uint8)


def _to_hsv(img: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.cvtColor(np.ascontiguousarray(img, dtype=np.uint8), cv2.COLOR_BGR2HSV)


def _to_bgr(hsv: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
