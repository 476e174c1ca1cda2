"""Random points keep their place in the random stream; the uncertain ones are preferred."""

import pytest
import torch
import torch.nn.functional as F

from mask2former_plugin.modeling import point_sampling
from mask2former_plugin.modeling.point_sampling import DeferredRand, LossPoints, sample_logits, uncertain_points


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
