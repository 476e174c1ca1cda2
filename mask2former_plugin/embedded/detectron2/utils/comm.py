"""Talking between training processes; every function also works in a single process."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

_LOCAL_PROCESS_GROUP: dist.ProcessGroup | None = None
_gloo_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Number of processes on all machines."""
    return dist.get_world_size() if _is_distributed() else 1


def get_rank() -> int:
    """Number of this process among all."""
    return dist.get_rank() if _is_distributed() else 0


def is_main_process() -> bool:
    """True for the one process that writes files and logs."""
    return get_rank() == 0


def create_local_process_group(num_workers_per_machine: int) -> None:
    """Create the groups of the processes of each machine; ``launch`` calls this once in every process.

    Args:
        num_workers_per_machine: the same on all machines; must divide the world size.
    """
    global _LOCAL_PROCESS_GROUP
    assert _LOCAL_PROCESS_GROUP is None, "the local process group exists already"
    world_size = get_world_size()
    assert world_size % num_workers_per_machine == 0, (
        f"{world_size} processes cannot be split into machines of {num_workers_per_machine}"
    )
    own_machine = get_rank() // num_workers_per_machine
    for machine in range(world_size // num_workers_per_machine):  # every process takes part in creating every group
        first = machine * num_workers_per_machine
        group = dist.new_group(list(range(first, first + num_workers_per_machine)))
        if machine == own_machine:
            _LOCAL_PROCESS_GROUP = group


def get_local_process_group() -> dist.ProcessGroup:
    """Group of the processes on this machine.

    Raises:
        AssertionError: the processes were not started by ``launch``.
    """
    assert _LOCAL_PROCESS_GROUP is not None, (
        "no local process group: start the processes with detectron2.engine.launch(), "
        "or call detectron2.utils.comm.create_local_process_group()"
    )
    return _LOCAL_PROCESS_GROUP


def get_local_rank() -> int:
    """Number of this process on its machine."""
    return dist.get_rank(group=get_local_process_group()) if _is_distributed() else 0


def get_local_size() -> int:
    """Number of processes on this machine."""
    return dist.get_world_size(group=get_local_process_group()) if _is_distributed() else 1


def synchronize() -> None:
    """Wait for all processes."""
    if get_world_size() == 1:
        return
    if dist.get_backend() == dist.Backend.NCCL:  # without a device NCCL guesses one
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


def _get_global_gloo_group() -> dist.ProcessGroup:
    """A group of all processes whose collectives run on the CPU."""
    world = dist.group.WORLD
    if dist.get_backend() != dist.Backend.NCCL:
        return world
    if world not in _gloo_groups:
        _gloo_groups.clear()  # groups of a world that was destroyed
        _gloo_groups[world] = dist.new_group(backend="gloo")
    return _gloo_groups[world]


def all_gather(data: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Collect one picklable object of every process.

    Args:
        data: any picklable object.
        group: default all processes, over gloo.

    Returns:
        The objects in the order of ranks, in every process.
    """
    if get_world_size() == 1:
        return [data]
    group = _get_global_gloo_group() if group is None else group
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, data, group=group)
    return gathered


def gather(data: Any, dst: int = 0, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Collect one picklable object of every process in process ``dst``.

    Returns:
        The objects in the order of ranks in process ``dst``, an empty list elsewhere.
    """
    if get_world_size() == 1:
        return [data]
    group = _get_global_gloo_group() if group is None else group
    if get_rank() != dst:
        dist.gather_object(data, None, dst=dst, group=group)
        return []
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.gather_object(data, gathered, dst=dst, group=group)
    return gathered


def shared_random_seed() -> int:
    """A random number that is the same in all processes; drawn from numpy's global generator of process 0."""
    return all_gather(int(np.random.randint(2**31)))[0]


@torch.no_grad()
def reduce_dict(input_dict: dict[str, torch.Tensor], average: bool = True) -> dict[str, torch.Tensor]:
    """Sum or average scalar tensors over the processes.

    Args:
        input_dict: scalars on the same device, the same names in all processes.
        average: divide by the number of processes.

    Returns:
        The reduced scalars in process 0; elsewhere the values are undefined.
    """
    world_size = get_world_size()
    if world_size == 1:
        return input_dict
    names = sorted(input_dict)
    values = torch.stack([input_dict[name] for name in names])
    dist.reduce(values, dst=0)
    if average and get_rank() == 0:
        values /= world_size
    return dict(zip(names, values))
