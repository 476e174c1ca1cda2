"""Images of different sizes in one padded batch.

No ``from __future__ import annotations`` here: TorchScript reads the annotations of ``ImageList``.
"""

from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import device
from torch.nn import functional as F

from detectron2.layers.wrappers import shapes_to_tensor


class ImageList:
    """A batch padded to a common size that remembers the size of each image.

    Attributes:
        tensor: (N, H, W) or (N, C, H, W).
        image_sizes: (height, width) of each image inside the padding.
    """

    def __init__(self, tensor: torch.Tensor, image_sizes: List[Tuple[int, int]]):
        self.tensor = tensor
        self.image_sizes = image_sizes

    def __len__(self) -> int:
        return len(self.image_sizes)

    def __getitem__(self, idx: int) -> torch.Tensor:
        """The image without its padding."""
        height, width = self.image_sizes[idx]
        return self.tensor[idx, ..., :height, :width]

    @torch.jit.unused
    def to(self, *args: Any, **kwargs: Any) -> "ImageList":
        """The batch after ``tensor.to(…)``."""
        return ImageList(self.tensor.to(*args, **kwargs), self.image_sizes)

    @property
    def device(self) -> device:
        return self.tensor.device

    @staticmethod
    def from_tensors(
        tensors: List[torch.Tensor],
        size_divisibility: int = 0,
        pad_value: float = 0.0,
        padding_constraints: Optional[Dict[str, int]] = None,
    ) -> "ImageList":
        """Pad images on the right and at the bottom and stack them.

        Args:
            tensors: images (H, W) or (C, H, W), of one C.
            size_divisibility: height and width of the batch become multiples of it, if above 1.
            pad_value: value of the padding.
            padding_constraints: what ``Backbone.padding_constraints`` asks for: ``size_divisibility`` takes precedence
                over the argument, ``square_size`` (if positive) makes the batch square with at least this side.
        """
        assert len(tensors) > 0, "cannot make a batch of no images"
        divisor, square = size_divisibility, 0
        if padding_constraints is not None:
            divisor = padding_constraints.get("size_divisibility", size_divisibility)
            square = padding_constraints.get("square_size", 0)
        if not torch.jit.is_scripting():
            if torch.jit.is_tracing():
                return _batch_traced(tensors, divisor, square, pad_value)

        for tensor in tensors:
            assert isinstance(tensor, torch.Tensor), f"images must be tensors, got {type(tensor)}"
            assert tensor.shape[:-2] == tensors[0].shape[:-2], (
                f"images must agree in all but height and width, got {tensor.shape} beside {tensors[0].shape}"
            )
        image_sizes = [(tensor.shape[-2], tensor.shape[-1]) for tensor in tensors]
        height = max([size[0] for size in image_sizes])
        width = max([size[1] for size in image_sizes])
        if square > 0:
            height = width = max(height, width, square)
        if divisor > 1:
            height = (height + divisor - 1) // divisor * divisor
            width = (width + divisor - 1) // divisor * divisor
        padded = [
            F.pad(tensor, [0, width - tensor.shape[-1], 0, height - tensor.shape[-2]], value=pad_value)
            for tensor in tensors
        ]
        batch = padded[0].unsqueeze(0) if len(padded) == 1 else torch.stack(padded)
        return ImageList(batch.contiguous(), image_sizes)


@torch.jit.unused
def _batch_traced(tensors: List[torch.Tensor], divisor: int, square: int, pad_value: float) -> ImageList:
    """The same under ``torch.jit.trace``, where sizes are tensors so that the graph holds for other image sizes."""
    image_sizes = [shapes_to_tensor([tensor.shape[-2], tensor.shape[-1]]) for tensor in tensors]
    size = torch.stack(image_sizes).amax(0)
    if square > 0:
        size = size.amax().clamp(min=square).expand(2)
    if divisor > 1:
        size = (size + (divisor - 1)).div(divisor, rounding_mode="floor") * divisor
    padded = []
    for tensor, image_size in zip(tensors, image_sizes):
        below, right = (size - image_size).unbind()
        padded.append(F.pad(tensor, [0, right, 0, below], value=pad_value))
    return ImageList(torch.stack(padded).contiguous(), image_sizes)
