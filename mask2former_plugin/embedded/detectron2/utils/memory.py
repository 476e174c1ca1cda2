"""What to do when the GPU's memory does not suffice."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["retry_if_cuda_oom"]

logger = logging.getLogger(__name__)


def _to_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


def retry_if_cuda_oom(func: Callable) -> Callable:
    """Let a function survive CUDA's out-of-memory error: retry with an emptied cache, then with its inputs on the CPU.

    Only tensors that are arguments themselves move to the CPU, not those inside other objects; the result of the last
    retry is on the CPU then.
    """

    @functools.wraps(func)
    def wrapped(*args, **kwargs):
        name = getattr(func, "__qualname__", repr(func))
        try:
            return func(*args, **kwargs)
        except torch.cuda.OutOfMemoryError:
            logger.debug("Out of GPU memory in %s; trying again with an emptied cache", name)
        torch.cuda.empty_cache()  # here the failed call's tensors are free, inside the handler they are not
        try:
            return func(*args, **kwargs)
        except torch.cuda.OutOfMemoryError:
            logger.warning("Out of GPU memory in %s; trying on the CPU", name)
        return func(*map(_to_cpu, args), **{name: _to_cpu(value) for name, value in kwargs.items()})

    return wrapped
