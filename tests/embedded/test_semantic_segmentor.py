"""The per-pixel segmentor, its head, test-time augmentation, and the errors of building a model."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detectron2 import modeling
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, DatasetMapperTTA, SemanticSegmentor, build_model, build_sem_seg_head
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.postprocessing import sem_seg_postprocess

MEAN, STD = [10.0, 20.0, 30.0], [1.0, 2.0, 4.0]


class ToyBackbone(Backbone):
    size_divisibility = 4

    def forward(self, x):
        return {"pixels": x}

    def output_shape(self):
        return {"pixels": ShapeSpec(channels=3, stride=1)}


class ToyHead(nn.Module):
    """Returns the normalised pixels as scores; keeps what it was given."""

    ignore_value = 255

    def forward(self, features, targets=None):
        self.seen = features["pixels"], targets
        return (None, {"loss_sem_seg": features["pixels"].sum()}) if self.training else (features["pixels"], {})


@pytest.fixture
def segmentor():
    return SemanticSegmentor(backbone=ToyBackbone(), sem_seg_head=ToyHead(), pixel_mean=MEAN, pixel_std=STD)


def normalised(image):
    return (image.float() - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_inference_cuts_padding_and_resizes(segmentor):
    images = [torch.randint(0, 255, (3, 5, 7), dtype=torch.uint8), torch.randint(0, 255, (3, 6, 4), dtype=torch.uint8)]
    results = segmentor.eval()([{"image": images[0], "height": 10, "width": 9}, {"image": images[1]}])
    assert segmentor.sem_seg_head.seen[0].shape == (2, 3, 8, 8)
    expected = F.interpolate(normalised(images[0])[None], size=(10, 9), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(results[0]["sem_seg"], expected)
    torch.testing.assert_close(results[1]["sem_seg"], normalised(images[1]))


def test_training_pads_images_with_zero_and_labels_with_ignore(segmentor):
    image, label = torch.randint(0, 255, (3, 5, 7), dtype=torch.uint8), torch.randint(0, 9, (5, 7))
    losses = segmentor.train()([{"image": image, "sem_seg": label}])
    pixels, targets = segmentor.sem_seg_head.seen
    torch.testing.assert_close(losses["loss_sem_seg"], normalised(image).sum())
    assert torch.equal(targets[0, :5, :7], label) and (targets[0, 5:] == 255).all() and (targets[0, :, 7:] == 255).all()
    assert (pixels[0, :, 5:] == 0).all()
    assert segmentor.device == torch.device("cpu") and "pixel_mean" not in segmentor.state_dict()


@pytest.mark.embedded_only
def test_training_without_labels_names_the_image(segmentor):
    with pytest.raises(ValueError, match="'sem_seg'.*street.jpg"):
        segmentor.train()([{"image": torch.zeros(3, 4, 4), "file_name": "street.jpg"}])


def test_sem_seg_postprocess():
    scores = torch.rand(2, 8, 8)
    result = sem_seg_postprocess(scores, (6, 5), 12, 11)
    expected = F.interpolate(scores[None, :, :6, :5], size=(12, 11), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(result, expected)


# ---------------------------------------------------------------------------------------------- SemSegFPNHead


def make_head(**kwargs):
    shapes = {"res2": ShapeSpec(channels=4, stride=4), "res4": ShapeSpec(channels=6, stride=16)}
    arguments = dict(num_classes=5, conv_dims=8, common_stride=4, norm="", ignore_value=255, loss_weight=2.0)
    return SemSegFPNHead(shapes, **{**arguments, **kwargs})


def slow_head(head, features):
    def up(x):
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

    state = head.state_dict()

    def conv(name, x):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1).relu()

    fine = conv("res2.0", features["res2"])
    coarse = up(conv("res4.2", up(conv("res4.0", features["res4"]))))
    return F.conv2d(fine + coarse, state["predictor.weight"], state["predictor.bias"])


def test_fpn_head_written_out():
    head = make_head()
    features = {"res2": torch.randn(2, 4, 8, 12), "res4": torch.randn(2, 6, 2, 3)}
    scores = F.interpolate(slow_head(head, features), scale_factor=4, mode="bilinear", align_corners=False)
    out, losses = head.eval()(features)
    assert losses == {}
    torch.testing.assert_close(out, scores)

    targets = torch.randint(0, 5, (2, 32, 48))
    targets[:, :10] = 255
    none, losses = head.train()(features, targets)
    assert none is None
    log_probability = scores.log_softmax(1)
    picked = [-log_probability[b, targets[b, y, x], y, x] for b, y, x in (targets != 255).nonzero().tolist()]
    torch.testing.assert_close(losses["loss_sem_seg"], 2 * torch.stack(picked).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.embedded_only
def test_fpn_head_without_labels_or_with_odd_sizes():
    head = make_head()
    features = {"res2": torch.randn(1, 4, 9, 11), "res4": torch.randn(1, 6, 3, 3)}
    _, losses = head.train()(features, torch.full((1, 34, 43), 255))
    losses["loss_sem_seg"].backward()
    assert losses["loss_sem_seg"].item() == 0
    out, _ = head.eval()(features)
    assert out.shape == (1, 5, 36, 44)


def test_fpn_head_from_config():
    cfg = get_cfg()
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res4"]
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 5
    shapes = {name: ShapeSpec(channels=4, stride=stride) for name, stride in (("res2", 4), ("res3", 8), ("res4", 16))}
    head = build_sem_seg_head(cfg, shapes)
    assert sorted({key.split(".")[0] for key in head.state_dict()}) == ["predictor", "res2", "res4"]
    assert head.res2[0].norm.num_groups == 32 and head.res2[0].bias is None


@pytest.mark.embedded_only
def test_fpn_head_names_missing_features():
    with pytest.raises(ValueError, match=r"IN_FEATURES names \['p2'.*\['res2'\]"):
        build_sem_seg_head(get_cfg(), {"res2": ShapeSpec(channels=4, stride=4)})


# ---------------------------------------------------------------------------------------------- build_model


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res3"]
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 4
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 32
    return cfg


def test_model_from_config_trains(cfg):
    model = build_model(cfg)
    assert isinstance(model, SemanticSegmentor)
    image, label = torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8), torch.randint(0, 4, (32, 32))
    model([{"image": image, "sem_seg": label}])["loss_sem_seg"].backward()
    assert model.sem_seg_head.predictor.weight.grad.abs().sum() > 0
    assert model.backbone.res3[0].conv1.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert model.eval()([{"image": image, "height": 20, "width": 30}])[0]["sem_seg"].shape == (4, 20, 30)


@pytest.mark.embedded_only
def test_cuda_asked_for_and_missing(cfg, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg.MODEL.DEVICE = "cuda"
    with pytest.raises(RuntimeError, match="MODEL.DEVICE is 'cuda'.*set MODEL.DEVICE to cpu"):
        build_model(cfg)


@pytest.mark.embedded_only
def test_errors_of_unknown_models(cfg):
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmenter"
    with pytest.raises(
        KeyError, match="MODEL.META_ARCHITECTURE is 'SemanticSegmenter'.*did you mean SemanticSegmentor"
    ):
        build_model(cfg)
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    with pytest.raises(
        NotImplementedError, match="the default: the config probably does not set the key.*SemanticSegmentor.*pip"
    ):
        build_model(cfg)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    with pytest.raises(NotImplementedError, match="RetinaNet is not part of the embedded Detectron2"):
        build_model(cfg)
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.SEM_SEG_HEAD.NAME = "SemSegHead"
    with pytest.raises(KeyError, match="MODEL.SEM_SEG_HEAD.NAME is 'SemSegHead'.*SemSegFPNHead"):
        build_model(cfg)


@pytest.mark.embedded_only
def test_left_out_models_say_how_to_get_them():
    with pytest.raises(NotImplementedError, match="GeneralizedRCNN.*install upstream"):
        GeneralizedRCNN()
    with pytest.raises(NotImplementedError, match="detectron2.modeling.FPN.*install upstream"):
        modeling.FPN
    with pytest.raises(AttributeError):
        modeling.Typo


# ---------------------------------------------------------------------------------------------- DatasetMapperTTA


def test_tta_versions(cfg):
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = (20, 30), 38
    image = torch.randint(0, 255, (3, 24, 32), dtype=torch.uint8)
    inputs = {"image": image, "height": 48, "width": 64, "file_name": "a.jpg"}
    versions = DatasetMapperTTA(cfg)(dict(inputs))
    sizes = [(20, 27), (20, 27), (29, 38), (29, 38)]  # the second size is limited by the longer side
    assert [tuple(version["image"].shape) for version in versions] == [(3, *size) for size in sizes]
    for plain, mirrored in (versions[:2], versions[2:]):
        assert torch.equal(mirrored["image"], plain["image"].flip(2))
    for version, (height, width), flipped in zip(versions, sizes, [False, True] * 2):
        assert version["image"].dtype == torch.uint8 and version["file_name"] == "a.jpg" and version["height"] == 48
        corner = version["transforms"].apply_coords(np.array([[64.0, 48.0]]))[0]
        np.testing.assert_allclose(corner, [0 if flipped else width, height])
    assert torch.equal(inputs["image"], image)
    cfg.TEST.AUG.FLIP = False
    assert len(DatasetMapperTTA(cfg)(dict(inputs))) == 2
    assert len(DatasetMapperTTA([10], 100, True)(dict(inputs))) == 2


def test_tta_of_an_image_at_its_original_size():
    versions = DatasetMapperTTA([24], 100, False)({"image": torch.zeros(3, 24, 32), "height": 24, "width": 32})
    np.testing.assert_allclose(versions[0]["transforms"].apply_coords(np.array([[5.0, 7.0]])), [[5, 7]])
