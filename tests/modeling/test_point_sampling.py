"""Random points keep their place in the random stream; the uncertain ones are preferred."""

import pytest
import torch
import torch.nn.functional as F

from mask2former_plugin.modeling import point_sampling
from mask2former_plugin.modeling.point_sampling import (
    DeferredRand,
    LossPoints,
    bilinear_corners,
    in_order_of_rows,
    sample_features,
    sample_logits,
    uncertain_points,
)


def test_deferred_values_are_those_of_rand(monkeypatch):
    for kept in (0, 10**6):
        monkeypatch.setattr(point_sampling, "_KEPT_VALUES", kept)
        torch.manual_seed(3)
        expected = torch.rand(3, 40, 2), torch.rand(5)
        torch.manual_seed(3)
        first, second = DeferredRand(3, 40, 2, device=torch.device("cpu")), torch.rand(5)
        torch.rand(17)
        assert torch.equal(first.values(), expected[0]) and torch.equal(second, expected[1])
        torch.manual_seed(9)
        after = torch.rand(4)
        torch.manual_seed(9)
        assert torch.equal(first.values(), expected[0])
        assert torch.equal(torch.rand(4), after), "reading the values must not move the random stream"


def test_sample_logits_equals_grid_sample_mask_by_mask():
    logits, points = torch.randn(3, 9, 7, dtype=torch.float64, requires_grad=True), torch.rand(3, 50, 2)
    sampled = sample_logits(logits, points)
    for i in range(3):
        grid = (2 * points[i].double() - 1)[None, :, None]
        torch.testing.assert_close(
            sampled[i], F.grid_sample(logits[i][None, None], grid, align_corners=False)[0, 0, :, 0]
        )
    sampled.sum().backward()
    assert logits.grad.abs().sum() > 0


def test_corners_of_points_in_and_around_a_padded_map():
    points = torch.rand(500, 2, dtype=torch.float64) * 1.4 - 0.2
    for size, padded in (((5, 7), (5, 7)), ((5, 7), (8, 9)), ((1, 1), (4, 4))):
        values = torch.randn(size, dtype=torch.float64)
        full = torch.zeros(padded, dtype=torch.float64)
        full[: size[0], : size[1]] = values
        expected = F.grid_sample(full[None, None], (2 * points - 1)[None, None], align_corners=False)[0, 0, 0]
        for steps, stored in (((size[1], 1), values), ((1, size[0]), values.T)):
            index, weights = bilinear_corners(points, size, padded, steps)
            torch.testing.assert_close((stored.flatten()[index.long()] * weights).sum(1), expected, rtol=0, atol=1e-12)
        row_by_row = bilinear_corners(points, size, padded, (size[1], 1))
        assert all(map(torch.equal, bilinear_corners(points, size, padded), row_by_row))


def test_order_of_rows_keeps_the_points():
    for dtype in (torch.float32, torch.float64):
        points = torch.rand(300, 2, dtype=dtype)
        ordered = in_order_of_rows(points)
        assert sorted(ordered.tolist()) == sorted(points.tolist())
        assert ordered[:, 1].diff().min() > -(2.0**-15)
    assert in_order_of_rows(points[:0]).shape == (0, 2)


def test_sample_features_equals_grid_sample():
    features = torch.randn(4, 9, 7, dtype=torch.float64, requires_grad=True)
    points = torch.rand(50, 2, dtype=torch.float64)
    expected = F.grid_sample(features[None], (2 * points - 1)[None, None], align_corners=False)[0, :, 0].T
    noise = torch.randn_like(expected)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = sample_features(features[None].contiguous(memory_format=layout)[0], points)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        pair = [torch.autograd.grad((x * noise).sum(), features, retain_graph=True)[0] for x in (found, expected)]
        torch.testing.assert_close(*pair, rtol=0, atol=1e-12)


def test_uncertain_points_are_those_nearest_to_the_edge():
    # logit = x in pixels - 31.5: zero in the middle of the width
    logits = (torch.arange(64.0) - 31.5).expand(2, 48, 64)
    candidates = torch.rand(2, 300, 2)
    points = uncertain_points(logits, candidates, 40)
    assert points.shape == (2, 40, 2)
    for i in range(2):
        distance = (candidates[i, :, 0] - 0.5).abs()
        expected = candidates[i][distance.argsort()[:40]]
        assert {tuple(p) for p in points[i].tolist()} == {tuple(p) for p in expected.tolist()}


def test_uncertain_points_of_few_candidates_and_of_no_masks():
    logits, candidates = torch.randn(3, 5, 6), torch.rand(3, 8, 2)
    for number in (0, 1, 7, 8):
        points = uncertain_points(logits, candidates, number)
        assert points.shape == (3, number, 2)
        order = sample_logits(logits, candidates).abs().argsort(1)[:, :number]
        for i in range(3):
            assert sorted(points[i].tolist()) == sorted(candidates[i, order[i]].tolist())
    assert uncertain_points(logits[:0], candidates[:0], 4).shape == (0, 4, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("deferred", [False, True])
def test_pieces_of_a_draw_are_the_draw(monkeypatch, deferred, dtype):
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for masks in (0, 1, 5):
            for kept in (1, 2 * 2 * 37, 10**6):
                monkeypatch.setattr(point_sampling, "_KEPT_VALUES", kept)
                torch.manual_seed(3)
                expected = torch.rand(masks, 37, 2), torch.rand(masks, 11, 2), torch.rand(4)
                torch.manual_seed(3)
                points = LossPoints(masks, 37, 11, torch.device("cpu"), deferred)
                candidates = list(points.candidates())
                assert kept == 10**6 or masks < 2 or len(candidates) > 1
                assert torch.equal(torch.cat(candidates), expected[0])
                assert torch.equal(points.others(), expected[1])
                assert torch.equal(torch.rand(4), expected[2])
    finally:
        torch.set_default_dtype(default)
