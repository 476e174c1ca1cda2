"""The training loop, its hooks, and the plain and the mixed-precision training step."""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage

__all__ = ["HookBase", "TrainerBase", "SimpleTrainer", "AMPTrainer"]

logger = logging.getLogger(__name__)


class HookBase:
    """What a trainer calls at fixed points of the training.

    ``self.trainer`` is set when the hook is registered. Order of the calls: ``before_train``, then for each iteration
    ``before_step``, ``after_backward`` (gradients are there, the optimizer has not stepped), ``after_step``, and in the
    end ``after_train``, also when the training failed; ``trainer.iter == trainer.max_iter`` only if it did not.
    """

    trainer: TrainerBase

    def before_train(self) -> None:
        """Called once before the first iteration."""

    def after_train(self) -> None:
        """Called once after the last iteration, or after an exception."""

    def before_step(self) -> None:
        """Called before each iteration."""

    def after_backward(self) -> None:
        """Called after the backward pass of each iteration."""

    def after_step(self) -> None:
        """Called after each iteration."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep of this hook; a hook with a state also has ``load_state_dict``."""
        return {}


class TrainerBase:
    """A loop of ``max_iter`` iterations with hooks; what happens in an iteration is left to :meth:`run_step`.

    Attributes:
        iter: the current iteration (0-based); ``max_iter`` after the last one.
        start_iter: first iteration of this run.
        max_iter: number of iterations of the training, those of earlier runs included.
        storage: the EventStorage that is open during the training.
    """

    def __init__(self) -> None:
        self._hooks: list[HookBase] = []
        self.iter: int = 0
        self.start_iter: int = 0
        self.max_iter: int
        self.storage: EventStorage

    def register_hooks(self, hooks: Iterable[HookBase | None]) -> None:
        """Append hooks, which run in the order of registration; None is left out."""
        for hook in hooks:
            if hook is None:
                continue
            if not isinstance(hook, HookBase):
                raise TypeError(f"a hook must be a HookBase, got {type(hook).__name__}")
            # A plain reference would be a cycle and keep the trainer, and with it the GPU memory, alive.
            hook.trainer = weakref.proxy(self)
            self._hooks.append(hook)

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run the iterations ``start_iter`` ... ``max_iter - 1``."""
        logger.info("Starting training from iteration %d", start_iter)
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                for iteration in range(start_iter, max_iter):
                    self.iter = iteration
                    self.before_step()
                    self.run_step()
                    self.after_step()
                # Lets after_train tell a finished training from one that failed.
                self.iter = max(start_iter, max_iter)
                self.flush_metrics()
            except Exception:
                logger.exception("Exception during training, at iteration %d:", self.iter)
                raise
            finally:
                self.after_train()

    def before_train(self) -> None:
        for hook in self._hooks:
            hook.before_train()

    def after_train(self) -> None:
        self.storage.iter = self.iter
        for hook in self._hooks:
            hook.after_train()

    def before_step(self) -> None:
        # The storage follows the trainer here and not after the step, so that a metric of this step carries its number.
        self.storage.iter = self.iter
        for hook in self._hooks:
            hook.before_step()

    def after_backward(self) -> None:
        for hook in self._hooks:
            hook.after_backward()

    def after_step(self) -> None:
        for hook in self._hooks:
            hook.after_step()

    def run_step(self) -> None:
        """One iteration; subclasses define it."""
        raise NotImplementedError(f"{type(self).__name__} must define run_step")

    def flush_metrics(self) -> None:
        """Put metrics that are still on their way into the storage."""

    def _named_hooks(self) -> Iterator[tuple[str, HookBase]]:
        """Hooks under the names of their classes; the second of a class is ``Name#2``."""
        seen: Counter[str] = Counter()
        for hook in self._hooks:
            name = type(hook).__qualname__
            seen[name] += 1
            yield (name if seen[name] == 1 else f"{name}#{seen[name]}"), hook

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"iteration": self.iter}
        hooks = {name: hook_state for name, hook in self._named_hooks() if (hook_state := hook.state_dict())}
        if hooks:
            state["hooks"] = hooks
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.iter = state_dict["iteration"]
        hooks = dict(self._named_hooks())
        for name, hook_state in state_dict.get("hooks", {}).items():
            if name in hooks:
                hooks[name].load_state_dict(hook_state)
            else:
                logger.warning("The checkpoint holds a state of hook %s, which this trainer lacks; ignored", name)


class _StepMetrics:
    """The losses of one step, on their way from the device to the storage: one stacked copy for all of them."""

    def __init__(self, losses: Mapping[str, torch.Tensor], data_time: float, iteration: int, prefix: str) -> None:
        self.names = list(losses)
        self.data_time = data_time
        self.iteration = iteration
        self.prefix = prefix
        self._copied: torch.cuda.Event | None = None
        with torch.no_grad():
            # One that a model has made on the CPU, a constant for one, goes where the others are.
            device = next((loss.device for loss in losses.values() if loss.device.type != "cpu"), None)
            stacked = torch.stack([loss.detach().to(device, torch.float32).reshape(()) for loss in losses.values()])
        if stacked.is_cuda:
            self._values = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            self._values.copy_(stacked, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._values = stacked

    def write(self) -> None:
        """Average over the processes and put into the open storage.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        if self._copied is not None:
            self._copied.synchronize()
        own = dict(zip(self.names, self._values.tolist()))
        storage = get_event_storage()
        storage.put_scalar("rank_data_time", self.data_time, cur_iter=self.iteration)
        # All processes take part in the collective before anyone complains, so that nobody is left waiting.
        gathered = comm.gather({**own, "data_time": self.data_time})
        if not comm.is_main_process():
            self._check_finite(own)
            return
        data_time = float(np.max([metrics.pop("data_time") for metrics in gathered]))
        losses = {name: float(np.mean([metrics[name] for metrics in gathered])) for name in self.names}
        self._check_finite(losses)
        storage.put_scalar("data_time", data_time, cur_iter=self.iteration)
        storage.put_scalar(f"{self.prefix}total_loss", sum(losses.values()), cur_iter=self.iteration)
        if len(losses) > 1:
            storage.put_scalars(cur_iter=self.iteration, **losses)

    def _check_finite(self, losses: Mapping[str, float]) -> None:
        bad = {name: value for name, value in losses.items() if not math.isfinite(value)}
        if not bad:
            return
        good = {name: value for name, value in losses.items() if name not in bad}
        raise FloatingPointError(
            f"not finite at iteration {self.iteration}: {_listed(bad)}"
            + (f"; the other losses: {_listed(good)}" if good else "")
            + ". A lower SOLVER.BASE_LR, a longer warm-up or full precision may help; at the start, check the data."
        )


def _listed(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name} = {value:.6g}" for name, value in losses.items())


class SimpleTrainer(TrainerBase):
    """One model, one data loader, one optimizer: forward, backward, step.

    Args:
        model: takes what the data loader gives; in training mode it returns a loss or a dict of losses (scalars).
        data_loader: an iterable that does not end before the training.
        gather_metric_period: every so many iterations the losses are averaged over the processes, checked and stored.
        zero_grad_before_forward: clear gradients before the forward pass instead of after it.
        async_write_metrics: put the losses of a step into the storage one step later, so that the host does not wait
            for the device; writers and the end of the training still see all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: Optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
        async_write_metrics: bool = False,
    ) -> None:
        super().__init__()
        # The trainer, not the model, decides about the mode; evaluation has to restore it.
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.gather_metric_period = gather_metric_period
        self.zero_grad_before_forward = zero_grad_before_forward
        self.async_write_metrics = async_write_metrics
        self._data_iterator: Iterator | None = None
        self._pending: _StepMetrics | None = None

    def run_step(self) -> None:
        data, data_time = self._next_batch()
        if self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        losses = self._forward(data)
        if not self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        self._backward(sum(losses.values()))
        self.after_backward()
        self._write_metrics(losses, data_time)
        self._optimizer_step()

    def _next_batch(self) -> tuple[Any, float]:
        """The next batch and the seconds that it took."""
        if not self.model.training:
            raise RuntimeError(f"{type(self).__name__} needs the model in training mode, but it is in eval mode")
        start = time.perf_counter()
        try:
            data = next(self._data_loader_iter)
        except StopIteration as end:
            raise RuntimeError(
                f"the data loader ended at iteration {self.iter}; training needs an endless one (TrainingSampler)"
            ) from end
        return data, time.perf_counter() - start

    def _forward(self, data: Any) -> dict[str, torch.Tensor]:
        losses = self.model(data)
        if isinstance(losses, torch.Tensor):
            return {"total_loss": losses}
        if not losses:
            raise ValueError(f"{type(self.model).__name__} returned no losses in training mode")
        return losses

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def _optimizer_step(self) -> None:
        self.optimizer.step()

    @property
    def _data_loader_iter(self) -> Iterator:
        # Made when the first batch is needed, not before: it may start worker processes.
        if self._data_iterator is None:
            self._data_iterator = iter(self.data_loader)
        return self._data_iterator

    def reset_data_loader(self, data_loader_builder: Callable[[], Iterable]) -> None:
        """Replace the data loader; the old one and its workers go before ``data_loader_builder`` is called."""
        del self.data_loader
        self._data_iterator = None
        self.data_loader = data_loader_builder()

    def _write_metrics(
        self, loss_dict: Mapping[str, torch.Tensor], data_time: float, prefix: str = "", iter: int | None = None
    ) -> None:
        iteration = self.iter if iter is None else iter
        self.flush_metrics()
        if (iteration + 1) % self.gather_metric_period != 0:
            return
        metrics = _StepMetrics(loss_dict, data_time, iteration, prefix)
        if self.async_write_metrics:
            self._pending = metrics
        else:
            metrics.write()

    def flush_metrics(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.write()

    @staticmethod
    def write_metrics(loss_dict: Mapping[str, torch.Tensor], data_time: float, cur_iter: int, prefix: str = "") -> None:
        """Put losses (their mean over the processes), their sum and the data time (the maximum) into the open storage.

        Args:
            loss_dict: name -> scalar tensor; the same names in every process.
            data_time: seconds that the batch of this process took.
            prefix: put before the name ``total_loss``.

        Raises:
            FloatingPointError: a loss is not finite; names the losses and the iteration.
        """
        _StepMetrics(loss_dict, data_time, cur_iter, prefix).write()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])


class AMPTrainer(SimpleTrainer):
    """SimpleTrainer with automatic mixed precision: autocast, and loss scaling for float16.

    Args:
        grad_scaler: replaces the default ``torch.amp.GradScaler``, which scales for float16 and is off for bfloat16.
        precision: torch.float16 or torch.bfloat16; None means float16 on CUDA and bfloat16 on every other device.
        log_grad_scaler: write the loss scale as the metric ``[metric]grad_scaler``.
        The others are those of SimpleTrainer.

    Raises:
        ValueError: another precision, or float16 on a CPU (far slower there than float32).
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: Optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        precision: torch.dtype | None = None,
        log_grad_scaler: bool = False,
        async_write_metrics: bool = False,
    ) -> None:
        if isinstance(model, DataParallel) or (
            isinstance(model, DistributedDataParallel) and len(model.device_ids or ()) > 1
        ):
            raise ValueError("AMPTrainer needs one device per process: DistributedDataParallel with a single device")
        super().__init__(
            model, data_loader, optimizer, gather_metric_period, zero_grad_before_forward, async_write_metrics
        )
        self.device_type = next(model.parameters()).device.type
        if precision is None:
            precision = torch.float16 if self.device_type == "cuda" else torch.bfloat16
        if precision not in (torch.float16, torch.bfloat16):
            raise ValueError(f"mixed precision means torch.float16 or torch.bfloat16, got {precision}")
        if precision == torch.float16 and self.device_type == "cpu":
            raise ValueError("mixed precision on the CPU needs torch.bfloat16; float16 is for GPUs")
        if grad_scaler is None:
            grad_scaler = torch.amp.GradScaler(self.device_type, enabled=precision == torch.float16)
        self.precision = precision
        self.grad_scaler = grad_scaler
        self.log_grad_scaler = log_grad_scaler

    def _forward(self, data: Any) -> dict[str, torch.Tensor]:
        with torch.autocast(self.device_type, dtype=self.precision):
            return super()._forward(data)

    def _backward(self, loss: torch.Tensor) -> None:
        self.grad_scaler.scale(loss).backward()

    def _optimizer_step(self) -> None:
        if self.log_grad_scaler:
            get_event_storage().put_scalar("[metric]grad_scaler", self.grad_scaler.get_scale())
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        scaler_state = state_dict.get("grad_scaler")
        if scaler_state:
            self.grad_scaler.load_state_dict(scaler_state)
        elif self.grad_scaler.is_enabled():
            logger.info("The checkpoint holds no loss scale (another precision); scaling starts afresh")
