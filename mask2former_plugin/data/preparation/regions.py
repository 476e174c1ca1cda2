"""Regions of a label map, and what COCO's formats say about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as mask_util
from scipy import ndimage


@dataclass(frozen=True)
class Region:
    """The pixels of one label.

    Attributes:
        label: the label.
        box: rows and columns of the smallest box around them.
        mask: which pixels of the box, bool.
        image_size: height and width of the whole map.
    """

    label: int
    box: tuple[slice, slice]
    mask: np.ndarray
    image_size: tuple[int, int]

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int(np.count_nonzero(self.mask))

    @property
    def bbox(self) -> list[int]:
        """``[x, y, width, height]`` in whole pixels, the last row and column counted in."""
        rows, columns = self.box
        return [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]

    def rle(self) -> dict[str, Any]:
        """Compressed run-length code of the mask in the whole map; what ``pycocotools.mask.encode`` gives."""
        height, width = self.image_size
        x, y = np.nonzero(self.mask.T)
        # positions in column-major order; the work is that of the region, not that of the map
        position = (x + self.box[1].start) * height + y + self.box[0].start
        last = np.flatnonzero(np.diff(position) != 1)
        begins, ends = position[np.append(0, last + 1)], position[np.append(last, -1)] + 1
        edges = np.stack([begins, ends], axis=1).ravel()
        counts = np.diff(edges, prepend=0, append=height * width).tolist()
        if not counts[-1]:
            counts.pop()
        code = mask_util.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        return {"size": [height, width], "counts": code["counts"].decode("ascii")}


def regions(labels: np.ndarray) -> Iterator[Region]:
    """The regions of a map (H, W) of small integers, label 0 left out, in the order of the labels."""
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            yield Region(index, box, labels[box] == index, labels.shape)
