"""Names in messages: what is near to an unknown one, and the first few of many."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHOWN = 5


def unknown_name(what: str, name: object, known: Iterable[str]) -> str:
    """One sentence that rejects ``name`` and lists the known names, the nearest first."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=len(names), cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    ordered = near + [other for other in names if other not in near]
    return f"Unknown {what} {name!r}.{hint} Known: {', '.join(ordered)}."


def some(names: Iterable[str]) -> str:
    """The first five names in alphabetical order, and how many more there are."""
    ordered = sorted(names)
    more = f", and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more
