"""Cases in which Hugging Face's results are wrong: the right ones, worked out by hand (no transformers needed)."""

import pycocotools.mask
import pytest
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances

from mask2former_plugin.modeling.inference import ImageMasks, InstanceTask, PanopticTask, needed_queries, run_tasks

CERTAIN = 30.0


def class_logits(*probabilities):
    """Logits ``[Q, K+1]`` of class probabilities (without "no object", which gets the rest), one tuple a query."""
    rows = torch.tensor(probabilities, dtype=torch.float64)
    return torch.cat([rows, 1 - rows.sum(1, keepdim=True)], 1).clamp(min=1e-12).log()


def run(make_task, classes, masks):
    size = tuple(masks.shape[-2:])
    task = make_task(classes, size)
    queries = needed_queries([task])
    return run_tasks([task], queries, ImageMasks(masks[queries], size, size))[task.name]


def panoptic(classes, masks, *, things, threshold=0.5, overlap=0.8):
    return run(
        lambda c, s: PanopticTask(
            c, s, thing_classes=things, object_mask_threshold=threshold, overlap_threshold=overlap, require_mask=True
        ),
        classes,
        masks,
    )


def instances(classes, masks, top_k):
    return run(lambda c, s: InstanceTask(c, s, top_k=top_k), classes, masks)


def logit(probability):
    return torch.tensor(probability, dtype=torch.float64).logit()


def quadrants(side=32):
    masks = torch.full((4, side, side), -CERTAIN, dtype=torch.float64)
    half = side // 2
    for i, mask in enumerate(masks):
        mask[i // 2 * half : (i // 2 + 1) * half, i % 2 * half : (i % 2 + 1) * half] = CERTAIN
    return masks


def test_fused_stuff_between_things_keeps_ids_apart():
    # case 1: stuff, thing, stuff, thing; Hugging Face counts 1, 2, 1, 2 and merges the things
    classes = class_logits((1, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1))
    ids, segments = panoptic(classes, quadrants(), things={1, 2})
    assert [s["category_id"] for s in segments] == [0, 1, 2]
    assert len({s["id"] for s in segments}) == 3
    assert ids[0, 0] == ids[16, 0] and len({ids[0, 0].item(), ids[0, 16].item(), ids[16, 16].item()}) == 3


def test_a_segment_gets_its_own_pixels_only():
    # case 2: one query, one quadrant; Hugging Face paints all 1024 pixels
    ids, segments = panoptic(class_logits((1, 0)), quadrants()[:1], things={0})
    assert (ids == segments[0]["id"]).sum() == 256 and (ids == 0).sum() == 768


def test_area_is_counted_without_the_class_score():
    # case 3: class score 0.6 times mask probability 0.8 is below one half, the mask itself is not
    masks = torch.full((1, 4, 4), logit(0.8).item(), dtype=torch.float64)
    ids, segments = panoptic(class_logits((0.6, 0)), masks, things={0})
    assert len(segments) == 1 and (ids == 1).all()


@pytest.mark.parametrize(("overlap", "kept"), [(0.79, True), (0.80, True), (0.81, False)])
def test_overlap_threshold_is_inclusive(overlap, kept):
    # case 4: 100 pixels of which 20 belong to a better query
    masks = torch.full((2, 10, 20), -CERTAIN, dtype=torch.float64)
    masks[0, :, :10] = logit(0.9)
    masks[1] += 1  # the best where nobody is
    masks[1, :2] = CERTAIN
    ids, segments = panoptic(class_logits((1, 0), (0, 1)), masks, things={0, 1}, overlap=overlap)
    assert [s["category_id"] for s in segments] == ([0, 1] if kept else [1])
    assert (ids == 0).sum() == (80 if kept else 160)


def test_class_threshold_is_strict():
    # case 5
    classes = torch.tensor([[0.0, 0.0]], dtype=torch.float64)  # exactly one half each
    masks = torch.full((1, 4, 4), CERTAIN, dtype=torch.float64)
    assert panoptic(classes, masks, things={0}, threshold=0.5)[1] == []
    assert len(panoptic(classes, masks, things={0}, threshold=0.499)[1]) == 1


def test_a_query_may_be_two_instances():
    # case 6
    masks = quadrants()[:1]
    found = instances(class_logits((0.53, 0.45, 0.01)), masks, top_k=2)
    assert sorted(found.pred_classes.tolist()) == [0, 1]
    assert torch.equal(found.pred_masks[0], found.pred_masks[1]) and found.pred_masks[0].sum() == 256
    expected = torch.tensor([0.45, 0.53], dtype=torch.float64)
    torch.testing.assert_close(found.scores.sort().values, expected, rtol=0, atol=1e-6)


def test_nothing_found_is_void_everywhere():
    # case 7: ids of 0, not a map of -1
    ids, segments = panoptic(class_logits((0.1, 0.1)), quadrants()[:1], things={0})
    assert ids.dtype == torch.int32 and (ids == 0).all() and segments == []


def test_run_lengths_are_those_of_coco():
    # case 8: down the columns, starting with zeros
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, [0, 0, 1], [1, 2, 3]] = True
    found = Instances((4, 4), pred_masks=mask, pred_boxes=Boxes(torch.zeros(1, 4)))
    found.scores, found.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    (result,) = instances_to_coco_json(found, 1)
    counts = [4, 1, 3, 1, 4, 1, 2]
    expected = pycocotools.mask.frPyObjects({"size": [4, 4], "counts": counts}, 4, 4)
    assert result["segmentation"] == {"size": [4, 4], "counts": expected["counts"].decode()}
