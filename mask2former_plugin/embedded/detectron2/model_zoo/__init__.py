"""Names of upstream's model zoo; its configs and checkpoints come with upstream Detectron2 only."""

from __future__ import annotations

from typing import Any

from detectron2.utils.missing import needs_upstream

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file"]


def get_checkpoint_url(config_path: str) -> str:
    """Address of the checkpoint trained with a zoo config."""
    needs_upstream(f"the model zoo (checkpoint of {config_path!r})")


def get_config_file(config_path: str) -> str:
    """Path of a zoo config."""
    needs_upstream(f"the model zoo (config {config_path!r})")


def get_config(config_path: str, trained: bool = False) -> Any:
    """A zoo config."""
    needs_upstream(f"the model zoo (config {config_path!r})")


def get(config_path: str, trained: bool = False, device: str | None = None) -> Any:
    """A model of the zoo."""
    needs_upstream(f"the model zoo (model of {config_path!r})")
