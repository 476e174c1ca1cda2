"""Config entries that describe a call; config files in Python are left to upstream."""

from __future__ import annotations

import dataclasses
from typing import Any

from detectron2.config.instantiate import dump_dataclass
from detectron2.utils.missing import needs_upstream
from detectron2.utils.registry import _convert_target_to_string

__all__ = ["LazyCall", "LazyConfig"]


class LazyCall:
    """``LazyCall(target)(**arguments)`` gives a config that :func:`instantiate` turns into ``target(**arguments)``."""

    def __init__(self, target: Any) -> None:
        if not (callable(target) or isinstance(target, (str, dict)) or hasattr(target, "keys")):
            raise TypeError(f"LazyCall needs a callable, its dotted name or a config of one, got {target!r}")
        self._target = target

    def __call__(self, **arguments: Any) -> Any:
        from omegaconf import DictConfig

        target = self._target
        if dataclasses.is_dataclass(target) and isinstance(target, type):
            target = _convert_target_to_string(target)  # omegaconf would take the class for a schema
        for name, value in arguments.items():
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                arguments[name] = dump_dataclass(value)
        return DictConfig({**arguments, "_target_": target}, flags={"allow_objects": True})


class LazyConfig:
    """Config files written in Python; upstream Detectron2 only."""

    @staticmethod
    def load(filename: str, keys: Any = None) -> Any:
        needs_upstream(f"LazyConfig.load({filename!r})")

    @staticmethod
    def load_rel(filename: str, keys: Any = None) -> Any:
        needs_upstream(f"LazyConfig.load_rel({filename!r})")

    @staticmethod
    def save(cfg: Any, filename: str) -> None:
        needs_upstream("LazyConfig.save")

    @staticmethod
    def apply_overrides(cfg: Any, overrides: list[str]) -> Any:
        needs_upstream("LazyConfig.apply_overrides")

    @staticmethod
    def to_py(cfg: Any, prefix: str = "cfg.") -> str:
        needs_upstream("LazyConfig.to_py")
