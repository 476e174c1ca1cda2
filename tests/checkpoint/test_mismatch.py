"""What a checkpoint lacks is reported in a short table, and refused where a model is to be used and not trained."""

import logging

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from mask2former_plugin.checkpoint import Checkpointer
from mask2former_plugin.checkpoint.report import LoadReport, module_of, wholly_missing
from mask2former_plugin.data.datasets.custom import register_custom_datasets
from mask2former_plugin.engine import Predictor, load_for_evaluation

# ---- the table ----


def test_table_of_differences():
    names = [
        "backbone.stem.weight",
        "backbone.stem.bias",
        "neck.a.weight",
        "neck.b.weight",
        "sem_seg_head.p.embed.weight",
    ]
    report = LoadReport(
        names,
        missing=["backbone.stem.bias", "neck.a.weight", "neck.b.weight"],
        unexpected=["other.x.y.z", "other.x.y.w", "lonely"],
        wrong_shape={"sem_seg_head.p.embed.weight": ((4, 2), (6, 2))},
    )
    assert report and report.unset == {*names} - {"backbone.stem.weight"}
    assert str(report).splitlines() == [
        "1 of 5 tensors of the model are loaded",
        "  module                missing  unexpected  wrong shape",
        "  backbone.stem               1           0            0",
        "  lonely                      0           1            0",
        "  neck (all of it)            2           0            0",
        "  other.x                     0           2            0",
        "  sem_seg_head.p.embed        0           0            1  "
        "weight: (4, 2) in the checkpoint, (6, 2) in the model",
    ]


def test_a_perfect_fit_is_one_line_and_many_modules_are_cut():
    assert not LoadReport(["a", "b"]) and str(LoadReport(["a", "b"])) == "2 of 2 tensors of the model are loaded"
    many = LoadReport(["a"], unexpected=[f"m{number:02d}.x.weight" for number in range(20)])
    assert len(str(many).splitlines()) == 2 + 12 + 1
    assert str(many).endswith("… and 8 more modules")


def test_modules_of_names():
    assert module_of("sem_seg_head.predictor.class_embed.weight") == "sem_seg_head.predictor.class_embed"
    assert module_of("backbone.layers.0.blocks.1.norm1.bias") == "backbone.layers"
    assert module_of("weight") == "weight"
    names = ["a.b.c.w", "a.b.d.w", "a.e.w", "f.w"]
    assert wholly_missing(["a.b.c.w", "a.b.d.w", "f.w"], names) == ["f", "a.b"]
    assert wholly_missing(["a.b.c.w", "a.b.d.w", "a.e.w"], names) == ["a"]
    assert wholly_missing(["a.b.c.w"], names) == []


# ---- loading ----


@pytest.fixture
def checkpoint(small_config, random_model, tmp_path):
    """Writes weights of a model after an edit of its state; returns the path."""

    def write(edit=lambda state: None, cfg=None):
        state = random_model(cfg or small_config()).state_dict()
        edit(state)
        torch.save({"model": state}, tmp_path / "model.pth")
        return str(tmp_path / "model.pth")

    return write


def drop(*parts):
    def edit(state):
        for name in [name for name in state if any(part in name for part in parts)]:
            del state[name]

    return edit


def refused(model, path):
    checkpointer = Checkpointer(model)
    checkpointer.load(path)
    with pytest.raises(ValueError, match="would be used with random weights") as error:
        checkpointer.require_weights()
    return str(error.value)


def test_a_complete_model_passes(small_config, checkpoint, caplog):
    checkpointer = Checkpointer(build_model(small_config()))
    with caplog.at_level(logging.INFO):
        checkpointer.load(checkpoint())
    assert checkpointer.random_weights == set()
    checkpointer.require_weights(classifier=True)
    total = len(checkpointer.report.names)
    assert f"{total} of {total} tensors of the model are loaded" in caplog.text and "module  " not in caplog.text


def test_what_follows_from_the_config_is_not_missed(small_config, checkpoint):
    path = checkpoint(drop("relative_position_index", "criterion."))
    checkpointer = Checkpointer(build_model(small_config()))
    checkpointer.load(path)
    assert not checkpointer.report
    checkpointer.require_weights(classifier=True)


@pytest.mark.parametrize(
    "part, module",
    [
        ("backbone.norm3.", "backbone.norm3 (all of it)"),
        ("pixel_decoder.adapter_1.weight", "sem_seg_head.pixel_decoder.adapter_1 "),
        ("query_feat", "sem_seg_head.predictor.query_feat "),
        ("mask_embed.layers.2", "sem_seg_head.predictor.mask_embed "),
    ],
)
def test_one_random_layer_is_enough_to_refuse(small_config, checkpoint, part, module):
    text = refused(build_model(small_config()), checkpoint(drop(part)))
    assert module in text and text.count("\n") == 3
    assert "MODEL.ALLOW_RANDOM_WEIGHTS True" in text


def test_frozen_batch_norm_counts_as_weights(small_config, checkpoint):
    cfg = small_config("mask2former", "resnet")
    assert "backbone.res4" in refused(build_model(cfg), checkpoint(drop("res4.0.conv1.norm.running_var"), cfg))


def test_a_random_classifier_is_reported_only(small_config, checkpoint, caplog):
    path = checkpoint()
    model = build_model(small_config("mask2former", "swin", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7))
    before = model.sem_seg_head.predictor.class_embed.weight.clone()
    checkpointer = Checkpointer(model)
    with caplog.at_level(logging.WARNING):
        checkpointer.load(path)
    assert "sem_seg_head.predictor.class_embed" in caplog.text
    assert "weight: (4, 24) in the checkpoint, (8, 24) in the model" in caplog.text
    classifier = {f"sem_seg_head.predictor.class_embed.{kind}" for kind in ("weight", "bias")}
    assert checkpointer.random_weights == classifier
    assert torch.equal(model.sem_seg_head.predictor.class_embed.weight, before)
    assert checkpointer.report.wrong_shape["criterion.empty_weight"] == ((4,), (8,))
    checkpointer.require_weights()
    with pytest.raises(ValueError, match="random weights"):
        checkpointer.require_weights(classifier=True)


def test_a_backbone_alone_trains_but_does_not_evaluate(small_config, checkpoint, caplog):
    path = checkpoint(drop("sem_seg_head.", "criterion."))
    with caplog.at_level(logging.WARNING):
        text = refused(build_model(small_config()), path)
    for place in (text, caplog.text):
        assert "sem_seg_head (all of it)" in place


def test_no_checkpoint_at_all(small_config):
    assert "0 of" in refused(build_model(small_config()), "")


def test_two_halves_make_a_whole(small_config, random_model, tmp_path):
    state = random_model(small_config()).state_dict()
    for part in ("backbone.", "sem_seg_head."):
        torch.save({name: value for name, value in state.items() if name.startswith(part)}, tmp_path / f"{part}pth")
    model = build_model(small_config())
    checkpointer = Checkpointer(model)
    checkpointer.load(str(tmp_path / "backbone.pth"))
    checkpointer.load(str(tmp_path / "sem_seg_head.pth"))
    checkpointer.require_weights(classifier=True)


def test_another_architecture_is_refused_with_the_table(small_config, checkpoint):
    path = checkpoint(cfg=small_config("maskformer"))
    with pytest.raises(ValueError, match="another architecture") as error:
        Checkpointer(build_model(small_config("mask2former"))).load(path)
    assert "missing  unexpected  wrong shape" in str(error.value)


# ---- evaluation and prediction ----


def test_the_config_can_allow_random_weights(small_config, checkpoint):
    path = checkpoint(drop("sem_seg_head."))
    options = ["MODEL.WEIGHTS", path]
    with pytest.raises(ValueError, match="random weights"):
        load_for_evaluation(build_model(small_config()), small_config("mask2former", "swin", *options))
    allowed = small_config("mask2former", "swin", *options, "MODEL.ALLOW_RANDOM_WEIGHTS", True)
    model = build_model(allowed)
    load_for_evaluation(model, allowed)
    assert torch.equal(model.backbone.norm0.weight, torch.load(path)["model"]["backbone.norm0.weight"])


def test_predictor_loads_what_the_checkpointer_loads(small_config, random_model, tmp_path):
    cfg = small_config("mask2former", "swin", "INPUT.MIN_SIZE_TEST", 32, "DATASETS.TEST", ("checkpoint_classes",))
    cfg.DATASETS.CUSTOM.checkpoint_classes = CfgNode({"FORMAT": "class_names", "CLASSES": ["a", "b", "c"]})
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST
    register_custom_datasets(cfg)
    model = random_model(cfg)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    image = np.random.default_rng(0).integers(0, 255, (40, 52, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="random weights"):
        Predictor(cfg)
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    predictor = Predictor(cfg)
    assert predictor.cfg.MODEL.WEIGHTS == cfg.MODEL.WEIGHTS
    assert list(predictor.metadata.stuff_classes) == ["a", "b", "c"]
    assert all(torch.equal(a, b) for a, b in zip(predictor.model.state_dict().values(), model.state_dict().values()))
    assert predictor(image)["sem_seg"].shape == (3, 40, 52)
