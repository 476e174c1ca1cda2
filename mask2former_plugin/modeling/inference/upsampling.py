"""Maps at full size, a strip of rows at a time: bilinear resizing whose rows are computed when asked for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Values of all maps together in one strip: 8 MB in float32 stay in a CPU's cache, a GPU wants longer strips.
_STRIP_VALUES = {"cpu": 2**21}
_STRIP_VALUES_GPU = 2**25


def strips(height: int, width: int, maps: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of rows (start, stop) that cover the height, short enough that ``maps`` maps of a strip stay small."""
    values = _STRIP_VALUES.get(device.type, _STRIP_VALUES_GPU)
    rows = max(1, values // max(1, width * maps))
    for start in range(0, height, rows):
        yield start, min(start + rows, height)


class RowResize:
    """``interpolate(mode="bilinear", align_corners=False)`` of maps, for any range of target rows.

    Args:
        source: height and width of the maps.
        target: height and width wanted.
        dtype: of the maps.
    """

    def __init__(self, source: tuple[int, int], target: tuple[int, int], dtype: torch.dtype = torch.float32) -> None:
        self.source, self.target = tuple(source), tuple(target)
        # as interpolate: the scale in the precision of the maps, the position as a fused multiply-add
        scale = torch.tensor(self.source[0] / self.target[0], dtype=dtype).double()
        position = ((torch.arange(self.target[0], dtype=torch.float64) + 0.5) * scale - 0.5).clamp(min=0).to(dtype)
        self._upper = position.long().clamp(max=self.source[0] - 1)
        self._lower = (self._upper + 1).clamp(max=self.source[0] - 1)
        self._weight = (position - self._upper).clamp(0, 1)

    def source_rows(self, start: int, stop: int) -> tuple[int, int]:
        """Range of source rows that the target rows ``start:stop`` depend on."""
        if self.source[0] == self.target[0]:
            return start, stop
        return int(self._upper[start]), int(self._lower[stop - 1]) + 1

    def __call__(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """Target rows ``[N, stop - start, W]`` from the source rows ``[N, r, w]`` named by :meth:`source_rows`."""
        if self.source[0] != self.target[0]:
            first = self.source_rows(start, stop)[0]
            upper, lower = (index[start:stop].to(rows.device) - first for index in (self._upper, self._lower))
            weight = self._weight[start:stop, None].to(rows.device)
            rows = torch.lerp(rows.index_select(1, upper), rows.index_select(1, lower), weight)
        if self.source[1] != self.target[1]:
            flat = rows.reshape(1, -1, self.source[1])
            rows = F.interpolate(flat, size=self.target[1], mode="linear", align_corners=False).view(
                *rows.shape[:2], -1
            )
        return rows


class ImageMasks:
    """Mask logits of one image at the size of the result, in rows.

    The logits are resized from the grid of the prediction to the padded input, cropped to the image and resized to
    the output; every step is the original's, only that rows nobody asked for are not computed.

    Args:
        logits: ``[Q, h, w]`` on the grid of the prediction.
        padded_size: height and width of the padded input batch.
        image_size: height and width of the image inside it.
        output_size: height and width of the result; by default ``image_size``.
    """

    def __init__(
        self,
        logits: Tensor,
        padded_size: tuple[int, int],
        image_size: tuple[int, int],
        output_size: tuple[int, int] | None = None,
    ) -> None:
        self.logits = logits if logits.dtype == torch.float64 else logits.float()
        self.size = tuple(output_size or image_size)
        self._image_width = image_size[1]
        self._to_input = RowResize(logits.shape[-2:], padded_size, self.logits.dtype)
        self._to_output = RowResize(image_size, self.size, self.logits.dtype)

    def rows(self, start: int, stop: int) -> Tensor:
        """Logits of the rows ``start:stop`` of the result, ``[Q, stop - start, W]``."""
        image_rows = self._to_output.source_rows(start, stop)
        grid_rows = self._to_input.source_rows(*image_rows)
        rows = self._to_input(self.logits[:, slice(*grid_rows)], *image_rows)
        return self._to_output(rows[..., : self._image_width], start, stop)

    def strips(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows that cover the result."""
        return strips(*self.size, self.logits.shape[0], self.logits.device)
