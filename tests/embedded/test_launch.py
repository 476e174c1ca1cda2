"""Start of one or several processes, and what is said when that is impossible."""

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import launch


def report(folder, fail_on=None):
    """Leaves a file with what this process sees; the sum is a collective over all processes."""
    from detectron2.utils import comm

    total = torch.tensor([comm.get_rank() + 1.0])
    if dist.is_initialized():
        dist.all_reduce(total)
    seen = {
        "world": comm.get_world_size(),
        "local": [comm.get_local_rank(), comm.get_local_size()],
        "sum": total.item(),
        "pid": os.getpid(),
        "backend": dist.get_backend() if dist.is_initialized() else None,
    }
    with open(os.path.join(folder, f"{comm.get_rank()}.json"), "w") as file:
        json.dump(seen, file)
    if comm.get_rank() == fail_on:
        raise KeyError(f"process {fail_on} is broken")
    if fail_on is not None:
        time.sleep(60)  # until it is ended: one that ends by itself may be aborted, while threads of Gloo still run


def read(folder, rank):
    with open(os.path.join(folder, f"{rank}.json")) as file:
        return json.load(file)


def test_one_process_is_this_process(tmp_path):
    launch(report, 1, args=(str(tmp_path),))
    assert read(tmp_path, 0) == {"world": 1, "local": [0, 1], "sum": 1.0, "pid": os.getpid(), "backend": None}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU path needs a machine without CUDA")
def test_two_processes_on_the_cpu_and_the_error_of_one_of_them(tmp_path):
    with pytest.raises(Exception, match="process 1 is broken"):
        launch(report, 2, dist_url="auto", args=(str(tmp_path), 1))
    reports = [read(tmp_path, rank) for rank in (0, 1)]
    for rank in (0, 1):
        assert reports[rank]["local"] == [rank, 2]
        assert (reports[rank]["world"], reports[rank]["sum"], reports[rank]["backend"]) == (2, 3.0, "gloo")
    assert len({os.getpid(), *(r["pid"] for r in reports)}) == 3
    assert not dist.is_initialized()


@pytest.mark.embedded_only
def test_impossible_starts_are_refused_before_any_process(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a process was started")

    monkeypatch.setattr(torch.multiprocessing, "spawn", never)
    with pytest.raises(ValueError, match="--dist-url must name the first one"):
        launch(never, 1, num_machines=2, dist_url="auto")
    with pytest.raises(ValueError, match="--machine-rank must lie between 0 and 1, got 2"):
        launch(never, 1, num_machines=2, machine_rank=2, dist_url="tcp://127.0.0.1:29500")
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: True, device_count=lambda: 2))
    with pytest.raises(ValueError, match="4 GPUs were asked for .*this machine has 2"):
        launch(never, 4)


@pytest.mark.embedded_only
def test_processes_on_the_cpu_are_announced(monkeypatch, caplog):
    started = []
    monkeypatch.setattr(torch.multiprocessing, "spawn", lambda *args, nprocs, **kwargs: started.append(nprocs))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    launch(print, 3)
    assert started == [3]
    assert "the 3 processes of this machine run on its CPU" in caplog.text
