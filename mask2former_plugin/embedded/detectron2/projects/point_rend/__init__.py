"""PointRend: sampling of features at points and the colour augmentation; its heads need upstream Detectron2."""

from typing import NoReturn

from detectron2.config import CfgNode
from detectron2.projects.point_rend.color_augmentation import ColorAugSSDTransform
from detectron2.utils.missing import missing_name, needs_upstream

__all__ = ["ColorAugSSDTransform", "add_pointrend_config"]


def add_pointrend_config(cfg: CfgNode) -> NoReturn:
    """Needs upstream Detectron2: the keys configure heads that the embedded slice does not have."""
    needs_upstream("PointRend (add_pointrend_config)")


_UPSTREAM_ONLY = ("ImplicitPointRendMaskHead", "PointRendMaskHead", "PointRendSemSegHead")


def __getattr__(name: str) -> NoReturn:
    missing_name(__name__, _UPSTREAM_ONLY, name)
