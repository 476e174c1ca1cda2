"""Losses of matched masks at points: against autograd through dense logits, in chunks of any size, and by gradcheck."""

import pytest
import torch
import torch.nn.functional as F
from mask_classification_reference import dice_loss

from mask2former_plugin.modeling import point_losses as module
from mask2former_plugin.modeling.matched_masks import MatchedMasks
from mask2former_plugin.modeling.point_losses import point_losses

PAIRS = [(0, 0), (0, 0), (0, 2), (1, 1), (1, 1), (1, 1), (2, 0)]
SIZES = [(24, 20), (31, 36), (1, 5)]
PADDED = (32, 36)


def case(dtype=torch.float64, channels=3, size=(8, 9), points=13):
    embed = torch.randn(len(PAIRS), channels, dtype=dtype, requires_grad=True)
    features = torch.randn(3, channels, *size, dtype=dtype, requires_grad=True)
    truth = [torch.rand(3, *some) < 0.5 for some in SIZES]
    return embed, features, MatchedMasks(PAIRS, truth, PADDED), list(torch.rand(len(PAIRS), points, 2, dtype=dtype))


def plain(embed, features, masks, points):
    """The same by ordinary operations, a mask at a time on padded float targets."""
    cross_entropy, dice = [], []
    for row, (image, target) in enumerate(masks.pairs):
        grid = (2 * points[row] - 1)[None, None]
        dense = torch.einsum("c,chw->hw", embed[row], features[image])
        padded = torch.zeros(PADDED, dtype=embed.dtype)
        height, width = SIZES[image]
        padded[:height, :width] = masks.truth[image][target]
        logits = F.grid_sample(dense[None, None], grid, align_corners=False).flatten()
        values = F.grid_sample(padded[None, None], grid, align_corners=False).flatten()
        cross_entropy.append(F.binary_cross_entropy_with_logits(logits, values))
        dice.append(dice_loss(logits, values))
    return torch.stack(cross_entropy), torch.stack(dice)


@pytest.mark.parametrize("at_once", [1, 2 * 8 * 9, 2**21])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients(monkeypatch, at_once, memory_format):
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", at_once)
    embed, features, masks, points = case()
    weights = torch.randn(2, len(PAIRS), dtype=torch.float64)
    expected = plain(embed, features, masks, points)
    found = point_losses(embed, features.contiguous(memory_format=memory_format), masks, points)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    totals = [sum((v * w).sum() for v, w in zip(x, weights)) for x in (found, expected)]
    for ours, theirs in zip(*(torch.autograd.grad(total, (embed, features)) for total in totals)):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_chunks_are_small_and_hold_all_masks(at_once):
    found = []
    for chunk in MatchedMasks(PAIRS, [], PADDED).chunks(at_once):
        assert 0 < chunk.stop - chunk.start <= at_once and chunk.start == len(found)
        found += [(chunk.image, target) for target, own in chunk.of_targets() for _ in range(own.start, own.stop)]
        assert chunk.stop == len(found)
    assert found == PAIRS


def test_gradcheck():
    embed, features, masks, points = case(size=(4, 5), points=6)
    assert torch.autograd.gradcheck(lambda e, f: point_losses(e, f, masks, points), (embed, features))


def test_only_what_needs_a_gradient_gets_one():
    embed, features, masks, points = case()
    both = torch.autograd.grad(sum(x.sum() for x in point_losses(embed, features, masks, points)), (embed, features))
    losses = point_losses(embed, features.detach(), masks, points)
    (alone,) = torch.autograd.grad(sum(x.sum() for x in losses), embed)
    torch.testing.assert_close(alone, both[0])
    losses = point_losses(embed.detach(), features, masks, points)
    (alone,) = torch.autograd.grad(sum(x.sum() for x in losses), features)
    torch.testing.assert_close(alone, both[1])


def test_confident_logits_lose_nothing():
    """Beyond the range of the exponential function: no NaN, no infinity, the cross-entropy exact."""
    embed, features, masks, points = case()
    embed, features = (embed * 60).detach().requires_grad_(), (features * 60).detach().requires_grad_()
    found, expected = point_losses(embed, features, masks, points), plain(embed, features, masks, points)
    assert expected[0].max() > 1000
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(sum(x.sum() for x in found), (embed, features))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_no_masks_stay_on_the_graph():
    embed = torch.zeros(0, 3, requires_grad=True)
    features = torch.randn(2, 3, 4, 5, requires_grad=True)
    found = point_losses(embed, features, MatchedMasks([], [], PADDED), [])
    sum(x.sum() for x in found).backward()
    assert embed.grad.shape == (0, 3) and features.grad.abs().max() == 0
