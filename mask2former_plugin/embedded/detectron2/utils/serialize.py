"""Pickling of what the standard pickle cannot pickle."""

from __future__ import annotations

from typing import Any

import cloudpickle


class PicklableWrapper:
    """Makes any object picklable, lambdas and local functions too; unpickling gives the object itself.

    Calls and attributes go through to the object.
    """

    def __init__(self, obj: Any) -> None:
        while isinstance(obj, PicklableWrapper):
            obj = obj._obj
        self._obj = obj

    def __reduce__(self):
        return cloudpickle.loads, (cloudpickle.dumps(self._obj),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._obj(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_obj":  # not set yet, while copying
            raise AttributeError(name)
        return getattr(self._obj, name)
