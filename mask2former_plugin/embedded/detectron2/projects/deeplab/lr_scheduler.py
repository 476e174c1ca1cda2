"""Polynomial decay of the learning rate with warm-up."""

from __future__ import annotations

from torch.optim import Optimizer

from detectron2.solver.lr_scheduler import PositionOnlyLRScheduler, warmup_multiplier


class WarmupPolyLR(PositionOnlyLRScheduler):
    """base_lr * warm-up * (1 - iteration / max_iters) ^ power, as in DeepLab (arXiv:1606.00915, section 4.1.1).

    From ``max_iters`` on the decay stays at its last value. The state holds the position only, so a run can be resumed
    with another ``max_iters``.

    Args:
        constant_ending: floor of the decay after the warm-up, as a share of the base learning rate.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_iters: int,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: str = "linear",
        last_epoch: int = -1,
        power: float = 0.9,
        constant_ending: float = 0.0,
    ) -> None:
        self.max_iters = max_iters
        self.warmup_factor = warmup_factor
        self.warmup_iters = warmup_iters
        self.warmup_method = warmup_method
        self.power = power
        self.constant_ending = constant_ending
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        iteration = self.last_epoch
        warmup = warmup_multiplier(self.warmup_method, iteration, self.warmup_iters, self.warmup_factor)
        decay = (1.0 - min(iteration / self.max_iters, 1.0)) ** self.power
        if iteration >= self.warmup_iters:
            decay = max(decay, self.constant_ending)
        return [base * warmup * decay for base in self.base_lrs]
