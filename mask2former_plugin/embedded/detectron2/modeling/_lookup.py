"""Look-up of registered classes whose error names the config key and the nearest known names."""

from __future__ import annotations

import difflib
from typing import Any

from detectron2.utils.registry import Registry


def registered_names(registry: Registry) -> list[str]:
    """Names in a registry, sorted."""
    return sorted(name for name, _ in registry)


def lookup(registry: Registry, name: str, config_key: str) -> Any:
    """The object registered as ``name``.

    Raises:
        KeyError: nothing is registered under the value of ``config_key``.
    """
    if name in registry:
        return registry.get(name)
    names = registered_names(registry)
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    hint = f", did you mean {' or '.join(near)}?" if near else "."
    raise KeyError(
        f"{config_key} is '{name}', which is not registered{hint} Registered are {', '.join(names) or 'none'}; "
        "a class of your own must be imported before the model is built"
    )
