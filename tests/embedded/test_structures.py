"""Boxes, masks, instances and image batches against slow loops and closed forms."""

import json
import math
import pickle

import numpy as np
import pytest
import torch

from detectron2.structures import (
    BitMasks,
    Boxes,
    BoxMode,
    ImageList,
    Instances,
    Keypoints,
    PolygonMasks,
    RotatedBoxes,
    pairwise_ioa,
    pairwise_iou,
    pairwise_point_box_distance,
    polygons_to_bitmask,
)
from detectron2.structures.boxes import matched_pairwise_iou, pairwise_intersection


def random_boxes(count, size=20.0):
    corners = torch.rand(count, 2, 2).mul(size).sort(dim=1).values
    return corners.reshape(count, 4)


def slow_intersection(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def slow_area(a):
    return (a[2] - a[0]) * (a[3] - a[1])


# ---------------------------------------------------------------------------------------------- box modes


def test_box_mode_values_and_json():
    assert [int(mode) for mode in BoxMode] == [0, 1, 2, 3, 4]
    assert BoxMode(json.loads(json.dumps({"mode": BoxMode.XYWH_ABS}))["mode"]) is BoxMode.XYWH_ABS


@pytest.mark.parametrize(
    "kind", [list, tuple, np.float64, np.float32, np.int64, torch.float64, torch.float32, torch.int64]
)
def test_box_mode_round_trip_keeps_type_and_input(kind):
    values = [[3, 4, 10, 20], [0, 1, 2, 7]]
    if kind in (list, tuple):
        boxes, expected = kind([3.0, 4.0, 10.0, 20.0]), kind([3.0, 4.0, 7.0, 16.0])
    elif isinstance(kind, torch.dtype):
        boxes, expected = torch.tensor(values, dtype=kind), torch.tensor([[3, 4, 7, 16], [0, 1, 2, 6]], dtype=kind)
    else:
        boxes, expected = np.array(values, dtype=kind), np.array([[3, 4, 7, 16], [0, 1, 2, 6]], dtype=kind)
    before = pickle.dumps(boxes)
    converted = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    assert type(converted) is type(boxes)
    back = BoxMode.convert(converted, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    if kind in (list, tuple):
        assert converted == expected and back == boxes
    else:
        assert converted.dtype == boxes.dtype
        assert (converted == expected).all() and (back == boxes).all()
    assert pickle.dumps(boxes) == before


@pytest.mark.embedded_only
def test_box_mode_lists_keep_double_precision():
    x, y, width, height = 0.1, 1234.56789, 100.3, 0.7
    converted = BoxMode.convert([x, y, width, height], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    assert converted == [x, y, x + width, y + height]


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0, -45.0, 200.0])
def test_rotated_box_becomes_the_box_around_its_corners(angle):
    centre, size = (50.0, 40.0), (30.0, 20.0)
    radians = math.radians(angle)
    corners = []
    for dx in (-0.5, 0.5):
        for dy in (-0.5, 0.5):
            x, y = dx * size[0], dy * size[1]
            corners.append(
                (
                    centre[0] + x * math.cos(radians) + y * math.sin(radians),
                    centre[1] - x * math.sin(radians) + y * math.cos(radians),
                )
            )
    corners = np.array(corners)
    expected = np.concatenate([corners.min(0), corners.max(0)])
    box = np.array([[*centre, *size, angle]])
    np.testing.assert_allclose(BoxMode.convert(box, BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS)[0], expected, atol=1e-9)
    tensor = BoxMode.convert(torch.from_numpy(box), BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS)
    np.testing.assert_allclose(tensor[0].numpy(), expected, atol=1e-9)


def test_box_mode_refuses_relative_boxes_and_wrong_lengths():
    with pytest.raises(AssertionError):
        BoxMode.convert([0.1, 0.1, 0.2, 0.2], BoxMode.XYXY_REL, BoxMode.XYXY_ABS)
    with pytest.raises(AssertionError):
        BoxMode.convert([1, 2, 3], BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    with pytest.raises(NotImplementedError):
        BoxMode.convert([1, 2, 3, 4], BoxMode.XYXY_ABS, BoxMode.XYWHA_ABS)


# ---------------------------------------------------------------------------------------------- boxes


def test_pairwise_measures_against_loops():
    first, second = random_boxes(6), random_boxes(7)
    second[3] = first[2]
    second[4, 2:] = second[4, :2]  # without area
    shared = pairwise_intersection(Boxes(first), Boxes(second))
    iou, ioa = pairwise_iou(Boxes(first), Boxes(second)), pairwise_ioa(Boxes(first), Boxes(second))
    assert shared.shape == iou.shape == ioa.shape == (6, 7)
    for i, a in enumerate(first.tolist()):
        for j, b in enumerate(second.tolist()):
            common = slow_intersection(a, b)
            union = slow_area(a) + slow_area(b) - common
            assert shared[i, j].item() == pytest.approx(common, rel=1e-4, abs=1e-4)
            assert iou[i, j].item() == pytest.approx(common / union, rel=1e-4, abs=1e-6)
            assert ioa[i, j].item() == pytest.approx(common / slow_area(b) if common else 0.0, rel=1e-4, abs=1e-6)
    assert iou[2, 3].item() == pytest.approx(1.0)
    matched = matched_pairwise_iou(Boxes(first), Boxes(second[:6]))
    torch.testing.assert_close(matched, iou[:, :6].diagonal())


def test_iou_of_boxes_without_area_is_zero():
    point = Boxes(torch.tensor([[1.0, 1, 1, 1]]))
    assert pairwise_iou(point, point).item() == 0
    assert pairwise_iou(point, Boxes(torch.zeros(0, 4))).shape == (1, 0)


@pytest.mark.embedded_only
def test_matched_iou_of_boxes_without_area_is_zero():
    point = Boxes(torch.tensor([[1.0, 1, 1, 1]]))
    assert matched_pairwise_iou(point, point).item() == 0


def test_point_box_distance():
    points = torch.tensor([[1.0, 2.0], [7.0, 7.0]])
    distance = pairwise_point_box_distance(points, Boxes(torch.tensor([[0.0, 0, 10, 12]])))
    assert distance.tolist() == [[[1, 2, 9, 10]], [[7, 7, 3, 5]]]


def test_boxes_methods():
    boxes = Boxes(torch.tensor([[-2.0, 1, 30, 5], [4, 4, 4, 9], [3, 2, 8, 12]]))
    assert boxes.area().tolist() == [128, 0, 50]
    assert boxes.nonempty().tolist() == [True, False, True]
    assert boxes.nonempty(threshold=4.5).tolist() == [False, False, True]
    assert boxes.get_centers().tolist() == [[14, 3], [4, 6.5], [5.5, 7]]
    assert boxes.inside_box((13, 9)).tolist() == [False, True, True]
    assert boxes.inside_box((12, 8)).tolist() == [False, True, False]
    assert boxes.inside_box((12, 8), 1).tolist() == [False, True, True]
    clipped = boxes.clone()
    clipped.clip((10, 20))
    assert clipped.tensor.tolist() == [[0, 1, 20, 5], [4, 4, 4, 9], [3, 2, 8, 10]]
    assert boxes.tensor[0].tolist() == [-2, 1, 30, 5]
    clipped.scale(2, 0.5)
    assert clipped.tensor[2].tolist() == [6, 1, 16, 5]
    assert boxes[1].tensor.shape == (1, 4) and boxes[1:].tensor.shape == (2, 4)
    assert boxes[torch.tensor([True, False, True])].tensor.tolist() == boxes[[0, 2]].tensor.tolist()
    assert [row.tolist() for row in boxes] == boxes.tensor.tolist()
    assert len(Boxes.cat([boxes, boxes])) == 6 and len(Boxes.cat([])) == 0
    assert boxes.to("cpu").device == torch.device("cpu")
    assert "Boxes(tensor(" in repr(boxes)


@pytest.mark.parametrize(
    "raw", [[[1, 2, 3, 4]], np.array([[1.0, 2, 3, 4]]), torch.tensor([[1, 2, 3, 4]], dtype=torch.float64)]
)
def test_boxes_are_float32(raw):
    assert Boxes(raw).tensor.dtype == torch.float32
    assert Boxes(raw).tensor.tolist() == [[1, 2, 3, 4]]


def test_boxes_refuse_bad_input():
    assert Boxes([]).tensor.shape == (0, 4)
    with pytest.raises(AssertionError):
        Boxes(torch.zeros(2, 5))
    with pytest.raises(AssertionError):
        Boxes(torch.tensor([[0.0, 0, float("nan"), 1]])).clip((5, 5))
    with pytest.raises(AssertionError):
        Boxes(torch.zeros(2, 4))[torch.zeros(2, 4, dtype=torch.bool)]


# ---------------------------------------------------------------------------------------------- instances


def make_instances():
    return Instances(
        (10, 20), classes=torch.arange(3), boxes=Boxes(random_boxes(3)), masks=BitMasks(torch.rand(3, 10, 20) > 0.5)
    )


def test_instances_fields():
    instances = make_instances()
    assert instances.image_size == (10, 20) and len(instances) == 3
    assert instances.has("classes") and not instances.has("scores")
    assert list(instances.get_fields()) == ["classes", "boxes", "masks"]
    assert instances.get("classes") is instances.classes
    instances.scores = torch.rand(3)
    instances.remove("classes")
    assert not instances.has("classes")
    with pytest.raises(AttributeError, match="classes"):
        instances.classes
    with pytest.raises(KeyError):
        instances.get("classes")
    with pytest.raises(AssertionError, match="length 2"):
        instances.wrong = torch.zeros(2)
    with pytest.raises(NotImplementedError):
        len(Instances((1, 1)))
    with pytest.raises(NotImplementedError):
        iter(instances)
    assert "num_instances=3, image_height=10, image_width=20" in str(instances)


def test_instances_survive_pickling():
    instances = make_instances()
    copy = pickle.loads(pickle.dumps(instances))
    assert torch.equal(copy.boxes.tensor, instances.boxes.tensor) and copy.image_size == (10, 20)


def test_instances_indexing():
    instances = make_instances()
    for i in range(-3, 3):
        assert instances[i].classes.tolist() == [instances.classes[i].item()]
        assert torch.equal(instances[i].masks.tensor[0], instances.masks.tensor[i])
    for index in (
        torch.tensor([True, False, True]),
        np.array([True, False, True]),
        [0, 2],
        torch.tensor([0, 2]),
        slice(0, 3, 2),
    ):
        assert instances[index].classes.tolist() == [0, 2]
        assert torch.equal(instances[index].boxes.tensor, instances.boxes.tensor[[0, 2]])
    for wrong in (3, -4):
        with pytest.raises(IndexError):
            instances[wrong]


@pytest.mark.embedded_only
def test_instances_index_lists_too():
    instances = Instances((4, 4), names=["a", "b", "c"], classes=torch.arange(3))
    assert instances[torch.tensor([False, True, True])].names == ["b", "c"]
    assert instances[[2, 0]].names == ["c", "a"]
    assert instances[[]].names == [] and len(instances[[]].classes) == 0
    assert instances[np.int64(1)].names == ["b"]


def test_instances_cat():
    first, second = make_instances(), make_instances()
    first.names, second.names = ["a", "b", "c"], ["d", "e", "f"]
    joined = Instances.cat([first, second])
    assert joined.classes.tolist() == [0, 1, 2, 0, 1, 2] and joined.names == list("abcdef")
    assert torch.equal(joined.masks.tensor, torch.cat([first.masks.tensor, second.masks.tensor]))
    assert Instances.cat([first]) is first
    with pytest.raises(AssertionError):
        Instances.cat([])
    other = make_instances()
    with pytest.raises(KeyError):
        Instances.cat([first, other])
    with pytest.raises(AssertionError):
        Instances.cat([other, Instances((5, 5), **other.get_fields())])
    with pytest.raises(ValueError):
        Instances.cat([Instances((1, 1), a="xy"), Instances((1, 1), a="zw")])


def test_instances_to():
    moved = make_instances().to("cpu")
    assert moved.boxes.device == torch.device("cpu") and len(moved) == 3


# ---------------------------------------------------------------------------------------------- image lists


@pytest.mark.parametrize(
    "divisibility, constraints, expected",
    [
        (0, None, (6, 7)),
        (4, None, (8, 8)),
        (4, {}, (8, 8)),
        (4, {"size_divisibility": 3}, (6, 9)),
        (0, {"size_divisibility": 8}, (8, 8)),
        (4, {"square_size": 20}, (20, 20)),
        (4, {"square_size": 0}, (8, 8)),
        (0, {"square_size": 8, "size_divisibility": 32}, (32, 32)),
    ],
)
def test_image_list_pads_right_and_bottom(divisibility, constraints, expected):
    images = [torch.rand(3, 5, 7), torch.rand(3, 6, 4)]
    batch = ImageList.from_tensors(images, divisibility, pad_value=-1.0, padding_constraints=constraints)
    assert batch.tensor.shape == (2, 3, *expected)
    assert len(batch) == 2 and [tuple(size) for size in batch.image_sizes] == [(5, 7), (6, 4)]
    for index, image in enumerate(images):
        assert torch.equal(batch[index], image)
        outside = torch.ones(expected, dtype=torch.bool)
        outside[: image.shape[1], : image.shape[2]] = False
        assert (batch.tensor[index][:, outside] == -1).all()


def test_image_list_of_labels_and_single_image():
    labels = torch.randint(0, 5, (5, 7))
    batch = ImageList.from_tensors([labels], 4, pad_value=255)
    assert batch.tensor.shape == (1, 8, 8) and batch.tensor.dtype == labels.dtype
    assert torch.equal(batch[0], labels) and (batch.tensor[0, 5:] == 255).all()
    assert batch.to(torch.float32).tensor.dtype == torch.float32 and batch.device == torch.device("cpu")


def test_image_list_refuses_bad_input():
    for images in ([], [np.zeros((3, 4, 4))], [torch.zeros(3, 4, 4), torch.zeros(1, 4, 4)]):
        with pytest.raises(AssertionError):
            ImageList.from_tensors(images)


@pytest.mark.embedded_only
@pytest.mark.filterwarnings("ignore")
def test_traced_image_list_follows_the_input_size():
    def batch(first, second):
        images = ImageList.from_tensors([first, second], 4, padding_constraints={"square_size": 12})
        return images.tensor, *images.image_sizes

    traced = torch.jit.trace(batch, (torch.rand(3, 5, 7), torch.rand(3, 6, 4)))
    images = [torch.rand(3, 9, 5), torch.rand(3, 2, 17)]
    tensor, *sizes = traced(*images)
    assert torch.equal(tensor, ImageList.from_tensors(images, 4, padding_constraints={"square_size": 12}).tensor)
    assert [size.tolist() for size in sizes] == [[9, 5], [2, 17]]
    assert tensor.shape[-2:] == (20, 20)


# ---------------------------------------------------------------------------------------------- masks


def test_mask_boxes_against_a_loop():
    masks = torch.rand(30, 11, 7) > 0.96
    masks[4] = False
    masks[5] = True
    boxes = BitMasks(masks).get_bounding_boxes().tensor
    for mask, box in zip(masks, boxes.tolist()):
        rows, columns = np.nonzero(mask.numpy())
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]
        assert box == expected
    assert BitMasks(torch.zeros(0, 5, 5)).get_bounding_boxes().tensor.shape == (0, 4)


def test_bit_masks():
    masks = BitMasks(np.eye(3, dtype=np.uint8)[None].repeat(4, 0))
    assert masks.tensor.dtype == torch.bool and tuple(masks.image_size) == (3, 3) and len(masks) == 4
    masks.tensor[2] = False
    assert masks.nonempty().tolist() == [True, True, False, True]
    assert masks[0].tensor.shape == (1, 3, 3) and masks[1:3].tensor.shape == (2, 3, 3)
    assert len(masks[masks.nonempty()]) == 3 and len(BitMasks.cat([masks, masks])) == 8
    assert all(mask.shape == (3, 3) for mask in masks)
    with pytest.raises(AssertionError):
        BitMasks(torch.zeros(3, 4))


def rectangle(x0, y0, x1, y1):
    return np.array([x0, y0, x1, y0, x1, y1, x0, y1], dtype=float)


def test_polygons_to_bitmask_of_rectangles():
    expected = np.zeros((8, 9), dtype=bool)
    expected[1:4, 2:5] = True
    expected[3:7, 4:8] = True
    mask = polygons_to_bitmask([rectangle(2, 1, 5, 4), rectangle(4, 3, 8, 7)], 8, 9)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, expected)
    assert not polygons_to_bitmask([], 4, 5).any() and polygons_to_bitmask([], 4, 5).shape == (4, 5)


def test_polygon_masks():
    triangle = [0.0, 0, 6, 0, 0, 8]
    masks = PolygonMasks([[rectangle(2, 1, 5, 4), torch.tensor(triangle)], [np.array(triangle)], []])
    assert all(polygon.dtype == np.float64 for polygons in masks for polygon in polygons)
    assert masks.area().tolist() == [9 + 24, 24, 0]
    assert masks.get_bounding_boxes().tensor[:2].tolist() == [[0, 0, 6, 8], [0, 0, 6, 8]]
    assert masks.nonempty().tolist() == [True, True, False]
    assert len(masks) == 3 and len(masks[0]) == 1 and len(masks[:2]) == 2 and len(masks[[0, 2]]) == 2
    assert len(masks[masks.nonempty()]) == 2 and len(masks[torch.tensor([2, 1])].polygons[1]) == 1
    assert len(PolygonMasks.cat([masks, masks])) == 6
    assert masks.to("cpu") is masks
    bitmaps = BitMasks.from_polygon_masks(masks[:1], 8, 9)
    np.testing.assert_array_equal(bitmaps.tensor[0].numpy(), polygons_to_bitmask(masks.polygons[0], 8, 9))
    assert BitMasks.from_polygon_masks([], 8, 9).tensor.shape == (0, 8, 9)


@pytest.mark.embedded_only
def test_polygon_masks_beyond_upstream():
    masks = PolygonMasks([[rectangle(0, 0, 2, 2)], []])
    assert masks.get_bounding_boxes().tensor[1].tolist() == [0, 0, 0, 0]
    assert len(masks[np.array([True, False])]) == 1 and len(masks[np.int64(1)]) == 1
    assert len(masks[[]]) == 0
    assert len(BitMasks(torch.ones(3, 4, 4))[np.int64(1)]) == len(Boxes(torch.ones(3, 4))[np.int64(1)]) == 1


@pytest.mark.parametrize(
    "polygons",
    [np.ones(6), [np.ones(6)], [[np.ones(4)]], [[np.ones(7)]]],
    ids=["array", "flat", "two points", "half a point"],
)
def test_polygon_masks_refuse_bad_input(polygons):
    with pytest.raises(ValueError):
        PolygonMasks(polygons)


@pytest.mark.embedded_only
@pytest.mark.parametrize(
    "use",
    [
        lambda: Keypoints(np.zeros((1, 17, 3))),
        lambda: RotatedBoxes(torch.zeros(1, 5)),
        lambda: BitMasks(torch.zeros(1, 4, 4)).crop_and_resize(torch.zeros(1, 4), 2),
        lambda: PolygonMasks([]).crop_and_resize(torch.zeros(0, 4), 2),
    ],
)
def test_what_is_left_out_says_how_to_get_it(use):
    with pytest.raises(NotImplementedError, match="install upstream Detectron2 to use it: pip install"):
        use()
