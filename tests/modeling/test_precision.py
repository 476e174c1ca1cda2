"""Half precision: what stays in float32 under autocast, and what would happen otherwise."""

import pytest
import torch

from mask2former_plugin.modeling.layers import MSDeformAttn, reference_points
from mask2former_plugin.modeling.ops import ms_deform_attn

SIZES = [(2, 256), (1, 128)]  # an image 2048 pixels wide at strides 8 and 16


@pytest.fixture
def ramp():
    """Value maps whose value is the column, so that a sampled value tells where it was sampled: ``[1, S, 1, 1]``."""
    columns = [torch.arange(width).repeat(height) * (256 / width) + (256 / width - 1) / 2 for height, width in SIZES]
    return torch.cat(columns).view(1, -1, 1, 1)


def test_places_in_bfloat16_miss_by_pixels(ramp):
    points = reference_points(SIZES, device=torch.device("cpu"), dtype=torch.float32)
    shape = (1, len(points), 1, len(SIZES), 1)
    weights = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2, 1).expand(shape)  # the finest level alone

    def columns(places):
        locations = places.float()[None, :, None, None, None].expand(*shape, 2)
        return ms_deform_attn(ramp, SIZES, locations, weights).flatten()

    inside = slice(8, 248)  # the border has no neighbours to interpolate with
    exact = points[inside, 0] * 256 - 0.5
    assert (columns(points)[inside] - exact).abs().max() < 1e-3
    # an error of one column is one of eight pixels of the image
    assert (columns(points.bfloat16())[inside] - exact).abs().max() * 8 >= 4


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_attention_under_autocast_finds_the_places(dtype, tolerance):
    torch.manual_seed(0)
    layer = MSDeformAttn(16, 2, 2, 4).eval()
    torch.nn.init.normal_(layer.attention_weights.weight, std=0.2)
    length = sum(height * width for height, width in SIZES)
    points = reference_points(SIZES, device=torch.device("cpu"), dtype=torch.float32)
    # white noise: a place that is off by a pixel gives an unrelated value
    query, value = torch.randn(1, length, 16), torch.randn(1, length, 16)
    with torch.no_grad():
        exact = layer(query, value, SIZES, points)
        with torch.autocast("cpu", dtype):
            actual = layer(query, value, SIZES, points)
            wrong = layer(query, value, SIZES, points.bfloat16().float())
    assert actual.dtype == dtype

    def error(x):
        return ((x.float() - exact).norm() / exact.norm()).item()

    assert error(actual) < tolerance < 5 * tolerance < error(wrong)
