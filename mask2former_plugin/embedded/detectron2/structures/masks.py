"""Masks of the objects of one image, as bitmaps or as polygons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch

from detectron2.structures.boxes import Boxes
from detectron2.utils.missing import needs_upstream


def polygon_area(x: np.ndarray, y: np.ndarray) -> float:
    """Area of a polygon without self-intersection (shoelace formula), in square pixels."""
    return 0.5 * abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))))


def polygons_to_bitmask(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Rasterise the union of polygons ``[x0, y0, x1, y1, …]`` as COCO does.

    Returns:
        bool array (height, width).
    """
    if len(polygons) == 0:
        return np.zeros((height, width), dtype=bool)
    encoded = mask_util.frPyObjects([np.asarray(polygon, dtype=np.float64) for polygon in polygons], height, width)
    return mask_util.decode(mask_util.merge(encoded)).astype(bool)


class BitMasks:
    """N masks of one image as bitmaps.

    Attributes:
        tensor: bool tensor (N, H, W).
    """

    def __init__(self, tensor: torch.Tensor | np.ndarray):
        tensor = torch.as_tensor(tensor).to(torch.bool)
        assert tensor.dim() == 3, f"bit masks have the shape (N, H, W), got {tuple(tensor.shape)}"
        self.image_size = tensor.shape[1:]
        self.tensor = tensor

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def to(self, *args: Any, **kwargs: Any) -> BitMasks:
        """The same masks after ``tensor.to(…)``."""
        return BitMasks(self.tensor.to(*args, **kwargs))

    def __getitem__(self, item: int | slice | list | np.ndarray | torch.Tensor) -> BitMasks:
        """Masks chosen by an int (giving one mask), slice, list, mask or index tensor."""
        if isinstance(item, (int, np.integer)):
            return BitMasks(self.tensor[item].unsqueeze(0))
        chosen = self.tensor[item]
        assert chosen.dim() == 3, (
            f"indexing {len(self)} masks gave the shape {tuple(chosen.shape)} instead of (N, H, W)"
        )
        return BitMasks(chosen)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """One bool tensor (H, W) per mask."""
        yield from self.tensor

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __repr__(self) -> str:
        return f"BitMasks(num_instances={len(self)})"

    def nonempty(self) -> torch.Tensor:
        """Bool (N,): the mask has a pixel."""
        return self.tensor.flatten(1).any(dim=1)

    def get_bounding_boxes(self) -> Boxes:
        """Smallest boxes around the masks, right and bottom exclusive; (0, 0, 0, 0) for an empty mask."""
        height, width = self.image_size
        if self.tensor.numel() == 0:
            return Boxes(torch.zeros(len(self), 4, device=self.device))
        columns, rows = self.tensor.any(dim=1), self.tensor.any(dim=2)
        # Weights count the distance to the far side for the first pixel, and from the near side for the last.
        right = (columns * torch.arange(1, width + 1, device=self.device)).amax(dim=1)
        left = width - (columns * torch.arange(width, 0, -1, device=self.device)).amax(dim=1)
        bottom = (rows * torch.arange(1, height + 1, device=self.device)).amax(dim=1)
        top = height - (rows * torch.arange(height, 0, -1, device=self.device)).amax(dim=1)
        boxes = torch.stack((left, top, right, bottom), dim=1)
        return Boxes(boxes * (right > 0)[:, None])

    @staticmethod
    def from_polygon_masks(polygon_masks: PolygonMasks | list[list[np.ndarray]], height: int, width: int) -> BitMasks:
        """Rasterise polygons (one list per object) onto an image of the given size."""
        if isinstance(polygon_masks, PolygonMasks):
            polygon_masks = polygon_masks.polygons
        bitmaps = [polygons_to_bitmask(polygons, height, width) for polygons in polygon_masks]
        return BitMasks(np.stack(bitmaps) if bitmaps else np.zeros((0, height, width), dtype=bool))

    @staticmethod
    def from_roi_masks(roi_masks: Any, height: int, width: int) -> BitMasks:
        needs_upstream("BitMasks.from_roi_masks (masks relative to boxes)")

    def crop_and_resize(self, boxes: torch.Tensor, mask_size: int) -> torch.Tensor:
        needs_upstream("BitMasks.crop_and_resize (training targets of Mask R-CNN)")

    @staticmethod
    def cat(bitmasks_list: list[BitMasks]) -> BitMasks:
        """All masks of a list in one; all of one image size."""
        assert len(bitmasks_list) > 0, "need at least one BitMasks to join"
        return BitMasks(torch.cat([masks.tensor for masks in bitmasks_list], dim=0))


class PolygonMasks:
    """N masks of one image as polygons.

    Attributes:
        polygons: per object a list of float64 arrays ``[x0, y0, x1, y1, …]`` in pixels, whose union is the mask.
    """

    def __init__(self, polygons: list[list[np.ndarray | torch.Tensor | Sequence[float]]]):
        """
        Raises:
            ValueError: not a list of lists of polygons, or a polygon with fewer than 3 points or half a point.
        """
        if not isinstance(polygons, list):
            raise ValueError(
                f"PolygonMasks takes a list with a list of polygons per object, got {type(polygons).__name__}"
            )
        self.polygons: list[list[np.ndarray]] = [_checked_polygons(of_object) for of_object in polygons]

    @property
    def device(self) -> torch.device:
        """Polygons are always on the CPU."""
        return torch.device("cpu")

    def to(self, *args: Any, **kwargs: Any) -> PolygonMasks:
        """Itself: polygons are always on the CPU."""
        return self

    def __getitem__(self, item: int | slice | list | np.ndarray | torch.Tensor) -> PolygonMasks:
        """Masks chosen by an int (giving one mask), slice, list, mask or index tensor."""
        if isinstance(item, (int, np.integer)):
            return PolygonMasks([self.polygons[item]])
        if isinstance(item, slice):
            return PolygonMasks(self.polygons[item])
        index = torch.as_tensor(item).cpu()
        if index.numel() and (index.dim() != 1 or index.is_floating_point()):
            raise ValueError(f"polygon masks take a 1-D index or mask, got {tuple(index.shape)} of {index.dtype}")
        if index.dtype != torch.bool:
            index = index.long()
        return PolygonMasks([self.polygons[i] for i in torch.arange(len(self))[index].tolist()])

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        """One list of polygons per mask."""
        return iter(self.polygons)

    def __len__(self) -> int:
        return len(self.polygons)

    def __repr__(self) -> str:
        return f"PolygonMasks(num_instances={len(self)})"

    def nonempty(self) -> torch.Tensor:
        """Bool (N,): the object has a polygon."""
        return torch.tensor([len(polygons) > 0 for polygons in self.polygons], dtype=torch.bool)

    def get_bounding_boxes(self) -> Boxes:
        """Smallest boxes around the polygons; (0, 0, 0, 0) for an object without polygons."""
        boxes = np.zeros((len(self), 4), dtype=np.float32)
        for box, polygons in zip(boxes, self.polygons):
            if polygons:
                points = np.concatenate(polygons).reshape(-1, 2)
                box[:2], box[2:] = points.min(axis=0), points.max(axis=0)
        return Boxes(torch.from_numpy(boxes))

    def area(self) -> torch.Tensor:
        """Sum of the polygon areas of each object, float64 (N,); overlaps of its polygons count twice."""
        areas = [sum(polygon_area(polygon[0::2], polygon[1::2]) for polygon in polygons) for polygons in self.polygons]
        return torch.tensor(areas, dtype=torch.float64)

    def crop_and_resize(self, boxes: torch.Tensor, mask_size: int) -> torch.Tensor:
        needs_upstream("PolygonMasks.crop_and_resize (training targets of Mask R-CNN)")

    @staticmethod
    def cat(polymasks_list: list[PolygonMasks]) -> PolygonMasks:
        """All masks of a list in one."""
        assert len(polymasks_list) > 0, "need at least one PolygonMasks to join"
        return PolygonMasks([polygons for masks in polymasks_list for polygons in masks.polygons])


def _checked_polygons(polygons: Any) -> list[np.ndarray]:
    if not isinstance(polygons, list):
        raise ValueError(f"the masks of an object are a list of polygons, got {type(polygons).__name__}")
    arrays = []
    for polygon in polygons:
        if isinstance(polygon, torch.Tensor):
            polygon = polygon.cpu().numpy()
        array = np.array(polygon, dtype=np.float64)
        if array.ndim != 1 or array.size < 6 or array.size % 2:
            raise ValueError(f"a polygon is a flat list of at least 3 points x, y, got the shape {array.shape}")
        arrays.append(array)
    return arrays
