"""Bipartite matching of predicted to true masks: sampled at points (Mask2Former) or on all pixels (MaskFormer)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from mask2former_plugin.modeling.dense_losses import FOCAL_ALPHA
from mask2former_plugin.modeling.layers.linear import linear
from mask2former_plugin.modeling.layers.products import summed_products
from mask2former_plugin.modeling.mask_logits import MaskLogits, mask_logits_of
from mask2former_plugin.modeling.point_sampling import in_order_of_rows, sample_features
from mask2former_plugin.modeling.target_masks import PackedMasks, common_size, resize_masks

_GROUP = 64  # rows that are reduced together
_VALUES_IN_CACHE = 2**18  # logits that a CPU works on together when they are dense
Match = tuple[Tensor, Tensor]
Prediction = tuple[Tensor, MaskLogits]


def in_full_precision(predictions: Sequence[Mapping]) -> list[Prediction]:
    """Class and mask logits of each prediction, in float32 or more; what predictions share is converted once.

    Per-pixel embeddings become channels-last: sampling reads all channels of a pixel at once.
    """
    converted: dict[int, Tensor] = {}

    def convert(tensor: Tensor, channels_last: bool = False) -> Tensor:
        dtype = tensor.dtype if tensor.dtype in (torch.float32, torch.float64) else torch.float32
        if id(tensor) not in converted:
            full = tensor.to(dtype)
            converted[id(tensor)] = _channels_last(full) if channels_last else full
        return converted[id(tensor)]

    result = []
    for prediction in predictions:
        masks = mask_logits_of(prediction)
        features = convert(masks.features, channels_last=True)
        result.append((convert(prediction["pred_logits"]), MaskLogits(convert(masks.embed), features)))
    return result


def _channels_last(maps: Tensor) -> Tensor:
    if maps.is_contiguous(memory_format=torch.channels_last):
        return maps
    # image by image, because PyTorch transposes matrices in blocks and everything else value by value
    tables = [image.flatten(1).T.contiguous() for image in maps]
    table = tables[0][None] if len(tables) == 1 else torch.stack(tables)
    return table.unflatten(1, maps.shape[-2:]).permute(0, 3, 1, 2)


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

    def prepared(self, targets: Sequence[Mapping], padded_size: tuple[int, int]) -> _TargetMatcher:
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
        self.resized: dict[tuple[int, int], list[Tensor]] = {}
        self.packed = [PackedMasks(t["masks"]) for t in targets] if matcher.num_points else []

    @torch.no_grad()
    def __call__(
        self, predictions: Sequence[Prediction], points: Sequence[Tensor], first: int = 0
    ) -> list[list[Match]]:
        """``first``: which of all predictions the first one is, for error messages; 0 is the last layer's."""
        costs = []
        for i, (class_logits, masks) in enumerate(predictions):
            # rows of a table that needs a gradient would be summed up in a slower way
            masks = MaskLogits(masks.embed, masks.features.detach())
            mask_costs = self._point_costs(masks, points[i]) if self.matcher.num_points else self._dense_costs(masks)
            probabilities = class_logits.softmax(-1)
            costs += [
                cost - self.matcher.cost_class * probability[:, target["labels"]]
                for cost, probability, target in zip(mask_costs, probabilities, self.targets)
            ]
        on_host = torch.cat([c.flatten() for c in costs]).cpu()
        if not torch.isfinite(on_host).all():
            raise FloatingPointError(_explain_not_finite(predictions, first))
        matrices = on_host.split([c.numel() for c in costs])
        matches = [_assign(m.reshape(c.shape)) for m, c in zip(matrices, costs)]
        number = len(self.targets)
        return [matches[i : i + number] for i in range(0, len(matches), number)]

    def _point_costs(self, masks: MaskLogits, points: Tensor) -> list[Tensor]:
        costs = []
        for embed, features, packed, own in zip(masks.embed, masks.features, self.packed, points):
            own = in_order_of_rows(own.to(embed.dtype))
            logits = linear(sample_features(features, own), embed)  # [P, Q]
            truth = packed.sample(own, self.padded_size)  # [P, n and a few columns of zeros]
            probability = logits.sigmoid()
            # -log σ(x) and -log(1 - σ(x)) differ by x, which leaves one product where the plain formula has two
            correct = summed_products(truth, logits)
            overlap, total = summed_products(truth, probability), _sum_of_rows(probability)
            cross_entropy = (_sum_of_softplus(logits, probability) - correct) / len(own)
            costs.append(self._mask_costs(cross_entropy, overlap, total, truth.sum(0))[: packed.number].T)
        return costs

    def _dense_costs(self, masks: MaskLogits) -> list[Tensor]:
        costs = []
        for embed, features, truth in zip(masks.embed, masks.features, self._resized(masks.size)):
            sums: list[Tensor | float] = [0.0] * 4
            at_once = max(1, _VALUES_IN_CACHE // len(embed)) if features.device.type == "cpu" else len(truth)
            for pixels, true in zip(features.flatten(1).T.split(at_once), truth.split(at_once)):
                found = _dense_sums(linear(pixels, embed), true.to(embed.dtype))
                sums = [total + some for total, some in zip(sums, found)]
            costs.append(self._mask_costs(sums[0] / len(truth), *sums[1:]).T)
        return costs

    def _resized(self, size: tuple[int, int]) -> list[Tensor]:
        """Truth of each image at the size of the predictions, bool ``[P, n]``; made for all predictions of a size."""
        if size not in self.resized:
            masks = [resize_masks(t["masks"], size, self.padded_size).flatten(1) for t in self.targets]
            self.resized[size] = [some.T.contiguous() for some in masks]
        return self.resized[size]

    def _mask_costs(self, mask_cost: Tensor, overlap: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
        """Mask costs and overlaps ``[n, Q]`` and the areas of both, ``[Q]`` and ``[n]``; costs ``[n, Q]``."""
        dice = (2 * overlap + 1) / (predicted + true[:, None] + 1)
        return self.matcher.cost_mask * mask_cost + self.matcher.cost_dice * (1 - dice)


def _grouped(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[P, Q]`` in groups, ``[G, k, Q]``, and the rest: a CPU's thread then reduces rows that it has written."""
    grouped = len(x) // _GROUP * _GROUP
    return x[:grouped].unflatten(0, (grouped // _GROUP, _GROUP)), x[grouped:]


def _sum_of_rows(x: Tensor) -> Tensor:
    groups, rest = _grouped(x)
    return groups.sum(1).sum(0) + rest.sum(0)


def _dense_sums(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Focal losses ``[n, Q]`` of pixels ``[P, Q]`` and ``[P, n]``, overlaps ``[n, Q]``, areas ``[Q]`` and ``[n]``."""
    probability = logits.sigmoid()
    if_false = F.softplus(logits)
    improbability = 1 - probability
    if_true = (if_false - logits).mul_(improbability).mul_(improbability).mul_(FOCAL_ALPHA)
    if_false.mul_(probability).mul_(probability).mul_(1 - FOCAL_ALPHA)
    focal = _sum_of_rows(if_false) + summed_products(truth, if_true.sub_(if_false))
    return focal, summed_products(truth, probability), _sum_of_rows(probability), truth.sum(0)


def _sum_of_softplus(logits: Tensor, probability: Tensor) -> Tensor:
    """Sums of log(1 + exp(logits)), ``[P, Q]`` to ``[Q]``; both tensors are overwritten.

    log(1 + exp(x)) = max(x, 0) − log max(σ(x), 1 − σ(x)), and a sum of logarithms is the logarithm of a product.
    """
    certainty = probability.sub_(0.5).abs_().add_(0.5)  # within [0.5, 1]: a group's product is far from underflow
    groups, rest = _grouped(certainty)
    return _sum_of_rows(logits.relu_()) - groups.prod(1).log_().sum(0) - rest.log().sum(0)


def _assign(cost: Tensor) -> Match:
    queries, targets = linear_sum_assignment(cost.numpy())
    return torch.as_tensor(queries, dtype=torch.int64), torch.as_tensor(targets, dtype=torch.int64)


def _explain_not_finite(predictions: Sequence[Prediction], first: int) -> str:
    found = []
    for number, (class_logits, masks) in enumerate(predictions, start=first):
        name = f"auxiliary prediction {number - 1}" if number else "the last prediction"
        parts = {"class logits": class_logits, "mask embeddings": masks.embed, "per-pixel embeddings": masks.features}
        bad = [part for part, tensor in parts.items() if not torch.isfinite(tensor).all()]
        if bad:
            found.append(f"{' and '.join(bad)} of {name}")
    what = "; ".join(found) or "the matching costs, though all predictions are finite (mask logits overflow)"
    return (
        f"NaN or infinity in {what}: training has diverged. Lower SOLVER.BASE_LR, warm up for longer, keep "
        "SOLVER.CLIP_GRADIENTS enabled, or leave float16 (bfloat16, or SOLVER.AMP.ENABLED False); check images for NaN"
    )
