"""The meta architecture: config to model, ground truth in, losses and results out."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances, PolygonMasks
from inference_reference import instances, panoptic, semantic, upsampled
from torch import nn

from mask2former_plugin.modeling.mask_logits import MaskLogits, MaskPrediction
from mask2former_plugin.modeling.meta_arch import MaskFormer
from mask2former_plugin.modeling.target_masks import RunLengthMasks

CLASSES, QUERIES = 5, 10
THINGS = {7: 0, 9: 2}
MEAN, STD = (10.0, 20.0, 30.0), (2.0, 4.0, 5.0)


class RecordingBackbone(nn.Module):
    size_divisibility = 64

    def forward(self, images):
        self.images = images
        return {"x": images}


class FixedHead(nn.Module):
    """Gives the same predictions whatever comes in."""

    num_classes = CLASSES

    def __init__(self, prediction):
        super().__init__()
        self.prediction = prediction

    def forward(self, features):
        return self.prediction


def random_prediction(batch, size):
    return MaskPrediction(
        pred_logits=torch.randn(batch, QUERIES, CLASSES + 1) * 2,
        mask_logits=MaskLogits(torch.randn(batch, QUERIES, 6), torch.randn(batch, 6, size[0] // 4, size[1] // 4)),
        aux_outputs=[],
    )


def make_model(prediction, **options):
    arguments = {
        "backbone": RecordingBackbone(),
        "sem_seg_head": FixedHead(prediction),
        "criterion": nn.Identity(),
        "num_queries": QUERIES,
        "object_mask_threshold": 0.3,
        "overlap_threshold": 0.2,
        "metadata": SimpleNamespace(name="some_dataset", thing_dataset_id_to_contiguous_id=THINGS),
        "size_divisibility": 32,
        "sem_seg_postprocess_before_inference": False,
        "pixel_mean": MEAN,
        "pixel_std": STD,
    }
    return MaskFormer(**{**arguments, **options}).eval()


def image(*size):
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8)


# ---- inference


@pytest.mark.parametrize("all_tasks", [True, False])
def test_results_of_images_of_unequal_size(all_tasks):
    prediction = random_prediction(2, (64, 96))
    model = make_model(prediction, panoptic_on=all_tasks, instance_on=all_tasks, test_topk_per_image=8)
    inputs = [{"image": image(60, 40), "height": 81, "width": 55}, {"image": image(33, 90)}]
    results = model(inputs)
    for i, (size, output) in enumerate([((60, 40), (81, 55)), ((33, 90), (33, 90))]):
        class_logits, logits = prediction["pred_logits"][i], prediction["pred_masks"][i]
        if not all_tasks:
            assert set(results[i]) == {"sem_seg"}
            scores = semantic(class_logits, upsampled(logits, (64, 96), size))
            expected = nn.functional.interpolate(scores[None], size=output, mode="bilinear", align_corners=False)[0]
            torch.testing.assert_close(results[i]["sem_seg"], expected, atol=1e-5, rtol=0)
            continue
        dense = upsampled(logits, (64, 96), size, output)
        assert set(results[i]) == {"sem_seg", "panoptic_seg", "instances"}
        torch.testing.assert_close(results[i]["sem_seg"], semantic(class_logits, dense), atol=1e-5, rtol=0)
        ids, segments = panoptic(class_logits, dense, set(THINGS.values()), 0.3, 0.2, True)
        assert results[i]["panoptic_seg"][1] == segments
        assert torch.equal(results[i]["panoptic_seg"][0], ids)
        found, expected = results[i]["instances"], instances(class_logits, dense, 8, set(THINGS.values()))
        assert sorted(found.pred_classes.tolist()) == sorted(e["class"] for e in expected)
        assert sorted(found.pred_boxes.tensor.tolist()) == sorted(e["box"] for e in expected)
        assert int(found.pred_masks.sum()) == sum(int(e["mask"].sum()) for e in expected)


def test_options_of_the_tasks_reach_them():
    prediction = random_prediction(1, (64, 64))
    inputs = [{"image": image(64, 64)}]
    dense = upsampled(prediction["pred_masks"][0], (64, 64), (64, 64))
    options = {"semantic_on": False, "panoptic_on": True, "instance_on": True, "test_topk_per_image": 20}
    result = make_model(prediction, panoptic_require_mask=False, instance_things_first=True, **options)(inputs)[0]
    expected = panoptic(prediction["pred_logits"][0], dense, {0, 2}, 0.3, 0.2, False)
    assert torch.equal(result["panoptic_seg"][0], expected[0])
    assert len(result["instances"]) == 20
    assert len(make_model(prediction, **options)(inputs)[0]["instances"]) < 20
    # without panoptic segmentation every class may be an instance
    alone = make_model(prediction, semantic_on=False, instance_on=True)(inputs)[0]["instances"]
    assert len(alone) == QUERIES * CLASSES


def test_dense_masks_of_a_foreign_head():
    prediction = random_prediction(1, (64, 64))
    inputs = [{"image": image(50, 64), "height": 70, "width": 80}]
    options = {"panoptic_on": True}
    expected = make_model(prediction, **options)(inputs)[0]
    foreign = {"pred_logits": prediction["pred_logits"], "pred_masks": prediction["pred_masks"]}
    found = make_model(foreign, **options)(inputs)[0]
    torch.testing.assert_close(found["sem_seg"], expected["sem_seg"])
    assert torch.equal(found["panoptic_seg"][0], expected["panoptic_seg"][0])


@pytest.mark.parametrize(("divisibility", "padded"), [(32, (64, 64)), (0, (50, 61)), (-1, (64, 64)), (40, (80, 80))])
def test_images_are_normalised_then_padded_with_zeros(divisibility, padded):
    model = make_model(random_prediction(2, (64, 64)), size_divisibility=divisibility)
    images = [image(50, 33), image(7, 61)]
    model([{"image": x} for x in images])
    batch = model.backbone.images
    assert batch.shape == (2, 3, *padded)
    for row, x in zip(batch, images):
        expected = torch.zeros(3, *padded)
        for channel in range(3):
            expected[channel, : x.shape[1], : x.shape[2]] = (x[channel].float() - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(row, expected)


def test_panoptic_needs_to_know_the_things():
    model = make_model(random_prediction(1, (64, 64)), panoptic_on=True, metadata=SimpleNamespace(name="plain"))
    with pytest.raises(ValueError, match="metadata of dataset 'plain'.*lacks.*PANOPTIC_ON"):
        model([{"image": image(64, 64)}])


def test_some_task_must_be_on():
    with pytest.raises(ValueError, match="no task is on"):
        make_model(random_prediction(1, (64, 64)), semantic_on=False)


def test_mean_and_deviation_are_not_saved():
    assert not [key for key in make_model(None).state_dict() if key.startswith("pixel_")]


# ---- ground truth


def ground_truth(size, masks, classes):
    truth = Instances(size)
    truth.gt_classes = torch.as_tensor(classes, dtype=torch.int64)
    truth.gt_masks = masks
    return truth


def test_every_form_of_mask_gives_the_same_target():
    polygon = np.array([3.0, 2.0, 20.0, 2.0, 20.0, 12.0, 3.0, 12.0])
    polygons = PolygonMasks([[polygon], [polygon + 5]])
    size = (24, 32)
    bits = BitMasks.from_polygon_masks(polygons, *size)
    model = make_model(None)
    found = [
        model.prepare_targets([{"image": image(*size), "instances": ground_truth(size, masks, [1, 4])}])[0]
        for masks in (polygons, bits, bits.tensor, bits.tensor.to(torch.uint8))
    ]
    for target in found:
        assert target["labels"].tolist() == [1, 4]
        assert target["masks"].dtype in (torch.bool, torch.uint8)
        assert torch.equal(target["masks"].bool(), bits.tensor)
    assert bits.tensor.any()


def test_run_lengths_stay_run_lengths():
    size = (24, 32)
    encoded = [{"size": size, "counts": counts} for counts in ([100, 60, 608], [0, 768])]
    masks = RunLengthMasks.from_coco(encoded, size)
    model = make_model(None)
    target = model.prepare_targets([{"image": image(*size), "instances": ground_truth(size, masks, [1, 4])}])[0]
    assert isinstance(target["masks"], RunLengthMasks)
    assert target["masks"].decode().sum((1, 2)).tolist() == [60, 768]
    with pytest.raises(ValueError, match="ground-truth masks of 24x32 .* for an image of 24x30"):
        model.prepare_targets([{"image": image(24, 30), "instances": ground_truth(size, masks, [1, 4])}])


def test_image_without_objects():
    size = (24, 32)
    target = make_model(None).prepare_targets(
        [{"image": image(*size), "instances": ground_truth(size, torch.zeros(0, *size), [])}]
    )[0]
    assert target["labels"].shape == (0,) and target["masks"].shape == (0, *size)
    assert target["masks"].dtype == torch.bool


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"classes": [0, 5, -1]},
            r"a\.jpg: class ids \[-1, 5\] are outside 0\.\.4; MODEL\.SEM_SEG_HEAD\.NUM_CLASSES is 5",
        ),
        ({"mask_size": (20, 32)}, r"a\.jpg: ground-truth masks of 20x32 \(height x width\) for an image of 24x32"),
        ({"classes": None}, r"a\.jpg: no 'instances' to train on"),
        ({"without": "gt_masks"}, r"a\.jpg: 'instances' without gt_masks"),
    ],
)
def test_wrong_ground_truth_is_named(entry, message):
    size = (24, 32)
    mask_size = entry.get("mask_size", size)
    inputs = {"image": image(*size), "file_name": "a.jpg"}
    classes = entry.get("classes", [0, 1, 2])
    if classes is not None:
        inputs["instances"] = ground_truth(mask_size, torch.zeros(3, *mask_size, dtype=torch.bool), classes)
        if "without" in entry:
            inputs["instances"].remove(entry["without"])
    with pytest.raises(ValueError, match=message):
        make_model(None).train()([inputs])


# ---- from config


@pytest.fixture
def config(small_config):
    def make(*options):
        cfg = small_config(
            "MODEL.META_ARCHITECTURE", "MaskFormer",
            "MODEL.BACKBONE.NAME", "build_resnet_backbone",
            "MODEL.RESNETS.DEPTH", 18,
            "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
            "MODEL.RESNETS.STEM_OUT_CHANNELS", 64,
            "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"],
            "MODEL.BACKBONE.FREEZE_AT", 0,
            "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 64,
            "DATASETS.TRAIN", ("meta_arch_test",),
            *options,
        )  # fmt: skip
        return cfg

    MetadataCatalog.pop("meta_arch_test", None)
    MetadataCatalog.get("meta_arch_test").set(thing_dataset_id_to_contiguous_id=THINGS)
    yield make
    MetadataCatalog.pop("meta_arch_test", None)


def training_batch():
    size = (64, 96)
    masks = torch.zeros(3, *size, dtype=torch.bool)
    masks[0, 5:30, 8:50], masks[1, 40:, 60:], masks[2, 3:9, 70:] = True, True, True
    return [
        {"image": image(*size), "instances": ground_truth(size, masks, [0, 1, 4])},
        {"image": image(50, 40), "instances": ground_truth((50, 40), torch.zeros(0, 50, 40), [])},
    ]


@pytest.mark.parametrize("mask_loss", ["point", "dense"])
def test_training_step_from_config(config, mask_loss):
    model = build_model(config("MODEL.MASK_FORMER.MASK_LOSS", mask_loss, "MODEL.MASK_FORMER.CLASS_WEIGHT", 2.0)).train()
    names = ["loss_ce", "loss_mask", "loss_dice"]
    expected = {f"{name}{suffix}" for name in names for suffix in ["", *(f"_{i}" for i in range(4))]}
    assert set(model.criterion.weight_dict) == expected
    assert model.criterion.weight_dict["loss_ce_3"] == 2.0 and model.criterion.weight_dict["loss_mask"] == 20.0
    assert model.criterion.num_points == model.criterion.matcher.num_points == (64 if mask_loss == "point" else 0)
    batch = training_batch()
    torch.manual_seed(1)
    losses = model(batch)
    assert set(losses) == expected
    torch.manual_seed(1)
    weights, model.criterion.weight_dict = model.criterion.weight_dict, dict.fromkeys(expected, 1.0)
    unweighted = model(batch)
    for name, weight in weights.items():
        torch.testing.assert_close(losses[name], unweighted[name] * weight)
    sum(losses.values()).backward()
    without = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert not without
    assert "criterion.empty_weight" in model.state_dict()


def test_without_deep_supervision_the_last_layer_alone_has_losses(config):
    model = build_model(config("MODEL.MASK_FORMER.DEEP_SUPERVISION", False)).train()
    assert set(model(training_batch())) == {"loss_ce", "loss_mask", "loss_dice"}


def test_attributes_and_results_from_config(config):
    model = build_model(
        config(
            "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", True,
            "MODEL.MASK_FORMER.TEST.INSTANCE_ON", True,
            "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", 0.1,
            "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", 0.7,
            "MODEL.MASK_FORMER.TEST.PANOPTIC_REQUIRE_MASK", False,
            "MODEL.MASK_FORMER.TEST.INSTANCE_THINGS_FIRST", True,
            "TEST.DETECTIONS_PER_IMAGE", 7,
        )
    ).eval()  # fmt: skip
    assert isinstance(model, MaskFormer)
    assert (model.num_queries, model.size_divisibility, model.sem_seg_head.num_classes) == (10, 32, 5)
    assert (model.object_mask_threshold, model.overlap_threshold, model.test_topk_per_image) == (0.1, 0.7, 7)
    assert model.instance_things_first and not model.panoptic_require_mask
    assert model.metadata is MetadataCatalog.get("meta_arch_test")
    result = model([{"image": image(50, 70), "height": 33, "width": 41}])[0]
    assert result["sem_seg"].shape == (5, 33, 41)
    assert result["panoptic_seg"][0].shape == (33, 41)
    assert result["instances"].pred_masks.shape == (7, 33, 41)
    assert not any(value.requires_grad for value in (result["sem_seg"], result["instances"].scores))


def test_unknown_mask_loss(config):
    with pytest.raises(ValueError, match="MASK_LOSS must be 'point' or 'dense', got 'both'"):
        build_model(config("MODEL.MASK_FORMER.MASK_LOSS", "both"))
