"""How the masks of instances are kept while they come in tiles: dense, or as COCO's run lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mask2former_plugin.modeling.inference.light_outputs import RunLengths, encode_changes, without_pairs
from mask2former_plugin.modeling.inference.upsampling import Buffers, Range


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
        self._dtype = np.int32 if self._pixels < 2**31 else np.int64

    def put(self, positions: Tensor, rows: Range, columns: Range, masks: Tensor) -> None:
        """Take a tile ``[n, rows, columns]`` of the masks at some positions."""
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

    def result(self, sources: Sequence[int], boxes: Tensor) -> RunLengths:
        """Run lengths of the masks.

        Args:
            sources: of each mask, the position of the one that it repeats.
            boxes: around the masks that came in tiles, int64 ``[n, 4]``; only their number counts.
        """
        nothing = np.zeros(0, dtype=self._dtype)
        codes = RunLengths()
        for position in range(len(boxes)):
            # the parts are given up one by one: of noise there are many
            changes = np.sort(np.concatenate([nothing, *self._changes.pop(position, [])]))
            codes.append(encode_changes(without_pairs(changes), self._size))
        return codes[list(sources)] if len(sources) else RunLengths()
