"""Maps at full size, a tile at a time: bilinear resizing as small matrix products, and bounds that need no pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

# Height and width of a tile, and of one in which all masks are computed. On a CPU small tiles stay in the cache and
# tell more precisely where a mask may be; a GPU wants more work per kernel.
_TILE = {"cpu": ((96, 256), (32, 128))}
_TILE_GPU = ((512, 512), (512, 512))
# Values of all masks in one piece of a tile: few enough for the cache of a CPU and for the memory of a GPU.
_VALUES = {"cpu": 2**21}
_VALUES_GPU = 2**26
# Bounds are widened by this part of the largest logit; rounding carries a resized value less far over its neighbours.
_ROUNDING = 1e-5

Range = tuple[int, int]


class Buffers:
    """Scratch memory by name, allocated once and used for every tile: fresh pages cost more than the arithmetic."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flat: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor that is valid until the next call with this name."""
        number = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.dtype != dtype or flat.numel() < number:
            flat = self._flat[name] = torch.empty(number, dtype=dtype, device=self._device)
        return flat[:number].view(*shape)


@dataclass(frozen=True)
class Tiles:
    """A map cut into tiles, row by row; iterating gives the ranges of rows and columns of each.

    Attributes:
        size: height and width of the map.
        tile: height and width of a tile, smaller at the end.
    """

    size: tuple[int, int]
    tile: tuple[int, int]

    @classmethod
    def of(cls, size: tuple[int, int], device: torch.device, *, all_masks: bool = False) -> Tiles:
        """Tiles that suit a device, for some of the masks in each tile or for all of them."""
        return cls(tuple(size), _TILE.get(device.type, _TILE_GPU)[all_masks])

    @cached_property
    def rows(self) -> list[Range]:
        """Ranges of rows."""
        return _ranges(self.size[0], self.tile[0])

    @cached_property
    def columns(self) -> list[Range]:
        """Ranges of columns."""
        return _ranges(self.size[1], self.tile[1])

    @property
    def areas(self) -> Tensor:
        """Numbers of pixels of the tiles, int64."""
        return torch.tensor([(bottom - top) * (right - left) for (top, bottom), (left, right) in self])

    def __iter__(self) -> Iterator[tuple[Range, Range]]:
        return ((rows, columns) for rows in self.rows for columns in self.columns)


def pieces(rows: Range, columns: Range, maps: int, device: torch.device) -> Iterator[Range]:
    """Ranges that cover the rows of a tile, short enough that some maps of one stay small."""
    values = _VALUES.get(device.type, _VALUES_GPU)
    step = max(1, values // max(1, maps * (columns[1] - columns[0])))
    number = max(1, -(-(rows[1] - rows[0]) // step))
    edges = [rows[0] + (rows[1] - rows[0]) * i // number for i in range(number + 1)]
    return zip(edges, edges[1:])


@dataclass(frozen=True)
class Window:
    """A part of an image and the part of the result that belongs to it.

    Attributes:
        rows, columns: ranges in the image as the network gets it.
        output_rows, output_columns: ranges in the result.
    """

    rows: Range
    columns: Range
    output_rows: Range
    output_columns: Range

    @property
    def axes(self) -> tuple[tuple[Range, Range], tuple[Range, Range]]:
        """Vertically and horizontally, the range in the image and the one in the result."""
        return (self.rows, self.output_rows), (self.columns, self.output_columns)

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of its part of the result."""
        return self.output_rows[1] - self.output_rows[0], self.output_columns[1] - self.output_columns[0]


def _ranges(length: int, step: int) -> list[Range]:
    return [(start, min(start + step, length)) for start in range(0, length, step)]


class AxisResize:
    """``interpolate(mode="bilinear", align_corners=False)`` along one axis, in one step or several.

    Args:
        steps: source and target length of each step. A source that is shorter than the target before it crops that.
        dtype: of the maps.
        window: of the source and of the target of the last step only these ranges are there; the source goes on with
            its last values.
    """

    def __init__(
        self,
        steps: Sequence[tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        window: tuple[Range, Range] | None = None,
    ) -> None:
        self._steps = [_positions(source, target, dtype) for source, target in steps]
        if window is not None:
            (start, stop), target = window
            lower, upper, weight = (part[slice(*target)] for part in self._steps[-1])
            self._steps[-1] = (lower.clamp(start, stop - 1) - start, upper.clamp(start, stop - 1) - start, weight)
        self._dtype = dtype
        self._weights: dict[tuple[Range, torch.device], tuple[Range, Tensor]] = {}

    def weights(self, target: Range, device: torch.device) -> tuple[Range, Tensor]:
        """What a range of target positions is made of.

        Returns:
            The range of source positions, and the weights ``[target positions, source positions]``.
        """
        key = (target, device)
        if key not in self._weights:
            source, weights = self._compose(len(self._steps), target)
            self._weights[key] = source, weights.to(device)
        return self._weights[key]

    def _compose(self, steps: int, target: Range) -> tuple[Range, Tensor]:
        if steps == 0:
            return target, torch.eye(target[1] - target[0], dtype=self._dtype)
        lower, upper, weight = (part[slice(*target)] for part in self._steps[steps - 1])
        first = int(lower[0])
        source, inner = self._compose(steps - 1, (first, int(upper[-1]) + 1))
        return source, torch.lerp(inner[lower - first], inner[upper - first], weight[:, None])


def _positions(source: int, target: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The two neighbours of each target position and the weight of the second."""
    if source == target:
        same = torch.arange(target)
        return same, same, torch.zeros(target, dtype=dtype)
    # as interpolate: the scale in the precision of the maps, the position as a fused multiply-add
    scale = torch.tensor(source / target, dtype=dtype).double()
    position = ((torch.arange(target, dtype=torch.float64) + 0.5) * scale - 0.5).clamp(min=0).to(dtype)
    lower = position.long().clamp(max=source - 1)
    return lower, (lower + 1).clamp(max=source - 1), (position - lower).clamp(0, 1)


def resize_block(maps: Tensor, rows: Tensor, columns: Tensor, out: Tensor | None = None) -> Tensor:
    """Maps ``[N, h, w]`` times weights of rows ``[H, h]`` and of columns ``[W, w]``, ``[N, H, W]``.

    Args:
        out: for the result, contiguous.
    """
    # columns first: there are fewer rows to treat before they are resized than after
    wide = torch.mm(maps.flatten(0, 1), columns.T).view(*maps.shape[:2], len(columns))
    return torch.bmm(rows.expand(len(maps), -1, -1), wide, out=out)


def _finite(logits: Tensor) -> Tensor:
    """The logits with large numbers in the place of infinite ones, which weights of 0 would make NaN all over a tile."""
    if not logits.numel() or not torch.stack(logits.aminmax()).isinf().any():
        return logits
    limit = torch.finfo(logits.dtype).max / 4
    return logits.clamp(-limit, limit)


class ImageMasks:
    """Mask logits of one image at the size of the result, in tiles.

    The logits are resized from the grid of the prediction to the padded input, cropped to the image and resized to
    the output: the original's steps. All of them are linear in rows and in columns, so that a tile is two small matrix
    products, and what nobody asks for is not computed.

    Args:
        logits: ``[Q, h, w]`` on the grid of the prediction.
        padded_size: height and width of the padded input batch.
        image_size: height and width of the image inside it.
        output_size: height and width of the result; by default ``image_size``.
        window: the logits are of this part of the image only; then so is the result.
    """

    def __init__(
        self,
        logits: Tensor,
        padded_size: tuple[int, int],
        image_size: tuple[int, int],
        output_size: tuple[int, int] | None = None,
        window: Window | None = None,
    ) -> None:
        self.logits = _finite(logits if logits.dtype == torch.float64 else logits.float())
        output_size = output_size or image_size
        windows = window.axes if window is not None else (None, None)
        self._rows, self._columns = (
            AxisResize([(grid, padded), (image, output)], self.logits.dtype, part)
            for grid, padded, image, output, part in zip(
                logits.shape[-2:], padded_size, image_size, output_size, windows
            )
        )
        self.size = tuple(output_size) if window is None else window.output_size

    @property
    def device(self) -> torch.device:
        """Where the logits are."""
        return self.logits.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return self.logits.dtype

    def select(self, queries: Tensor) -> ImageMasks:
        """The masks of some of the queries."""
        chosen = object.__new__(ImageMasks)
        vars(chosen).update(vars(self), logits=self.logits[queries])
        return chosen

    def block(
        self, rows: Range, columns: Range, queries: Tensor | None = None, buffers: Buffers | None = None
    ) -> Tensor:
        """Logits of a part of the result, ``[Q, rows, columns]``.

        Args:
            rows, columns: ranges.
            queries: which; None: all.
            buffers: memory for the result, under the name "block".
        """
        row_source, row_weights = self._rows.weights(rows, self.device)
        number = len(self.logits) if queries is None else len(queries)
        shape = (number, rows[1] - rows[0], columns[1] - columns[0])
        if buffers is None:
            block = self.logits.new_empty(shape)
        else:
            block = buffers("block", shape, self.dtype)
        column_source, column_weights = self._columns.weights(columns, self.device)
        maps = self.logits[:, slice(*row_source), slice(*column_source)]
        return resize_block(maps if queries is None else maps[queries], row_weights, column_weights, block)

    def pixels(self, rows: Range, columns: Range, places: Tensor) -> Tensor:
        """Logits of single pixels of a part of the result, ``[Q, n]``.

        Args:
            rows, columns: ranges.
            places: int64 ``[n]``, positions in the part, row by row.
        """
        row_source, row_weights = self._rows.weights(rows, self.device)
        column_source, column_weights = self._columns.weights(columns, self.device)
        y, x = places // len(column_weights), places % len(column_weights)
        maps = self.logits[:, slice(*row_source), slice(*column_source)].flatten(1)
        weights = row_weights[y][:, :, None] * column_weights[x][:, None]
        return maps @ weights.flatten(1).T

    def bounds(self, row_ranges: Sequence[Range], column_ranges: Sequence[Range]) -> tuple[Tensor, Tensor]:
        """Values that the logits do not fall below or exceed in blocks of the result, two times ``[Q, blocks]``.

        They lie on the CPU. A resized value is a weighted mean of its neighbours on the grid, so it lies between them.

        Args:
            row_ranges, column_ranges: the blocks are all their pairs, row by row.
        """
        lows, highs = [], []
        column_sources = [self._columns.weights(columns, self.device)[0] for columns in column_ranges]
        for rows in row_ranges:
            band = self.logits[:, slice(*self._rows.weights(rows, self.device)[0])]
            low, high = band.amin(1), band.amax(1)
            lows += [low[:, slice(*columns)].amin(1) for columns in column_sources]
            highs += [high[:, slice(*columns)].amax(1) for columns in column_sources]
        slack = _ROUNDING * torch.stack(self.logits.aminmax()).abs().amax() if len(self.logits) else 0.0
        return (torch.stack(lows, dim=1) - slack).cpu(), (torch.stack(highs, dim=1) + slack).cpu()


def empty_result(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for a large result."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    # NumPy, other than torch, asks for huge pages: the kernel hands out and zeroes fewer than a hundredth as many
    memory = np.empty(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(*shape) if len(memory) else torch.empty(shape, dtype=dtype)


def first_largest(values: Tensor, numbers: Tensor | None = None) -> Tensor:
    """``argmax(0)`` of ``[N, …]``, the first of equal ones, 0 where there is NaN; the values are used up.

    Args:
        numbers: int64 ``[N]``, ascending; given in the place of 0 … N-1.
    """
    if values.device.type != "cpu":
        best = values.argmax(0)
        return best if numbers is None else numbers[best]
    if numbers is None:
        numbers = torch.arange(len(values))
    # on the CPU torch's argmax takes many times as long as these passes
    end = int(numbers[-1]) + 1
    rank = (end - numbers).to(values.dtype).view(-1, *[1] * (values.ndim - 1))
    best = torch.eq(values, values.amax(0), out=values).mul_(rank).amax(0)
    # NaN equals nothing, not even itself
    return torch.where(best > 0, end - best, numbers[0].to(best.dtype)).long()
