"""Names of dataset functions that the embedded slice knows but does not have: LVIS and Pascal VOC."""

from __future__ import annotations

from typing import Any

from detectron2.utils.missing import needs_upstream


def load_lvis_json(*args: Any, **kwargs: Any) -> Any:
    """Needs upstream Detectron2."""
    needs_upstream("The LVIS loader")


def register_lvis_instances(*args: Any, **kwargs: Any) -> Any:
    """Needs upstream Detectron2."""
    needs_upstream("The LVIS loader")


def get_lvis_instances_meta(*args: Any, **kwargs: Any) -> Any:
    """Needs upstream Detectron2."""
    needs_upstream("The LVIS loader")


def load_voc_instances(*args: Any, **kwargs: Any) -> Any:
    """Needs upstream Detectron2."""
    needs_upstream("The Pascal VOC loader")


def register_pascal_voc(*args: Any, **kwargs: Any) -> Any:
    """Needs upstream Detectron2."""
    needs_upstream("The Pascal VOC loader")
