"""What the machine reaches: operations per second in plain matrix products, bytes per second in a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from mask2former_plugin.benchmark.measure import Meter

_TIMINGS = 5
_SIZE = {"cpu": 2048, "cuda": 8192}  # side of the matrices
_QUICK_SIZE = 256
_MOST_COPIED = 2**30  # bytes


def measure(meter: Meter, quick: bool) -> dict[str, float]:
    """The best of a few timings each; ``quick`` takes small sizes, which tell nothing.

    Returns:
        ``matmul_float32``, ``conv_float32`` (a 3x3 convolution, channels last: the same arithmetic through another
        library), the same in bfloat16, operations per second with a multiply-add as two; ``copy``: bytes read and
        written per second.
    """
    side = _QUICK_SIZE if quick else _SIZE[meter.device.type]
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        matrix = torch.randn(side, side, device=meter.device, dtype=dtype)
        found[f"matmul_{name}"] = 2 * side**3 / _best(meter, lambda: matrix @ matrix)
        size, channels = side // 32, 256
        image = torch.randn(1, channels, size, size, device=meter.device, dtype=dtype)
        weight = torch.randn(channels, channels, 3, 3, device=meter.device, dtype=dtype)
        image, weight = (x.to(memory_format=torch.channels_last) for x in (image, weight))
        operations = 2 * (size * channels) ** 2 * 9
        found[f"conv_{name}"] = operations / _best(meter, lambda: F.conv2d(image, weight, padding=1))
    source = torch.zeros(min(side**2 * 64, _MOST_COPIED), dtype=torch.uint8, device=meter.device)
    goal = torch.zeros_like(source)
    found["copy"] = 2 * source.nbytes / _best(meter, lambda: goal.copy_(source))
    return found


def _best(meter: Meter, run: Callable[[], Any]) -> float:
    with torch.inference_mode():
        run()
        return min(meter.seconds(run, repeats=3) for _ in range(_TIMINGS))


def operation_rate(rates: dict[str, float], precision: str) -> float:
    """The faster of the two ways to multiply in a precision."""
    return max(rates[f"matmul_{precision}"], rates[f"conv_{precision}"])
