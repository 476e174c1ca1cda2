"""What the sides share: config overrides, loading weights, batches, and the work that is no side's own."""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from detectron2.modeling import build_model
from detectron2.structures import Instances
from safetensors.torch import load_file
from torch import nn

from mask2former_plugin.benchmark import outputs, samples
from mask2former_plugin.benchmark.cases import Case
from mask2former_plugin.benchmark.workload import Context, Workload
from mask2former_plugin.data.synthetic import SyntheticOptions, generate

# few channels, published depth: for trial runs
NARROW = [
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 4,
    "MODEL.SWIN.EMBED_DIM", 16,
    "MODEL.SWIN.NUM_HEADS", [1, 2, 4, 8],
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", 64,
    "MODEL.SEM_SEG_HEAD.MASK_DIM", 32,
    "MODEL.MASK_FORMER.HIDDEN_DIM", 64,
    "MODEL.MASK_FORMER.NHEADS", 4,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD", 64,
]  # fmt: skip
LEARNING_RATE = 1e-4
WEIGHTS = "model.safetensors"
OBJECT_MASK_THRESHOLD, OVERLAP_THRESHOLD = 0.8, 0.8  # published, of panoptic segments


def overrides(options: Mapping[str, Any]) -> list[Any]:
    """Config overrides of a model, as pairs; the same for the original."""
    return [
        "MODEL.DEVICE", "cpu",
        "MODEL.WEIGHTS", "",
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", options["queries"],
        "MODEL.MASK_FORMER.DROPOUT", 0.0,
        "MODEL.SWIN.DROP_PATH_RATE", 0.0,
        "SOLVER.BASE_LR", LEARNING_RATE,
        *(NARROW if options["narrow"] else []),
    ]  # fmt: skip


def load_model(cfg: Any, options: Mapping[str, Any], context: Context) -> nn.Module:
    """A model of Detectron2's with the weights of all sides, in training mode, on the device of the worker."""
    model = build_model(cfg)
    state = model.state_dict()  # with the versions of the modules: the original renames the weights of older ones
    state.update(load_file(context.weights(options) / WEIGHTS))
    model.load_state_dict(state)
    return model.to(context.device)


def inference_batch(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One image; the result has its size."""
    height, width = options["size"]
    return [{"image": samples.image(options["size"]), "height": height, "width": width}]


def training_batch(options: Mapping[str, Any], classes: int) -> list[dict[str, Any]]:
    """Images with targets as the mappers give them."""
    batch = []
    for index in range(options["batch"]):
        target = samples.target(options["targets"], options["size"], classes, index)
        instances = Instances(options["size"])
        instances.gt_classes, instances.gt_masks = target["labels"], target["masks"]
        batch.append({"image": samples.image(options["size"], index), "instances": instances})
    return batch


def step(model: nn.Module, losses: Callable[[], Any], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """One training step; ``losses`` gives a dict of weighted losses."""

    def run() -> None:
        optimizer.zero_grad()
        sum(losses().values()).backward()
        optimizer.step()

    return run


def training_outputs(
    model: nn.Module, losses: Callable[[], Any], optimizer: torch.optim.Optimizer
) -> dict[str, np.ndarray]:
    """Losses and gradients of a step at points of a fixed seed."""
    torch.manual_seed(0)
    optimizer.zero_grad()
    found = losses()
    sum(found.values()).backward()
    result = outputs.of_training(found, model)
    optimizer.step()
    return result


def attention_inputs(options: Mapping[str, Any], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Values ``[1, S, M, D]``, pixel offsets ``[1, S, M, L, P, 2]``, logits ``[1, S, M, L, P]``, places ``[S, 2]``."""
    shapes, heads, points = options["shapes"], options["heads"], options["points"]
    tokens, levels = sum(h * w for h, w in shapes), len(shapes)
    rng = samples.generator(6)
    value = torch.randn(1, tokens, heads, options["width"], generator=rng)
    offsets = torch.randn(1, tokens, heads, levels, points, 2, generator=rng) * 3
    logits = torch.randn(1, tokens, heads, levels, points, generator=rng)
    places = []
    for height, width in shapes:
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        places.append(torch.stack([x, y], -1).flatten(0, 1))
    return tuple(one.to(device) for one in (value, offsets, logits, torch.cat(places)))


def locations_and_weights(
    options: Mapping[str, Any], places: torch.Tensor, offsets: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampling locations in [0, 1] and attention weights, as the layer of Deformable DETR computes them."""
    extent = torch.tensor([[width, height] for height, width in options["shapes"]], device=places.device)
    locations = places[None, :, None, None, None] + offsets / extent[None, None, None, :, None]
    return locations, logits.flatten(3).softmax(-1).unflatten(3, logits.shape[3:])


def attention_workload(
    case: Case,
    context: Context,
    attention: Callable[..., torch.Tensor],
    from_logits: Callable[..., torch.Tensor] | None = None,
) -> Workload:
    """Forward, or forward and backward, of any implementation.

    Args:
        attention: ``(value, locations, weights)``.
        from_logits: ``(value, places, offsets, logits)``; by default locations and weights are made of them first.
    """
    value, offsets, logits, places = attention_inputs(case.options, context.device)
    if case.options["logits"]:
        inputs = (value, offsets, logits)

        def forward(value: torch.Tensor, offsets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            if from_logits is not None:
                return from_logits(value, places, offsets, logits)
            return attention(value, *locations_and_weights(case.options, places, offsets, logits))

    else:
        inputs = (value, *locations_and_weights(case.options, places, offsets, logits))
        forward = attention
    if context.side.precision == "bfloat16":
        # locations keep their precision, they need it
        inputs = tuple(one if i == 1 and not case.options["logits"] else one.bfloat16() for i, one in enumerate(inputs))
    if case.kind == "attention":

        def run() -> torch.Tensor:
            with torch.no_grad():
                return forward(*inputs)

        return Workload(run, lambda: {"attention": outputs.array(run())}, inputs)

    inputs = tuple(one.detach().requires_grad_() for one in inputs)
    direction = torch.randn(1, value.shape[1], value.shape[2] * value.shape[3], generator=samples.generator(7))
    direction = direction.to(inputs[0])

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(*inputs), inputs, direction)

    def compared() -> dict[str, np.ndarray]:
        names = ("value_gradient", "location_gradient", "weight_gradient")
        return dict(zip(names, map(outputs.array, gradients())))

    return Workload(gradients, compared, (inputs, direction))


def matching_inputs(
    options: Mapping[str, Any], device: torch.device
) -> tuple[list, torch.Tensor, dict[str, torch.Tensor]]:
    """Class logits and mask embeddings of each prediction, features ``[1, C, h, w]``, and the targets of one image.

    Every query has learned some target, with noise that is less in later predictions.
    """
    queries, classes, channels, size = (options[k] for k in ("queries", "classes", "channels", "size"))
    rng = samples.generator(8, options["targets"])
    target = samples.target(options["targets"], size, classes)
    features = torch.randn(1, channels, size[0] // 4, size[1] // 4, generator=rng)
    predictions = [
        (torch.randn(1, queries, classes + 1, generator=rng) * 2, torch.randn(1, queries, channels, generator=rng) / 4)
        for _ in range(options["predictions"])
    ]
    predictions = [(c.to(device), e.to(device)) for c, e in predictions]
    return predictions, features.to(device), {k: v.to(device) for k, v in target.items()}


def dense_masks(options: Mapping[str, Any], factors: list, features: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
    """What gives the dense mask logits of each prediction, for matchers that take nothing else.

    With ``product`` each call multiplies; without it they are made here, and a matcher gets them for nothing.
    """
    products = [functools.partial(torch.einsum, "bqc,bchw->bqhw", embed, features) for _, embed in factors]
    if options["product"]:
        return products
    return [functools.partial(torch.Tensor.detach, product()) for product in products]


def matcher_weights() -> dict[str, float]:
    """Published costs of Mask2Former."""
    return {"cost_class": 2.0, "cost_mask": 5.0, "cost_dice": 5.0, "num_points": 112 * 112}


class _FixedBackbone(nn.Module):
    """Stands in the place of a backbone whose work is not measured."""

    size_divisibility = 32

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"images": images}


class _FixedHead(nn.Module):
    """Gives always the same predictions."""

    def __init__(self, predictions: Mapping[str, Any], num_classes: int) -> None:
        super().__init__()
        self.predictions = predictions
        self.num_classes = num_classes

    def forward(self, features: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
        return self.predictions


def postprocess_inputs(
    options: Mapping[str, Any], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Class logits ``[Q, K+1]``, mask embeddings ``[Q, C]`` and features ``[C, h, w]`` at stride 4."""
    height, width = options["image"]
    embed, features = samples.mask_factors(options["queries"], (height // 4, width // 4))
    logits = samples.class_logits(options["queries"], options["classes"], options["kept"])
    return logits.to(device), embed.to(device), features.to(device)


def postprocess_things(options: Mapping[str, Any]) -> int:
    """The first so many classes are things, as of COCO's 133 80 are."""
    return options["classes"] * 80 // 133


def postprocess_model(
    case: Case, build: Callable[..., nn.Module], predictions: Mapping[str, Any], **more: Any
) -> nn.Module:
    """A meta architecture of either project around fixed predictions."""
    options = case.options
    things = {number: number for number in range(postprocess_things(options))}
    return build(
        backbone=_FixedBackbone(),
        sem_seg_head=_FixedHead(predictions, options["classes"]),
        criterion=nn.Identity(),
        num_queries=options["queries"],
        object_mask_threshold=OBJECT_MASK_THRESHOLD,
        overlap_threshold=OVERLAP_THRESHOLD,
        metadata=SimpleNamespace(name="benchmark", thing_dataset_id_to_contiguous_id=things),
        size_divisibility=32,
        sem_seg_postprocess_before_inference=True,
        pixel_mean=(120.0, 120.0, 120.0),
        pixel_std=(60.0, 60.0, 60.0),
        semantic_on=options["task"] == "semantic",
        panoptic_on=options["task"] == "panoptic",
        instance_on=options["task"] == "instances",
        test_topk_per_image=100,
        **more,
    ).eval()


def postprocess_workload(case: Case, context: Context, model: nn.Module, inputs: Any) -> Workload:
    """From fixed predictions to the results of a meta architecture of either project."""
    model.to(context.device)
    height, width = case.options["size"]
    batch = [{"image": samples.image(case.options["image"]), "height": height, "width": width}]

    def run() -> list[dict[str, Any]]:
        with torch.no_grad():
            return model(batch)

    def compared() -> dict[str, np.ndarray]:
        results = run()[0]
        workload.facts.update(outputs.facts_of_results(results))
        return outputs.of_results(results)

    workload = Workload(run, compared, (inputs, batch))
    return workload


def generated_dataset(options: Mapping[str, Any], context: Context) -> Path:
    """Folder of a synthetic COCO dataset; made by the first worker that asks."""
    height, width = options["image"]
    generated = SyntheticOptions(train_images=8, val_images=16, height=height, width=width)
    return generate(context.scratch / f"shapes-{height}x{width}", generated, progress=False)


def loading_workload(options: Mapping[str, Any], context: Context, mapper: Callable[[dict], dict]) -> Workload:
    """One pass of a mapper over the synthetic training images, with the same random numbers each time."""
    root = generated_dataset(options, context)
    content = json.loads((root / "annotations" / "panoptic_train.json").read_text())
    classes = {category["id"]: index for index, category in enumerate(content["categories"])}
    dicts = [
        {
            "file_name": str(root / "train" / annotation["file_name"].replace(".png", ".jpg")),
            "image_id": annotation["image_id"],
            "pan_seg_file_name": str(root / "panoptic_train" / annotation["file_name"]),
            "segments_info": [
                {**segment, "category_id": classes[segment["category_id"]]} for segment in annotation["segments_info"]
            ],
        }
        for annotation in content["annotations"]
    ]

    def run() -> list[dict[str, Any]]:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return [mapper(copy.deepcopy(one)) for one in dicts]

    def compared() -> dict[str, np.ndarray]:
        found = run()
        images = torch.stack([sample["image"][:, ::8, ::8] for sample in found])
        targets = [
            torch.stack([sample["instances"].gt_classes, sample["instances"].gt_masks.flatten(1).sum(1).long()], 1)
            for sample in found
        ]
        return {"images": outputs.array(images), "targets": outputs.array(torch.cat(targets))}

    return Workload(run, compared)
