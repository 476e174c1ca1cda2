"""Description of a feature map."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ShapeSpec:
    """What is known of a feature map; ``None`` is unknown. ``stride`` is in pixels of the input image."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None
