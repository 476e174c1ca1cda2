"""Bipartite matching of predicted to true masks: sampled at points (Mask2Former) or on all pixels (MaskFormer)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from mask2former_plugin.modeling.layers.linear import linear
from mask2former_plugin.modeling.mask_logits import MaskLogits, mask_logits_of
from mask2former_plugin.modeling.target_masks import PackedMasks, common_size, resize_masks

FOCAL_ALPHA = 0.25
Match = tuple[Tensor, Tensor]
Prediction = tuple[Tensor, MaskLogits]


def in_full_precision(predictions: Sequence[Mapping]) -> list[Prediction]:
    """Class and mask logits of each prediction, in float32 or more; what predictions share is converted once.

    Per-pixel embeddings become channels-last: sampling reads all channels of a pixel at once.
    """
    converted: dict[int, Tensor] = {}

    def convert(tensor: Tensor, layout: torch.memory_format = torch.preserve_format) -> Tensor:
        dtype = tensor.dtype if tensor.dtype in (torch.float32, torch.float64) else torch.float32
        if id(tensor) not in converted:
            converted[id(tensor)] = tensor.to(dtype, memory_format=layout)
        return converted[id(tensor)]

    result = []
    for prediction in predictions:
        masks = mask_logits_of(prediction)
        features = convert(masks.features, torch.channels_last)
        result.append((convert(prediction["pred_logits"]), MaskLogits(convert(masks.embed), features)))
    return result


class HungarianMatcher(nn.Module):
    """Gives each target of an image a query of its own, at the least total cost (MaskFormer 3.2, Mask2Former 3.3).

    cost = ``cost_class`` · (−class probability) + ``cost_mask`` · mask cost + ``cost_dice`` · (1 − dice)

    With ``num_points`` the mask cost is the binary cross-entropy at so many random points, the same for all queries
    and targets of an image. With ``num_points=0`` it is the focal loss over all pixels of the prediction, targets
    shrunk to it by nearest neighbour.

    All costs are computed on the device in float32 with autocast off, and brought to the host in one transfer.
    """

    def __init__(
        self, cost_class: float = 1.0, cost_mask: float = 1.0, cost_dice: float = 1.0, num_points: int = 0
    ) -> None:
        super().__init__()
        if cost_class == 0 and cost_mask == 0 and cost_dice == 0:
            raise ValueError("cost_class, cost_mask and cost_dice are all 0: at least one must count")
        self.cost_class = cost_class
        self.cost_mask = cost_mask
        self.cost_dice = cost_dice
        self.num_points = num_points

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={getattr(self, k)}" for k in ("cost_class", "cost_mask", "cost_dice", "num_points"))

    def forward(
        self, outputs: Mapping, targets: Sequence[Mapping], padded_size: tuple[int, int] | None = None
    ) -> list[Match]:
        """Matches of one prediction; see :meth:`match`."""
        return self.match([outputs], targets, padded_size)[0]

    def match(
        self,
        predictions: Sequence[Mapping],
        targets: Sequence[Mapping],
        padded_size: tuple[int, int] | None = None,
        points: Sequence[Tensor] | None = None,
    ) -> list[list[Match]]:
        """Matches of several predictions (the last and the auxiliary ones) for the same targets.

        Args:
            predictions: each with ``pred_logits`` ``[B, Q, K+1]`` and ``mask_logits`` or ``pred_masks``.
            targets: one per image: ``labels`` ``[n]`` int64 and ``masks`` ``[n, h, w]``, bool or uint8, not padded.
            padded_size: size of the padded images of the batch; by default the smallest that holds all masks.
            points: for each prediction ``[B, num_points, 2]``, (x, y) in [0, 1] of the padded size; by default drawn
                here.

        Returns:
            For each prediction and image: query indices and target indices, ``[min(Q, n)]`` int64 on the CPU, queries
            ascending.

        Raises:
            FloatingPointError: a prediction has NaN or infinity.
        """
        padded_size = padded_size or common_size([t["masks"] for t in targets])
        device = predictions[0]["pred_logits"].device
        with torch.autocast(device.type, enabled=False):
            full = in_full_precision(predictions)
            if self.num_points and points is None:
                points = [self.draw_points(len(targets), device) for _ in full]
            return self.prepared(targets, padded_size)(full, points)

    def prepared(
        self, targets: Sequence[Mapping], padded_size: tuple[int, int]
    ) -> Callable[[Sequence[Prediction], Sequence[Tensor]], list[list[Match]]]:
        """Matching of predictions in full precision, at their points, with these targets; see :meth:`match`."""
        return _TargetMatcher(self, targets, padded_size)

    def draw_points(self, batch: int, device: torch.device) -> Tensor:
        """Fresh random points, ``[batch, num_points, 2]``, drawn image by image as the original does."""
        return torch.cat([torch.rand(1, self.num_points, 2, device=device) for _ in range(batch)])


class _TargetMatcher:
    """Matching with the targets of a batch, of which is prepared what all predictions need."""

    def __init__(self, matcher: HungarianMatcher, targets: Sequence[Mapping], padded_size: tuple[int, int]) -> None:
        self.matcher = matcher
        self.targets = targets
        self.padded_size = padded_size
        self.packed = [PackedMasks(t["masks"]) for t in targets] if matcher.num_points else []

    @torch.no_grad()
    def __call__(self, predictions: Sequence[Prediction], points: Sequence[Tensor]) -> list[list[Match]]:
        costs = []
        for i, (class_logits, masks) in enumerate(predictions):
            mask_costs = self._point_costs(masks, points[i]) if self.matcher.num_points else self._dense_costs(masks)
            probabilities = class_logits.softmax(-1)
            costs += [
                cost - self.matcher.cost_class * probability[:, target["labels"]]
                for cost, probability, target in zip(mask_costs, probabilities, self.targets)
            ]
        on_host = torch.cat([c.flatten() for c in costs]).cpu()
        if not torch.isfinite(on_host).all():
            raise FloatingPointError(_explain_not_finite(predictions))
        matrices = on_host.split([c.numel() for c in costs])
        matches = [_assign(m.reshape(c.shape)) for m, c in zip(matrices, costs)]
        number = len(self.targets)
        return [matches[i : i + number] for i in range(0, len(matches), number)]

    def _point_costs(self, masks: MaskLogits, points: Tensor) -> list[Tensor]:
        costs = []
        for embed, features, packed, own in zip(masks.embed, masks.features_at(points), self.packed, points):
            logits = linear(features, embed)  # [P, Q]
            truth = packed.sample(own.to(logits.dtype), self.padded_size).T.contiguous()  # [n, P]
            # -log σ(x) and -log(1 - σ(x)) differ by x, which leaves one product where the plain formula has two
            cross_entropy = F.softplus(logits).sum(0)[:, None] - (truth @ logits).T
            costs.append(self._mask_costs(cross_entropy / len(logits), logits.sigmoid(), truth))
        return costs

    def _dense_costs(self, masks: MaskLogits) -> list[Tensor]:
        costs = []
        for logits, target in zip(masks.dense(), self.targets):
            truth = resize_masks(target["masks"], masks.size, self.padded_size).flatten(1).to(logits.dtype)
            logits = logits.flatten(1).T
            probability = logits.sigmoid()
            if_true = FOCAL_ALPHA * (1 - probability) ** 2 * F.softplus(-logits)
            if_false = (1 - FOCAL_ALPHA) * probability**2 * F.softplus(logits)
            focal = if_false.sum(0)[:, None] + (truth @ (if_true - if_false)).T
            costs.append(self._mask_costs(focal / len(logits), probability, truth))
        return costs

    def _mask_costs(self, mask_cost: Tensor, probability: Tensor, truth: Tensor) -> Tensor:
        """Probabilities ``[P, Q]`` and truth ``[n, P]``; costs ``[Q, n]``."""
        overlap = 2 * (truth @ probability).T
        total = probability.sum(0)[:, None] + truth.sum(1)
        return self.matcher.cost_mask * mask_cost + self.matcher.cost_dice * (1 - (overlap + 1) / (total + 1))


def _assign(cost: Tensor) -> Match:
    queries, targets = linear_sum_assignment(cost.numpy())
    return torch.as_tensor(queries, dtype=torch.int64), torch.as_tensor(targets, dtype=torch.int64)


def _explain_not_finite(predictions: Sequence[tuple[Tensor, MaskLogits]]) -> str:
    names = ["the last prediction"] + [f"auxiliary prediction {i}" for i in range(len(predictions) - 1)]
    found = []
    for name, (class_logits, masks) in zip(names, predictions):
        parts = {"class logits": class_logits, "mask embeddings": masks.embed, "per-pixel embeddings": masks.features}
        bad = [part for part, tensor in parts.items() if not torch.isfinite(tensor).all()]
        if bad:
            found.append(f"{' and '.join(bad)} of {name}")
    what = "; ".join(found) or "the matching costs, though all predictions are finite (mask logits overflow)"
    return (
        f"NaN or infinity in {what}: training has diverged. Lower SOLVER.BASE_LR, warm up for longer, keep "
        "SOLVER.CLIP_GRADIENTS enabled, or leave float16 (bfloat16, or SOLVER.AMP.ENABLED False); check images for NaN"
    )
