"""Log output: set-up for terminal and files, messages that don't repeat, small tables."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence

from tabulate import tabulate
from termcolor import colored

from detectron2.utils.file_io import PathManager

__all__ = ["create_small_table", "log_every_n", "log_every_n_seconds", "log_first_n", "setup_logger"]

_DATE = "%m/%d %H:%M:%S"
_seen: Counter = Counter()
_last_time: dict[tuple, float] = {}


class _Formatter(logging.Formatter):
    """Shortens the package's name; in colour (where the terminal has it), the head is green and warnings stand out."""

    def __init__(self, name: str, abbreviation: str, color: bool) -> None:
        plain = "[%(asctime)s] %(name)s %(levelname)s: "
        head = colored("[%(asctime)s %(name)s]: ", "green") if color else plain
        super().__init__(head + "%(message)s", datefmt=_DATE)
        self._name = name
        self._abbreviation = abbreviation
        self._color = color

    def formatMessage(self, record: logging.LogRecord) -> str:
        full_name = record.name
        if self._name and (full_name == self._name or full_name.startswith(self._name + ".")):
            record.name = self._abbreviation + full_name[len(self._name) :]
        line = super().formatMessage(record)
        record.name = full_name  # other handlers see the same record
        if self._color and record.levelno >= logging.WARNING:
            style = ["blink"] if record.levelno == logging.WARNING else ["blink", "underline"]
            return colored(record.levelname, "red", attrs=style) + " " + line
        return line


class _StdoutHandler(logging.StreamHandler):
    """Writes to what ``sys.stdout`` is at that moment, which notebooks and tests replace."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stdout


def setup_logger(
    output: str | None = None,
    distributed_rank: int = 0,
    *,
    color: bool = True,
    name: str = "detectron2",
    abbrev_name: str | None = None,
    enable_propagation: bool = False,
    configure_stdout: bool = True,
) -> logging.Logger:
    """Set up a logger at level DEBUG; a repeated call adds only what is new.

    Args:
        output: a file ending in ``.txt`` or ``.log``, or a folder that gets ``log.txt``; processes other than rank 0
            write to ``<file>.rank<N>``. None: no file.
        distributed_rank: number of this process; only rank 0 writes to the terminal.
        color: colours in the terminal.
        name: the logger's name, a package.
        abbrev_name: printed instead of ``name``; by default ``d2`` for ``detectron2``.
        enable_propagation: hand messages on to the root logger too.
        configure_stdout: write to the terminal.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.propagate = enable_propagation
    if abbrev_name is None:
        abbrev_name = "d2" if name == "detectron2" else name
    has_terminal = any(isinstance(handler, _StdoutHandler) for handler in logger.handlers)
    if configure_stdout and distributed_rank == 0 and not has_terminal:
        handler = _StdoutHandler()
        handler.setFormatter(_Formatter(name, abbrev_name, color))
        logger.addHandler(handler)
    if output is not None:
        path = output if output.endswith((".txt", ".log")) else os.path.join(output, "log.txt")
        if distributed_rank > 0:
            path += f".rank{distributed_rank}"
        if not any(getattr(handler, "log_path", None) == path for handler in logger.handlers):
            logger.addHandler(_file_handler(path, _Formatter(name, abbrev_name, color=False)))
    return logger


_open_streams: dict[str, object] = {}


def _file_handler(path: str, formatter: logging.Formatter) -> logging.Handler:
    if path not in _open_streams:  # loggers of several packages share a file
        folder = os.path.dirname(path)
        if folder:
            PathManager.mkdirs(folder)
        stream = PathManager.open(path, "a", buffering=1)  # by lines, so that a crash loses nothing
        atexit.register(stream.close)
        _open_streams[path] = stream
    handler = logging.StreamHandler(_open_streams[path])
    handler.log_path = path
    handler.setFormatter(formatter)
    return handler


def create_small_table(small_dict: dict) -> str:
    """A one-row table; for a few short entries, such as ``{"AP": 40.1, "AP50": 60.0}``."""
    return tabulate(
        [tuple(small_dict.values())],
        headers=tuple(small_dict),
        tablefmt="pipe",
        floatfmt=".3f",
        stralign="center",
        numalign="center",
    )


def _caller() -> tuple[str, tuple]:
    """Module name and place of the code that called into this module."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    module = frame.f_globals.get("__name__", "__main__")
    module = "detectron2" if module == "__main__" else module
    return module, (frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def log_first_n(
    lvl: int, msg: str, n: int = 1, *, name: str | None = None, key: str | Sequence[str] = "caller"
) -> None:
    """Log a message only the first ``n`` times.

    Args:
        lvl: level, e.g. ``logging.WARNING``.
        msg: the text.
        n: how often.
        name: logger; by default the caller's module.
        key: what counts as a repetition: ``"caller"`` the same place, ``"message"`` the same text, or both.
    """
    keys = (key,) if isinstance(key, str) else tuple(key)
    if not keys or not set(keys) <= {"caller", "message"}:
        raise ValueError(f"key must be 'caller', 'message' or both, got {key!r}")
    module, place = _caller()
    count_key = (place if "caller" in keys else (), msg if "message" in keys else None)
    _seen[count_key] += 1
    if _seen[count_key] <= n:
        logging.getLogger(name or module).log(lvl, msg)


def log_every_n(lvl: int, msg: str, n: int = 1, *, name: str | None = None) -> None:
    """Log a message once per ``n`` calls from the same place, beginning with the first."""
    module, place = _caller()
    _seen[place] += 1
    if n == 1 or _seen[place] % n == 1:
        logging.getLogger(name or module).log(lvl, msg)


def log_every_n_seconds(lvl: int, msg: str, n: float = 1, *, name: str | None = None) -> None:
    """Log a message at most once per ``n`` seconds from the same place."""
    module, place = _caller()
    now = time.monotonic()
    if place not in _last_time or now - _last_time[place] >= n:
        _last_time[place] = now
        logging.getLogger(name or module).log(lvl, msg)


def _log_api_usage(identifier: str) -> None:
    """Upstream counts API usage here; the embedded slice counts nothing."""
