"""Real input: two COCO images with panoptic and instance ground truth, if they lie beside the repository."""

import json
import os
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image

from mask2former_plugin.config import load_config
from mask2former_plugin.data.datasets.custom import check_num_classes, register_custom_datasets
from mask2former_plugin.data.mappers import build_mapper
from mask2former_plugin.engine import Trainer
from ground_truth import evaluate_ground_truth

SAMPLE = Path(
    os.environ.get("COCO_PANOPTIC_SAMPLE")
    or Path(__file__).resolve().parents[2].parent / "shared" / "data" / "coco_panoptic_sample"
)
pytestmark = pytest.mark.skipif(not SAMPLE.is_dir(), reason="no COCO sample: set COCO_PANOPTIC_SAMPLE to its folder")
NAME = "coco_sample"


@pytest.fixture
def cfg(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"""
DATASETS:
  CUSTOM:
    {NAME}:
      FORMAT: coco_panoptic
      IMAGES: {SAMPLE}/val2017
      PANOPTIC_JSON: {SAMPLE}/annotations/panoptic_val2017.json
      PANOPTIC_ROOT: {SAMPLE}/annotations/panoptic_val2017
      INSTANCES_JSON: {SAMPLE}/annotations/instances_from_panoptic_val2017.json
    {NAME}_instances:
      FORMAT: coco_instances
      IMAGES: {SAMPLE}/val2017
      JSON: {SAMPLE}/annotations/instances_from_panoptic_val2017.json
  TRAIN: ("{NAME}",)
MODEL: {{SEM_SEG_HEAD: {{NUM_CLASSES: 133}}}}
INPUT: {{FORMAT: RGB, MIN_SIZE_TRAIN: [300], IMAGE_SIZE: 512, MIN_SCALE: 1.0, MAX_SCALE: 1.0, DROP_EMPTY_MASKS: True}}
OUTPUT_DIR: {tmp_path}/output
""")
    cfg = load_config(path)
    register_custom_datasets(cfg)
    yield cfg
    for name in (NAME, f"{NAME}_instances"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_class_order_is_that_of_detectron2(cfg):
    metadata, built_in = MetadataCatalog.get(NAME), MetadataCatalog.get("coco_2017_val_panoptic")
    assert metadata.stuff_classes == built_in.stuff_classes
    assert metadata.thing_dataset_id_to_contiguous_id == built_in.thing_dataset_id_to_contiguous_id
    check_num_classes(cfg)


@pytest.mark.parametrize("mapper_name", ["mask_former_panoptic", "coco_panoptic_lsj", "detr_panoptic"])
def test_panoptic_mappers(cfg, mapper_name):
    """Without a crop no segment gets lost: classes as in the JSON, areas as in the JSON times the scale."""
    annotations = json.loads((SAMPLE / "annotations/panoptic_val2017.json").read_text())["annotations"]
    ids = MetadataCatalog.get(NAME).stuff_dataset_id_to_contiguous_id
    cfg.INPUT.DATASET_MAPPER_NAME = mapper_name
    mapper = build_mapper(cfg)
    for sample, annotation in zip(DatasetCatalog.get(NAME), annotations):
        result = mapper(sample)
        segments = [s for s in annotation["segments_info"] if not s["iscrowd"]]
        instances = result["instances"]
        assert instances.gt_classes.tolist() == [ids[s["category_id"]] for s in segments]
        # resized the image is as large as the union of all segments' boxes says: compare by the share of all segments
        areas = instances.gt_masks.flatten(1).sum(1).double()
        expected = torch.tensor([s["area"] for s in segments], dtype=torch.float64)
        torch.testing.assert_close(areas / areas.sum(), expected / expected.sum(), rtol=0.1, atol=2e-4)


@pytest.mark.parametrize("mapper_name", ["mask_former_instance", "coco_instance_lsj"])
def test_instance_mappers_read_rle(cfg, mapper_name):
    cfg.INPUT.DATASET_MAPPER_NAME = mapper_name
    mapper = build_mapper(cfg)
    for sample in DatasetCatalog.get(f"{NAME}_instances"):
        instances = mapper(sample)["instances"]
        kept = [a for a in sample["annotations"] if not a["iscrowd"]]
        assert instances.gt_classes.tolist() == [a["category_id"] for a in kept] and len(kept) > 10
        assert instances.gt_masks.any()


def test_ground_truth_as_prediction_is_perfect(cfg, tmp_path):
    results = evaluate_ground_truth(NAME, tmp_path, semantic=False)
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100) and results["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("arch", ["mask2former", "maskformer"])
def test_a_model_runs_on_the_photos_end_to_end(cfg, arch, tmp_path):
    """A training step and the standard evaluators on both photos, through the trainer; nothing is learned in one step."""
    root = Path(__file__).resolve().parents[2]
    small = load_config(root / "configs" / "quickstart" / f"{arch}.yaml")
    small.DATASETS = cfg.DATASETS
    small.DATASETS.TEST = (NAME,)
    small.merge_from_list(
        ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 133, "MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", 1, "SOLVER.IMS_PER_BATCH", 2]
        + ["DATALOADER.NUM_WORKERS", 0, "INPUT.MIN_SIZE_TEST", 160, "INPUT.MAX_SIZE_TEST", 240, "OUTPUT_DIR", str(tmp_path / "run")]
        + ["MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 256, "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", 0.0]
    )
    small.freeze()
    trainer = Trainer(small)
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert 0 <= results["panoptic_seg"]["PQ"] <= 100 and 0 <= results["segm"]["AP"] <= 100
    # predictions of both photos at the photos' own size
    written = json.loads((tmp_path / "run/inference/predictions.json").read_text())["annotations"]
    assert sorted(a["image_id"] for a in written) == [142238, 439180]
    for sample in DatasetCatalog.get(NAME):
        picture = read_image(sample["file_name"], "RGB")
        output = trainer.model.eval()([{"image": torch.from_numpy(picture.copy()).permute(2, 0, 1), **sample}])[0]
        assert output["sem_seg"].shape == (133, sample["height"], sample["width"])
        assert output["panoptic_seg"][0].shape == picture.shape[:2]
