"""Panoptic maps from tiles equal the dense formula, pixel for pixel."""

import pytest
import torch
import torch.nn.functional as F
from inference_reference import panoptic, upsampled

from mask2former_plugin.modeling.inference import (
    ImageMasks,
    InstanceTask,
    PanopticTask,
    SemanticTask,
    needed_queries,
    run_tasks,
    upsampling,
)

THINGS = frozenset({0, 2, 3})
PADDED, IMAGE, OUTPUT = (96, 128), (90, 101), (131, 160)


def smooth_logits(number):
    coarse = torch.randn(1, number, 6, 8) * 6 - 2
    return F.interpolate(coarse, size=(24, 32), mode="bicubic")[0]


def infer(class_logits, logits, score_threshold, overlap_threshold, require_mask):
    task = PanopticTask(
        class_logits,
        OUTPUT,
        thing_classes=THINGS,
        object_mask_threshold=score_threshold,
        overlap_threshold=overlap_threshold,
        require_mask=require_mask,
    )
    queries = needed_queries([task])
    return run_tasks([task], queries, ImageMasks(logits[queries], PADDED, IMAGE, OUTPUT))["panoptic_seg"]


@pytest.mark.parametrize("require_mask", [True, False])
@pytest.mark.parametrize(("score_threshold", "overlap_threshold"), [(0.0, 0.0), (0.3, 0.3), (0.4, 0.5)])
@pytest.mark.parametrize("tile", [(5, 7), (16, 16), (200, 200)])
def test_equals_the_dense_formula(monkeypatch, tile, require_mask, score_threshold, overlap_threshold):
    monkeypatch.setitem(upsampling._TILE, "cpu", (tile, tile))
    monkeypatch.setitem(upsampling._VALUES, "cpu", 2000)
    several = 0
    for _ in range(4):
        class_logits, logits = torch.randn(25, 6) * 2, smooth_logits(25)
        found, segments = infer(class_logits, logits, score_threshold, overlap_threshold, require_mask)
        dense = upsampled(logits, PADDED, IMAGE, OUTPUT)
        expected, expected_segments = panoptic(
            class_logits, dense, THINGS, score_threshold, overlap_threshold, require_mask
        )
        assert segments == expected_segments
        assert found.dtype == torch.int32
        assert torch.equal(found, expected)
        several += len(segments)
        assert all(type(value) in (int, bool) for segment in segments for value in segment.values())
    assert several > 4


@pytest.mark.parametrize("require_mask", [True, False])
@pytest.mark.parametrize("tile", [(8, 8), (30, 50)])
def test_equals_the_dense_formula_where_most_tiles_are_clear(monkeypatch, tile, require_mask):
    """Large regions with one sure winner, with none, and masks that end under the mask of a better one."""
    monkeypatch.setitem(upsampling._TILE, "cpu", (tile, tile))
    for _ in range(4):
        class_logits = torch.randn(12, 6) * 4
        logits = torch.full((12, 24, 32), -9.0)
        for q, (top, left, height, width) in enumerate(torch.randint(1, 20, (12, 4)).tolist()):
            logits[q, top : top + height, left : left + width] = 9.0
        logits[3] = 4.0
        found, segments = infer(class_logits, logits, 0.2, 0.1, require_mask)
        dense = upsampled(logits, PADDED, IMAGE, OUTPUT)
        expected, expected_segments = panoptic(class_logits, dense, THINGS, 0.2, 0.1, require_mask)
        assert segments == expected_segments
        assert torch.equal(found, expected)


def test_first_of_equally_good_queries_wins():
    class_logits = torch.full((3, 6), -20.0)
    class_logits[[0, 1, 2], [0, 2, 3]] = 20.0
    logits = torch.randn(1, 24, 32).expand(3, -1, -1).contiguous()
    found, segments = infer(class_logits, logits, 0.5, 0.0, True)
    assert segments == [{"id": 1, "isthing": True, "category_id": 0}]
    assert torch.equal(found == 1, upsampled(logits, PADDED, IMAGE, OUTPUT)[0] >= 0)


def test_stuff_of_one_class_is_one_segment_and_things_are_not():
    # four quarters, each of one query: two of stuff class 1, two of thing class 2
    class_logits = torch.full((4, 6), -20.0)
    class_logits[[0, 1, 2, 3], [1, 2, 1, 2]] = 20.0
    logits = torch.full((4, 24, 32), -8.0)
    for q in range(4):
        top, left = 12 * (q // 2), 16 * (q % 2)
        logits[q, top : top + 12, left : left + 16] = 8.0
    found, segments = infer(class_logits, logits, 0.5, 0.5, True)
    assert segments == [
        {"id": 1, "isthing": False, "category_id": 1},
        {"id": 2, "isthing": True, "category_id": 2},
        {"id": 3, "isthing": True, "category_id": 2},
    ]
    assert [int(found[0, 0]), int(found[0, -1]), int(found[-1, 0]), int(found[-1, -1])] == [1, 2, 1, 3]


def test_pixels_without_a_mask_are_void_in_mask2former_only():
    class_logits = torch.full((1, 6), -20.0)
    class_logits[0, 2] = 20.0
    logits = torch.full((1, 24, 32), -8.0)
    logits[0, 2:8, 2:8] = 8.0
    found = infer(class_logits, logits, 0.5, 0.0, True)[0]
    assert 0 < int((found == 1).sum()) < found.numel() / 4
    assert int((infer(class_logits, logits, 0.5, 0.0, False)[0] == 1).sum()) == found.numel()


def on_one_grid(class_logits, logits, overlap_threshold, **options):
    """Without resizing, by this module and by the formula; they are equal."""
    size = tuple(logits.shape[1:])
    options = {"object_mask_threshold": 0.1, "overlap_threshold": overlap_threshold, **options}
    task = PanopticTask(class_logits, size, thing_classes=THINGS, **options)
    found, segments = run_tasks([task], task.queries, ImageMasks(logits[task.queries], size, size))["panoptic_seg"]
    require_mask = options.get("require_mask", True)
    expected, expected_segments = panoptic(class_logits, logits, THINGS, 0.1, overlap_threshold, require_mask)
    assert torch.equal(found, expected) and segments == expected_segments
    return segments


@pytest.mark.parametrize("require_mask", [True, False])
def test_a_visible_part_of_just_the_threshold_is_enough(require_mask):
    class_logits = torch.full((2, 6), -20.0)
    class_logits[0, 0] = class_logits[1, 2] = 20.0
    class_logits[1, 3] = 19.0  # the second query is less sure of its class
    logits = torch.full((2, 8, 8), -9.0)
    logits[0, :, :4] = logits[1, :, 2:6] = 9.0  # half of the second mask is under the first
    logits[0, :, 6:] = 0.0  # and nothing else is the second's
    assert len(on_one_grid(class_logits, logits, 0.5, require_mask=require_mask)) == 2
    assert len(on_one_grid(class_logits, logits, 0.5001, require_mask=require_mask)) == 1


@pytest.mark.parametrize("tile", [(4, 4), (8, 16)])
@pytest.mark.parametrize("require_mask", [True, False])
def test_best_only_where_it_has_no_mask(monkeypatch, tile, require_mask):
    """Such a query is a segment of MaskFormer's, and none of Mask2Former's, although it has a mask and wins pixels."""
    monkeypatch.setitem(upsampling._TILE, "cpu", (tile, tile))
    class_logits = torch.full((2, 6), -20.0)
    class_logits[0, 0] = class_logits[1, 2] = 20.0
    logits = torch.full((2, 8, 16), -9.0)
    logits[0, :, :8] = 9.0
    logits[1, :, :8], logits[1, :, 8:] = 5.0, -3.0
    segments = on_one_grid(class_logits, logits, 0.5, require_mask=require_mask)
    assert [segment["category_id"] for segment in segments] == ([0] if require_mask else [0, 2])
    logits[1, :, :8] = -9.0  # without any mask, it is none of either
    segments = on_one_grid(class_logits, logits, 0.0, require_mask=require_mask)
    assert [segment["category_id"] for segment in segments] == [0]


def test_nothing_survives():
    class_logits = torch.zeros(5, 6)
    class_logits[:, 5] = 9.0
    found, segments = infer(class_logits, torch.randn(5, 24, 32), 0.0, 0.0, True)
    assert segments == []
    assert found.shape == OUTPUT and found.dtype == torch.int32 and not found.any()


def test_shares_a_pass_with_another_task():
    class_logits, logits = torch.randn(25, 6) * 2, smooth_logits(25)
    tasks = [
        SemanticTask(class_logits, OUTPUT),
        PanopticTask(class_logits, OUTPUT, thing_classes=THINGS, object_mask_threshold=0.4, overlap_threshold=0.3),
    ]
    found = run_tasks(tasks, needed_queries(tasks), ImageMasks(logits, PADDED, IMAGE, OUTPUT))
    alone = infer(class_logits, logits, 0.4, 0.3, True)
    assert set(found) == {"sem_seg", "panoptic_seg"}
    assert torch.equal(found["panoptic_seg"][0], alone[0]) and found["panoptic_seg"][1] == alone[1]


@pytest.mark.gpu
def test_all_tasks_on_a_gpu_equal_the_cpu():
    class_logits, logits = torch.randn(25, 6) * 2, smooth_logits(25)
    found = []
    for device in ("cpu", "cuda"):
        classes, masks = class_logits.to(device), ImageMasks(logits.to(device), PADDED, IMAGE, OUTPUT)
        tasks = [
            SemanticTask(classes, OUTPUT),
            PanopticTask(classes, OUTPUT, thing_classes=THINGS, object_mask_threshold=0.4, overlap_threshold=0.3),
            InstanceTask(classes, OUTPUT, top_k=20, thing_classes=THINGS),
        ]
        found.append(run_tasks(tasks, needed_queries(tasks), masks))
    cpu, gpu = found
    torch.testing.assert_close(gpu["sem_seg"].cpu(), cpu["sem_seg"], atol=1e-4, rtol=0)
    assert gpu["panoptic_seg"][1] == cpu["panoptic_seg"][1]
    assert (gpu["panoptic_seg"][0].cpu() != cpu["panoptic_seg"][0]).float().mean() < 1e-3
    assert sorted(gpu["instances"].pred_classes.tolist()) == sorted(cpu["instances"].pred_classes.tolist())
    assert gpu["instances"].pred_boxes.device.type == "cuda"
