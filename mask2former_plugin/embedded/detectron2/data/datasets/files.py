"""Checks that the files of a dataset are there, with messages that say what to do."""

from __future__ import annotations

import json
import os
from typing import Any

from detectron2.utils.file_io import PathManager

_HINT = (
    "The environment variable DETECTRON2_DATASETS sets the folder in which the built-in datasets are looked for "
    "(default ./datasets)."
)


def require_file(path: str, what: str) -> None:
    """Raise FileNotFoundError if there is no such file. ``what`` names its role, e.g. "annotation file"."""
    if not PathManager.isfile(path):
        raise FileNotFoundError(f"The {what} {os.fspath(path)} does not exist. {_HINT}")


def require_folder(path: str, what: str) -> None:
    """Raise FileNotFoundError if there is no such folder."""
    if not PathManager.isdir(path):
        raise FileNotFoundError(f"The {what} {os.fspath(path)} does not exist. {_HINT}")


def read_json(path: str, what: str = "annotation file") -> Any:
    """Content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON; the message has the path.
    """
    require_file(path, what)
    with PathManager.open(path, "r") as f:
        try:
            return json.load(f)
        except json.JSONDecodeError as error:
            raise ValueError(f"The {what} {os.fspath(path)} is not valid JSON: {error}") from error
