"""Factored mask logits equal the operations on their dense product."""

import pytest
import torch
import torch.nn.functional as F

from mask2former_plugin.modeling.mask_logits import MaskLogits, MaskPrediction, mask_logits_of


@pytest.fixture
def masks():
    embed = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    features = torch.randn(2, 6, 7, 9, dtype=torch.float64, requires_grad=True)
    return MaskLogits(embed, features)


def dense(masks):
    return torch.einsum("bqc,bchw->bqhw", masks.embed, masks.features)


def assert_same_gradients(masks, fast, slow):
    noise = torch.randn_like(slow)
    actual = torch.autograd.grad((fast * noise).sum(), (masks.embed, masks.features))
    expected = torch.autograd.grad((slow * noise).sum(), (masks.embed, masks.features))
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)


def test_dense(masks):
    assert masks.size == (7, 9)
    torch.testing.assert_close(masks.dense(), dense(masks), rtol=0, atol=1e-13)
    assert_same_gradients(masks, masks.dense(), dense(masks))


@pytest.mark.parametrize("size", [(3, 4), (7, 9), (14, 18), (25, 33)])
def test_resize(masks, size):
    slow = F.interpolate(dense(masks), size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(masks.resize(size), slow, rtol=0, atol=1e-13)
    assert_same_gradients(masks, masks.resize(size), slow)


def test_same_size_is_no_work(masks):
    assert masks.with_size((7, 9)) is masks


def test_at_interpolates_between_pixel_centres(masks):
    points = torch.rand(2, 11, 2, dtype=torch.float64) * 1.2 - 0.1  # some outside
    logits = dense(masks)
    slow = torch.zeros(2, 5, 11, dtype=torch.float64)
    for b in range(2):
        for p, (x, y) in enumerate(points[b].tolist()):
            x, y = x * 9 - 0.5, y * 7 - 0.5
            for column in range(9):
                for row in range(7):
                    weight = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                    slow[b, :, p] = slow[b, :, p] + weight * logits[b, :, row, column]
    torch.testing.assert_close(masks.at(points), slow, rtol=0, atol=1e-12)
    assert_same_gradients(masks, masks.at(points), slow)


def test_at_keeps_coordinates_precise_in_bfloat16():
    # a ramp of 1024 pixels: bfloat16 coordinates would be off by up to two pixels
    ramp = (torch.arange(1024) >= 700).to(torch.bfloat16).expand(1, 1, 1, 1024)
    masks = MaskLogits(torch.ones(1, 1, 1, dtype=torch.bfloat16), ramp)
    x = (torch.arange(690, 710) + 0.5) / 1024
    points = torch.stack((x, torch.full_like(x, 0.5)), dim=1)[None]
    assert masks.at(points)[0, 0].tolist() == [0.0] * 10 + [1.0] * 10


@pytest.mark.parametrize("batch", [[0, 0, 1], [1, 0, 1, 0], [1, 1], [0]])
def test_select_keeps_the_order(masks, batch):
    query = torch.randint(0, 5, (len(batch),))
    batch = torch.tensor(batch)
    slow = dense(masks)[batch, query]
    torch.testing.assert_close(masks.select(batch, query), slow, rtol=0, atol=1e-13)
    assert_same_gradients(masks, masks.select(batch, query), slow)


def test_select_of_nothing_stays_on_the_graph(masks):
    nothing = torch.zeros(0, dtype=torch.long)
    selected = masks.select(nothing, nothing)
    assert selected.shape == (0, 7, 9)
    selected.sum().backward()
    assert masks.embed.grad.abs().max() == 0 and masks.features.grad.abs().max() == 0


def test_prediction_multiplies_out_on_demand(masks):
    prediction = MaskPrediction(pred_logits=torch.zeros(2, 5, 3), mask_logits=masks)
    assert "pred_masks" not in prediction
    torch.testing.assert_close(prediction["pred_masks"], dense(masks), rtol=0, atol=1e-13)
    assert prediction["pred_masks"] is prediction["pred_masks"]
    with pytest.raises(KeyError, match="nonsense"):
        prediction["nonsense"]


def test_dense_prediction_as_factors():
    logits = torch.randn(2, 4, 5, 6)
    assert torch.equal(mask_logits_of({"pred_masks": logits}).dense(), logits)
    masks = MaskLogits(torch.randn(1, 2, 3), torch.randn(1, 3, 4, 4))
    assert mask_logits_of(MaskPrediction(mask_logits=masks)) is masks
