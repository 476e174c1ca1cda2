"""Runs cases on sides: one process per side, what they compute compared first, then timed in turn, round by round."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mask2former_plugin.benchmark import agreement
from mask2former_plugin.benchmark.cases import Case
from mask2former_plugin.benchmark.workload import SIDES, Side

_START = Path(__file__).with_name("start_worker.py")
_MODEL_KINDS = ("inference", "training")
_LEAST_ROUNDS = 2
_LEAST_ROUNDS_OF_CURVES = 1
KEEPERS = ("ours", "all", "none")
_STDERR_LINES = 20  # of a crashed worker, in the message
_ERROR_LENGTH = 500


@dataclass(frozen=True)
class Settings:
    """What is common to all cases of a run.

    Attributes:
        sides: names of the sides, in the order in which they run; the first that offers a case is what the others are
            compared with.
        rounds: most timings of each side.
        seconds: time that the rounds of one case should take at most; there are at least two rounds, of curves one.
        threads: of each worker.
        device: cpu, cuda or cuda:<number>.
        quick: small sizes and models.
        configs: folder of our configs.
        originals: family to checkout of the original.
        keep_freed_memory: which workers on a CPU keep it: "ours", "all" or "none".
        timeout: seconds after which a worker that does not answer is ended.
    """

    sides: Sequence[str]
    rounds: int
    seconds: float
    threads: int
    device: str
    quick: bool
    configs: Path
    originals: Mapping[str, Path]
    keep_freed_memory: str = "ours"
    timeout: float = 1800.0


class WorkerError(Exception):
    """A request failed.

    Attributes:
        kind: "not offered", "out of memory", "failed" or "crashed".
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class WorkerProcess:
    """A worker from outside."""

    def __init__(self, side: Side, settings: Settings, scratch: Path, original: Path | None) -> None:
        self.side = side
        self._timeout = settings.timeout
        self._stderr = tempfile.TemporaryFile("w+")
        arguments = {
            "side": side.name,
            "bare": side.implementation == "original",
            "keep_freed_memory": settings.device == "cpu"
            and settings.keep_freed_memory in ("all", side.implementation),
            "threads": settings.threads,
            "device": settings.device,
            "quick": settings.quick,
            "configs": str(settings.configs),
            "scratch": str(scratch),
            "original": str(original) if original else None,
        }
        self._process = subprocess.Popen(
            [sys.executable, str(_START), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(settings.threads), "MKL_NUM_THREADS": str(settings.threads)},
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            WorkerError: there is none.
        """
        timer = threading.Timer(self._timeout, self._process.kill)
        timer.start()
        start = time.monotonic()
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            code = self._process.wait()
            self._stderr.seek(0)
            last = "".join(self._stderr.readlines()[-_STDERR_LINES:])
            late = f", {self._timeout:g} s without an answer" if time.monotonic() - start >= self._timeout else ""
            raise WorkerError("crashed", f"the process ended with code {code} in {do!r}{late}; its last words:\n{last}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["kind"], textwrap.shorten(answer["error"], _ERROR_LENGTH))
        return answer

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            try:
                stream.close()
            except BrokenPipeError:
                pass  # it is dead already
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()


class Runner:
    """Keeps the workers from case to case; use as a context manager.

    Args:
        settings: of the run.
        report: is called with a line for the user whenever something goes wrong.
    """

    def __init__(self, settings: Settings, report: Callable[[str], None]) -> None:
        self.settings = settings
        self._report = report
        self._measured: dict[str, Any] = {}
        self._workers: dict[tuple[str, Path | None], WorkerProcess] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="benchmark-")
        self._scratch = Path(self._folder.name)

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers.values():
            worker.close()
        self._folder.cleanup()

    def _worker(self, name: str, family: str) -> WorkerProcess:
        side = SIDES[name]
        original = None
        if side.implementation == "original":
            if family not in self.settings.originals:
                raise WorkerError("not offered", f"no --original with a checkout of {family}")
            original = self.settings.originals[family]
        key = (name, original)
        if key in self._workers and not self._workers[key].alive:
            self._workers.pop(key).close()
        if key not in self._workers:
            self._workers[key] = WorkerProcess(side, self.settings, self._scratch, original)
        return self._workers[key]

    def rates(self) -> dict[str, float]:
        """What the machine reaches; see :mod:`rates`."""
        return self._worker("ours", "").ask("rates")

    def run(self, case: Case) -> dict[str, Any]:
        """Everything measured of one case, as it stands in the JSON; the same work is not done twice."""
        key = repr((case.kind, sorted(case.options.items())))
        if key not in self._measured:
            self._measured[key] = self._measure(case)
        limit, sides = self._measured[key]
        return {
            "name": case.name,
            "title": case.title,
            "group": case.group,
            "curve": case.curve,
            "axis": case.axis,
            "value": case.value,
            "images": case.images,
            "options": dict(case.reduced().options if self.settings.quick else case.options),
            "limit": limit,
            "sides": [side for side in sides if not case.axis or _on_curves(side["side"])],
        }

    def _measure(self, case: Case) -> tuple[dict[str, float] | None, list[dict[str, Any]]]:
        """Operations and bytes of our float32 side, and the entries of all sides."""
        family = case.options.get("family", "mask2former")
        names = [name for name in self.settings.sides if not case.axis or _on_curves(name)]
        entries = {name: {"side": name, "status": "measured"} for name in names}
        workers: dict[str, WorkerProcess] = {}
        for name in entries:
            with self._watch(case, entries[name]):
                if case.kind in _MODEL_KINDS:
                    self._worker("ours", family).ask("weights", case=case.name)
                worker = self._worker(name, family)
                worker.ask("prepare", case=case.name)
                workers[name] = worker
        measured = self._agreeing(case, entries, workers)
        self._time(case, entries, measured)
        limit = self._limit(case, entries, measured)
        for worker in workers.values():
            if worker.alive:
                worker.ask("finish")
        return limit, list(entries.values())

    def _watch(self, case: Case, entry: dict[str, Any]) -> _Watch:
        return _Watch(case, entry, self._report)

    def _agreeing(
        self, case: Case, entries: dict[str, dict], workers: Mapping[str, WorkerProcess]
    ) -> dict[str, WorkerProcess]:
        """The sides that compute what the first one does."""
        expected: dict[str, np.ndarray] | None = None
        agreeing = {}
        for name, worker in workers.items():
            entry = entries[name]
            file = self._scratch / f"{name}.npz"
            with self._watch(case, entry):
                entry["facts"] = worker.ask("outputs", file=str(file))["facts"]
                with np.load(file) as arrays:
                    found = {key: arrays[key] for key in arrays.files}
                file.unlink()
                if expected is None:
                    expected = found
                else:
                    whole = worker.side.implementation != "transformers"  # it has not all results in a form of ours
                    entry["agreement"] = agreement.compare(found, expected, worker.side.precision, whole=whole)
                    wrong = agreement.disagreements(entry["agreement"])
                    if wrong:
                        raise WorkerError("disagrees", "; ".join(wrong))
                agreeing[name] = worker
        return agreeing

    def _time(self, case: Case, entries: dict[str, dict], workers: dict[str, WorkerProcess]) -> None:
        total = 0.0
        for name in list(workers):
            with self._watch(case, entries[name]) as watch:
                total += workers[name].ask("warm_up")["seconds"]
            if watch.failed:
                del workers[name]
        least = _LEAST_ROUNDS_OF_CURVES if case.axis else _LEAST_ROUNDS
        rounds = min(self.settings.rounds, max(least, int(self.settings.seconds / max(total, 1e-9))))
        times: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(rounds):
            for name in list(workers):
                with self._watch(case, entries[name]) as watch:
                    times[name].append(workers[name].ask("time")["seconds"])
                if watch.failed:
                    del workers[name]
        for name, worker in workers.items():
            with self._watch(case, entries[name]):
                values = times[name]
                spread = {"median": statistics.median(values), "least": min(values), "most": max(values)}
                entries[name].update(times=values, **spread, **worker.ask("memory"))

    def _limit(
        self, case: Case, entries: dict[str, dict], workers: Mapping[str, WorkerProcess]
    ) -> dict[str, float] | None:
        """Operations and bytes of our float32 side; case kinds without tensors have none."""
        if "ours" not in workers or case.kind in ("loading", "evaluation"):
            return None
        with self._watch(case, entries["ours"]):
            return workers["ours"].ask("operations")
        return None


def _on_curves(side: str) -> bool:
    """Curves are those of float32 as it is, which says all of growth and saves time."""
    side = SIDES[side]
    return side.precision == "float32" and not (side.compiled or side.checkpointed)


class _Watch:
    """Turns a failed request into the status of a side, so that the others go on."""

    def __init__(self, case: Case, entry: dict[str, Any], report: Callable[[str], None]) -> None:
        self._case, self._entry, self._report = case, entry, report
        self.failed = False

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, WorkerError):
            return False
        self.failed = True
        self._entry.update(status=error.kind, reason=str(error))
        if error.kind != "not offered":
            self._report(f"{self._case.name}, {self._entry['side']}: {error.kind}: {error}")
        return True
