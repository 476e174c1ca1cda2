"""The evaluator interface and the loop that runs a model over a dataset."""

from __future__ import annotations

import contextlib
import datetime
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from detectron2.utils.comm import get_world_size, is_main_process

logger = logging.getLogger(__name__)

LOG_PERIOD_SECONDS = 5.0
MAX_WARMUP_BATCHES = 5


class DatasetEvaluator:
    """Collects what a model says about the images of a dataset and turns it into numbers.

    ``reset`` comes first, ``process`` once per batch, ``evaluate`` last. With several processes each one sees a share
    of the images; ``evaluate`` brings them together and gives the results on the main process.
    """

    def reset(self) -> None:
        """Forget everything seen so far."""

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Take one batch: the dicts that went into the model and, in the same order, what came out."""

    def evaluate(self) -> Mapping | None:
        """Return ``{task: {metric: number}}``, or None on processes other than the main one."""


class DatasetEvaluators(DatasetEvaluator):
    """Several evaluators as one; their results are merged."""

    def __init__(self, evaluators: Sequence[DatasetEvaluator]) -> None:
        super().__init__()
        self._evaluators = evaluators

    def reset(self) -> None:
        for evaluator in self._evaluators:
            evaluator.reset()

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        for evaluator in self._evaluators:
            evaluator.process(inputs, outputs)

    def evaluate(self) -> Mapping:
        """Merged results; AssertionError if two evaluators use the same task name."""
        merged = OrderedDict()
        for evaluator in self._evaluators:
            results = evaluator.evaluate()
            if not is_main_process() or results is None:
                continue
            for task, value in results.items():
                if task in merged:
                    raise AssertionError(f"two evaluators report results for the same task {task!r}")
                merged[task] = value
        return merged


class _Progress:
    """Adds up where the time goes and logs it every few seconds; the first batches are warm-up and not counted."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.warmup = min(MAX_WARMUP_BATCHES, max(total - 1, 0))
        self.seconds = {"data": 0.0, "inference": 0.0, "eval": 0.0}
        self.counted = 0
        self.start = self.last_log = time.perf_counter()

    def batch_done(self, index: int, data: float, inference: float, evaluation: float) -> None:
        now = time.perf_counter()
        if index < self.warmup:
            self.start = now
            return
        self.counted += 1
        for part, seconds in zip(self.seconds, (data, inference, evaluation)):
            self.seconds[part] += seconds
        if now - self.last_log < LOG_PERIOD_SECONDS:
            return
        self.last_log = now
        per_batch = (now - self.start) / self.counted
        eta = datetime.timedelta(seconds=int(per_batch * (self.total - index - 1)))
        parts = {part: seconds / self.counted for part, seconds in self.seconds.items()}
        logger.info(
            f"Inference done {index + 1}/{self.total}. Dataloading: {parts['data']:.4f} s/iter. "
            f"Inference: {parts['inference']:.4f} s/iter. Eval: {parts['eval']:.4f} s/iter. "
            f"Total: {per_batch:.4f} s/iter. ETA={eta}"
        )

    def finish(self, devices: int) -> None:
        counted = max(self.counted, 1)
        for name, seconds in (
            ("inference", time.perf_counter() - self.start),
            ("inference pure compute", self.seconds["inference"]),
        ):
            clock = datetime.timedelta(seconds=int(seconds))
            logger.info(
                f"Total {name} time: {clock} ({seconds / counted:.6f} s / iter per device, on {devices} devices)"
            )


def inference_on_dataset(
    model: Callable[[Sequence[dict]], Sequence[dict]],
    data_loader: Iterable[Sequence[dict]],
    evaluator: DatasetEvaluator | Sequence[DatasetEvaluator] | None,
    callbacks: Mapping[str, Callable[[], None]] | None = None,
) -> Mapping:
    """Run ``model`` over ``data_loader`` without gradients and return what ``evaluator`` makes of it.

    A module is put into eval mode and afterwards, also after an exception, back into the mode of each of its parts. The
    GPU is not synchronised after every batch, so on CUDA the time of queued kernels shows up where a result is first
    read, usually under "Eval".

    Args:
        model: a module, or any callable from a batch (list of dicts) to a list of result dicts.
        data_loader: an iterable of batches that has a length.
        evaluator: one evaluator, several, or None to run the model only.
        callbacks: optional functions without arguments under ``on_start``, ``before_inference``, ``after_inference``
            and ``on_end``.

    Returns:
        The results; an empty dict on processes other than the main one.
    """
    devices = get_world_size()
    total = len(data_loader)
    logger.info(f"Start inference on {total} batches")
    if evaluator is None or isinstance(evaluator, (list, tuple)):
        evaluator = DatasetEvaluators(evaluator or [])
    evaluator.reset()

    def call(event: str) -> None:
        if callbacks is not None and event in callbacks:
            callbacks[event]()

    progress = _Progress(total)
    with contextlib.ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(inference_context(model))
        stack.enter_context(torch.no_grad())
        call("on_start")
        before_data = time.perf_counter()
        for index, inputs in enumerate(data_loader):
            before_inference = time.perf_counter()
            call("before_inference")
            outputs = model(inputs)
            call("after_inference")
            before_eval = time.perf_counter()
            evaluator.process(inputs, outputs)
            after_eval = time.perf_counter()
            progress.batch_done(
                index, before_inference - before_data, before_eval - before_inference, after_eval - before_eval
            )
            before_data = time.perf_counter()
        call("on_end")
    progress.finish(devices)
    results = evaluator.evaluate()
    return {} if results is None else results


@contextlib.contextmanager
def inference_context(model: nn.Module) -> Iterator[None]:
    """Eval mode for the body of the ``with``; then every submodule gets the mode back that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
