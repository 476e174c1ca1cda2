"""Axis-aligned boxes: the coordinate conventions, a container, and pairwise measures.

No ``from __future__ import annotations`` here: TorchScript reads the annotations of ``Boxes``.
"""

from enum import IntEnum, unique
from typing import Any, List, Tuple, Union

import numpy as np
import torch

RawBoxes = Union[List[float], Tuple[float, ...], np.ndarray, torch.Tensor]


@unique
class BoxMode(IntEnum):
    """What the four (or five) numbers of a box mean. An int, so that it survives JSON."""

    XYXY_ABS = 0
    """Left, top, right, bottom in pixels."""
    XYWH_ABS = 1
    """Left, top, width, height in pixels (COCO)."""
    XYXY_REL = 2
    """Left, top, right, bottom as fractions of the image size; a name only, cannot be converted."""
    XYWH_REL = 3
    """Left, top, width, height as fractions of the image size; a name only, cannot be converted."""
    XYWHA_ABS = 4
    """Centre x, centre y, width, height in pixels and counter-clockwise angle in degrees."""

    @staticmethod
    def convert(box: RawBoxes, from_mode: "BoxMode", to_mode: "BoxMode") -> RawBoxes:
        """Convert between absolute modes.

        Args:
            box: one box as list or tuple of 4 (5 with an angle) numbers, or array or tensor of shape (..., 4 or 5).

        Returns:
            The same type (and dtype); the input is left untouched. XYWHA becomes the box around the rotated box.

        Raises:
            AssertionError: wrong number of coordinates, or a relative mode.
            NotImplementedError: a pair of modes without a conversion.
        """
        if from_mode == to_mode:
            return box
        from_mode, to_mode = BoxMode(from_mode), BoxMode(to_mode)
        for mode in (from_mode, to_mode):
            assert mode not in (BoxMode.XYXY_REL, BoxMode.XYWH_REL), (
                f"cannot convert {mode.name}: relative boxes need the image size; scale them to pixels first"
            )
        length = 5 if from_mode == BoxMode.XYWHA_ABS else 4
        if isinstance(box, (list, tuple)):
            assert len(box) == length and np.ndim(box) == 1, (
                f"a {from_mode.name} box as list or tuple has {length} numbers, got {box!r}"
            )
            return type(box)(_convert_array(np.asarray(box), from_mode, to_mode).tolist())
        assert box.shape[-1] == length, (
            f"{from_mode.name} boxes have {length} numbers, got the shape {tuple(box.shape)}"
        )
        return _convert_array(box, from_mode, to_mode)


def _convert_array(
    box: Union[np.ndarray, torch.Tensor], from_mode: BoxMode, to_mode: BoxMode
) -> Union[np.ndarray, torch.Tensor]:
    is_tensor = isinstance(box, torch.Tensor)
    lib = torch if is_tensor else np
    pair = (from_mode, to_mode)
    if pair in ((BoxMode.XYXY_ABS, BoxMode.XYWH_ABS), (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)):
        out = box.clone() if is_tensor else box.copy()
        if to_mode == BoxMode.XYXY_ABS:
            out[..., 2:] += out[..., :2]
        else:
            out[..., 2:] -= out[..., :2]
        return out
    # Centres and angles need fractions even where the boxes are integers.
    x, y, width, height = (box[..., i] * 1.0 for i in range(4))
    if pair == (BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS):
        columns = [x + width / 2, y + height / 2, width, height, width * 0]
    elif pair == (BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS):
        angle = lib.deg2rad(box[..., 4] * 1.0)
        cos, sin = lib.abs(lib.cos(angle)), lib.abs(lib.sin(angle))
        half_width, half_height = (cos * width + sin * height) / 2, (sin * width + cos * height) / 2
        columns = [x - half_width, y - half_height, x + half_width, y + half_height]
    else:
        raise NotImplementedError(f"no conversion from {from_mode.name} to {to_mode.name}")
    out = lib.stack(columns, -1)
    return out.to(box.dtype) if is_tensor else out.astype(box.dtype)


class Boxes:
    """N boxes (left, top, right, bottom) in pixels.

    Attributes:
        tensor: float32 tensor of shape (N, 4).
    """

    def __init__(self, tensor: torch.Tensor):
        """``tensor``: anything that ``torch.as_tensor`` takes, of shape (N, 4), or empty."""
        if not isinstance(tensor, torch.Tensor):
            tensor = torch.as_tensor(tensor, dtype=torch.float32)
        else:
            tensor = tensor.to(torch.float32)
        if tensor.numel() == 0:
            tensor = tensor.reshape(0, 4)
        assert tensor.dim() == 2 and tensor.size(1) == 4, f"boxes have the shape (N, 4), got {tensor.size()}"
        self.tensor = tensor

    def clone(self) -> "Boxes":
        """A copy with memory of its own."""
        return Boxes(self.tensor.clone())

    def to(self, device: torch.device) -> "Boxes":
        """The same boxes on ``device``."""
        return Boxes(self.tensor.to(device=device))

    def area(self) -> torch.Tensor:
        """Width times height, shape (N,)."""
        box = self.tensor
        return (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])

    def clip(self, box_size: Tuple[int, int]) -> None:
        """Limit the coordinates, in place, to an image of ``(height, width)``.

        Raises:
            AssertionError: a coordinate is infinite or NaN.
        """
        assert bool(torch.isfinite(self.tensor).all()), "boxes contain infinite or NaN coordinates"
        height, width = box_size
        x = self.tensor[:, 0::2].clamp(min=0, max=width)
        y = self.tensor[:, 1::2].clamp(min=0, max=height)
        self.tensor = torch.stack((x[:, 0], y[:, 0], x[:, 1], y[:, 1]), dim=-1)

    def nonempty(self, threshold: float = 0.0) -> torch.Tensor:
        """Bool (N,): width and height are both above ``threshold``."""
        box = self.tensor
        return (box[:, 2] - box[:, 0] > threshold) & (box[:, 3] - box[:, 1] > threshold)

    @torch.jit.unused
    def __getitem__(self, item: Any) -> "Boxes":
        """Boxes chosen by an int (giving one box), slice, list, mask or index tensor."""
        if isinstance(item, (int, np.integer)):
            return Boxes(self.tensor[item].view(1, 4))
        chosen = self.tensor[item]
        assert chosen.dim() == 2, f"indexing {len(self)} boxes with {item} does not give a list of boxes"
        return Boxes(chosen)

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __repr__(self) -> str:
        return "Boxes(" + str(self.tensor) + ")"

    def inside_box(self, box_size: Tuple[int, int], boundary_threshold: int = 0) -> torch.Tensor:
        """Bool (N,): inside an image of ``(height, width)`` that is enlarged by ``boundary_threshold`` pixels."""
        height, width = box_size
        box = self.tensor
        return (
            (box[:, 0] >= -boundary_threshold)
            & (box[:, 1] >= -boundary_threshold)
            & (box[:, 2] < width + boundary_threshold)
            & (box[:, 3] < height + boundary_threshold)
        )

    def get_centers(self) -> torch.Tensor:
        """Centres (x, y), shape (N, 2)."""
        return (self.tensor[:, :2] + self.tensor[:, 2:]) / 2

    def scale(self, scale_x: float, scale_y: float) -> None:
        """Multiply the coordinates, in place."""
        self.tensor[:, 0::2] *= scale_x
        self.tensor[:, 1::2] *= scale_y

    @classmethod
    def cat(cls, boxes_list: List["Boxes"]) -> "Boxes":
        """All boxes of a list in one; an empty list gives no boxes."""
        if len(boxes_list) == 0:
            return cls(torch.empty(0, 4))
        return cls(torch.cat([boxes.tensor for boxes in boxes_list], dim=0))

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @torch.jit.unused
    def __iter__(self):  # without a return type: TorchScript has no iterators and refuses even the annotation
        """One tensor of shape (4,) per box."""
        yield from self.tensor


def pairwise_intersection(boxes1: Boxes, boxes2: Boxes) -> torch.Tensor:
    """Areas that N and M boxes share, shape (N, M)."""
    first, second = boxes1.tensor[:, None], boxes2.tensor[None]
    top_left = torch.max(first[..., :2], second[..., :2])
    bottom_right = torch.min(first[..., 2:], second[..., 2:])
    return (bottom_right - top_left).clamp_(min=0).prod(dim=2)


def _ratio_or_zero(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """The quotient; 0 where nothing is shared, whatever the denominator."""
    return torch.where(numerator > 0, numerator / denominator, numerator.new_zeros(()))


def pairwise_iou(boxes1: Boxes, boxes2: Boxes) -> torch.Tensor:
    """Intersection over union of N and M boxes, shape (N, M); 0 for boxes without area."""
    shared = pairwise_intersection(boxes1, boxes2)
    return _ratio_or_zero(shared, boxes1.area()[:, None] + boxes2.area() - shared)


def pairwise_ioa(boxes1: Boxes, boxes2: Boxes) -> torch.Tensor:
    """Intersection over the area of the second box, shape (N, M); 0 for boxes without area."""
    return _ratio_or_zero(pairwise_intersection(boxes1, boxes2), boxes2.area())


def pairwise_point_box_distance(points: torch.Tensor, boxes: Boxes) -> torch.Tensor:
    """Distances of points (N, 2) to left, top, right and bottom of M boxes, shape (N, M, 4); all >= 0 means inside."""
    point = points[:, None]
    return torch.cat((point - boxes.tensor[:, :2], boxes.tensor[:, 2:] - point), dim=2)


def matched_pairwise_iou(boxes1: Boxes, boxes2: Boxes) -> torch.Tensor:
    """Intersection over union of N boxes with N others, one by one, shape (N,); 0 for boxes without area."""
    assert len(boxes1) == len(boxes2), f"need as many boxes as boxes, got {len(boxes1)} and {len(boxes2)}"
    top_left = torch.max(boxes1.tensor[:, :2], boxes2.tensor[:, :2])
    bottom_right = torch.min(boxes1.tensor[:, 2:], boxes2.tensor[:, 2:])
    shared = (bottom_right - top_left).clamp_(min=0).prod(dim=1)
    return _ratio_or_zero(shared, boxes1.area() + boxes2.area() - shared)
