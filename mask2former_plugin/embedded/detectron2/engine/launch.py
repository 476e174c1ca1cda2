"""Start of a training function in one or several processes."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detectron2.utils import comm

__all__ = ["DEFAULT_TIMEOUT", "launch"]

DEFAULT_TIMEOUT = timedelta(minutes=30)
_LAST_COLLECTIVES = 0.5  # seconds for threads of Gloo to let go of what they have done
logger = logging.getLogger(__name__)


def launch(
    main_func: Callable[..., Any],
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: tuple = (),
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> None:
    """Call ``main_func(*args)`` in every process of the job.

    With one process in all it is called right here. Otherwise each machine starts ``num_gpus_per_machine`` processes
    that form a process group: NCCL with one GPU per process, or Gloo on the CPU of a machine without CUDA.

    Args:
        num_gpus_per_machine: number of processes of each machine.
        dist_url: address of the first process, e.g. ``tcp://10.0.0.1:29500``; "auto" picks a free port and works for
            one machine only.
        timeout: how long a collective operation may wait for the other processes.

    Raises:
        ValueError: more GPUs than the machine has, "auto" or no address for several machines, or a rank out of range.
    """
    world_size = num_machines * num_gpus_per_machine
    if world_size <= 1:
        main_func(*args)
        return
    if not 0 <= machine_rank < num_machines:
        raise ValueError(f"--machine-rank must lie between 0 and {num_machines - 1}, got {machine_rank}")
    if torch.cuda.is_available():
        if num_gpus_per_machine > torch.cuda.device_count():
            raise ValueError(
                f"{num_gpus_per_machine} GPUs were asked for (--num-gpus), this machine has {torch.cuda.device_count()}"
            )
    else:
        logger.warning("No CUDA device: the %d processes of this machine run on its CPU (Gloo)", num_gpus_per_machine)
    if dist_url is None or dist_url == "auto":
        if num_machines > 1:
            raise ValueError("with several machines --dist-url must name the first one, e.g. tcp://10.0.0.1:29500")
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    mp.spawn(
        _run_worker,
        nprocs=num_gpus_per_machine,
        args=(main_func, world_size, num_gpus_per_machine, machine_rank, dist_url, args, timeout),
        daemon=False,
    )


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _run_worker(
    local_rank: int,
    main_func: Callable[..., Any],
    world_size: int,
    num_gpus_per_machine: int,
    machine_rank: int,
    dist_url: str,
    args: tuple,
    timeout: timedelta,
) -> None:
    rank = machine_rank * num_gpus_per_machine + local_rank
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Every process would otherwise start as many threads as there are cores.
        torch.set_num_threads(max(1, torch.get_num_threads() // num_gpus_per_machine))
    try:
        dist.init_process_group(
            backend="nccl" if on_gpu else "gloo",
            init_method=dist_url,
            world_size=world_size,
            rank=rank,
            timeout=timeout,
        )
    except Exception as error:
        raise RuntimeError(
            f"process {rank} of {world_size} cannot join the others at {dist_url} "
            f"(if another run uses the port, choose another one by --dist-url, or 'auto'): {error}"
        ) from error
    comm.create_local_process_group(num_gpus_per_machine)
    # No process may start its collectives before all have joined.
    comm.synchronize()
    main_func(*args)
    # They need the interpreter's lock for it, which PyTorch 2.4 keeps while it destroys a group and waits for them.
    time.sleep(_LAST_COLLECTIVES)
    # Not after an exception: the others may then wait in a collective, and destroying the group would wait for them.
    dist.destroy_process_group()
