"""Results of a large image from those of its windows, taken in one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import pycocotools.mask
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from mask2former_plugin.modeling.inference.instance import InstanceTask
from mask2former_plugin.modeling.inference.light_outputs import (
    LabelMap,
    RunLengths,
    dense_masks,
    encode_changes,
    without_pairs,
)
from mask2former_plugin.modeling.inference.panoptic import PanopticTask
from mask2former_plugin.modeling.inference.semantic import SemanticTask
from mask2former_plugin.modeling.inference.tasks import Task, full_precision, masks_of_task
from mask2former_plugin.modeling.inference.upsampling import (
    Buffers,
    ImageMasks,
    Range,
    Tiles,
    Window,
    empty_result,
    first_largest,
)
from mask2former_plugin.modeling.inference.windows import (
    ObjectGroups,
    Placed,
    best_pairs,
    common_part,
    intersection,
)
from mask2former_plugin.modeling.layers.products import product

_DUPLICATE = 0.5  # part of a mask in a larger one of its class, seen in another window, from which on it is a duplicate
_PAIRS = 2**22  # of masks, compared at once


class WindowResult(Protocol):
    """A result of the whole image to which the windows are added row by row."""

    name: str

    def add(self, placed: Placed, task: Task, masks: ImageMasks) -> None:
        """Take a window: the task of its part of the result, and the masks of the queries that it needs."""

    def finish(self, row: int) -> None:
        """No more windows will come that begin above a row of the result."""

    def result(self) -> Any:
        """What the task gives of a whole image."""


def infer_in_windows(
    grid: Sequence[Sequence[Placed]],
    predict: Callable[[Window], tuple[Sequence[Task], Tensor, ImageMasks]],
    results: Sequence[WindowResult],
) -> dict[str, Any]:
    """Results of a large image by name.

    Args:
        grid: its windows, see :func:`window_grid`.
        predict: gives the tasks of a window, the queries that any of them needs, and their masks.
        results: one for each task, in their order.
    """
    for row, following in zip(grid, [*grid[1:], None]):
        for placed in row:
            tasks, queries, masks = predict(placed.window)
            with full_precision(masks.device):
                for result, task in zip(results, tasks):
                    result.add(placed, task, masks_of_task(task, queries, masks))
        end = row[0].window.output_rows[1] if following is None else following[0].window.output_rows[0]
        with full_precision(masks.device):
            for result in results:
                result.finish(end)
    return {result.name: result.result() for result in results}


class SemanticWindows:
    """Class scores averaged where windows overlap.

    The weight of a window rises and falls linearly over what it shares with its neighbours, so that the scores change
    gradually from one window to the next. Masks of two rows of windows are kept on the grid of the prediction; scores
    exist in tiles, unless they are the result.

    Args:
        size: height and width of the result.
        label_map: give the classes with the largest scores.
    """

    name = "sem_seg"

    def __init__(self, size: tuple[int, int], *, label_map: bool) -> None:
        self._size = size
        self._label_map = label_map
        self._result: Tensor | None = None
        self._open: list[tuple[Placed, Tensor, ImageMasks]] = []
        self._done = 0

    def add(self, placed: Placed, task: SemanticTask, masks: ImageMasks) -> None:
        """Take a window."""
        if self._result is None:
            self._buffers = Buffers(masks.device)
            if self._label_map:
                self._result = torch.empty(self._size, dtype=torch.int64, device=masks.device)
            else:
                self._result = empty_result((len(task.weights), *self._size), task.weights.dtype, masks.device)
        self._open.append((placed, task.weights, masks))

    def finish(self, row: int) -> None:
        """Compute the result above a row."""
        tiles = Tiles.of((row - self._done, self._size[1]), self._result.device, all_masks=True)
        for (top, bottom), columns in tiles:
            self._average((top + self._done, bottom + self._done), columns, tiles.tile)
        self._done = row
        self._open = [one for one in self._open if one[0].window.output_rows[1] > row]

    def _average(self, rows: Range, columns: Range, tile: tuple[int, int]) -> None:
        target = self._result[..., slice(*rows), slice(*columns)]
        number, dtype = len(self._open[0][1]), self._open[0][1].dtype
        total = self._buffers("total", (number, *target.shape[-2:]), dtype).zero_()
        weight_sum = total.new_zeros(target.shape[-2:])
        for placed, weights, masks in self._open:
            window = placed.window
            ranges = [intersection(*one) for one in zip((rows, columns), (window.output_rows, window.output_columns))]
            if None in ranges:
                continue
            own = shifted(ranges, (window.output_rows[0], window.output_columns[0]))
            probability = masks.block(*own, buffers=self._buffers).sigmoid_()
            # oneDNN keeps 0.6 MB for each new shape, and windows cut tiles into many
            multiply = product if probability.shape[1:] == tile else torch.mm
            scores = multiply(weights, probability.flatten(1)).view(-1, *probability.shape[1:])
            vertical, horizontal = (
                axis_weights(length, *shared, scores)[slice(*part)]
                for length, shared, part in zip(window.output_size, placed.shared, own)
            )
            weight = vertical[:, None] * horizontal
            place = tuple(slice(*part) for part in shifted(ranges, (rows[0], columns[0])))
            total[(slice(None), *place)] += scores.mul_(weight)
            weight_sum[place] += weight
        # a pixel has the same weights in all classes: the largest mean is that of the largest sum
        target.copy_(first_largest(total) if self._label_map else total.div_(weight_sum))

    def result(self) -> Tensor:
        """Scores ``[K, H, W]`` or a :class:`LabelMap` ``[H, W]``."""
        return self._result.as_subclass(LabelMap) if self._label_map else self._result


def axis_weights(length: int, before: int, behind: int, like: Tensor) -> Tensor:
    """Weights of the rows or columns of a window.

    They rise linearly over what it shares with the window before it, fall over what it shares with the one behind it,
    and are 1 between them.
    """
    position = torch.arange(length, dtype=like.dtype, device=like.device) + 0.5
    weights = torch.ones_like(position)
    if before:
        weights = torch.minimum(weights, position / before)
    if behind:
        weights = torch.minimum(weights, (length - position) / behind)
    return weights


class PanopticWindows:
    """Segments merged across windows.

    Every pixel gets the segment that it has in the window whose middle is nearest. Stuff of one class is one segment.
    Things of two windows are one object if they are of one class and their IoU inside the common part of the windows is
    above one half. What gets no pixels is no segment.

    Args:
        size: height and width of the result.
        device: of the maps.
    """

    name = "panoptic_seg"

    def __init__(self, size: tuple[int, int], device: torch.device) -> None:
        self._map = torch.zeros(size, dtype=torch.int32, device=device)  # 0 is void, k + 1 the k-th segment of a window
        self._groups = ObjectGroups()
        self._infos: list[dict[str, Any]] = []
        self._stuff: dict[int, int] = {}
        self._open: list[tuple[Placed, Tensor, list[int]]] = []
        self._number = 0

    def add(self, placed: Placed, task: PanopticTask, masks: ImageMasks) -> None:
        """Take a window."""
        ids, segments = task.run(masks)
        numbers = [self._new(segment) for segment in segments]
        window = placed.window
        meaning = ids.new_zeros(len(segments) + 1)
        meaning[[segment["id"] for segment in segments]] = ids.new_tensor(numbers) + 1
        # positions in the list of segments from 1 on, whatever their ids are
        order = ids.new_zeros(len(segments) + 1)
        order[[segment["id"] for segment in segments]] = torch.arange(
            1, len(segments) + 1, dtype=ids.dtype, device=ids.device
        )
        (top, bottom), (left, right) = placed.cell
        own = ids[_inside(placed.cell, window)]
        self._map[top:bottom, left:right] = meaning[own.long()]
        local = order[ids.long()]
        for other, other_local, other_numbers in self._open:
            self._compare(other, other_local, other_numbers, placed, local, numbers)
        self._open.append((placed, local, numbers))
        self._number += 1

    def _new(self, segment: dict[str, Any]) -> int:
        category = segment["category_id"]
        if not segment["isthing"] and category in self._stuff:
            return self._stuff[category]
        number = self._groups.add(self._number)
        self._infos.append({"isthing": segment["isthing"], "category_id": category})
        if not segment["isthing"]:
            self._stuff[category] = number
        return number

    def _compare(
        self, first: Placed, first_ids: Tensor, first_numbers: list[int],
        second: Placed, second_ids: Tensor, second_numbers: list[int],
    ) -> None:  # fmt: skip
        common = common_part(first.window, second.window)
        if common is None or not first_numbers or not second_numbers:
            return
        a, b = first_ids[_inside(common, first.window)], second_ids[_inside(common, second.window)]
        width = len(second_numbers) + 1
        shape = (len(first_numbers) + 1, width)
        pixels = torch.bincount((a.long() * width + b).flatten(), minlength=shape[0] * width).view(shape).double()
        intersection = pixels[1:, 1:]
        union = pixels[1:].sum(1, keepdim=True) + pixels[:, 1:].sum(0) - intersection
        iou = (intersection / union.clamp(min=1)).tolist()
        classes = [
            # stuff is one segment already
            [i["category_id"] if i["isthing"] else -1 - side for i in map(self._infos.__getitem__, numbers)]
            for side, numbers in enumerate((first_numbers, second_numbers))
        ]
        ones = ([1.0] * len(first_numbers), [1.0] * len(second_numbers))
        for i, j in best_pairs(iou, tuple(classes), ones):
            self._groups.join(first_numbers[i], second_numbers[j])

    def finish(self, row: int) -> None:
        """No more windows will come that begin above a row of the result."""
        self._open = [one for one in self._open if one[0].window.output_rows[1] > row]

    def result(self) -> tuple[Tensor, list[dict[str, Any]]]:
        """Ids ``[H, W]`` int32, 0 = void; per segment ``id``, ``isthing`` and ``category_id``."""
        bands = Tiles.of(tuple(self._map.shape), self._map.device).rows
        areas = torch.zeros(len(self._groups) + 1, dtype=torch.int64, device=self._map.device)
        for start, stop in bands:
            areas += torch.bincount(self._map[start:stop].flatten(), minlength=len(areas))
        area_of = areas[1:].tolist()
        final = torch.zeros(len(areas), dtype=torch.int32)
        segments: list[dict[str, Any]] = []
        for members in self._groups.groups():
            if any(area_of[member] for member in members):
                final[[member + 1 for member in members]] = len(segments) + 1
                segments.append({"id": len(segments) + 1, **self._infos[members[0]]})
        final = final.to(self._map.device)
        for start, stop in bands:
            band = self._map[start:stop]
            band.copy_(final[band.long()])
        return self._map, segments


def _inside(part: tuple[Range, Range], window: Window) -> tuple[slice, ...]:
    """A part of the result in a window's own part of it."""
    return tuple(slice(*one) for one in shifted(part, (window.output_rows[0], window.output_columns[0])))


def shifted(part: Sequence[Range], corner: tuple[int, int]) -> list[Range]:
    """Ranges counted from a corner on."""
    return [(start - first, stop - first) for (start, stop), first in zip(part, corner)]


class InstanceWindows:
    """Instances merged across windows; masks are run lengths all the time.

    Instances of two windows are one object if they are of one class and the IoU of what the masks have in the common
    part of the windows is above one half. In the cell of a window, where it is the nearest, it decides alone about the
    objects that it has seen; elsewhere the mask of an object is the union of its parts. Its score is their mean,
    weighted by area. What lies for more than half in a larger object of its class that another window has seen is a
    duplicate, and left out; so are empty masks.

    Args:
        size: height and width of the result.
        top_k: instances that are kept, those with the largest scores.
        encoded: give run lengths.
        device: of the results.
    """

    name = "instances"

    def __init__(self, size: tuple[int, int], *, top_k: int, encoded: bool, device: torch.device) -> None:
        self._size, self._top_k, self._encoded, self._device = size, top_k, encoded, device
        self._groups = ObjectGroups()
        self._codes: list[dict[str, Any]] = []
        self._scores: list[float] = []
        self._classes: list[int] = []
        self._window_of: list[int] = []
        self._windows: list[tuple[Placed, list[int]]] = []

    def add(self, placed: Placed, task: InstanceTask, masks: ImageMasks) -> None:
        """Take a window: the task gives run lengths of the size of the whole result."""
        instances = task.run(masks)
        codes = list(instances.pred_masks_rle)
        areas = _areas(codes)
        members = []
        for code, area, score, label in zip(codes, areas, instances.scores.tolist(), instances.pred_classes.tolist()):
            if area:
                members.append(self._groups.add(len(self._windows)))
                self._codes.append(code)
                self._scores.append(score)
                self._classes.append(label)
                self._window_of.append(len(self._windows))
        for other, other_members in self._windows:
            self._compare(common_part(other.window, placed.window), other_members, members)
        self._windows.append((placed, members))

    def finish(self, row: int) -> None:
        """Run lengths are small: nothing to give up."""

    def _compare(self, common: tuple[Range, Range] | None, first: list[int], second: list[int]) -> None:
        if common is None:
            return
        part = rectangle(self._size, *common)
        sides = []
        for members in (first, second):
            cut = [pycocotools.mask.merge([self._codes[m], part], intersect=True) for m in members]
            areas = _areas(cut)
            sides.append([(m, c) for m, c, area in zip(members, cut, areas) if area])
        if not all(sides):
            return
        iou = pycocotools.mask.iou([c for _, c in sides[0]], [c for _, c in sides[1]], [0] * len(sides[1])).tolist()
        classes, scores = (
            tuple([values[m] for m, _ in side] for side in sides) for values in (self._classes, self._scores)
        )
        for i, j in best_pairs(iou, classes, scores):
            self._groups.join(sides[0][i][0], sides[1][j][0])

    def result(self) -> Instances:
        """The best first: ``pred_masks`` or ``pred_masks_rle``, ``pred_boxes``, ``scores`` and ``pred_classes``."""
        merged = [self._merged(members) for members in self._groups.groups()]
        codes, scores, classes, seen_by = ([one[i] for one in merged] for i in range(4))
        keep = sorted(_without_duplicates(codes, classes, seen_by), key=lambda i: -scores[i])[: self._top_k]
        codes = [codes[i] for i in keep]
        boxes = np.array([pycocotools.mask.toBbox(code) for code in codes]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances(self._size)
        if self._encoded:
            instances.pred_masks_rle = RunLengths(
                {"size": list(self._size), "counts": _text(code["counts"])} for code in codes
            )
        else:
            instances.pred_masks = dense_masks(codes, self._size).to(self._device)
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32, device=self._device))
        instances.scores = torch.tensor([scores[i] for i in keep], device=self._device)
        instances.pred_classes = torch.tensor([classes[i] for i in keep], dtype=torch.int64, device=self._device)
        return instances

    def _merged(self, members: list[int]) -> tuple[dict[str, Any], float, int, set[int]]:
        """Mask, score, class and windows of an object."""
        seen_by = {self._window_of[m] for m in members}
        if len(members) == 1:
            return self._codes[members[0]], self._scores[members[0]], self._classes[members[0]], seen_by
        parts = []
        for member in members:
            cells = [self._windows[window][0].cell for window in seen_by - {self._window_of[member]}]
            rest = outside(self._size, cells)
            parts.append(pycocotools.mask.merge([self._codes[member], rest], intersect=True))
        areas = _areas(parts)
        # if nothing is left of any part, all of them lie in the cells of the others
        if not areas.sum():
            parts = [self._codes[member] for member in members]
            areas = _areas(parts)
        score = float(np.average([self._scores[member] for member in members], weights=areas))
        return pycocotools.mask.merge(parts), score, self._classes[members[0]], seen_by


def _areas(codes: Sequence[dict[str, Any]]) -> np.ndarray:
    """Pixels of each mask, int64; one by one, since pycocotools with NumPy 2 takes no more than 255 at once."""
    return np.array([pycocotools.mask.area(code) for code in codes], dtype=np.int64)


def rectangle(size: tuple[int, int], rows: Range, columns: Range) -> dict[str, Any]:
    """Run lengths of a mask that is a rectangle."""
    return encode_changes(_edges(size, [(rows, columns)]), size)


def outside(size: tuple[int, int], rectangles: Sequence[tuple[Range, Range]]) -> dict[str, Any]:
    """Run lengths of what disjoint rectangles leave of an image."""
    edges = _edges(size, rectangles)
    edges = edges[1:] if len(edges) and edges[0] == 0 else np.concatenate([[0], edges])
    return encode_changes(edges, size)


def _edges(size: tuple[int, int], rectangles: Sequence[tuple[Range, Range]]) -> np.ndarray:
    """Where runs down the columns begin and end; the cells of windows that are less than a pixel apart are empty."""
    filled = [(rows, columns) for rows, columns in rectangles if rows[0] < rows[1]]
    ends = [(np.arange(*columns)[:, None] * size[0] + np.array(rows)).ravel() for rows, columns in filled]
    return without_pairs(np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *ends])))


def _text(counts: str | bytes) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def _without_duplicates(
    codes: Sequence[dict[str, Any]], classes: Sequence[int], seen_by: Sequence[set[int]]
) -> list[int]:
    """Positions of the masks that don't lie for more than half in a larger one of their class from other windows."""
    keep = []
    for label in sorted(set(classes)):
        positions = np.array([i for i, one in enumerate(classes) if one == label])
        group = [codes[i] for i in positions]
        area = _areas(group)
        windows = np.zeros((len(group), 1 + max(max(seen_by[i]) for i in positions)), dtype=np.float32)
        for row, i in zip(windows, positions):
            row[list(seen_by[i])] = 1
        duplicate = np.zeros(len(group), dtype=bool)
        step = max(1, _PAIRS // len(group))
        for part in (slice(start, start + step) for start in range(0, len(group), step)):
            # for a crowd, pycocotools gives the intersection over the area of the other mask
            inside = pycocotools.mask.iou(group[part], group, [1] * len(group))
            elsewhere = windows[part] @ windows.T == 0
            duplicate[part] = ((inside > _DUPLICATE) & (area > area[part, None]) & elsewhere).any(1)
        keep += positions[~duplicate].tolist()
    return sorted(keep)
