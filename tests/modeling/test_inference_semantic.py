"""Semantic scores in strips equal the dense formula."""

import pytest
import torch
import torch.nn.functional as F
from inference_reference import semantic, upsampled

from mask2former_plugin.modeling.inference import (
    ImageMasks,
    SemanticTask,
    needed_queries,
    resized_scores,
    run_tasks,
    upsampling,
)


@pytest.fixture(params=[1, 3000, 2**21])
def strip_values(request, monkeypatch):
    monkeypatch.setitem(upsampling._STRIP_VALUES, "cpu", request.param)


@pytest.mark.parametrize("output_size", [(45, 70), (91, 133), (20, 31)])
def test_scores_of_resized_masks(strip_values, output_size):
    class_logits, logits = torch.randn(12, 6) * 2, torch.randn(12, 16, 24) * 4
    task = SemanticTask(class_logits, output_size)
    assert needed_queries([task]).tolist() == list(range(12))
    found = run_tasks([task], task.queries, ImageMasks(logits, (64, 96), (45, 70), output_size))["sem_seg"]
    expected = semantic(class_logits, upsampled(logits, (64, 96), (45, 70), output_size))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("output_size", [(45, 70), (91, 133), (20, 31)])
def test_resized_scores(strip_values, output_size):
    class_logits, logits = torch.randn(12, 6) * 2, torch.randn(12, 16, 24) * 4
    found = resized_scores(class_logits, ImageMasks(logits, (64, 96), (45, 70)), output_size)
    scores = semantic(class_logits, upsampled(logits, (64, 96), (45, 70)))
    expected = F.interpolate(scores[None], size=output_size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
