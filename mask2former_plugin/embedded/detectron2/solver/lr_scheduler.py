"""Learning rate schedules with warm-up, stepped once per iteration."""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

logger = logging.getLogger(__name__)

WARMUP_METHODS = ("linear", "constant")


def warmup_multiplier(method: str, iteration: int, warmup_iters: int, warmup_factor: float) -> float:
    """Factor on the learning rate at ``iteration``: 1 from ``warmup_iters`` on, before that constant or a linear rise.

    Raises:
        ValueError: ``method`` is neither "linear" nor "constant".
    """
    _check_warmup_method(method)
    if iteration >= warmup_iters:
        return 1.0
    if method == "constant":
        return warmup_factor
    progress = iteration / warmup_iters
    return warmup_factor + (1.0 - warmup_factor) * progress


def _check_warmup_method(method: str) -> None:
    if method not in WARMUP_METHODS:
        raise ValueError(f"unknown warm-up method {method!r}; known: {', '.join(WARMUP_METHODS)}")


class PositionOnlyLRScheduler(LRScheduler):
    """Base of schedules whose state is the base learning rates and the position (``base_lrs``, ``last_epoch``).

    So a run resumed with another length or another shape of schedule follows the new config, with the learning rates of
    the stored run (the optimizer's state holds them, too). States written by schedules that store more are read too;
    the rest of such a state is ignored.
    """

    def state_dict(self) -> dict[str, Any]:
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state; other base learning rates than the present ones are logged as a warning.

        Raises:
            ValueError: the state is that of another number of parameter groups.
        """
        base_lrs, last_epoch = state_dict["base_lrs"], state_dict["last_epoch"]
        if len(base_lrs) != len(self.optimizer.param_groups):
            raise ValueError(
                f"the stored schedule has {len(base_lrs)} parameter groups, the optimizer has "
                f"{len(self.optimizer.param_groups)}; resume with the optimizer settings of the stored run"
            )
        for stored, present in zip(base_lrs, self.base_lrs):
            if not math.isclose(stored, present):
                logger.warning(
                    "The resumed run keeps its base learning rate %g; %g of the config (SOLVER.BASE_LR) has no effect",
                    stored,
                    present,
                )
                break
        self.base_lrs, self.last_epoch = list(base_lrs), last_epoch


class LRMultiplier(PositionOnlyLRScheduler):
    """Multiplies each group's initial learning rate with the value of a fvcore ``ParamScheduler``.

    The parameter scheduler is evaluated at iteration / ``max_iter``; past the end it stays at 1.

    Args:
        multiplier: function of the progress in [0, 1].
        max_iter: number of iterations of the whole training.
        last_iter: last finished iteration (0-based), -1 at the start.
    """

    def __init__(self, optimizer: Optimizer, multiplier: ParamScheduler, max_iter: int, last_iter: int = -1) -> None:
        if not isinstance(multiplier, ParamScheduler):
            raise ValueError(f"the multiplier must be a fvcore ParamScheduler, got {type(multiplier).__name__}")
        self._multiplier = multiplier
        self._max_iter = max_iter
        super().__init__(optimizer, last_epoch=last_iter)

    def get_lr(self) -> list[float]:
        factor = self._multiplier(min(self.last_epoch / self._max_iter, 1.0))
        return [base * factor for base in self.base_lrs]


class WarmupParamScheduler(CompositeParamScheduler):
    """Puts a warm-up before another parameter scheduler.

    Args:
        scheduler: what follows the warm-up.
        warmup_factor: initial value, as a share of the scheduler's own initial value.
        warmup_length: share of the training, in [0, 1], that the warm-up takes.
        warmup_method: "linear" or "constant".
        rescale_interval: False cuts off the beginning of ``scheduler``, True squeezes all of it into the rest.
    """

    def __init__(
        self,
        scheduler: ParamScheduler,
        warmup_factor: float,
        warmup_length: float,
        warmup_method: str = "linear",
        rescale_interval: bool = False,
    ) -> None:
        _check_warmup_method(warmup_method)
        start = warmup_factor * scheduler(0.0)
        end = scheduler(0.0 if rescale_interval else warmup_length)
        warmup = ConstantParamScheduler(start) if warmup_method == "constant" else LinearParamScheduler(start, end)
        super().__init__(
            [warmup, scheduler],
            interval_scaling=["rescaled", "rescaled" if rescale_interval else "fixed"],
            lengths=[warmup_length, 1.0 - warmup_length],
        )


class WarmupMultiStepLR(PositionOnlyLRScheduler):
    """base_lr * warm-up * gamma ^ (number of milestones reached). Older interface; configs use :class:`LRMultiplier`.

    Args:
        milestones: iterations of the drops, increasing.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[int],
        gamma: float = 0.1,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: str = "linear",
        last_epoch: int = -1,
    ) -> None:
        if list(milestones) != sorted(milestones):
            raise ValueError(f"milestones must be increasing, got {list(milestones)}")
        self.milestones = milestones
        self.gamma = gamma
        self.warmup_factor = warmup_factor
        self.warmup_iters = warmup_iters
        self.warmup_method = warmup_method
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        warmup = warmup_multiplier(self.warmup_method, self.last_epoch, self.warmup_iters, self.warmup_factor)
        decay = self.gamma ** bisect_right(self.milestones, self.last_epoch)
        return [base * warmup * decay for base in self.base_lrs]


class WarmupCosineLR(PositionOnlyLRScheduler):
    """base_lr * warm-up * (1 + cos(pi * iteration / max_iters)) / 2. Older interface, see :class:`LRMultiplier`."""

    def __init__(
        self,
        optimizer: Optimizer,
        max_iters: int,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: str = "linear",
        last_epoch: int = -1,
    ) -> None:
        self.max_iters = max_iters
        self.warmup_factor = warmup_factor
        self.warmup_iters = warmup_iters
        self.warmup_method = warmup_method
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        warmup = warmup_multiplier(self.warmup_method, self.last_epoch, self.warmup_iters, self.warmup_factor)
        decay = 0.5 * (1.0 + math.cos(math.pi * min(self.last_epoch / self.max_iters, 1.0)))
        return [base * warmup * decay for base in self.base_lrs]
