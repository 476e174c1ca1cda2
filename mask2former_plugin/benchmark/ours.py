"""The sides of this package: float32, bfloat16, compiled, with activation checkpointing, and the plain reference of deformable attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from safetensors.torch import save_file
from torch import nn

from mask2former_plugin.benchmark import common, outputs, samples
from mask2former_plugin.benchmark.cases import Case
from mask2former_plugin.benchmark.workload import Context, NotOffered, Workload
from mask2former_plugin.config import load_config
from mask2former_plugin.data.datasets.custom import register_custom_datasets
from mask2former_plugin.data.mappers import build_mapper
from mask2former_plugin.data.synthetic import CATEGORIES
from mask2former_plugin.evaluation import build_evaluator
from mask2former_plugin.modeling.mask_logits import MaskLogits, MaskPrediction
from mask2former_plugin.modeling.matcher import HungarianMatcher
from mask2former_plugin.modeling.meta_arch import MaskFormer
from mask2former_plugin.modeling.ops import ms_deform_attn, ms_deform_attn_from_logits, ms_deform_attn_reference
from mask2former_plugin.modeling.optimization import optimize_for_inference
from mask2former_plugin.solver import build_optimizer

_WEIGHTS_SIZE = {False: (480, 640), True: (64, 96)}  # of the image that weights are made realistic on, by narrow


def config(options: Mapping[str, Any], context: Context) -> CfgNode:
    """The published config of a case."""
    return load_config(context.configs / options["family"] / options["config"], common.overrides(options))


def make_weights(options: Mapping[str, Any], context: Context) -> None:
    """Write random weights, the same for all sides, into the scratch folder, unless they are there."""
    folder = context.weights(options)
    if folder.is_dir():
        return
    torch.manual_seed(0)
    model = build_model(config(options, context)).eval()
    samples.make_realistic(model, [{"image": samples.image(_WEIGHTS_SIZE[options["narrow"]])}])
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / common.WEIGHTS)


def _inference(case: Case, context: Context) -> Workload:
    side = context.side

    def plain() -> nn.Module:
        return common.load_model(config(case.options, context), case.options, context).eval().requires_grad_(False)

    model = optimize_for_inference(plain(), precision=side.precision, compiled=side.compiled)
    batch = common.inference_batch(case.options)

    @torch.no_grad()
    def run() -> list[dict[str, Any]]:
        return model(batch)

    @torch.no_grad()
    def compared() -> dict[str, np.ndarray]:
        found = model.sem_seg_head(model.backbone(model.preprocess(batch).tensor))
        predictions = outputs.of_predictions(found["pred_logits"][0], found["mask_logits"].dense()[0])
        results = run()[0]
        workload.facts.update(outputs.facts_of_results(results))
        return {**predictions, **outputs.of_results(results)}

    @torch.no_grad()
    def counted() -> list[dict[str, Any]]:
        return plain()(batch)

    workload = Workload(run, compared, (model, batch), counted=counted)
    return workload


def _training(case: Case, context: Context) -> Workload:
    if context.side.compiled:
        raise NotOffered("training is not compiled")
    cfg = config(case.options, context)
    if context.side.checkpointed:
        cfg.MODEL.BACKBONE.USE_CHECKPOINT = cfg.MODEL.MASK_FORMER.USE_CHECKPOINT = True
        # the pixel decoder of the MaskFormer cases has no layers to recompute
        cfg.MODEL.SEM_SEG_HEAD.USE_CHECKPOINT = case.options["family"] == "mask2former"
    model = common.load_model(cfg, case.options, context)
    batch = common.training_batch(case.options, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)

    def losses() -> dict[str, torch.Tensor]:
        with context.autocast():
            return model(batch)

    optimizer = build_optimizer(cfg, model)
    def counted() -> None:
        cfg.MODEL.LEAN_TRAINING = False  # what it computes a second time must not raise the limit
        plain = common.load_model(cfg, case.options, context)
        sum(plain(batch).values()).backward()

    run = common.step(model, losses, optimizer)
    return Workload(run, lambda: common.training_outputs(model, losses, optimizer), (model, batch), counted=counted)


def _attention(case: Case, context: Context) -> Workload:
    if context.side.compiled:
        raise NotOffered("the operator chooses its own implementation")
    shapes = case.options["shapes"]
    if context.side.implementation == "reference":
        return common.attention_workload(
            case, context, lambda value, *samples: ms_deform_attn_reference(value, shapes, *samples)
        )
    return common.attention_workload(
        case,
        context,
        lambda value, *samples: ms_deform_attn(value, shapes, *samples),
        lambda value, *layer: ms_deform_attn_from_logits(value, shapes, *layer),
    )


def _matching(case: Case, context: Context) -> Workload:
    if context.side.compiled or context.side.precision != "float32":
        raise NotOffered("costs are float32")
    factors, features, target = common.matching_inputs(case.options, context.device)
    features = features.contiguous(memory_format=torch.channels_last)  # as our models hand them over
    predictions = [MaskPrediction(pred_logits=c, mask_logits=MaskLogits(e, features)) for c, e in factors]
    matcher = HungarianMatcher(**common.matcher_weights())

    def run() -> list:
        return matcher.match(predictions, [target], case.options["size"])

    def compared() -> dict[str, np.ndarray]:
        torch.manual_seed(0)
        return outputs.of_assignments([images[0] for images in run()], len(target["labels"]))

    return Workload(run, compared, (factors, features, target))


def _postprocess(case: Case, context: Context) -> Workload:
    if context.side.compiled or context.side.precision != "float32":
        raise NotOffered("post-processing is float32")
    classes, embed, features = common.postprocess_inputs(case.options, context.device)
    predictions = MaskPrediction(pred_logits=classes[None], mask_logits=MaskLogits(embed[None], features[None]))
    light = case.options["light"]
    model = common.postprocess_model(
        case, MaskFormer, predictions, semantic_label_map=light, instance_run_lengths=light
    )
    return common.postprocess_workload(case, context, model, (classes, embed, features))


def _loading(case: Case, context: Context) -> Workload:
    if context.side.compiled or context.side.precision != "float32":
        raise NotOffered("there is one mapper")
    cfg = config({**case.options, "queries": 100, "narrow": False}, context)
    cfg.INPUT.IMAGE_SIZE = case.options["side"]
    return common.loading_workload(case.options, context, build_mapper(cfg))


def _evaluation(case: Case, context: Context) -> Workload:
    if context.side.compiled or context.side.precision != "float32":
        raise NotOffered("there is one evaluator")
    task = case.options["task"]
    root = common.generated_dataset(case.options, context)
    name = f"benchmark_{root.name}"
    cfg = load_config(opts=["DATASETS.TEST", (name,), "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", task == "semantic"])
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = task == "panoptic"
    cfg.DATASETS.CUSTOM[name] = CfgNode(
        {
            "FORMAT": "coco_panoptic",
            "IMAGES": str(root / "val"),
            "PANOPTIC_JSON": str(root / "annotations" / "panoptic_val.json"),
            "PANOPTIC_ROOT": str(root / "panoptic_val"),
            "INSTANCES_JSON": str(root / "annotations" / "instances_val.json"),
            "SEM_SEG_ROOT": str(root / "panoptic_semseg_val"),
        }
    )
    register_custom_datasets(cfg)
    inputs = DatasetCatalog.get(name)
    predictions = [_shifted_truth(one, task) for one in inputs]
    evaluator = build_evaluator(cfg, name, str(context.scratch / "evaluation"))

    def run() -> Mapping[str, Any]:
        evaluator.reset()
        for one, prediction in zip(inputs, predictions):
            evaluator.process([one], [prediction])
        return evaluator.evaluate()

    def compared() -> dict[str, np.ndarray]:
        metrics = next(iter(run().values()))
        key = "PQ" if task == "panoptic" else "mIoU"
        workload.facts[key] = metrics[key]
        return {"metrics": np.array([metrics[key]])}

    workload = Workload(run, compared)
    return workload


def _shifted_truth(inputs: Mapping[str, Any], task: str) -> dict[str, Any]:
    """A prediction that is wrong along all borders: the ground truth, three pixels to the right."""
    if task == "semantic":
        labels = torch.from_numpy(read_image(inputs["sem_seg_file_name"]).copy()).long().roll(3, 1)
        return {"sem_seg": nn.functional.one_hot(labels.clamp(max=len(CATEGORIES) - 1)).permute(2, 0, 1).float()}
    colors = torch.from_numpy(read_image(inputs["pan_seg_file_name"], "RGB").copy()).int().roll(3, 1)
    ids = colors[..., 0] + 256 * colors[..., 1] + 65536 * colors[..., 2]
    segments, numbered = [], torch.zeros_like(ids)
    for number, segment in enumerate(inputs["segments_info"], start=1):
        numbered[ids == segment["id"]] = number
        isthing = bool(CATEGORIES[segment["category_id"]].isthing)
        segments.append({"id": number, "category_id": segment["category_id"], "isthing": isthing})
    return {"panoptic_seg": (numbered, segments)}


BUILDERS: dict[str, Callable[[Case, Context], Workload]] = {
    "inference": _inference,
    "training": _training,
    "attention": _attention,
    "attention_backward": _attention,
    "matching": _matching,
    "postprocess": _postprocess,
    "loading": _loading,
    "evaluation": _evaluation,
}
REFERENCE_BUILDERS = {"attention": _attention, "attention_backward": _attention}
