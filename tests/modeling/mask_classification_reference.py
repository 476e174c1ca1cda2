"""Matching and losses of both papers, mask by mask on dense, padded tensors: slow and obvious, to test against."""

import itertools

import torch
import torch.nn.functional as F


def random_masks(number, height, width):
    """Random rectangles and noise, bool ``[number, height, width]``."""
    masks = torch.zeros(number, height, width, dtype=torch.bool)
    for mask in masks:
        top, left = int(torch.randint(0, height - 3, ())), int(torch.randint(0, width - 3, ()))
        mask[top : top + int(torch.randint(3, height, ())), left : left + int(torch.randint(3, width, ()))] = True
        mask ^= torch.rand(height, width) < 0.05
    return masks


def random_targets(numbers, sizes, num_classes):
    return [
        {"labels": torch.randint(0, num_classes, (n,)), "masks": random_masks(n, *size)}
        for n, size in zip(numbers, sizes)
    ]


def padded(targets, size):
    """The same targets with float masks of the padded size."""
    result = []
    for target in targets:
        masks = torch.zeros(len(target["masks"]), *size, dtype=torch.float64)
        masks[:, : target["masks"].shape[1], : target["masks"].shape[2]] = target["masks"]
        result.append({"labels": target["labels"], "masks": masks})
    return result


def at(maps, points):
    """Bilinear values of ``[n, h, w]`` at ``[P, 2]``, one map after the other."""
    grid = (2 * points.to(maps.dtype) - 1)[None, None]
    return (
        torch.stack([F.grid_sample(m[None, None], grid, align_corners=False)[0, 0, 0] for m in maps])
        if len(maps)
        else (maps.new_zeros(0, len(points)))
    )


def dice_loss(logits, truth):
    p = torch.sigmoid(logits)
    return 1 - (2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1)


def bce(logits, truth):
    p = torch.sigmoid(logits)
    return -(truth * p.log() + (1 - truth) * (1 - p).log()).mean()


def focal(logits, truth):
    p = torch.sigmoid(logits)
    return -(0.25 * truth * (1 - p) ** 2 * p.log() + 0.75 * (1 - truth) * p**2 * (1 - p).log()).mean()


def cost_matrix(class_logits, mask_values, labels, truth, mask_loss, weights):
    """``[Q, n]`` from values of one image, entry by entry."""
    cost = torch.zeros(len(class_logits), len(labels), dtype=torch.float64)
    for q, j in itertools.product(range(cost.shape[0]), range(cost.shape[1])):
        probability = class_logits[q].softmax(0)[labels[j]]
        cost[q, j] = (
            -weights[0] * probability
            + weights[1] * mask_loss(mask_values[q], truth[j])
            + weights[2] * dice_loss(mask_values[q], truth[j])
        )
    return cost


def best_assignment(cost):
    """Pairs (query, target) of least total cost by trying all of them."""
    queries, targets = cost.shape
    if queries >= targets:
        options = (tuple(zip(chosen, range(targets))) for chosen in itertools.permutations(range(queries), targets))
    else:
        options = (tuple(zip(range(queries), chosen)) for chosen in itertools.permutations(range(targets), queries))
    return sorted(min(options, key=lambda pairs: sum(float(cost[q, j]) for q, j in pairs)))


def matches_at_points(class_logits, masks, targets, num_points, weights):
    """Matching of Mask2Former for a batch; draws the points as the original does."""
    result = []
    for logits, mask_logits, target in zip(class_logits, masks, targets):
        points = torch.rand(1, num_points, 2)[0]
        cost = cost_matrix(logits, at(mask_logits, points), target["labels"], at(target["masks"], points), bce, weights)
        result.append(best_assignment(cost))
    return result


def matches_on_pixels(class_logits, masks, targets, weights):
    """Matching of MaskFormer for a batch."""
    result = []
    for logits, mask_logits, target in zip(class_logits, masks, targets):
        truth = target["masks"]
        if len(truth):
            truth = F.interpolate(truth[:, None], size=mask_logits.shape[1:], mode="nearest")[:, 0]
        cost = cost_matrix(logits, mask_logits.flatten(1), target["labels"], truth.flatten(1), focal, weights)
        result.append(best_assignment(cost))
    return result


def class_loss(class_logits, targets, matches, eos_coef):
    none = class_logits.shape[2] - 1
    total = weight_sum = 0.0
    for logits, target, pairs in zip(class_logits, targets, matches):
        wanted = {q: int(target["labels"][j]) for q, j in pairs}
        for q in range(len(logits)):
            label = wanted.get(q, none)
            weight = eos_coef if label == none else 1.0
            total = total - weight * logits[q].log_softmax(0)[label]
            weight_sum += weight
    return total / weight_sum


def point_losses(masks, targets, matches, num_points, oversample, importance, num_masks):
    pairs = [(b, q, j) for b, found in enumerate(matches) for q, j in found]
    candidates = torch.rand(len(pairs), int(num_points * oversample), 2)
    uncertain = int(importance * num_points)
    extra = torch.rand(len(pairs), num_points - uncertain, 2)
    mask_loss, dice = masks.sum() * 0, masks.sum() * 0
    for i, (b, q, j) in enumerate(pairs):
        logits = masks[b, q][None]
        order = at(logits.detach(), candidates[i])[0].abs().argsort()[:uncertain]
        points = torch.cat([candidates[i][order], extra[i]])
        values, truth = at(logits, points)[0], at(targets[b]["masks"][j][None], points)[0]
        mask_loss, dice = mask_loss + bce(values, truth), dice + dice_loss(values, truth)
    return mask_loss / num_masks, dice / num_masks


def pixel_losses(masks, targets, matches, size, num_masks):
    mask_loss, dice = masks.sum() * 0, masks.sum() * 0
    for b, found in enumerate(matches):
        for q, j in found:
            logits = F.interpolate(masks[b, q][None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
            truth = targets[b]["masks"][j]
            mask_loss, dice = mask_loss + focal(logits, truth), dice + dice_loss(logits, truth)
    return mask_loss / num_masks, dice / num_masks
