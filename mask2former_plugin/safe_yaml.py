"""Reads YAML configs without running code: the arithmetic that published files carry is evaluated, nothing else."""

from __future__ import annotations

import ast
import math
import operator
import os
import posixpath
from collections.abc import Callable
from typing import IO, Any

import yaml

BASE_KEY = "_BASE_"
MAX_EXPRESSION_LENGTH = 2_000
MAX_STEPS = 20_000
MAX_INTEGER_BITS = 64

_PYTHON_TAG = "tag:yaml.org,2002:python/"
_EVAL_TAG = _PYTHON_TAG + "object/apply:eval"
_TUPLE_TAG = _PYTHON_TAG + "tuple"


class ConfigFileError(ValueError):
    """A YAML config that cannot be read; the text names the file and says why."""


# ---- arithmetic ----------------------------------------------------------------------------------------------------


def _power(base: float, exponent: float) -> float:
    if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1:
        if abs(exponent) * math.log2(abs(base)) > MAX_INTEGER_BITS:
            raise ValueError("the power is too large")
    return base**exponent


_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS = {f.__name__: f for f in (int, float, round, range, len, min, max)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _Evaluator:
    """Evaluates one parsed expression; every node costs a step, so that no expression runs long."""

    def __init__(self) -> None:
        self._steps = 0
        self._variables: dict[str, Any] = {}

    def evaluate(self, node: ast.AST) -> Any:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise ValueError(f"it takes more than {MAX_STEPS} steps")
        method = getattr(self, f"_eval_{type(node).__name__}", None)
        if method is None:
            raise ValueError(f"{type(node).__name__} is not allowed")
        value = method(node)
        if isinstance(value, (int, float)):
            self._check_number(value)
        return value

    @staticmethod
    def _check_number(value: float) -> None:
        if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            raise ValueError("an integer is too large")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("a number is not finite")

    def _number(self, node: ast.AST) -> float:
        value = self.evaluate(node)
        if not _is_number(value):
            raise ValueError(f"arithmetic needs numbers, got {value!r}")
        return value

    def _eval_Expression(self, node: ast.Expression) -> Any:
        return self.evaluate(node.body)

    def _eval_Constant(self, node: ast.Constant) -> float:
        if not _is_number(node.value):
            raise ValueError(f"the constant {node.value!r} is not a number")
        return node.value

    def _eval_Name(self, node: ast.Name) -> Any:
        if node.id not in self._variables:
            raise ValueError(f"the name {node.id!r} is not defined")
        return self._variables[node.id]

    def _eval_UnaryOp(self, node: ast.UnaryOp) -> float:
        if type(node.op) not in _UNARY:
            raise ValueError(f"{type(node.op).__name__} is not allowed")
        return _UNARY[type(node.op)](self._number(node.operand))

    def _eval_BinOp(self, node: ast.BinOp) -> float:
        if type(node.op) not in _BINARY:
            raise ValueError(f"{type(node.op).__name__} is not allowed")
        value = _BINARY[type(node.op)](self._number(node.left), self._number(node.right))
        if isinstance(value, complex):
            raise ValueError("a result is not a real number")
        return value

    def _eval_List(self, node: ast.List) -> list:
        return [self.evaluate(element) for element in node.elts]

    def _eval_Tuple(self, node: ast.Tuple) -> tuple:
        return tuple(self.evaluate(element) for element in node.elts)

    def _eval_Call(self, node: ast.Call) -> Any:
        if not isinstance(node.func, ast.Name) or node.func.id not in _FUNCTIONS or node.keywords:
            raise ValueError(f"only calls of {', '.join(_FUNCTIONS)} without keywords are allowed")
        return _FUNCTIONS[node.func.id](*(self.evaluate(argument) for argument in node.args))

    def _eval_ListComp(self, node: ast.ListComp) -> list:
        return list(self._generate(node.elt, node.generators))

    _eval_GeneratorExp = _eval_ListComp  # as an argument, e.g. of max(...)

    def _generate(self, element: ast.AST, generators: list[ast.comprehension]):
        if not generators:
            yield self.evaluate(element)
            return
        loop, *inner = generators
        if not isinstance(loop.target, ast.Name) or loop.ifs or loop.is_async:
            raise ValueError("a comprehension must have the form [... for x in ...]")
        values = self.evaluate(loop.iter)
        if not isinstance(values, (range, list, tuple)):
            raise ValueError("a comprehension must run over range(...), a list or a tuple")
        missing = object()
        shadowed = self._variables.get(loop.target.id, missing)
        for value in values:
            self._variables[loop.target.id] = value
            yield from self._generate(element, inner)
        if shadowed is missing:
            self._variables.pop(loop.target.id, None)
        else:
            self._variables[loop.target.id] = shadowed


def evaluate_arithmetic(expression: str) -> int | float | list | tuple:
    """Evaluate arithmetic without running code.

    Allowed are numbers, ``+ - * / // % **``, parentheses, lists, tuples, comprehensions over ``range(...)`` or a list,
    and the functions int, float, round, range, len, min, max.

    Args:
        expression: for example ``"[int(x * 0.1 * 512) for x in range(5, 21)]"``.

    Raises:
        ValueError: the expression holds anything else, or is too long, too slow or too large to evaluate.
    """
    if len(expression) > MAX_EXPRESSION_LENGTH:
        raise ValueError(f"the expression is longer than {MAX_EXPRESSION_LENGTH} characters")
    try:
        value = _Evaluator().evaluate(ast.parse(expression.strip(), mode="eval"))
        if isinstance(value, range):
            value = _bounded_list(value)
    except (ValueError, TypeError, SyntaxError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot evaluate {expression!r}: {error}") from error
    return value


def _bounded_list(values: range) -> list[int]:
    if len(values) > MAX_STEPS:
        raise ValueError(f"the range has more than {MAX_STEPS} elements")
    return list(values)


# ---- YAML ----------------------------------------------------------------------------------------------------------


class _SafeLoader(yaml.SafeLoader):
    """PyYAML's safe loader plus tuples and arithmetic; other Python tags are refused by name."""


def _construct_eval(loader: _SafeLoader, node: yaml.Node) -> Any:
    if not isinstance(node, yaml.SequenceNode) or len(node.value) != 1:
        raise yaml.constructor.ConstructorError(None, None, "eval takes a list of one expression", node.start_mark)
    expression = loader.construct_object(node.value[0], deep=True)
    try:
        return evaluate_arithmetic(str(expression))
    except ValueError as error:
        raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error


def _construct_tuple(loader: _SafeLoader, node: yaml.Node) -> tuple:
    return tuple(loader.construct_sequence(node, deep=True))


def _refuse_tag(loader: _SafeLoader, suffix: str, node: yaml.Node) -> None:
    raise yaml.constructor.ConstructorError(
        None,
        None,
        f"the tag !!python/{suffix} is not allowed (!!python/tuple and arithmetic in !!python/object/apply:eval are)",
        node.start_mark,
    )


_SafeLoader.add_constructor(_EVAL_TAG, _construct_eval)
_SafeLoader.add_constructor(_TUPLE_TAG, _construct_tuple)
_SafeLoader.add_multi_constructor(_PYTHON_TAG, _refuse_tag)


def load_yaml(stream: str | bytes | IO, name: str = "<string>") -> Any:
    """Parse one YAML document.

    Args:
        stream: text or an open file.
        name: what to call the input in an error.

    Raises:
        ConfigFileError: broken syntax, a forbidden tag, or an expression that is more than arithmetic.
    """
    try:
        return yaml.load(stream, Loader=_SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        reason = ": ".join(part for part in (error.context, error.problem) if part)
        raise ConfigFileError(f"{name}{where}: {reason}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigFileError(f"{name}: not a readable YAML file: {error}") from error


# ---- files that inherit ----------------------------------------------------------------------------------------------


def _open_text(path: str) -> IO[str]:
    return open(path, encoding="utf-8")


def _is_url(path: str) -> bool:
    return "://" in path


def _resolve_base(base: str, referring: str) -> str:
    base = os.path.expanduser(base)
    if _is_url(base) or os.path.isabs(base):
        return base
    if _is_url(referring):
        return posixpath.join(posixpath.dirname(referring), base)
    return os.path.join(os.path.dirname(referring), base)


def _overlay(base: dict, child: dict, name: str, prefix: str = "") -> None:
    """Put the values of ``child`` over ``base``, in place."""
    for key, value in child.items():
        if isinstance(value, dict) and key in base:
            if not isinstance(base[key], dict):
                raise ConfigFileError(f"{name}: {prefix}{key} is a group here, but a value in the file's {BASE_KEY}")
            _overlay(base[key], value, name, f"{prefix}{key}.")
        else:
            base[key] = value


def _identity(path: str) -> str:
    return path if _is_url(path) else os.path.realpath(path)


def load_config_dict(
    path: str | os.PathLike, open_file: Callable[[str], IO] = _open_text, *, _referring: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Read a config file and all files that it inherits from.

    ``_BASE_`` holds one path or a list of paths (later ones win); a path may be absolute, start with ``~``, be a URL
    that ``open_file`` understands, or be relative to the file that holds it. The file's own values win over its bases'.

    Args:
        path: a YAML file.
        open_file: opens a path for reading text.

    Returns:
        Nested dictionaries without ``_BASE_``.

    Raises:
        FileNotFoundError: the file or one of its bases is missing.
        ConfigFileError: a file cannot be parsed, is not a mapping, or inherits from itself.
    """
    path = os.fspath(path)
    identity = _identity(path)
    if identity in map(_identity, _referring):
        raise ConfigFileError(f"{BASE_KEY} runs in a circle: {' -> '.join((*_referring, path))}")
    try:
        stream = open_file(path)
    except FileNotFoundError as error:
        origin = f", the {BASE_KEY} of {_referring[-1]}," if _referring else ""
        raise FileNotFoundError(f"config file {path}{origin} does not exist") from error
    with stream:
        config = load_yaml(stream, path)
    if config is None:
        config = {}
    if not isinstance(config, dict):
        raise ConfigFileError(f"{path}: a config must be a mapping of keys to values, not a {type(config).__name__}")
    bases = config.pop(BASE_KEY, [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, (list, tuple)) or not all(isinstance(base, str) for base in bases):
        raise ConfigFileError(f"{path}: {BASE_KEY} must be a path or a list of paths, got {bases!r}")
    result: dict[str, Any] = {}
    for base in bases:
        inherited = load_config_dict(_resolve_base(base, path), open_file, _referring=(*_referring, path))
        _overlay(result, inherited, path)
    _overlay(result, config, path)
    return result
