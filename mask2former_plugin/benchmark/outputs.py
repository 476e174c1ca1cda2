"""What is compared between the sides: small arrays made of predictions, results and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_INSTANCES = 100  # most instances per image, as published
_STEP = 4  # scores are compared at every fourth pixel of both axes


def array(tensor: Tensor) -> np.ndarray:
    """A tensor of any device and precision as NumPy array."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def of_predictions(class_logits: Tensor, mask_logits: Tensor) -> dict[str, np.ndarray]:
    """Of the raw predictions of one image, ``[Q, K+1]`` and ``[Q, h, w]``."""
    return {"class_logits": array(class_logits), "mask_logits": array(mask_logits[:, ::_STEP, ::_STEP])}


def of_results(results: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Of one image's results as Detectron2 gives them."""
    found = {}
    if "sem_seg" in results:
        scores = results["sem_seg"]
        if scores.dim() == 3:  # otherwise a label map
            found["semantic_scores"] = array(scores[:, ::_STEP, ::_STEP])
        found["semantic_labels"] = array(scores.argmax(dim=0).to(torch.int16))
    if "panoptic_seg" in results:
        ids, segments = results["panoptic_seg"]
        found["panoptic_classes"] = panoptic_classes(ids, segments, "category_id")
    if "instances" in results:
        instances = results["instances"]
        masks = instances.pred_masks if instances.has("pred_masks") else instances.pred_masks_rle.dense()
        found["instance_count"] = np.array([len(instances)])  # the last of them hardly show in scores and masks
        found["instance_scores"] = np.zeros(_INSTANCES, dtype=np.float32)
        scores = np.sort(array(instances.scores))[::-1][:_INSTANCES]
        found["instance_scores"][: len(scores)] = scores
        found["instance_masks"] = weighted_masks(masks, instances.scores)
    return found


def panoptic_classes(ids: Tensor, segments: Sequence[Mapping], key: str) -> np.ndarray:
    """The class of each pixel, -1 where there is none: ids of segments may differ between sides."""
    table = torch.full((max([int(ids.max()), *(s["id"] for s in segments)]) + 1,), -1, dtype=torch.int16)
    for segment in segments:
        table[segment["id"]] = segment[key]
    return array(table[ids.long().clamp(min=0).cpu()])


def weighted_masks(masks: Tensor, scores: Tensor) -> np.ndarray:
    """Σ score · mask over the instances at every fourth pixel: does not depend on their order."""
    chosen = masks[:, ::_STEP, ::_STEP].float()
    return array((chosen * scores.float()[:, None, None]).sum(0))


def facts_of_results(results: Mapping[str, Any]) -> dict[str, int]:
    """How much was found in one image, from results as Detectron2 gives them."""
    found = {}
    if "panoptic_seg" in results:
        found["segments"] = len(results["panoptic_seg"][1])
    if "instances" in results:
        found["instances"] = len(results["instances"])
    return found


def of_training(losses: Mapping[str, Tensor], model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Of losses at points that depend on the seed alone, and of the gradients that are there."""
    names = sorted(losses)
    values = torch.stack([losses[name].detach().float() for name in names])
    return {"losses": array(values), **of_total(values.sum(), model)}


def of_total(loss: Tensor, model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Of the total loss; the points at which it is computed may differ between sides."""
    norms = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
    return {"total_loss": array(loss.float().reshape(1)), "gradient_norm": array(torch.stack(norms).norm().reshape(1))}


def of_assignments(matches: Sequence[tuple[Tensor, Tensor]], targets: int) -> dict[str, np.ndarray]:
    """The query of each target in each prediction, -1 for none."""
    table = torch.full((len(matches), targets), -1, dtype=torch.int64)
    for row, (queries, indices) in zip(table, matches):
        row[indices.cpu()] = queries.cpu()
    return {"assignments": array(table)}
