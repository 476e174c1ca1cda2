"""Whether two sides compute the same: differences of what they put out, and how large they may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

OTHER = "other_"  # prefix of results that a side computes by another rule; compared loosely with those of that name


def relative(one: np.ndarray, other: np.ndarray) -> float:
    """Norm of the difference in parts of the norm of the second."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(np.linalg.norm(one - other) / max(np.linalg.norm(other), 1e-12))


def differing(one: np.ndarray, other: np.ndarray) -> float:
    """Part of the entries that are not equal."""
    return float((one != other).mean())


def differing_inside(one: np.ndarray, other: np.ndarray) -> float:
    """Part of the entries that are not equal where the second has any class: void is defined in several ways."""
    known = other >= 0
    return differing(one[known], other[known]) if known.any() else 0.0


def furthest(one: np.ndarray, other: np.ndarray) -> float:
    """Largest absolute difference."""
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max(initial=0.0))


@dataclass(frozen=True)
class Rule:
    """How an output is compared, and the largest difference allowed in each precision."""

    measure: Callable[[np.ndarray, np.ndarray], float]
    float32: float
    bfloat16: float


RULES = {
    "class_logits": Rule(relative, 1e-3, 0.2),
    "mask_logits": Rule(relative, 1e-3, 0.2),
    "semantic_scores": Rule(relative, 1e-3, 0.3),
    "semantic_labels": Rule(differing, 1e-3, 0.3),
    # rounding decides about a segment on a threshold, and about the last of the best instances
    "panoptic_classes": Rule(differing, 0.02, 0.3),
    "instance_count": Rule(relative, 0.05, 0.3),
    "instance_scores": Rule(furthest, 0.02, 0.3),
    "instance_masks": Rule(relative, 0.02, 0.3),
    "losses": Rule(relative, 1e-3, 0.1),
    "total_loss": Rule(relative, 1e-3, 0.1),
    "gradient_norm": Rule(relative, 0.02, 0.2),
    "attention": Rule(relative, 1e-4, 0.03),
    "value_gradient": Rule(relative, 1e-4, 0.03),
    # jumps where rounding moves a place from one cell to the next
    "location_gradient": Rule(relative, 0.03, 0.25),
    "weight_gradient": Rule(relative, 1e-4, 0.03),
    "assignments": Rule(differing, 0.02, 0.02),
    "images": Rule(furthest, 0.0, 0.0),
    "targets": Rule(differing, 0.0, 0.0),
    "metrics": Rule(furthest, 1e-6, 1e-6),
    # transformers resizes through 384x384 and gives pixels outside all masks to some segment
    f"{OTHER}semantic_labels": Rule(differing, 0.1, 0.1),
    f"{OTHER}panoptic_classes": Rule(differing_inside, 0.1, 0.1),
    f"{OTHER}instance_masks": Rule(relative, 0.3, 0.3),
}


def compare(
    found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], precision: str, *, whole: bool = True
) -> dict[str, dict[str, float]]:
    """``difference`` and ``tolerance`` of every output that both sides have, by the name of the output.

    Args:
        whole: the side has to give every output that is expected, a missing one is infinitely different; otherwise
            one of them will do.
    """
    wanted = {name.removeprefix(OTHER): name for name in expected}
    given = {name.removeprefix(OTHER): name for name in found}
    result = {}
    for plain, name in wanted.items():
        if plain not in given and (whole or not wanted.keys() & given.keys()):
            result[name] = {"difference": float("inf"), "tolerance": getattr(RULES[name], precision)}
    for plain, name in given.items():
        if plain not in wanted:
            continue
        # the looser rule, whichever of the two computes it by another one
        rule_name = max(name, wanted[plain], key=len)
        rule, value, other = RULES[rule_name], found[name], expected[wanted[plain]]
        difference = rule.measure(value, other) if value.shape == other.shape else float("inf")
        if np.isnan(difference):
            difference = float("inf")
        result[rule_name] = {"difference": difference, "tolerance": getattr(rule, precision)}
    return result


def disagreements(compared: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Sentences about what differs by more than it may."""
    return [
        f"{name} differ by {one['difference']:.2g}, allowed is {one['tolerance']:g}"
        for name, one in compared.items()
        if one["difference"] > one["tolerance"]
    ]
