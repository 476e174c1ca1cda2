"""Config keys of MaskFormer and Mask2Former, and one call that reads the YAML of either project."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.projects.deeplab import add_deeplab_config

from mask2former_plugin.safe_yaml import load_config_dict

STANDARD_DECODER = "StandardTransformerDecoder"
MASKED_DECODER = "MultiScaleMaskedTransformerDecoder"
# keys that every Mask2Former file with a head carries and that MaskFormer did not know
_MASK2FORMER_KEYS = ("TRANSFORMER_DECODER_NAME", "TRAIN_NUM_POINTS", "CLASS_WEIGHT", "MASK_LOSS")


def add_maskformer2_config(cfg: CfgNode) -> None:
    """Add the keys of Mask2Former (a superset of MaskFormer's) with their published defaults, and ours, in place."""
    _add_input_keys(cfg)
    _add_solver_keys(cfg)
    _add_test_keys(cfg)
    _add_head_keys(cfg)
    _add_mask_former_keys(cfg)
    _add_inference_keys(cfg)
    _add_swin_keys(cfg)
    _add_dataset_keys(cfg)


def add_mask_former_config(cfg: CfgNode) -> None:
    """Add the same keys with the defaults of MaskFormer: standard decoder, dense focal loss, its panoptic rule; in place."""
    add_maskformer2_config(cfg)
    _use_maskformer_defaults(cfg)


def _add_input_keys(cfg: CfgNode) -> None:
    node = cfg.INPUT
    node.DATASET_MAPPER_NAME = "mask_former_semantic"
    node.COLOR_AUG_SSD = False
    node.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    node.SIZE_DIVISIBILITY = -1  # side of the fixed square that images are padded to, <= 0: none
    node.IMAGE_SIZE = 1024  # large-scale jitter
    node.MIN_SCALE = 0.1
    node.MAX_SCALE = 2.0
    node.DROP_EMPTY_MASKS = False  # True: segments that a crop has emptied are no targets


def _add_solver_keys(cfg: CfgNode) -> None:
    node = cfg.SOLVER
    node.WEIGHT_DECAY_EMBED = 0.0
    node.OPTIMIZER = "ADAMW"
    node.FUSED = True  # the optimizer's step as one pass, on CPUs and CUDA; the same update up to rounding
    node.BACKBONE_MULTIPLIER = 0.1
    node.AMP.PRECISION = "float16"  # or "bfloat16", which needs no loss scaling and runs on CPUs too


def _add_test_keys(cfg: CfgNode) -> None:
    node = cfg.TEST
    node.BEST_CHECKPOINT = CfgNode({"METRIC": "", "MODE": "max"})  # e.g. "panoptic_seg/PQ": keeps model_best.pth
    node.BOUNDARY = False  # True: boundary AP and boundary PQ beside AP and PQ
    node.BOUNDARY_DILATION_RATIO = 0.02  # width of the boundary in parts of the diagonal; Cityscapes: 0.005
    node.SEMANTIC_PQ = False  # True: PQ of semantic predictions beside mIoU
    node.LIGHT_OUTPUTS = True  # evaluation lets the model give label maps and run lengths where all evaluators take them


def _add_head_keys(cfg: CfgNode) -> None:
    node = cfg.MODEL.SEM_SEG_HEAD
    node.MASK_DIM = 256
    node.TRANSFORMER_ENC_LAYERS = 0
    node.PIXEL_DECODER_NAME = "BasePixelDecoder"
    node.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = ["res3", "res4", "res5"]
    # published, but read by nobody: the originals fix 4 points and take the heads from MASK_FORMER.NHEADS
    node.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS = 4
    node.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS = 8
    node.USE_CHECKPOINT = False  # True: recompute the pixel decoder's encoder layers in the backward pass


def _add_mask_former_keys(cfg: CfgNode) -> None:
    # True: recompute residual or Swin blocks in the backward pass; for Swin the same as SWIN.USE_CHECKPOINT
    cfg.MODEL.BACKBONE.USE_CHECKPOINT = False
    # True: training keeps fewer activations and runs cheap steps again in the backward pass; the same up to rounding
    cfg.MODEL.LEAN_TRAINING = True
    cfg.MODEL.KEEP_FREED_MEMORY = True  # on a CPU the process stays at its peak memory, and a third faster for it
    cfg.MODEL.ALLOW_RANDOM_WEIGHTS = False  # True: evaluate a model even if MODEL.WEIGHTS leaves weights random
    cfg.MODEL.MASK_FORMER = CfgNode(
        {
            "USE_CHECKPOINT": False,  # True: recompute the decoder's layers in the backward pass, which saves memory
            "DEEP_SUPERVISION": True,
            "NO_OBJECT_WEIGHT": 0.1,
            "CLASS_WEIGHT": 1.0,
            "DICE_WEIGHT": 1.0,
            "MASK_WEIGHT": 20.0,
            "MASK_LOSS": "point",  # "point": Mask2Former's sampled BCE + dice, "dense": MaskFormer's focal + dice
            "NHEADS": 8,
            "DROPOUT": 0.1,
            "DIM_FEEDFORWARD": 2048,
            "ENC_LAYERS": 0,
            "DEC_LAYERS": 6,
            "PRE_NORM": False,
            "HIDDEN_DIM": 256,
            "NUM_OBJECT_QUERIES": 100,
            "TRANSFORMER_DECODER_NAME": MASKED_DECODER,
            "TRANSFORMER_IN_FEATURE": "res5",
            "ENFORCE_INPUT_PROJ": False,
            "SIZE_DIVISIBILITY": 32,
            "TRAIN_NUM_POINTS": 112 * 112,
            "OVERSAMPLE_RATIO": 3.0,
            "IMPORTANCE_SAMPLE_RATIO": 0.75,
            "TEST": {
                "SEMANTIC_ON": True,
                "INSTANCE_ON": False,
                "PANOPTIC_ON": False,
                "OBJECT_MASK_THRESHOLD": 0.0,
                "OVERLAP_THRESHOLD": 0.0,
                "SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": False,
                "PANOPTIC_REQUIRE_MASK": True,  # a segment's pixels need probability >= 0.5 (Mask2Former), not only the best score
                "INSTANCE_THINGS_FIRST": False,  # True: top-k among thing classes; published: top-k first, then drop stuff
                "SEMANTIC_LABEL_MAP": False,  # True: sem_seg is the map of the best classes, never scores of all of them
                "INSTANCE_RUN_LENGTHS": False,  # True: instances have pred_masks_rle (COCO) instead of dense pred_masks
                # larger images are inferred in windows; sizes in pixels of the network's input, see docs/large_images.md
                "WINDOW": {"ENABLED": False, "SIZE": [1024, 1024], "OVERLAP": 256},
            },
        }
    )


def _add_inference_keys(cfg: CfgNode) -> None:
    cfg.MODEL.INFERENCE = CfgNode(
        {
            # True: predictor and evaluation use a copy of the model with folded norms and fused steps; equal up to rounding
            "OPTIMIZE": True,
            "PRECISION": "float32",  # of the network: "bfloat16" is about twice as fast on CPUs that have it, "float16" is for GPUs
            "COMPILE": False,  # True: torch.compile, which needs a C++ compiler and minutes before the first result
        }
    )


def _add_swin_keys(cfg: CfgNode) -> None:
    cfg.MODEL.SWIN = CfgNode(
        {
            "PRETRAIN_IMG_SIZE": 224,
            "PATCH_SIZE": 4,
            "EMBED_DIM": 96,
            "DEPTHS": [2, 2, 6, 2],
            "NUM_HEADS": [3, 6, 12, 24],
            "WINDOW_SIZE": 7,
            "MLP_RATIO": 4.0,
            "QKV_BIAS": True,
            "QK_SCALE": None,
            "DROP_RATE": 0.0,
            "ATTN_DROP_RATE": 0.0,
            "DROP_PATH_RATE": 0.3,
            "APE": False,
            "PATCH_NORM": True,
            "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
            "USE_CHECKPOINT": False,
        }
    )


def _add_dataset_keys(cfg: CfgNode) -> None:
    # dataset name -> {FORMAT, IMAGES, …}; see mask2former_plugin/data/datasets/custom.py
    cfg.DATASETS.CUSTOM = CfgNode(new_allowed=True)


def _use_maskformer_defaults(cfg: CfgNode) -> None:
    cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME = STANDARD_DECODER
    cfg.MODEL.MASK_FORMER.MASK_LOSS = "dense"
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_REQUIRE_MASK = False


def is_maskformer_file(values: Mapping[str, Any]) -> bool:
    """True if the values of a YAML (bases resolved) are those of a MaskFormer (not Mask2Former) model.

    MaskFormer's published files configure ``MODEL.MASK_FORMER`` without naming a decoder or any key that came with Mask2Former.
    """
    section = values.get("MODEL", {}).get("MASK_FORMER")
    return isinstance(section, Mapping) and not any(key in section for key in _MASK2FORMER_KEYS)


def load_config(config_file: str | Path | None = None, opts: Sequence[str] = ()) -> CfgNode:
    """Read a YAML of MaskFormer, Mask2Former or this package, then ``KEY VALUE`` overrides.

    Args:
        config_file: path of the YAML, ``_BASE_`` is followed; None gives the defaults. The folder of a Hugging Face MaskFormer or
            Mask2Former, or its ``config.json``, gives the config of that model, and its weights.
        opts: alternating dotted keys and values, as on the command line.

    Returns:
        A config that is not frozen.

    Raises:
        KeyError: a key does not exist; the message names the file and the nearest known key.
        ValueError: a value has the wrong type, or ``opts`` does not hold pairs.
    """
    if config_file and _is_huggingface(Path(config_file)):
        from mask2former_plugin.checkpoint.huggingface import load_hf_config

        cfg = load_hf_config(config_file)
        _merge_overrides(cfg, list(opts))
        return cfg
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    if config_file is not None and str(config_file):
        values = load_config_dict(config_file)
        _check_known(values, cfg, str(config_file))
        if is_maskformer_file(values):
            _use_maskformer_defaults(cfg)
        try:
            cfg.merge_from_other_cfg(CfgNode(values))
        except ValueError as error:
            raise ValueError(f"{config_file}: {error}") from error
    _merge_overrides(cfg, list(opts))
    return cfg


def _is_huggingface(path: Path) -> bool:
    return path.is_dir() or path.name == "config.json"


def differing_keys(first: CfgNode, second: CfgNode) -> list[str]:
    """Dotted keys whose values differ, or that only one of the configs has."""
    one, other = dict(_leaf_items(first)), dict(_leaf_items(second))
    return sorted(key for key in one.keys() | other.keys() if key not in one or key not in other or not _equal(one[key], other[key]))


def _equal(one: Any, other: Any) -> bool:
    # a tuple comes back from a dumped YAML as a list
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


def _merge_overrides(cfg: CfgNode, opts: list[str]) -> None:
    if len(opts) % 2:
        raise ValueError(f"overrides are pairs of KEY VALUE, got an odd number of words: {' '.join(map(str, opts))}")
    for key, value in zip(opts[::2], opts[1::2]):
        if not _exists(cfg, key):
            raise KeyError(_unknown(key, cfg, "command line"))
        cfg.merge_from_list([key, value])


def _exists(cfg: CfgNode, dotted: str) -> bool:
    node: Any = cfg
    for part in dotted.split("."):
        if not isinstance(node, CfgNode):
            return False
        if part not in node:
            return node.is_new_allowed()
        node = node[part]
    return True


def _check_known(values: Mapping[str, Any], cfg: CfgNode, source: str) -> None:
    for key in _leaves(values):
        if not _exists(cfg, key):
            raise KeyError(_unknown(key, cfg, source))


def _leaf_items(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaf_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _leaves(values: Mapping[str, Any]) -> list[str]:
    return [key for key, _ in _leaf_items(values)]


def _unknown(key: str, cfg: CfgNode, source: str) -> str:
    near = difflib.get_close_matches(key, _leaves(cfg), n=1, cutoff=0.5)
    hint = f", did you mean {near[0]}?" if near else ""
    return f"{source}: unknown config key {key}{hint}"
