"""Sampling of feature maps at points (PointRend, Kirillov et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F


def point_sample(input: torch.Tensor, point_coords: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Values of feature maps at points.

    Args:
        input: (N, C, H, W).
        point_coords: (N, P, 2) or (N, Hg, Wg, 2), x and y in [0, 1], where 0 and 1 are the outer edges of the map.
        kwargs: those of ``F.grid_sample``, e.g. ``mode``, ``align_corners``.

    Returns:
        (N, C, P) or (N, C, Hg, Wg).
    """
    is_list = point_coords.dim() == 3
    grid = point_coords.unsqueeze(2) if is_list else point_coords
    kwargs.setdefault("align_corners", False)
    sampled = F.grid_sample(input, 2.0 * grid - 1.0, **kwargs)
    return sampled.squeeze(3) if is_list else sampled


def generate_regular_grid_point_coords(R: int, side_size: int, device: torch.device | str) -> torch.Tensor:
    """Centres of ``side_size`` × ``side_size`` cells of the unit square, row by row, (R, side_size², 2)."""
    centres = (torch.arange(side_size, dtype=torch.float32, device=device) + 0.5) / side_size
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack((x, y), dim=-1).view(1, -1, 2).expand(R, -1, -1)


def get_uncertain_point_coords_with_randomness(
    coarse_logits: torch.Tensor,
    uncertainty_func: Callable[[torch.Tensor], torch.Tensor],
    num_points: int,
    oversample_ratio: float,
    importance_sample_ratio: float,
) -> torch.Tensor:
    """Training points that lean towards uncertain places (PointRend, section 3.1).

    Draws ``oversample_ratio * num_points`` uniform points, keeps the most uncertain and fills up with uniform points.

    Args:
        coarse_logits: (N, C, H, W), or (N, 1, H, W) for class-agnostic masks.
        uncertainty_func: sampled logits (N, C, P) to uncertainties (N, 1, P); higher is chosen first.
        num_points: P.
        oversample_ratio: at least 1.
        importance_sample_ratio: share of uncertain points in the result, 0 to 1.

    Returns:
        (N, P, 2) in [0, 1] × [0, 1].
    """
    assert oversample_ratio >= 1, f"oversample_ratio must be at least 1, is {oversample_ratio}"
    assert 0 <= importance_sample_ratio <= 1, f"importance_sample_ratio must be in [0, 1], is {importance_sample_ratio}"
    count, device = coarse_logits.shape[0], coarse_logits.device
    candidates = torch.rand(count, int(num_points * oversample_ratio), 2, device=device)
    # Sample first: the uncertainty of an interpolated logit is not the interpolated uncertainty.
    uncertainty = uncertainty_func(point_sample(coarse_logits, candidates))
    num_uncertain = int(importance_sample_ratio * num_points)
    chosen = uncertainty[:, 0].topk(num_uncertain, dim=1).indices
    points = candidates.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 2))
    if num_uncertain < num_points:
        points = torch.cat((points, torch.rand(count, num_points - num_uncertain, 2, device=device)), dim=1)
    return points
