"""What a builder gives to the worker, and what it raises where a side has no such work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class NotOffered(Exception):
    """A side has nothing to set against a case; the text says why."""


@dataclass(frozen=True)
class Side:
    """Who is measured, and how.

    Attributes:
        name: as on the command line.
        implementation: ours, reference, transformers or original.
        precision: float32 or bfloat16.
        compiled: by ``torch.compile``.
        checkpointed: training recomputes activations, by all keys ``USE_CHECKPOINT``.
    """

    name: str
    implementation: str
    precision: str = "float32"
    compiled: bool = False
    checkpointed: bool = False


SIDES = {
    side.name: side
    for side in (
        Side("ours", "ours"),
        Side("ours-bf16", "ours", "bfloat16"),
        Side("ours-checkpoint", "ours", checkpointed=True),
        Side("ours-compiled", "ours", "float32", True),
        Side("ours-bf16-compiled", "ours", "bfloat16", True),
        Side("reference", "reference"),
        Side("transformers", "transformers"),
        Side("transformers-bf16", "transformers", "bfloat16"),
        Side("original", "original"),
    )
}


@dataclass(frozen=True)
class Context:
    """Where a worker works.

    Attributes:
        side: what it is.
        device: where tensors are.
        configs: folder of our configs.
        scratch: folder for weights and generated data, shared by all sides.
        original: checkout of the original project, for its side.
    """

    side: Side
    device: torch.device
    configs: Path
    scratch: Path
    original: Path | None = None

    def autocast(self) -> torch.autocast:
        """The side's precision."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.side.precision == "bfloat16")

    def weights(self, options: Mapping[str, Any]) -> Path:
        """Folder of the weights of a model."""
        words = (options["family"], Path(options["config"]).stem, options["config"].split("/")[0], options["queries"])
        return self.scratch / "-".join(map(str, (*words, "narrow" if options["narrow"] else "full")))


@dataclass
class Workload:
    """One piece of work, ready to run.

    Attributes:
        run: what is timed.
        outputs: does all that ``run`` does, with fixed random numbers, and gives arrays by name that are compared
            between the sides.
        inputs: everything that a run has to read; a bound of its time.
        facts: numbers that describe the load, such as the number of segments.
        counted: does the same through operators whose operations PyTorch can count, where ``run`` doesn't.
    """

    run: Callable[[], Any]
    outputs: Callable[[], dict[str, np.ndarray]]
    inputs: Any = ()
    facts: dict[str, Any] = field(default_factory=dict)
    counted: Callable[[], Any] | None = None


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers and result objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, torch.nn.Module):
        yield from value.parameters()
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors(one)
    elif hasattr(value, "get_fields"):  # Instances
        yield from tensors(value.get_fields())
    elif hasattr(value, "tensor"):  # Boxes, BitMasks
        yield value.tensor


def number_of_bytes(value: Any) -> int:
    """Bytes of all tensors in a value, each counted once."""
    return sum({one.data_ptr(): one.nbytes for one in tensors(value)}.values())
