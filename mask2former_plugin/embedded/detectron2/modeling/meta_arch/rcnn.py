"""R-CNN models: names only, the embedded slice does not have them."""

from __future__ import annotations

from typing import Any

from torch import nn

from detectron2.utils.missing import needs_upstream


class GeneralizedRCNN(nn.Module):
    """Needs upstream Detectron2."""

    def __init__(self, *args: Any, **kwargs: Any):
        needs_upstream("GeneralizedRCNN")
