"""Losses of MaskFormer and Mask2Former: classes of all queries, masks of the matched ones, for every decoder layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mask2former_plugin.modeling.mask_logits import MaskLogits
from mask2former_plugin.modeling.matcher import FOCAL_ALPHA, HungarianMatcher, Match, in_full_precision
from mask2former_plugin.modeling.point_sampling import DeferredRand, sample_logits, uncertain_points
from mask2former_plugin.modeling.target_masks import common_size, pad_masks, sample_masks

# Full-size masks of the dense loss are made a few at a time: at most so many pixels at once (16 MB in float32).
_PIXELS_AT_ONCE = 2**22


class SetCriterion(nn.Module):
    """Matching and losses of all predictions (MaskFormer, section 3.2; Mask2Former, section 3.3).

    ``loss_ce``: cross-entropy of all queries, unmatched ones against "no object" with weight ``eos_coef``.
    ``loss_mask`` and ``loss_dice`` of the matched queries, divided by the number of targets averaged over all workers
    of all nodes:

    - ``num_points > 0`` (Mask2Former): binary cross-entropy and dice at points, of which ``importance_sample_ratio``
      are the most uncertain of ``oversample_ratio * num_points`` random ones and the rest is random;
    - ``num_points = 0`` (MaskFormer): focal loss and dice over all pixels of the padded images.

    Auxiliary predictions are matched anew and their losses carry the suffix ``_0``, ``_1``, … Predictions none of
    whose losses is in ``weight_dict`` are skipped. For one seed the random points are those of the original
    implementation.

    Args:
        num_classes: classes without "no object", which is the last.
        matcher: assigns targets to queries.
        weight_dict: loss name to weight; applied by the model, not here. Empty: all losses are computed.
        eos_coef: weight of "no object".
        losses: ``"labels"``, ``"masks"`` or both.
    """

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        weight_dict: dict[str, float],
        eos_coef: float,
        losses: Sequence[str],
        num_points: int = 0,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
    ) -> None:
        super().__init__()
        unknown = set(losses) - {"labels", "masks"}
        if unknown:
            raise ValueError(f"unknown losses {sorted(unknown)}; there are 'labels' and 'masks'")
        if num_points and (oversample_ratio < 1 or not 0 <= importance_sample_ratio <= 1):
            raise ValueError(
                f"oversample_ratio must be at least 1 and importance_sample_ratio within [0, 1], "
                f"got {oversample_ratio} and {importance_sample_ratio}"
            )
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = weight_dict
        self.eos_coef = eos_coef
        self.losses = list(losses)
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = eos_coef
        self.register_buffer("empty_weight", empty_weight)

    def extra_repr(self) -> str:
        names = (
            "num_classes",
            "eos_coef",
            "losses",
            "num_points",
            "oversample_ratio",
            "importance_sample_ratio",
            "weight_dict",
        )
        return "\n".join(f"{name}={getattr(self, name)}" for name in names)

    def forward(
        self, outputs: Mapping, targets: Sequence[Mapping], padded_size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Losses, not yet weighted.

        Args:
            outputs: ``pred_logits`` ``[B, Q, K+1]``, ``mask_logits`` or ``pred_masks``, and ``aux_outputs``, a list
                of the same.
            targets: one per image: ``labels`` ``[n]`` int64 and ``masks`` ``[n, h, w]``, bool or uint8, not padded.
            padded_size: size of the padded images of the batch; by default the smallest that holds all masks.

        Raises:
            FloatingPointError: a prediction has NaN or infinity.
        """
        padded_size = padded_size or common_size([t["masks"] for t in targets])
        named = [("", outputs)] + [(f"_{i}", aux) for i, aux in enumerate(outputs.get("aux_outputs", ()))]
        named = [(suffix, prediction) for suffix, prediction in named if self._wanted(suffix)]
        suffixes, predictions = [n[0] for n in named], [n[1] for n in named]
        device = outputs["pred_logits"].device
        with torch.autocast(device.type, enabled=False):
            matching_points, loss_points = self._draw_points(predictions, targets, device)
            matches = self.matcher.match(predictions, targets, padded_size, matching_points)
            num_masks = average_number_of_masks(targets, device)
            result = {}
            for i, (class_logits, mask_logits) in enumerate(in_full_precision(predictions)):
                losses = {}
                if "labels" in self.losses:
                    losses["loss_ce"] = self._class_loss(class_logits, targets, matches[i])
                if "masks" in self.losses:
                    if self.num_points:
                        sums = self._point_losses(mask_logits, targets, matches[i], padded_size, loss_points[i])
                    else:
                        sums = dense_losses(mask_logits, targets, matches[i], padded_size)
                    losses["loss_mask"], losses["loss_dice"] = (s / num_masks for s in sums)
                result.update({name + suffixes[i]: loss for name, loss in losses.items()})
        return result

    def _wanted(self, suffix: str) -> bool:
        return not self.weight_dict or any(
            f"{name}{suffix}" in self.weight_dict for name in ("loss_ce", "loss_mask", "loss_dice")
        )

    def _draw_points(
        self, predictions: Sequence[Mapping], targets: Sequence[Mapping], device: torch.device
    ) -> tuple[list[Tensor] | None, list[tuple[DeferredRand, DeferredRand]]]:
        """Points of matching and loss of each prediction, in the order in which the original draws them."""
        matching, losses = [], []
        for prediction in predictions:
            if self.matcher.num_points:
                matching.append(self.matcher.draw_points(len(targets), device))
            if self.num_points and "masks" in self.losses:
                matched = sum(min(len(t["labels"]), prediction["pred_logits"].shape[1]) for t in targets)
                candidates = DeferredRand(matched, int(self.num_points * self.oversample_ratio), 2, device=device)
                losses.append(
                    (candidates, DeferredRand(matched, self.num_points - self._num_uncertain, 2, device=device))
                )
        return matching or None, losses

    @property
    def _num_uncertain(self) -> int:
        return int(self.importance_sample_ratio * self.num_points)

    def _class_loss(self, logits: Tensor, targets: Sequence[Mapping], matches: Sequence[Match]) -> Tensor:
        classes = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)
        labels = torch.cat([t["labels"][match[1].to(logits.device)] for t, match in zip(targets, matches)])
        batch, query = _flat_matches(matches)
        classes[batch.to(logits.device), query.to(logits.device)] = labels
        return F.cross_entropy(logits.transpose(1, 2), classes, self.empty_weight.to(logits.dtype))

    def _point_losses(
        self,
        masks: MaskLogits,
        targets: Sequence[Mapping],
        matches: Sequence[Match],
        padded_size: tuple[int, int],
        draws: tuple[DeferredRand, DeferredRand],
    ) -> tuple[Tensor, Tensor]:
        logits = masks.select(*_flat_matches(matches))
        points = uncertain_points(logits, draws[0].values(), self._num_uncertain, draws[1].values())
        own_points = points.split([len(match[1]) for match in matches])
        truth = torch.cat(
            [
                sample_masks(target["masks"][match[1].to(points.device)], p, padded_size)
                for target, match, p in zip(targets, matches, own_points)
            ]
        )
        sampled = sample_logits(logits, points)
        cross_entropy = (
            F.binary_cross_entropy_with_logits(sampled, truth.to(sampled.dtype), reduction="none").mean(1).sum()
        )
        return cross_entropy, dice_losses(sampled.sigmoid(), truth).sum()


def average_number_of_masks(targets: Sequence[Mapping], device: torch.device) -> float | Tensor:
    """Number of targets in the batch of a worker, averaged over all workers of all nodes, at least 1."""
    number = float(sum(len(t["labels"]) for t in targets))
    workers = comm.get_world_size()
    if workers == 1:
        return max(number, 1.0)
    total = torch.tensor(number, device=device)
    dist.all_reduce(total)
    return (total / workers).clamp(min=1)


def dice_losses(probability: Tensor, truth: Tensor) -> Tensor:
    """1 − dice of each row, smoothed by one in numerator and denominator; ``[N, P]`` to ``[N]``."""
    return 1 - (2 * (probability * truth).sum(1) + 1) / (probability.sum(1) + truth.sum(1) + 1)


def dense_losses(
    masks: MaskLogits, targets: Sequence[Mapping], matches: Sequence[Match], padded_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Focal (mean over pixels) and dice loss of the matched masks at the size of the padded images, summed over masks.

    The full-size maps of a few masks at a time exist, in the forward and again in the backward pass.
    """
    at_once = max(1, _PIXELS_AT_ONCE // (padded_size[0] * padded_size[1]))
    logits = masks.select(*_flat_matches(matches))
    focal = dice = logits.sum() * 0
    for target, match, own_logits in zip(targets, matches, logits.split([len(match[1]) for match in matches])):
        chosen = match[1].to(logits.device)
        for some_logits, some in zip(own_logits.split(at_once), chosen.split(at_once)):
            sums = checkpoint(
                _dense_losses,
                some_logits,
                target["masks"][some],
                padded_size,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            focal, dice = focal + sums[0], dice + sums[1]
    return focal, dice


def _dense_losses(logits: Tensor, masks: Tensor, padded_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    logits = F.interpolate(logits[:, None], size=padded_size, mode="bilinear", align_corners=False).flatten(1)
    truth = pad_masks(masks, padded_size).flatten(1).to(logits.dtype)
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    miss = probability + truth - 2 * probability * truth  # 1 - probability of the truth
    weight = FOCAL_ALPHA * truth + (1 - FOCAL_ALPHA) * (1 - truth)
    return (weight * cross_entropy * miss**2).mean(1).sum(), dice_losses(probability, truth).sum()


def _flat_matches(matches: Sequence[Match]) -> tuple[Tensor, Tensor]:
    """Image index and query index of every match, ``[N]`` each, image by image."""
    batch = torch.cat([torch.full_like(match[0], i) for i, match in enumerate(matches)])
    return batch, torch.cat([match[0] for match in matches])
