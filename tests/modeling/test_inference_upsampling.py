"""Tiles on demand equal parts of the whole, resized map, and their bounds hold."""

import pytest
import torch
import torch.nn.functional as F
from inference_reference import upsampled

from mask2former_plugin.modeling.inference import upsampling
from mask2former_plugin.modeling.inference.upsampling import (
    AxisResize,
    Buffers,
    ImageMasks,
    Tiles,
    empty_result,
    first_largest,
    resize_block,
)


def ranges(length, step):
    return [(start, min(start + step, length)) for start in range(0, length, step)]


@pytest.mark.parametrize("target", [(17, 23), (40, 23), (17, 61), (51, 92), (5, 7), (173, 300), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_block_equals_interpolate(target, dtype):
    maps = torch.randn(3, 17, 23, dtype=dtype)
    expected = F.interpolate(maps[None], size=target, mode="bilinear", align_corners=False)[0]
    rows, columns = (AxisResize([lengths], dtype) for lengths in zip(maps.shape[1:], target))
    # interpolate rounds its positions differently in different versions of torch: a few units in the last place
    # of values around 3
    tolerance = 5e-6 if dtype == torch.float32 else 1e-13
    for top, bottom in {*ranges(target[0], 7), *ranges(target[0], 1), (0, target[0])}:
        for left, right in {*ranges(target[1], 10), (0, target[1])}:
            row_source, row_weights = rows.weights((top, bottom), maps.device)
            column_source, column_weights = columns.weights((left, right), maps.device)
            block = resize_block(maps[:, slice(*row_source), slice(*column_source)], row_weights, column_weights)
            torch.testing.assert_close(block, expected[:, top:bottom, left:right], atol=tolerance, rtol=0)


def test_positions_are_rounded_as_interpolate_rounds_them():
    # of a ramp, the resized values are the positions themselves; two units in the last place of 1333 are 2.4e-4, and
    # positions that are rounded otherwise are off by more than 5e-4
    for source, target in ((800, 1400), (1066, 1900), (1333, 517), (750, 2000)):
        ramp = torch.arange(source, dtype=torch.float32)[None, :, None]  # [1, source, 1]
        expected = F.interpolate(ramp[None], size=(target, 1), mode="bilinear", align_corners=False)[0, 0, :, 0]
        source_range, weights = AxisResize([(source, target)]).weights((0, target), ramp.device)
        found = weights @ ramp[0, slice(*source_range), 0]
        torch.testing.assert_close(found, expected, atol=0, rtol=2e-7)


@pytest.mark.parametrize("output_size", [None, (45, 50), (90, 133), (20, 31)])
def test_image_masks_equal_the_composed_resizes(output_size):
    logits = torch.randn(4, 16, 24)
    masks = ImageMasks(logits, (64, 96), (45, 81), output_size)
    expected = upsampled(logits, (64, 96), (45, 81), output_size)
    assert masks.size == expected.shape[1:]
    buffers, queries = Buffers(logits.device), torch.tensor([3, 0])
    for rows in ranges(masks.size[0], 7):
        for columns in ranges(masks.size[1], 11):
            part = expected[:, slice(*rows), slice(*columns)]
            torch.testing.assert_close(masks.block(rows, columns), part, atol=5e-6, rtol=0)
            for some in (masks.block(rows, columns, queries, buffers), masks.select(queries).block(rows, columns)):
                torch.testing.assert_close(some, part[queries], atol=5e-6, rtol=0)


@pytest.mark.parametrize("output_size", [(45, 81), (90, 133), (20, 31)])
def test_single_pixels_equal_those_of_the_block(output_size):
    masks = ImageMasks(torch.randn(4, 16, 24), (64, 96), (45, 81), output_size)
    rows, columns = (3, output_size[0]), (5, 30)
    block = masks.block(rows, columns).flatten(1)
    places = torch.randperm(block.shape[1])[:50]
    torch.testing.assert_close(masks.pixels(rows, columns, places), block[:, places], atol=2e-6, rtol=0)
    assert masks.pixels(rows, columns, places[:0]).shape == (4, 0)


def test_half_precision_logits_are_resized_in_float32():
    logits = torch.randn(2, 8, 8).bfloat16()
    block = ImageMasks(logits, (32, 32), (30, 30)).block((0, 30), (0, 30))
    torch.testing.assert_close(block, upsampled(logits.float(), (32, 32), (30, 30)), atol=5e-6, rtol=0)


@pytest.mark.parametrize("output_size", [(45, 81), (90, 133), (20, 31)])
def test_bounds_hold_and_are_reached(output_size):
    logits = torch.randn(4, 16, 24) * 5
    logits[1] = -2.0
    masks = ImageMasks(logits, (64, 96), (45, 81), output_size)
    dense = upsampled(logits, (64, 96), (45, 81), output_size)
    tiles = Tiles(output_size, (11, 8))
    low, high = masks.bounds(tiles.rows, tiles.columns)
    assert low.shape == high.shape == (4, len(list(tiles)))
    assert len(tiles.areas) == len(list(tiles)) and int(tiles.areas.sum()) == output_size[0] * output_size[1]
    for t, (rows, columns) in enumerate(tiles):
        part = dense[:, slice(*rows), slice(*columns)].flatten(1)
        assert (low[:, t] <= part.amin(1)).all() and (part.amax(1) <= high[:, t]).all()
    torch.testing.assert_close(torch.stack([low[1], high[1]]), torch.full((2, low.shape[1]), -2.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("tile", [(1, 1), (7, 5), (100, 100)])
def test_tiles_cover_the_map_once(tile):
    covered = torch.zeros(37, 23)
    for rows, columns in Tiles((37, 23), tile):
        covered[slice(*rows), slice(*columns)] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("values", [1, 300, 10**6])
def test_pieces_cover_the_rows_once_and_stay_small(monkeypatch, values):
    monkeypatch.setitem(upsampling._VALUES, "cpu", values)
    found = list(upsampling.pieces((3, 40), (10, 15), 4, torch.device("cpu")))
    assert [row for start, stop in found for row in range(start, stop)] == list(range(3, 40))
    assert all((stop - start) * 5 * 4 <= max(values, 5 * 4) for start, stop in found)


def test_first_largest_is_argmax_with_the_first_of_equal_ones():
    values = torch.randint(0, 4, (9, 40, 30)).float()
    first = (values == values.amax(0)).int().argmax(0)
    assert torch.equal(first_largest(values.clone()), first)
    assert first_largest(values.clone()).dtype == torch.int64
    assert torch.equal(first_largest(torch.full((3, 2, 2), -1e30)), torch.zeros(2, 2, dtype=torch.int64))
    numbers = torch.tensor([0, 2, 3, 7, 8, 9, 20, 21, 100])
    assert torch.equal(first_largest(values.clone(), numbers), numbers[first])


def test_first_largest_of_nan_is_one_of_the_numbers():
    values = torch.randn(4, 3)
    values[:, 1] = torch.nan
    numbers = torch.tensor([2, 3, 5, 8])
    expected = numbers[values.argmax(0)]
    assert expected[1] == 2 and torch.equal(first_largest(values.clone(), numbers), expected)


@pytest.mark.parametrize("infinite", [torch.inf, -torch.inf])
def test_infinite_logits_stay_where_they_are(infinite):
    """Half precision has them; a weight of 0 must not make them NaN in the rest of the tile."""
    logits = torch.randn(3, 16, 24)
    logits[1, 5, 7] = infinite
    masks = ImageMasks(logits.half(), (64, 96), (45, 81), (91, 130))
    found = masks.block((0, 91), (0, 130)).sigmoid()
    expected = upsampled(logits.half().float(), (64, 96), (45, 81), (91, 130)).sigmoid()
    number = ~expected.isnan()  # the formula itself has weights of 0 at a few pixels
    torch.testing.assert_close(found[number], expected[number], atol=5e-6, rtol=0)
    assert not found.isnan().any() and (expected[1] == (infinite > 0)).sum() > 10
    low, high = (bound.sigmoid() for bound in masks.bounds([(0, 91)], [(0, 130)]))
    assert (low[:, 0] <= found.flatten(1).amin(1)).all() and (found.flatten(1).amax(1) <= high[:, 0]).all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 4), (2, 0, 4)])
def test_result_of_any_size(shape):
    assert empty_result(shape, torch.float32, torch.device("cpu")).shape == shape


def test_buffers_grow_and_keep_their_memory():
    buffers = Buffers(torch.device("cpu"))
    large = buffers("a", (4, 5), torch.float32)
    assert buffers("a", (2, 3), torch.float32).data_ptr() == large.data_ptr()
    assert buffers("b", (2, 3), torch.float32).data_ptr() != large.data_ptr()
    assert buffers("a", (6, 7), torch.float32).shape == (6, 7)
    assert buffers("a", (2, 2), torch.float64).dtype == torch.float64
