"""Embedded slice of Detectron2's public API; used where upstream Detectron2 is not installed."""

__version__ = "0.6"
