"""Images of any kind as channels-first arrays, and their resizing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Union

import numpy as np
from PIL import Image
from torch import Tensor

ImageInput = Union[Image.Image, np.ndarray, Tensor]
CHANNELS_FIRST, CHANNELS_LAST = "channels_first", "channels_last"
DEFAULT_SHORTEST_EDGE, DEFAULT_LONGEST_EDGE = 800, 1333
_SIZE_FORMS = (
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"height", "width"},
    {"max_height", "max_width"},
)


def as_list(images: Any) -> list:
    """One image, or several in a list, a tuple or a batch of four dimensions, as a list."""
    if isinstance(images, (list, tuple)):
        return list(images)
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def as_array(image: ImageInput, data_format: str | None, to_rgb: bool, name: str) -> np.ndarray:
    """An image as an array ``[C, H, W]``, uint8 or float32.

    Args:
        image: PIL image, or array or tensor with or without channels.
        data_format: where the channels are, ``"channels_first"`` or ``"channels_last"``; None: where there are 3, or 1.
        to_rgb: PIL images of other modes become RGB, one channel becomes three.
        name: of the image, for errors.

    Raises:
        ValueError: the channels cannot be found, or there are not two or three dimensions.
    """
    if isinstance(image, Image.Image):
        array = np.asarray(image.convert("RGB") if to_rgb else image)
        data_format = CHANNELS_LAST
    else:
        array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim == 2:
        array, data_format = array[None], CHANNELS_FIRST
    if array.ndim != 3:
        raise ValueError(f"{name}: shape {array.shape}; an image has two or three dimensions")
    if (data_format or _channels(array, name)) == CHANNELS_LAST:
        array = array.transpose(2, 0, 1)
    if to_rgb and array.shape[0] == 1:
        array = array.repeat(3, axis=0)
    return np.ascontiguousarray(array if array.dtype == np.uint8 else array.astype(np.float32))


def _channels(array: np.ndarray, name: str) -> str:
    for channels in (3, 1):
        for axis, data_format in ((0, CHANNELS_FIRST), (2, CHANNELS_LAST)):
            if array.shape[axis] == channels:
                return data_format
    raise ValueError(
        f"{name}: shape {array.shape}; neither the first nor the last dimension is 1 or 3, "
        f"say input_data_format={CHANNELS_FIRST!r} or {CHANNELS_LAST!r}"
    )


def read_size(size: Any, max_size: int | None) -> dict[str, int]:
    """Any way to say a size as one of the dicts of :func:`target_size`.

    Args:
        size: a dict; an int, the shorter side; a pair (height, width); None for 800, at most 1333.
        max_size: most of the longer side, whatever ``size`` says.

    Raises:
        ValueError: other keys, sides that are not positive, or ``max_size`` for a size that has no shorter side.
    """
    if size is None or isinstance(size, int):
        shortest = DEFAULT_SHORTEST_EDGE if size is None else size
        size = {"shortest_edge": shortest, "longest_edge": max_size or DEFAULT_LONGEST_EDGE}
    elif isinstance(size, Sequence) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    if not isinstance(size, Mapping) or set(size) not in _SIZE_FORMS:
        forms = ", ".join(str(sorted(form)) for form in _SIZE_FORMS)
        raise ValueError(f"size is {size!r}; it must be an int, a pair (height, width) or a dict of one of {forms}")
    size = {key: int(value) for key, value in size.items() if value is not None}
    if max_size:
        if "shortest_edge" not in size:
            raise ValueError(f"max_size is {max_size}, but size is {size}; max_size goes with the shorter side alone")
        size["longest_edge"] = int(max_size)
    if min(size.values()) <= 0:
        raise ValueError(f"size is {size}; sides must be positive")
    return size


def target_size(height: int, width: int, size: Mapping[str, int], divisor: int) -> tuple[int, int]:
    """Height and width that an image is resized to; the rounding is Hugging Face's.

    Args:
        height: of the image.
        width: of the image.
        size: ``height`` and ``width``; ``max_height`` and ``max_width``, where the image fits into these;
            ``shortest_edge``, and ``longest_edge`` where the longer side must not exceed it.
        divisor: each side is rounded up to a multiple of it, even beyond ``size``; 0 or 1: not.
    """
    if "height" in size:
        wanted = (size["height"], size["width"])
    elif "max_height" in size:
        scale = min(size["max_height"] / height, size["max_width"] / width)
        wanted = (int(height * scale), int(width * scale))
    else:
        wanted = _by_edges(height, width, size["shortest_edge"], size.get("longest_edge"))
    step = max(1, divisor)
    return tuple(max(1, -(-side // step)) * step for side in wanted)


def _by_edges(height: int, width: int, shortest: int, longest: int | None) -> tuple[int, int]:
    short, long = sorted((height, width))
    if longest and shortest * long / short > longest:
        new_short, new_long = round(longest * short / long), longest
    else:
        new_short, new_long = shortest, int(shortest * long / short)
    return (new_short, new_long) if height <= width else (new_long, new_short)


def resize_image(image: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    """``[C, H, W]`` uint8 or float32 to height and width ``size`` with a filter of Pillow."""
    if image.shape[1:] == tuple(size):
        return image
    resized = [Image.fromarray(channel).resize(size[::-1], resample=resample) for channel in image]
    return np.stack([np.asarray(channel) for channel in resized])


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``[H, W]`` of any integer type to height and width ``size``: each pixel takes the label under its centre."""
    if labels.shape == tuple(size):
        return labels
    # integer arithmetic, for labels of any size: Pillow has no nearest neighbour beyond 32 bits, OpenCV none by centre
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, labels.shape))
    return labels[rows[:, None], columns]
