"""Losses and gradients against the formulas written out mask by mask."""

import numpy as np
import pytest
import torch
from mask_classification_reference import (
    class_loss,
    matches_at_points,
    matches_on_pixels,
    padded,
    pixel_losses,
    point_losses,
    random_targets,
)
from pycocotools import mask as coco_masks

from mask2former_plugin.modeling import criterion as criterion_module
from mask2former_plugin.modeling import dense_losses as dense_losses_module
from mask2former_plugin.modeling import point_losses as point_losses_module
from mask2former_plugin.modeling import point_sampling
from mask2former_plugin.modeling.criterion import SetCriterion
from mask2former_plugin.modeling.mask_logits import MaskLogits, MaskPrediction
from mask2former_plugin.modeling.matcher import HungarianMatcher
from mask2former_plugin.modeling.target_masks import RunLengthMasks

SIZE = (32, 44)
WEIGHTS = (2.0, 5.0, 3.0)
CLASSES, QUERIES, POINTS = 4, 5, 61  # three quarters of them are no whole number


def parameters(predictions, batch=2, dtype=torch.float64):
    """Leaves: shared features, then embeddings and class logits of each prediction."""
    shapes = [(batch, 6, SIZE[0] // 4, SIZE[1] // 4)]
    for _ in range(predictions):
        shapes += [(batch, QUERIES, 6), (batch, QUERIES, CLASSES + 1)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def outputs_of(leaves):
    features = leaves[0]
    found = [
        MaskPrediction(pred_logits=logits, mask_logits=MaskLogits(embed, features))
        for embed, logits in zip(leaves[1::2], leaves[2::2])
    ]
    return MaskPrediction(found[0], aux_outputs=found[1:])


def make_criterion(num_points, weight_dict=None, losses=("labels", "masks")):
    matcher = HungarianMatcher(*WEIGHTS, num_points=num_points)
    return SetCriterion(CLASSES, matcher, weight_dict or {}, 0.1, losses, num_points).double()


def reference(leaves, targets, num_points):
    outputs, truth = outputs_of(leaves), padded(targets, SIZE)
    num_masks = max(1, sum(len(t["labels"]) for t in targets))
    losses = {}
    for suffix, prediction in [("", outputs)] + [(f"_{i}", o) for i, o in enumerate(outputs["aux_outputs"])]:
        logits, masks = prediction["pred_logits"], prediction["pred_masks"]
        with torch.no_grad():
            if num_points:
                matches = matches_at_points(logits, masks, truth, num_points, WEIGHTS)
            else:
                matches = matches_on_pixels(logits, masks, truth, WEIGHTS)
        losses["loss_ce" + suffix] = class_loss(logits, targets, matches, 0.1)
        if num_points:
            sums = point_losses(masks, truth, matches, num_points, 3.0, 0.75, num_masks)
        else:
            sums = pixel_losses(masks, truth, matches, SIZE, num_masks)
        losses["loss_mask" + suffix], losses["loss_dice" + suffix] = sums
    return losses


def gradients(losses, leaves):
    return torch.autograd.grad(sum((i + 1) * loss for i, loss in enumerate(losses.values())), leaves)


@pytest.mark.parametrize("numbers", [(3, 2), (0, 4), (6, 1), (0, 0)])
@pytest.mark.parametrize("num_points", [0, POINTS])
def test_losses_and_gradients(numbers, num_points):
    leaves = parameters(predictions=3)
    targets = random_targets(numbers, [(32, 31), (25, 44)], CLASSES)
    torch.manual_seed(5)
    expected = reference(leaves, targets, num_points)
    torch.manual_seed(5)
    losses = make_criterion(num_points)(outputs_of(leaves), targets, SIZE)
    assert list(losses) == list(expected)
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], atol=1e-6, rtol=1e-6, msg=name)
    for ours, theirs in zip(gradients(losses, leaves), gradients(expected, leaves)):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("num_points", [0, POINTS])
def test_batch_without_targets_trains_all_parameters(num_points):
    leaves = parameters(predictions=2)
    targets = random_targets((0, 0), [SIZE, SIZE], CLASSES)
    losses = make_criterion(num_points)(outputs_of(leaves), targets, SIZE)
    assert losses["loss_mask"].item() == losses["loss_dice_0"].item() == 0
    sum(losses.values()).backward()
    assert all(leaf.grad is not None and torch.isfinite(leaf.grad).all() for leaf in leaves)
    assert leaves[2].grad.abs().sum() > 0


def test_points_and_maps_in_pieces_change_nothing(monkeypatch):
    targets = random_targets((3, 4), [SIZE, (20, 20)], CLASSES)
    for num_points, module, limit in (
        (0, dense_losses_module, "_VALUES_AT_ONCE"),
        (0, dense_losses_module, "_VALUES_IN_CACHE"),
        (POINTS, point_sampling, "_KEPT_VALUES"),
        (POINTS, point_losses_module, "_VALUES_AT_ONCE"),
    ):
        leaves = parameters(predictions=2)
        found = []
        for value in (1, 2**30):
            monkeypatch.setattr(module, limit, value)
            torch.manual_seed(6)
            losses = make_criterion(num_points)(outputs_of(leaves), targets, SIZE)
            found.append((losses, gradients(losses, leaves)))
        torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("num_points", [0, POINTS])
def test_predictions_from_features_of_their_own(num_points, dense):
    def outputs(leaves):
        found = outputs_of(leaves)
        return {"pred_logits": found["pred_logits"], "pred_masks": found["pred_masks"]} if dense else found

    criterion = make_criterion(num_points)
    targets = random_targets((3, 2), [SIZE, SIZE], CLASSES)
    first, second = parameters(1), parameters(1)
    torch.manual_seed(3)
    together = criterion({**outputs(first), "aux_outputs": [outputs(second)]}, targets, SIZE)
    torch.manual_seed(3)
    last, auxiliary = (criterion(outputs_of(leaves), targets, SIZE) for leaves in (first, second))
    expected = {**last, **{f"{name}_0": loss for name, loss in auxiliary.items()}}
    torch.testing.assert_close(together, expected)
    leaves = [*first, *second]
    torch.testing.assert_close(gradients(together, leaves), gradients(expected, leaves))


def test_padding_of_the_targets_makes_no_difference():
    targets = random_targets((3, 2), [(20, 30), (32, 17)], CLASSES)
    masks = [{"labels": t["labels"], "masks": t["masks"].to(torch.bool)} for t in padded(targets, SIZE)]
    for num_points in (0, POINTS):
        outputs = outputs_of(parameters(predictions=1))
        found = []
        for some in (targets, masks):
            torch.manual_seed(8)
            found.append(make_criterion(num_points)(outputs, some, SIZE))
        torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


def test_padded_size_is_that_of_the_largest_mask_by_default():
    targets = random_targets((3, 2), [(32, 30), (20, 44)], CLASSES)
    outputs = outputs_of(parameters(predictions=1))
    torch.testing.assert_close(make_criterion(0)(outputs, targets), make_criterion(0)(outputs, targets, SIZE))


def test_uint8_masks():
    targets = random_targets((3, 2), [SIZE, SIZE], CLASSES)
    integers = [{"labels": t["labels"], "masks": t["masks"].to(torch.uint8)} for t in targets]
    for num_points in (0, POINTS):
        outputs = outputs_of(parameters(predictions=1))
        found = []
        for some in (targets, integers):
            torch.manual_seed(8)
            found.append(make_criterion(num_points)(outputs, some, SIZE))
        torch.testing.assert_close(found[0], found[1])


def test_run_lengths_give_what_bool_masks_give():
    targets = random_targets((3, 7), [SIZE, (20, 31)], CLASSES)  # more targets than queries, too
    held = [
        {
            "labels": t["labels"],
            "masks": RunLengthMasks.from_coco(
                [coco_masks.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in t["masks"]],
                t["masks"].shape[1:],
            ),
        }
        for t in targets
    ]
    for num_points in (0, POINTS):
        leaves = parameters(predictions=2)
        found = []
        for some in (targets, held):
            torch.manual_seed(8)
            losses = make_criterion(num_points)(outputs_of(leaves), some, SIZE)
            found.append((losses, gradients(losses, leaves)))
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_deferred_draws_change_nothing(monkeypatch):
    """Off the CPU all predictions are matched at once, with the same random points."""
    targets, leaves = random_targets((3, 0), [SIZE, (20, 31)], CLASSES), parameters(predictions=3)
    found = []
    for taking_turns in (True, False):
        monkeypatch.setattr(criterion_module, "_takes_turns", lambda device, turns=taking_turns: turns)
        torch.manual_seed(8)
        losses = make_criterion(POINTS)(outputs_of(leaves), targets, SIZE)
        found.append((losses, gradients(losses, leaves), torch.rand(3)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_predictions_without_weight_are_skipped():
    targets = random_targets((1, 2), [SIZE, SIZE], CLASSES)
    outputs = outputs_of(parameters(predictions=3))
    weights = {"loss_ce": 1.0, "loss_mask": 1.0, "loss_dice": 1.0, "loss_dice_1": 1.0}
    names = make_criterion(POINTS, weights)(outputs, targets, SIZE)
    assert set(names) == {f"loss_{n}{s}" for n in ("ce", "mask", "dice") for s in ("", "_1")}
    assert set(make_criterion(POINTS, losses=["labels"])(outputs, targets, SIZE)) == {
        "loss_ce",
        "loss_ce_0",
        "loss_ce_1",
    }


def test_bfloat16_predictions_under_autocast():
    leaves = parameters(predictions=2, dtype=torch.float32)
    targets = random_targets((3, 2), [SIZE, SIZE], CLASSES)
    rounded = [leaf.detach().bfloat16().float().requires_grad_() for leaf in leaves]
    half = [leaf.detach().bfloat16().requires_grad_() for leaf in rounded]
    for num_points in (0, POINTS):
        criterion = make_criterion(num_points).float()
        torch.manual_seed(4)
        expected = criterion(outputs_of(rounded), targets, SIZE)
        torch.manual_seed(4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = criterion(outputs_of(half), targets, SIZE)
        torch.testing.assert_close(losses, expected)
        assert all(g.isfinite().all() for g in gradients(losses, half))


@pytest.mark.parametrize("num_points", [0, POINTS])
def test_backward_pass_inside_autocast(num_points):
    leaves = [leaf.detach().float().requires_grad_() for leaf in parameters(2)]
    targets = random_targets((3, 2), [SIZE, SIZE], CLASSES)
    total = sum(make_criterion(num_points).float()(outputs_of(leaves), targets, SIZE).values())
    expected = torch.autograd.grad(total, leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(total, leaves)
    for actual, wanted in zip(found, expected):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("num_points", [0, POINTS])
@pytest.mark.parametrize("taking_turns", [True, False])
def test_predictions_that_are_not_finite_are_named(num_points, taking_turns, monkeypatch):
    monkeypatch.setattr(criterion_module, "_takes_turns", lambda device: taking_turns)
    outputs = outputs_of([leaf.detach() for leaf in parameters(4)])
    outputs["aux_outputs"][1]["pred_logits"][0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or infinity in class logits of auxiliary prediction 1: "):
        make_criterion(num_points)(outputs, random_targets((3, 2), [SIZE, SIZE], CLASSES), SIZE)


def test_empty_weight_is_part_of_the_checkpoint():
    state = make_criterion(POINTS).state_dict()
    assert list(state) == ["empty_weight"]
    assert state["empty_weight"].tolist() == [1.0] * CLASSES + [pytest.approx(0.1)]


def test_wrong_arguments():
    matcher = HungarianMatcher()
    with pytest.raises(ValueError, match=r"unknown losses \['boxes'\]"):
        SetCriterion(3, matcher, {}, 0.1, ["labels", "boxes"])
    for ratios in ((0.5, 0.75), (3.0, 1.5)):
        with pytest.raises(ValueError, match="oversample_ratio must be at least 1"):
            SetCriterion(3, matcher, {}, 0.1, ["masks"], 10, *ratios)


@pytest.mark.gpu
@pytest.mark.parametrize("num_points", [0, POINTS])
def test_on_a_gpu(num_points):
    leaves = [leaf.detach().cuda().requires_grad_() for leaf in parameters(predictions=2)]
    targets = random_targets((3, 0), [(32, 31), (25, 44)], CLASSES)
    on_gpu = [{name: value.cuda() for name, value in target.items()} for target in targets]
    losses = make_criterion(num_points).cuda()(outputs_of(leaves), on_gpu, SIZE)
    assert all(gradient.isfinite().all() for gradient in gradients(losses, leaves))
    if num_points == 0:  # no random points: equal on every device
        expected = make_criterion(0)(outputs_of([leaf.detach().cpu() for leaf in leaves]), targets, SIZE)
        for name, loss in losses.items():
            torch.testing.assert_close(loss.cpu(), expected[name])
