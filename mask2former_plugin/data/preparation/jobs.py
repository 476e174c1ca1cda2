"""Runs the work of a preparation: independent items, in processes, with a progress bar; an interrupted run goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, TypeVar

import cv2
from tqdm import tqdm

from mask2former_plugin.data.preparation.files import is_complete

Item = TypeVar("Item")
Result = TypeVar("Result")
_CHUNK = 16  # items that go to a process at a time


@dataclass(frozen=True)
class Options:
    """How a preparation runs.

    Attributes:
        workers: number of processes; 1 works in the calling one.
        overwrite: write again what is there already.
        progress: show a bar.
    """

    workers: int = 1
    overwrite: bool = False
    progress: bool = True


def default_workers() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    function: Callable[[Item], Result], items: Sequence[Item], options: Options, description: str
) -> Iterator[Result]:
    """Results of ``function`` for the items, in their order; the first error ends everything."""
    bar = tqdm(total=len(items), desc=description, disable=not options.progress)
    with bar:
        if options.workers <= 1 or len(items) <= 1:
            for item in items:
                yield function(item)
                bar.update()
            return
        chunk = max(1, min(_CHUNK, len(items) // options.workers))
        with ProcessPoolExecutor(min(options.workers, len(items)), _context(), initializer=_start_worker) as pool:
            try:
                for result in pool.map(function, items, chunksize=chunk):
                    yield result
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # without this the rest would be worked off first
                raise


def _context() -> BaseContext:
    """Processes that inherit no threads: a plain fork can hang where OpenCV or PyTorch have used theirs before."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports once what every process needs
    return context


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the main process, which ends this one
    cv2.setNumThreads(1)


def write_files(
    function: Callable[[Item], Any], jobs: Mapping[Path, Item], options: Options, description: str
) -> None:
    """Call ``function`` for each file that is not there yet.

    Args:
        jobs: what ``function`` needs to write the file, by the file.
    """
    items = [item for path, item in jobs.items() if options.overwrite or not is_complete(path)]
    for _ in run(function, items, options, f"{description}, {len(jobs) - len(items)} of {len(jobs)} done before"):
        pass


def collect(
    function: Callable[[Item], Result],
    jobs: Mapping[str, Item],
    journal: Path,
    options: Options,
    description: str,
    files: Mapping[str, Path] | None = None,
) -> list[Result]:
    """Results of ``function`` in the order of the ``jobs``, kept in ``journal`` until the caller removes it.

    Args:
        jobs: what ``function`` needs, by a name that is unique.
        journal: JSON lines of name and result; those of an interrupted run are not made again.
        files: the files that ``function`` writes, by name; where one is missing its result is made again.
    """
    if options.overwrite:
        journal.unlink(missing_ok=True)
    results = {name: result for name, result in _read_journal(journal).items() if name in jobs}
    if files is not None:
        results = {name: result for name, result in results.items() if is_complete(files[name])}
    names = [name for name in jobs if name not in results]
    description = f"{description}, {len(results)} of {len(jobs)} done before"
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a", encoding="utf-8") as file:
        # the results first: zip must ask for one more of them than there are, which ends the progress bar
        for result, name in zip(run(function, [jobs[name] for name in names], options, description), names):
            file.write(json.dumps([name, result]) + "\n")
            file.flush()
            results[name] = result
    return [results[name] for name in jobs]


def _read_journal(path: Path) -> dict[str, Any]:
    """Complete lines of a journal; a last line that was cut off is cut off the file as well."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(complete))
    return dict(json.loads(line) for line in complete.splitlines())
