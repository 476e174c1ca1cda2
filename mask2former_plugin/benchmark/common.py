"""What the sides share: config overrides, loading weights, batches, and the parts of the work that are no side's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def load_model(cfg: CfgNode, options: Mapping[str, Any], context: Context) -> nn.Module:
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


def training_outputs(model: nn.Module, losses: Callable[[], Any]) -> dict[str, np.ndarray]:
    """Losses and gradients at points of a fixed seed; the gradients are thrown away."""
    torch.manual_seed(0)
    found = losses()
    sum(found.values()).backward()
    result = outputs.of_training(found, model)
    model.zero_grad()
    return result


def attention_inputs(options: Mapping[str, Any], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values ``[1, S, M, D]``, sampling locations ``[1, S, M, L, P, 2]`` near each token, weights ``[1, S, M, L, P]``."""
    shapes, heads, points = options["shapes"], options["heads"], options["points"]
    tokens, levels = sum(h * w for h, w in shapes), len(shapes)
    rng = samples.generator(6)
    value = torch.randn(1, tokens, heads, options["width"], generator=rng)
    centres = []
    for height, width in shapes:
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        centres.append(torch.stack([x, y], -1).flatten(0, 1))
    extent = torch.tensor([[w, h] for h, w in shapes], dtype=torch.float32)[None, :, None]
    offsets = torch.randn(1, tokens, heads, levels, points, 2, generator=rng) * 3 / extent  # three cells wide
    locations = torch.cat(centres)[None, :, None, None, None] + offsets
    weights = torch.randn(1, tokens, heads, levels * points, generator=rng).softmax(-1).unflatten(-1, (levels, points))
    return value.to(device), locations.to(device), weights.to(device)


def attention_workload(case: Case, context: Context, attention: Callable[..., torch.Tensor]) -> Workload:
    """Forward, or forward and backward, of any implementation ``attention(value, locations, weights)``."""
    value, locations, weights = attention_inputs(case.options, context.device)
    if context.side.precision == "bfloat16":
        value, weights = value.bfloat16(), weights.bfloat16()  # locations stay as they are: they need the precision
    inputs = (value, locations, weights)
    if case.kind == "attention":

        def run() -> torch.Tensor:
            with torch.no_grad():
                return attention(*inputs)

        return Workload(run, lambda: {"attention": outputs.array(run())}, inputs)

    for one in inputs:
        one.requires_grad_()
    direction = torch.randn(1, value.shape[1], value.shape[2] * value.shape[3], generator=samples.generator(7))
    direction = direction.to(value)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(attention(*inputs), inputs, direction)

    def compared() -> dict[str, np.ndarray]:
        names = ("value_gradient", "location_gradient", "weight_gradient")
        return dict(zip(names, map(outputs.array, gradients())))

    return Workload(gradients, compared, (inputs, direction))


def matching_inputs(options: Mapping[str, Any], device: torch.device) -> tuple[list, torch.Tensor, dict[str, torch.Tensor]]:
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


def matcher_weights() -> dict[str, float]:
    """Published costs of Mask2Former."""
    return {"cost_class": 2.0, "cost_mask": 5.0, "cost_dice": 5.0, "num_points": 112 * 112}
