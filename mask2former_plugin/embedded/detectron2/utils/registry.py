"""Registries, and the way from an object to its dotted name and back."""

from __future__ import annotations

import importlib
from typing import Any

from fvcore.common.registry import Registry

__all__ = ["Registry", "locate"]


def _resolve(module_name: str, qualified_name: str) -> Any:
    obj: Any = importlib.import_module(module_name)
    for part in qualified_name.split("."):
        obj = getattr(obj, part)
    return obj


def _convert_target_to_string(t: Any) -> str:
    """The shortest dotted name under which :func:`locate` finds a class or function."""
    module, qualified_name = t.__module__, t.__qualname__
    parts = module.split(".")
    for length in range(1, len(parts)):
        parent = ".".join(parts[:length])
        try:
            found = _resolve(parent, qualified_name)
        except (ImportError, AttributeError):
            continue
        if found is t:
            return f"{parent}.{qualified_name}"
    return f"{module}.{qualified_name}"


def locate(name: str) -> Any:
    """Find an object by its dotted name, ``package.module.Class.attribute``.

    Raises:
        ImportError: there is no such object.
    """
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length])
        try:
            return _resolve(module, ".".join(parts[length:]))
        except ModuleNotFoundError as error:
            if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
                raise  # the module is there, but lacks a dependency
        except AttributeError as error:
            raise ImportError(f"cannot find {name!r}: {error}") from error
    raise ImportError(f"cannot find {name!r}: no such module")
