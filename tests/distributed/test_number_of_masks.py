"""The number by which mask losses are divided, over two processes."""

import torch
from workers import run_in_processes

TARGETS_OF_WORKERS = ((5, 0), (0, 1))  # of each batch: targets in each of the two processes


def averages() -> list[float]:
    from detectron2.utils import comm
    from mask2former_plugin.modeling.criterion import average_number_of_masks

    batches = [[{"labels": torch.zeros(numbers[comm.get_rank()], dtype=torch.int64)}] for numbers in TARGETS_OF_WORKERS]
    return [float(average_number_of_masks(targets, torch.device("cpu"))) for targets in batches]


def test_number_of_masks_is_averaged_over_workers(tmp_path):
    # (5 + 0) / 2, and at least 1
    assert run_in_processes(averages, 2, tmp_path) == [[2.5, 1.0]] * 2
