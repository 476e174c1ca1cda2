"""Multi-scale deformable attention on CPUs: bilinear samples as weighted sums of table rows (``embedding_bag``).

The maps of a head lie in one table, one below the other, with a border of zeros. So samples outside need no special
case, and the other three corners of a sample are the same numbers of rows behind the upper left one in every level.
Positions are clamped to the border, where everything is zero, gradients included.

With tokens as rows and cells as columns, each of the four corners is a sparse matrix, all four have the same pattern,
and the output is the sum of their products with the table. Hence the derivative by an entry is the product of a token's
gradient and a row of the table, taken where the pattern has entries (``sampled_addmm``), and the derivative by the
table is the product of the transposed matrices and the gradients: ``embedding_bag`` again, once a counting sort has
brought the entries into the order of the cells.

Heads are treated one after the other (several together where maps are small) and tokens in chunks, so that what is
being worked on stays in the cache. The memory on top of inputs and results is that of one head.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor

BORDER = 2
# samples that are treated together, per thread; they take about a hundred bytes each
SAMPLES = 2**16

with warnings.catch_warnings():
    # PyTorch says once that sparse matrices are in beta, which concerns this module and not its users
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [1.0], size=(1, 1))


class _Maps:
    """Layout of the padded maps of a head in a table of ``cells`` rows.

    A line of a map starts with two zeros (those of the next line end it), a map with two lines of zeros. All lines are
    as long as those of the widest map.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.shapes = list(zip(sizes[::2], sizes[1::2]))
        self.stride = max(width for _, width in self.shapes) + BORDER
        self.starts = []
        lines = 0
        for height, _ in self.shapes:
            self.starts.append(lines)
            lines += height + BORDER
        self.lines = lines + BORDER
        self.cells = self.lines * self.stride
        # from the upper left corner to the upper right, the lower left and the lower right one
        self.corners = (0, 1, self.stride, self.stride + 1)

    def table(self, value: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """Zeros, ``[heads * cells, D]`` and as many more as the corners of the last cell need."""
        return value.new_zeros((heads * self.cells + self.corners[-1], value.shape[-1]), dtype=dtype)

    def pairs(self, table: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views ``[G, H, W, D]`` of each map in a table and in ``[S, G, D]``."""
        heads = value.shape[1]
        padded = table[: heads * self.cells].unflatten(0, (heads, self.lines, self.stride))
        levels = value.transpose(0, 1).split([height * width for height, width in self.shapes], dim=1)
        for start, (height, width), level in zip(self.starts, self.shapes, levels):
            inner = padded[:, start + BORDER : start + BORDER + height, BORDER : BORDER + width]
            yield inner, level.unflatten(1, (height, width))


class _Sampler:
    """Cells and weights of the samples of some tokens and heads."""

    def __init__(self, maps: _Maps, heads: int, tokens: int, points: int, dtype: torch.dtype) -> None:
        # constants are as large as what they are applied to: broadcasting over a few points costs more than arithmetic
        shape = (heads, tokens, len(maps.shapes), points)
        sizes = torch.tensor([[width for _, width in maps.shapes], [height for height, _ in maps.shapes]], dtype=dtype)
        self.extent = sizes[:, None, None, :, None].expand(2, *shape).flatten(3)
        self.most = self.extent + (BORDER + 0.5)
        self.least = torch.full_like(self.most, 0.5)
        self.shift = torch.tensor(BORDER - 0.5, dtype=dtype)
        first = torch.tensor(maps.starts, dtype=torch.int32)[:, None] * maps.stride
        first = first + torch.arange(heads, dtype=torch.int32)[:, None, None, None] * maps.cells
        self.first = first.expand(shape).flatten(2)
        self.stride = maps.stride

    def __call__(self, locations: Tensor, attention: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """
        Args:
            locations: ``[T, G, L·P, 2]``, tokens and heads.
            attention: ``[G, T, L·P]``.

        Returns:
            the upper left cells, int32; the weights of the four corners; the shares of the right column and of the
            lower line, ``[2, G, T, L·P]``.
        """
        chunk = (slice(None), slice(locations.shape[1]), slice(locations.shape[0]))
        position = locations.permute(3, 1, 0, 2).clone(memory_format=torch.contiguous_format)
        torch.addcmul(self.shift, position, self.extent[chunk], out=position)
        # not a number goes to the border, too, instead of becoming an index
        torch.clamp(position.nan_to_num_(0.0), self.least[chunk], self.most[chunk], out=position)
        column, line = position.int()
        upper_left = torch.add(column, line, alpha=self.stride).add_(self.first[chunk[1:]])
        right, lower = shares = position.frac_()
        below = lower * attention
        above = attention - below
        lower_right, upper_right = below * right, above * right
        return upper_left, [above.sub_(upper_right), upper_right, below.sub_(lower_right), lower_right], shares


class _Work:
    """The inputs, and the order in which forward and backward go through them: a few heads, and chunks of tokens."""

    def __init__(self, value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]) -> None:
        self.value, self.locations, self.weights = value, locations.flatten(3, 4), weights.flatten(3)
        self.batch, self.length, self.heads, levels, points = weights.shape
        self.samples = levels * points
        limit = SAMPLES * torch.get_num_threads()
        # several heads only if they are treated with all tokens at once
        self.group = min(self.heads, max(1, limit // max(1, self.length * self.samples)))
        self.chunk = self.length if self.group > 1 else max(1, min(self.length, limit // self.samples))
        self.maps = _Maps(sizes)
        self.table = self.maps.table(value, self.group, locations.dtype)
        self.sampler = _Sampler(self.maps, self.group, self.chunk, points, locations.dtype)
        self.ends = torch.arange(0, self.group * self.length + 1, dtype=torch.int32) * self.samples

    def groups(self) -> Iterator[tuple[int, slice]]:
        """Image and heads; their maps are in the table."""
        for image in range(self.batch):
            for start in range(0, self.heads, self.group):
                heads = slice(start, min(start + self.group, self.heads))
                for inner, level in self.maps.pairs(self.table, self.value[image, :, heads]):
                    inner.copy_(level)
                yield image, heads

    def chunks(self) -> Iterator[slice]:
        """Tokens."""
        for start in range(0, self.length, max(1, self.chunk)):
            yield slice(start, min(start + self.chunk, self.length))


def _entry_gradients(
    rows: Tensor, corners: Sequence[int], ends: Tensor, grads: Tensor, table: Tensor, cells: int
) -> list[Tensor]:
    """The product of a token's gradient and a row of the table, for every sample's four corners, ``[G, T, L·P]``."""
    products = []
    for corner in corners:
        entries = table.new_zeros(rows.numel())
        # columns are neither sorted nor distinct, which the product does not mind, but a check would
        pattern = torch.sparse_csr_tensor(
            ends, rows.view(-1), entries, size=(len(grads), cells), check_invariants=False
        )
        torch.sparse.sampled_addmm(pattern, grads, table[corner : corner + cells].t(), beta=0.0, out=pattern)
        products.append(pattern.values().view_as(rows))
    return products


def _table_gradient(
    rows: Tensor, weights: Tensor, ends: Tensor, grads: Tensor, like: Tensor, corners: Sequence[int], cells: int
) -> Tensor:
    """The sum of the gradients of the tokens that sample a cell, times their weights.

    Args:
        rows: ``[bags, L·P]``, upper left cells.
        weights: ``[4, bags, L·P]``.
        ends: ``[bags + 1]``, where the entries of a bag start.
        grads: ``[bags, D]``.
        like: a table.
    """
    # a sparse matrix that holds the number of each entry; to compress its columns instead of its rows takes linear time
    numbers = torch.arange(rows.numel(), dtype=torch.int32)
    matrix = csr_array((numbers.numpy(), rows.view(-1).numpy(), ends.numpy()), shape=(len(grads), cells)).tocsc()
    order, bags, starts = (torch.from_numpy(x) for x in (matrix.data, matrix.indices, matrix.indptr))
    table = torch.zeros_like(like)
    for corner, weight in zip(corners, weights):
        shares = weight.view(-1).index_select(0, order)
        sums = F.embedding_bag(bags, grads, starts, mode="sum", per_sample_weights=shares, include_last_offset=True)
        table[corner : corner + cells] += sums
    return table


@torch.library.custom_op(
    "mask2former::ms_deform_attn_cpu",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor value, Tensor locations, Tensor weights, SymInt[] sizes) -> Tensor",
)
def _attention(value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
    """``sizes``: height and width of each level; locations and weights have one type, in which the sums are made."""
    work = _Work(value, locations, weights, sizes)
    output = value.new_empty(work.batch, work.length, work.heads, value.shape[3])
    for image, heads in work.groups():
        cells = (heads.stop - heads.start) * work.maps.cells
        for tokens in work.chunks():
            attention = work.weights[image, tokens, heads].transpose(0, 1).contiguous()
            rows, weights, _ = work.sampler(work.locations[image, tokens, heads], attention)
            starts = work.ends[: rows[..., 0].numel()]
            sums = [
                F.embedding_bag(
                    rows.view(-1), work.table[k : k + cells], starts, mode="sum", per_sample_weights=weight.view(-1)
                )
                for k, weight in zip(work.maps.corners, weights)
            ]
            total = sums[0].add_(sums[1]).add_(sums[2]).add_(sums[3])
            output[image, tokens, heads] = total.unflatten(0, rows.shape[:2]).transpose(0, 1)
    return output.flatten(2)


@torch.library.custom_op(
    "mask2former::ms_deform_attn_cpu_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad, Tensor value, Tensor locations, Tensor weights, SymInt[] sizes, bool of_value, "
    "bool of_samples) -> (Tensor, Tensor, Tensor)",
)
def _attention_backward(
    grad: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    sizes: Sequence[int],
    of_value: bool,
    of_samples: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights; empty tensors for those that aren't asked for."""
    grad_value, grad_locations, grad_weights = _empty_gradients(value, locations, weights, of_value, of_samples)
    work = _Work(value, locations, weights, sizes)
    corners = work.maps.corners
    grad = grad.unflatten(2, value.shape[2:])
    all_rows = torch.empty((work.group * work.length, work.samples), dtype=torch.int32)
    all_weights = locations.new_empty(4, *all_rows.shape)
    for image, heads in work.groups():
        cells = (heads.stop - heads.start) * work.maps.cells
        grads = grad[image, :, heads].transpose(0, 1).to(locations.dtype).flatten(0, 1).contiguous()
        for tokens in work.chunks():
            attention = work.weights[image, tokens, heads].transpose(0, 1).contiguous()
            rows, entries, shares = work.sampler(work.locations[image, tokens, heads], attention)
            bags = slice(tokens.start, tokens.start + rows[..., 0].numel())
            if of_value:
                all_rows[bags] = rows.flatten(0, 1)
                for whole, part in zip(all_weights, entries):
                    whole[bags] = part.flatten(0, 1)
            if of_samples:
                ends = work.ends[: bags.stop - bags.start + 1]
                upper_left, upper, lower_left, lower = _entry_gradients(
                    rows, corners, ends, grads[bags], work.table, cells
                )
                across, down = shares
                # slopes along the upper and the lower line, then the values there, then the slope between the lines
                upper -= upper_left
                lower -= lower_left
                at_upper = upper_left.addcmul_(across, upper)
                downhill = lower_left.addcmul_(across, lower).sub_(at_upper)
                grad_weights.flatten(3)[image, tokens, heads] = at_upper.addcmul_(down, downhill).transpose(0, 1)
                slopes = torch.stack((upper.lerp_(lower, down), downhill)).mul_(attention)
                slopes *= work.sampler.extent[:, : rows.shape[0], : rows.shape[1]]
                grad_locations.flatten(3, 4)[image, tokens, heads] = slopes.permute(2, 1, 3, 0)
        if of_value:
            ends = work.ends[: len(grads) + 1]
            rows, entries = all_rows[: len(grads)], all_weights[:, : len(grads)]
            table = _table_gradient(rows, entries, ends, grads, work.table, corners, cells)
            for inner, level in work.maps.pairs(table, grad_value[image, :, heads]):
                level.copy_(inner)
    return grad_value, grad_locations, grad_weights


def _empty_gradients(
    value: Tensor, locations: Tensor, weights: Tensor, of_value: bool, of_samples: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = ((value, of_value), (locations, of_samples), (weights, of_samples))
    gradients = (tensor.new_empty(tensor.shape if asked else 0) for tensor, asked in wanted)
    return tuple(gradients)


@_attention.register_fake
def _(value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
    return value.new_empty(weights.shape[0], weights.shape[1], value.shape[2] * value.shape[3])


@_attention_backward.register_fake
def _(
    grad: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    sizes: Sequence[int],
    of_value: bool,
    of_samples: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(value, locations, weights, of_value, of_samples)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Sequence[int]], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.sizes = inputs[3]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    needs = ctx.needs_input_grad[:3]
    gradients = _attention_backward(grad, *ctx.saved_tensors, ctx.sizes, needs[0], needs[1] or needs[2])
    return (*(gradient if needed else None for gradient, needed in zip(gradients, needs)), None)


_attention.register_autograd(_differentiate, setup_context=_keep)


def ms_deform_attn_cpu(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """See :func:`mask2former_plugin.modeling.ops.ms_deform_attn`; differentiable once.

    An operator of ``torch.library``, which ``torch.compile`` keeps as it is.
    """
    sizes = [extent for shape in spatial_shapes for extent in shape]
    return _attention(value, sampling_locations, attention_weights.to(sampling_locations.dtype), sizes)
