"""Transforms that fvcore lacks: resize, rotate, cut out a rectangle that may reach outside, change colors."""

from __future__ import annotations

from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.transforms.transform import CropTransform, NoOpTransform, Transform, TransformList
from PIL import Image

__all__ = ["ExtentTransform", "ResizeTransform", "RotationTransform", "ColorTransform", "PILColorTransform"]

_TORCH_MODES = {
    Image.Resampling.NEAREST: "nearest",
    Image.Resampling.BILINEAR: "bilinear",
    Image.Resampling.BICUBIC: "bicubic",
}


def _per_plane(operation: Callable[[Image.Image], Image.Image], image: np.ndarray) -> np.ndarray:
    """Apply a Pillow operation to a uint8 image of shape (H, W) or (H, W, C) with any C.

    2 and 4 channels go one by one: Pillow would take the last one for transparency and weight the others with it.
    """
    if image.ndim == 2 or image.shape[2] == 3:
        return np.asarray(operation(Image.fromarray(np.ascontiguousarray(image))))
    planes = [
        np.asarray(operation(Image.fromarray(np.ascontiguousarray(image[:, :, c])))) for c in range(image.shape[2])
    ]
    return np.stack(planes, axis=2)


class ExtentTransform(Transform):
    """Cut out a rectangle, which may reach outside of the image, and resize it.

    Args:
        src_rect: (x0, y0, x1, y1) in pixels of the input.
        output_size: (height, width).
        interp: Pillow resampling of the image; segmentations are always sampled with nearest.
        fill: value outside of the image.
    """

    def __init__(self, src_rect, output_size, interp=Image.Resampling.BILINEAR, fill=0):
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Image (uint8) of shape (H, W) or (H, W, C) to ``output_size``."""
        height, width = self.output_size
        method = self.interp if interp is None else interp

        def cut(plane: Image.Image) -> Image.Image:
            return plane.transform(
                (width, height),
                Image.Transform.EXTENT,
                data=self.src_rect,
                resample=method,
                fill=True,
                fillcolor=self.fill,
            )

        return _per_plane(cut, img)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Points (N, 2) as x, y."""
        x0, y0, x1, y1 = self.src_rect
        height, width = self.output_size
        scale = np.array([width / (x1 - x0), height / (y1 - y0)])
        return ((coords - np.array([x0, y0])) * scale).astype("float32")

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self.apply_image(segmentation, interp=Image.Resampling.NEAREST)


class ResizeTransform(Transform):
    """Resize from (h, w) to (new_h, new_w).

    Images of dtype uint8 are resampled by Pillow (antialiased), all others by torch. The two also place the samples of
    *nearest* differently. Published models were trained with label maps as float (torch's grid) and panoptic PNGs as
    uint8 (Pillow's grid), so both grids stay: uint8 and bool take Pillow's, every other dtype (integers of any size are
    exact) torch's, where integers come to lie as float64 does.

    Args:
        h, w: size of the input.
        new_h, new_w: size of the output.
        interp: Pillow resampling of the image (default bilinear).
    """

    def __init__(self, h: int, w: int, new_h: int, new_w: int, interp: int | None = None):
        super().__init__()
        if interp is None:
            interp = Image.Resampling.BILINEAR
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Image of shape (h, w) or (h, w, C) to (new_h, new_w[, C]), dtype kept.

        Raises:
            ValueError: the image has another size, or the resampling does not exist for this dtype.
        """
        if img.shape[:2] != (self.h, self.w) or img.ndim not in (2, 3):
            raise ValueError(
                f"This ResizeTransform is for images of height {self.h} and width {self.w}, got an array of shape "
                f"{img.shape}"
            )
        method = Image.Resampling(self.interp if interp is None else interp)
        if img.dtype == np.uint8:
            return _per_plane(lambda plane: plane.resize((self.new_w, self.new_h), method), img)
        if img.dtype == bool:
            return self.apply_image(img.view(np.uint8), Image.Resampling.NEAREST).view(bool)
        if method == Image.Resampling.NEAREST:
            # torch's rounding depends on the type of the values; labels are float64 in published pipelines
            dtype = torch.float32 if img.dtype == np.float32 else torch.float64
            rows, cols = _torch_nearest_indices((self.h, self.w), (self.new_h, self.new_w), dtype)
            return img[rows[:, None], cols[None, :]]
        return self._interpolate(img, method)

    def _interpolate(self, img: np.ndarray, method: Image.Resampling) -> np.ndarray:
        if method not in _TORCH_MODES:
            raise ValueError(
                f"Images of dtype {img.dtype} can't be resized with {method.name}; use BILINEAR or BICUBIC"
            )
        is_integer = np.issubdtype(img.dtype, np.integer)
        values = np.ascontiguousarray(img, dtype=np.float64 if is_integer else None)
        planes = torch.from_numpy(values).reshape(self.h, self.w, -1).permute(2, 0, 1)[None]
        planes = F.interpolate(planes, (self.new_h, self.new_w), mode=_TORCH_MODES[method], align_corners=False)
        result = planes[0].permute(1, 2, 0).reshape(self.new_h, self.new_w, *img.shape[2:]).numpy()
        if is_integer:
            limits = np.iinfo(img.dtype)
            result = result.round().clip(limits.min, limits.max).astype(img.dtype)
        return result

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Scale points (N, 2) given as x, y in place, as all transforms of fvcore do: integer arrays stay integer."""
        coords[:, 0] = coords[:, 0] * (self.new_w / self.w)
        coords[:, 1] = coords[:, 1] * (self.new_h / self.h)
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self.apply_image(segmentation, interp=Image.Resampling.NEAREST)

    def inverse(self) -> ResizeTransform:
        return ResizeTransform(self.new_h, self.new_w, self.h, self.w, self.interp)


def _torch_nearest_indices(
    size: tuple[int, int], new_size: tuple[int, int], dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the input that torch's ``nearest`` for images of this type takes for those of the output.

    torch's kernels for small and for large outputs round differently, hence positions at the output's full size.
    """
    rows = torch.arange(size[0], dtype=dtype)[None, None, :, None]
    cols = torch.arange(size[1], dtype=dtype)[None, None, None, :]
    rows, cols = (F.interpolate(x, new_size, mode="nearest")[0, 0].long().numpy() for x in (rows, cols))
    return rows[:, 0], cols[0]


class RotationTransform(Transform):
    """Rotate counter-clockwise. Needs OpenCV.

    Args:
        h, w: size of the input.
        angle: in degrees.
        expand: make the output as large as the rotated image, otherwise keep the size.
        center: (x, y) to rotate about; default the middle. Has no effect with ``expand``.
        interp: OpenCV interpolation of the image (default linear).
    """

    def __init__(self, h: int, w: int, angle: float, expand: bool = True, center=None, interp: int | None = None):
        super().__init__()
        middle = np.array((w / 2, h / 2))
        if center is None:
            center = middle
        radians = np.deg2rad(angle)
        abs_cos, abs_sin = abs(np.cos(radians)), abs(np.sin(radians))
        if expand:
            bound_w, bound_h = np.rint([h * abs_sin + w * abs_cos, h * abs_cos + w * abs_sin]).astype(int)
        else:
            bound_w, bound_h = w, h
        self._set_attributes(locals())
        self.rm_coords = self.create_rotation_matrix()
        # coordinates are of pixel corners, OpenCV wants pixel centers
        self.rm_image = self.create_rotation_matrix(offset=-0.5)

    def create_rotation_matrix(self, offset: float = 0) -> np.ndarray:
        """Affine matrix of shape (2, 3); ``offset`` is where the top left corner of the image lies on both axes."""
        import cv2

        center = [float(c + offset) for c in self.center]
        matrix = cv2.getRotationMatrix2D(center, float(self.angle), 1.0)
        if self.expand:
            # where the middle of the image comes to lie, against the middle of the output
            moved = matrix @ np.append(self.middle + offset, 1)
            matrix[:, 2] += np.array([self.bound_w / 2, self.bound_h / 2]) + offset - moved
        return matrix

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Image of shape (h, w) or (h, w, C); black where the rotated image does not reach."""
        import cv2

        if img.size == 0 or self.angle % 360 == 0:
            return img
        if img.shape[:2] != (self.h, self.w):
            raise ValueError(
                f"This RotationTransform is for images of height {self.h} and width {self.w}, got an array of shape "
                f"{img.shape}"
            )
        if interp is None:
            interp = cv2.INTER_LINEAR if self.interp is None else self.interp
        return cv2.warpAffine(img, self.rm_image, (int(self.bound_w), int(self.bound_h)), flags=interp)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Points (N, 2) as x, y."""
        coords = np.asarray(coords, dtype=float)
        if len(coords) == 0 or self.angle % 360 == 0:
            return coords
        return coords @ self.rm_coords[:, :2].T + self.rm_coords[:, 2]

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Nearest neighbour; void areas are 0."""
        import cv2

        return self.apply_image(segmentation, interp=cv2.INTER_NEAREST)

    def inverse(self) -> TransformList:
        """Rotate back and cut the original size out of the middle.

        Raises:
            NotImplementedError: without ``expand``, since corners are lost.
        """
        if not self.expand:
            raise NotImplementedError("RotationTransform has an inverse only with expand=True")
        back = RotationTransform(self.bound_h, self.bound_w, -self.angle, True, None, self.interp)
        x0, y0 = (back.bound_w - self.w) // 2, (back.bound_h - self.h) // 2
        return TransformList([back, CropTransform(x0, y0, self.w, self.h)])


class ColorTransform(Transform):
    """Change colors only: a function of the image array; coordinates and segmentations stay.

    Args:
        op: takes and returns an image array.
    """

    def __init__(self, op: Callable[[np.ndarray], np.ndarray]):
        if not callable(op):
            raise ValueError("op must be callable")
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return self.op(img)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation

    def inverse(self) -> Transform:
        """Does nothing: lost colors don't come back, and nothing else has changed."""
        return NoOpTransform()


class PILColorTransform(ColorTransform):
    """A ColorTransform whose function takes and returns a Pillow image.

    Args:
        op: for example ``PIL.ImageOps.autocontrast`` or ``PIL.ImageEnhance.Color(...).enhance``.
    """

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return np.asarray(super().apply_image(Image.fromarray(img)))
