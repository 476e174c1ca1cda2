"""Which evaluators a dataset gets, and AP of datasets whose things are not the first ids."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOPanopticEvaluator, DatasetEvaluators, SemSegEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools import mask as coco_mask

from mask2former_plugin.config import load_config
from mask2former_plugin.evaluation import InstanceSegEvaluator, RunLengthCOCOEvaluator, build_evaluator
from mask2former_plugin.modeling.inference.light_outputs import RunLengths


def tasks(semantic, instance, panoptic):
    prefix = "MODEL.MASK_FORMER.TEST."
    return [prefix + "SEMANTIC_ON", str(semantic), prefix + "INSTANCE_ON", str(instance), prefix + "PANOPTIC_ON", str(panoptic)]


@pytest.fixture
def dataset(tmp_path):
    """Two images; classes 0 (stuff), 1 and 2 (things), so that things do not begin at 0."""
    masks = {}
    annotations = []
    for image_id in (1, 2):
        for category, columns in ((11, slice(0, 8)), (12, slice(10, 19))):
            mask = np.zeros((16, 20), dtype=np.uint8)
            mask[2:14, columns] = 1
            rle = coco_mask.encode(np.asfortranarray(mask))
            masks[image_id, category] = torch.from_numpy(mask.astype(bool))
            segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": image_id, "category_id": category, "iscrowd": 0, "area": int(mask.sum()),
                    "bbox": coco_mask.toBbox(rle).tolist(), "segmentation": segmentation,
                }
            )  # fmt: skip
    path = tmp_path / "instances.json"
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 16, "width": 20} for i in (1, 2)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 11, "name": "cup"}, {"id": 12, "name": "hat"}]}))
    name = "tiny_panoptic"
    DatasetCatalog.register(name, lambda: [{"file_name": "1.jpg", "image_id": 1, "sem_seg_file_name": "1.png"}])
    MetadataCatalog.get(name).set(
        evaluator_type="ade20k_panoptic_seg", json_file=str(path), image_root=str(tmp_path), panoptic_root=str(tmp_path),
        panoptic_json=str(path), sem_seg_root=str(tmp_path), ignore_label=255, label_divisor=1000, stuff_classes=["sky", "cup", "hat"],
        thing_classes=["cup", "hat"], thing_dataset_id_to_contiguous_id={11: 1, 12: 2},
        stuff_dataset_id_to_contiguous_id={10: 0, 11: 1, 12: 2},
    )  # fmt: skip
    yield name, masks
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def predictions(masks, image_id):
    """The ground truth with its contiguous ids, and a stuff instance that has no place in AP."""
    instances = Instances((16, 20))
    own = [masks[image_id, 11], masks[image_id, 12], torch.ones(16, 20, dtype=torch.bool)]
    instances.pred_masks = torch.stack(own)
    instances.pred_boxes = Boxes(torch.tensor([[0.0, 2, 8, 14], [10, 2, 19, 14], [0, 0, 20, 16]]))
    instances.pred_classes = torch.tensor([1, 2, 0])
    instances.scores = torch.tensor([0.9, 0.8, 0.99])
    return {"instances": instances}


def test_ap_of_things_that_do_not_begin_at_zero(dataset, tmp_path):
    name, masks = dataset
    evaluator = InstanceSegEvaluator(name, output_dir=str(tmp_path / "out"))
    evaluator.reset()
    for image_id in (1, 2):
        output = predictions(masks, image_id)
        evaluator.process([{"image_id": image_id}], [output])
        assert output["instances"].pred_classes.tolist() == [1, 2, 0]  # the model's output is not changed
    results = evaluator.evaluate()
    assert results["segm"]["AP"] == pytest.approx(100.0)
    assert results["segm"]["AP-cup"] == pytest.approx(100.0) and results["segm"]["AP-hat"] == pytest.approx(100.0)
    # the catalog's metadata stays as it was registered
    assert MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id == {11: 1, 12: 2}


def test_images_without_a_thing(dataset):
    """Dense masks or run lengths; of no instance at all, or of stuff only."""
    name, masks = dataset
    evaluator = InstanceSegEvaluator(name)
    nothing = [predictions(masks, 1)["instances"][[2]], predictions(masks, 1)["instances"][[]]]
    for instances in nothing:
        codes = RunLengths([{"size": [16, 20], "counts": "0P:"}] * len(instances))
        run_lengths = Instances((16, 20), pred_masks_rle=codes)
        for field in ("pred_boxes", "pred_classes", "scores"):
            run_lengths.set(field, instances.get(field))
        for output in (instances, run_lengths):
            evaluator.reset()
            evaluator.process([{"image_id": 1}], [{"instances": output}])
            assert np.isnan(evaluator.evaluate()["bbox"]["AP"])


@pytest.mark.parametrize(
    "flags, kinds",
    [
        ((True, True, True), [COCOPanopticEvaluator, SemSegEvaluator, InstanceSegEvaluator]),
        ((True, False, False), [SemSegEvaluator]),
        ((False, False, True), [COCOPanopticEvaluator]),
    ],
)
def test_tasks_choose_the_evaluators_of_a_panoptic_dataset(dataset, tmp_path, flags, kinds):
    cfg = load_config(opts=["OUTPUT_DIR", str(tmp_path), *tasks(*flags)])
    evaluator = build_evaluator(cfg, dataset[0])
    found = evaluator._evaluators if isinstance(evaluator, DatasetEvaluators) else [evaluator]
    assert [type(e) for e in found] == kinds


def test_coco_panoptic_without_semantic_labels_is_evaluated_by_pq_alone(dataset, tmp_path):
    name, _ = dataset
    metadata = MetadataCatalog.get(name)
    vars(metadata).update(evaluator_type="coco_panoptic_seg", sem_seg_root=None)
    cfg = load_config(opts=["OUTPUT_DIR", str(tmp_path), *tasks(True, True, True)])
    kinds = [type(e) for e in build_evaluator(cfg, name)._evaluators]
    assert kinds == [COCOPanopticEvaluator, RunLengthCOCOEvaluator]


def test_unknown_evaluator_type_is_explained(dataset):
    vars(MetadataCatalog.get(dataset[0])).update(evaluator_type="my_metric")
    with pytest.raises(ValueError, match="'tiny_panoptic' has evaluator_type 'my_metric'; known are sem_seg"):
        build_evaluator(load_config(), dataset[0])


def test_nothing_switched_on_is_explained(dataset):
    with pytest.raises(ValueError, match="nothing to evaluate on 'tiny_panoptic'.*SEMANTIC_ON"):
        build_evaluator(load_config(opts=tasks(False, False, False)), dataset[0])


def test_missing_ground_truth_is_named(dataset):
    vars(MetadataCatalog.get(dataset[0])).update(json_file="nowhere/instances.json")
    with pytest.raises(FileNotFoundError, match="'tiny_panoptic': its json_file nowhere/instances.json, needed for AP"):
        build_evaluator(load_config(opts=tasks(False, True, False)), dataset[0])
