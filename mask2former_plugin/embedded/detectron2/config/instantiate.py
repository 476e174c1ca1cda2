"""Builds the objects that a config describes by ``_target_`` and arguments."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from detectron2.utils.registry import _convert_target_to_string, locate

__all__ = ["dump_dataclass", "instantiate"]


def dump_dataclass(obj: Any) -> dict[str, Any]:
    """Describe a dataclass instance as a dict with ``_target_`` that :func:`instantiate` turns back into it."""
    if not dataclasses.is_dataclass(obj) or isinstance(obj, type):
        raise TypeError(f"dump_dataclass needs an instance of a dataclass, got {obj!r}")
    result: dict[str, Any] = {"_target_": _convert_target_to_string(type(obj))}
    for field in dataclasses.fields(obj):
        result[field.name] = _dump_value(getattr(obj, field.name))
    return result


def _dump_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dump_dataclass(value)
    if isinstance(value, (list, tuple)):
        return [_dump_value(element) for element in value]
    return value


def instantiate(cfg: Any) -> Any:
    """Call the ``_target_`` of a config with its other entries, inner configs first.

    Args:
        cfg: a mapping with ``_target_`` (a callable or its dotted name), a list of such, or anything else.

    Returns:
        What the target returns; lists element by element; anything else unchanged.

    Raises:
        ImportError: the named target does not exist.
        TypeError: the target is not callable or does not accept the arguments.
    """
    from omegaconf import DictConfig, ListConfig, OmegaConf

    if isinstance(cfg, ListConfig) or type(cfg) is list:
        elements = [instantiate(element) for element in cfg]
        return ListConfig(elements, flags={"allow_objects": True}) if isinstance(cfg, ListConfig) else elements
    if isinstance(cfg, DictConfig) and dataclasses.is_dataclass(cfg._metadata.object_type):
        return OmegaConf.to_object(cfg)
    if not isinstance(cfg, Mapping) or "_target_" not in cfg:
        return cfg
    arguments = {str(name): instantiate(value) for name, value in cfg.items() if name != "_target_"}
    target = instantiate(cfg["_target_"])
    name = target
    if isinstance(target, str):
        target = locate(target)
    if not callable(target):
        raise TypeError(f"_target_ {name!r} is not callable")
    try:
        return target(**arguments)
    except TypeError:
        logging.getLogger(__name__).error("Could not call _target_ %r with %s", name, sorted(arguments))
        raise
