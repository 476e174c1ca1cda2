"""Matching against costs computed entry by entry and assignments found by trying all."""

import pytest
import torch
from mask_classification_reference import matches_at_points, matches_on_pixels, padded, random_targets

from mask2former_plugin.modeling.layers.products import summed_products
from mask2former_plugin.modeling.mask_logits import MaskLogits, MaskPrediction
from mask2former_plugin.modeling.matcher import HungarianMatcher, _sum_of_softplus, in_full_precision

SIZE = (32, 48)
WEIGHTS = (2.0, 5.0, 3.0)


def prediction(batch=2, queries=5, classes=4, channels=6, dtype=torch.float64):
    return MaskPrediction(
        pred_logits=torch.randn(batch, queries, classes + 1, dtype=dtype),
        mask_logits=MaskLogits(
            torch.randn(batch, queries, channels, dtype=dtype),
            torch.randn(batch, channels, SIZE[0] // 4, SIZE[1] // 4, dtype=dtype),
        ),
    )


def as_pairs(matches):
    return [list(zip(queries.tolist(), targets.tolist())) for queries, targets in matches]


@pytest.mark.parametrize("numbers", [(3, 2), (0, 4), (5, 7), (0, 0)])
@pytest.mark.parametrize("num_points", [0, 90])
def test_least_cost_of_all_assignments(numbers, num_points):
    outputs = prediction()
    targets = random_targets(numbers, [(30, 41), (17, 48)], 4)
    dense = outputs["pred_masks"]
    torch.manual_seed(11)
    if num_points:
        expected = matches_at_points(outputs["pred_logits"], dense, padded(targets, SIZE), num_points, WEIGHTS)
    else:
        expected = matches_on_pixels(outputs["pred_logits"], dense, padded(targets, SIZE), WEIGHTS)
    after = torch.rand(3)
    torch.manual_seed(11)
    matches = HungarianMatcher(*WEIGHTS, num_points=num_points)(outputs, targets, SIZE)
    assert as_pairs(matches) == expected
    assert all(index.dtype == torch.int64 and index.device.type == "cpu" for match in matches for index in match)
    assert torch.equal(torch.rand(3), after), "as many random numbers as the original"


@pytest.mark.parametrize("points", [0, 1, 63, 64, 200])
def test_sum_of_softplus_by_products_of_certainties(points):
    # an underflowing product, the ends of the range of exp and the linear part among them
    logits = torch.cat([torch.randn(points, 7) * 10, torch.full((points, 1), 1e-4), torch.full((points, 1), -200.0)], 1)
    logits[points // 2 :, 3] = 300.0
    expected = torch.nn.functional.softplus(logits.double()).sum(0)
    found = _sum_of_softplus(logits, logits.sigmoid())
    # a certainty of float32 is off by 2**-25 at most
    torch.testing.assert_close(found.double(), expected, atol=points * 2.0**-25, rtol=1e-6)


@pytest.mark.parametrize(("rows", "left", "right"), [(0, 3, 2), (5, 0, 2), (70, 3, 5), (20000, 9, 30), (9973, 64, 100)])
def test_summed_products(rows, left, right):
    first, second = torch.randn(rows, left + 2)[:, 1:-1], torch.randn(rows, right)
    expected = first.double().T @ second.double()
    found = summed_products(first, second)
    assert found.shape == (left, right)
    torch.testing.assert_close(found.double(), expected, atol=1e-6 * max(rows, 1) ** 0.5 * 4, rtol=1e-5)
    torch.testing.assert_close(summed_products(first.double(), second.double()), expected)


@pytest.mark.parametrize("batch", [1, 2])
def test_features_become_channels_last_once(batch):
    shared = prediction(batch)["mask_logits"].features.float().requires_grad_()
    outputs = [prediction(batch, dtype=torch.float32) for _ in range(2)]
    for some in outputs:
        some["mask_logits"] = MaskLogits(some["mask_logits"].embed, shared)
    first, second = (masks.features for _, masks in in_full_precision(outputs))
    assert first is second
    assert first.is_contiguous(memory_format=torch.channels_last) and torch.equal(first, shared)
    noise = torch.randn_like(first)
    assert torch.equal(torch.autograd.grad((first * noise).sum(), shared)[0], noise)


def test_dense_masks_of_a_foreign_decoder_give_the_same():
    outputs = prediction()
    targets = random_targets((3, 4), [SIZE, SIZE], 4)
    foreign = {"pred_logits": outputs["pred_logits"], "pred_masks": outputs["pred_masks"]}
    for num_points in (0, 50):
        matcher = HungarianMatcher(*WEIGHTS, num_points=num_points)
        torch.manual_seed(1)
        expected = as_pairs(matcher(outputs, targets))
        torch.manual_seed(1)
        assert as_pairs(matcher(foreign, targets)) == expected


def test_several_predictions_need_one_transfer(monkeypatch):
    outputs = [prediction(dtype=torch.float32) for _ in range(4)]
    targets = random_targets((3, 2), [SIZE, SIZE], 4)
    matcher = HungarianMatcher(*WEIGHTS, num_points=40)
    points = [torch.rand(2, 40, 2) for _ in outputs]
    expected = [as_pairs(matcher.match([o], targets, SIZE, [p])[0]) for o, p in zip(outputs, points)]
    transfers = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: transfers.append(1) or original(tensor))
    assert [as_pairs(m) for m in matcher.match(outputs, targets, SIZE, points)] == expected
    assert len(transfers) == 1


@pytest.mark.parametrize("num_points", [0, 64])
def test_half_precision_inputs_are_matched_in_float32(num_points):
    full = prediction(queries=40, dtype=torch.float32)  # so many that a cost in half precision changes a match
    half = MaskPrediction(
        pred_logits=full["pred_logits"].bfloat16(),
        mask_logits=MaskLogits(full["mask_logits"].embed.bfloat16(), full["mask_logits"].features.bfloat16()),
    )
    rounded = MaskPrediction(
        pred_logits=half["pred_logits"].double(),
        mask_logits=MaskLogits(half["mask_logits"].embed.double(), half["mask_logits"].features.double()),
    )
    targets = random_targets((30, 20), [SIZE, SIZE], 4)
    matcher = HungarianMatcher(*WEIGHTS, num_points=num_points)
    torch.manual_seed(2)
    expected = as_pairs(matcher(rounded, targets))
    torch.manual_seed(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert as_pairs(matcher(half, targets)) == expected


@pytest.mark.parametrize("part", ["class logits", "mask embeddings", "per-pixel embeddings"])
def test_not_finite_predictions_are_named(part):
    good, bad = prediction(), prediction()
    masks = bad["mask_logits"]
    tensor = {
        "class logits": bad["pred_logits"],
        "mask embeddings": masks.embed,
        "per-pixel embeddings": masks.features,
    }[part]
    tensor[1, 2] = float("nan")
    targets = random_targets((3, 2), [SIZE, SIZE], 4)
    with pytest.raises(FloatingPointError, match=f"NaN or infinity in {part} of auxiliary prediction 0: .*BASE_LR"):
        HungarianMatcher(num_points=200).match([good, bad], targets, SIZE)


def test_some_cost_must_count():
    with pytest.raises(ValueError, match="at least one must count"):
        HungarianMatcher(0, 0, 0)
