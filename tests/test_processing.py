"""The image processor: options, targets and results, with the values that the right implementation gives."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pycocotools.mask
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mask2former_plugin.config import load_config
from mask2former_plugin.modeling.mask_logits import MaskLogits, MaskPrediction
from mask2former_plugin.processing import ImageProcessor

CERTAIN = 30.0


def random_image(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)


def size_of(height, width, **options):
    return tuple(ImageProcessor(**options)(random_image(height, width))["pixel_values"].shape[-2:])


# ---- images ----


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        ((40, 50), {"size": {"height": 40, "width": 50}}, (64, 64)),
        ((64, 96), {"size": {"shortest_edge": 100, "longest_edge": 120}}, (96, 128)),
        ((100, 150), {}, (800, 1216)),
        ((64, 96), {"size": {"shortest_edge": 100, "longest_edge": 120}, "size_divisor": 0}, (80, 120)),
        ((96, 64), {"size": {"shortest_edge": 100, "longest_edge": 120}, "size_divisor": 1}, (120, 80)),
        ((50, 40), {"size": {"shortest_edge": 70}, "size_divisor": 1}, (87, 70)),
        ((50, 40), {"size": (64, 96)}, (64, 96)),  # (height, width)
        ((50, 40), {"size": 20, "size_divisor": 1}, (25, 20)),
        ((50, 10), {"size": 20, "max_size": 60, "size_divisor": 1}, (60, 12)),
        ((50, 10), {"size": {"shortest_edge": 20, "longest_edge": 90}, "max_size": 60, "size_divisor": 1}, (60, 12)),
        ((50, 40), {"size": {"max_height": 100, "max_width": 60}, "size_divisor": 1}, (75, 60)),
        ((407, 802), {"size": (407, 802), "size_divisor": 8}, (408, 808)),
        ((582, 1094), {"size": (582, 1094), "size_divisor": 16}, (592, 1104)),
        ((41, 53), {"do_resize": False}, (41, 53)),
        ((31, 104), {"size": {"shortest_edge": 63, "longest_edge": 103}, "size_divisor": 1}, (31, 103)),
        ((4, 900), {"size": {"shortest_edge": 9, "longest_edge": 30}, "size_divisor": 1}, (1, 30)),
    ],
)
def test_size(image, options, expected):
    assert size_of(*image, **options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": {"height": 3}}, "size is"),
        ({"size": (1, 2, 3)}, "size is"),
        ({"size": 0}, "positive"),
        ({"size": {"height": 3, "width": 4}, "max_size": 5}, "max_size"),
        ({"pad_size": {"shortest_edge": 3}}, "pad_size"),
        ({"do_reduce_labels": True}, "ignore_index"),
        ({"reduce_labels": True}, "ignore_index"),
        ({"resample": 99}, "99"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ImageProcessor(**options)


def test_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="sise"):
        ImageProcessor(sise=3)
    with pytest.raises(TypeError, match="sise"):
        ImageProcessor()(random_image(4, 4), sise=3)


@pytest.mark.parametrize("resample", list(Image.Resampling))
def test_values(resample):
    image = random_image(30, 44)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    processor = ImageProcessor(
        size=(20, 57), size_divisor=1, resample=int(resample), rescale_factor=0.5, image_mean=mean, image_std=std
    )
    resized = np.asarray(Image.fromarray(image).resize((57, 20), resample), dtype=np.float64)
    expected = ((resized * 0.5 - np.array(mean)) / np.array(std)).transpose(2, 0, 1)
    values = processor(image)["pixel_values"]
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values[0], expected, rtol=1e-5, atol=1e-4)


def test_steps_are_switched_off_one_by_one():
    image = random_image(6, 8)
    raw = image.transpose(2, 0, 1).astype(np.float32)
    off = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    np.testing.assert_array_equal(ImageProcessor(**off)(image)["pixel_values"][0], raw)
    scaled = ImageProcessor(**{**off, "do_rescale": True})(image)["pixel_values"][0]
    np.testing.assert_allclose(scaled, raw / 255, rtol=1e-6)
    normal = ImageProcessor(**{**off, "do_normalize": True}, image_mean=2.0, image_std=4.0)(image)["pixel_values"][0]
    np.testing.assert_allclose(normal, (raw - 2) / 4, rtol=1e-6)


def test_all_kinds_of_images():
    image = random_image(32, 64)
    processor = ImageProcessor(do_resize=False)
    expected = processor(image)["pixel_values"]
    for same in (
        Image.fromarray(image),
        torch.from_numpy(image),
        image.transpose(2, 0, 1),
        torch.from_numpy(image.transpose(2, 0, 1)),
        [image],
        (image,),
        image[None],
        image.astype(np.float64),
    ):
        torch.testing.assert_close(processor(same)["pixel_values"], expected, rtol=0, atol=0)
    batch = processor(np.stack([image, image]))["pixel_values"]
    torch.testing.assert_close(batch, expected.expand(2, -1, -1, -1), rtol=0, atol=0)
    grey = processor(image[..., 0])["pixel_values"]
    torch.testing.assert_close(grey, processor(np.repeat(image[..., :1], 3, 2))["pixel_values"], rtol=0, atol=0)
    assert processor(Image.fromarray(image).convert("RGBA"))["pixel_values"].shape == (1, 3, 32, 64)
    palette = Image.fromarray(image[..., 0]).convert("P")
    assert processor(palette)["pixel_values"].shape == (1, 3, 32, 64)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_numbers_of_channels(channels):
    image = random_image(32, 40, channels)
    options = {"do_resize": False, "do_convert_rgb": False, "image_mean": 0.5, "image_std": 0.5}
    last = ImageProcessor(**options)(image, input_data_format="channels_last")["pixel_values"]
    first = ImageProcessor(**options)(image.transpose(2, 0, 1), input_data_format="channels_first")["pixel_values"]
    assert last.shape == (1, channels, 32, 40) and torch.equal(last, first)
    if channels > 1:
        with pytest.raises(ValueError, match="image 0: shape .*input_data_format"):
            ImageProcessor(**options)(image)
        with pytest.raises(ValueError, match=f"image 0: {channels} channels, but image_mean has 3"):
            ImageProcessor(do_resize=False)(image, input_data_format="channels_last")


def test_padding_is_below_and_to_the_right():
    images = [random_image(5, 9), random_image(8, 4)]
    encoded = ImageProcessor(do_resize=False)(images)
    assert encoded["pixel_values"].shape == (2, 3, 8, 9)
    expected = torch.zeros(2, 8, 9, dtype=torch.int64)
    expected[0, :5, :9] = 1
    expected[1, :8, :4] = 1
    assert torch.equal(encoded["pixel_mask"], expected)
    assert (encoded["pixel_values"].abs().sum(1)[expected == 0] == 0).all()
    alone = ImageProcessor(do_resize=False)(images[1])["pixel_values"]
    torch.testing.assert_close(encoded["pixel_values"][1, :, :8, :4], alone[0], rtol=0, atol=0)


def test_pad_size_and_do_pad():
    processor = ImageProcessor(do_resize=False, pad_size={"height": 10, "width": 12})
    assert processor([random_image(5, 9), random_image(8, 4)])["pixel_values"].shape == (2, 3, 10, 12)
    with pytest.raises(ValueError, match="image 1 has 11x4 .* pad_size 10x12"):
        processor([random_image(5, 9), random_image(11, 4)])
    with pytest.raises(ValueError, match="do_pad"):
        ImageProcessor(do_resize=False, do_pad=False)([random_image(5, 9), random_image(8, 4)])
    assert ImageProcessor(do_resize=False, do_pad=False)([random_image(5, 9)] * 2)["pixel_mask"].all()


def test_options_of_a_call_count_for_that_call():
    processor = ImageProcessor(size=42, max_size=84, size_divisor=8)
    image = random_image(20, 20)
    assert processor(image)["pixel_values"].shape[-2:] == (48, 48)
    assert processor(image, size=16, size_divisor=1)["pixel_values"].shape[-2:] == (16, 16)
    assert processor(image, size=None)["pixel_values"].shape[-2:] == (48, 48)
    assert processor.size == {"shortest_edge": 42, "longest_edge": 84}


def test_forms_of_the_tensors():
    image, labels = random_image(6, 8), np.arange(48).reshape(6, 8)
    processor = ImageProcessor(do_resize=False)
    plain = processor(image, labels)
    arrays = processor(image, labels, return_tensors="np", data_format="channels_last")
    assert isinstance(arrays["class_labels"][0], np.ndarray)
    np.testing.assert_array_equal(arrays["pixel_values"][0], plain["pixel_values"][0].permute(1, 2, 0))
    moved = processor(image, labels, device="meta")
    assert all(tensor.device.type == "meta" for tensor in (moved["pixel_values"], *moved["mask_labels"]))
    with pytest.raises(ValueError, match="return_tensors is 'tf'"):
        processor(image, return_tensors="tf")
    with pytest.raises(ValueError, match="data_format is 'last'"):
        processor(image, data_format="last")


def test_no_images():
    with pytest.raises(ValueError, match="no images"):
        ImageProcessor()([])


# ---- files and configs ----


def test_options_survive_files(tmp_path, caplog):
    processor = ImageProcessor(size=64, ignore_index=255, do_reduce_labels=True, resample=3, num_labels=7)
    assert ImageProcessor(**processor.to_dict()).to_dict() == processor.to_dict()
    values = {**processor.to_dict(), "image_processor_type": "Mask2FormerImageProcessor", "crop_pct": 1}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    read = ImageProcessor.from_pretrained(tmp_path)
    assert "crop_pct" in caplog.text and "image_processor_type" not in caplog.text
    expected = {**processor.to_dict(), "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    assert {**read.to_dict(), "image_mean": list(read.image_mean), "image_std": list(read.image_std)} == expected


def test_options_of_the_first_releases():
    old = {"size": 640, "max_size": 2560, "size_divisibility": 16, "reduce_labels": True, "ignore_index": 255}
    processor = ImageProcessor.from_dict(old)
    assert processor.size == {"shortest_edge": 640, "longest_edge": 2560}
    assert processor.size_divisor == 16 and processor.do_reduce_labels


def test_processor_of_a_config():
    options = ["INPUT.FORMAT", "RGB", "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128]
    statistics = ["MODEL.PIXEL_MEAN", [51.0, 102.0, 153.0], "MODEL.PIXEL_STD", [25.5, 51.0, 76.5]]
    cfg = load_config(None, [*options, *statistics])
    processor = ImageProcessor.from_config(cfg)
    image = random_image(64, 96)
    expected = (image.transpose(2, 0, 1) - np.array(cfg.MODEL.PIXEL_MEAN)[:, None, None]) / np.array(
        cfg.MODEL.PIXEL_STD
    )[:, None, None]
    np.testing.assert_allclose(processor(image)["pixel_values"][0], expected, rtol=1e-4, atol=1e-4)


# ---- targets ----

RAW = {"do_resize": False}


@pytest.mark.parametrize(
    ("ignore_index", "reduce_labels", "expected"),
    [
        (None, False, [0, 1, 2, 255]),
        (255, False, [0, 1, 2]),
        (255, True, [0, 1]),  # Hugging Face: 0, 1, 254
        (0, False, [1, 2, 255]),
    ],
)
def test_classes_of_a_map(ignore_index, reduce_labels, expected):
    labels = np.array([[0, 1, 2, 255], [0, 1, 2, 255]], dtype=np.uint8)
    processor = ImageProcessor(**RAW, ignore_index=ignore_index, do_reduce_labels=reduce_labels)
    encoded = processor(random_image(2, 4), labels)
    (classes,), (masks,) = encoded["class_labels"], encoded["mask_labels"]
    assert classes.dtype == torch.int64 and classes.tolist() == expected
    assert masks.dtype == torch.float32
    ids = [c + reduce_labels for c in expected]
    assert torch.equal(masks, torch.stack([torch.from_numpy(labels == number) for number in ids]).float())


def test_documented_example():
    encoded = ImageProcessor().encode_inputs([torch.zeros(3, 1, 4)], [np.array([[2, 6, 7, 9]])])
    assert torch.equal(encoded["mask_labels"][0], torch.eye(4)[:, None])
    assert encoded["class_labels"][0].tolist() == [2, 6, 7, 9]


def test_map_of_ignored_pixels_only():
    encoded = ImageProcessor(**RAW, ignore_index=3)(random_image(5, 6), np.full((5, 6), 3))
    assert encoded["mask_labels"][0].shape == (0, 5, 6)
    assert encoded["class_labels"][0].shape == (0,) and encoded["class_labels"][0].dtype == torch.int64


def test_padding_of_targets_is_zero():
    # Hugging Face fills with ignore_index: masks of 1 and 255
    images = [random_image(64, 96), random_image(96, 64)]
    maps = [np.ones((64, 96), int), np.ones((96, 64), int)]
    for ignore_index in (255, None):
        encoded = ImageProcessor(**RAW, ignore_index=ignore_index)(images, maps)
        for mask, inside in zip(encoded["mask_labels"], encoded["pixel_mask"]):
            assert mask.shape == (1, 96, 96) and torch.equal(mask[0], inside.float())


def test_instances_of_one_map():
    labels = np.array([[0, 1, 2, 3000000000]])
    classes = {0: 7, 1: 5, 2: 5, 3000000000: 6}
    encoded = ImageProcessor(**RAW)(random_image(1, 4), labels, classes)
    assert encoded["class_labels"][0].tolist() == [7, 5, 5, 6]
    assert torch.equal(encoded["mask_labels"][0], torch.eye(4)[:, None])
    reduced = ImageProcessor(**RAW, ignore_index=255, do_reduce_labels=True)(random_image(1, 4), labels, classes)
    assert reduced["class_labels"][0].tolist() == [4, 4, 5]  # id 0 gives no mask
    background = ImageProcessor(**RAW, ignore_index=255, do_reduce_labels=True)(
        random_image(1, 4), labels, {0: 7, 1: 0, 2: 255, 3000000000: 6}
    )
    assert background["class_labels"][0].tolist() == [5]


def test_one_mapping_for_each_image():
    maps = [np.array([[1, 2]]), np.array([[1, 1]])]
    images = [random_image(1, 2)] * 2
    encoded = ImageProcessor(**RAW)(images, maps, [{1: 3, 2: 4}, {1: 9}])
    assert [c.tolist() for c in encoded["class_labels"]] == [[3, 4], [9]]
    with pytest.raises(ValueError, match="2 images, but 1 instance_id_to_semantic_id"):
        ImageProcessor(**RAW)(images, maps, [{1: 3, 2: 4}])
    with pytest.raises(KeyError, match="segmentation map 1: id 1 is not in instance_id_to_semantic_id"):
        ImageProcessor(**RAW)(images, maps, [{1: 3, 2: 4}, {2: 4}])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_large_ids_survive_resizing(dtype):
    ids = [7, 300, 40000, 65000] if dtype == np.uint16 else [7, 300, 70000, 2**31 - 1]
    quadrants = np.array(ids, dtype=dtype).reshape(2, 2).repeat(10, 0).repeat(10, 1)
    encoded = ImageProcessor(size=(64, 96))(random_image(20, 20), quadrants)
    assert encoded["class_labels"][0].tolist() == ids
    expected = torch.zeros(4, 64, 96)
    for i, (top, left) in enumerate(itertools.product((0, 32), (0, 48))):
        expected[i, top : top + 32, left : left + 48] = 1
    assert torch.equal(encoded["mask_labels"][0], expected)


def test_maps_take_the_label_under_the_centre():
    labels = np.random.default_rng(0).integers(0, 200, (23, 37))
    encoded = ImageProcessor(size=(41, 29), size_divisor=1)(random_image(23, 37), labels)
    classes = encoded["class_labels"][0][encoded["mask_labels"][0].argmax(0)]
    expected = [
        [labels[int((y + 0.5) * 23 / 41), int((x + 0.5) * 37 / 29)] for x in range(29)] for y in range(41)
    ]
    assert classes.tolist() == expected


def test_all_kinds_of_maps():
    labels = np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8)
    image, processor = random_image(2, 3), ImageProcessor(**RAW)
    expected = processor(image, labels)["mask_labels"][0]
    for same in (Image.fromarray(labels), torch.from_numpy(labels), [labels], labels[None], labels[..., None]):
        assert torch.equal(processor(image, same)["mask_labels"][0], expected)
    batch = processor([image, image], np.stack([labels, labels]))["mask_labels"]
    assert torch.equal(batch[0], expected) and torch.equal(batch[1], expected)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (np.zeros((4, 5), int), r"segmentation map 0 has 4x5 \(height x width\) for an image of 5x4"),
        ([np.zeros((5, 4), int)] * 2, "1 images, but 2 segmentation_maps"),
        (np.zeros((5, 4)), "segmentation map 0: .* integer ids"),
        (np.zeros((5, 4, 3), int), "segmentation map 0: shape .* two dimensions"),
    ],
)
def test_wrong_maps(maps, message):
    for call in (ImageProcessor(size=8), lambda i, m: ImageProcessor().encode_inputs([i.transpose(2, 0, 1)], m)):
        with pytest.raises(ValueError, match=message):
            call(random_image(5, 4), maps)


def test_classes_beyond_num_labels():
    processor = ImageProcessor(**RAW, num_labels=3)
    assert processor(random_image(1, 2), np.array([[0, 2]]))["class_labels"][0].tolist() == [0, 2]
    with pytest.raises(ValueError, match=r"segmentation map 0: classes \[3\] are outside 0..2 \(num_labels\)"):
        processor(random_image(1, 2), np.array([[0, 3]]))


def test_encode_inputs_leaves_values_alone():
    arrays = [torch.randn(3, 4, 6), torch.randn(3, 5, 5)]
    labels = [np.full((4, 6), 300), np.full((5, 5), 70000)]
    processor = ImageProcessor(ignore_index=300)
    encoded = processor.encode_inputs(arrays, labels, {300: 1, 70000: 2})
    assert torch.equal(encoded["pixel_values"][0, :, :4, :6], arrays[0])
    assert encoded["pixel_mask"].sum((1, 2)).tolist() == [24, 25]
    assert [c.tolist() for c in encoded["class_labels"]] == [[1], [2]]  # the call's ignore_index counts
    reduced = processor.encode_inputs(arrays, labels, {300: 1, 70000: 2}, ignore_index=0, reduce_labels=True)
    assert [c.tolist() for c in reduced["class_labels"]] == [[0], [1]]
    with pytest.raises(ValueError, match="ignore_index"):
        processor.encode_inputs(arrays, labels, do_reduce_labels=True)
    last = processor.encode_inputs([arrays[0].permute(1, 2, 0)], input_data_format="channels_last")
    assert torch.equal(last["pixel_values"][0], arrays[0]) and "mask_labels" not in last


# ---- results ----


def class_logits(*probabilities):
    """Logits ``[1, Q, K+1]`` of class probabilities (without "no object", which gets the rest), one tuple a query."""
    rows = torch.tensor(probabilities, dtype=torch.float64)
    return torch.cat([rows, 1 - rows.sum(1, keepdim=True)], 1).clamp(min=1e-12).log()[None]


def outputs_of(classes, masks):
    return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)


def quadrants(side=32):
    masks = torch.full((1, 4, side, side), -CERTAIN, dtype=torch.float64)
    half = side // 2
    for i, mask in enumerate(masks[0]):
        mask[i // 2 * half : (i // 2 + 1) * half, i % 2 * half : (i % 2 + 1) * half] = CERTAIN
    return masks


def random_outputs(batch=2, queries=7, classes=4, size=(9, 13)):
    embed, features = torch.randn(batch, queries, 5), torch.randn(batch, 5, *size)
    class_logits = torch.randn(batch, queries, classes + 1) * 2
    return MaskPrediction(pred_logits=class_logits, mask_logits=MaskLogits(embed, features))


PROCESSOR = ImageProcessor()
METHODS = [
    PROCESSOR.post_process_semantic_segmentation,
    PROCESSOR.post_process_instance_segmentation,
    PROCESSOR.post_process_panoptic_segmentation,
]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return torch.equal(one["segmentation"], other["segmentation"]) and one["segments_info"] == other["segments_info"]


@pytest.mark.parametrize("method", METHODS)
def test_outputs_of_either_side(method):
    ours = random_outputs()
    theirs = outputs_of(ours["pred_logits"], ours["pred_masks"])
    dense = {"pred_logits": ours["pred_logits"], "pred_masks": ours["pred_masks"]}
    expected = method(ours, target_sizes=[(20, 31), (8, 5)])
    for outputs in (theirs, vars(theirs), dense):
        assert all(map(same, method(outputs, target_sizes=torch.tensor([[20, 31], [8, 5]])), expected))
    with pytest.raises(ValueError, match="target_sizes has 1 entries for a batch of 2"):
        method(ours, target_sizes=[(20, 31)])
    with pytest.raises(ValueError, match="outputs must have pred_logits"):
        method({"pred_logits": ours["pred_logits"]})


@pytest.mark.parametrize("method", METHODS)
def test_sizes_without_and_with_targets(method):
    def shape(result):
        return tuple((result if isinstance(result, torch.Tensor) else result["segmentation"]).shape)

    outputs = outputs_of(torch.randn(2, 3, 3), torch.randn(2, 3, 3, 4))
    assert [shape(r) for r in method(outputs)] == [(3, 4)] * 2
    assert [shape(r) for r in method(outputs, target_sizes=[(1, 4), (9, 2)])] == [(1, 4), (9, 2)]
    pixel_mask = torch.zeros(2, 12, 16, dtype=torch.int64)
    pixel_mask[0, :12, :8] = pixel_mask[1, :7, :16] = 1
    assert [shape(r) for r in method(outputs, pixel_mask=pixel_mask)] == [(12, 8), (7, 16)]
    assert [shape(r) for r in method(outputs, target_sizes=[(5, 6)] * 2, pixel_mask=pixel_mask)] == [(5, 6)] * 2


def test_semantic_scores():
    outputs = random_outputs()
    masks = F.interpolate(outputs["pred_masks"], size=(30, 17), mode="bilinear", align_corners=False)
    expected = torch.einsum("bqc,bqhw->bchw", outputs["pred_logits"].softmax(-1)[..., :-1], masks.sigmoid())
    results = PROCESSOR.post_process_semantic_segmentation(
        outputs, target_sizes=[(30, 17)] * 2, return_segmentation_scores=True
    )
    maps = PROCESSOR.post_process_semantic_segmentation(outputs, target_sizes=[(30, 17)] * 2)
    for result, labels, scores in zip(results, maps, expected):
        torch.testing.assert_close(result["segmentation_scores"], scores, rtol=1e-5, atol=1e-5)
        assert labels.dtype == torch.int64 and torch.equal(labels, scores.argmax(0))
        assert torch.equal(result["segmentation"], labels)


def test_padding_is_cropped():
    # Hugging Face maps the whole canvas onto the image: an object at its right edge would move left
    masks = torch.full((1, 1, 16, 16), -CERTAIN)
    masks[..., 4:8] = CERTAIN  # the image is the left half; the object its right half
    pixel_mask = torch.zeros(1, 64, 64)
    pixel_mask[:, :, :32] = 1
    outputs = outputs_of(class_logits((0.9,)), masks)
    (result,) = PROCESSOR.post_process_panoptic_segmentation(outputs, target_sizes=[(64, 32)], pixel_mask=pixel_mask)
    expected = torch.zeros(64, 32, dtype=torch.int32)
    expected[:, 16:] = 1
    assert torch.equal(result["segmentation"], expected)


def test_fused_segments_keep_ids_apart():
    # Hugging Face: ids 1, 2, 1, 2
    outputs = outputs_of(class_logits((0.7, 0, 0), (0, 0.8, 0), (0.9, 0, 0), (0, 0, 0.6)), quadrants())
    (result,) = PROCESSOR.post_process_panoptic_segmentation(outputs, label_ids_to_fuse={0})
    assert result["segments_info"] == [
        {"id": 1, "label_id": 0, "was_fused": True, "score": 0.9},
        {"id": 2, "label_id": 1, "was_fused": False, "score": 0.8},
        {"id": 3, "label_id": 2, "was_fused": False, "score": 0.6},
    ]
    assert result["segmentation"].dtype == torch.int32
    assert result["segmentation"][::16, ::16].tolist() == [[1, 2], [1, 3]]
    (apart,) = PROCESSOR.post_process_panoptic_segmentation(outputs)
    assert [s["id"] for s in apart["segments_info"]] == [1, 2, 3, 4]
    assert not any(s["was_fused"] for s in apart["segments_info"])


def test_one_query_gets_its_own_pixels_only():
    # Hugging Face: all 1024
    (result,) = PROCESSOR.post_process_panoptic_segmentation(outputs_of(class_logits((0.9, 0)), quadrants()[:, :1]))
    assert (result["segmentation"] == 1).sum() == 256 and (result["segmentation"] == 0).sum() == 768


def test_mask_threshold_is_for_the_mask():
    # class score 0.6, mask probability 0.8; Hugging Face finds nothing at 0.5
    masks = torch.full((1, 1, 4, 4), 0.8, dtype=torch.float64).logit()
    outputs = outputs_of(class_logits((0.6, 0)), masks)
    for threshold, pixels in ((0.5, 16), (0.79, 16), (0.81, 0)):
        (panoptic,) = PROCESSOR.post_process_panoptic_segmentation(outputs, mask_threshold=threshold)
        assert (panoptic["segmentation"] == 1).sum() == pixels
        assert len(panoptic["segments_info"]) == (pixels > 0)
        (found,) = PROCESSOR.post_process_instance_segmentation(outputs, threshold=0.4, mask_threshold=threshold)
        assert (found["segmentation"] == 0).sum() == pixels
        assert [s["score"] for s in found["segments_info"]] == [0.48] * (pixels > 0)


@pytest.mark.parametrize(("overlap", "kept"), [(0.79, True), (0.80, True), (0.81, False)])
def test_overlap_threshold(overlap, kept):
    # 100 pixels of which 20 belong to a better query
    masks = torch.full((1, 2, 10, 20), -CERTAIN, dtype=torch.float64)
    masks[0, 0, :, :10] = torch.tensor(0.9, dtype=torch.float64).logit()
    masks[0, 1] += 1  # the best where nobody is
    masks[0, 1, :2] = CERTAIN
    outputs = outputs_of(class_logits((0.9, 0), (0, 0.95)), masks)
    options = {"threshold": 0.5, "overlap_mask_area_threshold": overlap}
    (panoptic,) = PROCESSOR.post_process_panoptic_segmentation(outputs, **options)
    assert [s["label_id"] for s in panoptic["segments_info"]] == ([0, 1] if kept else [1])
    (found,) = PROCESSOR.post_process_instance_segmentation(outputs, **options)
    assert [s["label_id"] for s in found["segments_info"]] == ([1, 0] if kept else [1])
    assert (found["segmentation"] == 1).sum() == (80 if kept else 0)
    (masks,) = PROCESSOR.post_process_instance_segmentation(outputs, **options, return_binary_maps=True)
    assert masks["segmentation"].sum((1, 2)).tolist() == [40, 100]  # masks may overlap


def test_thresholds_are_strict_and_inclusive():
    outputs = outputs_of(torch.zeros(1, 1, 2, dtype=torch.float64), torch.full((1, 1, 4, 4), CERTAIN))  # one half each
    assert PROCESSOR.post_process_panoptic_segmentation(outputs)[0]["segments_info"] == []
    assert len(PROCESSOR.post_process_panoptic_segmentation(outputs, threshold=0.499)[0]["segments_info"]) == 1
    scores = PROCESSOR.post_process_instance_segmentation(outputs, threshold=0.49)[0]["segments_info"]
    assert [s["score"] for s in scores] == [0.5]
    assert PROCESSOR.post_process_instance_segmentation(outputs, threshold=0.51)[0]["segments_info"] == []


def test_a_query_may_be_two_instances():
    outputs = outputs_of(class_logits((0.45, 0.53), (0, 0)), quadrants()[:, :2])
    (both,) = PROCESSOR.post_process_instance_segmentation(outputs, threshold=0.4, return_binary_maps=True)
    assert [(s["id"], s["label_id"], s["score"]) for s in both["segments_info"]] == [(0, 1, 0.53), (1, 0, 0.45)]
    assert both["segmentation"].dtype == torch.bool and torch.equal(*both["segmentation"])
    (one,) = PROCESSOR.post_process_instance_segmentation(outputs, threshold=0.4)  # a pixel has one owner
    assert [s["label_id"] for s in one["segments_info"]] == [1]
    assert one["segmentation"].dtype == torch.int32 and (one["segmentation"] == 0).sum() == 256
    assert (one["segmentation"] == -1).sum() == 768


def test_nothing_found():
    outputs = outputs_of(class_logits((0.1, 0.1)), quadrants(8)[:, :1])
    nothing = {"segmentation": torch.zeros(8, 8, dtype=torch.int32), "segments_info": []}
    assert same(PROCESSOR.post_process_panoptic_segmentation(outputs)[0], nothing)
    nothing["segmentation"] -= 1
    assert same(PROCESSOR.post_process_instance_segmentation(outputs)[0], nothing)
    (maps,) = PROCESSOR.post_process_instance_segmentation(outputs, return_binary_maps=True)
    assert maps["segmentation"].shape == (0, 8, 8) and maps["segments_info"] == []
    (coco,) = PROCESSOR.post_process_instance_segmentation(outputs, return_coco_annotation=True)
    assert coco == {"segmentation": [], "segments_info": []}


def test_empty_masks_are_no_instances():
    outputs = outputs_of(class_logits((0.9, 0.0)), torch.full((1, 1, 4, 4), -CERTAIN))
    assert PROCESSOR.post_process_instance_segmentation(outputs, threshold=0.0)[0]["segments_info"] == []


def test_run_lengths_are_those_of_coco():
    # Hugging Face: [1, 1, 4, 4, 9, 8] for the background and [2, 2, 8, 1]
    masks = torch.full((1, 1, 4, 4), -CERTAIN)
    masks[0, 0, [0, 0, 1], [1, 2, 3]] = CERTAIN
    outputs = outputs_of(class_logits((0.9,)), masks)
    (result,) = PROCESSOR.post_process_instance_segmentation(outputs, return_coco_annotation=True)
    (annotation,) = result["segmentation"]
    expected = pycocotools.mask.frPyObjects({"size": [4, 4], "counts": [4, 1, 3, 1, 4, 1, 2]}, 4, 4)
    assert annotation == {"size": [4, 4], "counts": expected["counts"].decode()}
    assert json.loads(json.dumps(result)) == result
    np.testing.assert_array_equal(pycocotools.mask.decode(annotation), masks[0, 0] > 0)
    with pytest.raises(ValueError, match="exclude each other"):
        PROCESSOR.post_process_instance_segmentation(outputs, return_coco_annotation=True, return_binary_maps=True)


def slow_instances(classes, masks, threshold, mask_threshold):
    """Masks and ``(label, score)`` from the definition: best pairs, mean probability inside, descending scores."""
    probability = classes.softmax(-1)[:, :-1]
    pairs = sorted(
        ((probability[q, k].item(), q, k) for q in range(probability.shape[0]) for k in range(probability.shape[1])),
        reverse=True,
    )[: len(classes)]
    found = []
    for p, q, k in pairs:
        inside = masks[q].sigmoid() > mask_threshold
        if inside.any():
            score = p * (masks[q].sigmoid()[inside].sum() / (inside.sum() + 1e-6)).item()
            if score >= threshold:
                found.append((score, k, inside))
    return sorted(found, key=lambda one: -one[0])


@pytest.mark.parametrize("mask_threshold", [0.3, 0.5, 0.7])
def test_instances_by_definition(mask_threshold):
    outputs = random_outputs()
    target = (21, 18)
    dense = F.interpolate(outputs["pred_masks"].double(), size=target, mode="bilinear", align_corners=False)
    outputs = outputs_of(outputs["pred_logits"].double(), outputs["pred_masks"].double())
    options = {"threshold": 0.2, "mask_threshold": mask_threshold, "target_sizes": [target] * 2}
    results = PROCESSOR.post_process_instance_segmentation(outputs, **options, return_binary_maps=True)
    maps = PROCESSOR.post_process_instance_segmentation(outputs, **options, overlap_mask_area_threshold=0.4)
    for result, ids, classes, masks in zip(results, maps, outputs.class_queries_logits, dense):
        expected = slow_instances(classes, masks, 0.2, mask_threshold)
        assert len(expected) > 1
        assert torch.equal(result["segmentation"], torch.stack([mask for *_, mask in expected]))
        assert [s["label_id"] for s in result["segments_info"]] == [k for _, k, _ in expected]
        np.testing.assert_allclose([s["score"] for s in result["segments_info"]], [s for s, *_ in expected], atol=1e-6)

        free, painted, labels = torch.ones(target, dtype=torch.bool), torch.full(target, -1), []
        for _, k, mask in expected:
            visible = mask & free
            if visible.any() and visible.sum() >= 0.4 * mask.sum():
                painted[visible], free = len(labels), free & ~mask
                labels.append(k)
        assert torch.equal(ids["segmentation"], painted.int())
        assert [s["label_id"] for s in ids["segments_info"]] == labels
        assert [s["id"] for s in ids["segments_info"]] == list(range(len(labels)))


def slow_panoptic(classes, masks, threshold, mask_threshold, overlap, fuse):
    """Map and ``(id, label, score)`` from the definition."""
    scores, labels = classes.softmax(-1).max(-1)
    kept = [q for q in range(len(classes)) if labels[q] < classes.shape[1] - 1 and scores[q] > threshold]
    probability = masks.sigmoid()
    best = torch.stack([scores[q] * probability[q] for q in kept]).argmax(0)
    ids, segments = torch.zeros(masks.shape[1:], dtype=torch.int32), []
    for k, q in enumerate(kept):
        own = probability[q] >= mask_threshold
        pixels = (best == k) & own
        if not pixels.any() or (best == k).sum() / own.sum() < overlap:
            continue
        label, score = labels[q].item(), scores[q].item()
        earlier = [s for s in segments if s["label_id"] == label and label in fuse]
        if earlier:
            earlier[0]["score"] = max(earlier[0]["score"], score)
        else:
            segments.append({"id": len(segments) + 1, "label_id": label, "was_fused": label in fuse, "score": score})
        ids[pixels] = earlier[0]["id"] if earlier else len(segments)
    return ids, segments


@pytest.mark.parametrize("mask_threshold", [0.2, 0.5, 0.8])
def test_panoptic_by_definition(mask_threshold):
    outputs = random_outputs(queries=12, classes=3)
    outputs = outputs_of(outputs["pred_logits"].double(), outputs["pred_masks"].double())
    target = (21, 18)
    dense = F.interpolate(outputs.masks_queries_logits, size=target, mode="bilinear", align_corners=False)
    results = PROCESSOR.post_process_panoptic_segmentation(outputs, 0.3, mask_threshold, 0.25, {0, 1}, [target] * 2)
    for result, classes, masks in zip(results, outputs.class_queries_logits, dense):
        ids, segments = slow_panoptic(classes, masks, 0.3, mask_threshold, 0.25, {0, 1})
        assert len(segments) > 1 and (ids == 0).any()
        assert torch.equal(result["segmentation"], ids)
        for found, expected in zip(result["segments_info"], segments):
            assert found == {**expected, "score": pytest.approx(expected["score"], abs=1e-6)}
        assert len(result["segments_info"]) == len(segments)
