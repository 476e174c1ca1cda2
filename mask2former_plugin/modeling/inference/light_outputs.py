"""Small forms of results that are large otherwise: a class map for class scores, run lengths for masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pycocotools.mask
import torch
from torch import Tensor


class LabelMap(Tensor):
    """Classes of the pixels, int64 ``[H, W]``, where otherwise scores ``[K, H, W]`` are expected.

    It is a tensor of classes like any other. Only ``argmax(dim=0)``, which an evaluator of scores takes first, gives
    what it would give of the scores: the classes.
    """

    def argmax(self, dim: int | None = None, keepdim: bool = False) -> Tensor:
        """The classes.

        Raises:
            ValueError: not over the classes, which are dimension 0 of scores.
        """
        if dim != 0 or keepdim:
            raise ValueError(
                f"a label map stands for class scores in argmax(dim=0) only, got dim={dim}, keepdim={keepdim}; "
                "for scores set MODEL.MASK_FORMER.TEST.SEMANTIC_LABEL_MAP to False"
            )
        return self.as_subclass(Tensor)


class RunLengths(list):
    """Masks of one image in COCO's form, ``{"size": [H, W], "counts": str}`` each; indexed like a tensor of masks."""

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, (int, np.integer)):
            return super().__getitem__(item)
        if isinstance(item, slice):
            return RunLengths(super().__getitem__(item))
        if isinstance(item, list) and not item:
            return RunLengths()  # as a tensor it would be one of float32
        positions = torch.arange(len(self))[torch.as_tensor(item).cpu()]
        return RunLengths(super(RunLengths, self).__getitem__(i) for i in positions.tolist())

    def dense(self) -> Tensor:
        """Masks bool ``[N, H, W]`` on the CPU.

        Raises:
            ValueError: there is no mask, hence no size.
        """
        if not self:
            raise ValueError("no masks: their size is unknown")
        return dense_masks(self, self[0]["size"])


def dense_masks(codes: Sequence[Mapping[str, Any]], size: Sequence[int]) -> Tensor:
    """Run lengths of masks of one size as bool ``[N, H, W]`` on the CPU."""
    # one at a time and inside its box: what is not written of NumPy's zeros is no real memory
    masks = np.zeros((len(codes), *size), dtype=bool)
    for mask, code in zip(masks, codes):
        box, inside = mask_in_box(code)
        mask[box] = inside
    return torch.from_numpy(masks)


def mask_in_box(code: Mapping[str, Any]) -> tuple[tuple[slice, slice], np.ndarray]:
    """Rows and columns of the box around a mask of run lengths, and what is in it, uint8 ``[h, w]``."""
    left, top, width, height = pycocotools.mask.toBbox(code).astype(int)
    box = slice(top, top + height), slice(left, left + width)
    return box, pycocotools.mask.decode(code)[box]


def without_pairs(places: np.ndarray) -> np.ndarray:
    """Ascending places without those that come twice: where one run ends and the next begins there is no change."""
    same = places[1:] == places[:-1]
    alone = np.ones(len(places), dtype=bool)
    alone[1:] &= ~same
    alone[:-1] &= ~same
    return places[alone]


class RunLengthEncoder:
    """COCO's run lengths of one mask from the places where it begins and ends, which may come part by part.

    Args:
        size: height and width.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size
        self._pixels = size[0] * size[1]
        self._end = 0  # of the last run
        self._last = np.zeros(0, dtype=np.int64)  # up to three run lengths, to which the next ones refer
        self._text: list[str] = []

    def add(self, changes: np.ndarray) -> None:
        """Go on.

        Args:
            changes: ascending positions down the columns, one column after the other, where a pixel differs from the
                one before it (outside before the first); those at the end of the mask and behind it don't count.
        """
        changes = changes[changes < self._pixels]
        if len(changes):
            self._append(np.diff(changes, prepend=self._end))
            self._end = int(changes[-1])

    def finish(self) -> dict[str, Any]:
        """The run lengths of the whole mask."""
        if self._pixels:
            self._append(np.array([self._pixels - self._end]))
        return {"size": list(self._size), "counts": "".join(self._text)}

    def _append(self, counts: np.ndarray) -> None:
        self._text.append(compress(counts, self._last))
        self._last = np.concatenate([self._last, counts[-3:]])[-3:]


def encode_changes(changes: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's run lengths of one mask from all the places where it begins and ends, see :class:`RunLengthEncoder`."""
    encoder = RunLengthEncoder(size)
    encoder.add(changes)
    return encoder.finish()


def compress(counts: np.ndarray, before: np.ndarray | None = None) -> str:
    """COCO's text for run lengths, as ``pycocotools`` writes it, which takes Python lists only.

    From the fourth on, a count is the difference to the one two places before. A number has as few digits of five bits,
    the lowest first, as hold it and its sign; the sixth bit of a character says that more follow; 48 makes them text.

    Args:
        counts: run lengths.
        before: the three before them, or all if there are fewer.
    """
    known = 0 if before is None else len(before)
    counts = counts.astype(np.int64) if before is None else np.concatenate([before, counts])
    numbers = counts.copy()
    numbers[3:] -= counts[1:-2]
    numbers = numbers[known:]
    digits = np.ones(len(numbers), dtype=np.int64)
    magnitude = np.where(numbers < 0, ~numbers, numbers) >> 4
    while magnitude.any():
        digits += magnitude > 0
        magnitude >>= 5
    ends = np.cumsum(digits)
    text = np.empty(ends[-1] if len(ends) else 0, dtype=np.uint8)
    for place in range(int(digits.max(initial=0))):
        there = digits > place
        more = digits[there] > place + 1
        text[(ends - digits)[there] + place] = ((numbers[there] >> 5 * place) & 31) + 32 * more + 48
    return text.tobytes().decode("ascii")
