"""Ground truth as prediction: what the evaluators must call perfect."""

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, COCOPanopticEvaluator, SemSegEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as mask_util


def ground_truth_outputs(sample, metadata):
    """The annotations of a sample as a perfect model would predict them."""
    rgb = np.asarray(Image.open(sample["pan_seg_file_name"])).astype(np.int64)
    ids = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
    segments = [{k: s[k] for k in ("id", "category_id", "isthing")} for s in sample["segments_info"]]
    masks = {s["id"]: torch.from_numpy(ids == s["id"]) for s in segments}
    things = [s for s in segments if s["isthing"]]
    instances = Instances(tuple(ids.shape))
    instances.pred_masks = torch.stack([masks[s["id"]] for s in things])
    boxes = mask_util.toBbox(
        [mask_util.encode(np.asfortranarray(m.numpy().astype(np.uint8))) for m in instances.pred_masks]
    )
    boxes[:, 2:] += boxes[:, :2]
    instances.pred_boxes = Boxes(torch.from_numpy(boxes).float())
    instances.scores = torch.ones(len(things))
    instances.pred_classes = torch.tensor([s["category_id"] for s in things])
    scores = torch.zeros(len(metadata.stuff_classes), *ids.shape)
    for segment in segments:
        scores[segment["category_id"]][masks[segment["id"]]] = 1
    return {"panoptic_seg": (torch.from_numpy(ids), segments), "instances": instances, "sem_seg": scores}


def evaluate_ground_truth(name, output_dir, semantic=True):
    metadata = MetadataCatalog.get(name)
    evaluators = [
        COCOPanopticEvaluator(name, str(output_dir)),
        COCOEvaluator(name, distributed=False, output_dir=str(output_dir)),
    ]
    if semantic:
        evaluators.append(SemSegEvaluator(name, distributed=False))
    samples = DatasetCatalog.get(name)
    results = {}
    for evaluator in evaluators:
        evaluator.reset()
        for sample in samples:
            evaluator.process([sample], [ground_truth_outputs(sample, metadata)])
        results.update(evaluator.evaluate())
    return results
