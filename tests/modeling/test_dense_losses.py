"""Losses of matched masks on all pixels: against autograd through full-size maps, in pieces, and by gradcheck."""

import pytest
import torch
import torch.nn.functional as F
from mask_classification_reference import dice_loss

from mask2former_plugin.modeling import dense_losses as module
from mask2former_plugin.modeling.dense_losses import dense_losses
from mask2former_plugin.modeling.matched_masks import MatchedMasks

PAIRS = [(0, 0), (0, 0), (0, 2), (1, 1), (1, 1), (1, 1), (2, 0)]
SIZES = [(24, 20), (31, 36), (1, 5)]
PADDED = (32, 36)


def case(dtype=torch.float64, channels=3, size=(8, 9), padded=PADDED):
    embed = torch.randn(len(PAIRS), channels, dtype=dtype, requires_grad=True)
    features = torch.randn(3, channels, *size, dtype=dtype, requires_grad=True)
    truth = [torch.rand(3, min(h, padded[0]), min(w, padded[1])) < 0.4 for h, w in SIZES]
    return embed, features, MatchedMasks(PAIRS, truth, padded)


def plain(embed, features, masks):
    """The same by ordinary operations, a mask at a time on padded float targets."""
    focal, dice = [], []
    for row, (image, target) in enumerate(masks.pairs):
        dense = torch.einsum("c,chw->hw", embed[row], features[image])
        size = masks.padded_size
        logits = F.interpolate(dense[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        truth = torch.zeros(size, dtype=embed.dtype)
        own = masks.truth[image][target]
        truth[: own.shape[0], : own.shape[1]] = own
        inside, outside = truth.bool(), ~truth.bool()
        # -log σ(x) = log(1 + exp(-x))
        total = (0.25 * F.softplus(-logits) * (1 - logits.sigmoid()) ** 2)[inside].sum()
        total = total + (0.75 * F.softplus(logits) * logits.sigmoid() ** 2)[outside].sum()
        focal.append(total / truth.numel())
        dice.append(dice_loss(logits, truth))
    return torch.stack(focal), torch.stack(dice)


def gradients(losses, leaves):
    weights = [torch.linspace(1, 2, len(PAIRS), dtype=torch.float64), torch.linspace(-1, 3, len(PAIRS))]
    return torch.autograd.grad(sum((x * w.to(x.dtype)).sum() for x, w in zip(losses, weights)), leaves)


@pytest.mark.parametrize("at_once", [1, 2 * 8 * 9, 2**21])
@pytest.mark.parametrize("in_cache", [1, 5 * 36, 2**20])
def test_values_and_gradients(monkeypatch, at_once, in_cache):
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", at_once)
    monkeypatch.setattr(module, "_VALUES_IN_CACHE", in_cache)
    embed, features, masks = case()
    expected = plain(embed, features, masks)
    found = dense_losses(embed, features.contiguous(memory_format=torch.channels_last), masks)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(found, (embed, features)), gradients(expected, (embed, features))):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "padded"), [((5, 7), (17, 30)), ((1, 1), (4, 3)), ((9, 12), (6, 7)), ((6, 6), (6, 6))]
)
def test_any_two_sizes(size, padded):
    embed, features, masks = case(size=size, padded=padded)
    found, expected = dense_losses(embed, features, masks), plain(embed, features, masks)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(found, (embed, features)), gradients(expected, (embed, features))):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_float32_through_the_fast_products():
    """Maps large enough for oneDNN's products; float32 sums over 20,000 pixels against float64."""
    embed, features, masks = case(torch.float32, channels=16, size=(64, 80), padded=(256, 320))
    doubles = [x.detach().double().requires_grad_() for x in (embed, features)]
    found, expected = dense_losses(embed, features, masks), plain(*doubles, masks)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(found, (embed, features)), gradients(expected, doubles)):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_gradcheck():
    embed, features, masks = case(size=(3, 4), padded=(7, 9))
    assert torch.autograd.gradcheck(lambda e, f: dense_losses(e, f, masks), (embed, features))


def test_confident_logits_lose_nothing():
    """Beyond the range of the exponential function: no NaN, no infinity, the focal loss exact."""
    embed, features, masks = case()
    embed, features = (embed * 60).detach().requires_grad_(), (features * 60).detach().requires_grad_()
    found, expected = dense_losses(embed, features, masks), plain(embed, features, masks)
    assert expected[0].max() > 300
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert all(gradient.isfinite().all() for gradient in gradients(found, (embed, features)))


def test_only_what_needs_a_gradient_gets_one():
    embed, features, masks = case()
    both = gradients(dense_losses(embed, features, masks), (embed, features))
    alone = gradients(dense_losses(embed, features.detach(), masks), (embed,))
    torch.testing.assert_close(alone[0], both[0])
    alone = gradients(dense_losses(embed.detach(), features, masks), (features,))
    torch.testing.assert_close(alone[0], both[1])


def test_no_masks_stay_on_the_graph():
    embed = torch.zeros(0, 3, requires_grad=True)
    features = torch.randn(2, 3, 4, 5, requires_grad=True)
    sum(x.sum() for x in dense_losses(embed, features, MatchedMasks([], [], PADDED))).backward()
    assert embed.grad.shape == (0, 3) and features.grad.abs().max() == 0
