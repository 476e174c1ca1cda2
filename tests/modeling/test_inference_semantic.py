"""Semantic scores and label maps in tiles equal the dense formula."""

import pytest
import torch
import torch.nn.functional as F
from inference_reference import semantic, upsampled

from mask2former_plugin.modeling.inference import ImageMasks, SemanticTask, needed_queries, run_tasks, upsampling
from mask2former_plugin.modeling.layers import products

PADDED, IMAGE = (64, 96), (45, 70)


@pytest.fixture(params=[(1, 9), (7, 16), (96, 256)])
def tile(request, monkeypatch):
    monkeypatch.setitem(upsampling._TILE, "cpu", (request.param, request.param))
    monkeypatch.setattr(products, "_LEAST_WORK", 2000)  # some of these small products take either way


def infer(class_logits, logits, mask_size, output_size, **options):
    task = SemanticTask(class_logits, output_size, **options)
    assert needed_queries([task]).tolist() == list(range(len(class_logits)))
    return run_tasks([task], task.queries, ImageMasks(logits, PADDED, IMAGE, mask_size))["sem_seg"]


@pytest.mark.parametrize("output_size", [(45, 70), (91, 133), (20, 31)])
def test_scores_of_resized_masks(tile, output_size):
    class_logits, logits = torch.randn(12, 6) * 2, torch.randn(12, 16, 24) * 4
    found = infer(class_logits, logits, output_size, output_size)
    expected = semantic(class_logits, upsampled(logits, PADDED, IMAGE, output_size))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found.dtype == torch.float32
    labels = infer(class_logits, logits, output_size, output_size, label_map=True)
    assert labels.dtype == torch.int64 and torch.equal(labels, expected.argmax(0))


@pytest.mark.parametrize("output_size", [(45, 70), (91, 133), (20, 31)])
def test_resized_scores(tile, output_size):
    class_logits, logits = torch.randn(12, 6) * 2, torch.randn(12, 16, 24) * 4
    found = infer(class_logits, logits, IMAGE, output_size)
    scores = semantic(class_logits, upsampled(logits, PADDED, IMAGE))
    expected = F.interpolate(scores[None], size=output_size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    labels = infer(class_logits, logits, IMAGE, output_size, label_map=True)
    assert torch.equal(labels, expected.argmax(0))


@pytest.mark.parametrize("scale", [0.5, 4.0, 40.0])
def test_label_map_of_clear_and_of_unclear_masks(monkeypatch, scale):
    """Where the bounds leave one class, several or all of them."""
    monkeypatch.setitem(upsampling._TILE, "cpu", ((8, 8), (8, 8)))
    several = 0
    for _ in range(5):
        class_logits = torch.randn(30, 20) * scale
        logits = F.interpolate(torch.randn(1, 30, 4, 6), size=(16, 24), mode="bicubic")[0] * scale * 4
        labels = infer(class_logits, logits, (91, 133), (91, 133), label_map=True)
        scores = semantic(class_logits, upsampled(logits, PADDED, IMAGE, (91, 133)))
        chosen = scores.gather(0, labels[None])[0]
        # saturated probabilities make equal scores, and a sum of 30 products in another order is off by 1e-6
        torch.testing.assert_close(chosen, scores.amax(0), atol=0, rtol=3e-6)
        several += len(labels.unique())
    assert several > 15


def test_autocast_and_reduced_precision_do_not_reach_the_resizing():
    class_logits, logits = torch.randn(12, 6), torch.randn(12, 16, 24) * 4
    expected = semantic(class_logits, upsampled(logits, PADDED, IMAGE))
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = infer(class_logits, logits, IMAGE, IMAGE)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
