"""Multi-scale deformable attention: every implementation against the definition, written as loops."""

import pytest
import torch

from mask2former_plugin.modeling.ops import (
    cpu,
    implementation_for,
    ms_deform_attn,
    ms_deform_attn_cpu,
    ms_deform_attn_reference,
)

SHAPES = [(3, 4), (5, 2), (1, 1)]
IMPLEMENTATIONS = [ms_deform_attn_reference, ms_deform_attn_cpu]


def arguments(dtype=torch.float64, batch=2, queries=3, heads=2, points=2, width=3, shapes=SHAPES):
    length = sum(h * w for h, w in shapes)
    value = torch.randn(batch, length, heads, width, dtype=dtype)
    # a good part outside of the maps, some of it far
    locations = torch.rand(batch, queries, heads, len(shapes), points, 2, dtype=dtype) * 1.6 - 0.3
    locations[:, 0, 0, 0, 0] *= 50
    weights = torch.randn(batch, queries, heads, len(shapes), points, dtype=dtype)
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


@pytest.fixture(params=[1, 10**6], ids=["chunks of one query", "one chunk"])
def chunks(request, monkeypatch):
    for name in ("FORWARD_SAMPLES", "BACKWARD_SAMPLES"):
        monkeypatch.setattr(cpu, name, request.param)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values(implementation, chunks):
    value, locations, weights = arguments()
    expected = loops(value, SHAPES, locations, weights)
    assert expected.abs().max() > 0.1  # the points hit something
    torch.testing.assert_close(implementation(value, SHAPES, locations, weights), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients(implementation, chunks):
    inputs = [x.requires_grad_() for x in arguments(batch=1, queries=2)]
    assert torch.autograd.gradcheck(lambda v, l, w: implementation(v, SHAPES, l, w), inputs, eps=1e-7, atol=1e-5)


def gradients(implementation, shapes, value, locations, weights):
    inputs = [x.clone().requires_grad_() for x in (value, locations, weights)]
    output = implementation(
        value=inputs[0], spatial_shapes=shapes, sampling_locations=inputs[1], attention_weights=inputs[2]
    )
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return output, torch.autograd.grad((output * noise).sum(), inputs)


@pytest.mark.parametrize("shapes", [[(7, 9), (4, 5), (2, 3)], [(1, 6)], [(5, 1), (8, 8)]])
def test_cpu_equals_the_reference(shapes, chunks):
    inputs = arguments(queries=17, heads=3, points=4, width=5, shapes=shapes)
    output, found = gradients(ms_deform_attn_cpu, shapes, *inputs)
    expected, wanted = gradients(ms_deform_attn_reference, shapes, *inputs)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    for f, w in zip(found, wanted):
        torch.testing.assert_close(f, w, rtol=0, atol=1e-11)


def test_gradients_on_pixel_centres():
    """The derivative jumps there, and there all points are when training starts: both take the one to the right."""
    shapes = [(8, 8)]  # eighths are exact
    x, y = torch.meshgrid(torch.arange(-2, 10), torch.arange(-2, 10), indexing="xy")
    places = torch.stack((x.flatten() + 0.5, y.flatten() + 0.5), 1).double()
    value = torch.randn(1, 64, 1, 3, dtype=torch.float64)
    locations = (places / 8)[None, :, None, None, None]
    weights = torch.rand(1, len(places), 1, 1, 1, dtype=torch.float64)
    _, found = gradients(ms_deform_attn_cpu, shapes, value, locations, weights)
    _, wanted = gradients(ms_deform_attn_reference, shapes, value, locations, weights)
    assert wanted[1].abs().max() > 0.1
    for f, w in zip(found, wanted):
        torch.testing.assert_close(f, w, rtol=0, atol=1e-12)


def test_only_the_gradients_that_are_needed():
    value, locations, weights = arguments()
    locations.requires_grad_()
    ms_deform_attn_cpu(value, SHAPES, locations, weights).sum().backward()
    assert locations.grad is not None and value.grad is None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_values_are_sampled_in_float32(implementation):
    value, locations, weights = arguments(torch.float32)
    exact = implementation(value.bfloat16().float(), SHAPES, locations, weights)
    half = implementation(value.bfloat16(), SHAPES, locations, weights)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, exact.bfloat16(), rtol=2**-7, atol=1e-6)  # one rounding at the end


def test_not_a_number_does_not_become_an_index():
    value, locations, weights = arguments()
    locations[0, 1] = float("nan")
    weights[0, 1] = float("nan")
    output = ms_deform_attn_cpu(value, SHAPES, locations, weights)
    assert output[0, 1].isnan().all()
    assert output[1].isfinite().all() and output[0, 0].isfinite().all()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_choice_of_the_implementation():
    assert implementation_for(torch.device("cpu")) is ms_deform_attn_cpu
    assert implementation_for(torch.device("meta")) is ms_deform_attn_reference
    value, locations, weights = arguments()
    torch.testing.assert_close(
        ms_deform_attn(value, SHAPES, locations, weights), loops(value, SHAPES, locations, weights)
    )
    traced = torch.jit.trace(lambda v, l, w: ms_deform_attn(v, SHAPES, l, w), (value, locations, weights))
    assert "grid_sampler" in str(traced.graph)


def test_wrong_shapes_are_named():
    value, locations, weights = arguments()
    with pytest.raises(ValueError, match="23 tokens, but spatial_shapes"):
        ms_deform_attn(value, [(3, 4), (5, 2)], locations, weights)
    with pytest.raises(ValueError, match=r"attention_weights \[B, T, M, L, P\]"):
        ms_deform_attn(value, SHAPES, locations, weights[..., :1])
