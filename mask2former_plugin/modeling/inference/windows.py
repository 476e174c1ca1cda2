"""Large images in overlapping windows: where the windows lie, and which objects of neighbouring windows are one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mask2former_plugin.modeling.inference.upsampling import Range, Window

SAME_OBJECT = 0.5  # IoU inside the common part of two windows above which two masks are the same object


@dataclass(frozen=True)
class WindowOptions:
    """How images are cut.

    Attributes:
        size: height and width of a window, in pixels of the network's input.
        overlap: least number of pixels that neighbouring windows share.

    Raises:
        ValueError: the overlap is negative or not smaller than the window.
    """

    size: tuple[int, int]
    overlap: int

    def __post_init__(self) -> None:
        if len(self.size) != 2 or not 0 <= self.overlap < min(self.size):
            raise ValueError(
                "MODEL.MASK_FORMER.TEST.WINDOW.SIZE must be height and width, and OVERLAP at least 0 and less than "
                f"both; got SIZE {list(self.size)} and OVERLAP {self.overlap}"
            )

    @classmethod
    def from_config(cls, cfg: Any) -> WindowOptions | None:
        """From ``MODEL.MASK_FORMER.TEST.WINDOW``; None if it is not enabled."""
        node = cfg.MODEL.MASK_FORMER.TEST.WINDOW
        return cls(tuple(node.SIZE), node.OVERLAP) if node.ENABLED else None


@dataclass(frozen=True)
class Placed:
    """A window with its place among the others.

    Attributes:
        window: ranges in image and result.
        cell: rows and columns of the result that lie nearer to the middle of this window than of any other. Cells
            cover the result once.
        shared: vertically and horizontally, how many pixels of the result this window shares with the one before it
            and with the one behind it.
    """

    window: Window
    cell: tuple[Range, Range]
    shared: tuple[tuple[int, int], tuple[int, int]]


def window_grid(
    image_size: tuple[int, int], output_size: tuple[int, int], options: WindowOptions
) -> list[list[Placed]]:
    """The windows of an image, row by row.

    They have the size asked for, or the image's where it is smaller, and are spread evenly, so that they share at least
    the overlap and none reaches beyond the image. Pixels of the result belong to windows by their centres.
    """
    axes = [
        _axis(image, output, size, options.overlap)
        for image, output, size in zip(image_size, output_size, options.size)
    ]
    return [
        [
            Placed(Window(rows, columns, output_rows, output_columns), (cell_rows, cell_columns), (shared_y, shared_x))
            for columns, output_columns, cell_columns, shared_x in axes[1]
        ]
        for rows, output_rows, cell_rows, shared_y in axes[0]
    ]


def _axis(image: int, output: int, size: int, overlap: int) -> list[tuple[Range, Range, Range, tuple[int, int]]]:
    """Along one axis, the windows' ranges in image and result, their cells, and what they share before and behind."""
    size = min(size, image)
    number = 1 if image <= size else math.ceil((image - overlap) / (size - overlap))
    starts = [round(i * (image - size) / max(1, number - 1)) for i in range(number)]
    sources = [(start, start + size) for start in starts]
    # the centre of pixel y of the result lies at (y + ½) · image / output in the image
    targets = [tuple(max(0, math.ceil(edge * output / image - 0.5)) for edge in source) for source in sources]
    pairs = [(source, target) for source, target in zip(sources, targets) if target[0] < target[1]]
    neighbours = [(before[1], after[0]) for (_, before), (_, after) in zip(pairs, pairs[1:])]
    shared = [0, *(max(0, end - start) for end, start in neighbours), 0]
    edges = [0, *((end + start) // 2 for end, start in neighbours), output]
    return [
        (source, target, (edges[i], edges[i + 1]), (shared[i], shared[i + 1]))
        for i, (source, target) in enumerate(pairs)
    ]


def common_part(first: Window, second: Window) -> tuple[Range, Range] | None:
    """Rows and columns of the result that two windows share; None if there are none."""
    rows = intersection(first.output_rows, second.output_rows)
    columns = intersection(first.output_columns, second.output_columns)
    return None if rows is None or columns is None else (rows, columns)


def intersection(first: Range, second: Range) -> Range | None:
    """What two ranges share; None if that is nothing."""
    start, stop = max(first[0], second[0]), min(first[1], second[1])
    return (start, stop) if start < stop else None


class ObjectGroups:
    """Which objects of several windows are one: pairs are joined, and with them what they were joined with before.

    A group has one object of each window at most: what would bring two of one window together is not joined.
    """

    def __init__(self) -> None:
        self._group: list[int] = []
        self._members: list[list[int]] = []
        self._windows: list[set[int]] = []

    def __len__(self) -> int:
        return len(self._group)

    def add(self, window: int) -> int:
        """A new object of a window, alone; its number."""
        number = len(self._group)
        self._group.append(number)
        self._members.append([number])
        self._windows.append({window})
        return number

    def join(self, first: int, second: int) -> None:
        """Two objects are one, if their windows allow it."""
        keep, drop = sorted((self._group[first], self._group[second]))
        if keep == drop or self._windows[keep] & self._windows[drop]:
            return
        self._windows[keep] |= self._windows[drop]
        self._members[keep] += self._members[drop]
        for member in self._members[drop]:
            self._group[member] = keep
        self._members[drop] = []

    def group_of(self, number: int) -> int:
        """The group of an object: the smallest number in it at the start."""
        return self._group[number]

    def groups(self) -> Iterable[list[int]]:
        """The members of each group, ascending."""
        return (sorted(members) for members in self._members if members)


def best_pairs(
    iou: Sequence[Sequence[float]], classes: tuple[Sequence[int], Sequence[int]], scores: tuple[Sequence[float], ...]
) -> list[tuple[int, int]]:
    """One-to-one pairs of objects of two windows: of one class, IoU above :data:`SAME_OBJECT`, the surest first.

    Args:
        iou: inside the common part, ``[n][m]``.
        classes, scores: of the objects of the first and of the second window.
    """
    allowed = [
        (value * scores[0][i] * scores[1][j], i, j)
        for i, row in enumerate(iou)
        for j, value in enumerate(row)
        if value > SAME_OBJECT and classes[0][i] == classes[1][j]
    ]
    pairs, taken = [], (set(), set())
    for _, i, j in sorted(allowed, key=lambda one: (-one[0], one[1:])):
        if i not in taken[0] and j not in taken[1]:
            pairs.append((i, j))
            taken[0].add(i)
            taken[1].add(j)
    return pairs
