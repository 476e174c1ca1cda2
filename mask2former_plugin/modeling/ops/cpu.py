"""Multi-scale deformable attention on CPUs: bilinear samples as weighted sums of table rows (``embedding_bag``).

The maps are copied into a table with a border of zeros, so that samples outside need no special case: a row of a map
gets two zero cells before it (those of the next row end it), a map gets two zero rows above and below. Positions are
clamped to the border, where everything is zero, gradients included.

Queries are processed in chunks whose indices and weights stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BORDER = 2
# samples per chunk and thread: forward a sample takes about a hundred bytes, backward it takes four rows
FORWARD_SAMPLES = 2**15
BACKWARD_SAMPLES = 2**12


class _Table:
    """Layout of the padded maps in one table of ``cells`` rows per head."""

    def __init__(self, spatial_shapes: Sequence[tuple[int, int]]) -> None:
        self.shapes = spatial_shapes
        self.starts = []
        cells = 0
        for height, width in spatial_shapes:
            self.starts.append(cells)
            cells += (height + 2 * BORDER) * (width + BORDER)
        self.cells = cells + 2 * BORDER  # samples at the end of the last row reach beyond it

    def _maps(self, table: Tensor) -> Iterator[Tensor]:
        """Views of the inner part of each map, ``[B, H, W, M, D]``."""
        for start, (height, width) in zip(self.starts, self.shapes):
            rows, columns = height + 2 * BORDER, width + BORDER
            padded = table[:, start : start + rows * columns].unflatten(1, (rows, columns))
            yield padded[:, BORDER:-BORDER, BORDER:]

    def fill(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """``[B, S, M, D]`` to ``[B, cells, M, D]``."""
        table = value.new_zeros((value.shape[0], self.cells, *value.shape[2:]), dtype=dtype)
        levels = value.split([h * w for h, w in self.shapes], dim=1)
        for inner, level, size in zip(self._maps(table), levels, self.shapes):
            inner.copy_(level.unflatten(1, tuple(size)))
        return table

    def extract(self, table: Tensor) -> Tensor:
        """``[B, cells, M, D]`` to ``[B, S, M, D]``."""
        return torch.cat([inner.flatten(1, 2) for inner in self._maps(table)], dim=1)


class _Sampler:
    """Indices and weights of the samples of a chunk of queries."""

    def __init__(self, table: _Table, chunk: int, heads: int, points: int, dtype: torch.dtype) -> None:
        # constants have the size of a chunk: broadcasting over the few points of a level is slower than the arithmetic
        shape = (chunk, heads, len(table.shapes), points)

        def constant(numbers: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(numbers, dtype=dtype)[:, None].expand(shape).contiguous()

        self.heads = heads
        self.width = constant([w for _, w in table.shapes], dtype)
        self.height = constant([h for h, _ in table.shapes], dtype)
        self.row = constant([(w + BORDER) * heads for _, w in table.shapes], torch.int32)
        self.first = constant([start * heads for start in table.starts], torch.int32)
        self.first += torch.arange(heads, dtype=torch.int32)[:, None, None]
        self.shift = torch.tensor(BORDER - 0.5, dtype=dtype)
        self.least = torch.tensor(0.5, dtype=dtype)

    def _split(self, place: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
        """Cell at or before a place in [0, 1], and the share of the next cell."""
        position = torch.addcmul(self.shift, place, extent)
        # written such that NaN goes to the border, too, instead of becoming an index
        position = torch.where(position >= self.least, position, self.least)
        position = torch.minimum(position, extent + (BORDER + 0.5))
        cell = position.floor()
        return cell.int(), position.sub_(cell)

    def __call__(self, locations: Tensor, attention: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Returns:
            table rows ``[N, 4·L·P]`` of the corners (upper left, upper right, lower left, lower right) for the N =
            queries·heads bags, their weights, and the shares of the right column and of the lower row, ``[T, M, L,
            P]``.
        """
        count = locations.shape[0]
        column, right = self._split(locations[..., 0], self.width[:count])
        line, lower = self._split(locations[..., 1], self.height[:count])
        upper_left = torch.addcmul(self.first[:count], line, self.row[:count]).add_(column, alpha=self.heads)
        lower_left = upper_left + self.row[:count]
        left = 1 - right
        lower_weight = lower * attention
        upper_weight = attention - lower_weight
        rows = (upper_left, upper_left + self.heads, lower_left, lower_left + self.heads)
        weights = (upper_weight * left, upper_weight * right, lower_weight * left, lower_weight * right)
        bags = (count * self.heads, -1)
        return torch.cat([r.view(bags) for r in rows], 1), torch.cat([w.view(bags) for w in weights], 1), right, lower


class _Attention(torch.autograd.Function):
    """Forward and backward in chunks of queries, nothing kept between them but the inputs."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, shapes: tuple[tuple[int, int], ...]
    ) -> Tensor:
        ctx.save_for_backward(value, locations, weights)
        ctx.shapes = shapes
        batch, _, heads, width = value.shape
        layout = _Table(shapes)
        table = layout.fill(value, locations.dtype).flatten(1, 2)
        output = locations.new_empty(batch, locations.shape[1], heads, width)
        for image, queries, sampler in _chunks(layout, locations, FORWARD_SAMPLES):
            rows, shares, _, _ = sampler(locations[image, queries], weights[image, queries])
            samples = F.embedding_bag(rows, table[image], mode="sum", per_sample_weights=shares)
            output[image, queries] = samples.unflatten(0, (-1, heads))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        value, locations, weights = ctx.saved_tensors
        heads, width = value.shape[2:]
        layout = _Table(ctx.shapes)
        table = layout.fill(value, locations.dtype).flatten(1, 2)
        grad_table = torch.zeros_like(table) if ctx.needs_input_grad[0] else None
        grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
        for image, queries, sampler in _chunks(layout, locations, BACKWARD_SAMPLES):
            attention = weights[image, queries]
            rows, shares, right, lower = sampler(locations[image, queries], attention)
            grad = grad_output[image, queries].reshape(-1, width)
            if grad_table is not None:
                addends = (shares.unsqueeze(2) * grad.unsqueeze(1)).flatten(0, 1)
                grad_table[image].scatter_add_(0, rows.flatten().long().unsqueeze(1).expand(-1, width), addends)
            products = F.embedding(rows, table[image]).mul_(grad.unsqueeze(1)).sum(2)  # <grad, corner> for every corner
            corners = products.unflatten(1, (4, -1)).unbind(1)
            upper_left, upper_right, lower_left, lower_right = (corner.view_as(attention) for corner in corners)
            upper_slope, lower_slope = upper_right - upper_left, lower_right - lower_left
            upper = torch.addcmul(upper_left, right, upper_slope)
            slope = torch.addcmul(lower_left, right, lower_slope) - upper
            count = attention.shape[0]
            grad_weights[image, queries] = torch.addcmul(upper, lower, slope)
            across = torch.lerp(upper_slope, lower_slope, lower)
            grad_locations[image, queries, ..., 0] = across * attention * sampler.width[:count]
            grad_locations[image, queries, ..., 1] = slope * attention * sampler.height[:count]
        grad_value = None
        if grad_table is not None:
            grad_value = layout.extract(grad_table.unflatten(1, (-1, heads))).to(value.dtype)
        return grad_value, grad_locations, grad_weights, None


def _chunks(layout: _Table, locations: Tensor, samples: int) -> Iterator[tuple[int, slice, _Sampler]]:
    """Image, queries and sampler of each chunk."""
    batch, length, heads, levels, points, _ = locations.shape
    chunk = max(1, samples * torch.get_num_threads() // (heads * levels * points))
    sampler = _Sampler(layout, min(chunk, length), heads, points, locations.dtype)
    for image in range(batch):
        for start in range(0, length, chunk):
            yield image, slice(start, min(start + chunk, length)), sampler


def ms_deform_attn_cpu(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """See :func:`mask2former_plugin.modeling.ops.ms_deform_attn`; differentiable once."""
    shapes = tuple((int(h), int(w)) for h, w in spatial_shapes)
    weights = attention_weights.to(sampling_locations.dtype)
    return _Attention.apply(value, sampling_locations, weights, shapes).flatten(2).to(value.dtype)
