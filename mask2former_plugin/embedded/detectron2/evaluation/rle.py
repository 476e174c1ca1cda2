"""Run-length encoding of mask tensors in the COCO format, on the device where the masks are."""

from __future__ import annotations

import numpy as np
import pycocotools.mask as mask_util
import torch

# Masks that lie on a GPU are compared this many pixels at a time; on the CPU one at a time stays in the cache.
GPU_CHUNK_PIXELS = 1 << 26


def encode_masks(masks: torch.Tensor) -> list[dict]:
    """Encode masks as COCO run-length codes.

    Only the places where a column-major run ends leave the device, so nothing of the size of a picture is copied or
    transposed.

    Args:
        masks: (N, H, W); what belongs to a mask is not 0, or, in floating-point masks, above one half.

    Returns:
        N dicts ``{"size": [H, W], "counts": str}``, the codes that ``pycocotools.mask.encode`` makes (``counts``
        decoded to str, ready for JSON).
    """
    if masks.ndim != 3:
        raise ValueError(f"expected masks of shape (N, H, W), got {tuple(masks.shape)}")
    count, height, width = masks.shape
    if not masks.numel():
        return [{"size": [height, width], "counts": ""} for _ in range(count)]
    per_chunk = 1 if masks.device.type == "cpu" else max(1, GPU_CHUNK_PIXELS // (height * width))
    runs = []
    for chunk in masks.split(per_chunk):
        ends, owner = _run_ends(chunk > 0.5 if chunk.is_floating_point() else chunk != 0)
        for ends_of_one in np.split(ends, np.searchsorted(owner, np.arange(1, len(chunk)))):
            bounds = np.concatenate(([0], ends_of_one, [height * width]))
            runs.append({"size": [height, width], "counts": np.diff(bounds).tolist()})
    codes = mask_util.frPyObjects(runs, height, width)
    return [{"size": [height, width], "counts": code["counts"].decode("ascii")} for code in codes]


def _run_ends(masks: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Column-major positions where a pixel differs from the one before it (the one before the first is 0).

    Returns:
        The positions within their mask, ascending, and the index of the mask that each belongs to, ascending.
    """
    _, height, width = masks.shape
    differs = torch.empty_like(masks)
    torch.ne(masks[:, 1:], masks[:, :-1], out=differs[:, 1:])
    # Before the top of a column comes the bottom of the column on its left.
    differs[:, 0, 1:] = masks[:, 0, 1:] != masks[:, -1, :-1]
    differs[:, 0, 0] = masks[:, 0, 0]
    flat = differs.flatten()
    # NumPy skips runs of False, torch doesn't (on the CPU).
    where = np.flatnonzero(flat.numpy()) if flat.device.type == "cpu" else flat.nonzero().squeeze(1).cpu().numpy()
    owner, position = np.divmod(where, height * width)
    y, x = np.divmod(position, width)
    column_major = np.sort(owner * (height * width) + x * height + y)
    return column_major % (height * width), column_major // (height * width)
