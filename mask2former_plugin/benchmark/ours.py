"""The sides of this package: float32, bfloat16, compiled, and the plain reference of deformable attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from safetensors.torch import save_file

from mask2former_plugin.benchmark import common, outputs, samples
from mask2former_plugin.benchmark.cases import Case
from mask2former_plugin.benchmark.workload import Context, NotOffered, Workload
from mask2former_plugin.config import load_config

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
    model = common.load_model(config(case.options, context), case.options, context).eval().requires_grad_(False)
    if context.side.compiled:
        model.backbone = torch.compile(model.backbone)
    batch = common.inference_batch(case.options)

    def run() -> list[dict[str, Any]]:
        with torch.no_grad(), context.autocast():
            return model(batch)

    def compared() -> dict[str, np.ndarray]:
        with torch.no_grad(), context.autocast():
            found = model.sem_seg_head(model.backbone(model.preprocess(batch).tensor))
            predictions = outputs.of_predictions(found["pred_logits"][0], found["mask_logits"].dense()[0])
        results = run()[0]
        workload.facts.update(outputs.facts_of_results(results))
        return {**predictions, **outputs.of_results(results)}

    workload = Workload(run, compared, (model, batch))
    return workload


def _training(case: Case, context: Context) -> Workload:
    if context.side.compiled:
        raise NotOffered("training is not compiled")
    from mask2former_plugin.solver import build_optimizer

    cfg = config(case.options, context)
    model = common.load_model(cfg, case.options, context)
    batch = common.training_batch(case.options, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)

    def losses() -> dict[str, torch.Tensor]:
        with context.autocast():
            return model(batch)

    run = common.step(model, losses, build_optimizer(cfg, model))
    return Workload(run, lambda: common.training_outputs(model, losses), (model, batch))


def _attention(case: Case, context: Context) -> Workload:
    from mask2former_plugin.modeling.ops import ms_deform_attn, ms_deform_attn_reference

    if context.side.compiled:
        raise NotOffered("the operator chooses its own implementation")
    function = ms_deform_attn_reference if context.side.implementation == "reference" else ms_deform_attn
    shapes = case.options["shapes"]
    return common.attention_workload(case, context, lambda v, l, w: function(v, shapes, l, w))


def _matching(case: Case, context: Context) -> Workload:
    from mask2former_plugin.modeling.mask_logits import MaskLogits, MaskPrediction
    from mask2former_plugin.modeling.matcher import HungarianMatcher

    if context.side.compiled or context.side.precision != "float32":
        raise NotOffered("costs are float32")
    factors, features, target = common.matching_inputs(case.options, context.device)
    predictions = [MaskPrediction(pred_logits=c, mask_logits=MaskLogits(e, features)) for c, e in factors]
    matcher = HungarianMatcher(**common.matcher_weights())

    def run() -> list:
        return matcher.match(predictions, [target], case.options["size"])

    def compared() -> dict[str, np.ndarray]:
        torch.manual_seed(0)
        return outputs.of_assignments([images[0] for images in run()], len(target["labels"]))

    return Workload(run, compared, (factors, features, target))


BUILDERS: dict[str, Callable[[Case, Context], Workload]] = {
    "inference": _inference,
    "training": _training,
    "attention": _attention,
    "attention_backward": _attention,
    "matching": _matching,
}
REFERENCE_BUILDERS = {"attention": _attention, "attention_backward": _attention}
