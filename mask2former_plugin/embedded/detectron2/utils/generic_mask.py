"""A mask in whichever form is wanted: pixels or outlines."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import pycocotools.mask as mask_util


class GenericMask:
    """A mask from whatever it comes as: an array (H, W), a run-length code, or polygons (flat x, y lists)."""

    def __init__(self, mask_or_polygons, height: int, width: int) -> None:
        self.height = height
        self.width = width
        self._mask = self._polygons = self._has_holes = None
        if isinstance(mask_or_polygons, dict):
            code = mask_or_polygons
            if isinstance(code["counts"], list):
                code = mask_util.frPyObjects(code, *code["size"])
            mask_or_polygons = mask_util.decode(code)
        if isinstance(mask_or_polygons, list):
            self._polygons = [np.asarray(polygon).reshape(-1) for polygon in mask_or_polygons]
            self._has_holes = False
        elif isinstance(mask_or_polygons, np.ndarray):
            if mask_or_polygons.shape != (height, width):
                raise ValueError(f"a mask has shape {mask_or_polygons.shape}, the image is {(height, width)}")
            self._mask = (mask_or_polygons != 0).astype(np.uint8)
        else:
            raise TypeError(f"a mask must be an array, a run-length code or polygons, not {type(mask_or_polygons)}")

    @property
    def mask(self) -> np.ndarray:
        """(H, W) uint8, 0 or 1."""
        if self._mask is None:
            self._mask = self.polygons_to_mask(self._polygons)
        return self._mask

    @property
    def polygons(self) -> list[np.ndarray]:
        """Outlines (of holes, too) as flat x, y arrays in continuous coordinates: pixel centres lie at .5."""
        if self._polygons is None:
            self._polygons, self._has_holes = self.mask_to_polygons(self._mask)
        return self._polygons

    @property
    def has_holes(self) -> bool:
        if self._has_holes is None:
            self._polygons, self._has_holes = self.mask_to_polygons(self._mask)
        return self._has_holes

    def mask_to_polygons(self, mask: np.ndarray) -> tuple[list[np.ndarray], bool]:
        contours, hierarchy = cv2.findContours(np.ascontiguousarray(mask), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[-2:]
        if hierarchy is None:
            return [], False
        polygons = []
        for contour in contours:
            if len(contour) >= 3:
                polygons.append(contour.reshape(-1).astype(np.float64) + 0.5)
            else:  # one or two pixels: their squares, so that tiny objects don't vanish
                x, y, w, h = cv2.boundingRect(contour)
                polygons.append(np.array([x, y, x + w, y, x + w, y + h, x, y + h], dtype=np.float64))
        return polygons, bool((hierarchy.reshape(-1, 4)[:, 3] >= 0).any())

    def polygons_to_mask(self, polygons: Sequence[np.ndarray]) -> np.ndarray:
        usable = [polygon.tolist() for polygon in polygons if len(polygon) >= 6]
        if not usable:
            return np.zeros((self.height, self.width), dtype=np.uint8)
        return mask_util.decode(mask_util.merge(mask_util.frPyObjects(usable, self.height, self.width)))

    def area(self) -> int:
        """Number of pixels."""
        return int(self.mask.sum())

    def bbox(self) -> np.ndarray:
        """XYXY around the pixels, (4,); zeros if there is none."""
        box = mask_util.toBbox(mask_util.encode(np.asfortranarray(self.mask)))
        box[2:] += box[:2]
        return box
