"""Which Detectron2 this process uses: the installed upstream, or the slice embedded in this package."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ENV_VARIABLE = "MASK2FORMER_DETECTRON2"
EMBEDDED_ROOT = Path(__file__).resolve().parent / "embedded"
INSTALL_HINT = "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"


def is_embedded() -> bool:
    """True if ``import detectron2`` gives the embedded slice."""
    spec = importlib.util.find_spec("detectron2")
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve().is_relative_to(EMBEDDED_ROOT)


def _is_importable() -> bool:
    """True if there is a ``detectron2`` package; a mere folder of that name, such as a checkout of its repository, is none."""
    spec = importlib.util.find_spec("detectron2")
    return spec is not None and spec.origin is not None


def ensure_detectron2() -> None:
    """Make ``import detectron2`` work, preferring upstream.

    The folder of the embedded slice goes to the end of ``sys.path`` if no other ``detectron2`` can be found. The environment variable
    ``MASK2FORMER_DETECTRON2`` forces ``embedded`` or ``upstream``.

    Raises:
        ImportError: ``upstream`` is forced and not installed, or ``embedded`` is forced after upstream was imported.
        ValueError: the variable holds another word.
    """
    choice = os.environ.get(ENV_VARIABLE, "").strip().lower()
    if choice not in ("", "embedded", "upstream"):
        raise ValueError(f"{ENV_VARIABLE} must be 'embedded', 'upstream' or unset, got {choice!r}")
    embedded = str(EMBEDDED_ROOT)
    if choice == "embedded":
        if "detectron2" in sys.modules and not is_embedded():
            raise ImportError(f"{ENV_VARIABLE}=embedded, but another detectron2 is imported already; import mask2former_plugin first")
        if embedded in sys.path:
            sys.path.remove(embedded)
        sys.path.insert(0, embedded)
        return
    if choice == "upstream":
        if embedded in sys.path:
            sys.path.remove(embedded)
        if not _is_importable():
            raise ImportError(f"{ENV_VARIABLE}=upstream, but Detectron2 is not installed; install it with: {INSTALL_HINT}")
        return
    if not _is_importable():
        sys.path.append(embedded)
