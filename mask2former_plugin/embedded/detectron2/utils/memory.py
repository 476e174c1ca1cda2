"""What to do when the GPU's memory does not suffice."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["retry_if_cuda_oom"]


def _to_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


def retry_if_cuda_oom(func: Callable) -> Callable:
    """Let a function survive CUDA's out-of-memory error: retry with an emptied cache, then with its inputs on the CPU.

    Only tensors that are arguments themselves move to the CPU, not those inside other objects; the result of the last retry is
    on the CPU then.
    """

    @functools.wraps(func)
    def wrapped(*args, **kwargs):
        try:
            return func(*args, **kwargs)
        except torch.cuda.OutOfMemoryError:
            logger = logging.getLogger(__name__)
        # outside the handler the failed call's tensors are free
        torch.cuda.empty_cache()
        try:
            return func(*args, **kwargs)
        except torch.cuda.OutOfMemoryError:
            logger.warning("Out of GPU memory in %s; trying on the CPU", getattr(func, "__qualname__", func))
        return func(*map(_to_cpu, args), **{name: _to_cpu(value) for name, value in kwargs.items()})

    return wrapped
