"""Configs of Hugging Face's models and ours, both ways."""

import json
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from mask2former_plugin.checkpoint.huggingface import from_hf_config, to_hf_config, to_hf_preprocessor
from mask2former_plugin.checkpoint.huggingface_config import class_names
from mask2former_plugin.config import differing_keys, load_config

CONFIGS = Path(__file__).parents[2] / "configs"

# as in the config.json of a Swin-L Mask2Former, with every value unlike the default of either side
MASK2FORMER = {
    "model_type": "mask2former",
    "architectures": ["Mask2FormerForUniversalSegmentation"],
    "backbone_config": {
        "model_type": "swin", "embed_dim": 192, "depths": [2, 2, 17, 2], "num_heads": [6, 12, 24, 48],
        "window_size": 12, "mlp_ratio": 3.0, "qkv_bias": False, "hidden_dropout_prob": 0.1, "patch_size": 4,
        "attention_probs_dropout_prob": 0.2, "drop_path_rate": 0.4, "image_size": 384, "hidden_act": "gelu",
        "use_absolute_embeddings": False, "num_channels": 3, "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "feature_size": 128, "mask_feature_size": 64, "hidden_dim": 192, "encoder_feedforward_dim": 1024,
    "activation_function": "relu", "encoder_layers": 5, "decoder_layers": 9, "num_attention_heads": 4, "dropout": 0.25,
    "dim_feedforward": 1536, "pre_norm": True, "enforce_input_projection": True, "common_stride": 8,
    "ignore_value": 254, "num_queries": 200, "no_object_weight": 0.2, "class_weight": 3.0, "mask_weight": 6.0,
    "dice_weight": 7.0, "train_num_points": 5000, "oversample_ratio": 2.0, "importance_sample_ratio": 0.5,
    "init_std": 0.02, "init_xavier_std": 1.0, "use_auxiliary_loss": False, "feature_strides": [4, 8, 16, 32],
    "id2label": {"0": "cat", "1": "dog", "2": "void of it"}, "label2id": {"cat": 0, "dog": 1, "void of it": 2},
}  # fmt: skip
EXPECTED_MASK2FORMER = {
    "BACKBONE.NAME": "D2SwinTransformer",
    "SWIN.EMBED_DIM": 192, "SWIN.DEPTHS": [2, 2, 17, 2], "SWIN.NUM_HEADS": [6, 12, 24, 48], "SWIN.WINDOW_SIZE": 12,
    "SWIN.MLP_RATIO": 3.0, "SWIN.QKV_BIAS": False, "SWIN.DROP_RATE": 0.1, "SWIN.ATTN_DROP_RATE": 0.2,
    "SWIN.DROP_PATH_RATE": 0.4, "SWIN.PRETRAIN_IMG_SIZE": 384,
    "META_ARCHITECTURE": "MaskFormer", "SEM_SEG_HEAD.NAME": "MaskFormerHead", "SEM_SEG_HEAD.NUM_CLASSES": 3,
    "SEM_SEG_HEAD.PIXEL_DECODER_NAME": "MSDeformAttnPixelDecoder", "SEM_SEG_HEAD.NORM": "GN",
    "SEM_SEG_HEAD.IN_FEATURES": ["res2", "res3", "res4", "res5"], "SEM_SEG_HEAD.CONVS_DIM": 128,
    "SEM_SEG_HEAD.MASK_DIM": 64, "SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 5, "SEM_SEG_HEAD.COMMON_STRIDE": 8,
    "SEM_SEG_HEAD.IGNORE_VALUE": 254, "MASK_FORMER.MASK_LOSS": "point",
    "MASK_FORMER.TRANSFORMER_DECODER_NAME": "MultiScaleMaskedTransformerDecoder",
    "MASK_FORMER.TRANSFORMER_IN_FEATURE": "multi_scale_pixel_decoder", "MASK_FORMER.HIDDEN_DIM": 192,
    "MASK_FORMER.DEC_LAYERS": 9, "MASK_FORMER.NHEADS": 4, "MASK_FORMER.DROPOUT": 0.25,
    "MASK_FORMER.DIM_FEEDFORWARD": 1536, "MASK_FORMER.PRE_NORM": True, "MASK_FORMER.ENFORCE_INPUT_PROJ": True,
    "MASK_FORMER.NUM_OBJECT_QUERIES": 200, "MASK_FORMER.NO_OBJECT_WEIGHT": 0.2, "MASK_FORMER.CLASS_WEIGHT": 3.0,
    "MASK_FORMER.MASK_WEIGHT": 6.0, "MASK_FORMER.DICE_WEIGHT": 7.0, "MASK_FORMER.TRAIN_NUM_POINTS": 5000,
    "MASK_FORMER.OVERSAMPLE_RATIO": 2.0, "MASK_FORMER.IMPORTANCE_SAMPLE_RATIO": 0.5,
    "MASK_FORMER.DEEP_SUPERVISION": False,
}  # fmt: skip
MASKFORMER = {
    "model_type": "maskformer",
    "architectures": ["MaskFormerForInstanceSegmentation"],
    "backbone_config": {
        "model_type": "resnet", "embedding_size": 32, "hidden_sizes": [128, 256, 512, 1024], "depths": [3, 4, 23, 3],
        "layer_type": "bottleneck", "hidden_act": "relu", "downsample_in_first_stage": False, "num_channels": 3,
        "downsample_in_bottleneck": True, "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "decoder_config": {
        "model_type": "detr", "d_model": 128, "decoder_layers": 5, "decoder_attention_heads": 4,
        "decoder_ffn_dim": 512, "dropout": 0.15, "num_queries": 77, "activation_function": "relu",
        "auxiliary_loss": False, "decoder_layerdrop": 0.0,
    },
    "fpn_feature_size": 96, "mask_feature_size": 64, "no_object_weight": 0.3, "use_auxiliary_loss": True,
    "dice_weight": 2.0, "cross_entropy_weight": 4.0, "mask_weight": 10.0, "init_std": 0.02, "init_xavier_std": 1.0,
    "id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1},
}  # fmt: skip
EXPECTED_MASKFORMER = {
    "BACKBONE.NAME": "build_resnet_backbone", "BACKBONE.FREEZE_AT": 0, "RESNETS.DEPTH": 101,
    "RESNETS.STEM_OUT_CHANNELS": 32, "RESNETS.RES2_OUT_CHANNELS": 128, "RESNETS.WIDTH_PER_GROUP": 32,
    "RESNETS.STRIDE_IN_1X1": True, "RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "SEM_SEG_HEAD.PIXEL_DECODER_NAME": "BasePixelDecoder", "SEM_SEG_HEAD.CONVS_DIM": 96, "SEM_SEG_HEAD.MASK_DIM": 64,
    "SEM_SEG_HEAD.NUM_CLASSES": 2, "MASK_FORMER.MASK_LOSS": "dense", "MASK_FORMER.TEST.PANOPTIC_REQUIRE_MASK": False,
    "MASK_FORMER.TRANSFORMER_DECODER_NAME": "StandardTransformerDecoder",
    "MASK_FORMER.TRANSFORMER_IN_FEATURE": "res5", "MASK_FORMER.HIDDEN_DIM": 128, "MASK_FORMER.DEC_LAYERS": 5,
    "MASK_FORMER.NHEADS": 4, "MASK_FORMER.DIM_FEEDFORWARD": 512, "MASK_FORMER.DROPOUT": 0.15,
    "MASK_FORMER.NUM_OBJECT_QUERIES": 77, "MASK_FORMER.NO_OBJECT_WEIGHT": 0.3, "MASK_FORMER.CLASS_WEIGHT": 4.0,
    "MASK_FORMER.MASK_WEIGHT": 10.0, "MASK_FORMER.DICE_WEIGHT": 2.0, "MASK_FORMER.DEEP_SUPERVISION": True,
}  # fmt: skip
CASES = [(MASK2FORMER, EXPECTED_MASK2FORMER), (MASKFORMER, EXPECTED_MASKFORMER)]


def value_of(node, dotted):
    for part in dotted.split("."):
        node = node[part]
    return node


@pytest.mark.parametrize("theirs, expected", CASES, ids=["mask2former", "maskformer"])
def test_theirs_to_ours_and_back(theirs, expected):
    cfg = from_hf_config(theirs)
    assert {key: value_of(cfg.MODEL, key) for key in expected} == expected
    assert cfg.INPUT.FORMAT == "RGB"
    assert to_hf_config(cfg) == theirs
    again = from_hf_config(json.loads(json.dumps(to_hf_config(cfg))))
    assert differing_keys(cfg, again) == []


def test_ours_to_theirs_and_back(small_config):
    for family in ("mask2former", "maskformer"):
        for backbone in ("swin", "resnet"):
            cfg = small_config(family, backbone)
            theirs = to_hf_config(cfg)
            assert theirs["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
            assert theirs["model_type"] == family and theirs["backbone_config"]["model_type"] == backbone
            back = from_hf_config(theirs)
            different = differing_keys(cfg, back)
            # not in their config: tests, datasets, and the keys of the backbone that the model does not have
            other = "MODEL.RESNETS." if backbone == "swin" else "MODEL.SWIN."
            unrelated = ("DATASETS.", "MODEL.MASK_FORMER.TEST.", "MODEL.DEVICE", "MODEL.BACKBONE.FREEZE_AT", other)
            assert [key for key in different if not key.startswith(unrelated)] == []
            build_model(back.clone() if back.MODEL.DEVICE == "cpu" else _on_cpu(back))


def test_published_configs_there_and_back():
    """Every published model that Hugging Face can hold comes back as the same model; the others are refused."""
    paths = sorted(CONFIGS.glob("mask*former/**/*.yaml"))
    assert len(paths) > 80
    for path in paths:
        cfg = load_config(path)
        is_model = cfg.MODEL.META_ARCHITECTURE == "MaskFormer"
        if not is_model or "R101c" in path.name or "maskformer_panoptic_R" in path.name:
            with pytest.raises(ValueError, match="Hugging Face's models have only"):
                to_hf_config(cfg)
            continue
        back = from_hf_config(to_hf_config(cfg), to_hf_preprocessor(cfg))
        model = [key for key in differing_keys(cfg, back) if key.startswith(("MODEL.", "INPUT.FORMAT"))]
        other = "MODEL.RESNETS." if back.MODEL.BACKBONE.NAME == "D2SwinTransformer" else "MODEL.SWIN."
        # how batch norm trains is no part of their config; ENFORCE_INPUT_PROJ says nothing where the widths differ
        free = ("WEIGHTS", "RESNETS.NORM", "MASK_FORMER.TEST.", "MASK_FORMER.ENFORCE_INPUT_PROJ")
        if "maskformer/" in str(path.relative_to(CONFIGS)):
            free += ("SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS",)  # some files set it for a decoder that does not read it
        if cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY == 0:
            assert back.MODEL.MASK_FORMER.SIZE_DIVISIBILITY == 1
            free += ("MASK_FORMER.SIZE_DIVISIBILITY",)
        ignored = (*(f"MODEL.{key}" for key in free), other)
        assert [key for key in model if not key.startswith(ignored)] == [], path
        assert back.INPUT.MIN_SIZE_TEST == cfg.INPUT.MIN_SIZE_TEST


def test_networks_of_basic_blocks(small_config):
    options = ["MODEL.RESNETS.DEPTH", 34, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.NORM", "BN"]
    theirs = to_hf_config(small_config("mask2former", "resnet", *options))
    assert theirs["backbone_config"]["layer_type"] == "basic"
    assert theirs["backbone_config"]["depths"] == [3, 4, 6, 3]
    assert theirs["backbone_config"]["hidden_sizes"] == [64, 128, 256, 512]
    cfg = from_hf_config(theirs)
    assert (cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS) == (34, 64)
    assert to_hf_config(cfg)["backbone_config"] == theirs["backbone_config"]


def _on_cpu(cfg):
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def test_a_short_config_means_their_defaults():
    """Files hold every key, but a config written by hand may not."""
    cfg = from_hf_config({"model_type": "mask2former", "backbone_config": {"model_type": "swin"}, "num_labels": 4})
    model = cfg.MODEL
    assert (model.MASK_FORMER.DEC_LAYERS, model.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS) == (10, 6)
    assert (model.MASK_FORMER.CLASS_WEIGHT, model.MASK_FORMER.MASK_WEIGHT, model.MASK_FORMER.DICE_WEIGHT) == (2, 5, 5)
    assert (model.MASK_FORMER.DROPOUT, model.MASK_FORMER.NUM_OBJECT_QUERIES) == (0, 100)
    assert (model.SWIN.DROP_PATH_RATE, model.SEM_SEG_HEAD.NUM_CLASSES) == (0.1, 4)
    cfg = from_hf_config({"model_type": "maskformer", "backbone_config": {"model_type": "resnet"}})
    assert (cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.MASK_FORMER.DEC_LAYERS) == (50, 6)
    assert (cfg.MODEL.MASK_FORMER.MASK_WEIGHT, cfg.MODEL.MASK_FORMER.DICE_WEIGHT) == (20, 1)
    assert cfg.MODEL.MASK_FORMER.DEEP_SUPERVISION is False and cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 2


# ---- classes ----


def test_names_of_classes_become_a_dataset():
    names = ["road", "sky", "road", "tree"]
    cfg = from_hf_config({**MASK2FORMER, "id2label": {str(number): name for number, name in enumerate(names)}})
    assert class_names(to_hf_config(cfg)) == ["road (0)", "sky", "road (2)", "tree"]
    (name,) = cfg.DATASETS.TRAIN
    assert cfg.DATASETS.TEST == (name,) and name in DatasetCatalog.list()
    assert list(MetadataCatalog.get(name).stuff_classes) == ["road (0)", "sky", "road (2)", "tree"]
    tasks = cfg.MODEL.MASK_FORMER.TEST
    assert (tasks.SEMANTIC_ON, tasks.INSTANCE_ON, tasks.PANOPTIC_ON) == (True, False, False)
    with pytest.raises(ValueError, match="names of classes and no images"):
        DatasetCatalog.get(name)


@pytest.mark.parametrize(
    "dataset, key, tasks",
    [
        ("coco_2017_val_panoptic_with_sem_seg", "stuff_classes", (True, True, True)),
        ("ade20k_instance_val", "thing_classes", (False, True, False)),
        ("coco_2017_val", "thing_classes", (False, True, False)),
        ("ade20k_sem_seg_val", "stuff_classes", (True, False, False)),
        ("cityscapes_fine_instance_seg_val", "thing_classes", (False, True, False)),
        ("mapillary_vistas_sem_seg_val", "stuff_classes", (True, False, False)),
    ],
)
def test_published_classes_name_their_dataset(dataset, key, tasks):
    names = list(MetadataCatalog.get(dataset).get(key))
    spelled = [f" {name.split(',')[0]}" for name in names]  # label lists differ in spaces and synonyms
    for given in (names, spelled):
        cfg = from_hf_config({**MASK2FORMER, "id2label": {str(number): name for number, name in enumerate(given)}})
        assert cfg.DATASETS.TEST == (dataset,)
        test = cfg.MODEL.MASK_FORMER.TEST
        assert (test.SEMANTIC_ON, test.INSTANCE_ON, test.PANOPTIC_ON) == tasks
        assert class_names(to_hf_config(cfg)) == names
    others = {str(number): f"my class {number}" for number in range(len(names))}
    assert from_hf_config({**MASK2FORMER, "id2label": others}).DATASETS.TEST[0].startswith("huggingface_")


# ---- images ----


def test_preprocessor_both_ways():
    theirs = {
        "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3], "do_normalize": True, "do_rescale": True,
        "rescale_factor": 1 / 255, "size": {"shortest_edge": 640, "longest_edge": 2560}, "size_divisor": 64,
    }  # fmt: skip
    cfg = from_hf_config(MASK2FORMER, theirs)
    assert cfg.MODEL.PIXEL_MEAN == pytest.approx([127.5, 102, 76.5])
    assert cfg.MODEL.PIXEL_STD == pytest.approx([51, 63.75, 76.5])
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (640, 2560)
    assert cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY == 64
    back = to_hf_preprocessor(cfg)
    assert {key: back[key] for key in theirs} == theirs
    assert back["image_processor_type"] == "Mask2FormerImageProcessor"
    assert (back["num_labels"], back["ignore_index"]) == (3, 254)
    assert to_hf_preprocessor(from_hf_config(MASKFORMER))["image_processor_type"] == "MaskFormerImageProcessor"
    published = to_hf_preprocessor(from_hf_config(MASKFORMER))
    assert published["image_mean"] == [0.485, 0.456, 0.406] and published["image_std"] == [0.229, 0.224, 0.225]


@pytest.mark.parametrize(
    "values, sizes",
    [
        ({"size": 512, "max_size": 2048}, (512, 2048)),  # the first releases
        ({"size": {"shortest_edge": 512}}, (512, 2**30)),
        ({"size": {"height": 384, "width": 384}}, (800, 1333)),
        ({"do_resize": False, "size": {"shortest_edge": 512}}, (0, 1333)),
        ({}, (800, 1333)),
    ],
)
def test_sizes_of_preprocessors(values, sizes):
    cfg = from_hf_config(MASKFORMER, values)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == sizes
    back = to_hf_preprocessor(cfg)
    assert back["do_resize"] == (sizes[0] > 0)
    limit = {} if sizes[1] == 2**30 else {"longest_edge": sizes[1]}
    assert back.get("size") == ({"shortest_edge": sizes[0], **limit} if sizes[0] else None)


# ---- what the other side lacks ----


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "oneformer"}, "model_type is 'oneformer'; only 'maskformer' and 'mask2former' can be read"),
        ({"encoder_feedforward_dim": 512}, "encoder_feedforward_dim is 512; only 1024 exists here"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu'; only 'relu'"),
        ({"backbone_config": None}, "there is no backbone_config"),
        ({"backbone_config": {"model_type": "dinov2"}}, "backbone_config.model_type is 'dinov2'"),
        (
            {"backbone_config": {"model_type": "swin", "use_absolute_embeddings": True}},
            "use_absolute_embeddings is True",
        ),
        ({"backbone_config": {"model_type": "swin", "out_features": ["stage4"]}}, "out_features"),
        ({"backbone_config": {"model_type": "resnet", "depths": [1, 1, 1, 1]}}, r"depths \[1, 1, 1, 1\]"),
        ({"id2label": {"0": "a", "2": "b"}}, "ids in id2label must be 0..1"),
    ],
)
def test_models_that_do_not_exist_here(change, message):
    with pytest.raises(ValueError, match=message):
        from_hf_config({**MASK2FORMER, **change})


def test_decoders_that_do_not_exist_here():
    decoder = {**MASKFORMER["decoder_config"], "activation_function": "gelu"}
    with pytest.raises(ValueError, match="decoder_config.activation_function is 'gelu'"):
        from_hf_config({**MASKFORMER, "decoder_config": decoder})


@pytest.mark.parametrize(
    "family, backbone, key, value",
    [
        ("mask2former", "swin", "MODEL.META_ARCHITECTURE", "SemanticSegmentor"),
        ("mask2former", "swin", "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "BasePixelDecoder"),
        ("mask2former", "swin", "MODEL.SWIN.APE", True),
        ("mask2former", "swin", "MODEL.SEM_SEG_HEAD.NORM", "BN"),
        ("mask2former", "resnet", "MODEL.RESNETS.NUM_GROUPS", 32),
        ("mask2former", "resnet", "MODEL.RESNETS.WIDTH_PER_GROUP", 4),
        ("mask2former", "resnet", "MODEL.RESNETS.NORM", "GN"),
        ("maskformer", "resnet", "MODEL.BACKBONE.NAME", "build_resnet_deeplab_backbone"),
        ("maskformer", "swin", "MODEL.MASK_FORMER.PRE_NORM", True),
        ("maskformer", "swin", "MODEL.MASK_FORMER.ENC_LAYERS", 2),
        ("maskformer", "swin", "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "transformer_encoder"),
    ],
)
def test_models_that_they_lack(small_config, family, backbone, key, value):
    with pytest.raises(ValueError, match=f"{key} is {value!r}; Hugging Face's models have only "):
        to_hf_config(small_config(family, backbone, key, value))


def test_images_that_they_lack(small_config):
    with pytest.raises(ValueError, match="INPUT.FORMAT is 'BGR'"):
        to_hf_preprocessor(small_config("mask2former", "swin", "INPUT.FORMAT", "BGR"))
