"""Config keys of the DeepLab project."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_deeplab_config(cfg: CfgNode) -> None:
    """Add the DeepLab keys with their defaults to ``cfg``, in place."""
    # Largest share of a training crop that one class may take; 1 switches the constraint off.
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0

    cfg.SOLVER.POLY_LR_POWER = 0.9
    # Floor of the learning rate after warm-up, as a share of the base learning rate.
    cfg.SOLVER.POLY_LR_CONSTANT_ENDING = 0.0

    cfg.MODEL.RESNETS.RES4_DILATION = 1
    cfg.MODEL.RESNETS.RES5_MULTI_GRID = [1, 2, 4]
    # "deeplab" is the stem of three 3x3 convolutions, "basic" the usual 7x7 one.
    cfg.MODEL.RESNETS.STEM_TYPE = "deeplab"

    cfg.MODEL.SEM_SEG_HEAD.LOSS_TYPE = "hard_pixel_mining"
    cfg.MODEL.SEM_SEG_HEAD.PROJECT_FEATURES = ["res2"]
    cfg.MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS = [48]
    cfg.MODEL.SEM_SEG_HEAD.ASPP_CHANNELS = 256
    cfg.MODEL.SEM_SEG_HEAD.ASPP_DILATIONS = [6, 12, 18]
    cfg.MODEL.SEM_SEG_HEAD.ASPP_DROPOUT = 0.1
    cfg.MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV = False
