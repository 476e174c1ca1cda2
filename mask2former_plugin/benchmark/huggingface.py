"""The sides of ``transformers``: the same weights in its own models, its own losses, its own post-processing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mask2former_plugin.benchmark import common, ours, outputs, samples
from mask2former_plugin.benchmark.cases import Case
from mask2former_plugin.benchmark.workload import Context, NotOffered, Workload
from mask2former_plugin.checkpoint.huggingface import save_pretrained, to_hf_config

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: nothing is downloaded

import transformers  # noqa: E402

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

_CLIP = 0.01  # largest norm of the whole gradient, as published


def _model(options: Mapping[str, Any], context: Context) -> nn.Module:
    """In evaluation mode also for training: batch norm is frozen as published, and dropout is 0 anyway."""
    folder = context.weights(options) / "huggingface"
    if not folder.is_dir():
        cfg = ours.config(options, context)
        try:
            to_hf_config(cfg)
        except ValueError as error:
            raise NotOffered(str(error)) from error
        save_pretrained(common.load_model(cfg, options, context), cfg, folder)
    if options["family"] == "mask2former":
        model = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(folder)
    else:
        # with its own auxiliary losses on, its inference fails
        model = transformers.MaskFormerForInstanceSegmentation.from_pretrained(folder, use_auxiliary_loss=False)
    return model.to(context.device).eval()


def _processor(family: str) -> Any:
    return (
        transformers.Mask2FormerImageProcessor() if family == "mask2former" else transformers.MaskFormerImageProcessor()
    )


def _pixels(images: list[Tensor], cfg: Any, divisor: int, device: torch.device) -> Tensor:
    """Normalised images of one size, padded as ours."""
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    pixels = torch.stack([(image.to(device) - mean) / std for image in images])
    height, width = pixels.shape[-2:]
    return nn.functional.pad(pixels, (0, -width % divisor, 0, -height % divisor))


def _divisor(cfg: Any) -> int:
    """What padded sizes are multiples of; without a number of its own the model takes that of a ResNet, none."""
    size = cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY
    return size if size > 0 else 32 if cfg.MODEL.BACKBONE.NAME == "D2SwinTransformer" else 1


def _stuff(cfg: Any) -> set[int]:
    from detectron2.data import MetadataCatalog

    things = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_dataset_id_to_contiguous_id.values()
    return set(range(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)) - set(things)


def _inference(case: Case, context: Context) -> Workload:
    options = case.options
    cfg = ours.config(options, context)
    model, processor = _model(options, context).requires_grad_(False), _processor(options["family"])
    image = samples.image(options["size"])
    test = cfg.MODEL.MASK_FORMER.TEST
    stuff = _stuff(cfg) if test.PANOPTIC_ON else set()
    thresholds = {"threshold": test.OBJECT_MASK_THRESHOLD, "overlap_mask_area_threshold": test.OVERLAP_THRESHOLD}
    sizes = [tuple(options["size"])]

    @torch.no_grad()
    def predict() -> Any:
        with context.autocast():
            return model(pixel_values=_pixels([image], cfg, _divisor(cfg), context.device))

    @torch.no_grad()
    def results(found: Any) -> dict[str, Any]:
        made = {}
        if test.SEMANTIC_ON:
            made["semantic"] = processor.post_process_semantic_segmentation(found, target_sizes=sizes)
        if test.PANOPTIC_ON:
            made["panoptic"] = processor.post_process_panoptic_segmentation(
                found, target_sizes=sizes, label_ids_to_fuse=stuff, **thresholds
            )
        if test.INSTANCE_ON:
            made["instances"] = processor.post_process_instance_segmentation(found, target_sizes=sizes)
        return made

    def run() -> dict[str, Any]:
        return results(predict())

    def compared() -> dict[str, np.ndarray]:
        found = predict()
        results(found)
        return outputs.of_predictions(found.class_queries_logits[0], found.masks_queries_logits[0])

    return Workload(run, compared, (model, image))


def _training(case: Case, context: Context) -> Workload:
    options = case.options
    if options["family"] == "maskformer":
        raise NotOffered("MaskFormer of transformers has no working auxiliary losses")
    cfg = ours.config(options, context)
    model = _model(options, context)
    images = [samples.image(options["size"], i) for i in range(options["batch"])]
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    targets = [samples.target(options["targets"], options["size"], classes, i) for i in range(options["batch"])]
    optimizer = torch.optim.AdamW(model.parameters(), lr=common.LEARNING_RATE, weight_decay=0.05)

    def loss() -> Tensor:
        with context.autocast():
            pixels = _pixels(images, cfg, _divisor(cfg), context.device)
            return model(
                pixel_values=pixels,
                mask_labels=[t["masks"].float().to(context.device) for t in targets],
                class_labels=[t["labels"].to(context.device) for t in targets],
            ).loss.sum()

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()

    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        update()

    def compared() -> dict[str, np.ndarray]:
        torch.manual_seed(0)
        value = loss()
        value.backward()
        found = outputs.of_total(value, model)
        update()
        return found

    return Workload(run, compared, (model, images, targets))


def _attention(case: Case, context: Context) -> Workload:
    from transformers.models.mask2former import modeling_mask2former

    if context.side.precision != "float32":
        raise NotOffered("grid_sample takes one precision only")
    function = modeling_mask2former.multi_scale_deformable_attention
    shapes = [tuple(shape) for shape in case.options["shapes"]]
    return common.attention_workload(case, context, lambda value, *samples: function(value, shapes, *samples))


def _matching(case: Case, context: Context) -> Workload:
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerHungarianMatcher

    if context.side.precision != "float32":
        raise NotOffered("costs are float32")
    factors, features, target = common.matching_inputs(case.options, context.device)
    dense = common.dense_masks(case.options, factors, features)
    matcher = Mask2FormerHungarianMatcher(**common.matcher_weights())
    masks = target["masks"].float()

    def run() -> list:
        labels = {"mask_labels": [masks], "class_labels": [target["labels"]]}
        return [matcher(m(), c, **labels) for (c, _), m in zip(factors, dense)]

    def compared() -> dict[str, np.ndarray]:
        torch.manual_seed(0)
        return outputs.of_assignments([images[0] for images in run()], len(masks))

    return Workload(run, compared, (factors, features, target))


def _postprocess(case: Case, context: Context) -> Workload:
    options = case.options
    if context.side.precision != "float32":
        raise NotOffered("post-processing is float32")
    if options["task"] == "instances" and options["light"]:
        raise NotOffered("run lengths are those of a label map without overlaps")
    if options["task"] == "semantic" and not options["light"]:
        raise NotOffered("scores are made only on the way to a label map")
    classes, embed, features = common.postprocess_inputs(options, context.device)
    found = SimpleNamespace(
        class_queries_logits=classes[None], masks_queries_logits=torch.einsum("qc,chw->qhw", embed, features)[None]
    )
    processor, size = _processor("mask2former"), [tuple(options["size"])]
    stuff = set(range(common.postprocess_things(options), options["classes"]))

    def run() -> Any:
        with torch.no_grad():
            if options["task"] == "semantic":
                return processor.post_process_semantic_segmentation(found, target_sizes=size)
            if options["task"] == "panoptic":
                return processor.post_process_panoptic_segmentation(
                    found,
                    threshold=common.OBJECT_MASK_THRESHOLD,
                    overlap_mask_area_threshold=common.OVERLAP_THRESHOLD,
                    label_ids_to_fuse=stuff,
                    target_sizes=size,
                )
            return processor.post_process_instance_segmentation(
                found, threshold=0.0, target_sizes=size, return_binary_maps=True
            )

    def compared() -> dict[str, np.ndarray]:
        result = run()[0]
        if options["task"] == "semantic":
            return {"other_semantic_labels": outputs.array(result)}
        segments = result["segments_info"]
        workload.facts[options["task"] if options["task"] == "instances" else "segments"] = len(
            {s["id"] for s in segments}
        )
        if options["task"] == "panoptic":
            return {"other_panoptic_classes": outputs.panoptic_classes(result["segmentation"], segments, "label_id")}
        scores = torch.tensor([s["score"] for s in segments])
        return {"other_instance_masks": outputs.weighted_masks(result["segmentation"], scores)}

    workload = Workload(run, compared, (classes, found.masks_queries_logits))
    return workload


BUILDERS: dict[str, Callable[[Case, Context], Workload]] = {
    "inference": _inference,
    "training": _training,
    "attention": _attention,
    "attention_backward": _attention,
    "matching": _matching,
    "postprocess": _postprocess,
}
