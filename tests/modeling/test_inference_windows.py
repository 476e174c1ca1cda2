"""A whole image cut into windows gives what the whole image gives."""

from types import SimpleNamespace

import numpy as np
import pycocotools.mask
import pytest
import torch
from torch import nn

from mask2former_plugin.modeling.inference import window_results
from mask2former_plugin.modeling.inference.upsampling import ImageMasks, Window
from mask2former_plugin.modeling.inference.window_results import axis_weights, outside, rectangle
from mask2former_plugin.modeling.inference.windows import (
    ObjectGroups,
    WindowOptions,
    best_pairs,
    common_part,
    window_grid,
)
from mask2former_plugin.modeling.meta_arch import MaskFormer

SIZE = (100, 140)
OPTIONS = WindowOptions((48, 64), 16)
CLASSES = 6  # 0 … 3 things, 4 and 5 stuff


def coordinates(height, width):
    """An image whose pixels tell where they are, so that a crop of it tells which crop it is."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([y, x, torch.zeros_like(y)]).float()


class CoordinateBackbone(nn.Module):
    size_divisibility = 1

    def forward(self, images):
        return images


class CropsOfTruth(nn.Module):
    """Predicts, at every pixel of a crop, known masks of the whole image; sees what has a pixel in the crop.

    Args:
        objects: pairs of class and mask ``[H, W]``.
        number: queries; those without an object say so.
        confidence: by object, of its class.
        order: of the queries, another one in each crop.
    """

    num_classes = CLASSES

    def __init__(self, objects, number=12, confidence=None, blind=lambda index, top, left: False):
        super().__init__()
        self.objects, self.number, self.blind = objects, number, blind
        # different ones, so that no pixel in the middle between two objects is a tie
        self.confidence = confidence or [0.9 - 0.002 * i for i in range(len(objects))]
        self.crops = []

    def forward(self, images):
        top, left = (int(images[0, i, 0, 0]) for i in (0, 1))
        height, width = images.shape[-2:]
        self.crops.append((top, left, height, width))
        probability = torch.full((self.number, CLASSES + 1), 1e-9)
        probability[:, -1] = 1
        masks = torch.full((self.number, height, width), -19.0)
        slots = torch.randperm(self.number)
        for i, (label, mask) in enumerate(self.objects):
            part = mask[top : top + height, left : left + width]
            if part.any() and not self.blind(i, top, left):
                masks[slots[i]][part] = 20.0
                probability[slots[i], -1] = 1 - self.confidence[i]
                probability[slots[i], label] = self.confidence[i]
        return {"pred_logits": probability.log()[None], "pred_masks": masks[None]}


def make_model(head, **options):
    arguments = {
        "backbone": CoordinateBackbone(),
        "sem_seg_head": head,
        "criterion": nn.Identity(),
        "num_queries": 12,
        "object_mask_threshold": 0.5,
        "overlap_threshold": 0.5,
        "metadata": SimpleNamespace(thing_dataset_id_to_contiguous_id={i: i for i in range(4)}),
        "size_divisibility": 1,
        "sem_seg_postprocess_before_inference": True,
        "pixel_mean": (0.0, 0.0, 0.0),
        "pixel_std": (1.0, 1.0, 1.0),
        "panoptic_on": True,
        "instance_on": True,
        "test_topk_per_image": 12,
    }
    return MaskFormer(**{**arguments, **options}).eval()


def box(top, left, bottom, right):
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def stuff(*things):
    """Two stuff regions that fill what the things leave."""
    free = ~torch.stack(things).any(0) if things else torch.ones(SIZE, dtype=torch.bool)
    upper = box(0, 0, 50, 140)
    return [(4, free & upper), (5, free & ~upper)]


def scenes():
    wide = box(60, 5, 75, 135)  # all windows of a row
    corner = box(30, 40, 70, 90)  # four windows and more
    twins = [box(10, 20, 40, 60), box(10, 60, 40, 100)]  # touch each other where windows overlap
    ring = box(5, 5, 95, 135) & ~box(15, 15, 85, 125)  # every window has a part of it, in pieces
    yield "nothing", []
    yield "stuff only", stuff()
    yield "three windows in a row", [(1, wide), *stuff(wide)]
    yield "four windows", [(0, corner), *stuff(corner)]
    yield "adjacent objects of one class", [(2, twins[0]), (2, twins[1]), *stuff(*twins)]
    yield "adjacent objects of two classes", [(2, twins[0]), (3, twins[1]), *stuff(*twins)]
    yield "ring", [(3, ring), *stuff(ring)]
    inside = box(2, 2, 12, 12)
    border = box(20, 0, 30, 64)  # ends where the first window ends
    yield "inside one window and at the border of one", [(0, inside), (1, border), *stuff(inside, border)]
    only = box(70, 100, 90, 130)
    yield "most windows are empty", [(1, only)]
    thin = box(0, 50, 100, 52)
    yield "thin line through all rows", [(1, thin), *stuff(thin)]


def run(head, output, windows, **options):
    model = make_model(head, windows=windows, **options)
    sizes = {} if output is None else {"height": output[0], "width": output[1]}
    with torch.no_grad():
        return model([{"image": coordinates(*SIZE), **sizes}])[0]


def panoptic_as_set(result):
    ids, segments = result
    assert ids.dtype == torch.int32
    assert [s["id"] for s in segments] == list(range(1, len(segments) + 1))
    assert set(ids.unique().tolist()) - {0} == {s["id"] for s in segments}
    return {(s["category_id"], s["isthing"], (ids == s["id"]).numpy().tobytes()) for s in segments}


def assert_same_instances(found, whole, tolerance=1e-5):
    """Masks, classes and boxes are equal; scores of merged objects are means over windows."""

    def as_dict(instances):
        boxes = instances.pred_boxes.tensor.tolist()
        rows = zip(instances.pred_classes.tolist(), boxes, instances.pred_masks, instances.scores.tolist())
        return {(label, *box, mask.numpy().tobytes()): score for label, box, mask, score in rows if score > 1e-3}

    assert as_dict(found) == pytest.approx(as_dict(whole), abs=tolerance)


@pytest.mark.parametrize(("name", "objects"), scenes(), ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("output", [None, (251, 353), (50, 70), (133, 77)])
def test_windows_give_what_the_whole_image_gives(name, objects, output):
    head = CropsOfTruth(objects)
    whole, found = run(head, output, None), run(head, output, OPTIONS)
    assert len(head.crops) == 1 + 3 * 3 and head.crops[0][2:] == SIZE
    assert all(crop[2:] == OPTIONS.size for crop in head.crops[1:])
    if output is None or output == (251, 353):
        # exactly; other sizes reach over the border of a window when pixels are averaged
        assert panoptic_as_set(found["panoptic_seg"]) == panoptic_as_set(whole["panoptic_seg"])
        assert_same_instances(found["instances"], whole["instances"], 1e-5 if output is None else 3e-3)
    if output is None:
        torch.testing.assert_close(found["sem_seg"], whole["sem_seg"], atol=1e-5, rtol=0)
    assert len(found["panoptic_seg"][1]) == len(whole["panoptic_seg"][1])
    assert found["sem_seg"].shape == whole["sem_seg"].shape
    assert (found["sem_seg"] - whole["sem_seg"]).abs().mean() < 0.02
    same = found["panoptic_seg"][0] > 0
    assert (same == (whole["panoptic_seg"][0] > 0)).float().mean() > 0.98


@pytest.mark.parametrize(("size", "overlap"), [((50, 70), 0), ((48, 64), 8), ((48, 64), 30), ((48, 64), 44)])
def test_any_overlap(size, overlap):
    objects = [(0, box(30, 40, 70, 90)), (1, box(60, 5, 75, 35)), *stuff(box(30, 40, 70, 90), box(60, 5, 75, 35))]
    head = CropsOfTruth(objects)
    whole, found = run(head, None, None), run(head, None, WindowOptions(size, overlap))
    torch.testing.assert_close(found["sem_seg"], whole["sem_seg"], atol=1e-5, rtol=0)
    if overlap:
        assert panoptic_as_set(found["panoptic_seg"]) == panoptic_as_set(whole["panoptic_seg"])
        assert_same_instances(found["instances"], whole["instances"])
    else:  # nothing tells that the parts belong together
        assert len(found["panoptic_seg"][1]) > len(whole["panoptic_seg"][1])


class FunctionsOfPosition(nn.Module):
    """Mask logits that are known functions of the position, in any crop: ellipses on two stuff regions.

    Args:
        size: height and width of the image.
        number: of ellipses, which don't touch; the first lies in the middle and is large.
    """

    num_classes = CLASSES

    def __init__(self, size, number):
        super().__init__()
        height, width = size
        self.border = torch.rand(2).tolist()
        self.ellipses = [(height / 2, width / 2, height * 0.3, width * 0.3, 0)]
        while len(self.ellipses) < number:
            y, x, tall, wide = (torch.rand(4) * torch.tensor([height, width, height / 6, width / 6])).tolist()
            one = (y, x, 3 + tall, 3 + wide, len(self.ellipses) % 4)
            inside = torch.stack([self.logits(e, *coordinates(*size)[:2]) > -2 for e in [*self.ellipses, one]])
            if not (inside[:-1] & inside[-1]).any() and inside[-1].any():
                self.ellipses.append(one)

    @staticmethod
    def logits(ellipse, y, x):
        centre_y, centre_x, tall, wide, _ = ellipse
        return 12 * (1 - ((y - centre_y) / tall) ** 2 - ((x - centre_x) / wide) ** 2)

    def forward(self, images):
        y, x = images[0, 0], images[0, 1]
        things = [self.logits(one, y, x).clamp(-20, 15) for one in self.ellipses]
        side = (y - 31.4) * self.border[0] + (x - 40.3) * self.border[1]
        masks = torch.stack([*things, (side * 5).clamp(-20, 15), (-side * 5).clamp(-20, 15)])
        # stuff is less sure than things, so that these lie upon it
        certainty = torch.tensor([*(0.98 - 0.01 * i for i in range(len(things))), 0.8, 0.75])
        labels = torch.tensor([*(one[-1] for one in self.ellipses), 4, 5])
        probability = torch.full((len(masks), CLASSES + 1), 1e-9)
        probability[torch.arange(len(masks)), labels] = certainty
        probability[:, -1] = 1 - certainty
        order = torch.randperm(len(masks))
        return {"pred_logits": probability.log()[order][None], "pred_masks": masks[order][None]}


@pytest.mark.parametrize("size", [(101, 143), (97, 65), (47, 201)])
@pytest.mark.parametrize("options", [((48, 64), 16), ((33, 47), 11), ((50, 51), 25)])
def test_functions_of_the_position(size, options):
    """The answer is known at every pixel: windows give exactly it, at odd sizes and with any overlap."""
    options = WindowOptions(*options)
    head = FunctionsOfPosition(size, 9)
    inputs = [{"image": coordinates(*size)}]
    # stuff may be covered by things almost wholly in one window and not in the image: without that threshold
    shared = {"overlap_threshold": 0.0, "test_topk_per_image": 9}
    whole, found = (make_model(head, windows=windows, **shared)(inputs)[0] for windows in (None, options))
    torch.testing.assert_close(found["sem_seg"], whole["sem_seg"], atol=1e-5, rtol=0)
    assert panoptic_as_set(found["panoptic_seg"]) == panoptic_as_set(whole["panoptic_seg"])
    assert len(found["panoptic_seg"][1]) > 8
    # the mean of a mask's probability is taken in windows, parts that are small or at the border have other means
    assert_same_instances(found["instances"], whole["instances"], 0.05)
    large = found["instances"].pred_masks[found["instances"].pred_masks.flatten(1).sum(1).argmax()]
    y, x = coordinates(*size)[:2]
    cells = [placed.cell for row in window_grid(size, size, options) for placed in row]
    assert torch.equal(large, head.logits(head.ellipses[0], y, x) > 0)
    touched = [bool(large[slice(*rows), slice(*columns)].any()) for rows, columns in cells]
    assert sum(touched) >= (4 if len({rows for rows, _ in cells}) > 1 else 2)


def test_batch_of_a_large_and_a_small_image():
    """Each image of a batch is cut for itself; what fits into a window is inferred as a whole."""
    head = FunctionsOfPosition((101, 143), 6)
    sizes = [(101, 143), (30, 20), (49, 64)]
    inputs = [{"image": coordinates(*size), "height": size[0] * k, "width": size[1]} for k, size in enumerate(sizes, 1)]
    model = make_model(head, windows=OPTIONS, overlap_threshold=0.0)
    together, alone = model(inputs), [model([one])[0] for one in inputs]
    whole = make_model(head, overlap_threshold=0.0)
    for result, expected, one in zip(together, alone, inputs):
        size = (one["height"], one["width"])
        assert result["sem_seg"].shape[1:] == result["panoptic_seg"][0].shape == size
        torch.testing.assert_close(result["sem_seg"], expected["sem_seg"], atol=1e-5, rtol=0)
        assert panoptic_as_set(result["panoptic_seg"]) == panoptic_as_set(expected["panoptic_seg"])
        assert_same_instances(result["instances"], expected["instances"])
    for i in (0, 1):
        expected = whole([inputs[i]])[0]
        torch.testing.assert_close(together[i]["sem_seg"], expected["sem_seg"], atol=1e-5, rtol=0)
        assert panoptic_as_set(together[i]["panoptic_seg"]) == panoptic_as_set(expected["panoptic_seg"])


def test_small_outputs_of_windows():
    objects = [(0, box(30, 40, 70, 90)), *stuff(box(30, 40, 70, 90))]
    head = CropsOfTruth(objects)
    full = run(head, (150, 210), OPTIONS)
    light = run(head, (150, 210), OPTIONS, semantic_label_map=True, instance_run_lengths=True)
    assert torch.equal(light["sem_seg"].argmax(dim=0), full["sem_seg"].argmax(0))
    assert not light["instances"].has("pred_masks")
    light["instances"].pred_masks = light["instances"].pred_masks_rle.dense()
    assert_same_instances(light["instances"], full["instances"])


@pytest.mark.parametrize("tasks", [("semantic_on",), ("panoptic_on",), ("instance_on",)])
def test_each_task_alone(tasks):
    options = {name: name in tasks for name in ("semantic_on", "panoptic_on", "instance_on")}
    found = run(CropsOfTruth(stuff()), None, OPTIONS, **options)
    assert set(found) == {
        {"semantic_on": "sem_seg", "panoptic_on": "panoptic_seg", "instance_on": "instances"}[tasks[0]]
    }


def test_an_image_that_fits_into_a_window_is_inferred_as_a_whole():
    head = CropsOfTruth(stuff())
    model = make_model(head, windows=WindowOptions((200, 200), 50), sem_seg_postprocess_before_inference=False)
    found = model([{"image": coordinates(*SIZE)}, {"image": coordinates(40, 30)}])
    assert head.crops == [(0, 0, *SIZE), (0, 0, 40, 30)]
    assert found[0]["sem_seg"].shape[1:] == SIZE and found[1]["sem_seg"].shape[1:] == (40, 30)


def test_windows_of_one_row_only():
    head = CropsOfTruth(stuff())
    found, whole = run(head, None, WindowOptions((200, 64), 16)), run(head, None, None)
    assert len(head.crops) == 4 and {crop[2:] for crop in head.crops[:-1]} == {(100, 64)}
    assert panoptic_as_set(found["panoptic_seg"]) == panoptic_as_set(whole["panoptic_seg"])


def test_scores_are_weighted_by_area():
    mask = box(20, 4, 40, 136)
    head = CropsOfTruth([(1, mask)])
    original = head.forward

    def by_column(images):
        # 0.6, 0.7, 0.8 in the first, second, third column of windows
        head.confidence = [0.6 + 0.1 * [0, 38, 76].index(int(images[0, 1, 0, 0]))]
        return original(images)

    head.forward = by_column
    found = run(head, None, OPTIONS)["instances"]
    best = int(found.scores.argmax())
    assert torch.equal(found.pred_masks[best], mask)
    # the cells end in the middle of the overlaps 38…64 and 76…102
    expected = (0.6 * (51 - 4) + 0.7 * (89 - 51) + 0.8 * (136 - 89)) / 132
    assert float(found.scores[best]) == pytest.approx(expected, rel=1e-4)


def test_a_fragment_of_what_another_window_has_seen_is_a_duplicate():
    whole, fragment = box(20, 30, 40, 64), box(20, 56, 30, 64)
    # the second window sees a corner of the object only, and its IoU in the common part is too small
    head = CropsOfTruth([(1, whole), (1, fragment)], blind=lambda i, top, left: (left == 0) == (i == 1))
    found = run(head, None, OPTIONS)["instances"]
    kept = found.scores > 0.1
    assert int(kept.sum()) == 1
    assert torch.equal(found.pred_masks[kept][0], whole)


def test_an_object_that_one_window_misses_keeps_its_mask():
    mask = box(20, 40, 40, 62)  # all of it in two columns of windows
    head = CropsOfTruth([(1, mask)], blind=lambda i, top, left: left > 0)
    found = run(head, None, OPTIONS)["instances"]
    assert torch.equal(found.pred_masks[int(found.scores.argmax())], mask)


def test_the_number_of_instances_is_that_of_the_whole_image():
    things = [box(y, x, y + 6, x + 6) for y in range(0, 90, 10) for x in range(0, 130, 10)]
    head = CropsOfTruth([(i % 4, mask) for i, mask in enumerate(things)], number=len(things))
    found = run(head, None, OPTIONS, test_topk_per_image=50)["instances"]
    assert len(found) == 50 and (found.scores > 0.5).all()
    assert (found.scores.diff() <= 0).all()


def test_more_instances_than_a_byte_can_count():
    """Of one class, in one window and in all of them."""
    things = [box(y, x, y + 2, x + 2) for y in range(0, 100, 4) for x in range(0, 140, 4)]
    head = CropsOfTruth([(1, mask) for mask in things], number=len(things), confidence=[0.9] * len(things))
    found = run(head, None, WindowOptions((96, 100), 8), test_topk_per_image=1000, panoptic_on=False)["instances"]
    sure = found.scores > 0.5
    assert int(sure.sum()) == len(things) > 255
    assert torch.equal(found.pred_masks[sure].int().sum(0), torch.stack(things).int().sum(0))


@pytest.mark.parametrize("image", [(100, 140), (48, 64), (49, 65), (1, 500)])
@pytest.mark.parametrize("scale", [1, 0.37, 2.5])
@pytest.mark.parametrize("overlap", [0, 16, 40])
def test_grid_covers_image_and_result(image, scale, overlap):
    output = tuple(max(1, round(side * scale)) for side in image)
    rows = window_grid(image, output, WindowOptions((48, 64), overlap))
    seen, cells, weights = torch.zeros(output), torch.zeros(output), torch.zeros(output)
    pixels = torch.zeros(image)
    for row in rows:
        for placed in row:
            window = placed.window
            pixels[slice(*window.rows), slice(*window.columns)] += 1
            part = (slice(*window.output_rows), slice(*window.output_columns))
            seen[part] += 1
            cells[slice(*placed.cell[0]), slice(*placed.cell[1])] += 1
            vertical, horizontal = (
                axis_weights(n, *shared, weights) for n, shared in zip(window.output_size, placed.shared)
            )
            assert (vertical > 0).all() and (horizontal > 0).all()
            weights[part] += vertical[:, None] * horizontal
            for inner, outer in zip(placed.cell, (window.output_rows, window.output_columns)):
                assert outer[0] <= inner[0] < inner[1] <= outer[1]
    assert (pixels > 0).all() and (seen > 0).all() and (cells == 1).all()
    if overlap == 16:  # two windows at most share a pixel of an axis: their weights add up to one
        torch.testing.assert_close(weights, torch.ones(output), atol=1e-5, rtol=0)
    for before, after in zip(rows, rows[1:]):
        assert before[0].window.rows[1] - after[0].window.rows[0] >= overlap


def test_window_of_masks_is_a_part_of_the_whole():
    """Apart from the pixels at the border of the window, whose neighbours it does not have."""
    logits = torch.randn(3, 40, 60)
    whole = ImageMasks(logits, (40, 60), (40, 60), (90, 133)).block((0, 90), (0, 133))
    (placed,) = [one for row in window_grid((40, 60), (90, 133), WindowOptions((24, 24), 8)) for one in row][4:5]
    window = placed.window
    crop = logits[:, slice(*window.rows), slice(*window.columns)]
    masks = ImageMasks(crop, crop.shape[-2:], (40, 60), (90, 133), window)
    assert masks.size == window.output_size
    height, width = masks.size
    expected = whole[:, slice(*window.output_rows), slice(*window.output_columns)]
    found = masks.block((2, height - 2), (2, width - 2))
    torch.testing.assert_close(found, expected[:, 2:-2, 2:-2], atol=5e-6, rtol=0)


@pytest.mark.parametrize(("size", "overlap"), [((48, 64), 48), ((48, 64), -1), ((0, 64), 0), ((64,), 0)])
def test_impossible_windows_are_refused(size, overlap):
    with pytest.raises(ValueError, match="WINDOW.SIZE"):
        WindowOptions(size, overlap)


def test_groups_never_hold_two_objects_of_one_window():
    groups = ObjectGroups()
    a, b, c, d = (groups.add(window) for window in (0, 1, 0, 2))
    groups.join(a, b)
    groups.join(b, c)  # c is of the window of a
    groups.join(d, c)
    assert [sorted(members) for members in groups.groups()] == [[a, b], [c, d]]
    assert [groups.group_of(one) for one in (a, b, c, d)] == [a, a, c, c]
    e = groups.add(1)
    groups.join(a, e)  # e is of the window of b, which a was joined with
    assert [sorted(members) for members in groups.groups()] == [[a, b], [c, d], [e]]


def test_pairs_are_one_to_one_of_one_class_and_more_than_half():
    iou = [[0.9, 0.8, 0.0], [0.85, 0.51, 0.0], [0.0, 0.0, 0.5]]
    sure = ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    assert best_pairs(iou, ([1, 1, 1], [1, 1, 1]), sure) == [(0, 0), (1, 1)]
    assert best_pairs(iou, ([1, 1, 1], [1, 2, 1]), sure) == [(0, 0)]
    # among several predictions of one object, the surest belong together
    assert best_pairs([[1.0, 1.0], [1.0, 1.0]], ([1, 1], [1, 1]), ([0.1, 0.9], [0.8, 0.2])) == [(1, 0), (0, 1)]


def test_common_part():
    first, second = Window((0, 9), (0, 9), (0, 10), (0, 10)), Window((0, 9), (0, 9), (8, 18), (4, 14))
    assert common_part(first, second) == ((8, 10), (4, 10))
    assert common_part(first, Window((0, 9), (0, 9), (10, 18), (4, 14))) is None


@pytest.mark.parametrize("rows", [(0, 9), (2, 9), (0, 5), (3, 7)])
@pytest.mark.parametrize("columns", [(0, 8), (2, 8), (0, 5), (3, 4)])
def test_rectangles_as_run_lengths(rows, columns):
    expected = np.zeros((9, 8), dtype=np.uint8)
    expected[slice(*rows), slice(*columns)] = 1
    assert np.array_equal(pycocotools.mask.decode(rectangle((9, 8), rows, columns)), expected)
    assert np.array_equal(pycocotools.mask.decode(outside((9, 8), [(rows, columns)])), 1 - expected)
    two = [((0, 4), (0, 8)), ((4, 9), (3, 5))]
    expected[:] = 1
    for top, left in two:
        expected[slice(*top), slice(*left)] = 0
    assert np.array_equal(pycocotools.mask.decode(outside((9, 8), two)), expected)


def test_what_gets_no_pixels_is_no_segment():
    """It lies in the cell of a window that has not seen it."""
    head = CropsOfTruth([(0, box(5, 54, 15, 62))], blind=lambda index, top, left: left > 0)
    image = {"image": coordinates(*SIZE)}
    ids, segments = make_model(head, windows=OPTIONS)([image])[0]["panoptic_seg"]
    assert segments == [] and not ids.any()
    assert len(make_model(head)([image])[0]["panoptic_seg"][1]) == 1


def test_stuff_of_two_classes_stays_two_segments_where_windows_disagree():
    everywhere = torch.ones(SIZE, dtype=torch.bool)
    objects = [(4, everywhere), (5, everywhere)]
    head = CropsOfTruth(objects, blind=lambda index, top, left: index != (left > 0))
    ids, segments = make_model(head, windows=OPTIONS)([{"image": coordinates(*SIZE)}])[0]["panoptic_seg"]
    assert [segment["category_id"] for segment in segments] == [4, 5]
    assert torch.equal(ids, torch.where(torch.arange(140) < 51, 1, 2).int().expand(SIZE))  # windows begin at 0, 38, 76


def test_an_empty_cell_is_outside_of_nothing():
    """Windows less than a pixel of the result apart have cells without rows, at the edge of others."""
    expected = np.ones((9, 8), dtype=np.uint8)
    assert np.array_equal(pycocotools.mask.decode(outside((9, 8), [((4, 4), (0, 8))])), expected)
    expected[:4] = 0
    assert np.array_equal(pycocotools.mask.decode(outside((9, 8), [((0, 4), (0, 8)), ((4, 4), (0, 8))])), expected)


@pytest.mark.parametrize("pairs", [1, 100, 2**22])
def test_duplicates_are_those_of_dense_masks(monkeypatch, pairs):
    monkeypatch.setattr(window_results, "_PAIRS", pairs)
    rng = np.random.default_rng(0)
    corners, sides = rng.integers(0, 20, (40, 2)), rng.integers(1, 20, (40, 2))
    corners[1], sides[1] = corners[0], sides[0] = (21, 22), (15, 16)  # equal ones: neither is the larger
    ranges = [tuple((int(c), int(c + s)) for c, s in zip(*one)) for one in zip(corners, sides)]
    codes = [rectangle((40, 40), *one) for one in ranges]
    masks = np.stack([pycocotools.mask.decode(code) for code in codes]).astype(bool)
    classes, seen_by = rng.integers(0, 2, 40).tolist(), [set(rng.integers(0, 6, 2).tolist()) for _ in range(40)]
    classes[0] = classes[1] = 2
    seen_by[:2] = {0}, {1}

    def duplicates(i, j):
        larger = masks[j].sum() > masks[i].sum() and (masks[i] & masks[j]).sum() > 0.5 * masks[i].sum()
        return larger and classes[i] == classes[j] and not seen_by[i] & seen_by[j]

    expected = [i for i in range(40) if not any(duplicates(i, j) for j in range(40))]
    assert 5 < len(expected) < 35
    assert window_results._without_duplicates(codes, classes, seen_by) == expected
