"""Metrics of a training run: one storage that everything writes to, and writers that read from it."""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from fvcore.common.history_buffer import HistoryBuffer

from detectron2.utils.file_io import PathManager

__all__ = [
    "CommonMetricPrinter",
    "EventStorage",
    "EventWriter",
    "JSONWriter",
    "TensorboardXWriter",
    "get_event_storage",
    "has_event_storage",
]

_CURRENT_STORAGE_STACK: list[EventStorage] = []


def get_event_storage() -> EventStorage:
    """The storage whose ``with`` block is running.

    Raises:
        AssertionError: there is none.
    """
    assert _CURRENT_STORAGE_STACK, "get_event_storage() works inside a 'with EventStorage(...)' block only"
    return _CURRENT_STORAGE_STACK[-1]


def has_event_storage() -> bool:
    """True inside a ``with EventStorage(...)`` block."""
    return bool(_CURRENT_STORAGE_STACK)


class EventStorage:
    """Collects scalars, images and histograms by iteration; a context manager that :func:`get_event_storage` finds."""

    def __init__(self, start_iter: int = 0) -> None:
        self.iter = start_iter
        self._histories: dict[str, HistoryBuffer] = defaultdict(HistoryBuffer)
        self._smoothing_hints: dict[str, bool] = {}
        self._latest: dict[str, tuple[float, int]] = {}
        self._images: list[tuple[str, torch.Tensor, int]] = []
        self._histograms: list[dict[str, Any]] = []
        self._prefix = ""

    def put_scalar(self, name: str, value: float, smoothing_hint: bool = True, cur_iter: int | None = None) -> None:
        """Record one number.

        Args:
            name: prefixed by the running :meth:`name_scope`.
            value: converted to float.
            smoothing_hint: False if writers should show the latest value, not a median; may not change for a name.
            cur_iter: default :attr:`iter`.
        """
        name = self._prefix + name
        cur_iter = self.iter if cur_iter is None else cur_iter
        value = float(value)
        known = self._smoothing_hints.setdefault(name, smoothing_hint)
        assert known == smoothing_hint, f"scalar {name!r} was recorded with smoothing_hint={known} before"
        self._histories[name].update(value, cur_iter)
        self._latest[name] = (value, cur_iter)

    def put_scalars(self, *, smoothing_hint: bool = True, cur_iter: int | None = None, **kwargs: float) -> None:
        """Record several numbers, ``put_scalars(loss=1.0, accuracy=0.5)``."""
        for name, value in kwargs.items():
            self.put_scalar(name, value, smoothing_hint=smoothing_hint, cur_iter=cur_iter)

    def put_image(self, img_name: str, img_tensor: torch.Tensor) -> None:
        """Record an image (3, H, W), uint8 in 0..255 or float in 0..1, RGB."""
        self._images.append((self._prefix + img_name, img_tensor, self.iter))

    def put_histogram(self, hist_name: str, hist_tensor: torch.Tensor, bins: int = 1000) -> None:
        """Record the distribution of a tensor's values in ``bins`` bins of equal width."""
        values = hist_tensor.detach().flatten().double().cpu()
        low, high = values.min().item(), values.max().item()
        edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
        self._histograms.append(
            {
                "tag": self._prefix + hist_name,
                "min": low,
                "max": high,
                "num": len(values),
                "sum": values.sum().item(),
                "sum_squares": values.square().sum().item(),
                "bucket_limits": edges[1:].tolist(),
                "bucket_counts": torch.histc(values, bins, low, high).tolist(),
                "global_step": self.iter,
            }
        )

    def history(self, name: str) -> HistoryBuffer:
        """All values of a scalar.

        Raises:
            KeyError: no such scalar was recorded.
        """
        if name not in self._histories:
            raise KeyError(f"no scalar named {name!r} was recorded")
        return self._histories[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        """All values of all scalars."""
        return self._histories

    def latest(self) -> dict[str, tuple[float, int]]:
        """For each scalar its last value and the iteration of that."""
        return self._latest

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """As :meth:`latest`, but the median over the last ``window_size`` iterations where smoothing is wanted."""
        result = {}
        for name, (value, iteration) in self._latest.items():
            if self._smoothing_hints[name]:
                value = float(self._histories[name].median(self.count_samples(name, window_size)))
            result[name] = (value, iteration)
        return result

    def count_samples(self, name: str, window_size: int = 20) -> int:
        """Number of values in the last ``window_size`` iterations, counted back from the scalar's last one."""
        samples = self._histories[name].values()
        first = samples[-1][1] - window_size
        count = 0
        for _, iteration in reversed(samples):
            if iteration <= first or count == window_size:
                break
            count += 1
        return count

    def smoothing_hints(self) -> dict[str, bool]:
        """The hint of every scalar."""
        return self._smoothing_hints

    def step(self) -> None:
        """Go on to the next iteration; the trainer calls this."""
        self.iter += 1

    @property
    def iter(self) -> int:
        """The running iteration; the first is ``start_iter``."""
        return self._iter

    @iter.setter
    def iter(self, value: int) -> None:
        self._iter = int(value)

    @property
    def iteration(self) -> int:
        """Another name of :attr:`iter`."""
        return self._iter

    @contextmanager
    def name_scope(self, name: str) -> Iterator[None]:
        """Inside the block, names are recorded as ``<name>/...``."""
        before = self._prefix
        self._prefix = name.rstrip("/") + "/"
        try:
            yield
        finally:
            self._prefix = before

    def clear_images(self) -> None:
        """Forget the images; a writer calls this when it has written them."""
        self._images = []

    def clear_histograms(self) -> None:
        """Forget the histograms; a writer calls this when it has written them."""
        self._histograms = []

    def __enter__(self) -> EventStorage:
        _CURRENT_STORAGE_STACK.append(self)
        return self

    def __exit__(self, exc_type, exc_val, exc_tb) -> None:
        assert _CURRENT_STORAGE_STACK[-1] is self, "EventStorage blocks must be left in the reverse order of entering"
        _CURRENT_STORAGE_STACK.pop()


class EventWriter:
    """Base class: takes what is new from the current storage and writes it somewhere."""

    def write(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Release what the writer holds; nothing by default."""


class _NewScalars:
    """Yields each recorded scalar once."""

    def __init__(self, window_size: int) -> None:
        self._window_size = window_size
        self._last_iteration = -1

    def take(self) -> Iterator[tuple[str, float, int]]:
        last = self._last_iteration
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(self._window_size).items():
            if iteration > last:
                self._last_iteration = max(self._last_iteration, iteration)
                yield name, value, iteration


class JSONWriter(EventWriter):
    """Appends one line of JSON per iteration, ``{"iteration": 19, "total_loss": 1.5, ...}``; null where not finite."""

    def __init__(self, json_file: str, window_size: int = 20) -> None:
        """
        Args:
            json_file: appended to; a line that an interrupted run left unfinished is ended first.
            window_size: iterations that the median of smoothed scalars covers.
        """
        unfinished = _ends_within_a_line(json_file)
        self._file = PathManager.open(json_file, "a")
        if unfinished:
            self._file.write("\n")
        self._scalars = _NewScalars(window_size)

    def write(self) -> None:
        lines: dict[int, dict[str, float | None]] = defaultdict(dict)
        for name, value, iteration in self._scalars.take():
            lines[iteration][name] = value if math.isfinite(value) else None
        for iteration, values in sorted(lines.items()):
            values["iteration"] = iteration
            self._file.write(json.dumps(values, sort_keys=True) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _ends_within_a_line(path: str) -> bool:
    if not PathManager.isfile(path):
        return False
    with PathManager.open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


class TensorboardXWriter(EventWriter):
    """Writes scalars, images and histograms for TensorBoard; creates files with the first write only."""

    def __init__(self, log_dir: str, window_size: int = 20, **kwargs: Any) -> None:
        """
        Args:
            log_dir: folder of the event files.
            window_size: iterations that the median of smoothed scalars covers.
            kwargs: further arguments of ``torch.utils.tensorboard.SummaryWriter``.
        """
        self._arguments = {"log_dir": log_dir, **kwargs}
        self._scalars = _NewScalars(window_size)

    @cached_property
    def _writer(self):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(**self._arguments)

    def write(self) -> None:
        storage = get_event_storage()
        for name, value, iteration in self._scalars.take():
            self._writer.add_scalar(name, value, iteration)
        for name, image, iteration in storage._images:
            self._writer.add_image(name, image, iteration)
        storage.clear_images()
        for histogram in storage._histograms:
            self._writer.add_histogram_raw(**histogram)
        storage.clear_histograms()

    def close(self) -> None:
        if "_writer" in self.__dict__:
            self._writer.close()


class CommonMetricPrinter(EventWriter):
    """Logs one line with the remaining time, losses, times, learning rate and memory."""

    def __init__(self, max_iter: int | None = None, window_size: int = 20) -> None:
        """
        Args:
            max_iter: number of iterations of the run; without it, no remaining time is shown.
            window_size: iterations that medians cover.
        """
        self.logger = logging.getLogger("detectron2.utils.events")  # a fixed name: users and tests filter by it
        self._max_iter = max_iter
        self._window_size = window_size
        self._last_write: tuple[int, float] | None = None

    def _seconds_per_iteration(self, storage: EventStorage) -> float | None:
        if "time" in storage.histories():
            return float(storage.history("time").median(1000))
        before, self._last_write = self._last_write, (storage.iter, time.perf_counter())
        if before is None or before[0] == storage.iter:
            return None
        return (self._last_write[1] - before[1]) / (self._last_write[0] - before[0])

    def _get_eta(self, storage: EventStorage) -> str | None:
        if self._max_iter is None:
            return None
        seconds = self._seconds_per_iteration(storage)
        if seconds is None:
            return None
        seconds *= self._max_iter - storage.iter - 1
        storage.put_scalar("eta_seconds", seconds, smoothing_hint=False)
        return str(datetime.timedelta(seconds=int(seconds)))

    def write(self) -> None:
        storage = get_event_storage()
        if storage.iter == self._max_iter:
            return  # after the last iteration there is no progress to report
        fields = []
        eta = self._get_eta(storage)
        if eta is not None:
            fields.append(f"eta: {eta}")
        fields.append(f"iter: {storage.iter}")
        losses = [name for name in storage.histories() if "loss" in name]
        metrics = [name for name in storage.histories() if name.startswith("[metric]")]
        fields += [f"{name}: {self._smoothed(storage, name):.4g}" for name in losses + metrics]
        for name in ("time", "data_time"):
            if name in storage.histories():
                history = storage.history(name)
                fields.append(f"{name}: {history.avg(storage.count_samples(name, self._window_size)):.4f}")
                fields.append(f"last_{name}: {history.latest():.4f}")
        if "lr" in storage.histories():
            fields.append(f"lr: {storage.history('lr').latest():.5g}")
        if torch.cuda.is_available():
            fields.append(f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M")
        self.logger.info(" %s", "  ".join(fields))

    def _smoothed(self, storage: EventStorage, name: str) -> float:
        return float(storage.history(name).median(storage.count_samples(name, self._window_size)))
