"""Rows on demand equal rows of the whole, resized map."""

import pytest
import torch
import torch.nn.functional as F
from inference_reference import upsampled

from mask2former_plugin.modeling.inference import upsampling
from mask2former_plugin.modeling.inference.upsampling import ImageMasks, RowResize, strips


@pytest.mark.parametrize("target", [(17, 23), (40, 23), (17, 61), (51, 92), (5, 7), (173, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_range_of_rows_equals_interpolate(target, dtype):
    maps = torch.randn(3, 17, 23, dtype=dtype)
    expected = F.interpolate(maps[None], size=target, mode="bilinear", align_corners=False)[0]
    resize = RowResize(maps.shape[1:], target, dtype)
    # interpolate rounds its positions differently in different versions of torch: a few units in the last place of values around 3
    tolerance = 5e-6 if dtype == torch.float32 else 1e-13
    for start in range(0, target[0], 3):
        for stop in {start + 1, min(start + 4, target[0]), target[0]}:
            needed = resize.source_rows(start, stop)
            rows = resize(maps[:, slice(*needed)], start, stop)
            torch.testing.assert_close(rows, expected[:, start:stop], atol=tolerance, rtol=0)


def test_positions_are_rounded_as_interpolate_rounds_them():
    # of a ramp, the resized values are the positions themselves
    for source, target in ((800, 1400), (1066, 1900), (1333, 517), (750, 2000)):
        ramp = torch.arange(source, dtype=torch.float32)[None, :, None]
        expected = F.interpolate(ramp[None], size=(target, 1), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(
            RowResize((source, 1), (target, 1))(ramp, 0, target), expected, atol=1e-4 / 2, rtol=6e-8
        )


@pytest.mark.parametrize("output_size", [None, (45, 50), (90, 133), (20, 31)])
def test_image_masks_equal_the_composed_resizes(output_size):
    logits = torch.randn(4, 16, 24)
    masks = ImageMasks(logits, (64, 96), (45, 81), output_size)
    expected = upsampled(logits, (64, 96), (45, 81), output_size)
    assert masks.size == expected.shape[1:]
    for start in range(0, masks.size[0], 7):
        stop = min(start + 7, masks.size[0])
        torch.testing.assert_close(masks.rows(start, stop), expected[:, start:stop], atol=5e-6, rtol=0)


def test_half_precision_logits_are_resized_in_float32():
    logits = torch.randn(2, 8, 8).bfloat16()
    rows = ImageMasks(logits, (32, 32), (30, 30)).rows(0, 30)
    torch.testing.assert_close(rows, upsampled(logits.float(), (32, 32), (30, 30)), atol=5e-6, rtol=0)


@pytest.mark.parametrize("values", [1, 100, 10**6])
def test_strips_cover_all_rows_once_and_stay_small(monkeypatch, values):
    monkeypatch.setitem(upsampling._STRIP_VALUES, "cpu", values)
    found = list(strips(37, 5, 4, torch.device("cpu")))
    assert [row for start, stop in found for row in range(start, stop)] == list(range(37))
    assert all((stop - start) * 5 * 4 <= max(values, 5 * 4) for start, stop in found)
