"""Reading images, transforming annotations, and the default mapper."""

import copy
import sys

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image

from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode, PolygonMasks


def _photo(h=6, w=9, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (h, w, 3)).astype(np.uint8)


# ---- reading


def test_formats(tmp_path):
    rgb = _photo()
    path = str(tmp_path / "a.png")
    Image.fromarray(rgb).save(path)
    np.testing.assert_array_equal(utils.read_image(path, "RGB"), rgb)
    np.testing.assert_array_equal(utils.read_image(path, "BGR"), rgb[:, :, ::-1])
    grey = utils.read_image(path, "L")
    assert grey.shape == (6, 9, 1)
    assert np.abs(grey[:, :, 0] - rgb @ [0.299, 0.587, 0.114]).max() <= 1
    yuv = utils.read_image(path, "YUV-BT.601")
    np.testing.assert_allclose(yuv[:, :, 0], rgb / 255.0 @ [0.299, 0.587, 0.114], atol=1e-9)
    np.testing.assert_allclose(yuv[:, :, 1], 0.492 * (rgb[:, :, 2] / 255 - yuv[:, :, 0]), atol=1e-3)
    back = utils.convert_image_to_rgb(yuv, "YUV-BT.601")
    assert np.abs(back.astype(float) - rgb).max() <= 1
    np.testing.assert_array_equal(utils.convert_image_to_rgb(torch.tensor(rgb[:, :, ::-1].copy()), "BGR"), rgb)
    np.testing.assert_array_equal(utils.convert_image_to_rgb(grey, "L"), np.repeat(grey, 3, axis=2))


@pytest.mark.embedded_only
@pytest.mark.parametrize("format", [None, "RGB", "BGR", "L"])
def test_arrays_can_be_written(tmp_path, format):
    path = str(tmp_path / "a.png")
    Image.fromarray(_photo()).save(path)
    assert utils.read_image(path, format).flags.writeable


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:, :16, 0] = 255
    upright[8:, :, 1] = 255
    # how a camera held like that stores the picture (EXIF 2.3, tag Orientation)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / "a.jpg")
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, quality=100, subsampling=0)
    got = utils.read_image(path, "RGB")
    assert got.shape == upright.shape
    assert np.abs(got.astype(int) - upright).max() < 12


@pytest.mark.embedded_only
@pytest.mark.parametrize("extension", ["png", "tif"])
def test_16_bit_labels_stay_exact(tmp_path, extension):
    labels = np.array([[0, 1, 255], [256, 300, 65535]], np.uint16)
    path = str(tmp_path / f"a.{extension}")
    Image.fromarray(labels).save(path)
    for got in (utils.read_image(path), utils.read_image(path, "L")[:, :, 0], utils.read_label_map(path)):
        np.testing.assert_array_equal(got, labels)
    # as a picture: the upper 8 bits
    np.testing.assert_array_equal(utils.read_image(path, "RGB")[:, :, 1], [[0, 0, 0], [1, 1, 255]])


@pytest.mark.embedded_only
def test_label_maps(tmp_path):
    indices = np.array([[0, 1, 2], [3, 0, 1]], np.uint8)
    palette = Image.new("P", (3, 2))
    palette.putdata(indices.ravel().tolist())
    palette.putpalette(list(range(255, 255 - 12, -1)))
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(utils.read_label_map(str(tmp_path / "palette.png")), indices)
    Image.fromarray(_photo()).save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match="rgb.png.*RGB"):
        utils.read_label_map(str(tmp_path / "rgb.png"))


@pytest.mark.embedded_only
def test_unreadable_images_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.jpg"):
        utils.read_image(str(tmp_path / "missing.jpg"))
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(OSError, match="text.jpg.*can't be opened"):
        utils.read_image(str(tmp_path / "text.jpg"))
    Image.fromarray(_photo(64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(OSError, match="cut.png.*can't be opened"):
        utils.read_image(str(tmp_path / "cut.png"))
    with pytest.raises(ValueError, match="'HWC'"):
        utils.read_image(str(tmp_path / "whole.png"), "HWC")


def test_image_size():
    d = {"file_name": "a.jpg"}
    utils.check_image_size(d, np.zeros((3, 5, 3)))
    assert d == {"file_name": "a.jpg", "height": 3, "width": 5}
    with pytest.raises(utils.SizeMismatchError, match="a.jpg"):
        utils.check_image_size({"file_name": "a.jpg", "height": 4, "width": 5}, np.zeros((3, 5, 3)))


@pytest.mark.embedded_only
def test_image_size_message():
    with pytest.raises(utils.SizeMismatchError, match="a.jpg is 5x3.*for 3x5.*EXIF"):
        utils.check_image_size({"file_name": "a.jpg", "height": 5, "width": 3}, np.zeros((3, 5, 3)))


# ---- annotations


def _polygon_mask(polygons, size):
    rles = mask_util.frPyObjects([np.asarray(p, float).tolist() for p in polygons], *size)
    return mask_util.decode(mask_util.merge(rles)).astype(bool)


def _annotations():
    polygons = [[2.0, 2, 30, 4, 28, 20, 3, 18], [32.0, 10, 38, 10, 38, 25]]
    mask = np.zeros((30, 40), np.uint8, order="F")
    mask[5:25, 10:35] = 1
    return [
        {"bbox": [2, 2, 36, 23], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 3, "segmentation": polygons},
        {
            "bbox": [10.0, 5, 35, 25],
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": 1,
            "segmentation": mask_util.encode(mask),
        },
    ]


@pytest.mark.parametrize("size", [(30, 40), (60, 100)])
def test_boxes_and_masks_follow_the_image(size):
    transforms = T.TransformList([T.ResizeTransform(30, 40, *size), T.HFlipTransform(size[1])])
    annotations = _annotations()
    for a in annotations:
        a["bbox"] = [float(x) for x in a["bbox"]]
    out = [utils.transform_instance_annotations(copy.deepcopy(a), transforms, size) for a in annotations]
    sx, sy = size[1] / 40, size[0] / 30
    np.testing.assert_allclose(out[0]["bbox"], [size[1] - 38 * sx, 2 * sy, size[1] - 2 * sx, 25 * sy])
    assert out[0]["bbox_mode"] == BoxMode.XYXY_ABS
    for got, polygon in zip(out[0]["segmentation"], annotations[0]["segmentation"]):
        points = np.array(polygon).reshape(-1, 2) * [sx, sy]
        points[:, 0] = size[1] - points[:, 0]
        np.testing.assert_allclose(got, points.ravel())
    decoded = mask_util.decode(annotations[1]["segmentation"])
    expected = np.asarray(Image.fromarray(decoded).resize(size[::-1], Image.NEAREST))[:, ::-1]
    np.testing.assert_array_equal(out[1]["segmentation"], expected)

    instances = utils.annotations_to_instances(out, size, "bitmask")
    assert instances.gt_classes.tolist() == [3, 1]
    assert instances.gt_boxes.tensor.dtype == torch.float32
    assert isinstance(instances.gt_masks, BitMasks)
    np.testing.assert_array_equal(instances.gt_masks.tensor[0], _polygon_mask(out[0]["segmentation"], size))
    np.testing.assert_array_equal(instances.gt_masks.tensor[1], expected)
    polygons = utils.annotations_to_instances(out[:1], size, "polygon").gt_masks
    assert isinstance(polygons, PolygonMasks) and len(polygons.polygons[0]) == 2


@pytest.mark.embedded_only
def test_integer_boxes_keep_their_fractions():
    box = {"bbox": [1, 1, 2, 2], "bbox_mode": BoxMode.XYXY_ABS}
    got = utils.transform_instance_annotations(box, T.ResizeTransform(4, 4, 6, 6), (6, 6))
    np.testing.assert_allclose(got["bbox"], [1.5, 1.5, 3, 3])


def test_boxes_are_clipped():
    box = {"bbox": [10.0, 5, 35, 25], "bbox_mode": BoxMode.XYXY_ABS}
    got = utils.transform_instance_annotations(box, T.TransformList([T.CropTransform(20, 10, 10, 10)]), (10, 10))
    np.testing.assert_allclose(got["bbox"], [0, 0, 10, 10])


def test_polygons_are_cropped_like_masks():
    pytest.importorskip("shapely")
    crop = T.CropTransform(10, 6, 20, 16)
    a = utils.transform_instance_annotations(_annotations()[0], T.TransformList([crop]), (16, 20))
    expected = _polygon_mask(_annotations()[0]["segmentation"], (30, 40))[6:22, 10:30]
    got = _polygon_mask(a["segmentation"], (16, 20))
    assert (got != expected).mean() < 0.03


@pytest.mark.embedded_only
def test_cropping_polygons_without_shapely(monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "shapely"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "shapely", None)
    monkeypatch.setitem(sys.modules, "shapely.geometry", None)
    with pytest.raises(ImportError, match="pip install shapely"):
        utils.transform_instance_annotations(_annotations()[0], T.CropTransform(10, 6, 20, 16), (16, 20))


@pytest.mark.embedded_only
def test_uncompressed_rle():
    annotation = {
        "bbox": [0.0, 0, 2, 2],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": 0,
        "segmentation": {"size": [2, 3], "counts": [1, 3, 2]},
    }
    instances = utils.annotations_to_instances([annotation], (2, 3), "bitmask")
    assert instances.gt_masks.tensor[0].tolist() == [[False, True, False], [True, True, False]]


@pytest.mark.embedded_only
def test_masks_that_do_not_fit():
    box = {"bbox": [0.0, 0, 2, 2], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    with pytest.raises(ValueError, match="bitmask"):
        utils.annotations_to_instances([{**box, "segmentation": np.ones((2, 2))}], (2, 2), "polygon")
    with pytest.raises(ValueError, match="list of"):
        utils.transform_instance_annotations({**box, "segmentation": "rle"}, T.NoOpTransform(), (2, 2))
    with pytest.raises(ValueError, match=r"\[30, 40\]"):
        utils.transform_instance_annotations(_annotations()[1], T.NoOpTransform(), (30, 41))
    with pytest.raises(NotImplementedError, match="keypoints"):
        utils.transform_instance_annotations({**box, "keypoints": []}, T.NoOpTransform(), (2, 2))


def test_empty_instances_are_dropped():
    mask = np.zeros((4, 4), np.uint8)
    full = np.ones((4, 4), np.uint8)
    annotations = [
        {"bbox": b, "bbox_mode": BoxMode.XYXY_ABS, "category_id": i, "segmentation": m}
        for i, (b, m) in enumerate([([0.0, 0, 4, 4], full), ([1.0, 1, 1, 3], full), ([0.0, 0, 4, 4], mask)])
    ]
    instances = utils.annotations_to_instances(annotations, (4, 4), "bitmask")
    assert utils.filter_empty_instances(instances).gt_classes.tolist() == [0]
    assert utils.filter_empty_instances(instances, by_mask=False).gt_classes.tolist() == [0, 2]
    kept, mask = utils.filter_empty_instances(instances, by_box=False, return_mask=True)
    assert kept.gt_classes.tolist() == [0, 1] and mask.tolist() == [True, True, False]


def test_no_annotations():
    instances = utils.annotations_to_instances([], (4, 5))
    assert len(instances) == 0 and instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.image_size == (4, 5)


def test_crop_around_an_instance():
    instance = {"bbox": [30, 10, 20, 10], "bbox_mode": BoxMode.XYWH_ABS}
    for _ in range(30):
        t = utils.gen_crop_transform_with_instance((12, 14), (40, 60), instance)
        assert t.x0 <= 40 <= t.x0 + t.w and t.y0 <= 15 <= t.y0 + t.h
        assert 0 <= t.x0 <= 60 - 14 and 0 <= t.y0 <= 40 - 12 and (t.h, t.w) == (12, 14)


# ---- the default mapper


@pytest.fixture
def record(tmp_path):
    Image.fromarray(_photo(30, 40)).save(tmp_path / "a.png")
    Image.fromarray(np.random.RandomState(1).randint(0, 5, (30, 40)).astype(np.uint8)).save(tmp_path / "label.png")
    annotations = [{**a, "iscrowd": 0} for a in _annotations()]
    annotations.append({**copy.deepcopy(annotations[0]), "iscrowd": 1, "category_id": 7})
    return {
        "file_name": str(tmp_path / "a.png"),
        "sem_seg_file_name": str(tmp_path / "label.png"),
        "image_id": 5,
        "height": 30,
        "width": 40,
        "annotations": annotations,
    }


def test_mapper_for_training(record):
    before = copy.deepcopy(record)
    mapper = DatasetMapper(
        True,
        augmentations=[T.RandomFlip(1.0)],
        image_format="BGR",
        use_instance_mask=True,
        instance_mask_format="bitmask",
    )
    out = mapper(record)
    assert record == before
    rgb = np.asarray(Image.open(record["file_name"]))
    np.testing.assert_array_equal(out["image"], rgb[:, ::-1, ::-1].transpose(2, 0, 1))
    labels = np.asarray(Image.open(record["sem_seg_file_name"]))
    assert out["sem_seg"].dtype == torch.int64
    np.testing.assert_array_equal(out["sem_seg"], labels[:, ::-1])
    assert out["instances"].gt_classes.tolist() == [3, 1]
    np.testing.assert_allclose(out["instances"].gt_boxes.tensor, [[2, 2, 38, 25], [5, 5, 30, 25]])
    decoded = mask_util.decode(record["annotations"][1]["segmentation"])
    np.testing.assert_array_equal(out["instances"].gt_masks.tensor[1], decoded[:, ::-1].astype(bool))
    assert out["image_id"] == 5 and "annotations" not in out and "sem_seg_file_name" not in out


@pytest.mark.embedded_only
def test_mapper_for_inference_reads_no_ground_truth(record):
    record["sem_seg_file_name"] = "there is no such file"
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST = 15
    out = DatasetMapper(cfg, False)(record)
    assert out["image"].shape == (3, 15, 20)
    assert (out["height"], out["width"]) == (30, 40)
    assert not {"annotations", "sem_seg_file_name", "sem_seg", "instances"} & out.keys()


def test_mapper_recomputes_boxes_after_crops(record):
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE = "absolute"
    cfg.INPUT.CROP.SIZE = [20, 25]
    cfg.INPUT.MIN_SIZE_TRAIN = (20,)
    record["annotations"] = record["annotations"][1:2]  # RLE
    record.pop("sem_seg_file_name")
    for _ in range(5):
        instances = DatasetMapper(cfg, True)(record)["instances"]
        mask = instances.gt_masks.tensor[0]
        ys, xs = torch.nonzero(mask, as_tuple=True)
        expected = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert instances.gt_boxes.tensor[0].tolist() == [float(x) for x in expected]


def test_subclasses_of_the_mapper_replace_what_is_done_with_annotations(record):
    """By the hook and the attributes that upstream's mapper has."""

    class Boxes(DatasetMapper):
        def _transform_annotations(self, dataset_dict, transforms, image_shape):
            assert not self.use_keypoint and self.keypoint_hflip_indices is None and self.proposal_topk is None
            annotations = dataset_dict.pop("annotations")
            dataset_dict["boxes"] = [
                utils.transform_instance_annotations(a, transforms, image_shape)["bbox"].tolist() for a in annotations
            ]

    out = Boxes(True, augmentations=[T.RandomFlip(1.0)], image_format="RGB")(record)
    assert out["boxes"][0] == [2, 2, 38, 25] and len(out["boxes"]) == len(record["annotations"])
    assert "instances" not in out and "annotations" not in out
    assert "boxes" not in Boxes(False, augmentations=[], image_format="RGB")(record)


@pytest.mark.embedded_only
def test_mapper_names_files_of_other_sizes(record, tmp_path):
    mapper = DatasetMapper(
        True, augmentations=[], image_format="RGB", use_instance_mask=True, instance_mask_format="bitmask"
    )
    Image.fromarray(np.zeros((30, 41), np.uint8)).save(tmp_path / "wide.png")
    with pytest.raises(utils.SizeMismatchError, match="wide.png is 41x30.*a.png is 40x30"):
        mapper({**record, "sem_seg_file_name": str(tmp_path / "wide.png")})
    record["annotations"][1]["segmentation"] = mask_util.encode(np.ones((40, 30), np.uint8, order="F"))
    with pytest.raises(utils.SizeMismatchError, match="mask of image .*a.png is 30x40.*image is 40x30"):
        mapper(record)


@pytest.mark.embedded_only
def test_mapper_keeps_16_bit_labels(record, tmp_path):
    labels = np.random.RandomState(0).randint(0, 900, (30, 40)).astype(np.uint16)
    Image.fromarray(labels).save(tmp_path / "deep.png")
    record["sem_seg_file_name"] = str(tmp_path / "deep.png")
    mapper = DatasetMapper(True, augmentations=[T.Resize((60, 80)), T.RandomFlip(1.0)], image_format="RGB")
    np.testing.assert_array_equal(mapper(record)["sem_seg"], labels.repeat(2, 0).repeat(2, 1)[:, ::-1])


@pytest.mark.embedded_only
def test_mapper_of_upstream_only_features():
    with pytest.raises(NotImplementedError, match="keypoints"):
        DatasetMapper(True, augmentations=[], image_format="RGB", use_keypoint=True)
    cfg = get_cfg()
    cfg.INPUT.RANDOM_FLIP = "sideways"
    with pytest.raises(ValueError, match="RANDOM_FLIP.*sideways"):
        DatasetMapper(cfg, True)
