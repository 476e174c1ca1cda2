"""Configs: Hugging Face's MaskFormer and Mask2Former, and ours, both ways."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.projects.deeplab import add_deeplab_config

from mask2former_plugin.checkpoint.huggingface_names import MASK2FORMER, MASKFORMER
from mask2former_plugin.config import MASKED_DECODER, STANDARD_DECODER, add_mask_former_config, add_maskformer2_config
from mask2former_plugin.data.datasets.custom import register_custom_datasets

logger = logging.getLogger(__name__)

_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_LEVELS = ["res2", "res3", "res4", "res5"]
_RESNETS = {
    18: ("basic", [2, 2, 2, 2]),
    34: ("basic", [3, 4, 6, 3]),
    50: ("bottleneck", [3, 4, 6, 3]),
    101: ("bottleneck", [3, 4, 23, 3]),
    152: ("bottleneck", [3, 8, 36, 3]),
}
_ENCODER_FEEDFORWARD = 1024
_NO_LIMIT = 2**30  # of the longer side

# (their key, our key) with equal values
_SWIN_KEYS = (
    ("patch_size", "PATCH_SIZE"),
    ("embed_dim", "EMBED_DIM"),
    ("depths", "DEPTHS"),
    ("num_heads", "NUM_HEADS"),
    ("window_size", "WINDOW_SIZE"),
    ("mlp_ratio", "MLP_RATIO"),
    ("qkv_bias", "QKV_BIAS"),
    ("hidden_dropout_prob", "DROP_RATE"),
    ("attention_probs_dropout_prob", "ATTN_DROP_RATE"),
    ("drop_path_rate", "DROP_PATH_RATE"),
    ("image_size", "PRETRAIN_IMG_SIZE"),
)
_SHARED_KEYS = (
    ("no_object_weight", "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT"),
    ("mask_weight", "MODEL.MASK_FORMER.MASK_WEIGHT"),
    ("dice_weight", "MODEL.MASK_FORMER.DICE_WEIGHT"),
    ("use_auxiliary_loss", "MODEL.MASK_FORMER.DEEP_SUPERVISION"),
    ("mask_feature_size", "MODEL.SEM_SEG_HEAD.MASK_DIM"),
)
_MASK2FORMER_KEYS = (
    *_SHARED_KEYS,
    ("ignore_value", "MODEL.SEM_SEG_HEAD.IGNORE_VALUE"),
    ("feature_size", "MODEL.SEM_SEG_HEAD.CONVS_DIM"),
    ("encoder_layers", "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"),
    ("common_stride", "MODEL.SEM_SEG_HEAD.COMMON_STRIDE"),
    ("hidden_dim", "MODEL.MASK_FORMER.HIDDEN_DIM"),
    ("dim_feedforward", "MODEL.MASK_FORMER.DIM_FEEDFORWARD"),
    ("decoder_layers", "MODEL.MASK_FORMER.DEC_LAYERS"),
    ("num_attention_heads", "MODEL.MASK_FORMER.NHEADS"),
    ("dropout", "MODEL.MASK_FORMER.DROPOUT"),
    ("pre_norm", "MODEL.MASK_FORMER.PRE_NORM"),
    ("enforce_input_projection", "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ"),
    ("num_queries", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES"),
    ("class_weight", "MODEL.MASK_FORMER.CLASS_WEIGHT"),
    ("train_num_points", "MODEL.MASK_FORMER.TRAIN_NUM_POINTS"),
    ("oversample_ratio", "MODEL.MASK_FORMER.OVERSAMPLE_RATIO"),
    ("importance_sample_ratio", "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO"),
)
_MASKFORMER_KEYS = (
    *_SHARED_KEYS,
    ("fpn_feature_size", "MODEL.SEM_SEG_HEAD.CONVS_DIM"),
    ("cross_entropy_weight", "MODEL.MASK_FORMER.CLASS_WEIGHT"),
)
_DETR_KEYS = (  # MaskFormer's decoder_config
    ("d_model", "MODEL.MASK_FORMER.HIDDEN_DIM"),
    ("decoder_layers", "MODEL.MASK_FORMER.DEC_LAYERS"),
    ("decoder_attention_heads", "MODEL.MASK_FORMER.NHEADS"),
    ("decoder_ffn_dim", "MODEL.MASK_FORMER.DIM_FEEDFORWARD"),
    ("dropout", "MODEL.MASK_FORMER.DROPOUT"),
    ("num_queries", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES"),
)
# what their configs mean where a key is missing, as far as it differs from our default or matters for the weights
_MASK2FORMER_DEFAULTS = {
    "feature_size": 256, "mask_feature_size": 256, "hidden_dim": 256, "encoder_feedforward_dim": _ENCODER_FEEDFORWARD,
    "activation_function": "relu", "encoder_layers": 6, "decoder_layers": 10, "num_attention_heads": 8, "dropout": 0.0,
    "dim_feedforward": 2048, "common_stride": 4, "num_queries": 100, "class_weight": 2.0, "mask_weight": 5.0,
    "dice_weight": 5.0, "feature_strides": [4, 8, 16, 32],
}  # fmt: skip
_SWIN_DEFAULTS = {"hidden_act": "gelu", "use_absolute_embeddings": False, "num_channels": 3, "drop_path_rate": 0.1}
_RESNET_DEFAULTS = {
    "embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3], "layer_type": "bottleneck",
    "hidden_act": "relu", "downsample_in_first_stage": False, "downsample_in_bottleneck": False, "num_channels": 3,
}  # fmt: skip
_DETR_DEFAULTS = {"activation_function": "relu", "auxiliary_loss": False, "decoder_layerdrop": 0.0}

# datasets of the published checkpoints, by the number of classes: for training, for testing, tasks
_PUBLISHED = {
    133: ("coco_2017_train_panoptic", "coco_2017_val_panoptic_with_sem_seg", ("SEMANTIC", "INSTANCE", "PANOPTIC")),
    80: ("coco_2017_train", "coco_2017_val", ("INSTANCE",)),
    150: ("ade20k_sem_seg_train", "ade20k_sem_seg_val", ("SEMANTIC",)),
    847: ("ade20k_full_sem_seg_train", "ade20k_full_sem_seg_val", ("SEMANTIC",)),
    100: ("ade20k_instance_train", "ade20k_instance_val", ("INSTANCE",)),
    171: ("coco_2017_train_stuff_10k_sem_seg", "coco_2017_test_stuff_10k_sem_seg", ("SEMANTIC",)),
    19: ("cityscapes_fine_sem_seg_train", "cityscapes_fine_sem_seg_val", ("SEMANTIC",)),
    8: ("cityscapes_fine_instance_seg_train", "cityscapes_fine_instance_seg_val", ("INSTANCE",)),
    65: ("mapillary_vistas_sem_seg_train", "mapillary_vistas_sem_seg_val", ("SEMANTIC",)),
}


def _get(cfg: CfgNode, dotted: str) -> Any:
    for part in dotted.split("."):
        cfg = cfg[part]
    return list(cfg) if isinstance(cfg, tuple) else cfg


def _set(cfg: CfgNode, dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for part in path:
        cfg = cfg[part]
    cfg[last] = type(cfg[last])(value) if isinstance(cfg[last], (float, tuple)) else value


def _require(values: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    for key, value in wanted.items():
        if values.get(key, value) != value:
            raise ValueError(f"Hugging Face config: {where}{key} is {values[key]!r}; only {value!r} exists here")


# ---- theirs to ours ----


def from_hf_config(config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> CfgNode:
    """Our config of the model that a Hugging Face config describes.

    Args:
        config: content of ``config.json`` or ``config.to_dict()`` of a MaskFormer or Mask2Former.
        preprocessor: content of ``preprocessor_config.json``; gives pixel statistics and test size. A fixed test size
            (height, width) is not taken over: theirs squeezes images into it, ours keeps their shape. All published
            Mask2Formers have 384x384 there, though they were trained and tested at their datasets' sizes.

    Returns:
        The config, not frozen. Where number and names of the classes are those of a published dataset, it names that
        dataset and its tasks; else a dataset of the format ``class_names``, which is registered, and semantic
        segmentation. The training schedule is Detectron2's default.

    Raises:
        ValueError: another kind of model, or a variant that does not exist here; the text names the key.
    """
    family = config.get("model_type")
    if family not in (MASK2FORMER, MASKFORMER):
        raise ValueError(
            f"Hugging Face config: model_type is {family!r}; only {MASKFORMER!r} and {MASK2FORMER!r} can be read"
        )
    cfg = get_cfg()
    add_deeplab_config(cfg)
    if family == MASK2FORMER:
        add_maskformer2_config(cfg)
        _read_mask2former(config, cfg)
    else:
        add_mask_former_config(cfg)
        _read_maskformer(config, cfg)
    cfg.MODEL.META_ARCHITECTURE = "MaskFormer"
    cfg.MODEL.SEM_SEG_HEAD.NAME = "MaskFormerHead"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = _LEVELS
    cfg.MODEL.SEM_SEG_HEAD.NORM = "GN"
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    _read_backbone(config.get("backbone_config"), cfg)
    _read_classes(class_names(config), cfg)
    if preprocessor is not None:
        _read_preprocessor(preprocessor, cfg)
        if "ignore_value" not in config and preprocessor.get("ignore_index") is not None:
            cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = preprocessor["ignore_index"]
    return cfg


def class_names(config: Mapping[str, Any]) -> list[str]:
    """Names of the classes of a Hugging Face config by their ids.

    Raises:
        ValueError: the ids are not 0, 1, 2, …
    """
    labels = {int(key): str(name) for key, name in (config.get("id2label") or {}).items()}
    if not labels:
        labels = {number: f"LABEL_{number}" for number in range(config.get("num_labels", 2))}
    if sorted(labels) != list(range(len(labels))):
        raise ValueError(
            f"Hugging Face config: the ids in id2label must be 0..{len(labels) - 1}, got {sorted(labels)[:5]}…"
        )
    return [labels[number] for number in range(len(labels))]


def _read_keys(values: Mapping[str, Any], cfg: CfgNode, pairs: Sequence[tuple[str, str]], prefix: str = "") -> None:
    for theirs, ours in pairs:
        if values.get(theirs) is not None:
            _set(cfg, prefix + ours, values[theirs])


def _read_mask2former(config: Mapping[str, Any], cfg: CfgNode) -> None:
    values = {**_MASK2FORMER_DEFAULTS, **config}
    fixed = ("encoder_feedforward_dim", "activation_function", "feature_strides")
    _require(values, {key: _MASK2FORMER_DEFAULTS[key] for key in fixed}, "")
    _read_keys(values, cfg, _MASK2FORMER_KEYS)
    cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = "MSDeformAttnPixelDecoder"
    cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = _LEVELS[1:]
    cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME = MASKED_DECODER
    cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "multi_scale_pixel_decoder"
    cfg.MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD = 0.8
    cfg.MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD = 0.8


def _read_maskformer(config: Mapping[str, Any], cfg: CfgNode) -> None:
    decoder = config.get("decoder_config") or {}
    _require(decoder, {"model_type": "detr", **_DETR_DEFAULTS}, "decoder_config.")
    # their auxiliary loss is off where nothing is said; a missing key of the decoder means our default
    _read_keys({"use_auxiliary_loss": False, **config}, cfg, _MASKFORMER_KEYS)
    _read_keys(decoder, cfg, _DETR_KEYS)
    cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = "BasePixelDecoder"
    cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "res5"
    cfg.MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD = 0.7
    cfg.MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD = 0.8


def _read_backbone(values: Mapping[str, Any] | None, cfg: CfgNode) -> None:
    if values is None:
        raise ValueError(
            "Hugging Face config: there is no backbone_config; save the model again with a recent transformers"
        )
    where = "backbone_config."
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    kind = values.get("model_type")
    if list(values.get("out_features") or _STAGES) != _STAGES:
        raise ValueError(
            f"Hugging Face config: {where}out_features is {values['out_features']}; the heads here need {_STAGES}"
        )
    if kind in ("swin", "maskformer-swin"):
        _require(
            values,
            {key: _SWIN_DEFAULTS[key] for key in ("hidden_act", "use_absolute_embeddings", "num_channels")},
            where,
        )
        cfg.MODEL.BACKBONE.NAME = "D2SwinTransformer"
        _read_keys({**_SWIN_DEFAULTS, **values}, cfg, _SWIN_KEYS, "MODEL.SWIN.")
    elif kind == "resnet":
        _read_resnet({**_RESNET_DEFAULTS, **values}, cfg, where)
    else:
        raise ValueError(f"Hugging Face config: {where}model_type is {kind!r}; only resnet and swin can be read")


def _read_resnet(values: Mapping[str, Any], cfg: CfgNode, where: str) -> None:
    _require(values, {"hidden_act": "relu", "downsample_in_first_stage": False, "num_channels": 3}, where)
    shape = (values["layer_type"], list(values["depths"]))
    depths = [depth for depth, known in _RESNETS.items() if known == shape]
    widths = list(values["hidden_sizes"])
    if not depths or widths != [widths[0] * 2**stage for stage in range(4)]:
        raise ValueError(
            f"Hugging Face config: {where} describes a ResNet of {shape[0]} layers, depths {shape[1]} and widths "
            f"{widths}; Detectron2 has the depths {sorted(_RESNETS)} and widths that double"
        )
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    node = cfg.MODEL.RESNETS
    node.DEPTH = depths[0]
    node.STEM_TYPE = "basic"
    node.RES5_MULTI_GRID = [1, 1, 1]
    node.STEM_OUT_CHANNELS = values["embedding_size"]
    node.RES2_OUT_CHANNELS = widths[0]
    if shape[0] == "bottleneck":
        node.WIDTH_PER_GROUP = widths[0] // 4
    node.STRIDE_IN_1X1 = values["downsample_in_bottleneck"]
    node.OUT_FEATURES = _LEVELS


def _read_classes(names: list[str], cfg: CfgNode) -> None:
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(names)
    train, test, tasks = _PUBLISHED.get(len(names), ("", "", ()))
    if not (test and _same_classes(names, test)):
        train = test = f"huggingface_{len(names)}_classes_{zlib.crc32(chr(0).join(names).encode()):08x}"
        tasks = ("SEMANTIC",)
        cfg.DATASETS.CUSTOM[test] = CfgNode({"FORMAT": "class_names", "CLASSES": _distinct(names)})
        register_custom_datasets(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (train,), (test,)
    for task in ("SEMANTIC", "INSTANCE", "PANOPTIC"):
        cfg.MODEL.MASK_FORMER.TEST[f"{task}_ON"] = task in tasks


def _distinct(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names)]


def _same_classes(names: list[str], dataset: str) -> bool:
    """Whether most names agree; two lists of the same classes differ in synonyms and spaces."""
    known = _names_of(dataset, len(names))
    pairs = [[name.split(",")[0].strip().lower() for name in pair] for pair in zip(names, known or [])]
    return 2 * sum(one == other for one, other in pairs) > len(names)


def _names_of(dataset: str, count: int) -> list[str] | None:
    if dataset not in DatasetCatalog.list():
        return None
    metadata = MetadataCatalog.get(dataset)
    for key in ("stuff_classes", "thing_classes"):
        names = metadata.get(key, None)
        if names is not None and len(names) == count:
            return list(names)
    return None


def _read_preprocessor(values: Mapping[str, Any], cfg: CfgNode) -> None:
    scale = 1.0 / values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0
    for theirs, ours in (("image_mean", "PIXEL_MEAN"), ("image_std", "PIXEL_STD")):
        if values.get("do_normalize", True) and values.get(theirs):
            cfg.MODEL[ours] = [round(value * scale, 6) for value in values[theirs]]
    _read_test_size(values, cfg)
    divisor = values.get("size_divisor", values.get("size_divisibility"))
    if divisor:
        cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY = divisor


def _read_test_size(values: Mapping[str, Any], cfg: CfgNode) -> None:
    size = values.get("size")
    if isinstance(size, int):  # files of the first releases
        size = {"shortest_edge": size, "longest_edge": values.get("max_size")}
    if not values.get("do_resize", True):
        cfg.INPUT.MIN_SIZE_TEST = 0
    elif size and "shortest_edge" in size:
        cfg.INPUT.MIN_SIZE_TEST = size["shortest_edge"]
        cfg.INPUT.MAX_SIZE_TEST = size.get("longest_edge") or _NO_LIMIT
    elif size:
        logger.info(
            "The Hugging Face processor squeezes every image into %s; here images keep their shape, with "
            "INPUT.MIN_SIZE_TEST %d and INPUT.MAX_SIZE_TEST %d",
            dict(size), cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST,
        )  # fmt: skip


# ---- ours to theirs ----


def to_hf_config(cfg: CfgNode) -> dict[str, Any]:
    """Hugging Face's config of a model of ours, as it stands in ``config.json``.

    The names of the classes come from the metadata of ``DATASETS.TRAIN`` or ``DATASETS.TEST``.

    Raises:
        ValueError: Hugging Face has no such model; the text names the key.
    """
    model = cfg.MODEL
    _check(cfg, "MODEL.META_ARCHITECTURE", "MaskFormer")
    _check(cfg, "MODEL.SEM_SEG_HEAD.NAME", "MaskFormerHead")
    _check(cfg, "MODEL.SEM_SEG_HEAD.NORM", "GN")
    if list(model.SEM_SEG_HEAD.IN_FEATURES) != _LEVELS:
        raise _not_theirs("MODEL.SEM_SEG_HEAD.IN_FEATURES", model.SEM_SEG_HEAD.IN_FEATURES, _LEVELS)
    names = _class_names_of(cfg)
    result: dict[str, Any] = {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "init_std": 0.02,
        "init_xavier_std": 1.0,
    }
    if model.MASK_FORMER.TRANSFORMER_DECODER_NAME == MASKED_DECODER:
        result |= _write_mask2former(cfg)
    else:
        result |= _write_maskformer(cfg)
    return result


def _not_theirs(key: str, value: Any, wanted: Any) -> ValueError:
    return ValueError(f"{key} is {value!r}; Hugging Face's models have only {wanted!r}")


def _check(cfg: CfgNode, key: str, wanted: Any) -> None:
    value = _get(cfg, key)
    if value != wanted:
        raise _not_theirs(key, value, wanted)


def _class_names_of(cfg: CfgNode) -> list[str]:
    count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    for dataset in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        names = _names_of(dataset, count)
        if names is not None:
            return names
    return [f"LABEL_{number}" for number in range(count)]


def _write_mask2former(cfg: CfgNode) -> dict[str, Any]:
    _check(cfg, "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "MSDeformAttnPixelDecoder")
    _check(cfg, "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", _LEVELS[1:])
    return {
        "model_type": MASK2FORMER,
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "backbone_config": _write_backbone(cfg),
        "feature_strides": _MASK2FORMER_DEFAULTS["feature_strides"],
        "encoder_feedforward_dim": _ENCODER_FEEDFORWARD,
        "activation_function": "relu",
        **{theirs: _get(cfg, ours) for theirs, ours in _MASK2FORMER_KEYS},
    }


def _write_maskformer(cfg: CfgNode) -> dict[str, Any]:
    _check(cfg, "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", STANDARD_DECODER)
    _check(cfg, "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "BasePixelDecoder")
    _check(cfg, "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "res5")
    _check(cfg, "MODEL.MASK_FORMER.ENC_LAYERS", 0)
    _check(cfg, "MODEL.MASK_FORMER.PRE_NORM", False)
    backbone = _write_backbone(cfg)
    channels = 8 * backbone["embed_dim"] if "embed_dim" in backbone else backbone["hidden_sizes"][-1]
    if channels == cfg.MODEL.MASK_FORMER.HIDDEN_DIM:  # else both sides have a projection anyway
        _check(cfg, "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ", False)
    decoder = {"model_type": "detr", **_DETR_DEFAULTS, **{theirs: _get(cfg, ours) for theirs, ours in _DETR_KEYS}}
    return {
        "model_type": MASKFORMER,
        "architectures": ["MaskFormerForInstanceSegmentation"],
        "backbone_config": backbone,
        "decoder_config": decoder,
        **{theirs: _get(cfg, ours) for theirs, ours in _MASKFORMER_KEYS},
    }


def _write_backbone(cfg: CfgNode) -> dict[str, Any]:
    model = cfg.MODEL
    result: dict[str, Any] = {"out_features": _STAGES, "num_channels": 3}
    if model.BACKBONE.NAME == "D2SwinTransformer":
        for key, wanted in (("APE", False), ("PATCH_NORM", True), ("QK_SCALE", None), ("OUT_FEATURES", _LEVELS)):
            _check(cfg, f"MODEL.SWIN.{key}", wanted)
        fixed = {"model_type": "swin", "hidden_act": "gelu", "use_absolute_embeddings": False}
        return {**result, **fixed, **{theirs: _get(cfg, f"MODEL.SWIN.{ours}") for theirs, ours in _SWIN_KEYS}}
    _check(cfg, "MODEL.BACKBONE.NAME", "build_resnet_backbone")
    resnet = model.RESNETS
    layer_type, depths = _RESNETS[resnet.DEPTH]
    fixed = {"NUM_GROUPS": 1, "RES5_DILATION": 1, "OUT_FEATURES": _LEVELS}
    if layer_type == "bottleneck":
        fixed["WIDTH_PER_GROUP"] = resnet.RES2_OUT_CHANNELS // 4
    for key, wanted in fixed.items():
        _check(cfg, f"MODEL.RESNETS.{key}", wanted)
    if "BN" not in resnet.NORM:
        raise _not_theirs("MODEL.RESNETS.NORM", resnet.NORM, "batch norm")
    return {
        **result,
        "model_type": "resnet",
        "embedding_size": resnet.STEM_OUT_CHANNELS,
        "hidden_sizes": [resnet.RES2_OUT_CHANNELS * 2**stage for stage in range(4)],
        "depths": depths,
        "layer_type": layer_type,
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": resnet.STRIDE_IN_1X1,
    }


def to_hf_preprocessor(cfg: CfgNode) -> dict[str, Any]:
    """Content of ``preprocessor_config.json``: pixel statistics and test size of a config of ours.

    Raises:
        ValueError: the model reads BGR, which Hugging Face's processors do not give.
    """
    _check(cfg, "INPUT.FORMAT", "RGB")
    masked = cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME == MASKED_DECODER
    divisor = cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY
    if divisor < 0:  # that of the backbone
        divisor = 32 if cfg.MODEL.BACKBONE.NAME == "D2SwinTransformer" else 1
    size = {"shortest_edge": cfg.INPUT.MIN_SIZE_TEST}
    if cfg.INPUT.MAX_SIZE_TEST < _NO_LIMIT:
        size["longest_edge"] = cfg.INPUT.MAX_SIZE_TEST
    return {
        "image_processor_type": "Mask2FormerImageProcessor" if masked else "MaskFormerImageProcessor",
        "do_resize": cfg.INPUT.MIN_SIZE_TEST > 0,
        **({"size": size} if cfg.INPUT.MIN_SIZE_TEST > 0 else {}),
        "size_divisor": max(divisor, 1),
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [round(value / 255, 6) for value in cfg.MODEL.PIXEL_MEAN],
        "image_std": [round(value / 255, 6) for value in cfg.MODEL.PIXEL_STD],
        "ignore_index": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        "do_reduce_labels": False,
        "num_labels": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
    }
