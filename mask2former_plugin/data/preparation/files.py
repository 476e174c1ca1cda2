"""Files of a preparation: checked before they are read, and complete as soon as they are there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mask2former_plugin.data.names import some

_ENDINGS = {".png": b"IEND\xaeB`\x82", ".jpg": b"\xff\xd9"}


def require(paths: Iterable[Path], layout: str) -> None:
    """Raise FileNotFoundError with the expected ``layout`` if one of the files and folders is missing or empty."""
    for path in paths:
        if path.is_dir():
            if any(path.iterdir()):
                continue
            problem = f"{path} is empty"
        elif path.exists():
            continue
        else:
            problem = f"{path} does not exist"
        raise FileNotFoundError(f"{problem}. Expected below the datasets root (--root):\n{layout.strip()}")


def stems(folder: Path, ending: str) -> list[str]:
    """Sorted names of the files in ``folder`` that end with ``ending``, without it; hidden files are left out.

    Raises:
        FileNotFoundError: there are none.
    """
    names = sorted(p.name.removesuffix(ending) for p in folder.glob(f"*{ending}") if not p.name.startswith("."))
    if not names:
        raise FileNotFoundError(f"{folder} holds no files *{ending}")
    return names


def require_partners(names: Iterable[str], folder: Path, ending: str) -> None:
    """Raise FileNotFoundError if one of the ``names`` has no file ``<name><ending>`` in ``folder``."""
    missing = sorted(set(names).difference(path.name.removesuffix(ending) for path in folder.glob(f"*{ending}")))
    if missing:
        raise FileNotFoundError(f"{folder} lacks *{ending} for {len(missing)} images: {some(missing)}")


def is_complete(path: Path) -> bool:
    """True if the file is there and ends as a file of its type ends; one that a killed process left behind does not."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    ending = _ENDINGS.get(path.suffix, b"")
    with path.open("rb") as file:
        file.seek(-min(len(ending), path.stat().st_size), os.SEEK_END)
        return file.read() == ending if ending else True


def read_image(path: Path, mode: str | None = None) -> np.ndarray:
    """Pixels of an image file, converted to the Pillow ``mode`` if one is given; a ValueError names a broken file."""
    try:
        with Image.open(path) as image:
            return np.asarray(image if mode is None else image.convert(mode))
    except FileNotFoundError:
        raise
    except OSError as error:  # Pillow raises it for every kind of damage, mostly without the name
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def read_label_map(path: Path) -> np.ndarray:
    """Label map (H, W) uint8; palette images give their indices. A ValueError names a file that is none."""
    labels = read_image(path)
    if labels.ndim != 2 or labels.dtype != np.uint8:
        raise ValueError(f"{path} is no label map of 8 bits: its pixels are {labels.dtype} {labels.shape[2:] or ''}")
    return labels


def write_image(path: Path, array: np.ndarray) -> None:
    """Write an image with Pillow's defaults for the suffix."""
    image_format = Image.registered_extensions()[path.suffix]
    _write(path, lambda temporary: Image.fromarray(array).save(temporary, format=image_format))


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON."""
    _write(path, lambda temporary: temporary.write_text(json.dumps(content), encoding="utf-8"))


def copy(source: Path, path: Path) -> None:
    """Copy a file's content."""
    _write(path, lambda temporary: shutil.copyfile(source, temporary))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside and rename, so that a file that is there is complete; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
