"""Unpadded binary masks give what padded float copies give."""

import pytest
import torch
import torch.nn.functional as F

from mask2former_plugin.modeling.target_masks import common_size, pad_masks, resize_masks, sample_masks


def padded_copy(masks, size):
    copy = torch.zeros(len(masks), *size)
    copy[:, : masks.shape[1], : masks.shape[2]] = masks
    return copy


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
@pytest.mark.parametrize(("size", "padded_size"), [((13, 22), (32, 32)), ((32, 20), (32, 20)), ((1, 1), (7, 3))])
def test_sampling_equals_grid_sample_of_the_padded_masks(dtype, size, padded_size):
    masks = (torch.rand(5, *size) < 0.5).to(dtype)
    # the corners lie half outside, where zeros are mixed in
    points = torch.cat([torch.rand(400, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])])
    expected = F.grid_sample(padded_copy(masks, padded_size)[None], (2 * points - 1)[None, None], align_corners=False)[
        0, :, 0
    ]
    torch.testing.assert_close(sample_masks(masks, points, padded_size), expected, atol=1e-5, rtol=0)
    own = torch.rand(5, 60, 2)
    expected = F.grid_sample(padded_copy(masks, padded_size)[:, None], (2 * own - 1)[:, None], align_corners=False)[
        :, 0, 0
    ]
    torch.testing.assert_close(sample_masks(masks, own, padded_size), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (50, 3), (32, 40)])
def test_nearest_equals_interpolate_of_the_padded_masks(size):
    masks = torch.rand(4, 21, 37) < 0.5
    expected = F.interpolate(padded_copy(masks, (32, 40))[:, None], size=size, mode="nearest")[:, 0]
    resized = resize_masks(masks, size, (32, 40))
    assert resized.dtype == torch.bool
    assert torch.equal(resized.float(), expected)


def test_no_masks():
    none = torch.zeros(0, 5, 6, dtype=torch.bool)
    assert sample_masks(none, torch.rand(7, 2), (8, 8)).shape == (0, 7)
    assert sample_masks(none, torch.rand(0, 7, 2), (8, 8)).shape == (0, 7)
    assert resize_masks(none, (2, 3), (8, 8)).shape == (0, 2, 3)


def test_padding_and_common_size():
    masks = torch.rand(2, 3, 5) < 0.5
    assert torch.equal(pad_masks(masks, (4, 7)).float(), padded_copy(masks, (4, 7)))
    assert common_size([masks, torch.zeros(0, 9, 2)]) == (9, 5)
