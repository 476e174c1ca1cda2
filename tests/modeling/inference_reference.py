"""Inference of both papers written out on dense full-size tensors: what the strips have to equal."""

import torch
import torch.nn.functional as F


def upsampled(logits, padded_size, image_size, output_size=None):
    """Mask logits ``[Q, h, w]`` at the size of the result: to the padded input, cropped, to the output."""
    logits = F.interpolate(logits[None], size=padded_size, mode="bilinear", align_corners=False)[0]
    logits = logits[:, : image_size[0], : image_size[1]]
    if output_size is None:
        return logits
    return F.interpolate(logits[None], size=output_size, mode="bilinear", align_corners=False)[0]


def semantic(class_logits, masks):
    return torch.einsum("qk,qhw->khw", class_logits.softmax(-1)[:, :-1], masks.sigmoid())


def panoptic(class_logits, masks, things, score_threshold, overlap_threshold, require_mask):
    scores, labels = class_logits.softmax(-1).max(-1)
    ids = torch.zeros(masks.shape[1:], dtype=torch.int32)
    kept = [q for q in range(len(scores)) if labels[q] != class_logits.shape[1] - 1 and scores[q] > score_threshold]
    if not kept:
        return ids, []
    owner = torch.stack([scores[q] * masks[q].sigmoid() for q in kept]).argmax(0)
    segments, stuff = [], {}
    for k, q in enumerate(kept):
        best, own = owner == k, masks[q].sigmoid() >= 0.5
        region = best & own if require_mask else best
        if not best.any() or not own.any() or not region.any() or int(best.sum()) / int(own.sum()) < overlap_threshold:
            continue
        label = int(labels[q])
        if label not in things and label in stuff:
            ids[region] = stuff[label]
            continue
        segments.append({"id": len(segments) + 1, "isthing": label in things, "category_id": label})
        ids[region] = len(segments)
        if label not in things:
            stuff[label] = len(segments)
    return ids, segments


def instances(class_logits, masks, top_k, things=None, things_first=False):
    """Dicts of query, class, score, mask and box, sorted by query and class."""
    probability = class_logits.softmax(-1)[:, :-1]
    pairs = [(float(probability[q, c]), q, c) for q in range(len(probability)) for c in range(probability.shape[1])]
    if things_first:
        pairs = [p for p in pairs if p[2] in things]
    pairs = sorted(pairs, reverse=True)[:top_k]
    found = []
    for score, q, c in sorted(pairs, key=lambda p: p[1:]):
        if things is not None and c not in things:
            continue
        mask = masks[q] > 0
        mean = float((masks[q].sigmoid() * mask).sum() / (mask.sum() + 1e-6))
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        box = [0, 0, 0, 0]
        if len(rows):
            box = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
        found.append({"class": c, "score": score * mean, "mask": mask, "box": box})
    return found
