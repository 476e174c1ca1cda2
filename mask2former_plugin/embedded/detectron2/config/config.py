"""The config tree: YAML files with inheritance and a version, overrides, and classes built from a config."""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from fvcore.common.config import CfgNode as _FvcoreCfgNode

from detectron2.utils.file_io import PathManager


class UnknownKeyError(KeyError, AssertionError):
    """A config key that does not exist; a KeyError for files and an AssertionError for overrides, as in upstream."""

    def __str__(self) -> str:
        return str(self.args[0])


def _leaves(node: dict, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


class CfgNode(_FvcoreCfgNode):
    """A node of the config tree; its keys are attributes.

    ``freeze``, ``defrost``, ``clone``, ``dump`` and the rest of the interface are those of ``yacs``.
    """

    @classmethod
    def _open_cfg(cls, filename: str):
        return PathManager.open(filename, "r")

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """Read a YAML file and its bases into nested dictionaries.

        Args:
            filename: path or URL; ``_BASE_`` is resolved.
            allow_unsafe: let YAML tags run arbitrary Python. Published arithmetic needs no such permission.
        """
        if allow_unsafe:
            return super().load_yaml_with_base(filename, allow_unsafe=True)
        from mask2former_plugin.safe_yaml import load_config_dict

        return load_config_dict(filename, cls._open_cfg)

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Merge a YAML file into this tree; files written for older key names are translated.

        Args:
            cfg_filename: path or URL.
            allow_unsafe: see :meth:`load_yaml_with_base`.

        Raises:
            FileNotFoundError: the file or one of its bases does not exist.
            UnknownKeyError: a key that this tree lacks (a KeyError); the nearest existing key is named.
            ValueError: broken YAML, a value of another type, or a file of a newer version.
        """
        from detectron2.config.compat import upgrade_keys

        loaded = type(self)(self.load_yaml_with_base(cfg_filename, allow_unsafe=allow_unsafe))
        if "VERSION" in self:
            upgrade_keys(loaded, self["VERSION"], cfg_filename)
        self._check_keys(loaded, cfg_filename)
        self._integers_to_floats(loaded)
        try:
            self.merge_from_other_cfg(loaded)
        except ValueError as error:
            raise ValueError(f"{cfg_filename}: {error}") from error

    def merge_from_list(self, cfg_list: list) -> None:
        """Merge overrides ``[key, value, key, value, ...]``; text that is a Python literal is read as one.

        Raises:
            UnknownKeyError: a key that this tree lacks (an AssertionError); the nearest existing key is named.
            ValueError: a value of another type than the existing one.
        """
        if len(cfg_list) % 2:
            raise AssertionError(f"overrides must be pairs of a key and a value, got {len(cfg_list)} items: {cfg_list}")
        values = []
        for full_key, value in zip(cfg_list[0::2], cfg_list[1::2]):
            current: Any = self
            for part in full_key.split("."):
                if not isinstance(current, dict) or part not in current:
                    if full_key in self.__dict__[self.DEPRECATED_KEYS] or self.key_is_renamed(full_key):
                        current = None
                        break
                    raise UnknownKeyError(self._unknown_key_text([full_key], "the overrides"))
                current = current[part]
            value = self._decode_cfg_value(value)
            values += [full_key, float(value) if type(current) is float and type(value) is int else value]
        super().merge_from_list(values)

    def _check_keys(self, loaded: CfgNode, source: str) -> None:
        unknown = []

        def visit(new: dict, old: CfgNode, prefix: str) -> None:
            for key, value in new.items():
                full_key = f"{prefix}{key}"
                if key not in old:
                    known_old_name = full_key in self.__dict__[self.DEPRECATED_KEYS] or self.key_is_renamed(full_key)
                    if not (old.is_new_allowed() or known_old_name):
                        unknown.extend(_leaves({key: value}, prefix))
                elif isinstance(value, dict) and isinstance(old[key], CfgNode):
                    visit(value, old[key], f"{full_key}.")

        visit(loaded, self, "")
        if unknown:
            raise UnknownKeyError(self._unknown_key_text(unknown, source))

    def _unknown_key_text(self, unknown: list[str], source: str) -> str:
        known = list(_leaves(self))
        hints = []
        for key in unknown:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            hints.append(f"{key} (nearest known key: {nearest[0]})" if nearest else key)
        plural = "s" if len(unknown) > 1 else ""
        return f"Non-existent config key{plural} in {source}: {', '.join(hints)}"

    def _integers_to_floats(self, loaded: CfgNode) -> None:
        """Let ``1`` stand for ``1.0``, which yacs refuses."""
        for key, value in loaded.items():
            current = self.get(key)
            if isinstance(value, dict) and isinstance(current, CfgNode):
                current._integers_to_floats(value)
            elif type(value) is int and type(current) is float:
                loaded[key] = float(value)


global_cfg = CfgNode()


def get_cfg() -> CfgNode:
    """A fresh copy of the default config."""
    from detectron2.config.defaults import _C

    return _C.clone()


def set_global_cfg(cfg: CfgNode) -> None:
    """Make ``detectron2.config.global_cfg`` hold the keys of ``cfg``, also where it was imported before."""
    global_cfg.clear()
    global_cfg.update(cfg)


# ---- configurable ----------------------------------------------------------------------------------------------------


def configurable(init_func: Callable | None = None, *, from_config: Callable | None = None) -> Callable:
    """Let a class or function be called with explicit arguments or with a config.

    Two forms: ``@configurable`` on the ``__init__`` of a class that has a classmethod ``from_config(cls, cfg, ...)``,
    and ``@configurable(from_config=function)`` on a function. ``from_config`` returns the explicit arguments as a dict.
    The config form is taken if the first argument, or the argument ``cfg``, is a config. Arguments that ``from_config``
    accepts go to it; other keyword arguments override its result.

    Raises:
        AssertionError: the decorator sits on something else than described.
        AttributeError: at call, the class has no ``from_config``.
        TypeError: at call, ``from_config`` is no classmethod or its first parameter is not ``cfg``.
    """
    if init_func is not None:
        correct = inspect.isfunction(init_func) and from_config is None and init_func.__name__ == "__init__"
        assert correct, "use @configurable on __init__, or @configurable(from_config=...) on a function"
        return _configurable_init(init_func)
    if from_config is None:
        return configurable
    assert inspect.isfunction(from_config), "the from_config argument of configurable must be a function"
    return functools.partial(_configurable_function, from_config=from_config)


def _configurable_init(init_func: Callable) -> Callable:
    @functools.wraps(init_func)
    def wrapped(self, *args, **kwargs):
        cls = type(self)
        if not hasattr(cls, "from_config"):
            raise AttributeError(f"{cls.__qualname__} uses @configurable and must have a classmethod from_config")
        if not inspect.ismethod(cls.from_config):
            raise TypeError(f"from_config of {cls.__qualname__} must be a classmethod")
        if _is_called_with_config(args, kwargs):
            kwargs = _explicit_arguments(cls.from_config, args, kwargs)
            args = ()
        init_func(self, *args, **kwargs)

    return wrapped


def _configurable_function(function: Callable, from_config: Callable) -> Callable:
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        if _is_called_with_config(args, kwargs):
            kwargs = _explicit_arguments(from_config, args, kwargs)
            args = ()
        return function(*args, **kwargs)

    wrapped.from_config = from_config
    return wrapped


def _is_called_with_config(args: tuple, kwargs: dict) -> bool:
    config_types: tuple[type, ...] = (_FvcoreCfgNode,)
    if "omegaconf" in sys.modules:  # an argument can only be a DictConfig if somebody imported omegaconf
        config_types += (sys.modules["omegaconf"].DictConfig,)
    return (len(args) > 0 and isinstance(args[0], config_types)) or isinstance(kwargs.get("cfg"), config_types)


def _explicit_arguments(from_config: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    parameters = inspect.signature(from_config).parameters
    if next(iter(parameters), None) != "cfg":
        raise TypeError(f"the first parameter of {from_config.__qualname__} must be called 'cfg'")
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(parameter.kind in variadic for parameter in parameters.values()):
        return from_config(*args, **kwargs)
    accepted = {name: value for name, value in kwargs.items() if name in parameters}
    overrides = {name: value for name, value in kwargs.items() if name not in parameters}
    return {**from_config(*args, **accepted), **overrides}
