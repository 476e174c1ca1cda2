"""Multi-scale deformable attention in Triton, forward and backward, the softmax and the places of the samples fused.

A program handles neighbouring queries of one head, whose channels lie side by side in memory. Sums are kept in float32
(in float64 if an input is float64) and rounded once, when they are stored. The gradient of the values is collected with
atomic additions: its last bits differ from run to run.

Both directions are operators of ``torch.library``, which ``torch.compile`` keeps as they are. Autocast needs no rule:
every floating-point type goes in as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

MAX_LEVELS = 8

# (queries of a program, warps), tried at the first call of each kind
CHOICES = ((16, 2), (16, 4), (32, 4), (64, 8))
# what differs from image to image must not compile another kernel
NUMBERS = ["tokens", "queries", *(f"size{level}" for level in range(MAX_LEVELS))]
PROBLEM = ["HEADS", "WIDTH", "LEVELS", "POINTS", "PLACES_STRIDE", "WEIGHTS_STRIDE", "FUSED"]


@triton.jit
def _height_and_width(level, size0, size1, size2, size3, size4, size5, size6, size7):
    lower = tl.where(level < 2, tl.where(level == 0, size0, size1), tl.where(level == 2, size2, size3))
    upper = tl.where(level < 6, tl.where(level == 4, size4, size5), tl.where(level == 6, size6, size7))
    size = tl.where(level < 4, lower, upper)
    return (size >> 32).to(tl.int32), (size & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _queries(queries, HEADS: constexpr, BLOCK: constexpr):
    """Image, head, queries, their places among the queries of all images, and which of them exist.

    Heads vary fastest from program to program, since their places and weights are neighbours in memory.
    """
    program = tl.program_id(0)
    head = program % HEADS
    blocks = (queries + BLOCK - 1) // BLOCK
    image = program // HEADS // blocks
    query = program // HEADS % blocks * BLOCK + tl.arange(0, BLOCK)
    exists = query < queries
    query = tl.minimum(query, queries - 1)  # beyond the end the last one is read again; nothing of it is stored
    return image, head, query, image.to(tl.int64) * queries + query, exists


@triton.jit
def _cell(position, extent):
    """Cell at or before a position and the share of the next one; what touches no cell, NaN too, goes to cell -2."""
    position = tl.where((position >= -1) & (position < extent), position, -2.0)
    cell = tl.floor(position)
    return cell.to(tl.int32), position - cell


@triton.jit
def _place(places, sample, x, y, height, width, FUSED: constexpr, SUM: constexpr):
    """Column and row of a sample of every query, share of the next column and of the next row."""
    across = tl.load(places + 2 * sample).to(SUM)
    down = tl.load(places + 2 * sample + 1).to(SUM)
    if FUSED:
        across += x * width
        down += y * height
    else:
        across *= width
        down *= height
    column, right = _cell(across - 0.5, width)
    row, lower = _cell(down - 0.5, height)
    return column, row, right, lower


@triton.jit
def _corner(start, column, row, height, width, channel, STRIDE: constexpr, WIDTH: constexpr, VECTOR: constexpr):
    """Offsets of the channels of a cell for every query, in vectors of at most that size, and which of them exist."""
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    token = start + row * width + column
    offset = token.to(tl.int64)[:, None] * STRIDE + channel
    return tl.max_contiguous(offset, [1, VECTOR]), inside[:, None] & (channel < WIDTH)


@triton.jit
def _share(next_share, NEXT: constexpr):
    return next_share if NEXT else 1.0 - next_share


@triton.jit(do_not_specialize=NUMBERS)
def _forward_kernel(
    value, points, places, weights, output, logarithms,
    tokens, queries, size0, size1, size2, size3, size4, size5, size6, size7,
    HEADS: constexpr, WIDTH: constexpr, LEVELS: constexpr, POINTS: constexpr,
    PLACES_STRIDE: constexpr, WEIGHTS_STRIDE: constexpr,
    FUSED: constexpr, SUM: constexpr, BLOCK_WIDTH: constexpr,
    BLOCK: constexpr,
):  # fmt: skip
    SAMPLES: constexpr = LEVELS * POINTS
    STRIDE: constexpr = HEADS * WIDTH
    image, head, query, token, exists = _queries(queries, HEADS, BLOCK)
    places += token * PLACES_STRIDE + head * (2 * SAMPLES)
    weights += token * WEIGHTS_STRIDE + head * SAMPLES
    bag = token * HEADS + head
    channel = tl.arange(0, BLOCK_WIDTH)[None, :]
    value += image.to(tl.int64) * tokens * STRIDE + head * WIDTH
    x, y, peak = 0.0, 0.0, 0.0
    denominator = tl.zeros((BLOCK,), dtype=SUM)
    if FUSED:
        x = tl.load(points + 2 * query).to(SUM)
        y = tl.load(points + 2 * query + 1).to(SUM)
        peak = tl.load(weights).to(SUM)
        for other in tl.static_range(1, SAMPLES):
            peak = tl.maximum(peak, tl.load(weights + other).to(SUM))
    total = tl.zeros((BLOCK, BLOCK_WIDTH), dtype=SUM)
    start = 0
    for level in range(LEVELS):
        height, width = _height_and_width(level, size0, size1, size2, size3, size4, size5, size6, size7)
        for point in tl.static_range(POINTS):
            sample = level * POINTS + point
            column, row, right, lower = _place(places, sample, x, y, height, width, FUSED, SUM)
            attention = tl.load(weights + sample).to(SUM)
            if FUSED:
                attention = tl.exp(attention - peak)
                denominator += attention
            for corner in tl.static_range(4):
                offset, inside = _corner(
                    start, column + corner % 2, row + corner // 2, height, width, channel, STRIDE, WIDTH, BLOCK_WIDTH
                )
                cell = tl.load(value + offset, mask=inside, other=0.0).to(SUM)
                total += (attention * _share(right, corner % 2) * _share(lower, corner // 2))[:, None] * cell
        start += height * width
    if FUSED:
        total /= denominator[:, None]
        tl.store(logarithms + bag, peak + tl.log(denominator), mask=exists)
    output += bag[:, None] * WIDTH + channel
    tl.store(output, total.to(output.dtype.element_ty), mask=exists[:, None] & (channel < WIDTH))


@triton.jit(do_not_specialize=NUMBERS)
def _backward_kernel(
    value, points, places, weights, output, logarithms, grad_output, grad_value, grad_places, grad_weights,
    tokens, queries, size0, size1, size2, size3, size4, size5, size6, size7,
    HEADS: constexpr, WIDTH: constexpr, LEVELS: constexpr, POINTS: constexpr,
    PLACES_STRIDE: constexpr, WEIGHTS_STRIDE: constexpr,
    FUSED: constexpr, SUM: constexpr, BLOCK_WIDTH: constexpr,
    BLOCK_SAMPLES: constexpr, VECTOR: constexpr, NEEDS_VALUE: constexpr,
    BLOCK: constexpr,  # last, since the tuner of Triton 3.0 counts the arguments without it
):  # fmt: skip
    SAMPLES: constexpr = LEVELS * POINTS
    STRIDE: constexpr = HEADS * WIDTH
    image, head, query, token, exists = _queries(queries, HEADS, BLOCK)
    places += token * PLACES_STRIDE + head * (2 * SAMPLES)
    weights += token * WEIGHTS_STRIDE + head * SAMPLES
    bag = token * HEADS + head
    channel = tl.arange(0, BLOCK_WIDTH)[None, :]
    own = tl.max_contiguous(bag[:, None] * WIDTH + channel, [1, VECTOR])
    existing = exists[:, None] & (channel < WIDTH)
    grad = tl.load(grad_output + own, mask=existing, other=0.0).to(SUM)
    first = image.to(tl.int64) * tokens * STRIDE + head * WIDTH
    value += first
    grad_value += first
    x, y, logarithm, mean = 0.0, 0.0, 0.0, 0.0
    if FUSED:
        x = tl.load(points + 2 * query).to(SUM)
        y = tl.load(points + 2 * query + 1).to(SUM)
        logarithm = tl.load(logarithms + bag)
        # the softmax needs the mean of the weights' gradients <grad, sample> under the weights, which is <grad, output>
        mean = tl.sum(grad * tl.load(output + own, mask=existing, other=0.0).to(SUM), 1)
    # gradients of a bag are collected and stored side by side
    place_index = tl.arange(0, 2 * BLOCK_SAMPLES)[None, :]
    weight_index = tl.arange(0, BLOCK_SAMPLES)[None, :]
    all_places = tl.zeros((BLOCK, 2 * BLOCK_SAMPLES), dtype=SUM)
    all_weights = tl.zeros((BLOCK, BLOCK_SAMPLES), dtype=SUM)
    start = 0
    for level in range(LEVELS):
        height, width = _height_and_width(level, size0, size1, size2, size3, size4, size5, size6, size7)
        for point in tl.static_range(POINTS):
            sample = level * POINTS + point
            column, row, right, lower = _place(places, sample, x, y, height, width, FUSED, SUM)
            attention = tl.load(weights + sample).to(SUM)
            if FUSED:
                attention = tl.exp(attention - logarithm)
            grad_attention = tl.zeros((BLOCK,), dtype=SUM)
            grad_across = tl.zeros((BLOCK,), dtype=SUM)
            grad_down = tl.zeros((BLOCK,), dtype=SUM)
            for corner in tl.static_range(4):
                offset, inside = _corner(
                    start, column + corner % 2, row + corner // 2, height, width, channel, STRIDE, WIDTH, VECTOR
                )
                across, down = _share(right, corner % 2), _share(lower, corner // 2)
                product = tl.sum(grad * tl.load(value + offset, mask=inside, other=0.0).to(SUM), 1)
                grad_attention += across * down * product
                grad_across += (2 * (corner % 2) - 1) * down * product
                grad_down += (2 * (corner // 2) - 1) * across * product
                if NEEDS_VALUE:
                    addend = (attention * across * down)[:, None] * grad
                    tl.atomic_add(grad_value + offset, addend, mask=inside & exists[:, None], sem="relaxed")
            grad_across *= attention
            grad_down *= attention
            if FUSED:
                grad_attention = attention * (grad_attention - mean)
            else:
                grad_across *= width
                grad_down *= height
            all_places = tl.where(place_index == 2 * sample, grad_across[:, None], all_places)
            all_places = tl.where(place_index == 2 * sample + 1, grad_down[:, None], all_places)
            all_weights = tl.where(weight_index == sample, grad_attention[:, None], all_weights)
        start += height * width
    grad_places += tl.max_contiguous(bag[:, None] * (2 * SAMPLES) + place_index, [1, 2])
    grad_weights += tl.max_contiguous(bag[:, None] * SAMPLES + weight_index, [1, 1])
    stored = exists[:, None]
    tl.store(grad_places, all_places.to(grad_places.dtype.element_ty), mask=stored & (place_index < 2 * SAMPLES))
    tl.store(grad_weights, all_weights.to(grad_weights.dtype.element_ty), mask=stored & (weight_index < SAMPLES))


def _tuned(kernel: Any, **options: Any) -> Any:
    """The kernel with launch parameters to choose from; one choice for the interpreter, which tests on CPUs use."""
    choices = CHOICES if isinstance(kernel, triton.JITFunction) else CHOICES[:1]
    configs = [triton.Config({"BLOCK": block}, num_warps=warps, num_stages=1) for block, warps in choices]
    return triton.autotune(configs, **options)(kernel)


_forward = _tuned(_forward_kernel, key=PROBLEM)
_backward = _tuned(_backward_kernel, key=[*PROBLEM, "NEEDS_VALUE"], reset_to_zero=["grad_value"])


def _launch(
    kernel: Any, inputs: Sequence[Tensor], others: Sequence[Tensor], sizes: Sequence[int], fused: bool, **constants: Any
) -> None:
    """Runs a kernel over all queries; inputs are value, points, places and weights."""
    value, _, places, weights = inputs
    if any(x.device != value.device for x in inputs):
        raise ValueError(f"all inputs must be on one device, got {[str(x.device) for x in inputs]}")
    batch, tokens, heads, width = value.shape
    queries, _, levels, points = weights.shape[1:]
    packed = [height << 32 | width for height, width in zip(sizes[::2], sizes[1::2])]

    def programs(options: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(queries, options["BLOCK"]) * batch * heads,)

    with torch.cuda.device_of(value):
        kernel[programs](
            *inputs,
            *others,
            tokens,
            queries,
            *packed,
            *[0] * (MAX_LEVELS - levels),
            HEADS=heads,
            WIDTH=width,
            LEVELS=levels,
            POINTS=points,
            PLACES_STRIDE=places.stride(1),
            WEIGHTS_STRIDE=weights.stride(1),
            FUSED=fused,
            SUM=tl.float64 if _precision(inputs) == torch.float64 else tl.float32,
            BLOCK_WIDTH=triton.next_power_of_2(width),
            **constants,
        )


def _precision(inputs: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def _readable(value: Tensor, points: Tensor | None, places: Tensor, weights: Tensor) -> list[Tensor]:
    """The inputs as the kernels read them. One that takes no points wants a tensor all the same."""
    return [
        value.contiguous(),
        (places if points is None else points).contiguous(),
        _with_rows_at_one_distance(places),
        _with_rows_at_one_distance(weights),
    ]


def _with_rows_at_one_distance(x: Tensor) -> Tensor:
    """``[B, T, …]`` copied, if need be, such that what belongs to a query is contiguous and lies at B·T even distances.

    Parts of a product with several linear layers' weights need no copy.
    """
    inner = x[:1, :1].is_contiguous()
    even = x.shape[1] > 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return x if inner and even else x.contiguous()


_INPUTS = "Tensor value, SymInt[] sizes, Tensor? points, Tensor places, Tensor weights"


@torch.library.custom_op(
    "mask2former_plugin::ms_deform_attn_triton", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)"
)
def _attention(
    value: Tensor, sizes: Sequence[int], points: Tensor | None, places: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention ``[B, T, M·D]`` and the logarithms of the softmax's denominators ``[B, T, M]``.

    Without points ``places`` are locations, ``weights`` are used as they are, and the logarithms are left uninitialized;
    with points they are offsets and logits.
    """
    inputs = _readable(value, points, places, weights)
    output, logarithms = _empty_results(value, points, places, weights)
    if output.numel():
        _launch(_forward, inputs, [output, logarithms], sizes, points is not None)
    return output, logarithms


@_attention.register_fake
def _(
    value: Tensor, sizes: Sequence[int], points: Tensor | None, places: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    return _empty_results(value, points, places, weights)


def _empty_results(value: Tensor, points: Tensor | None, places: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, heads, width = value.shape
    queries = weights.shape[1]
    precision = _precision([value, places, weights] + ([] if points is None else [points]))
    return (
        value.new_empty(batch, queries, heads * width),
        value.new_empty((batch, queries, heads), dtype=precision),
    )


@torch.library.custom_op(
    "mask2former_plugin::ms_deform_attn_triton_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor output, Tensor logarithms, Tensor grad, bool needs_value) -> (Tensor, Tensor, Tensor)",
)
def _attention_backward(
    value: Tensor,
    sizes: Sequence[int],
    points: Tensor | None,
    places: Tensor,
    weights: Tensor,
    output: Tensor,
    logarithms: Tensor,
    grad: Tensor,
    needs_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value (empty if it is not needed), places and weights."""
    if needs_value:
        _alert_not_deterministic()
    inputs = _readable(value, points, places, weights)
    grad_value = value.new_zeros(value.shape if needs_value else 0, dtype=_precision(inputs))
    grad_places, grad_weights = places.new_empty(places.shape), weights.new_empty(weights.shape)
    if output.numel():
        _launch(
            _backward,
            inputs,
            [output, logarithms, grad.contiguous(), grad_value, grad_places, grad_weights],
            sizes,
            points is not None,
            BLOCK_SAMPLES=triton.next_power_of_2(weights.shape[3] * weights.shape[4]),
            # no load may be wider than the additions in float32: all that belongs to a channel is then in one thread
            VECTOR=min(triton.next_power_of_2(value.shape[3]), 4),
            NEEDS_VALUE=needs_value,
        )
    return grad_value.to(value.dtype), grad_places, grad_weights


@_attention_backward.register_fake
def _(
    value: Tensor,
    sizes: Sequence[int],
    points: Tensor | None,
    places: Tensor,
    weights: Tensor,
    output: Tensor,
    logarithms: Tensor,
    grad: Tensor,
    needs_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape if needs_value else 0),
        places.new_empty(places.shape),
        weights.new_empty(weights.shape),
    )


def _alert_not_deterministic() -> None:
    """What torch does for its own operators that have no deterministic implementation."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        "the gradient of multi-scale deformable attention has no deterministic implementation on CUDA (atomic "
        "additions), but torch.use_deterministic_algorithms(True) is set; set it with warn_only=True or train on a CPU"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    value, ctx.sizes, points, places, weights = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(value, points, places, weights, *output)


def _differentiate(ctx: Any, grad_output: Tensor, _: Tensor | None) -> tuple[Tensor | None, None, None, Tensor, Tensor]:
    value, points, places, weights, output, logarithms = ctx.saved_tensors
    needs_value = ctx.needs_input_grad[0]
    grad_value, grad_places, grad_weights = _attention_backward(
        value, ctx.sizes, points, places, weights, output, logarithms, grad_output, needs_value
    )
    return grad_value if needs_value else None, None, None, grad_places, grad_weights


_attention.register_autograd(_differentiate, setup_context=_keep)


def ms_deform_attn_triton(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """See :func:`mask2former_plugin.modeling.ops.ms_deform_attn`; at most 8 levels, differentiable once."""
    return _attention(value, _flat(spatial_shapes), None, sampling_locations, attention_weights)[0]


def ms_deform_attn_from_logits_triton(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], points: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """See :func:`mask2former_plugin.modeling.ops.ms_deform_attn_from_logits`; at most 8 levels, differentiable once."""
    return _attention(value, _flat(spatial_shapes), points, offsets, logits)[0]


def _flat(spatial_shapes: Sequence[tuple[int, int]]) -> list[int]:
    if len(spatial_shapes) > MAX_LEVELS:
        raise ValueError(
            f"multi-scale deformable attention on CUDA takes at most {MAX_LEVELS} levels, got {len(spatial_shapes)}"
        )
    return [number for shape in spatial_shapes for number in shape]


def traffic(value: Tensor, points: Tensor | None, places: Tensor, weights: Tensor) -> dict[str, int]:
    """Bytes that one call moves, for the bandwidth that the kernels reach; the arguments are those of the operator.

    ``forward`` and ``backward``: every tensor read or written once, the least that memory has to deliver; the gradient
    of the values counts as cleared, read and written by the additions, and rounded. ``forward_samples`` and
    ``backward_samples``: all cells that the samples read or add to, which caches can serve if they hold a level.
    """
    bags = weights.shape[:3].numel()
    sums = 4 if _precision([value, places, weights]) == torch.float32 else 8
    output = bags * value.shape[3] * value.element_size()
    fused = points is not None
    inputs = value.nbytes + places.nbytes + weights.nbytes + (points.nbytes if fused else 0)
    logarithms = bags * sums if fused else 0
    rounding = value.numel() * (sums + value.element_size()) if value.element_size() < sums else 0
    grad_value = 3 * value.numel() * sums + rounding
    cells = 4 * weights.numel() * value.shape[3]
    return {
        "forward": inputs + output + logarithms,
        "backward": inputs + output * (2 if fused else 1) + logarithms + grad_value + places.nbytes + weights.nbytes,
        "forward_samples": cells * value.element_size(),
        "backward_samples": cells * (value.element_size() + sums),
    }
