"""Names of dataset functions that the embedded slice knows but does not have: Pascal VOC."""

from __future__ import annotations

from typing import Any

from detectron2.utils.missing import needs_upstream


def load_voc_instances(*args: Any, **kwargs: Any) -> Any:
    """Needs upstream Detectron2."""
    needs_upstream("The Pascal VOC loader")


def register_pascal_voc(*args: Any, **kwargs: Any) -> Any:
    """Needs upstream Detectron2."""
    needs_upstream("The Pascal VOC loader")
