"""Training mappers by the names of ``INPUT.DATASET_MAPPER_NAME``."""

from __future__ import annotations

from detectron2.config import CfgNode

from mask2former_plugin.data.mappers.base import TrainingMapper
from mask2former_plugin.data.mappers.detr import DETRPanopticDatasetMapper
from mask2former_plugin.data.mappers.instance import MaskFormerInstanceDatasetMapper
from mask2former_plugin.data.mappers.large_scale_jitter import (
    COCOInstanceNewBaselineDatasetMapper,
    COCOPanopticNewBaselineDatasetMapper,
)
from mask2former_plugin.data.mappers.panoptic import MaskFormerPanopticDatasetMapper
from mask2former_plugin.data.mappers.semantic import MaskFormerSemanticDatasetMapper
from mask2former_plugin.data.names import unknown_name

MAPPERS: dict[str, type[TrainingMapper]] = {
    "mask_former_semantic": MaskFormerSemanticDatasetMapper,
    "mask_former_panoptic": MaskFormerPanopticDatasetMapper,
    "mask_former_instance": MaskFormerInstanceDatasetMapper,
    "coco_instance_lsj": COCOInstanceNewBaselineDatasetMapper,
    "coco_panoptic_lsj": COCOPanopticNewBaselineDatasetMapper,
    "detr_panoptic": DETRPanopticDatasetMapper,
}


def build_mapper(cfg: CfgNode, is_train: bool = True) -> TrainingMapper:
    """The mapper that ``INPUT.DATASET_MAPPER_NAME`` names.

    Raises:
        ValueError: no mapper has this name; the message lists the names, the nearest first.
    """
    name = cfg.INPUT.DATASET_MAPPER_NAME
    if name not in MAPPERS:
        raise ValueError(unknown_name("INPUT.DATASET_MAPPER_NAME", name, MAPPERS))
    return MAPPERS[name](cfg, is_train)


__all__ = ["MAPPERS", "TrainingMapper", "build_mapper", *(mapper.__name__ for mapper in MAPPERS.values())]
