"""Ground-truth masks as they come: binary, unpadded, read as if padded with zeros to the size of the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former_plugin.modeling.point_sampling import bilinear_corners, sample_rows

_BITS = 8  # masks to a byte


class RunLengthMasks:
    """Binary masks of one image as run lengths: kilobytes where bool masks take a byte per pixel.

    Pixels are counted down the columns, as in COCO; a mask is runs of zeros, ones, zeros, …; of each its end is kept.
    Works as ``gt_masks`` of Detectron2's ``Instances``.

    Attributes:
        ends: int32 ``[R]``, the ends of the runs of all masks, one mask after the other; each ends at height·width.
        starts: where the runs of each mask begin in ``ends``, and behind them R.
        size: height and width.
    """

    def __init__(self, ends: Tensor, starts: Sequence[int], size: tuple[int, int]) -> None:
        self.ends = ends
        self.starts = tuple(starts)
        self.size = (int(size[0]), int(size[1]))

    @classmethod
    def from_coco(cls, encoded: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> RunLengthMasks:
        """From COCO's encodings, ``{"size": [height, width], "counts": compressed string, bytes or list of lengths}``.

        Args:
            encoded: one for each mask.
            size: height and width of the image.

        Raises:
            ValueError: a mask has another size, or runs that don't fill it.
        """
        pixels = size[0] * size[1]
        pieces: list[np.ndarray] = []
        for number, mask in enumerate(encoded):
            if tuple(mask["size"]) != tuple(size):
                raise ValueError(
                    f"mask {number} is encoded for {mask['size'][0]}x{mask['size'][1]} pixels (height x width), "
                    f"the image has {size[0]}x{size[1]}"
                )
            counts = mask["counts"]
            runs = _uncompressed(counts) if isinstance(counts, (str, bytes)) else np.asarray(counts, dtype=np.int64)
            ends = runs.cumsum()
            if (runs < 0).any() or ends[-1:].sum() != pixels:
                raise ValueError(f"mask {number}: its runs are not a division of {size[0]}x{size[1]} pixels")
            pieces.append(ends)
        starts = np.cumsum([0] + [len(ends) for ends in pieces])
        joined = np.concatenate([np.zeros(0, dtype=np.int64), *pieces]).astype(np.int32)
        return cls(torch.from_numpy(joined), starts.tolist(), size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of masks, height and width, like that of the masks as a tensor."""
        return len(self), *self.size

    @property
    def device(self) -> torch.device:
        """Where the runs are and the masks will be."""
        return self.ends.device

    def __len__(self) -> int:
        return len(self.starts) - 1

    def to(self, *args: Any, **kwargs: Any) -> RunLengthMasks:
        """The same masks on another device, see :meth:`torch.Tensor.to`."""
        return RunLengthMasks(self.ends.to(*args, **kwargs), self.starts, self.size)

    def __getitem__(self, chosen: int | slice | Sequence[int] | Tensor | np.ndarray) -> RunLengthMasks:
        """Some of the masks, chosen as from a list, or by an array of indices or of one bool per mask."""
        numbers = np.atleast_1d(np.arange(len(self))[chosen.cpu().numpy() if isinstance(chosen, Tensor) else chosen])
        pieces = [self.ends[self.starts[i] : self.starts[i + 1]] for i in numbers]
        starts = np.cumsum([0] + [len(ends) for ends in pieces])
        return RunLengthMasks(torch.cat([self.ends[:0], *pieces]), starts.tolist(), self.size)

    def decode(self) -> Tensor:
        """The masks as uint8 of 0 and 1, ``[n, h, w]``, in memory column by column."""
        number, pixels = len(self), self.size[0] * self.size[1]
        lengths = np.diff(self.starts)
        if self.device.type == "cpu":
            ends = self.ends.numpy().astype(np.int64)
            runs = np.diff(ends, prepend=0)
            first = np.asarray(self.starts[:-1], dtype=np.int64)
            runs[first] = ends[first]
            value = (np.arange(len(ends)) - first.repeat(lengths)).astype(np.uint8) & 1
            maps = torch.from_numpy(value.repeat(runs))
        else:
            maps = self._decode_on_device(lengths, pixels)
        return maps.view(number, self.size[1], self.size[0]).transpose(1, 2)

    def _decode_on_device(self, lengths: np.ndarray, pixels: int) -> Tensor:
        """All masks, ``[n, pixels]``: +1 where ones begin, −1 where they end, summed up; only counts are copied."""
        number = len(self)
        mask_of_run = np.repeat(np.arange(number), lengths)
        sign = 1 - 2 * ((np.arange(len(mask_of_run)) - np.asarray(self.starts[:-1])[mask_of_run]) % 2)
        host = torch.from_numpy(np.stack([mask_of_run * (pixels + 1), sign]))
        first, change = host.to(self.device, non_blocking=True)
        changes = torch.zeros(number * (pixels + 1), dtype=torch.int8, device=self.device)
        changes.scatter_add_(0, first + self.ends, change.to(torch.int8))
        return changes.view(number, -1)[:, :pixels].cumsum(1, dtype=torch.int8).view(torch.uint8)


Masks = Union[Tensor, RunLengthMasks]


class PackedMasks:
    """Masks of one image with a bit per pixel, the bits of a pixel side by side: one look-up reads eight masks.

    Args:
        masks: ``[n, h, w]``; what is not 0 is inside.
    """

    def __init__(self, masks: Masks) -> None:
        self.number, self.size = masks.shape[0], (masks.shape[1], masks.shape[2])
        self._by_column = isinstance(masks, RunLengthMasks)
        planes = []
        for start in range(0, self.number, _BITS):
            some = decoded(masks, slice(start, start + _BITS))
            some = (some.transpose(1, 2) if self._by_column else some).flatten(1)
            plane = some[0].clone()
            for bit in range(1, len(some)):
                plane.add_(some[bit], alpha=1 << bit)
            planes.append(plane)
        self._words = _side_by_side(planes) if planes else torch.zeros((0, 0), dtype=torch.int64)

    def sample(self, points: Tensor, padded_size: tuple[int, int]) -> Tensor:
        """Values of all masks at the same points: bilinear, zero outside; ``[P, 2]`` to ``[P, N]``.

        N is the number of masks rounded up to whole bytes; the columns behind the masks are zero.
        """
        height, width = self.size
        columns = _BITS * math.ceil(self.number / _BITS)
        if not (columns and height and width):
            return points.new_zeros((len(points), columns))
        steps = (1, height) if self._by_column else (width, 1)
        index, weights = bilinear_corners(points, self.size, padded_size, steps)
        # memory is asked for words: eight times as fast as for bytes
        corners = self._words.index_select(0, index.flatten()).view(torch.uint8).unflatten(0, (-1, 4))
        corners = corners[:, :, : columns // _BITS].transpose(1, 2).int()  # [P, bytes, 4]
        weights = weights[:, None].expand(corners.shape).flatten(0, 1)
        # a byte is looked up as eight zeros and ones
        bits = (torch.arange(256, device=points.device)[:, None] >> torch.arange(_BITS, device=points.device)) & 1
        return sample_rows(bits.to(points.dtype), corners.flatten(0, 1), weights).view(len(points), columns)


def _side_by_side(planes: Sequence[Tensor]) -> Tensor:
    """Planes of bytes ``[P]`` as integers of as few bytes as possible, or several of the largest, ``[P, words]``."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    size = next((size for size in words if size >= len(planes)), 8)
    missing = -len(planes) % size
    return torch.stack([*planes, *[torch.zeros_like(planes[0])] * missing], dim=1).view(words[size])


def decoded(masks: Masks, chosen: slice | Sequence[int] | Tensor) -> Tensor:
    """Some masks as uint8 of 0 and 1, ``[k, h, w]``."""
    some = masks[chosen]
    if isinstance(some, RunLengthMasks):
        return some.decode()
    return (some if some.dtype == torch.bool else some != 0).view(torch.uint8)


def sample_mask(mask: Tensor, points: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """Values of one mask at points, bilinear, zero outside: ``grid_sample(align_corners=False)`` of the padded mask.

    Args:
        mask: ``[h, w]`` of zeros and ones.
        points: (x, y) in [0, 1] of the padded size, ``[m, P, 2]``.
        padded_size: height and width that the mask would have after padding right and bottom.

    Returns:
        ``[m, P]`` in the dtype of the points.
    """
    if not (mask.numel() and points.numel()):
        return points.new_zeros(points.shape[:2])
    stretch = [padded / length for padded, length in zip(padded_size, mask.shape)]
    if stretch == [1, 1]:
        grid = 2 * points - 1
    else:
        grid = torch.stack((points[..., 0] * (2 * stretch[1]) - 1, points[..., 1] * (2 * stretch[0]) - 1), dim=2)
    maps = mask.to(points.dtype).expand(len(points), 1, -1, -1)
    return F.grid_sample(maps, grid.unsqueeze(1), align_corners=False)[:, 0, 0]


def resize_masks(masks: Masks, size: tuple[int, int], padded_size: tuple[int, int]) -> Tensor:
    """The padded masks at another size, bool ``[n, *size]``; nearest neighbour, without a padded copy."""
    height, width = masks.shape[-2:]
    rows, columns = (_nearest(padded, target, masks.device) for padded, target in zip(padded_size, size))
    inside = (rows < height)[:, None] & (columns < width)
    rows, columns = rows.clamp(max=height - 1), columns.clamp(max=width - 1)
    resized = torch.empty((masks.shape[0], *size), dtype=torch.bool, device=masks.device)
    for start in range(0, masks.shape[0], _BITS):
        some = decoded(masks, slice(start, start + _BITS))
        resized[start : start + _BITS] = some[:, rows][:, :, columns] * inside
    return resized


def common_size(masks: Sequence[Masks]) -> tuple[int, int]:
    """The smallest size that holds all the masks."""
    return max(m.shape[-2] for m in masks), max(m.shape[-1] for m in masks)


def _nearest(source: int, target: int, device: torch.device) -> Tensor:
    """Index of the source pixel of each target pixel, asked of ``interpolate`` itself so that rounding is the same."""
    positions = torch.arange(source, dtype=torch.float32, device=device)
    return F.interpolate(positions[None, None], size=target, mode="nearest")[0, 0].long()


def _uncompressed(counts: str | bytes) -> np.ndarray:
    """Run lengths from COCO's compressed string.

    A number is written in groups of five bits, the least first, each in a character from 48 on; the sixth bit says that
    another group follows, the fifth bit of the last group is the sign. From the fourth number on, the difference to the
    last but one is written.
    """
    groups = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, dtype=np.uint8) - 48
    last = np.flatnonzero(~groups & 32)
    first = np.concatenate(([0], last[:-1] + 1))
    place = 5 * (np.arange(len(groups)) - first.repeat(last - first + 1))
    if not len(last):
        return np.zeros(0, dtype=np.int64)
    numbers = np.add.reduceat((groups & 31).astype(np.int64) << place, first)
    numbers -= np.where(groups[last] & 16, np.int64(1) << (place[last] + 5), 0)
    for parity in (1, 2):
        numbers[parity::2] = numbers[parity::2].cumsum()
    return numbers
