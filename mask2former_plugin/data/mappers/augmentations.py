"""Augmentation lists of the published recipes, in the published order of random draws."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.projects.point_rend import ColorAugSSDTransform


def resize_short_edge(cfg: CfgNode) -> T.Augmentation:
    """Resize to a short edge drawn from ``INPUT.MIN_SIZE_TRAIN``, at most ``INPUT.MAX_SIZE_TRAIN`` long."""
    return T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING)


def resize_crop_flip(cfg: CfgNode, *, category_aware: bool) -> list:
    """Resize, crop if ``INPUT.CROP.ENABLED``, colour jitter if ``INPUT.COLOR_AUG_SSD``, horizontal flip.

    Args:
        category_aware: the crop avoids that one category fills more than ``INPUT.CROP.SINGLE_CATEGORY_MAX_AREA`` of it.
    """
    augmentations: list = [resize_short_edge(cfg)]
    crop = cfg.INPUT.CROP
    if crop.ENABLED and category_aware:
        augmentations.append(
            T.RandomCrop_CategoryAreaConstraint(
                crop.TYPE, crop.SIZE, crop.SINGLE_CATEGORY_MAX_AREA, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
            )
        )
    elif crop.ENABLED:
        augmentations.append(T.RandomCrop(crop.TYPE, crop.SIZE))
    if cfg.INPUT.COLOR_AUG_SSD:
        augmentations.append(ColorAugSSDTransform(img_format=cfg.INPUT.FORMAT))
    augmentations.append(T.RandomFlip())
    return augmentations


def large_scale_jitter(cfg: CfgNode) -> list[T.Augmentation]:
    """Flip, resize by ``INPUT.MIN_SCALE`` .. ``MAX_SCALE`` of ``INPUT.IMAGE_SIZE``, crop or pad to that square (LSJ).

    Source: Ghiasi et al. 2021, "Simple Copy-Paste", as used for COCO by Mask2Former.
    """
    side = cfg.INPUT.IMAGE_SIZE
    augmentations: list[T.Augmentation] = []
    if cfg.INPUT.RANDOM_FLIP != "none":
        horizontal = cfg.INPUT.RANDOM_FLIP == "horizontal"
        augmentations.append(T.RandomFlip(horizontal=horizontal, vertical=cfg.INPUT.RANDOM_FLIP == "vertical"))
    augmentations.append(
        T.ResizeScale(
            min_scale=cfg.INPUT.MIN_SCALE, max_scale=cfg.INPUT.MAX_SCALE, target_height=side, target_width=side
        )
    )
    augmentations.append(T.FixedSizeCrop(crop_size=(side, side)))
    return augmentations


def detr_crop(cfg: CfgNode) -> list[T.Augmentation] | None:
    """Resize and crop that half of the images get before the final resize; None without ``INPUT.CROP.ENABLED``."""
    if not cfg.INPUT.CROP.ENABLED:
        return None
    return [
        T.ResizeShortestEdge([400, 500, 600], sample_style="choice"),
        T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE),
    ]


def detr_flip_resize(cfg: CfgNode) -> list[T.Augmentation]:
    """Horizontal flip and short-edge resize of DETR (Carion et al. 2020)."""
    return [T.RandomFlip(), resize_short_edge(cfg)]
