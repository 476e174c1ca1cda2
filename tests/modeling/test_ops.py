"""Multi-scale deformable attention against its definition, written as loops."""

import pytest
import torch

from mask2former_plugin.modeling.ops import ms_deform_attn, ms_deform_attn_reference

SHAPES = [(3, 4), (5, 2), (1, 1)]


def arguments(dtype=torch.float64, batch=2, queries=3, heads=2, points=2, width=3):
    length = sum(h * w for h, w in SHAPES)
    value = torch.randn(batch, length, heads, width, dtype=dtype)
    # a good part outside of the maps
    locations = torch.rand(batch, queries, heads, len(SHAPES), points, 2, dtype=dtype) * 1.6 - 0.3
    weights = torch.randn(batch, queries, heads, len(SHAPES), points, dtype=dtype)
    return value, locations, weights


def loops(value, shapes, locations, weights):
    """Equation 3 of Deformable DETR with bilinear interpolation written out."""
    batch, queries, heads, levels, points, _ = locations.shape
    output = value.new_zeros(batch, queries, heads, value.shape[3])
    for b in range(batch):
        for q in range(queries):
            for h in range(heads):
                start = 0
                for level, (height, width) in enumerate(shapes):
                    for p in range(points):
                        x = float(locations[b, q, h, level, p, 0]) * width - 0.5
                        y = float(locations[b, q, h, level, p, 1]) * height - 0.5
                        for row in range(height):
                            for column in range(width):
                                share = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                                token = value[b, start + row * width + column, h]
                                output[b, q, h] += share * weights[b, q, h, level, p] * token
                    start += height * width
    return output.flatten(2)


def test_values():
    value, locations, weights = arguments()
    expected = loops(value, SHAPES, locations, weights)
    assert expected.abs().max() > 0.1  # the points hit something
    torch.testing.assert_close(ms_deform_attn(value, SHAPES, locations, weights), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(ms_deform_attn_reference(value, SHAPES, locations, weights), expected, rtol=0, atol=1e-12)


def test_gradients():
    inputs = [x.requires_grad_() for x in arguments(batch=1, queries=2)]
    assert torch.autograd.gradcheck(lambda v, l, w: ms_deform_attn(v, SHAPES, l, w), inputs, eps=1e-7, atol=1e-5)


def test_half_precision_values_are_sampled_in_float32():
    value, locations, weights = arguments(torch.float32)
    exact = ms_deform_attn(value.bfloat16().float(), SHAPES, locations, weights)
    half = ms_deform_attn(value.bfloat16(), SHAPES, locations, weights)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, exact.bfloat16(), rtol=2**-7, atol=1e-6)  # one rounding at the end


def test_wrong_shapes_are_named():
    value, locations, weights = arguments()
    with pytest.raises(ValueError, match="23 tokens, but spatial_shapes"):
        ms_deform_attn(value, [(3, 4), (5, 2)], locations, weights)
    with pytest.raises(ValueError, match=r"attention_weights \[B, T, M, L, P\]"):
        ms_deform_attn(value, SHAPES, locations, weights[..., :1])
