"""Runs a function in several real processes that form a Gloo group, and collects what it returns."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_processes(
    function: Callable[..., Any], world_size: int, folder: Path, *args: Any, local_size: int | None = None
) -> list[Any]:
    """``function(*args)`` in ``world_size`` processes, ``local_size`` per "machine" (default: one machine); results by rank.

    ``function`` must be importable.
    """
    # a file of its own, not a port: other test runs on this machine can't get into the group
    store = folder / f"store-{uuid.uuid4().hex}"
    mp.spawn(_worker, nprocs=world_size, args=(function, world_size, local_size or world_size, str(store), str(folder), args))
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(world_size)]


def _worker(
    rank: int,
    function: Callable[..., Any],
    world_size: int,
    local_size: int,
    store: str,
    folder: str,
    args: tuple,
) -> None:
    import mask2former_plugin  # noqa: F401  (makes detectron2 importable)
    from detectron2.utils import comm

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    comm.create_local_process_group(local_size)
    result = function(*args)
    torch.save(result, Path(folder) / f"result{rank}.pt")
    dist.barrier()
    # Neither a tear-down nor an ordinary exit: with collectives in a backward pass the first may hang (torch 2.4) and the
    # second abort on a thread of Gloo that still runs (torch 2.13).
    os._exit(0)
