"""How the masks of instances are kept while they come in tiles: dense, or as COCO's run lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mask2former_plugin.modeling.inference.light_outputs import RunLengthEncoder, RunLengths, without_pairs
from mask2former_plugin.modeling.inference.upsampling import Buffers, Range

# Places where runs begin or end that are kept as numbers; more of them become text.
_MOST_CHANGES = 2**22


class DenseMasks:
    """Binary masks ``[N, H, W]``, of which the first come in tiles and the others repeat one of these.

    Args:
        number: of masks.
        size: height and width.
        device: where they are kept.
    """

    field = "pred_masks"

    def __init__(self, number: int, size: tuple[int, int], device: torch.device) -> None:
        if device.type == "cpu":
            # NumPy's zeros, other than torch's, become real memory where they are written: the rest costs nothing
            self._masks = torch.from_numpy(np.zeros((number, *size), dtype=bool))
        else:
            self._masks = torch.zeros((number, *size), dtype=torch.bool, device=device)

    def put(self, positions: Tensor, rows: Range, columns: Range, masks: Tensor) -> None:
        """Take a tile ``[n, rows, columns]`` of the masks at some positions."""
        target = self._masks[:, slice(*rows), slice(*columns)]
        for position, mask in zip(positions.tolist(), masks):
            target[position] = mask

    def result(self, sources: Sequence[int], boxes: Tensor) -> Tensor:
        """Masks bool ``[N, H, W]``.

        Args:
            sources: of each mask, the position of the one that it repeats; its own for those that came in tiles.
            boxes: around the masks that came in tiles, int64 ``[n, 4]``: x0, y0, x1, y1.
        """
        corners = boxes.tolist()
        for i, source in enumerate(sources):
            if i != source:
                x0, y0, x1, y1 = corners[source]
                self._masks[i, y0:y1, x0:x1] = self._masks[source, y0:y1, x0:x1]
        return self._masks


class RunLengthMasks:
    """The same masks as COCO's run lengths; nothing of their size is ever kept.

    Runs go down the columns, one column after the other. A tile gives the places where a run begins or ends if there
    is nothing around the tile; where a run goes on in the next tile, an end and a beginning coincide and cancel out.
    Tiles come column by column, so that what lies on the left of one is finished.

    Args:
        size: height and width.
        device: where tiles come from.
        corner: where row 0 and column 0 of the tiles lie in the masks.
    """

    field = "pred_masks_rle"

    def __init__(self, size: tuple[int, int], device: torch.device, corner: tuple[int, int] = (0, 0)) -> None:
        self._size = size
        self._corner = corner
        self._pixels = size[0] * size[1]
        self._buffers = Buffers(device)
        self._changes: dict[int, list[np.ndarray]] = {}
        self._stored = 0
        self._encoders: dict[int, RunLengthEncoder] = {}
        self._columns: Range | None = None
        self._dtype = np.int32 if self._pixels < 2**31 else np.int64

    def put(self, positions: Tensor, rows: Range, columns: Range, masks: Tensor) -> None:
        """Take a tile ``[n, rows, columns]`` of the masks at some positions."""
        if columns != self._columns:
            if self._stored > _MOST_CHANGES:
                self._encode((columns[0] + self._corner[1]) * self._size[0])
            self._columns = columns
        number, height, width = masks.shape
        changed = self._buffers("changed", (number, height + 1, width), torch.bool)
        changed[:, 0], changed[:, -1] = masks[:, 0], masks[:, -1]
        torch.ne(masks[:, 1:], masks[:, :-1], out=changed[:, 1:-1])
        flat = changed.flatten()
        # NumPy skips runs of False, torch on the CPU doesn't
        where = np.flatnonzero(flat.numpy()) if flat.device.type == "cpu" else flat.nonzero()[:, 0].cpu().numpy()
        mask, place = np.divmod(where, (height + 1) * width)
        y, x = np.divmod(place, width)
        y, x = y + (rows[0] + self._corner[0]), x + (columns[0] + self._corner[1])
        changes = (x * self._size[0] + y).astype(self._dtype)
        for position, part in zip(positions.tolist(), np.split(changes, np.searchsorted(mask, np.arange(1, number)))):
            self._changes.setdefault(position, []).append(part)
        self._stored += len(changes)

    def _encode(self, end: int) -> None:
        """Make the changes before a position text; one at it may still cancel out."""
        self._stored = 0
        for position, parts in self._changes.items():
            changes = without_pairs(np.sort(np.concatenate(parts)))
            finished = int(np.searchsorted(changes, end))
            self._encoders.setdefault(position, RunLengthEncoder(self._size)).add(changes[:finished])
            parts[:] = [changes[finished:].copy()]

    def result(self, sources: Sequence[int], boxes: Tensor) -> RunLengths:
        """Run lengths of the masks.

        Args:
            sources: of each mask, the position of the one that it repeats.
            boxes: around the masks that came in tiles, int64 ``[n, 4]``; only their number counts.
        """
        self._encode(self._pixels)
        codes = RunLengths()
        for position in range(len(boxes)):
            codes.append(self._encoders.pop(position, RunLengthEncoder(self._size)).finish())
        return codes[list(sources)] if len(sources) else RunLengths()
