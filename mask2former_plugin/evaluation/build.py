"""Chooses the evaluators of a dataset from its metadata and the tasks that are switched on."""

from __future__ import annotations

import logging
import os

from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from detectron2.utils.file_io import PathManager

from mask2former_plugin.evaluation.boundary_ap import BoundaryCOCOEvaluator, BoundaryInstanceSegEvaluator
from mask2former_plugin.evaluation.instance_evaluation import (
    InstanceSegEvaluator,
    RunLengthCOCOEvaluator,
    RunLengthLVISEvaluator,
)
from mask2former_plugin.evaluation.panoptic_evaluation import BoundaryPanopticEvaluator
from mask2former_plugin.evaluation.semantic_pq import SemanticPQEvaluator

logger = logging.getLogger(__name__)

KNOWN_TYPES = (
    "sem_seg",
    "coco",
    "coco_panoptic_seg",
    "ade20k_panoptic_seg",
    "mapillary_vistas_panoptic_seg",
    "cityscapes_instance",
    "cityscapes_sem_seg",
    "cityscapes_panoptic_seg",
    "lvis",
)


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
    """Evaluator(s) of one dataset.

    ``MetadataCatalog.get(dataset_name).evaluator_type`` names the kind; the flags of
    ``MODEL.MASK_FORMER.TEST`` say which tasks of a panoptic dataset are evaluated, as in the published
    ``train_net.py``. ``TEST.BOUNDARY`` adds boundary AP (``segm_boundary``) and boundary PQ
    (``panoptic_seg_boundary``), ``TEST.SEMANTIC_PQ`` the PQ of semantic predictions (``sem_seg_pq``).

    Args:
        output_folder: where predictions are written, default ``OUTPUT_DIR/inference``.

    Raises:
        ValueError: the dataset has no evaluator type that is known here, or no task of it is switched on.
    """
    output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    metadata = MetadataCatalog.get(dataset_name)
    kind = metadata.get("evaluator_type")
    tasks = cfg.MODEL.MASK_FORMER.TEST
    evaluators: list[DatasetEvaluator] = []
    if kind == "sem_seg":
        evaluators += _semantic(cfg, dataset_name, output_folder)
    elif kind == "coco":
        evaluators.append(_instances(cfg, dataset_name, output_folder, RunLengthCOCOEvaluator, BoundaryCOCOEvaluator))
    elif kind == "lvis":
        _warn_no_boundary(cfg, dataset_name)
        evaluators.append(RunLengthLVISEvaluator(dataset_name, output_dir=output_folder))
    elif kind == "cityscapes_instance":
        _warn_no_boundary(cfg, dataset_name)
        evaluators.append(CityscapesInstanceEvaluator(dataset_name))
    elif kind == "cityscapes_sem_seg":
        evaluators.append(CityscapesSemSegEvaluator(dataset_name))
    elif kind == "cityscapes_panoptic_seg":
        if tasks.PANOPTIC_ON:
            evaluators += _panoptic(cfg, dataset_name, output_folder)
        if tasks.SEMANTIC_ON:
            evaluators.append(CityscapesSemSegEvaluator(dataset_name))
        if tasks.INSTANCE_ON:
            _warn_no_boundary(cfg, dataset_name)
            evaluators.append(CityscapesInstanceEvaluator(dataset_name))
    elif kind in ("coco_panoptic_seg", "ade20k_panoptic_seg", "mapillary_vistas_panoptic_seg"):
        if tasks.PANOPTIC_ON:
            evaluators += _panoptic(cfg, dataset_name, output_folder)
        # COCO panoptic without semantic PNGs (as MaskFormer's files use it) and Mapillary without instance json have
        # less to compare with
        if tasks.SEMANTIC_ON and _has(metadata, "sem_seg_root", "mIoU"):
            evaluators += _semantic(cfg, dataset_name, output_folder)
        if tasks.INSTANCE_ON and _has(metadata, "json_file", "AP"):
            classes = (RunLengthCOCOEvaluator, BoundaryCOCOEvaluator)
            if kind != "coco_panoptic_seg":
                classes = (InstanceSegEvaluator, BoundaryInstanceSegEvaluator)
            evaluators.append(_instances(cfg, dataset_name, output_folder, *classes))
    else:
        raise ValueError(
            f"dataset {dataset_name!r} has evaluator_type {kind!r}; known are {', '.join(KNOWN_TYPES)}. "
            f"Set MetadataCatalog.get({dataset_name!r}).evaluator_type, or override Trainer.build_evaluator"
        )
    if not evaluators:
        raise ValueError(
            f"nothing to evaluate on {dataset_name!r} (evaluator_type {kind!r}): switch on SEMANTIC_ON, INSTANCE_ON "
            "or PANOPTIC_ON of MODEL.MASK_FORMER.TEST, as far as the dataset has such ground truth"
        )
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def _semantic(cfg: CfgNode, dataset_name: str, output_folder: str) -> list[DatasetEvaluator]:
    evaluators: list[DatasetEvaluator] = [SemSegEvaluator(dataset_name, distributed=True, output_dir=output_folder)]
    if cfg.TEST.SEMANTIC_PQ:
        evaluators.append(SemanticPQEvaluator(dataset_name))
    return evaluators


def _panoptic(cfg: CfgNode, dataset_name: str, output_folder: str) -> list[DatasetEvaluator]:
    evaluators: list[DatasetEvaluator] = [COCOPanopticEvaluator(dataset_name, output_folder)]
    if cfg.TEST.BOUNDARY:
        evaluators.append(BoundaryPanopticEvaluator(dataset_name, cfg.TEST.BOUNDARY_DILATION_RATIO))
    return evaluators


def _instances(
    cfg: CfgNode, dataset_name: str, output_folder: str, plain: type[COCOEvaluator], boundary: type[COCOEvaluator]
) -> COCOEvaluator:
    if not cfg.TEST.BOUNDARY:
        return plain(dataset_name, output_dir=output_folder)
    return boundary(dataset_name, output_dir=output_folder, dilation_ratio=cfg.TEST.BOUNDARY_DILATION_RATIO)


def _warn_no_boundary(cfg: CfgNode, dataset_name: str) -> None:
    if cfg.TEST.BOUNDARY:
        logger.warning("TEST.BOUNDARY: no boundary AP for %s, whose own scripts compute AP", dataset_name)


def _has(metadata: Metadata, key: str, metric: str) -> bool:
    path = metadata.get(key)
    if path and not PathManager.exists(path):
        raise FileNotFoundError(
            f"dataset {metadata.name!r}: its {key} {path}, needed for {metric}, does not exist; datasets/README.md says how it is made"
        )
    if path:
        return True
    logger.info("No %s for %s: its metadata has no %s", metric, metadata.name, key)
    return False
