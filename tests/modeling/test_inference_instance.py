"""Instances from tiles equal the dense formula, pixel for pixel, with true boxes."""

import pycocotools.mask
import pytest
import torch
import torch.nn.functional as F
from inference_reference import instances, upsampled

from mask2former_plugin.modeling.inference import (
    ImageMasks,
    InstanceTask,
    instance_masks,
    needed_queries,
    run_tasks,
    upsampling,
)

PADDED, IMAGE, OUTPUT = (64, 96), (45, 81), (91, 130)


def infer(class_logits, logits, **options):
    task = InstanceTask(class_logits, OUTPUT, **options)
    queries = needed_queries([task])
    return run_tasks([task], queries, ImageMasks(logits[queries], PADDED, IMAGE, OUTPUT))["instances"]


def decoded(found):
    """Instances with run lengths as instances with masks."""
    assert not found.has("pred_masks") and len(found.pred_masks_rle) == len(found)
    for code in found.pred_masks_rle:
        assert code["size"] == list(OUTPUT) and type(code["counts"]) is str
    masks = [torch.from_numpy(pycocotools.mask.decode(code)).bool() for code in found.pred_masks_rle]
    found.remove("pred_masks_rle")
    found.pred_masks = torch.stack(masks) if masks else torch.zeros((0, *OUTPUT), dtype=torch.bool)
    return found


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


@pytest.mark.parametrize("tile", [(1, 9), (16, 16), (200, 200)])
@pytest.mark.parametrize("top_k", [3, 12, 1000])
def test_equals_the_dense_formula(monkeypatch, tile, top_k):
    monkeypatch.setitem(upsampling._TILE, "cpu", (tile, tile))
    monkeypatch.setitem(upsampling._VALUES, "cpu", 2000)
    class_logits, logits = torch.randn(9, 5) * 2, torch.randn(9, 16, 24) * 4
    logits[4] = -3.0  # an empty mask
    logits[5] = 3.0  # the whole image
    expected = instances(class_logits, upsampled(logits, PADDED, IMAGE, OUTPUT), top_k)
    check(infer(class_logits, logits, top_k=top_k), expected)
    check(decoded(infer(class_logits, logits, top_k=top_k, encoded=True)), expected)


@pytest.mark.parametrize("mask_threshold", [0.2, 0.5, 0.9])
def test_masks_in_few_of_the_tiles(monkeypatch, mask_threshold):
    monkeypatch.setitem(upsampling._TILE, "cpu", ((8, 8), (8, 8)))
    class_logits = torch.randn(20, 5) * 2
    logits = F.interpolate(torch.randn(1, 20, 5, 7) * 9 - 12, size=(16, 24), mode="bicubic")[0]
    threshold = float(torch.tensor(mask_threshold, dtype=torch.float64).logit())
    dense = upsampled(logits, PADDED, IMAGE, OUTPUT)
    for options in ({}, {"encoded": True}):
        found = infer(class_logits, logits, top_k=60, mask_threshold=mask_threshold, **options)
        found = decoded(found) if options else found
        masks = {(int(c), m.numpy().tobytes()) for c, m in zip(found.pred_classes, found.pred_masks)}
        best = (class_logits.softmax(1)[:, :-1]).flatten().topk(60).indices.tolist()
        assert masks == {(pair % 4, (dense[pair // 4] > threshold).numpy().tobytes()) for pair in best}
        for mask, box, score in zip(found.pred_masks, found.pred_boxes.tensor.tolist(), found.scores.tolist()):
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            assert (score > 0) == bool(len(rows))
            if len(rows):
                assert box == [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def test_run_lengths_are_those_of_pycocotools():
    class_logits, logits = torch.randn(9, 5) * 2, torch.randn(9, 16, 24) * 4
    dense = infer(class_logits, logits, top_k=20)
    encoded = infer(class_logits, logits, top_k=20, encoded=True)
    for field in ("scores", "pred_classes"):
        assert torch.equal(dense.get(field), encoded.get(field))
    for mask, code in zip(dense.pred_masks, encoded.pred_masks_rle):
        expected = pycocotools.mask.encode(mask.numpy().astype("uint8", order="F"))
        assert code == {"size": expected["size"], "counts": expected["counts"].decode()}


@pytest.mark.parametrize("most_changes", [0, 100, 2**22])
@pytest.mark.parametrize(("corner", "margin"), [((0, 0), (0, 0)), ((0, 0), (3, 2)), ((5, 9), (3, 2))])
def test_run_lengths_that_are_written_part_by_part(monkeypatch, most_changes, corner, margin):
    """Noise and blocks that end, or go on, at the borders of tiles; some tiles are left out because they are empty.

    Without margins, runs go on from the bottom of a column to the top of the next one.
    """
    monkeypatch.setattr(instance_masks, "_MOST_CHANGES", most_changes)
    encode = instance_masks.RunLengthMasks._encode
    ends = []
    monkeypatch.setattr(
        instance_masks.RunLengthMasks, "_encode", lambda self, end: ends.append(end) or encode(self, end)
    )
    size, (height, width) = (40, 50), (8, 10)
    canvas = tuple(sum(sides) for sides in zip(size, corner, margin))
    masks = torch.zeros((6, *size), dtype=torch.bool)
    masks[0] = torch.rand(size) > 0.5
    masks[1] = True
    masks[2, 8:24, 10:30] = True  # borders of tiles
    masks[3, :, 20:] = torch.rand(40, 30) > 0.5
    masks[4, 39, 49] = True
    kept = instance_masks.RunLengthMasks(canvas, masks.device, corner)
    for left in range(0, 50, width):
        for top in range(0, 40, height):
            part = masks[:, top : top + height, left : left + width]
            positions = part.flatten(1).any(1).nonzero()[:, 0]
            kept.put(positions, (top, top + height), (left, left + width), part[positions])
    codes = kept.result([0, 1, 2, 3, 4, 5, 0], torch.zeros(6, 4))
    assert len(ends) == {0: 5, 100: 5, 2**22: 1}[most_changes] and len(codes) == 7
    whole = torch.zeros((7, *canvas), dtype=torch.uint8)
    whole[:, corner[0] : corner[0] + 40, corner[1] : corner[1] + 50] = masks[[0, 1, 2, 3, 4, 5, 0]]
    for mask, code in zip(whole, codes):
        expected = pycocotools.mask.encode(mask.numpy().copy(order="F"))
        assert code == {"size": list(canvas), "counts": expected["counts"].decode()}


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
    encoded = infer(
        torch.randn(9, 5), torch.randn(9, 16, 24), top_k=10, thing_classes=(), things_first=things_first, encoded=True
    )
    assert len(encoded) == 0 and encoded.pred_masks_rle == []
    assert found.pred_masks.shape == (0, *OUTPUT) and found.pred_boxes.tensor.shape == (0, 4)


def test_one_query_with_several_classes_gives_several_instances():
    class_logits = torch.tensor([[3.0, 3.0, 2.9, -9.0], [-9.0, -9.0, -9.0, 9.0]])
    found = infer(class_logits, torch.randn(2, 16, 24), top_k=3)
    assert sorted(found.pred_classes.tolist()) == [0, 1, 2]
    assert torch.equal(found.pred_masks[0], found.pred_masks[1]) and found.pred_masks[0].any()


def test_run_lengths_of_more_pixels_than_int32_counts():
    size = (50000, 50000)
    kept = instance_masks.RunLengthMasks(size, torch.device("cpu"), corner=(49990, 49995))
    kept.put(torch.tensor([0]), (0, 10), (0, 5), torch.ones((1, 10, 5), dtype=torch.bool))
    first = 49995 * 50000 + 49990
    counts = [first, 10, *[49990, 10] * 4]
    expected = pycocotools.mask.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"].decode()
    assert kept.result([0], torch.zeros(1, 4)) == [{"size": list(size), "counts": expected}]


@pytest.mark.parametrize("encoded", [False, True])
def test_a_mask_is_above_the_threshold_and_so_is_its_box(encoded):
    logits = torch.zeros((2, *OUTPUT))
    logits[0, 10:20, 30:50] = 1.0
    task = InstanceTask(torch.zeros(2, 2), OUTPUT, top_k=2, encoded=encoded)
    found = run_tasks([task], task.queries, ImageMasks(logits, OUTPUT, OUTPUT))["instances"]
    found = decoded(found) if encoded else found
    assert torch.equal(found.pred_masks, logits > 0)
    assert found.pred_boxes.tensor.tolist() == [[30, 10, 50, 20], [0, 0, 0, 0]]
