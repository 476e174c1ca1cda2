"""Message for a name that nobody knows: nearest known names first."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(what: str, name: object, known: Iterable[str]) -> str:
    """One sentence that rejects ``name`` and lists the known names, the nearest first."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=len(names), cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    ordered = near + [other for other in names if other not in near]
    return f"Unknown {what} {name!r}.{hint} Known: {', '.join(ordered)}."
