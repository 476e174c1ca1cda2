"""Transforms against slow references, and what augmentations draw."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from detectron2.data import transforms as T


def _image(*shape, dtype=np.uint8, seed=0):
    return np.random.RandomState(seed).randint(0, 256, shape).astype(dtype)


# ---- resize

# without ties: no sample falls on the border of two input pixels
SIZES = [((10, 7), (16, 14)), ((10, 10), (4, 24)), ((6, 9), (6, 9)), ((5, 3), (1, 1))]


def _nearest(labels, new_size, grid):
    """Slow nearest neighbour: Pillow samples at the middle of an output pixel, torch at its top left corner."""
    out = np.empty((*new_size, *labels.shape[2:]), labels.dtype)
    offset = {"pillow": 0.5, "torch": 0.0}[grid]
    for y in range(new_size[0]):
        for x in range(new_size[1]):
            out[y, x] = labels[
                int((y + offset) * labels.shape[0] / new_size[0]), int((x + offset) * labels.shape[1] / new_size[1])
            ]
    return out


@pytest.mark.parametrize("size, new_size", SIZES)
@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_resize_labels_uint8_on_pillows_grid(size, new_size, channels):
    labels = _image(*size, *channels)
    got = T.ResizeTransform(*size, *new_size).apply_segmentation(labels)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, _nearest(labels, new_size, "pillow"))


@pytest.mark.parametrize("size, new_size", SIZES)
def test_resize_labels_float_on_torchs_grid(size, new_size):
    labels = _image(*size, dtype=np.float64)
    got = T.ResizeTransform(*size, *new_size).apply_segmentation(labels)
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, _nearest(labels, new_size, "torch"))


@pytest.mark.embedded_only
@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.uint32, np.int64])
@pytest.mark.parametrize("size, new_size", SIZES)
def test_resize_labels_of_any_integer_exactly(dtype, size, new_size):
    info = np.iinfo(dtype)
    labels = np.random.RandomState(0).randint(info.min, info.max, size, dtype=dtype)
    got = T.ResizeTransform(*size, *new_size).apply_segmentation(labels)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, _nearest(labels, new_size, "torch"))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, pytest.param(np.int32, marks=pytest.mark.embedded_only)])
@pytest.mark.parametrize(
    "size, new_size",
    [
        ((644, 3), (77, 5)),
        ((585, 3), (35, 5)),
        ((800, 3), (48, 5)),
        ((427, 640), (683, 1024)),
        ((333, 3), (111, 5)),
        ((124, 186), (112, 168)),
        ((124, 3), (112, 5)),
    ],
)
def test_resize_labels_rounds_as_torch_does(dtype, size, new_size):
    """Where a sample falls on a border, torch's float32 and float64 disagree, as do its small and its large outputs."""
    labels = np.arange(size[0] * size[1]).reshape(size).astype(dtype)
    values = torch.from_numpy(labels.astype(np.float32 if dtype == np.float32 else np.float64))
    expected = torch.nn.functional.interpolate(values[None, None], new_size, mode="nearest")[0, 0].numpy()
    np.testing.assert_array_equal(T.ResizeTransform(*size, *new_size).apply_segmentation(labels), expected)


@pytest.mark.embedded_only
def test_resize_bool_masks_like_uint8():
    mask = _image(9, 11) > 127
    transform = T.ResizeTransform(9, 11, 5, 17)
    got = transform.apply_segmentation(mask)
    assert got.dtype == bool
    np.testing.assert_array_equal(got, transform.apply_segmentation(mask.astype(np.uint8)).astype(bool))


def test_resize_float_image_is_bilinear():
    image = _image(8, 6, 3, dtype=np.float32)
    got = T.ResizeTransform(8, 6, 16, 12).apply_image(image)
    # twice the size: samples lie at quarters between the pixels
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = [0.25 * padded[:-2] + 0.75 * padded[1:-1], 0.75 * padded[1:-1] + 0.25 * padded[2:]]
    rows = np.stack(rows, axis=1).reshape(16, 8, 3)
    cols = [0.25 * rows[:, :-2] + 0.75 * rows[:, 1:-1], 0.75 * rows[:, 1:-1] + 0.25 * rows[:, 2:]]
    expected = np.stack(cols, axis=2).reshape(16, 12, 3)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert got.dtype == np.float32


def test_resize_uint8_image_is_pillows():
    image = _image(20, 30, 3)
    got = T.ResizeTransform(20, 30, 9, 13, Image.BICUBIC).apply_image(image)
    np.testing.assert_array_equal(got, np.asarray(Image.fromarray(image).resize((13, 9), Image.BICUBIC)))


@pytest.mark.embedded_only
@pytest.mark.parametrize("channels", [2, 4, 5])
def test_resize_any_number_of_channels(channels):
    """Pillow alone would weight the other channels of 2 and 4 with the last one."""
    image = _image(12, 9, channels)
    got = T.ResizeTransform(12, 9, 5, 6).apply_image(image)
    for c in range(channels):
        np.testing.assert_array_equal(
            got[:, :, c], np.asarray(Image.fromarray(image[:, :, c]).resize((6, 5), Image.BILINEAR))
        )


@pytest.mark.embedded_only
def test_resize_integer_image_rounds():
    image = np.array([[0, 65535], [65535, 0]], dtype=np.uint16)
    got = T.ResizeTransform(2, 2, 1, 1).apply_image(image)
    assert got.dtype == np.uint16 and got.item() == 32768  # 32767.5 to even


@pytest.mark.embedded_only
def test_resize_of_another_size():
    with pytest.raises(ValueError, match=r"height 4 and width 5.*\(5, 4"):
        T.ResizeTransform(4, 5, 8, 8).apply_image(_image(5, 4, 3))


def test_resize_coords_and_inverse():
    transform = T.ResizeTransform(10, 20, 30, 10)
    np.testing.assert_allclose(transform.apply_coords(np.array([[4.0, 2.0]])), [[2.0, 6.0]])
    np.testing.assert_allclose(transform.inverse().apply_coords(np.array([[2.0, 6.0]])), [[4.0, 2.0]])
    np.testing.assert_allclose(transform.apply_box(np.array([[0.0, 1.0, 20.0, 10.0]])), [[0, 3, 10, 30]])


@pytest.mark.parametrize("size, length, limit, expected", [
    ((480, 640), 800, 1333, (800, 1067)),
    ((427, 640), 800, 1333, (800, 1199)),
    ((100, 400), 80, 200, (50, 200)),
    ((400, 100), 80, 200, (200, 50)),
    ((50, 50), 33, 10**9, (33, 33)),
    ((3, 2), 5, 10**9, (8, 5)),
])  # fmt: skip
def test_shortest_edge(size, length, limit, expected):
    assert T.ResizeShortestEdge.get_output_shape(*size, length, limit) == expected
    transform = T.ResizeShortestEdge([length], limit, "choice").get_transform(np.zeros(size))
    assert (transform.new_h, transform.new_w) == expected


def test_shortest_edge_styles():
    image = np.zeros((10, 20))
    seen = {T.ResizeShortestEdge((3, 5)).get_transform(image).new_h for _ in range(60)}
    assert seen == {3, 4, 5}
    seen = {T.ResizeShortestEdge((3, 9, 7), sample_style="choice").get_transform(image).new_h for _ in range(60)}
    assert seen == {3, 7, 9}
    assert isinstance(T.ResizeShortestEdge(0).get_transform(image), T.NoOpTransform)


@pytest.mark.embedded_only
def test_bad_arguments():
    with pytest.raises(ValueError, match="interval"):
        T.ResizeShortestEdge((1, 2, 3))
    with pytest.raises(ValueError, match="sample_style.*range, choice.*'any'"):
        T.ResizeShortestEdge((1, 2), sample_style="any")
    with pytest.raises(ValueError, match="crop_type"):
        T.RandomCrop("absolut", (1, 2))
    with pytest.raises(ValueError, match="exactly one"):
        T.RandomFlip(horizontal=True, vertical=True)
    with pytest.raises(ValueError, match="RandomSaturation.*3 channels"):
        T.RandomSaturation(0, 1).get_transform(np.zeros((3, 4)))
    with pytest.raises(TypeError, match="Transform"):
        T.AugmentationList([3])


# ---- crops, pads, extents


def test_scale_jitter_is_resize_then_crop_or_pad():
    image = _image(40, 60, 3)
    seg = _image(40, 60)
    for seed in range(8):
        np.random.seed(seed)
        scale, place = np.random.uniform(0.1, 2.0), np.random.uniform()
        factor = min(48 * scale / 40, 50 * scale / 60)
        h, w = int(np.round(40 * factor)), int(np.round(60 * factor))
        y0, x0 = int(np.round(max(h - 48, 0) * place)), int(np.round(max(w - 50, 0) * place))
        resized = np.asarray(Image.fromarray(image).resize((w, h), Image.BILINEAR))[y0 : y0 + 48, x0 : x0 + 50]
        expected = np.full((48, 50, 3), 128, np.uint8)
        expected[: resized.shape[0], : resized.shape[1]] = resized

        np.random.seed(seed)
        aug_input = T.AugInput(image, sem_seg=seg)
        aug_input.apply_augmentations([T.ResizeScale(0.1, 2.0, 48, 50), T.FixedSizeCrop((48, 50))])
        np.testing.assert_array_equal(aug_input.image, expected)
        assert aug_input.sem_seg.shape == (48, 50)
        assert (aug_input.sem_seg[resized.shape[0] :] == 255).all() and (
            aug_input.sem_seg[:, resized.shape[1] :] == 255
        ).all()


@pytest.mark.embedded_only
def test_fixed_size_crop_can_be_undone():
    image = _image(30, 10, 3)
    transform = T.FixedSizeCrop((20, 20)).get_transform(image)
    points = np.array([[3.0, 25.0]])
    moved = transform.apply_coords(points.copy())
    np.testing.assert_allclose(transform.inverse().apply_coords(moved), points)
    assert transform.inverse().apply_image(transform.apply_image(image)).shape == image.shape


@pytest.mark.parametrize("crop_type, crop_size, heights, widths", [
    ("relative", (0.5, 0.25), {20}, {15}),
    ("relative_range", (0.5, 0.25), range(20, 41), range(15, 61)),
    ("absolute", (10, 100), {10}, {60}),
    ("absolute_range", (5, 8), range(5, 9), range(5, 9)),
])  # fmt: skip
def test_random_crop_types(crop_type, crop_size, heights, widths):
    image = _image(40, 60)
    places = set()
    for _ in range(60):
        crop = T.RandomCrop(crop_type, crop_size).get_transform(image)
        assert crop.h in heights and crop.w in widths
        out = crop.apply_image(image)
        assert out.shape == (crop.h, crop.w)
        np.testing.assert_array_equal(out, image[crop.y0 : crop.y0 + crop.h, crop.x0 : crop.x0 + crop.w])
        places.add(crop.y0)
    assert len(places) > 3


def test_category_constraint_avoids_one_category():
    seg = np.zeros((40, 40), np.uint8)
    seg[:, 36:] = 1
    image = np.zeros((40, 40, 3), np.uint8)
    shares = []
    for aug in (
        T.RandomCrop("absolute", (8, 8)),
        T.RandomCrop_CategoryAreaConstraint("absolute", (8, 8), single_category_max_area=0.75),
    ):
        hits = 0
        for _ in range(200):
            aug_input = T.AugInput(image, sem_seg=seg)
            aug(aug_input)
            counts = np.bincount(aug_input.sem_seg.ravel())
            hits += len(counts) > 1 and counts.max() < 0.75 * counts.sum()
        shares.append(hits / 200)
    assert shares[0] < 0.15 and shares[1] > 2.5 * shares[0]


def test_category_constraint_ignores_void():
    seg = np.full((8, 8), 255, np.uint8)
    seg[0, 0], seg[0, 1] = 3, 4
    aug = T.RandomCrop_CategoryAreaConstraint("absolute", (8, 8), 0.75, ignored_category=255)
    # two categories of one pixel each: accepted at once, so exactly one crop is drawn
    np.random.seed(0)
    aug.get_transform(np.zeros((8, 8, 3)), seg)
    state = np.random.randint(10**6)
    np.random.seed(0)
    T.RandomCrop("absolute", (8, 8)).get_transform(np.zeros((8, 8, 3)))
    assert np.random.randint(10**6) == state


@pytest.mark.embedded_only
def test_extent_reaches_outside_and_keeps_labels():
    labels = np.array([[10, 200], [10, 200]], np.uint8)
    transform = T.ExtentTransform((-1, 0, 3, 2), (4, 8))
    expected = np.repeat(np.repeat(np.array([[0, 10, 200, 0]] * 2, np.uint8), 2, 0), 2, 1)
    np.testing.assert_array_equal(transform.apply_segmentation(labels), expected)
    np.testing.assert_allclose(transform.apply_coords(np.array([[0.0, 1.0]])), [[2, 2]])


def test_min_iou_crop_keeps_a_box_inside():
    boxes = np.array([[10.0, 10, 30, 30], [40, 5, 58, 20]])
    image = np.zeros((40, 60, 3), np.uint8)
    crops = 0
    for _ in range(40):
        transform = T.MinIoURandomCrop().get_transform(image, boxes)
        if isinstance(transform, T.NoOpTransform):
            continue
        crops += 1
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2 - [transform.x0, transform.y0]
        assert ((middle > 0) & (middle < [transform.w + 1, transform.h + 1])).all(axis=1).any()
    assert crops > 10


# ---- flips, rotations, colors


def test_flips():
    image = _image(4, 6, 3)
    np.testing.assert_array_equal(T.RandomFlip(1.0).get_transform(image).apply_image(image), image[:, ::-1])
    vertical = T.RandomFlip(1.0, horizontal=False, vertical=True)
    np.testing.assert_array_equal(vertical.get_transform(image).apply_image(image), image[::-1])
    assert isinstance(T.RandomFlip(0.0).get_transform(image), T.NoOpTransform)


@pytest.mark.parametrize("angle, quarter_turns", [(90, 1), (180, 2), (270, 3), (-90, 3)])
def test_rotation_by_quarters(angle, quarter_turns):
    image = _image(5, 8, 3)
    rotation = T.RotationTransform(5, 8, angle)
    np.testing.assert_array_equal(rotation.apply_image(image), np.rot90(image, quarter_turns))
    np.testing.assert_array_equal(rotation.apply_segmentation(image[:, :, 0]), np.rot90(image[:, :, 0], quarter_turns))


def test_random_rotation_about_a_center():
    np.random.seed(0)
    angle = np.random.uniform(-30, 30)
    cx, cy = 8 * np.random.uniform(0.2, 0.4), 5 * np.random.uniform(0.3, 0.6)
    np.random.seed(0)
    aug = T.RandomRotation([-30, 30], expand=False, center=[[0.2, 0.3], [0.4, 0.6]])
    got = aug.get_transform(np.zeros((5, 8, 3))).apply_coords(np.array([[7.0, 1.0], [cx, cy]]))
    a = np.deg2rad(angle)
    dx, dy = 7 - cx, 1 - cy
    expected = [[cx + np.cos(a) * dx + np.sin(a) * dy, cy - np.sin(a) * dx + np.cos(a) * dy], [cx, cy]]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_blends():
    image = _image(6, 5, 3)
    intensity = 1.5  # both ends equal: not random
    as_float = image.astype(float)
    references = {
        T.RandomBrightness: 0.0,
        T.RandomContrast: as_float.mean(),
        T.RandomSaturation: (as_float @ [0.299, 0.587, 0.114])[:, :, None],
    }
    for aug, reference in references.items():
        got = aug(intensity, intensity).get_transform(image).apply_image(image)
        expected = np.clip(reference + intensity * (as_float - reference), 0, 255)
        assert got.dtype == np.uint8
        assert np.abs(got - expected).max() <= 1


def test_lighting_adds_one_color():
    image = np.full((4, 4, 3), 100, np.uint8)
    got = T.RandomLighting(30).get_transform(image).apply_image(image)
    assert len(np.unique(got.reshape(-1, 3), axis=0)) == 1
    assert (got != 100).any()


def test_color_transforms_leave_geometry():
    image = _image(3, 4, 3)
    transform = T.PILColorTransform(ImageOps.invert)
    np.testing.assert_array_equal(transform.apply_image(image), 255 - image)
    np.testing.assert_array_equal(transform.apply_segmentation(image[:, :, 0]), image[:, :, 0])
    assert isinstance(transform.inverse(), T.NoOpTransform)


# ---- the way augmentations are applied


def test_image_boxes_and_labels_move_together():
    image, seg = _image(10, 20, 3), _image(10, 20)
    aug_input = T.AugInput(image, boxes=np.array([[2.0, 3.0, 8.0, 9.0]]), sem_seg=seg)
    transforms = aug_input.apply_augmentations([T.RandomFlip(1.0), T.CropTransform(4, 2, 10, 8)])
    np.testing.assert_array_equal(aug_input.image, image[:, ::-1][2:, 4:14])
    np.testing.assert_array_equal(aug_input.sem_seg, seg[:, ::-1][2:, 4:14])
    np.testing.assert_allclose(aug_input.boxes, [[8, 1, 14, 7]])
    np.testing.assert_array_equal(transforms.apply_image(image), aug_input.image)


def test_array_in_array_out():
    image = _image(4, 6, 3)
    out, transforms = T.apply_augmentations([T.RandomFlip(1.0)], image)
    np.testing.assert_array_equal(out, image[:, ::-1])
    assert isinstance(transforms, T.TransformList)


def test_arguments_are_chosen_by_name():
    seen = {}

    class Two(T.Augmentation):
        def get_transform(self, image, sem_seg):
            seen["two"] = (image.shape, sem_seg.shape)
            return T.NoOpTransform()

    class OneOfAnyName(T.Augmentation):
        def get_transform(self, picture):
            seen["one"] = picture.shape
            return T.NoOpTransform()

    T.AugInput(_image(3, 4, 3), sem_seg=_image(3, 4)).apply_augmentations([Two(), OneOfAnyName()])
    assert seen == {"two": ((3, 4, 3), (3, 4)), "one": (3, 4, 3)}


@pytest.mark.embedded_only
def test_augmentation_errors():
    class Depth(T.Augmentation):
        def get_transform(self, image, depth):
            return T.NoOpTransform()

    class Nothing(T.Augmentation):
        def get_transform(self, image):
            return None

    aug_input = T.AugInput(_image(3, 4, 3))
    with pytest.raises(AttributeError, match="Depth.get_transform needs 'depth'"):
        Depth()(aug_input)
    with pytest.raises(TypeError, match="Nothing.get_transform.*NoneType"):
        Nothing()(aug_input)
    with pytest.raises(TypeError, match=r"\(H, W\)"):
        T.AugInput(np.zeros((2, 3, 4, 5)))


def test_random_apply():
    image = _image(4, 6, 3)
    hits = sum(
        isinstance(T.RandomApply(T.RandomFlip(1.0), 0.3)(T.AugInput(image)), T.HFlipTransform) for _ in range(400)
    )
    assert 80 < hits < 160


def test_repr_shows_what_differs_from_the_defaults():
    assert repr(T.ResizeScale(0.1, 2.0, 640, 480)) == (
        "ResizeScale(min_scale=0.1, max_scale=2.0, target_height=640, target_width=480)"
    )
    assert repr(T.FixedSizeCrop((3, 4), pad=False)) == "FixedSizeCrop(crop_size=(3, 4), pad=False)"
