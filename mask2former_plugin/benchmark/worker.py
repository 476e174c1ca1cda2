"""A side in a process of its own: takes requests as lines of JSON, answers each with one line."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mask2former_plugin.benchmark import rates
from mask2former_plugin.benchmark.cases import CASES, Case
from mask2former_plugin.benchmark.measure import Meter, Operations, is_out_of_memory, limit_memory, release_memory
from mask2former_plugin.benchmark.workload import SIDES, Context, NotOffered, Workload, number_of_bytes
from mask2former_plugin.memory import keep_freed_memory

_MODULES = {"ours": "ours", "reference": "ours", "transformers": "huggingface", "original": "original"}
_SECONDS_PER_TIMING = 0.2  # short runs are repeated until a timing takes so long
_MOST_REPEATS = 100
_LONG_RUN = 1.0  # seconds; after a run so long everything is warm


class Worker:
    """The state between requests: at most one case is loaded."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        if settings["keep_freed_memory"]:
            keep_freed_memory()
        device = torch.device(settings["device"])
        self.context = Context(
            side=SIDES[settings["side"]],
            device=device,
            configs=Path(settings["configs"]),
            scratch=Path(settings["scratch"]),
            original=Path(settings["original"]) if settings["original"] else None,
        )
        self.quick = settings["quick"]
        self.meter = Meter(device)
        self.workload: Workload | None = None
        self.level: int | None = None
        self.seconds = 0.0
        self.repeats = 1
        self.result = 0

    def _case(self, name: str) -> Case:
        return CASES[name].reduced() if self.quick else CASES[name]

    def weights(self, case: str) -> dict[str, Any]:
        """Make the weights that all sides of a case load."""
        from mask2former_plugin.benchmark.ours import make_weights

        make_weights(self._case(case).options, self.context)
        release_memory()
        return {}

    def prepare(self, case: str) -> dict[str, Any]:
        """Load a case; the level of memory that peaks are counted from is that after it."""
        self.finish()
        chosen = self._case(case)
        implementation = self.context.side.implementation
        module = importlib.import_module(f"mask2former_plugin.benchmark.{_MODULES[implementation]}")
        builders = module.REFERENCE_BUILDERS if implementation == "reference" else module.BUILDERS
        if chosen.kind not in builders:
            raise NotOffered(f"{self.context.side.name} has nothing of the kind")
        if self.context.side.checkpointed and chosen.kind != "training":
            raise NotOffered("activations are recomputed in training only")
        if self.context.device.type == "cpu":
            limit_memory()
        self.workload = builders[chosen.kind](chosen, self.context)
        self.level = self.meter.level()
        return {}

    def outputs(self, file: str) -> dict[str, Any]:
        """Write what is compared with the other sides; this is the first run and warms up all that follow."""
        start = time.perf_counter()
        np.savez(file, **self.workload.outputs())
        self.seconds = time.perf_counter() - start
        return {"facts": self.workload.facts}

    def warm_up(self) -> dict[str, Any]:
        """Run untimed if a run is short, and set the number of repeats of a timing."""
        if self.seconds < _LONG_RUN:
            self.seconds = self.meter.seconds(self.workload.run)
        self.repeats = min(_MOST_REPEATS, max(1, math.ceil(_SECONDS_PER_TIMING / self.seconds)))
        self.meter.reset_peak()
        return {"seconds": self.seconds * self.repeats}

    def time(self) -> dict[str, Any]:
        """One timing."""
        kept: list[Any] = []

        def run() -> None:
            kept.clear()  # two results at a time would count as memory
            kept.append(self.workload.run())

        seconds = self.meter.seconds(run, self.repeats)
        self.result = number_of_bytes(kept)
        return {"seconds": seconds}

    def memory(self) -> dict[str, Any]:
        """Bytes on top of weights and inputs at the peak of all timings, and of a result."""
        peak = self.meter.peak()
        return {"memory": None if peak is None else max(0, peak - self.level), "result": self.result}

    def operations(self) -> dict[str, Any]:
        """Floating-point operations of a run, and the bytes that it has to read and write at least."""
        with Operations() as counter:
            result = (self.workload.counted or self.workload.run)()
        moved = number_of_bytes(self.workload.inputs) + number_of_bytes(result)
        return {"flop": counter.total, "bytes": moved}

    def rates(self) -> dict[str, Any]:
        """What the machine reaches."""
        return rates.measure(self.meter, self.quick)

    def finish(self) -> dict[str, Any]:
        """Forget the case."""
        self.workload = None
        if self.context.side.compiled:
            torch._dynamo.reset()
        release_memory()
        return {}


def serve(settings: Mapping[str, Any]) -> None:
    """Answer requests from standard input until it ends.

    A request is ``{"do": method of Worker, …arguments}``. An answer is what the method returns, or ``{"error": text,
    "kind": "not offered", "out of memory" or "failed"}``. What is printed meanwhile goes to standard error.
    """
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker(settings)
    for line in sys.stdin:
        request = json.loads(line)
        answer = _answer(getattr(worker, request.pop("do")), request)
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


def _answer(method: Callable[..., dict[str, Any]], arguments: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return method(**arguments)
    except NotOffered as reason:
        return {"error": str(reason), "kind": "not offered"}
    except Exception as error:  # whatever a side does wrong is reported and does not end the others
        traceback.print_exc()
        kind = "out of memory" if is_out_of_memory(error) else "failed"
        return {"error": f"{type(error).__name__}: {error}", "kind": kind}
