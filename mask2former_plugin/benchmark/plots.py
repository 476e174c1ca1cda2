"""Curves of time and memory over image size, queries and targets, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """One picture per axis and kind of work; returns the files."""
    return []
