"""One clear sentence for what the embedded slice leaves out."""

from __future__ import annotations

from collections.abc import Collection
from typing import NoReturn

INSTALL_COMMAND = "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"


class UpstreamOnlyImportError(NotImplementedError, ImportError):
    """A name that only upstream has is imported; an ImportError, so that optional imports of it work as usual."""


def missing_name(module: str, upstream_only: Collection[str], name: str) -> NoReturn:
    """What the ``__getattr__`` of a module does that leaves out a part of upstream's names.

    Args:
        module: the module's name.
        upstream_only: names that it leaves out.
        name: the name that was looked for.

    Raises:
        UpstreamOnlyImportError: it is one of those.
        AttributeError: it is not.
    """
    if name in upstream_only:
        raise UpstreamOnlyImportError(_text(f"{module}.{name}"))
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def needs_upstream(feature: str) -> NoReturn:
    """Refuse a feature that only upstream Detectron2 has.

    Args:
        feature: what was asked for, as the subject of a sentence, e.g. ``"LazyConfig"``.

    Raises:
        NotImplementedError: always; the text names the feature and says how to install upstream.
    """
    raise NotImplementedError(_text(feature))


def _text(feature: str) -> str:
    return f"{feature} is not part of the embedded Detectron2; install upstream Detectron2 to use it: {INSTALL_COMMAND}"
