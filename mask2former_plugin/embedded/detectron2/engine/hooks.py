"""Hooks of the trainer: timing, metrics, checkpoints, schedule, evaluation, batch norm statistics, profiling."""

from __future__ import annotations

import logging
import math
import operator
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer
from fvcore.common.checkpoint import PeriodicCheckpointer as CheckpointSchedule
from fvcore.common.param_scheduler import ParamScheduler
from fvcore.common.timer import Timer
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import nn
from torch.optim import Optimizer

from detectron2.engine.train_loop import HookBase, TrainerBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.solver import LRMultiplier
from detectron2.solver import LRScheduler as TorchLRScheduler
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter
from detectron2.utils.file_io import PathManager

__all__ = [
    "AutogradProfiler",
    "BestCheckpointer",
    "CallbackHook",
    "EvalHook",
    "IterationTimer",
    "LRScheduler",
    "PeriodicCheckpointer",
    "PeriodicWriter",
    "PreciseBN",
    "TorchMemoryStats",
    "TorchProfiler",
]

logger = logging.getLogger(__name__)
Callback = Callable[[TrainerBase], None]


def _is_due(trainer: TrainerBase, period: int) -> bool:
    """True after every ``period``-th iteration; a period of 0 never is."""
    return period > 0 and (trainer.iter + 1) % period == 0


def _is_last(trainer: TrainerBase) -> bool:
    return trainer.iter + 1 >= trainer.max_iter


class CallbackHook(HookBase):
    """Calls the given functions with the trainer."""

    def __init__(
        self,
        *,
        before_train: Callback | None = None,
        after_train: Callback | None = None,
        before_step: Callback | None = None,
        after_step: Callback | None = None,
    ) -> None:
        self._callbacks = {
            "before_train": before_train,
            "after_train": after_train,
            "before_step": before_step,
            "after_step": after_step,
        }

    def _call(self, point: str) -> None:
        callback = self._callbacks[point]
        if callback is not None:
            callback(self.trainer)

    def before_train(self) -> None:
        self._call("before_train")

    def after_train(self) -> None:
        self._call("after_train")

    def before_step(self) -> None:
        self._call("before_step")

    def after_step(self) -> None:
        self._call("after_step")


class IterationTimer(HookBase):
    """Puts the seconds of each iteration into the metric ``time`` and logs a summary in the end.

    Register it first: the time of an iteration then excludes the hooks after it, which the summary lists on their own.

    Args:
        warmup_iter: the first iterations of a run, whose times are left out as they include the start-up.
    """

    def __init__(self, warmup_iter: int = 3) -> None:
        self._warmup_iter = warmup_iter
        self._step_timer = Timer()
        self._finished_steps = 0
        self._begin: float | None = None
        self._warm_begin: float | None = None
        self._warm_steps_seconds = 0.0

    def before_train(self) -> None:
        self._begin = self._warm_begin = time.perf_counter()
        self._finished_steps = 0
        self._warm_steps_seconds = 0.0

    def before_step(self) -> None:
        self._step_timer.reset()

    def after_step(self) -> None:
        self._finished_steps += 1
        seconds = self._step_timer.seconds()
        if self._finished_steps >= self._warmup_iter:
            self.trainer.storage.put_scalars(time=seconds)
        if self._finished_steps > self._warmup_iter:
            self._warm_steps_seconds += seconds
        else:
            self._warm_begin = time.perf_counter()

    def after_train(self) -> None:
        steps = self._finished_steps - self._warmup_iter
        if steps <= 0 or self._begin is None or self._warm_begin is None:
            return
        now = time.perf_counter()
        logger.info(
            "Overall training speed: %d iterations in %s (%.4f s / it)",
            steps,
            timedelta(seconds=int(self._warm_steps_seconds)),
            self._warm_steps_seconds / steps,
        )
        logger.info(
            "Total training time: %s (%s on hooks)",
            timedelta(seconds=int(now - self._begin)),
            timedelta(seconds=int(max(0.0, now - self._warm_begin - self._warm_steps_seconds))),
        )


class PeriodicWriter(HookBase):
    """Has writers write every ``period`` iterations, after the last one and after the training."""

    def __init__(self, writers: Sequence[EventWriter], period: int = 20) -> None:
        for writer in writers:
            if not isinstance(writer, EventWriter):
                raise TypeError(f"PeriodicWriter needs EventWriters, got {type(writer).__name__}")
        self._writers = writers
        self._period = period

    def after_step(self) -> None:
        if _is_due(self.trainer, self._period) or _is_last(self.trainer):
            self.trainer.flush_metrics()
            for writer in self._writers:
                writer.write()

    def after_train(self) -> None:
        for writer in self._writers:
            # Hooks that ran after the last step, an evaluation for one, may have added something.
            writer.write()
            writer.close()


class PeriodicCheckpointer(CheckpointSchedule, HookBase):
    """fvcore's PeriodicCheckpointer as a hook: ``model_%07d`` every ``period`` iterations, ``model_final`` in the end.

    Register it after hooks with a state (the schedule), so that the checkpoint holds their state after the iteration.
    """

    def before_train(self) -> None:
        self.max_iter = self.trainer.max_iter

    def after_step(self) -> None:
        self.step(self.trainer.iter)


class BestCheckpointer(HookBase):
    """Saves a checkpoint whenever a metric is better than ever before. Register it after the hook that evaluates.

    A resumed run goes on comparing with the best value: it is part of the trainer's state, and, as the state that a run
    resumes from may be older than the best checkpoint, of the best checkpoint itself.

    Args:
        eval_period: how often the metric is computed; 0 means after the training only.
        val_metric: name in the storage, e.g. ``panoptic_seg/PQ``.
        mode: "max" or "min".
        file_prefix: name of the checkpoint without its extension.
    """

    def __init__(
        self,
        eval_period: int,
        checkpointer: Checkpointer,
        val_metric: str,
        mode: str = "max",
        file_prefix: str = "model_best",
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', got {mode!r}")
        self._period = eval_period
        self._checkpointer = checkpointer
        self._val_metric = val_metric
        self._is_better = operator.gt if mode == "max" else operator.lt
        self._file_prefix = file_prefix
        self.best_metric: float | None = None
        self.best_iter: int | None = None

    def before_train(self) -> None:
        if self.trainer.start_iter > 0 and self._checkpointer.save_dir:
            self._compare_with_file(os.path.join(self._checkpointer.save_dir, f"{self._file_prefix}.pth"))

    def _compare_with_file(self, path: str) -> None:
        """Take over the best value of the checkpoint that is there, if it is better than the one of the trainer's state."""
        from mask2former_plugin.serialization import CheckpointFileError, load_checkpoint_file

        if not PathManager.isfile(path):
            return
        try:
            stored = load_checkpoint_file(PathManager.get_local_path(path)).get("best", {})
        except CheckpointFileError as error:
            logger.warning("The best checkpoint so far can't be read, it will be replaced: %s", error)
            return
        if stored.get("val_metric") != self._val_metric:
            return
        if self.best_metric is None or self._is_better(stored["best_metric"], self.best_metric):
            self.best_metric, self.best_iter = stored["best_metric"], stored["best_iter"]

    def _check(self) -> None:
        latest = self.trainer.storage.latest().get(self._val_metric)
        if latest is None:
            logger.warning("No metric %s to choose the best checkpoint by; nothing is saved", self._val_metric)
            return
        value, iteration = latest
        if not math.isfinite(value):
            logger.warning("%s is %s at iteration %d; not compared with the best", self._val_metric, value, iteration)
            return
        if self.best_metric is not None and not self._is_better(value, self.best_metric):
            logger.info(
                "%s is %.5f, the best is still %.5f of iteration %d",
                self._val_metric,
                value,
                self.best_metric,
                self.best_iter,
            )
            return
        # Before saving: the checkpoint then knows its own metric.
        self.best_metric, self.best_iter = value, iteration
        self._checkpointer.save(self._file_prefix, iteration=iteration, best=self.state_dict())
        logger.info("Best %s so far: %.5f, saved as %s", self._val_metric, value, self._file_prefix)

    def after_step(self) -> None:
        # The last iteration is evaluated in after_train.
        if _is_due(self.trainer, self._period) and not _is_last(self.trainer):
            self._check()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._check()

    def state_dict(self) -> dict[str, Any]:
        return {"val_metric": self._val_metric, "best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["val_metric"] != self._val_metric:
            logger.info("The stored best is one of %s, not of %s; ignored", state_dict["val_metric"], self._val_metric)
            return
        self.best_metric, self.best_iter = state_dict["best_metric"], state_dict["best_iter"]


class LRScheduler(HookBase):
    """Steps a schedule after every iteration and puts the learning rate into the metric ``lr``.

    Args:
        optimizer: None means the trainer's.
        scheduler: a torch scheduler, a fvcore ``ParamScheduler`` (a factor on the initial learning rates over the whole
            training), or None for the trainer's ``scheduler``.
    """

    def __init__(
        self, optimizer: Optimizer | None = None, scheduler: TorchLRScheduler | ParamScheduler | None = None
    ) -> None:
        self._optimizer = optimizer
        self._scheduler = scheduler

    def before_train(self) -> None:
        if self._optimizer is None:
            self._optimizer = self.trainer.optimizer
        if isinstance(self.scheduler, ParamScheduler):
            self._scheduler = LRMultiplier(
                self._optimizer, self.scheduler, self.trainer.max_iter, last_iter=self.trainer.iter - 1
            )
        self._logged_group = self.get_best_param_group_id(self._optimizer)

    @staticmethod
    def get_best_param_group_id(optimizer: Optimizer) -> int:
        """Index of the group whose rate is logged: the largest one, or one of the commonest rate if all have size 1."""
        groups = optimizer.param_groups
        sizes = [len(group["params"]) for group in groups]
        if max(sizes) > 1:
            return sizes.index(max(sizes))
        rates = [group["lr"] for group in groups]
        return rates.index(Counter(rates).most_common(1)[0][0])

    def after_step(self) -> None:
        rate = self._optimizer.param_groups[self._logged_group]["lr"]
        self.trainer.storage.put_scalar("lr", rate, smoothing_hint=False)
        self.scheduler.step()

    @property
    def scheduler(self) -> TorchLRScheduler | ParamScheduler:
        return self._scheduler if self._scheduler is not None else self.trainer.scheduler

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict() if isinstance(self.scheduler, TorchLRScheduler) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if isinstance(self.scheduler, TorchLRScheduler):
            logger.info("Loading the state of the learning rate schedule ...")
            self.scheduler.load_state_dict(state_dict)


class EvalHook(HookBase):
    """Runs an evaluation every so many iterations and after the training; all processes must register it.

    Args:
        eval_period: 0 means after the training only.
        eval_function: returns None or a possibly nested dict of numbers, which go into the storage as ``task/metric``.
        eval_after_train: evaluate after the last iteration too; not done after a failed training.
    """

    def __init__(
        self, eval_period: int, eval_function: Callable[[], dict[str, Any] | None], eval_after_train: bool = True
    ) -> None:
        self._period = eval_period
        self._function = eval_function
        self._eval_after_train = eval_after_train

    def _evaluate(self) -> None:
        results = self._function()
        if results:
            if not isinstance(results, dict):
                raise TypeError(f"an evaluation function must return a dict, got {type(results).__name__}")
            numbers = {}
            for name, value in flatten_results_dict(results).items():
                try:
                    numbers[name] = float(value)
                except (TypeError, ValueError) as error:
                    raise ValueError(f"evaluation results must be numbers, {name} is {value!r}") from error
            self.trainer.storage.put_scalars(**numbers, smoothing_hint=False)
        # The processes take different times; none should run into a timeout in the next step.
        comm.synchronize()

    def after_step(self) -> None:
        # The last iteration is evaluated in after_train.
        if _is_due(self.trainer, self._period) and not _is_last(self.trainer):
            self._evaluate()

    def after_train(self) -> None:
        if self._eval_after_train and self.trainer.iter >= self.trainer.max_iter:
            self._evaluate()


class PreciseBN(HookBase):
    """Recomputes the statistics of batch norm layers, true averages over ``num_iter`` batches instead of running ones.

    Args:
        period: every so many iterations, and after the last one.
        model: layers in eval mode are left alone; without any to update the hook does nothing.
    """

    def __init__(self, period: int, model: nn.Module, data_loader: Iterable, num_iter: int) -> None:
        self._model = model
        self._data_loader = data_loader
        self._num_iter = num_iter
        self._period = period
        self._disabled = not get_bn_modules(model)
        self._data_iterator: Iterator | None = None
        if self._disabled:
            logger.info("PreciseBN: the model has no batch norm layer in training mode, nothing to do")

    def after_step(self) -> None:
        if _is_due(self.trainer, self._period) or _is_last(self.trainer):
            self.update_stats()

    def update_stats(self) -> None:
        """Recompute now; can also be called from outside of a training."""
        if self._disabled:
            return
        if self._data_iterator is None:
            self._data_iterator = iter(self._data_loader)
        logger.info("PreciseBN: %d batches for new statistics ...", self._num_iter)
        # What the model logs in these passes is no part of the training.
        with EventStorage():
            update_bn_stats(self._model, self._data_iterator, self._num_iter)


class TorchProfiler(HookBase):
    """Profiles the iterations that a predicate selects, with ``torch.profiler``.

    Args:
        enable_predicate: takes the trainer; True means this iteration is profiled.
        output_dir: traces go to ``profiler-trace-iter<i>.json`` there, or to ``log/`` for TensorBoard.
        activities: see ``torch.profiler.profile``; None means CPU, and CUDA where there is one.
        save_tensorboard: write the trace for TensorBoard's profiler plugin instead of a single JSON file.
    """

    def __init__(
        self,
        enable_predicate: Callable[[TrainerBase], bool],
        output_dir: str,
        *,
        activities: Iterable[torch.profiler.ProfilerActivity] | None = None,
        save_tensorboard: bool = True,
    ) -> None:
        self._predicate = enable_predicate
        self._output_dir = output_dir
        self._activities = activities
        self._save_tensorboard = save_tensorboard
        self._profiler: Any = None

    def _new_profiler(self) -> Any:
        on_trace_ready = None
        if self._save_tensorboard:
            directory = os.path.join(self._output_dir, "log")
            on_trace_ready = torch.profiler.tensorboard_trace_handler(directory, f"worker{comm.get_rank()}")
        return torch.profiler.profile(
            activities=self._activities,
            on_trace_ready=on_trace_ready,
            record_shapes=True,
            profile_memory=True,
            with_stack=True,
        )

    def before_step(self) -> None:
        if self._predicate(self.trainer):
            self._profiler = self._new_profiler()
            self._profiler.__enter__()

    def after_step(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.__exit__(None, None, None)
        if not self._save_tensorboard:
            self._export_trace(profiler)
        logger.info("Profile of iteration %d:\n%s", self.trainer.iter, self._table(profiler))

    def _export_trace(self, profiler: Any) -> None:
        PathManager.mkdirs(self._output_dir)
        target = os.path.join(self._output_dir, f"profiler-trace-iter{self.trainer.iter}.json")
        # The exporter writes to local files only.
        with tempfile.TemporaryDirectory(prefix="detectron2_profiler") as directory:
            local = os.path.join(directory, "trace.json")
            profiler.export_chrome_trace(local)
            with open(local) as source, PathManager.open(target, "w") as sink:
                sink.write(source.read())

    def _table(self, profiler: Any) -> str:
        return profiler.key_averages().table(sort_by="cpu_time_total", row_limit=100, max_src_column_width=150)


class AutogradProfiler(TorchProfiler):
    """Profiles the selected iterations with ``torch.autograd.profiler`` and writes Chrome traces.

    Args:
        use_cuda: measure CUDA kernels too, where there is a GPU.
    """

    def __init__(
        self, enable_predicate: Callable[[TrainerBase], bool], output_dir: str, *, use_cuda: bool = True
    ) -> None:
        super().__init__(enable_predicate, output_dir, save_tensorboard=False)
        self._use_cuda = use_cuda

    def _new_profiler(self) -> Any:
        device = "cuda" if self._use_cuda and torch.cuda.is_available() else None
        return torch.autograd.profiler.profile(use_device=device)


class TorchMemoryStats(HookBase):
    """Logs the CUDA memory in use every ``period`` iterations, at most ``max_runs`` times; nothing without CUDA."""

    def __init__(self, period: int = 20, max_runs: int = 10) -> None:
        self._period = period
        self._runs_left = max_runs

    def after_step(self) -> None:
        if self._runs_left <= 0 or not torch.cuda.is_available():
            return
        if not (_is_due(self.trainer, self._period) or _is_last(self.trainer)):
            return
        self._runs_left -= 1
        mib = 1024.0 * 1024.0
        logger.info(
            "Iteration %d: memory reserved %.0f MB (peak %.0f), allocated %.0f MB (peak %.0f)",
            self.trainer.iter,
            torch.cuda.memory_reserved() / mib,
            torch.cuda.max_memory_reserved() / mib,
            torch.cuda.memory_allocated() / mib,
            torch.cuda.max_memory_allocated() / mib,
        )
