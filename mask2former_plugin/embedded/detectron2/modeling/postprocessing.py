"""From the padded network size to the size that was asked for."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def sem_seg_postprocess(
    result: torch.Tensor, img_size: tuple[int, int], output_height: int, output_width: int
) -> torch.Tensor:
    """Cut off the padding and resize bilinearly.

    Args:
        result: scores (C, H, W) of a padded image.
        img_size: (height, width) of the image inside.

    Returns:
        scores (C, output_height, output_width).
    """
    inside = result[:, : img_size[0], : img_size[1]]
    return F.interpolate(
        inside.unsqueeze(0), size=(output_height, output_width), mode="bilinear", align_corners=False
    ).squeeze(0)
