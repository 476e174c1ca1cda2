"""Multi-scale deformable attention on CPUs: bilinear samples as weighted sums of table rows (``embedding_bag``).

The maps of a head lie in one table, one below the other, with a border of zeros. So samples outside need no special
case, and the other three corners of a sample are the same numbers of rows behind the upper left one in every level.
Positions are clamped to the border, where everything is zero, gradients included.

With tokens as rows and cells as columns, each of the four corners is a sparse matrix, all four have the same pattern,
and the output is the sum of their products with the table. Hence the derivative by an entry is the product of a token's
gradient and a row of the table, taken where the pattern has entries (``sampled_addmm``), and the derivative by the
table is the product of the transposed matrices and the gradients: ``embedding_bag`` again, once a counting sort has
brought the entries into the order of the cells.

Heads are treated one after the other (several together where maps are small or threads are many) and tokens in chunks,
so that what is being worked on stays in the cache. The cells of heads that are treated together take turns in the
table, and all arrays of samples are ordered by token, head, level and point. The memory on top of inputs and results is
that of these heads. The order of the sums does not depend on the threads.
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
SAMPLES = 2**17
# logits without anything larger need no shift before the exponential function
_SAFE_LOGIT = 40.0

with warnings.catch_warnings():
    # PyTorch says once that sparse matrices are in beta, which concerns this module and not its users
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [1.0], size=(1, 1))


class _Maps:
    """Layout of the padded maps of some heads in a table of ``cells`` rows, the heads taking turns.

    A line of a map starts with two zeros (those of the next line end it), a map with two lines of zeros. All lines are
    as long as those of the widest map.
    """

    def __init__(self, sizes: Sequence[int], heads: int) -> None:
        self.heads = heads
        self.shapes = list(zip(sizes[::2], sizes[1::2]))
        self.width = max(width for _, width in self.shapes) + BORDER
        self.starts = []
        lines = 0
        for height, _ in self.shapes:
            self.starts.append(lines)
            lines += height + BORDER
        self.lines = lines + BORDER
        self.stride = self.width * heads
        self.cells = self.lines * self.stride
        # from the upper left corner to the upper right, the lower left and the lower right one
        self.corners = (0, heads, self.stride, self.stride + heads)

    def table(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros, ``[cells, D]`` and as many more as the corners of the last cell need."""
        return value.new_zeros((self.cells + self.corners[-1], value.shape[-1]), dtype=dtype)

    def pairs(self, table: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views ``[H, W, G, D]`` of each map in a table and in ``[S, G, D]``, which may have fewer heads."""
        padded = table[: self.cells].unflatten(0, (self.lines, self.width, self.heads))
        levels = value.split([height * width for height, width in self.shapes])
        for start, (height, width), level in zip(self.starts, self.shapes, levels):
            inner = padded[start + BORDER : start + BORDER + height, BORDER : BORDER + width, : value.shape[1]]
            yield inner, level.unflatten(0, (height, width))


def _reordered(x: Tensor, order: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous copy with permuted dimensions."""
    x = x.permute(order)
    return torch.empty(x.shape, dtype=dtype).copy_(x)


class _Sampler:
    """Cells and weights of the samples of some tokens."""

    def __init__(self, maps: _Maps, points: Tensor | None, tokens: int, samples: int, dtype: torch.dtype) -> None:
        """
        Args:
            points: of all tokens, see :func:`_attention`.
            tokens: the largest number of tokens that are sampled together.
            samples: L·P.
        """
        # constants are as large as what they are applied to: broadcasting over a few points costs more than arithmetic
        levels = len(maps.shapes)
        shape = (tokens, maps.heads, levels, samples // levels)
        sizes = torch.tensor([[width for _, width in maps.shapes], [height for height, _ in maps.shapes]], dtype=dtype)
        sizes = sizes[:, None, None, :, None]
        self.most = (sizes + (BORDER + 0.5)).expand(2, *shape).flatten(3)
        self.shift = torch.tensor(BORDER - 0.5, dtype=dtype)
        self.extent = self.origin = None
        if points is None:
            self.extent = sizes.expand(2, *shape).flatten(3)
        else:
            origin = torch.addcmul(self.shift, points.t()[:, :, None, None, None], sizes)
            self.origin = origin.expand(2, len(points), *shape[1:]).flatten(3)
        first = torch.tensor(maps.starts, dtype=torch.int32)[:, None] * maps.stride
        first = first + torch.arange(maps.heads, dtype=torch.int32)[:, None, None]
        self.first = first.expand(shape).flatten(2)
        self.heads, self.stride = maps.heads, maps.stride

    def __call__(
        self, places: Tensor, attention: Tensor, tokens: slice, rows: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            places: ``[T, G, L·P, 2]``, of some tokens.
            attention: ``[T, G, L·P]``.
            tokens: which tokens.
            rows: where the upper left cells are written to, int32, ``[T, G, L·P]``.
            weights: where the weights of the four corners are written to, ``[4, T, G, L·P]``.

        Returns:
            the shares of the right column and of the lower line, ``[T, G, L·P]``.
        """
        length, heads = places.shape[:2]
        position = _reordered(places, (3, 0, 1, 2), attention.dtype)
        if self.origin is None:
            torch.addcmul(self.shift, position, self.extent[:, :length, :heads], out=position)
        else:
            position += self.origin[:, tokens, :heads]
        torch.minimum(position, self.most[:, :length, :heads], out=position).clamp_(min=0.5)
        # what is not a number spoils the weights, but must not become an index
        column, line = position.nan_to_num(0.5).int()
        torch.add(self.first[:length, :heads], column, alpha=self.heads, out=rows).add_(line, alpha=self.stride)
        right, lower = position.frac_()
        upper_left, upper_right, lower_left, lower_right = weights
        torch.mul(lower, attention, out=lower_left)
        torch.sub(attention, lower_left, out=upper_left)
        torch.mul(lower_left, right, out=lower_right)
        torch.mul(upper_left, right, out=upper_right)
        lower_left -= lower_right
        upper_left -= upper_right
        return right, lower


class _Work:
    """The inputs, and the order in which forward and backward go through them: a few heads, and chunks of tokens."""

    def __init__(
        self, value: Tensor, points: Tensor | None, places: Tensor, weights: Tensor, sizes: Sequence[int]
    ) -> None:
        self.value, self.places, self.weights = value, places.flatten(3, 4), weights.flatten(3)
        self.softmax = points is not None
        self.dtype = places.dtype if points is None else points.dtype
        self.batch, self.length, self.heads, self.samples = self.weights.shape
        limit = SAMPLES * torch.get_num_threads()
        self.group = min(self.heads, max(1, limit // max(1, self.length * self.samples)))
        self.chunk = max(1, min(self.length, limit // (self.group * self.samples)))
        self.maps = _Maps(sizes, self.group)
        self.table = self.maps.table(value, self.dtype)
        self.sample = _Sampler(self.maps, points, self.chunk, self.samples, self.dtype)
        self.ends = torch.arange(0, self.group * self.length + 1, dtype=torch.int32) * self.samples
        self.ones = self.table.new_ones(self.samples, self.samples)

    def groups(self) -> Iterator[tuple[int, slice]]:
        """Image and heads, whose maps are in the table."""
        for image in range(self.batch):
            for start in range(0, self.heads, self.group):
                heads = slice(start, min(start + self.group, self.heads))
                for inner, level in self.maps.pairs(self.table, self.value[image, :, heads]):
                    inner.copy_(level)
                yield image, heads

    def chunks(self, image: int, heads: slice) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Tokens, their places ``[T, G, L·P, 2]`` and attention weights ``[T, G, L·P]``."""
        for start in range(0, self.length, self.chunk):
            tokens = slice(start, min(start + self.chunk, self.length))
            attention = _reordered(self.weights[image, tokens, heads], (0, 1, 2), self.dtype)
            if self.softmax:
                self._softmax(attention)
            yield tokens, self.places[image, tokens, heads], attention

    def _softmax(self, logits: Tensor) -> None:
        """In place and in steps: PyTorch's own goes row by row, which is slow for short rows, as is a sum of rows."""
        least, most = logits.aminmax()
        if not -_SAFE_LOGIT < least <= most < _SAFE_LOGIT:
            logits.sub_(logits.amax(-1, keepdim=True))
        logits.exp_()
        with torch.autocast("cpu", enabled=False):
            logits /= (logits.flatten(0, 1) @ self.ones).view_as(logits)

    def buffers(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Memory for the upper left cells and the weights of the corners of some tokens and all heads of a group."""
        samples = self.group * tokens * self.samples
        return torch.empty(samples, dtype=torch.int32), torch.empty((4, samples), dtype=self.dtype)


def _bag_sums(rows: Tensor, table: Tensor, ends: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows of a table, a bag after the other."""
    return F.embedding_bag(rows, table, ends, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _entry_gradients(
    rows: Tensor, corners: Sequence[int], ends: Tensor, grads: Tensor, table: Tensor, cells: int
) -> list[Tensor]:
    """The product of a token's gradient and a row of the table, for every sample's four corners, ``[T, G, L·P]``."""
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
    rows: Tensor, weights: Tensor, corners: Sequence[int], ends: Tensor, grads: Tensor, like: Tensor, cells: int
) -> Tensor:
    """The sum of the gradients of the tokens that sample a cell, times their weights.

    Args:
        rows: ``[bags * L·P]``, upper left cells.
        weights: of the four corners, ``[4, bags * L·P]``.
        corners: see :class:`_Maps`.
        ends: ``[bags + 1]``, where the entries of a bag start, and the number of entries.
        grads: ``[bags, D]``.
        like: a table.
        cells: number of its cells.
    """
    # a sparse matrix that holds the number of each entry; to compress its columns instead of its rows takes linear time
    numbers = torch.arange(len(rows), dtype=torch.int32)
    matrix = csr_array((numbers.numpy(), rows.numpy(), ends.numpy()), shape=(len(grads), cells)).tocsc()
    order, bags, starts = (torch.from_numpy(x) for x in (matrix.data, matrix.indices, matrix.indptr))
    table = torch.zeros_like(like)
    for corner, weight in zip(corners, weights):
        table[corner : corner + cells] += _bag_sums(bags, grads, starts, weight.index_select(0, order))
    return table


@torch.library.custom_op(
    "mask2former::ms_deform_attn_cpu",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor value, Tensor? points, Tensor places, Tensor weights, SymInt[] sizes) -> Tensor",
)
def _attention(
    value: Tensor, points: Tensor | None, places: Tensor, weights: Tensor, sizes: Sequence[int]
) -> Tensor:
    """
    Args:
        value: ``[B, S, M, D]``.
        points: None or the places of the tokens, ``[T, 2]`` in [0, 1]; sums are made in their type.
        places: ``[B, T, M, L, P, 2]``, without points in [0, 1] (sums are made in their type), with them in pixels from
            there.
        weights: ``[B, T, M, L, P]``, without points in the type of the places, with them logits.
        sizes: height and width of each level.
    """
    work = _Work(value, points, places, weights, sizes)
    output = value.new_empty(work.batch, work.length, work.heads, value.shape[3])
    all_rows, all_entries = work.buffers(work.chunk)
    cells = work.maps.cells
    for image, heads in work.groups():
        for tokens, places, attention in work.chunks(image, heads):
            rows, entries = all_rows[: attention.numel()], all_entries[:, : attention.numel()]
            work.sample(places, attention, tokens, rows.view_as(attention), entries.view(4, *attention.shape))
            ends = work.ends[: attention[..., 0].numel() + 1]
            sums = (_bag_sums(rows, work.table[k : k + cells], ends, e) for k, e in zip(work.maps.corners, entries))
            total = next(sums)
            for corner in sums:
                total += corner
            output[image, tokens, heads] = total.unflatten(0, attention.shape[:2])
    return output.flatten(2)


@torch.library.custom_op(
    "mask2former::ms_deform_attn_cpu_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad, Tensor value, Tensor? points, Tensor places, Tensor weights, SymInt[] sizes, bool of_value, "
    "bool of_samples) -> (Tensor, Tensor, Tensor)",
)
def _attention_backward(
    grad: Tensor,
    value: Tensor,
    points: Tensor | None,
    places: Tensor,
    weights: Tensor,
    sizes: Sequence[int],
    of_value: bool,
    of_samples: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, places and weights; empty tensors for those that aren't asked for."""
    grad_value, grad_places, grad_weights = _empty_gradients(value, places, weights, of_value, of_samples)
    work = _Work(value, points, places, weights, sizes)
    corners, cells = work.maps.corners, work.maps.cells
    grad = grad.unflatten(2, value.shape[2:])
    all_rows, all_entries = work.buffers(work.length)
    for image, heads in work.groups():
        grads = _reordered(grad[image, :, heads], (0, 1, 2), work.dtype).flatten(0, 1)
        for tokens, places, attention in work.chunks(image, heads):
            bags = slice(tokens.start * places.shape[1], tokens.stop * places.shape[1])
            entries = slice(bags.start * work.samples, bags.stop * work.samples)
            rows = all_rows[entries].view_as(attention)
            right, lower = work.sample(
                places, attention, tokens, rows, all_entries[:, entries].view(4, *attention.shape)
            )
            if of_samples:
                ends = work.ends[: bags.stop - bags.start + 1]
                at_upper, across_upper, at_lower, across_lower = _entry_gradients(
                    rows, corners, ends, grads[bags], work.table, cells
                )
                # from the four corners to slopes along the upper and the lower line, to the values of both lines above
                # and below the sample, to the slope from one to the other
                across_upper -= at_upper
                across_lower -= at_lower
                at_upper.addcmul_(right, across_upper)
                down = at_lower.addcmul_(right, across_lower).sub_(at_upper)
                of_weights = at_upper.addcmul_(lower, down)
                slopes = torch.stack((across_upper.lerp_(across_lower, lower), down)).mul_(attention)
                if work.softmax:
                    of_weights *= attention
                    of_weights -= attention * of_weights.sum(-1, keepdim=True)
                else:
                    slopes *= work.sample.extent[:, : rows.shape[0], : rows.shape[1]]
                grad_weights.flatten(3)[image, tokens, heads] = of_weights
                grad_places.flatten(3, 4)[image, tokens, heads] = slopes.permute(1, 2, 3, 0)
        if of_value:
            entries = slice(len(grads) * work.samples)
            ends = work.ends[: len(grads) + 1]
            table = _table_gradient(
                all_rows[entries], all_entries[:, entries], corners, ends, grads, work.table, cells
            )
            for inner, level in work.maps.pairs(table, grad_value[image, :, heads]):
                level.copy_(inner)
    return grad_value, grad_places, grad_weights


def _empty_gradients(
    value: Tensor, places: Tensor, weights: Tensor, of_value: bool, of_samples: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = ((value, of_value), (places, of_samples), (weights, of_samples))
    grad_value, grad_places, grad_weights = (x.new_empty(x.shape if asked else 0) for x, asked in wanted)
    return grad_value, grad_places, grad_weights


@_attention.register_fake
def _(value: Tensor, points: Tensor | None, places: Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
    return value.new_empty(weights.shape[0], weights.shape[1], value.shape[2] * value.shape[3])


@_attention_backward.register_fake
def _(
    grad: Tensor,
    value: Tensor,
    points: Tensor | None,
    places: Tensor,
    weights: Tensor,
    sizes: Sequence[int],
    of_value: bool,
    of_samples: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(value, places, weights, of_value, of_samples)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.sizes = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_value, _, of_places, of_weights, _ = ctx.needs_input_grad
    gradients = _attention_backward(grad, *ctx.saved_tensors, ctx.sizes, of_value, of_places or of_weights)
    value, places, weights = (g if n else None for g, n in zip(gradients, (of_value, of_places, of_weights)))
    return value, None, places, weights, None


_attention.register_autograd(_differentiate, setup_context=_keep)


def ms_deform_attn_cpu(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """See :func:`mask2former_plugin.modeling.ops.ms_deform_attn`; differentiable once.

    An operator of ``torch.library``, which ``torch.compile`` keeps as it is.
    """
    weights = attention_weights.to(sampling_locations.dtype)
    return _attention(value, None, sampling_locations, weights, _flat(spatial_shapes))


def ms_deform_attn_from_logits_cpu(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], points: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """See :func:`mask2former_plugin.modeling.ops.ms_deform_attn_from_logits`; differentiable once."""
    return _attention(value, points, offsets, logits, _flat(spatial_shapes))


def _flat(spatial_shapes: Sequence[tuple[int, int]]) -> list[int]:
    return [extent for shape in spatial_shapes for extent in shape]
