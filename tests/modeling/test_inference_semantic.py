"""Semantic scores and label maps in tiles equal the dense formula."""

import pytest
import torch
import torch.nn.functional as F
from inference_reference import semantic, upsampled

from mask2former_plugin.modeling.inference import (
    ImageMasks,
    SemanticTask,
    label_map,
    needed_queries,
    run_tasks,
    upsampling,
)
from mask2former_plugin.modeling.layers import products

PADDED, IMAGE = (64, 96), (45, 70)


@pytest.fixture(params=[(1, 9), (7, 16), (96, 256)])
def tile(request, monkeypatch):
    monkeypatch.setitem(upsampling._TILE, "cpu", (request.param, request.param))
    monkeypatch.setitem(label_map._ROWS, "cpu", (request.param[0],) * 2)
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
    monkeypatch.setitem(label_map._ROWS, "cpu", (8, 8))
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


def scene(queries, classes, size=(16, 24)):
    """A third of the queries are sure of a class and of a blob, the others of nothing; some masks are of no object."""
    height, width = size
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    centre, radius = torch.rand(2, queries, 1, 1), 0.1 + 0.5 * torch.rand(queries, 1, 1)
    distance = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2).sqrt() / radius
    logits = ((1 - distance) * 12).clamp(-8, 8) + torch.randn(queries, *size) * 0.3
    class_logits = torch.randn(queries, classes + 1)
    sure = torch.arange(queries) % 3 == 0
    class_logits[sure, torch.randint(0, classes, (int(sure.sum()),))] += 7
    class_logits[~sure, -1] += 7
    logits[torch.arange(queries) % 3 == 1] -= 12
    return class_logits, logits


@pytest.fixture
def ways(monkeypatch):
    """How often some pixels, and how often all pixels of a tile, were computed again."""
    seen = {"pixels": 0, "tiles": 0, "queries": []}
    pixels, block = ImageMasks.pixels, ImageMasks.block

    def count(self, rows, columns, queries=None, buffers=None):
        if queries is None:
            seen["tiles"] += 1
        else:
            seen["queries"].append(len(queries))
        return block(self, rows, columns, queries, buffers)

    monkeypatch.setattr(ImageMasks, "block", count)
    monkeypatch.setattr(
        ImageMasks, "pixels", lambda *args: seen.update(pixels=seen["pixels"] + len(args[-1])) or pixels(*args)
    )
    return seen


@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize(("constant", "undecided"), [(5e-4, 0.1), (0.03, 1.0), (0.3, 0.0)])
def test_label_map_from_few_queries(monkeypatch, ways, resized, constant, undecided):
    """Leaving out more queries makes more pixels undecided, and never another map."""
    monkeypatch.setitem(label_map._ROWS, "cpu", (16, 16))
    monkeypatch.setattr(label_map, "_CONSTANT", constant)
    monkeypatch.setattr(label_map, "_UNDECIDED", undecided)
    size = (91, 133)
    for _ in range(3):
        class_logits, logits = scene(60, 15)
        labels = infer(class_logits, logits, IMAGE if resized else size, size, label_map=True)
        exact = [one.double() for one in (class_logits, logits)]
        scores = semantic(exact[0], upsampled(exact[1], PADDED, IMAGE, None if resized else size))
        if resized:
            scores = F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]
        best = scores.topk(2, dim=0).values
        clear = best[0] - best[1] > 1e-5 * best[0]  # float32 makes errors of some 1e-6
        assert clear.float().mean() > 0.99
        assert torch.equal(labels[clear], scores.argmax(0)[clear])
        torch.testing.assert_close(scores.gather(0, labels[None])[0], best[0], rtol=1e-5, atol=0)
    assert sum(ways["queries"]) < 0.5 * 60 * len(ways["queries"])
    assert (ways["tiles"] if undecided == 0 else ways["pixels"]) > 0


def test_one_of_equal_classes_is_taken(monkeypatch, ways):
    monkeypatch.setitem(label_map._ROWS, "cpu", (16, 16))
    class_logits, logits = scene(60, 6)
    twice = torch.cat([class_logits[:, :6], class_logits[:, :6], class_logits[:, 6:]], dim=1)
    labels = infer(twice, logits, IMAGE, IMAGE, label_map=True)
    # of the first half only: products of equal rows may differ by rounding, so the formula itself may prefer either
    expected = semantic(twice, upsampled(logits, PADDED, IMAGE))[:6].argmax(0)
    assert torch.equal(labels % 6, expected)
    assert len(labels.unique()) > 3 and ways["tiles"] > 0


def test_what_is_left_out_keeps_within_the_error():
    class_logits, logits = scene(60, 15)
    masks = ImageMasks(logits, PADDED, IMAGE, (91, 133))
    rows, columns = [(0, 30), (30, 60), (60, 91)], [(0, 40), (40, 90), (90, 133)]
    weights = class_logits.softmax(1)[:, :-1].T.contiguous()
    best = label_map.BestClasses(weights, masks, rows, columns)
    used = 0
    for tile, ranges in enumerate((r, c) for r in rows for c in columns):
        chosen = torch.tensor([1, 4, 14])
        queries, offset, error = best._plan(tile, weights[chosen].numpy())
        if error == 0:
            assert len(queries) == 60 and not offset.any()
            continue
        used += 1
        probability = masks.block(*ranges).double().sigmoid().flatten(1)
        some, exact = weights[chosen].double(), weights[chosen].double() @ probability
        approximate = some[:, queries] @ probability[queries] + torch.from_numpy(offset)[:, None]
        difference = exact - approximate
        assert float((difference.amax(0) - difference.amin(0)).max()) <= error + 1e-6
        assert float(difference.abs().max()) > 0
    assert used > 2


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
