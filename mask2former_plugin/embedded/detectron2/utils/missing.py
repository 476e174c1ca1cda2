"""One clear sentence for what the embedded slice leaves out."""

from __future__ import annotations

from typing import NoReturn

INSTALL_COMMAND = "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"


def needs_upstream(feature: str) -> NoReturn:
    """Refuse a feature that only upstream Detectron2 has.

    Args:
        feature: what was asked for, as the subject of a sentence, e.g. ``"LazyConfig"``.

    Raises:
        NotImplementedError: always; the text names the feature and says how to install upstream.
    """
    raise NotImplementedError(
        f"{feature} is not part of the embedded Detectron2; install upstream Detectron2 to use it: {INSTALL_COMMAND}"
    )
