"""Time and peak memory of a piece of work on a CPU or a CUDA GPU."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"  # what clear_refs takes to set VmHWM back to the present size


class Meter:
    """Clock and memory meter of one process.

    On a CPU the memory is what the process has in RAM (Linux only; elsewhere it is not known), on a GPU what PyTorch
    has allocated there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], Any], repeats: int = 1) -> float:
        """Seconds of one run, averaged over several without a pause."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        self.synchronize()
        return (time.perf_counter() - start) / repeats

    def level(self) -> int | None:
        """Bytes in use now, after everything that can be given back has been."""
        release_memory()
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _status("VmRSS")

    def reset_peak(self) -> None:
        """Start looking for the peak; what was freed and kept before must not count."""
        release_memory()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _STATUS.exists():
            Path("/proc/self/clear_refs").write_text(_RESET_PEAK)

    def peak(self) -> int | None:
        """Most bytes in use since :meth:`reset_peak`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _status("VmHWM")


def _linear_operations(x: torch.Tensor, weight: torch.Tensor, *_: Any, out_val: torch.Tensor, **__: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


def _conv_operations(x: torch.Tensor, weight: torch.Tensor, *_: Any, out_val: torch.Tensor, **__: Any) -> int:
    return conv_flop_count(x.shape, weight.shape, out_val.shape)


# fused steps of oneDNN, for which PyTorch has no formulas
_FUSED_STEPS = {
    "mkldnn::_linear_pointwise": _linear_operations,
    "mkldnn::_convolution_pointwise": _conv_operations,
}


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of products and convolutions, mostly by PyTorch's own formulas.

    ``FlopCounterMode`` counts by module, too, and fails where modules are called inside of an autograd function.

    Attributes:
        total: operations so far, a multiply-add is two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket) or _FUSED_STEPS.get(func._schema.name)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def _status(field: str) -> int | None:
    if not _STATUS.exists():
        return None
    return int(re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE).group(1)) * 1024


def release_memory() -> None:
    """Give back what is not used, so that the next case starts from a low level."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def limit_memory(share: float = 0.85) -> None:
    """Let allocations fail that need more than a share of the memory that is free now (Linux; kept elsewhere).

    The failure is an exception in this process; without the limit the system would end some process.
    """
    available = available_memory()
    if available is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + int(share * available), resource.RLIM_INFINITY))


def available_memory() -> int | None:
    """Bytes of RAM that can be had, None where that is not known."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    return int(re.search(r"^MemAvailable:\s+(\d+) kB", path.read_text(), re.MULTILINE).group(1)) * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory was missing."""
    texts = ("not enough memory", "can't allocate memory")  # of PyTorch's allocators for Windows and others
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or any(text in str(error) for text in texts)


def total_memory() -> int:
    """Bytes of RAM of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
