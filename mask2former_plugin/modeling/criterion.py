"""Losses of MaskFormer and Mask2Former: classes of all queries, masks of the matched ones, for every decoder layer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor, nn

from mask2former_plugin.modeling.dense_losses import dense_losses
from mask2former_plugin.modeling.mask_logits import MaskLogits, multiply_out
from mask2former_plugin.modeling.matched_masks import MatchedMasks
from mask2former_plugin.modeling.matcher import HungarianMatcher, Match, Prediction, in_full_precision
from mask2former_plugin.modeling.point_losses import point_losses
from mask2former_plugin.modeling.point_sampling import LossPoints, uncertain_points
from mask2former_plugin.modeling.target_masks import common_size


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
        device = outputs["pred_logits"].device
        with torch.autocast(device.type, enabled=False):
            predictions = in_full_precision([prediction for _, prediction in named])
            pairs, points = self._match(predictions, targets, padded_size)
            num_masks = average_number_of_masks(targets, device)
            losses = {}
            if "labels" in self.losses:
                losses["loss_ce"] = self._class_losses([logits for logits, _ in predictions], targets, pairs)
            if "masks" in self.losses:
                masks = [masks for _, masks in predictions]
                sums = self._mask_losses(masks, targets, pairs, padded_size, points)
                losses["loss_mask"], losses["loss_dice"] = ([s / num_masks for s in of_kind] for of_kind in sums)
        return {
            name + suffix: of_kind[i] for i, (suffix, _) in enumerate(named) for name, of_kind in losses.items()
        }

    def _wanted(self, suffix: str) -> bool:
        return not self.weight_dict or any(
            f"{name}{suffix}" in self.weight_dict for name in ("loss_ce", "loss_mask", "loss_dice")
        )

    def _match(
        self,
        predictions: Sequence[Prediction],
        targets: Sequence[Mapping],
        padded_size: tuple[int, int],
    ) -> tuple[list[list[Match]], list[Tensor]]:
        """Matches of each prediction and image, and the points of the losses of each prediction.

        The random numbers of matching and losses come in the order in which the original draws them. On a CPU the
        predictions take turns; elsewhere all are matched at once, for which the draws of the losses are put off.
        """
        device = predictions[0][0].device
        matcher = self.matcher.prepared(targets, padded_size)
        at_once = 1 if _takes_turns(device) else len(predictions)
        with_points = self.num_points and "masks" in self.losses
        matches, points = [], []
        for start in range(0, len(predictions), at_once):
            group = predictions[start : start + at_once]
            matching, draws = [], []
            for class_logits, _ in group:
                if self.matcher.num_points:
                    matching.append(self.matcher.draw_points(len(targets), device))
                if with_points:
                    number = sum(min(len(t["labels"]), class_logits.shape[1]) for t in targets)
                    candidates = int(self.num_points * self.oversample_ratio)
                    others = self.num_points - self._num_uncertain
                    draws.append(LossPoints(number, candidates, others, device, deferred=at_once > 1))
            found = matcher(group, matching, first=start)
            matches += found
            points += [
                self._choose_points(masks, own, draw) for (_, masks), own, draw in zip(group, found, draws)
            ]
        return matches, points

    @torch.no_grad()
    def _choose_points(self, masks: MaskLogits, matches: Sequence[Match], draws: LossPoints) -> Tensor:
        """Points of each matched mask of a prediction, image by image, ``[N, num_points, 2]``."""
        batch, query = _flat_matches(matches)
        rows = (batch * masks.embed.shape[1] + query).to(masks.embed.device, non_blocking=True)
        embed, images = masks.embed.flatten(0, 1).index_select(0, rows), batch.tolist()
        chosen, start = [], 0
        for candidates in draws.candidates():
            stop = start + len(candidates)
            counts = [images[start:stop].count(image) for image in range(len(matches))]
            logits = multiply_out(embed[start:stop], counts, masks.features)
            chosen.append(uncertain_points(logits, candidates, self._num_uncertain))
            start = stop
        return torch.cat([torch.cat(chosen), draws.others()], dim=1)

    @property
    def _num_uncertain(self) -> int:
        return int(self.importance_sample_ratio * self.num_points)

    def _class_losses(
        self, logits: Sequence[Tensor], targets: Sequence[Mapping], matches: Sequence[Sequence[Match]]
    ) -> list[Tensor]:
        """Weighted mean cross-entropy of each prediction."""
        device = logits[0].device
        labels = torch.cat([t["labels"] for t in targets])
        starts = [0, *itertools.accumulate(len(t["labels"]) for t in targets)]
        shapes = [tuple(some.shape[:2]) for some in logits]
        first = [0, *itertools.accumulate(batch * queries for batch, queries in shapes)]
        rows, wanted = [], []
        for begin, (_, queries), found in zip(first, shapes, matches):
            for image, (query, target) in enumerate(found):
                rows.append(query + (begin + image * queries))
                wanted.append(target + starts[image])
        rows, wanted = torch.stack([torch.cat(rows), torch.cat(wanted)]).to(device, non_blocking=True)
        classes = torch.full((first[-1],), self.num_classes, dtype=torch.int64, device=device)
        classes[rows] = labels[wanted]
        weight = self.empty_weight.to(logits[0].dtype)
        errors = F.cross_entropy(torch.cat([some.flatten(0, 1) for some in logits]), classes, weight, reduction="none")
        sizes = [batch * queries for batch, queries in shapes]
        return [e.sum() / w.sum() for e, w in zip(errors.split(sizes), weight[classes].split(sizes))]

    def _mask_losses(
        self,
        masks: Sequence[MaskLogits],
        targets: Sequence[Mapping],
        matches: Sequence[Sequence[Match]],
        padded_size: tuple[int, int],
        points: Sequence[Tensor],
    ) -> Tensor:
        """Cross-entropy or focal loss and dice loss, summed over the masks of each prediction, ``[2, predictions]``."""
        found = masks[0].embed.new_zeros((2, len(masks)))
        by_features: dict[int, list[int]] = {}
        for number, some in enumerate(masks):
            by_features.setdefault(id(some.features), []).append(number)
        for numbers in by_features.values():
            group = [masks[number] for number in numbers]
            rows = _matched_rows([(number, masks[number].embed.shape[1], matches[number]) for number in numbers])
            order = sorted(range(len(rows)), key=lambda i: rows[i][1:3])
            host = torch.tensor([(rows[i][0], rows[i][3]) for i in order], dtype=torch.int64).view(-1, 2).T
            embed_row, prediction = host.contiguous().to(found.device, non_blocking=True)
            embed = torch.cat([some.embed.flatten(0, 1) for some in group]).index_select(0, embed_row)
            matched = MatchedMasks([rows[i][1:3] for i in order], [t["masks"] for t in targets], padded_size)
            if self.num_points:
                of_masks = [some for number in numbers for some in points[number]]
                losses = point_losses(embed, group[0].features, matched, [of_masks[i] for i in order])
            else:
                losses = dense_losses(embed, group[0].features, matched)
            found = found.index_add(1, prediction, torch.stack(losses))
        return found


def _takes_turns(device: torch.device) -> bool:
    """Whether predictions are matched one by one: on a CPU nothing waits for results, and draws are used at once."""
    return device.type == "cpu"


def _matched_rows(predictions: Sequence[tuple[int, int, Sequence[Match]]]) -> list[tuple[int, int, int, int]]:
    """Row in the embeddings of all these predictions, image, target and number of the prediction of every match.

    Args:
        predictions: number, queries and matches of each image of each prediction.
    """
    rows, start = [], 0
    for number, queries, matches in predictions:
        for image, (query, target) in enumerate(matches):
            rows += [(start + q, image, t, number) for q, t in zip(query.tolist(), target.tolist())]
            start += queries
    return rows


def average_number_of_masks(targets: Sequence[Mapping], device: torch.device) -> float | Tensor:
    """Number of targets in the batch of a worker, averaged over all workers of all nodes, at least 1."""
    number = float(sum(len(t["labels"]) for t in targets))
    workers = comm.get_world_size()
    if workers == 1:
        return max(number, 1.0)
    total = torch.tensor(number, device=device)
    dist.all_reduce(total)
    return (total / workers).clamp(min=1)


def _flat_matches(matches: Sequence[Match]) -> tuple[Tensor, Tensor]:
    """Image index and query index of every match, ``[N]`` each, image by image."""
    batch = torch.cat([torch.full_like(match[0], i) for i, match in enumerate(matches)])
    return batch, torch.cat([match[0] for match in matches])
