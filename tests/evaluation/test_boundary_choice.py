"""The switches of ``TEST`` that add evaluators."""

import json
import logging

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOPanopticEvaluator, DatasetEvaluators, SemSegEvaluator

from mask2former_plugin.config import load_config
from mask2former_plugin.evaluation import (
    BoundaryCOCOEvaluator,
    BoundaryInstanceSegEvaluator,
    BoundaryPanopticEvaluator,
    RunLengthCOCOEvaluator,
    SemanticPQEvaluator,
    build_evaluator,
)

NAME = "boundary_choice_test"
ALL_TASKS = [f"MODEL.MASK_FORMER.TEST.{task}_ON" for task in ("SEMANTIC", "INSTANCE", "PANOPTIC")]


@pytest.fixture
def kinds_for(tmp_path):
    """The classes of evaluators that a dataset of an evaluator type gets under the given overrides."""
    truth = tmp_path / "truth.json"
    categories = [{"id": 3, "name": "cup", "isthing": 1}]
    truth.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    DatasetCatalog.register(NAME, lambda: [{"file_name": "1.jpg", "sem_seg_file_name": "1.png"}])

    def kinds(evaluator_type, *opts):
        MetadataCatalog.pop(NAME, None)
        MetadataCatalog.get(NAME).set(
            evaluator_type=evaluator_type,
            json_file=str(truth),
            panoptic_json=str(truth),
            panoptic_root=str(tmp_path),
            sem_seg_root=str(tmp_path),
            ignore_label=255,
            label_divisor=1000,
            stuff_classes=["cup"],
            thing_classes=["cup"],
            thing_dataset_id_to_contiguous_id={3: 0},
            stuff_dataset_id_to_contiguous_id={3: 0},
            gt_dir=str(tmp_path),
        )
        on = [word for task in ALL_TASKS for word in (task, "True")]
        evaluator = build_evaluator(load_config(opts=["OUTPUT_DIR", str(tmp_path), *on, *opts]), NAME)
        return [type(e) for e in getattr(evaluator, "_evaluators", [evaluator])], evaluator

    yield kinds
    DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME, None)


def test_off_by_default(kinds_for):
    assert kinds_for("coco_panoptic_seg")[0] == [COCOPanopticEvaluator, SemSegEvaluator, RunLengthCOCOEvaluator]


@pytest.mark.parametrize(
    "evaluator_type, instances",
    [
        ("coco_panoptic_seg", BoundaryCOCOEvaluator),
        ("ade20k_panoptic_seg", BoundaryInstanceSegEvaluator),
        ("mapillary_vistas_panoptic_seg", BoundaryInstanceSegEvaluator),
    ],
)
def test_boundary_adds_pq_and_ap(kinds_for, evaluator_type, instances):
    kinds, evaluator = kinds_for(evaluator_type, "TEST.BOUNDARY", "True", "TEST.BOUNDARY_DILATION_RATIO", "0.01")
    assert kinds == [COCOPanopticEvaluator, BoundaryPanopticEvaluator, SemSegEvaluator, instances]
    assert isinstance(evaluator, DatasetEvaluators)
    assert [e._dilation_ratio for e in evaluator._evaluators if hasattr(e, "_dilation_ratio")] == [0.01, 0.01]


def test_boundary_ap_of_instance_datasets(kinds_for):
    assert kinds_for("coco", "TEST.BOUNDARY", "True")[0] == [BoundaryCOCOEvaluator]


def test_semantic_pq(kinds_for):
    assert kinds_for("sem_seg", "TEST.SEMANTIC_PQ", "True")[0] == [SemSegEvaluator, SemanticPQEvaluator]


def test_cityscapes_instances_have_no_boundary_ap(kinds_for, caplog):
    pytest.importorskip("cityscapesscripts")
    with caplog.at_level(logging.WARNING, logger="mask2former_plugin"):
        opts = ["TEST.BOUNDARY", "True", ALL_TASKS[1], "False"]
        assert kinds_for("cityscapes_panoptic_seg", *opts)[0][:2] == [COCOPanopticEvaluator, BoundaryPanopticEvaluator]
        assert "no boundary AP" not in caplog.text
        kinds_for("cityscapes_instance", "TEST.BOUNDARY", "True")
    assert f"no boundary AP for {NAME}" in caplog.text
