"""Where datasets lie on disk."""

from __future__ import annotations

import os
from pathlib import Path


def datasets_root() -> Path:
    """``$DETECTRON2_DATASETS``, by default ``./datasets``; ``~`` is expanded."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def resolve(path: str) -> Path:
    """A path of a config: absolute, from the home directory, or relative to the datasets root."""
    return datasets_root() / Path(path).expanduser()
