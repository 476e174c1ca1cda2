"""From the padded network size to the size that was asked for."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch.nn import functional as F

from detectron2.utils.missing import missing_name


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


_UPSTREAM_ONLY = ("detector_postprocess",)


def __getattr__(name: str) -> NoReturn:
    missing_name(__name__, _UPSTREAM_ONLY, name)
