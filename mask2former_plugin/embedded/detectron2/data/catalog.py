"""Registries of datasets: how to load each one (DatasetCatalog) and what is known about it (MetadataCatalog)."""

from __future__ import annotations

import difflib
import logging
import types
from collections import UserDict
from typing import Any, Callable

from detectron2.utils.logger import log_first_n
from detectron2.utils.missing import needs_upstream

__all__ = ["DatasetCatalog", "MetadataCatalog", "Metadata"]

# Built-in datasets of upstream for which the embedded slice has no loader.
_UPSTREAM_ONLY_PREFIXES = ("lvis_v0.5", "voc_20", "keypoints_coco_")


def _explain_unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"Dataset {name!r} is not registered. Nearest known names: {', '.join(close)}."
    return f"Dataset {name!r} is not registered. Known names: {', '.join(sorted(known)) or '(none)'}."


class _DatasetCatalog(UserDict):
    """Maps a dataset's name to the function that loads it."""

    def register(self, name: str, func: Callable[[], list[dict]]) -> None:
        """Register a loader.

        Args:
            name: a new name.
            func: called without arguments, returns the list of dataset dicts (or a torch Dataset), the same on each
                call.

        Raises:
            AssertionError: ``func`` can't be called, or the name is taken.
        """
        if not callable(func):
            raise AssertionError(f"Dataset {name!r} must be registered with a function, got {type(func).__name__}")
        if name in self:
            raise AssertionError(f"Dataset {name!r} is registered already; remove it first or choose another name")
        self[name] = func

    def get(self, name: str) -> Any:
        """Load a registered dataset.

        Raises:
            KeyError: unknown name; the message has the nearest known ones.
            FileNotFoundError: a file or folder of the dataset is missing; the message names it and the dataset.
        """
        if name not in self:
            if str(name).startswith(_UPSTREAM_ONLY_PREFIXES):
                needs_upstream(f"The built-in dataset {name!r}")
            raise KeyError(_explain_unknown(str(name), self.list()))
        try:
            return self[name]()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"Dataset {name!r} can't be loaded. {error}") from error

    def list(self) -> list[str]:
        """Names of all registered datasets."""
        return list(self.keys())

    def remove(self, name: str) -> None:
        """Forget a dataset; same as ``pop(name)``."""
        self.pop(name)

    def __str__(self) -> str:
        return f"DatasetCatalog(registered datasets: {', '.join(self.keys())})"

    __repr__ = __str__


class Metadata(types.SimpleNamespace):
    """What is known about one dataset: class names, colors, paths, kind of evaluation.

    A value once set stays: assigning another value to the same key is an AssertionError, since some part of the program
    may have used the first. (Delete the attribute first if that is what you want.)
    """

    name: str = "N/A"

    _RENAMED = {
        "class_names": "thing_classes",
        "dataset_id_to_contiguous_id": "thing_dataset_id_to_contiguous_id",
        "stuff_class_names": "stuff_classes",
    }

    def __getattr__(self, key: str) -> Any:
        new_key = self._RENAMED.get(key)
        if new_key is not None:
            self._warn_renamed(key, new_key)
            return getattr(self, new_key)
        if key.startswith("__"):
            raise AttributeError(key)
        known = [k for k in self.__dict__ if k != "name"]
        raise AttributeError(
            f"Metadata of dataset {self.name!r} has no {key!r}. "
            + (f"It has: {', '.join(known)}." if known else "It is empty: is the name of the dataset right?")
        )

    def __setattr__(self, key: str, value: Any) -> None:
        new_key = self._RENAMED.get(key)
        if new_key is not None:
            self._warn_renamed(key, new_key)
            return setattr(self, new_key, value)
        if key in self.__dict__:
            old = self.__dict__[key]
            if old != value:
                raise AssertionError(
                    f"Metadata {key!r} of dataset {self.name!r} is set already and can't be changed "
                    f"from {_shorten(old)} to {_shorten(value)}"
                )
            return None
        return super().__setattr__(key, value)

    @staticmethod
    def _warn_renamed(key: str, new_key: str) -> None:
        log_first_n(logging.WARNING, f"Metadata key {key!r} was renamed to {new_key!r}", n=10)

    def as_dict(self) -> dict[str, Any]:
        """All keys and values; changing the dict does not change the metadata."""
        return dict(self.__dict__)

    def set(self, **kwargs: Any) -> Metadata:
        """Set several keys at once and return self."""
        for key, value in kwargs.items():
            setattr(self, key, value)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a key, or ``default``."""
        return getattr(self, key) if key in self.__dict__ or key in self._RENAMED else default


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}… ({type(value).__name__})"


class _MetadataCatalog(UserDict):
    """Maps a dataset's name to its one Metadata object, created on first use."""

    def get(self, name: str) -> Metadata:
        """The Metadata of a dataset; always the same object for the same name.

        Raises:
            AssertionError: the name is empty.
        """
        if not name:
            raise AssertionError("The name of a dataset must not be empty")
        if name not in self:
            self[name] = Metadata(name=name)
        return self[name]

    def list(self) -> list[str]:
        """Names of all datasets that have metadata."""
        return list(self.keys())

    def remove(self, name: str) -> None:
        """Forget the metadata of a dataset; same as ``pop(name)``."""
        self.pop(name)

    def __str__(self) -> str:
        return f"MetadataCatalog(datasets with metadata: {', '.join(self.keys())})"

    __repr__ = __str__


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()
