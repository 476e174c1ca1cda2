"""Training mappers: against obvious step-by-step references under one seed, and on difficult input."""

import copy
import random

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from PIL import Image
from pycocotools import mask as mask_util

from mask2former_plugin.data.mappers import MAPPERS, build_mapper

SEMANTIC, PANOPTIC, INSTANCE = "mask_former_semantic", "mask_former_panoptic", "mask_former_instance"
LSJ_INSTANCE, LSJ_PANOPTIC, DETR = "coco_instance_lsj", "coco_panoptic_lsj", "detr_panoptic"


def seed(value):
    random.seed(value)
    np.random.seed(value)


def build(cfg, name):
    cfg.INPUT.DATASET_MAPPER_NAME = name
    return build_mapper(cfg)


def sample_for(scene, name):
    return {
        SEMANTIC: scene.semantic,
        PANOPTIC: scene.panoptic,
        INSTANCE: scene.instances,
        LSJ_INSTANCE: scene.instances,
        LSJ_PANOPTIC: scene.panoptic,
        DETR: scene.panoptic,
    }[name]()


def no_augmentation(cfg):
    """Augmentations that change nothing but, maybe, flip."""
    cfg.INPUT.MIN_SIZE_TRAIN = (40,)
    cfg.INPUT.MAX_SIZE_TRAIN = 56
    return cfg


def is_flipped(result, scene):
    image = result["image"][:, : scene.height, : scene.width].numpy().transpose(1, 2, 0)
    if np.array_equal(image, scene.image):
        return False
    assert np.array_equal(image, scene.image[:, ::-1])
    return True


def flip_if(mask, flipped):
    return mask[:, ::-1] if flipped else mask


# ------------------------------------------------------------------------------------------------------- choice by name


def test_every_published_name_builds_its_class(cfg):
    published = {
        SEMANTIC: "MaskFormerSemanticDatasetMapper",
        PANOPTIC: "MaskFormerPanopticDatasetMapper",
        INSTANCE: "MaskFormerInstanceDatasetMapper",
        LSJ_INSTANCE: "COCOInstanceNewBaselineDatasetMapper",
        LSJ_PANOPTIC: "COCOPanopticNewBaselineDatasetMapper",
        DETR: "DETRPanopticDatasetMapper",
    }
    assert {name: type(build(cfg, name)).__name__ for name in MAPPERS} == published


def test_unknown_name_lists_the_nearest_first(cfg):
    with pytest.raises(
        ValueError, match="Did you mean 'mask_former_panoptic'.*Known: mask_former_panoptic, .*detr_panoptic"
    ):
        build(cfg, "maskformer_panoptic")


def test_evaluation_is_refused(cfg):
    with pytest.raises(ValueError, match="is for training.*DatasetMapper"):
        MAPPERS[LSJ_PANOPTIC](cfg, False)


# ------------------------------------------------------------------------------------- results of the same random draws


@pytest.mark.parametrize("size_divisibility", [-1, 120])
@pytest.mark.parametrize("crop", [False, True])
def test_semantic_equals_reference(cfg, scene, crop, size_divisibility):
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = crop, "absolute", (30, 36)
    cfg.INPUT.SIZE_DIVISIBILITY = size_divisibility
    mapper = build(cfg, SEMANTIC)
    for value in range(4):
        seed(value)
        result = mapper(scene.semantic())

        seed(value)
        short = np.random.choice((48, 60))
        height, width = T.ResizeShortestEdge.get_output_shape(scene.height, scene.width, short, 100)
        image = np.asarray(Image.fromarray(scene.image).resize((width, height), Image.BILINEAR))
        labels = (
            torch.nn.functional.interpolate(
                torch.from_numpy(scene.labels)[None, None].double(), (height, width), mode="nearest"
            )[0, 0]
            .long()
            .numpy()
        )
        if crop:
            y, x = np.random.randint(height - 30 + 1), np.random.randint(width - 36 + 1)
            image, labels = image[y : y + 30, x : x + 36], labels[y : y + 30, x : x + 36]
        if np.random.uniform() < 0.5:
            image, labels = image[:, ::-1], labels[:, ::-1]
        side = max(size_divisibility, 0)
        below, right = max(side - image.shape[0], 0), max(side - image.shape[1], 0)
        image = np.pad(image, ((0, below), (0, right), (0, 0)), constant_values=128)
        labels = np.pad(labels, ((0, below), (0, right)), constant_values=255)

        assert result["image"].dtype == torch.uint8 and result["sem_seg"].dtype == torch.int64
        np.testing.assert_array_equal(result["image"].numpy(), image.transpose(2, 0, 1))
        np.testing.assert_array_equal(result["sem_seg"].numpy(), labels)
        classes = [c for c in np.unique(labels) if c != 255]
        instances = result["instances"]
        assert instances.gt_classes.tolist() == classes
        assert instances.gt_masks.dtype == torch.bool and instances.image_size == labels.shape
        np.testing.assert_array_equal(instances.gt_masks.numpy(), np.stack([labels == c for c in classes]))


@pytest.mark.parametrize("name", [LSJ_PANOPTIC, LSJ_INSTANCE])
def test_large_scale_jitter_equals_reference(cfg, scene, name):
    mapper = build(cfg, name)
    polygons = [a["segmentation"][0] for a in scene.instances()["annotations"] if not a["iscrowd"]]
    for value in range(6):
        seed(value)
        result = mapper(sample_for(scene, name))

        seed(value)
        flip = np.random.uniform() < 0.5
        scale = np.random.uniform(0.1, 2.0)
        factor = min(scale * 64 / scene.height, scale * 64 / scene.width)
        height, width = (int(round(side * factor)) for side in (scene.height, scene.width))
        offset = np.random.uniform()
        top, left = (int(round(max(side - 64, 0) * offset)) for side in (height, width))
        image = np.asarray(Image.fromarray(flip_if(scene.image, flip)).resize((width, height), Image.BILINEAR))
        image = image[top : top + 64, left : left + 64]
        valid = image.shape[:2]
        expected = np.full((64, 64, 3), 128, dtype=np.uint8)
        expected[: valid[0], : valid[1]] = image
        np.testing.assert_array_equal(result["image"].numpy(), expected.transpose(2, 0, 1))

        instances = result["instances"]
        if name == LSJ_INSTANCE:
            padded = np.ones((64, 64), dtype=bool)
            padded[: valid[0], : valid[1]] = False
            np.testing.assert_array_equal(result["padding_mask"].numpy(), padded)
            masks, boxes = [], []
            for polygon in polygons:
                points = np.array(polygon, dtype=float).reshape(-1, 2)
                if flip:
                    points[:, 0] = scene.width - points[:, 0]
                points *= (width / scene.width, height / scene.height)
                points -= (left, top)
                points = points.clip(0, 64)  # the regions are axis-aligned: clipping is intersecting
                if np.ptp(points, axis=0).min() > 1e-5:
                    boxes.append([*points.min(0), *points.max(0)])
                    masks.append(
                        mask_util.decode(mask_util.merge(mask_util.frPyObjects([points.ravel().tolist()], 64, 64)))
                    )
            np.testing.assert_allclose(instances.gt_boxes.tensor.numpy(), np.reshape(boxes, (-1, 4)), atol=1e-4)
            np.testing.assert_array_equal(instances.gt_masks.numpy(), np.reshape(masks, (-1, 64, 64)))
        else:
            for mask, got, box in zip(scene.masks(), instances.gt_masks.numpy(), instances.gt_boxes.tensor.tolist()):
                small = (
                    Image.fromarray(np.ascontiguousarray(flip_if(mask, flip)))
                    .convert("L")
                    .resize((width, height), Image.NEAREST)
                )
                want = np.zeros((64, 64), dtype=bool)
                want[: valid[0], : valid[1]] = (np.asarray(small) > 0)[top : top + 64, left : left + 64]
                np.testing.assert_array_equal(got, want)
                ys, xs = np.nonzero(want)
                assert box == ([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else [0, 0, 0, 0])
            assert instances.gt_classes.tolist() == [1, 3, 1]


def test_detr_crops_when_the_draw_is_at_most_one_half(cfg, scene):
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute_range", (384, 600)
    mapper = build(cfg, DETR)
    mapper.tfm_gens, mapper.crop_gen = ["flip", "resize"], ["small", "crop"]
    for value in range(8):
        seed(value)
        expected = ["flip", "resize"] if np.random.rand() > 0.5 else ["flip", "small", "crop", "resize"]
        seed(value)
        assert mapper._draw_list() == expected


# -------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("name", [PANOPTIC, LSJ_PANOPTIC, DETR])
def test_panoptic_targets_are_the_segments_without_crowds(cfg, scene, name):
    no_augmentation(cfg)
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 56 / 64
    result = build(cfg, name)(scene.panoptic())
    flipped = is_flipped(result, scene)
    instances = result["instances"]
    assert instances.gt_classes.tolist() == [1, 3, 1] and instances.gt_classes.dtype == torch.int64
    expected = np.stack([flip_if(mask, flipped) for mask in scene.masks()])
    np.testing.assert_array_equal(instances.gt_masks.numpy()[:, : scene.height, : scene.width], expected)
    assert instances.gt_masks.sum() == expected.sum()
    assert result["segments_info"] == scene.segments and "pan_seg_file_name" not in result
    assert instances.has("gt_boxes") == (name == LSJ_PANOPTIC)


def test_panoptic_gives_semantic_labels_too_if_there_are_any(cfg, scene):
    no_augmentation(cfg)
    cfg.INPUT.SIZE_DIVISIBILITY = 60
    result = build(cfg, PANOPTIC)(scene.panoptic())
    expected = np.full((60, 60), 255)
    expected[: scene.height, : scene.width] = flip_if(scene.labels, is_flipped(result, scene))
    np.testing.assert_array_equal(result["sem_seg"].numpy(), expected)
    assert result["instances"].gt_masks.shape == (3, 60, 60)
    assert "sem_seg" not in build(cfg, PANOPTIC)(scene.panoptic(semantic=False))


def test_category_limited_crop_needs_semantic_labels(cfg, scene):
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", (16, 16)
    assert len(build(cfg, PANOPTIC)(scene.panoptic(semantic=False))["instances"]) == 3
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 0.5
    assert len(build(cfg, PANOPTIC)(scene.panoptic())["instances"]) == 3
    with pytest.raises(ValueError, match="image.png has no 'sem_seg_file_name', .*SINGLE_CATEGORY_MAX_AREA"):
        build(cfg, PANOPTIC)(scene.panoptic(semantic=False))


@pytest.mark.parametrize("kind", ["polygon", "rle", "uncompressed"])
@pytest.mark.parametrize("name", [INSTANCE, LSJ_INSTANCE])
def test_polygons_and_rle_give_the_same(cfg, scene, name, kind):
    no_augmentation(cfg)
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 56 / 64
    result = build(cfg, name)(scene.instances(kind))
    flipped = is_flipped(result, scene)
    instances = result["instances"]
    assert instances.gt_classes.tolist() == [1, 3, 1] and instances.gt_masks.dtype == torch.bool
    expected = np.stack([flip_if(mask, flipped) for mask in scene.masks()])
    np.testing.assert_array_equal(instances.gt_masks.numpy()[:, : scene.height, : scene.width], expected)
    if name == LSJ_INSTANCE:
        regions = [r[:4] for r in scene.regions if not r[5]]
        boxes = [(56 - x1, y0, 56 - x0, y1) if flipped else (x0, y0, x1, y1) for y0, y1, x0, x1 in regions]
        np.testing.assert_array_equal(instances.gt_boxes.tensor.numpy(), boxes)
    else:
        assert not instances.has("gt_boxes")


@pytest.mark.parametrize("name", [INSTANCE, LSJ_INSTANCE])
def test_mixed_kinds_and_scaled_integer_polygons(cfg, scene, name):
    """Both kinds in one image; integer coordinates keep their fractions after scaling."""
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (60,), 84  # 1.5
    cfg.INPUT.IMAGE_SIZE, cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE = 84, 1.0, 1.0
    sample = scene.instances("polygon")
    sample["annotations"][1] = scene.instances("rle")["annotations"][1]
    result = build(cfg, name)(sample)
    masks = result["instances"].gt_masks
    areas = [mask.sum() * 1.5**2 for mask in scene.masks()]
    np.testing.assert_allclose(masks.flatten(1).sum(1).numpy(), areas, rtol=0.04)
    if name == LSJ_INSTANCE:
        assert 1.5 * (25 - 3) in result["instances"].gt_boxes.tensor[:, 2].sub(
            result["instances"].gt_boxes.tensor[:, 0]
        )


@pytest.mark.parametrize("name", list(MAPPERS))
def test_input_dict_stays_unchanged(cfg, scene, name):
    sample = sample_for(scene, name)
    before = copy.deepcopy(sample)
    result = build(cfg, name)(sample)
    assert str(sample) == str(before)
    assert result["image_id"] == 3 and result["height"] == scene.height
    assert not {"annotations", "sem_seg_file_name", "pan_seg_file_name"} & set(result) or name in (LSJ_PANOPTIC, DETR)


# ------------------------------------------------------------------------------------------------------- empty and lost


@pytest.mark.parametrize("annotations", ["none", "crowds"])
@pytest.mark.parametrize("name", [INSTANCE, LSJ_INSTANCE])
def test_image_without_objects(cfg, scene, name, annotations):
    sample = scene.instances()
    sample["annotations"] = [] if annotations == "none" else [dict(a, iscrowd=1) for a in sample["annotations"]]
    instances = build(cfg, name)(sample)["instances"]
    assert len(instances) == 0 and instances.gt_classes.dtype == torch.int64
    assert instances.gt_masks.dtype == torch.bool and instances.gt_masks.shape == (0, *instances.image_size)


def test_image_without_segments_or_labels(cfg, scene):
    sample = {**scene.panoptic(), "segments_info": []}
    for name in (PANOPTIC, LSJ_PANOPTIC, DETR):
        instances = build(cfg, name)(sample)["instances"]
        assert len(instances) == 0 and instances.gt_masks.shape == (0, *instances.image_size)
    result = build(cfg, SEMANTIC)(scene.semantic(np.full_like(scene.labels, 255)))
    assert len(result["instances"]) == 0 and result["instances"].gt_masks.dtype == torch.bool


@pytest.mark.parametrize("name", [PANOPTIC, INSTANCE, LSJ_PANOPTIC])
def test_targets_emptied_by_a_crop(cfg, scene, name):
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", (16, 16)
    cfg.INPUT.IMAGE_SIZE = 16
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 4.0
    mapper = build(cfg, name)
    cfg.INPUT.DROP_EMPTY_MASKS = True
    dropping = build(cfg, name)
    emptied = 0
    for value in range(6):
        seed(value)
        kept = mapper(sample_for(scene, name))["instances"]
        seed(value)
        dropped = dropping(sample_for(scene, name))["instances"]
        assert kept.gt_classes.tolist() == [1, 3, 1]  # published: empty masks stay
        full = kept.gt_masks.flatten(1).any(1)
        assert torch.equal(dropped.gt_masks, kept.gt_masks[full]) and torch.equal(
            dropped.gt_classes, kept.gt_classes[full]
        )
        emptied += int((~full).sum())
    assert emptied > 0


@pytest.mark.parametrize("kind", ["polygon", "rle"])
def test_lsj_instance_drops_what_the_crop_has_removed(cfg, scene, kind):
    cfg.INPUT.IMAGE_SIZE, cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE = 16, 4.0, 4.0
    mapper = build(cfg, LSJ_INSTANCE)
    counts = []
    for value in range(6):
        seed(value)
        instances = mapper(scene.instances(kind))["instances"]
        assert instances.gt_boxes.nonempty().all() and len(instances.gt_boxes) == len(instances.gt_masks)
        counts.append(len(instances))
    assert min(counts) < 3


# ---------------------------------------------------------------------------------------------------- labels and errors


def test_sixteen_bit_labels(cfg, scene):
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 847
    from detectron2.data import MetadataCatalog

    MetadataCatalog.get("mapper_test_16").set(ignore_label=65535)
    cfg.DATASETS.TRAIN = ("mapper_test_16",)
    no_augmentation(cfg)
    labels = np.where(scene.labels == 255, 65535, scene.labels.astype(np.uint16) + 800).astype(np.uint16)
    for name in ("labels16.png", "labels16.tif"):
        result = build(cfg, SEMANTIC)(scene.semantic(labels, name))
        assert result["instances"].gt_classes.tolist() == [801, 803, 805]
        np.testing.assert_array_equal(result["sem_seg"].numpy(), flip_if(labels, is_flipped(result, scene)))


def test_palette_labels_are_indices(cfg, scene):
    no_augmentation(cfg)
    image = Image.fromarray(scene.labels, mode=None).convert("P")
    image.putdata(scene.labels.ravel().tolist())
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    path = scene.folder / "palette.png"
    image.save(path)
    result = build(cfg, SEMANTIC)({**scene.base(), "sem_seg_file_name": str(path)})
    assert result["instances"].gt_classes.tolist() == [1, 3, 5]


def test_label_outside_the_classes(cfg, scene):
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 4
    with pytest.raises(
        ValueError, match=r"labels\.png contains class id 5, but there are 4 classes .*ignore label is 255"
    ):
        build(cfg, SEMANTIC)(scene.semantic())
    for name in (LSJ_PANOPTIC, LSJ_INSTANCE, INSTANCE, DETR):
        sample = sample_for(scene, name)
        if "annotations" in sample:
            sample["annotations"][0]["category_id"] = 4
        else:
            sample["segments_info"] = [{**s, "category_id": 4} for s in sample["segments_info"]]
        with pytest.raises(ValueError, match=r"image\.png contains class id 4, but there are 4 classes"):
            build(cfg, name)(sample)


def test_sizes_that_differ_from_the_image(cfg, scene):
    small = scene.labels[:30, :50]
    with pytest.raises(ValueError, match=r"Label file .*labels\.png is 50x30 .*image\.png is 56x40"):
        build(cfg, SEMANTIC)(scene.semantic(small))
    sample = scene.panoptic()
    Image.fromarray(np.zeros((30, 50, 3), dtype=np.uint8)).save(sample["pan_seg_file_name"])
    for name in (PANOPTIC, LSJ_PANOPTIC, DETR):
        with pytest.raises(ValueError, match=r"Panoptic file .*panoptic\.png is 50x30 .*image\.png is 56x40"):
            build(cfg, name)(sample)
    sample = scene.instances("rle")
    sample["annotations"][0]["segmentation"] = mask_util.encode(np.asfortranarray(np.ones((30, 50), dtype=np.uint8)))
    for name in (INSTANCE, LSJ_INSTANCE):
        with pytest.raises(ValueError, match=r"RLE mask of .*image\.png is 50x30"):
            build(cfg, name)(sample)


def test_files_that_do_not_open(cfg, scene):
    sample = {**scene.semantic(), "file_name": str(scene.folder / "absent.png")}
    with pytest.raises(FileNotFoundError, match=r"absent\.png does not exist"):
        build(cfg, SEMANTIC)(sample)
    broken = scene.folder / "broken.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be read as an image"):
        build(cfg, SEMANTIC)({**sample, "file_name": str(broken)})
    cut = scene.folder / "cut.png"
    cut.write_bytes(open(scene.file_name, "rb").read()[:900])
    with pytest.raises(ValueError, match=r"cut\.png cannot be read as an image"):
        build(cfg, SEMANTIC)({**sample, "file_name": str(cut)})


def test_coloured_labels_are_refused(cfg, scene):
    with pytest.raises(ValueError, match=r"colour\.png has 3 channels; needed is one channel"):
        build(cfg, SEMANTIC)(scene.semantic(scene.image, "colour.png"))


@pytest.mark.parametrize(
    ("name", "field"),
    [(SEMANTIC, "sem_seg_file_name"), (PANOPTIC, "pan_seg_file_name"), (LSJ_PANOPTIC, "pan_seg_file_name")]
    + [(DETR, "pan_seg_file_name"), (INSTANCE, "annotations"), (LSJ_INSTANCE, "annotations")],
)
def test_dataset_of_another_task(cfg, scene, name, field):
    with pytest.raises(ValueError, match=f"image.png: .*Mapper needs '{field}'.*INPUT.DATASET_MAPPER_NAME"):
        build(cfg, name)(scene.base())


def test_annotation_without_segmentation(cfg, scene):
    sample = scene.instances()
    del sample["annotations"][1]["segmentation"]
    for name in (INSTANCE, LSJ_INSTANCE):
        with pytest.raises(ValueError, match=r"image\.png \(category_id 3\) has no segmentation"):
            build(cfg, name)(sample)


@pytest.mark.parametrize("name", [SEMANTIC, PANOPTIC, INSTANCE])
def test_image_larger_than_the_square_is_not_cropped_silently(cfg, scene, name):
    cfg.INPUT.SIZE_DIVISIBILITY = 50
    with pytest.raises(
        ValueError, match=r"image\.png is \d+x\d+ after the augmentations.*raise INPUT.SIZE_DIVISIBILITY"
    ):
        build(cfg, name)(sample_for(scene, name))


def test_ignore_label_of_the_datasets(cfg):
    from detectron2.data import MetadataCatalog

    MetadataCatalog.get("mapper_test_other").set(ignore_label=0)
    cfg.DATASETS.TRAIN = ("mapper_test", "mapper_test_other")
    with pytest.raises(ValueError, match="different ignore labels"):
        build(cfg, SEMANTIC)
    cfg.DATASETS.TRAIN = ("mapper_test_without",)
    with pytest.raises(ValueError, match="'mapper_test_without' has no 'ignore_label'"):
        build(cfg, SEMANTIC)
