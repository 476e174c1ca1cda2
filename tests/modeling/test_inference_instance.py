"""Instances from strips equal the dense formula, pixel for pixel, with true boxes."""

import pytest
import torch
from inference_reference import instances, upsampled

from mask2former_plugin.modeling.inference import ImageMasks, InstanceTask, needed_queries, run_tasks, upsampling

PADDED, IMAGE, OUTPUT = (64, 96), (45, 81), (91, 130)


def infer(class_logits, logits, **options):
    task = InstanceTask(class_logits, OUTPUT, **options)
    queries = needed_queries([task])
    return run_tasks([task], queries, ImageMasks(logits[queries], PADDED, IMAGE, OUTPUT))["instances"]


def check(found, expected):
    assert found.image_size == OUTPUT
    assert len(found) == len(expected)
    assert found.pred_masks.dtype == torch.bool and found.pred_masks.shape[1:] == OUTPUT
    remaining = list(range(len(found)))
    for instance in expected:
        match = [
            i
            for i in remaining
            if int(found.pred_classes[i]) == instance["class"] and torch.equal(found.pred_masks[i], instance["mask"])
        ]
        match = [i for i in match if float(found.scores[i]) == pytest.approx(instance["score"], abs=1e-6)]
        assert match, "no such instance"
        assert found.pred_boxes.tensor[match[0]].tolist() == instance["box"]
        remaining.remove(match[0])


@pytest.mark.parametrize("strip_values", [1, 5000, 2**21])
@pytest.mark.parametrize("top_k", [3, 12, 1000])
def test_equals_the_dense_formula(monkeypatch, strip_values, top_k):
    monkeypatch.setitem(upsampling._STRIP_VALUES, "cpu", strip_values)
    class_logits, logits = torch.randn(9, 5) * 2, torch.randn(9, 16, 24) * 4
    logits[4] = -3.0  # an empty mask
    check(
        infer(class_logits, logits, top_k=top_k),
        instances(class_logits, upsampled(logits, PADDED, IMAGE, OUTPUT), top_k),
    )


@pytest.mark.parametrize("things_first", [False, True])
def test_things_only(things_first):
    class_logits, logits = torch.randn(9, 5) * 2, torch.randn(9, 16, 24) * 4
    found = infer(class_logits, logits, top_k=10, thing_classes={1, 3}, things_first=things_first)
    dense = upsampled(logits, PADDED, IMAGE, OUTPUT)
    check(found, instances(class_logits, dense, 10, {1, 3}, things_first))
    assert set(found.pred_classes.tolist()) <= {1, 3}
    assert len(found) == 10 if things_first else len(found) < 10


@pytest.mark.parametrize("things_first", [False, True])
def test_no_thing_class(things_first):
    found = infer(torch.randn(9, 5), torch.randn(9, 16, 24), top_k=10, thing_classes=(), things_first=things_first)
    assert len(found) == 0
    assert found.pred_masks.shape == (0, *OUTPUT) and found.pred_boxes.tensor.shape == (0, 4)


def test_one_query_with_several_classes_gives_several_instances():
    class_logits = torch.tensor([[3.0, 3.0, 2.9, -9.0], [-9.0, -9.0, -9.0, 9.0]])
    found = infer(class_logits, torch.randn(2, 16, 24), top_k=3)
    assert sorted(found.pred_classes.tolist()) == [0, 1, 2]
    assert torch.equal(found.pred_masks[0], found.pred_masks[1]) and found.pred_masks[0].any()
