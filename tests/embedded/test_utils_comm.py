"""Talking between processes: one process, and two real ones over gloo."""

import numpy as np
import pytest
import torch

from detectron2.utils import comm
from workers import run_in_processes


def test_one_process():
    assert (comm.get_world_size(), comm.get_rank(), comm.get_local_rank(), comm.get_local_size()) == (1, 0, 0, 1)
    assert comm.is_main_process()
    comm.synchronize()
    data = {"a": 1}
    assert comm.all_gather(data) == [data] and comm.gather(data) == [data]
    losses = {"x": torch.tensor(1.0)}
    assert comm.reduce_dict(losses) == losses
    np.random.seed(3)
    first = comm.shared_random_seed()
    np.random.seed(3)
    assert comm.shared_random_seed() == first and 0 <= first < 2**31


@pytest.mark.embedded_only
def test_the_local_group_needs_launch():
    with pytest.raises(AssertionError, match="launch"):
        comm.get_local_process_group()


def worker():
    rank = comm.get_rank()
    np.random.seed(rank)
    found = {
        "ranks": (comm.get_world_size(), comm.get_rank(), comm.is_main_process()),
        "local_ranks": (comm.get_local_size(), comm.get_local_rank()),
        "all": comm.all_gather({"rank": rank, "tensor": torch.full((rank + 1,), rank)}),
        "to_0": comm.gather(f"from {rank}"),
        "to_1": comm.gather([rank], dst=1),
        "local": comm.all_gather(rank, group=comm.get_local_process_group()),
        "seed": comm.shared_random_seed(),
    }
    losses = {"b": torch.tensor(1.0 + rank), "a": torch.tensor(10.0 * rank)}
    found["mean"] = {name: value.item() for name, value in comm.reduce_dict(losses).items()}
    found["sum"] = {name: value.item() for name, value in comm.reduce_dict(losses, average=False).items()}
    comm.synchronize()
    return found


def test_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    results = run_in_processes(worker, 2, tmp_path, local_size=1)
    for rank, found in enumerate(results):
        assert found["ranks"] == (2, rank, rank == 0)
        assert found["local_ranks"] == (1, 0)
        assert [entry["rank"] for entry in found["all"]] == [0, 1]
        assert [entry["tensor"].tolist() for entry in found["all"]] == [[0], [1, 1]]
        assert found["local"] == [rank]
    assert results[0]["to_0"] == ["from 0", "from 1"] and results[1]["to_0"] == []
    assert results[0]["to_1"] == [] and results[1]["to_1"] == [[0], [1]]
    assert results[0]["seed"] == results[1]["seed"]
    assert results[0]["mean"] == {"a": 5.0, "b": 1.5}
    assert results[0]["sum"] == {"a": 10.0, "b": 3.0}
