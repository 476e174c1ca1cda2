"""Where datasets lie on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from mask2former_plugin.data.names import some


def datasets_root() -> Path:
    """``$DETECTRON2_DATASETS``, by default ``./datasets``; ``~`` is expanded."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def resolve(path: str) -> Path:
    """A path of a config: absolute, from the home directory, or relative to the datasets root."""
    return datasets_root() / Path(path).expanduser()


def require_files(source: str | os.PathLike, paths: Iterable[str]) -> None:
    """Raise FileNotFoundError with the names of missing files, and the ``source`` that names them.

    Each folder is listed once, which is quicker than a question about every file.
    """
    listed: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listed[folder] and not os.path.isfile(path):
            missing.append(path)
    if missing:
        raise FileNotFoundError(f"{source} names {len(missing)} files that do not exist: {some(missing)}")
