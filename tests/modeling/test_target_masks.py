"""Unpadded binary masks give what padded float copies give."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from pycocotools import mask as coco_masks

from mask2former_plugin.modeling.target_masks import (
    PackedMasks,
    RunLengthMasks,
    common_size,
    decoded,
    resize_masks,
    sample_mask,
)


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
    torch.testing.assert_close(PackedMasks(masks).sample(points, padded_size).T[:5], expected, atol=1e-5, rtol=0)
    own = torch.rand(3, 60, 2)
    expected = F.grid_sample(
        padded_copy(masks[:1], padded_size).expand(3, 1, -1, -1), (2 * own - 1)[:, None], align_corners=False
    )[:, 0, 0]
    torch.testing.assert_close(sample_mask(masks[0], own, padded_size), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("number", [1, 8, 9, 17, 33, 64, 65, 131])
def test_any_number_of_masks_is_sampled(number):
    masks = torch.rand(number, 13, 22) < 0.5
    points = torch.rand(300, 2)
    found = PackedMasks(masks).sample(points, (16, 32))
    assert found.shape == (300, -(-number // 8) * 8)
    grid = (2 * points - 1)[None, None]
    expected = F.grid_sample(padded_copy(masks, (16, 32))[None], grid, align_corners=False)[0, :, 0]
    torch.testing.assert_close(found[:, :number].T, expected, atol=1e-5, rtol=0)
    assert not found[:, number:].any()


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (50, 3), (32, 40)])
def test_nearest_equals_interpolate_of_the_padded_masks(size):
    masks = torch.rand(4, 21, 37) < 0.5
    expected = F.interpolate(padded_copy(masks, (32, 40))[:, None], size=size, mode="nearest")[:, 0]
    resized = resize_masks(masks, size, (32, 40))
    assert resized.dtype == torch.bool
    assert torch.equal(resized.float(), expected)


def test_no_masks():
    none = torch.zeros(0, 5, 6, dtype=torch.bool)
    assert PackedMasks(none).sample(torch.rand(7, 2), (8, 8)).shape == (7, 0)
    assert resize_masks(none, (2, 3), (8, 8)).shape == (0, 2, 3)


def test_common_size():
    assert common_size([torch.zeros(2, 3, 5), torch.zeros(0, 9, 2)]) == (9, 5)


def run_lengths(masks, compressed=True):
    """COCO encodings by pycocotools, or lists of lengths counted pixel by pixel."""
    if compressed:
        return [coco_masks.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in masks]
    encoded = []
    for mask in masks:
        counts, value = [0], 0
        for pixel in mask.T.flatten().tolist():
            if pixel != value:
                value = pixel
                counts.append(0)
            counts[-1] += 1
        encoded.append({"size": list(mask.shape), "counts": counts})
    return encoded


def various_masks(number, height, width):
    """Noise, rectangles, all and nothing; an empty first run and runs of more than 2**10 pixels among them."""
    masks = torch.rand(number, height, width) < 0.3
    masks[0], masks[1] = False, True
    masks[2, : height // 2, 1:] = True
    masks[3] = False
    masks[3, -1, -1] = True
    return masks


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("size", [(53, 71), (1, 40), (60, 1), (7, 1100)])
def test_run_lengths_hold_the_masks(size, compressed):
    masks = various_masks(11, *size)
    encoded = run_lengths(masks, compressed)
    held = RunLengthMasks.from_coco(encoded, size)
    assert held.shape == (11, *size) and len(held) == 11
    assert torch.equal(held.decode().bool(), masks)
    on_device = held._decode_on_device(np.diff(held.starts), size[0] * size[1])  # what other devices than CPUs do
    assert torch.equal(on_device.view(11, size[1], size[0]).transpose(1, 2).bool(), masks)
    if compressed:
        as_text = [{**one, "counts": one["counts"].decode()} for one in encoded]
        assert torch.equal(RunLengthMasks.from_coco(as_text, size).ends, held.ends)


def test_run_lengths_are_chosen_like_a_list_or_a_tensor():
    masks = various_masks(9, 20, 30)
    held = RunLengthMasks.from_coco(run_lengths(masks), (20, 30))
    keep = torch.rand(9) < 0.5
    for chosen in (slice(2, 7), [8, 0, 0], torch.tensor([3, 1]), keep, keep.numpy(), slice(0, 0)):
        assert torch.equal(held[chosen].decode().bool(), masks[chosen])
    assert torch.equal(held[4].decode()[0].bool(), masks[4])
    instances = Instances((20, 30))
    instances.gt_masks, instances.gt_classes = held, torch.arange(9)
    assert torch.equal(instances[keep].gt_masks.decode().bool(), masks[keep])
    assert torch.equal(copy.deepcopy(instances).to("cpu").gt_masks.decode().bool(), masks)


def test_no_run_lengths():
    none = RunLengthMasks.from_coco([], (5, 6))
    assert none.decode().shape == (0, 5, 6) == none.shape
    assert PackedMasks(none).sample(torch.rand(7, 2), (8, 8)).shape == (7, 0)
    assert resize_masks(none, (2, 3), (8, 8)).shape == (0, 2, 3)


def test_wrong_run_lengths():
    good = run_lengths(various_masks(4, 6, 7))
    with pytest.raises(ValueError, match="mask 3 is encoded for 6x7 pixels .* the image has 7x6"):
        RunLengthMasks.from_coco([*run_lengths(various_masks(4, 7, 6))[:3], good[3]], (7, 6))
    for counts in ([40, 1], [44, -2], []):
        with pytest.raises(ValueError, match="mask 0: its runs are not a division of 6x7 pixels"):
            RunLengthMasks.from_coco([{"size": [6, 7], "counts": counts}], (6, 7))


@pytest.mark.parametrize("number", [1, 7, 8, 9, 25])
def test_run_lengths_are_sampled_and_resized_like_bool_masks(number):
    masks = various_masks(25, 23, 37)[-number:]
    held = RunLengthMasks.from_coco(run_lengths(masks), (23, 37))
    points = torch.rand(300, 2, dtype=torch.float64)
    assert torch.equal(PackedMasks(held).sample(points, (32, 64)), PackedMasks(masks).sample(points, (32, 64)))
    assert torch.equal(resize_masks(held, (9, 17), (32, 64)), resize_masks(masks, (9, 17), (32, 64)))
    own = torch.rand(2, 50, 2, dtype=torch.float64)
    assert torch.equal(
        sample_mask(decoded(held, [number - 1])[0], own, (32, 64)),
        sample_mask(decoded(masks, [number - 1])[0], own, (32, 64)),
    )
