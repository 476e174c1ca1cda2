"""Small forms of results that are large otherwise: a class map for class scores, run lengths for masks."""

from __future__ import annotations

from collections.abc import Sequence
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
        positions = torch.arange(len(self))[torch.as_tensor(item).cpu()]
        return RunLengths(super(RunLengths, self).__getitem__(i) for i in positions.tolist())

    def dense(self) -> Tensor:
        """Masks bool ``[N, H, W]`` on the CPU.

        Raises:
            ValueError: there is no mask, hence no size.
        """
        if not self:
            raise ValueError("no masks: their size is unknown")
        return torch.from_numpy(pycocotools.mask.decode(list(self))).permute(2, 0, 1).bool()


def without_pairs(places: np.ndarray) -> np.ndarray:
    """Ascending places without those that come twice: where one run ends and the next begins there is no change."""
    same = places[1:] == places[:-1]
    alone = np.ones(len(places), dtype=bool)
    alone[1:] &= ~same
    alone[:-1] &= ~same
    return places[alone]


def encode_changes(changes: Sequence[np.ndarray], size: tuple[int, int]) -> RunLengths:
    """Run lengths from the places where masks begin and end.

    Args:
        changes: of each mask, ascending positions down the columns, one column after the other, where a pixel differs
            from the one before it (outside before the first).
        size: height and width.
    """
    pixels = size[0] * size[1]
    codes = []
    for places in changes:
        ends = np.concatenate([[0], places[places < pixels], [pixels]])
        codes.append({"size": list(size), "counts": np.diff(ends).tolist()})
    encoded = pycocotools.mask.frPyObjects(codes, *size) if codes else []
    return RunLengths({"size": list(size), "counts": code["counts"].decode("ascii")} for code in encoded)
