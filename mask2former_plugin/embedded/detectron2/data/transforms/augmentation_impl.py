"""Random crops, flips, resizes, rotations and color changes.

All random numbers come from numpy's global generator, in the order that published training runs have drawn them.
"""

from __future__ import annotations

import sys
from typing import Sequence

import numpy as np
import torch
from fvcore.transforms.transform import (
    BlendTransform,
    CropTransform,
    HFlipTransform,
    NoOpTransform,
    PadTransform,
    Transform,
    TransformList,
    VFlipTransform,
)
from PIL import Image

from detectron2.data.transforms.augmentation import Augmentation, AugInput, as_augmentation
from detectron2.data.transforms.transform import ExtentTransform, ResizeTransform, RotationTransform
from detectron2.structures import Boxes, pairwise_iou

__all__ = [
    "FixedSizeCrop",
    "MinIoURandomCrop",
    "RandomApply",
    "RandomBrightness",
    "RandomContrast",
    "RandomCrop",
    "RandomCrop_CategoryAreaConstraint",
    "RandomExtent",
    "RandomFlip",
    "RandomLighting",
    "RandomResize",
    "RandomRotation",
    "RandomSaturation",
    "Resize",
    "ResizeScale",
    "ResizeShortestEdge",
]

BILINEAR = Image.Resampling.BILINEAR


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _round_half_up(x: float) -> int:
    return int(x + 0.5)


class RandomApply(Augmentation):
    """Apply an augmentation or transform with a probability.

    Args:
        tfm_or_aug: what to apply.
        prob: in [0, 1].
    """

    def __init__(self, tfm_or_aug: Augmentation | Transform, prob: float = 0.5):
        if not 0.0 <= prob <= 1.0:
            raise AssertionError(f"prob must lie in [0, 1], got {prob}")
        self.tfm_or_aug = tfm_or_aug
        self.prob = prob
        self.aug = as_augmentation(tfm_or_aug)

    def get_transform(self, *args) -> Transform:
        return self.aug.get_transform(*args) if self._happens() else NoOpTransform()

    def __call__(self, aug_input: AugInput) -> Transform:
        return self.aug(aug_input) if self._happens() else NoOpTransform()

    def _happens(self) -> bool:
        return self._rand_range() < self.prob


class RandomFlip(Augmentation):
    """Mirror the image with a probability.

    Args:
        prob: in [0, 1].
        horizontal: left and right change places.
        vertical: top and bottom change places. Exactly one of the two must be set.
    """

    def __init__(self, prob: float = 0.5, *, horizontal: bool = True, vertical: bool = False):
        if bool(horizontal) == bool(vertical):
            raise ValueError("RandomFlip needs exactly one of horizontal and vertical; use two RandomFlip for both")
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        if self._rand_range() >= self.prob:
            return NoOpTransform()
        return HFlipTransform(width) if self.horizontal else VFlipTransform(height)


class Resize(Augmentation):
    """Resize to a fixed size.

    Args:
        shape: (height, width), or one number for both.
        interp: Pillow resampling.
    """

    def __init__(self, shape: int | tuple[int, int], interp: int = BILINEAR):
        shape = (shape, shape) if isinstance(shape, int) else tuple(shape)
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        return ResizeTransform(*image.shape[:2], *self.shape, self.interp)


class ResizeShortestEdge(Augmentation):
    """Resize so that the shorter side gets a given length, unless the longer one would exceed its limit.

    Args:
        short_edge_length: one length; or with "range" the two ends (inclusive) of an interval, with "choice" the
            lengths to choose from. 0 means no change.
        max_size: limit of the longer side; wins over the shorter side.
        sample_style: "range" or "choice".
        interp: Pillow resampling.
    """

    # torch.jit.unused and the missing type hints: torch.jit.script looks at the whole class when code calls
    # get_output_shape
    @torch.jit.unused
    def __init__(self, short_edge_length, max_size=sys.maxsize, sample_style="range", interp=BILINEAR):
        _check_choice("sample_style", sample_style, ("range", "choice"))
        if isinstance(short_edge_length, int):
            short_edge_length = (short_edge_length, short_edge_length)
        if sample_style == "range" and len(short_edge_length) != 2:
            raise ValueError(
                "With sample_style 'range', short_edge_length must be the two ends of an interval, got "
                f"{short_edge_length}"
            )
        self._init(locals())

    @torch.jit.unused
    def get_transform(self, image):
        if self.sample_style == "range":
            length = np.random.randint(self.short_edge_length[0], self.short_edge_length[1] + 1)
        else:
            length = np.random.choice(self.short_edge_length)
        if length == 0:
            return NoOpTransform()
        height, width = image.shape[:2]
        new_height, new_width = self.get_output_shape(height, width, length, self.max_size)
        return ResizeTransform(height, width, new_height, new_width, self.interp)

    @staticmethod
    def get_output_shape(oldh: int, oldw: int, short_edge_length: int, max_size: int) -> tuple[int, int]:
        """Size (height, width) that an image of the old size gets. Can be scripted by torch."""
        shorter = float(short_edge_length)
        longer = shorter / min(oldh, oldw) * max(oldh, oldw)
        if longer > max_size:
            shorter, longer = shorter * (max_size * 1.0 / longer), float(max_size)
        if oldh < oldw:
            return int(shorter + 0.5), int(longer + 0.5)
        return int(longer + 0.5), int(shorter + 0.5)


class ResizeScale(Augmentation):
    """Scale a target box by a random factor and fit the image into it (large scale jitter).

    Source: Ghiasi et al., Simple Copy-Paste (https://arxiv.org/abs/2012.07177), section 3.

    Args:
        min_scale, max_scale: interval of the factor.
        target_height, target_width: box at factor 1.
        interp: Pillow resampling.
    """

    def __init__(
        self, min_scale: float, max_scale: float, target_height: int, target_width: int, interp: int = BILINEAR
    ):
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        return self._get_resize(image, np.random.uniform(self.min_scale, self.max_scale))

    def _get_resize(self, image: np.ndarray, scale: float) -> Transform:
        size = image.shape[:2]
        target = (self.target_height * scale, self.target_width * scale)
        factor = min(target[0] / size[0], target[1] / size[1])
        new_height, new_width = (int(x) for x in np.round(np.multiply(size, factor)))
        return ResizeTransform(*size, new_height, new_width, self.interp)


class RandomResize(Augmentation):
    """Resize to a size chosen at random.

    Args:
        shape_list: sizes (height, width).
        interp: Pillow resampling.
    """

    def __init__(self, shape_list: Sequence[tuple[int, int]], interp: int = BILINEAR):
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = self.shape_list[np.random.choice(len(self.shape_list))]
        return ResizeTransform(*image.shape[:2], height, width, self.interp)


class FixedSizeCrop(Augmentation):
    """Crop what is larger than a fixed size at a random place and pad what is smaller at the right and bottom.

    One random number decides on the place along both axes.

    Args:
        crop_size: (height, width).
        pad: pad smaller images; otherwise they stay smaller.
        pad_value: of the image.
        seg_pad_value: of segmentations.
    """

    def __init__(
        self, crop_size: tuple[int, int], pad: bool = True, pad_value: float = 128.0, seg_pad_value: int = 255
    ):
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> TransformList:
        transforms = [self._get_crop(image)]
        if self.pad:
            transforms.append(self._get_pad(image))
        return TransformList(transforms)

    def _get_crop(self, image: np.ndarray) -> Transform:
        size = np.array(image.shape[:2])
        crop_size = np.minimum(size, self.crop_size)
        y0, x0 = np.round((size - crop_size) * np.random.uniform(0.0, 1.0)).astype(int)
        return CropTransform(int(x0), int(y0), int(crop_size[1]), int(crop_size[0]), int(size[1]), int(size[0]))

    def _get_pad(self, image: np.ndarray) -> Transform:
        height, width = np.minimum(image.shape[:2], self.crop_size)
        bottom, right = self.crop_size[0] - height, self.crop_size[1] - width
        return PadTransform(0, 0, int(right), int(bottom), int(width), int(height), self.pad_value, self.seg_pad_value)


class RandomCrop(Augmentation):
    """Crop a rectangle at a random place.

    Args:
        crop_type: what ``crop_size`` means.
            "relative": shares (height, width) of the image, in (0, 1].
            "relative_range": lower ends of two intervals that end at 1, from which the shares are drawn.
            "absolute": (height, width) in pixels; smaller images are left as they are.
            "absolute_range": (minimum, maximum) in pixels of each side, drawn for each of them.
        crop_size: two numbers.
    """

    def __init__(self, crop_type: str, crop_size: tuple[float, float]):
        _check_choice("crop_type", crop_type, ("relative_range", "relative", "absolute", "absolute_range"))
        if len(crop_size) != 2:
            raise ValueError(f"crop_size must be two numbers, got {crop_size}")
        if crop_type == "absolute_range" and crop_size[0] > crop_size[1]:
            raise ValueError(f"For 'absolute_range', crop_size must be (minimum, maximum), got {crop_size}")
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        crop_height, crop_width = self.get_crop_size((height, width))
        if crop_height > height or crop_width > width:
            raise ValueError(f"Can't crop {crop_height}x{crop_width} from an image of {height}x{width}: {self}")
        y0 = np.random.randint(height - crop_height + 1)
        x0 = np.random.randint(width - crop_width + 1)
        return CropTransform(x0, y0, crop_width, crop_height)

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Draw the size (height, width) of the crop of an image of size (height, width)."""
        height, width = image_size
        first, second = self.crop_size
        if self.crop_type == "absolute":
            return min(first, height), min(second, width)
        if self.crop_type == "absolute_range":
            crop_height = np.random.randint(min(height, first), min(height, second) + 1)
            crop_width = np.random.randint(min(width, first), min(width, second) + 1)
            return crop_height, crop_width
        shares = np.array(self.crop_size, dtype=np.float32)
        if self.crop_type == "relative_range":
            shares = shares + np.random.rand(2) * (1 - shares)
        return _round_half_up(height * shares[0]), _round_half_up(width * shares[1])


class RandomCrop_CategoryAreaConstraint(Augmentation):
    """Like RandomCrop, but tries up to ten times for a crop in which no category covers too much.

    Args:
        crop_type, crop_size: as in RandomCrop.
        single_category_max_area: bound of the share of the largest category; 1 switches the constraint off.
        ignored_category: label that does not count.
    """

    _TRIES = 10

    def __init__(
        self,
        crop_type: str,
        crop_size: tuple[float, float],
        single_category_max_area: float = 1.0,
        ignored_category: int | None = None,
    ):
        self.crop_aug = RandomCrop(crop_type, crop_size)
        self._init(locals())

    def get_transform(self, image: np.ndarray, sem_seg: np.ndarray) -> Transform:
        if self.single_category_max_area >= 1.0:
            return self.crop_aug.get_transform(image)
        for _ in range(self._TRIES):
            crop = self.crop_aug.get_transform(image)
            labels, counts = np.unique(crop.apply_segmentation(sem_seg), return_counts=True)
            if self.ignored_category is not None:
                counts = counts[labels != self.ignored_category]
            if len(counts) > 1 and counts.max() < counts.sum() * self.single_category_max_area:
                break
        return crop


class RandomExtent(Augmentation):
    """Cut out a rectangle of random size and place, which may reach outside of the image.

    Args:
        scale_range: (low, high) of the sides of the rectangle, as share of the image's.
        shift_range: (x, y) largest shift of the middle, as share of the image's sides; half of it to either side.
    """

    def __init__(self, scale_range: tuple[float, float], shift_range: tuple[float, float]):
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        size = np.array([image.shape[1], image.shape[0]], dtype=float)
        scale = np.random.uniform(*self.scale_range)
        shift = np.array([limit * (np.random.rand() - 0.5) for limit in self.shift_range])
        middle = size * (0.5 + shift)
        half = size * scale / 2
        x0, y0, x1, y1 = (*(middle - half), *(middle + half))
        return ExtentTransform(src_rect=(x0, y0, x1, y1), output_size=(int(y1 - y0), int(x1 - x0)))


class RandomRotation(Augmentation):
    """Rotate by a random angle, counter-clockwise.

    Args:
        angle: degrees; with "range" the two ends of an interval, with "choice" the angles to choose from.
        expand: make the output as large as the rotated image.
        center: of the rotation as shares (x, y) of the image; with "range" the two corners of an area
            ((x0, y0), (x1, y1)), with "choice" the points to choose from. Default the middle. Unused with ``expand``.
        sample_style: "range" or "choice".
        interp: OpenCV interpolation.
    """

    def __init__(self, angle, expand: bool = True, center=None, sample_style: str = "range", interp: int | None = None):
        _check_choice("sample_style", sample_style, ("range", "choice"))
        if isinstance(angle, (float, int)):
            angle = (angle, angle)
        if center is not None and isinstance(center[0], (float, int)):
            center = (center, center)
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        center = None
        if self.sample_style == "range":
            angle = np.random.uniform(self.angle[0], self.angle[1])
            if self.center is not None:
                center = [np.random.uniform(self.center[0][axis], self.center[1][axis]) for axis in (0, 1)]
        else:
            angle = np.random.choice(self.angle)
            if self.center is not None:
                center = self.center[np.random.choice(len(self.center))]
        if center is not None:
            center = (width * center[0], height * center[1])
        if angle % 360 == 0:
            return NoOpTransform()
        return RotationTransform(height, width, angle, expand=self.expand, center=center, interp=self.interp)


def _check_rgb(augmentation: Augmentation, image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{type(augmentation).__name__} needs an image of 3 channels, got shape {image.shape}")


class _RandomBlend(Augmentation):
    """Blend with a reference: intensity 1 is the image, 0 the reference, and above 1 leads away from the reference."""

    def __init__(self, intensity_min: float, intensity_max: float):
        self._init(locals())

    def _blend(self, reference: np.ndarray | float) -> Transform:
        intensity = np.random.uniform(self.intensity_min, self.intensity_max)
        return BlendTransform(src_image=reference, src_weight=1 - intensity, dst_weight=intensity)


class RandomContrast(_RandomBlend):
    """Change the contrast: blend with the mean of the image.

    Args:
        intensity_min, intensity_max: interval of the intensity; below 1 less contrast, above 1 more.
    """

    def get_transform(self, image: np.ndarray) -> Transform:
        return self._blend(image.mean())


class RandomBrightness(_RandomBlend):
    """Change the brightness: blend with black.

    Args:
        intensity_min, intensity_max: interval of the intensity; below 1 darker, above 1 brighter.
    """

    def get_transform(self, image: np.ndarray) -> Transform:
        return self._blend(0)


class RandomSaturation(_RandomBlend):
    """Change the saturation of an RGB image: blend with its grey version.

    Args:
        intensity_min, intensity_max: interval of the intensity; below 1 greyer, above 1 more colorful.
    """

    _LUMA = (0.299, 0.587, 0.114)

    def get_transform(self, image: np.ndarray) -> Transform:
        _check_rgb(self, image)
        return self._blend(image.dot(self._LUMA)[:, :, None])


class RandomLighting(Augmentation):
    """Add a random color along the principal components of ImageNet's RGB values.

    Source: Krizhevsky et al., ImageNet Classification with Deep Convolutional Neural Networks, section 4.1. For RGB
    images.

    Args:
        scale: standard deviation of the three weights.
    """

    _COMPONENTS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    _VARIANCES = np.array([0.2175, 0.0188, 0.0045])

    def __init__(self, scale: float):
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        _check_rgb(self, image)
        weights = np.random.normal(scale=self.scale, size=3)
        return BlendTransform(src_image=self._COMPONENTS @ (weights * self._VARIANCES), src_weight=1.0, dst_weight=1.0)


class MinIoURandomCrop(Augmentation):
    """Crop such that every box whose middle stays overlaps the crop by a random minimum IoU.

    Source: Liu et al., SSD (https://arxiv.org/abs/1512.02325), section 2.2.

    Args:
        min_ious: minima to choose from, besides 1 (whole image) and 0 (any crop).
        min_crop_size: smallest side of the crop as share of the image's.
        mode_trials: how many minima to try.
        crop_trials: how many crops to try with each.
    """

    def __init__(
        self,
        min_ious: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
        min_crop_size: float = 0.3,
        mode_trials: int = 1000,
        crop_trials: int = 50,
    ):
        self.sample_mode = (1, *min_ious, 0)
        self._init(locals())

    def get_transform(self, image: np.ndarray, boxes: np.ndarray | None) -> Transform:
        """``boxes``: (N, 4) as x0, y0, x1, y1 in pixels."""
        if boxes is None:
            return NoOpTransform()
        for _ in range(self.mode_trials):
            minimum = np.random.choice(self.sample_mode)
            if minimum == 1:
                return NoOpTransform()
            for _ in range(self.crop_trials):
                window = self._draw_window(*image.shape[:2])
                if window is not None and self._accepts(window, boxes, minimum):
                    x0, y0, width, height = window
                    return CropTransform(int(x0), int(y0), int(width), int(height))
        return NoOpTransform()

    def _draw_window(self, height: int, width: int) -> tuple[float, float, float, float] | None:
        """x0, y0, width, height; None if it is too narrow."""
        crop_width = np.random.uniform(self.min_crop_size * width, width)
        crop_height = np.random.uniform(self.min_crop_size * height, height)
        if not 0.5 <= crop_height / crop_width <= 2:
            return None
        x0 = np.random.uniform(width - crop_width)
        y0 = np.random.uniform(height - crop_height)
        return x0, y0, crop_width, crop_height

    @staticmethod
    def _accepts(window: tuple[float, float, float, float], boxes: np.ndarray, minimum: float) -> bool:
        x0, y0, width, height = window
        rect = (int(x0), int(y0), int(x0 + width), int(y0 + height))
        if rect[0] == rect[2] or rect[1] == rect[3]:
            return False
        if len(boxes) == 0:
            return True
        if pairwise_iou(Boxes([rect]), Boxes(boxes)).min() < minimum:
            return False
        middles = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = (middles > rect[:2]).all(axis=1) & (middles < rect[2:]).all(axis=1)
        return bool(inside.any())
