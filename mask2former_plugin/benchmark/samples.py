"""Inputs that all sides share: images, targets, predictions, and random weights with results like a trained model's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEPT = 0.25  # part of the queries that become segments or instances
KEPT_SCORE = 0.8  # score above which a query counts as kept, the published threshold of panoptic segments
MASK_AREA = 0.03  # mean part of the image that a mask covers
_SURE = 0.95  # class probability of the median query, "no object" left out
_MASK_SPREAD = 5.0  # standard deviation of the mask logits of one query
_RESIDUAL, _SHARPNESS = 0.2, 2.0  # factors of what decoder layers add, and of the queries and keys of cross-attention


def generator(*seeds: int) -> torch.Generator:
    """Random numbers that depend on the seeds alone."""
    seed = 0
    for one in seeds:
        seed = seed * 1_000_003 + one
    return torch.Generator().manual_seed(seed)


def image(size: tuple[int, int], seed: int = 0) -> Tensor:
    """A picture of coarse and fine blotches, uint8 ``[3, H, W]``."""
    rng = generator(1, seed)
    height, width = size
    result = torch.zeros(1, 3, height, width)
    for cell, strength in ((64, 60.0), (8, 25.0), (1, 8.0)):
        coarse = torch.randn(1, 3, height // cell + 2, width // cell + 2, generator=rng)
        result += strength * F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    return (result[0] + 120).clamp(0, 255).to(torch.uint8)


def masks(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Ellipses of many sizes, bool ``[n, H, W]``; small ones are more frequent than large ones."""
    rng = generator(2, seed, count)
    height, width = size
    rows, columns = torch.arange(height).float()[:, None], torch.arange(width).float()
    result = torch.empty((count, height, width), dtype=torch.bool)
    for mask in result:
        y, x, size_, squeeze = torch.rand(4, generator=rng).tolist()
        radius = max(2.0, 0.03 * 15**size_ * min(size))  # 3 % to 45 % of the shorter side
        tall, wide = radius * (0.5 + squeeze / 2), radius
        torch.le(((rows - y * height) / tall) ** 2 + ((columns - x * width) / wide) ** 2, 1.0, out=mask)
    return result


def target(count: int, size: tuple[int, int], classes: int, seed: int = 0) -> dict[str, Tensor]:
    """``labels`` ``[n]`` int64 and ``masks`` ``[n, H, W]`` bool of one image."""
    labels = torch.randint(0, classes, (count,), generator=generator(3, seed, count))
    return {"labels": labels, "masks": masks(count, size, seed)}


def class_logits(queries: int, classes: int, kept: int, seed: int = 0) -> Tensor:
    """``[Q, K+1]``: ``kept`` queries are sure of a class, the others of "no object"."""
    rng = generator(4, seed)
    logits = torch.randn(queries, classes + 1, generator=rng)
    order = torch.randperm(queries, generator=rng)
    labels = torch.randint(0, classes, (queries,), generator=rng)
    logits[order[:kept], labels[order[:kept]]] += 10.0
    logits[order[kept:], -1] += 10.0
    return logits


def mask_factors(queries: int, size: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Mask embeddings ``[Q, C]`` and features ``[C, H, W]`` (C = queries) whose products are blobs of many sizes."""
    truth = masks(queries, size, seed)[None].float()
    # a soft border, some cells wide
    soft = F.avg_pool2d(truth, 5, stride=1, padding=2, count_include_pad=False)[0]
    rng = generator(5, seed)
    mixing, _ = torch.linalg.qr(torch.randn(queries, queries, generator=rng))
    features = torch.einsum("qc,qhw->chw", mixing, soft * 12 - 6)
    return mixing, features + 0.1 * torch.randn(features.shape, generator=rng)


@torch.no_grad()
def make_realistic(model: nn.Module, batch: list[Mapping[str, Any]], passes: int = 3) -> None:
    """Change the last layers of a random model such that its results have the size of a trained model's; in place.

    A random decoder makes all queries alike and gives every class the same score: either no query survives or all do.
    Here decoder layers add less to their queries and look at few places, so that queries stay different. The class head
    is scaled until the median query is 95 % sure of one class, and the bias of "no object" lets a quarter of the
    queries pass the score of 0.8. The mask head is scaled to sure masks and shifted, along the mean per-pixel
    embedding, until a mask covers 3 % of the image on average. Masks steer the attention of the next layers, hence the
    repetition.

    Args:
        model: a MaskFormer or Mask2Former of ours, on any device.
        batch: one image as the model takes it.
    """
    predictor = model.sem_seg_head.predictor
    classes, mask_head = predictor.class_embed, predictor.mask_embed.layers[-1]
    for name, parameter in predictor.named_parameters():
        if name.endswith(("out_proj.weight", "linear2.weight")):
            parameter.mul_(_RESIDUAL)
        elif name.endswith("multihead_attn.in_proj_weight"):
            parameter[: 2 * parameter.shape[1]].mul_(_SHARPNESS)
    for _ in range(passes):
        outputs = model.sem_seg_head(model.backbone(model.preprocess(batch).tensor))
        factors = outputs["mask_logits"]
        _spread_masks(mask_head, factors.embed[0], factors.features[0].flatten(1))
        _spread_classes(classes, outputs["pred_logits"][0])


def _spread_classes(head: nn.Linear, logits: Tensor) -> None:
    logits = logits - head.bias
    objects, nothing = logits[:, :-1], logits[:, -1]

    def sure(scale: float) -> float:
        return (scale * objects).softmax(1).amax(1).median().item()

    scale = _bisect(lambda exponent: sure(math.exp(exponent)) - _SURE, -10, 20)
    scale = math.exp(scale)

    def kept(shift: float) -> float:
        scores, labels = torch.cat([scale * objects, scale * nothing[:, None] - shift], 1).softmax(1).max(1)
        return ((scores > KEPT_SCORE) & (labels != objects.shape[1])).float().mean().item() - KEPT

    reach = 4 * scale * logits.abs().max().item() + 20
    head.weight.mul_(scale)
    head.bias.zero_()
    head.bias[-1] = -_bisect(kept, -reach, reach)


def _spread_masks(head: nn.Linear, embed: Tensor, features: Tensor) -> None:
    logits = embed @ features
    scale = _MASK_SPREAD / logits.std(1).mean().item()
    mean = features.mean(1)
    direction = mean / mean.square().sum()
    common = direction @ features

    def covered(shift: float) -> float:
        return MASK_AREA - (scale * logits > shift * common).float().mean().item()

    reach = 4 * scale * logits.abs().max().item()
    shift = _bisect(covered, -reach, reach)
    head.weight.mul_(scale)
    head.bias.mul_(scale).sub_(shift * direction)


def _bisect(function: Any, low: float, high: float, steps: int = 40) -> float:
    """Where a rising function crosses zero."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return high
