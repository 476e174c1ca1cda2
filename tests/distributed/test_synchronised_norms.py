"""Networks with synchronised norms in two processes: trained in parallel, and layers run again in the backward pass."""

import copy

import pytest
import torch
from detectron2.layers import get_norm
from torch import nn
from workers import run_in_processes

from mask2former_plugin.modeling.recomputation import RecomputedSequential, RunsLayers

# Upstream's synchronised norm works on GPUs only.
pytestmark = pytest.mark.embedded_only


class RunsLean(RunsLayers):
    recompute_cheap_steps = True

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.run_lean(self.layer, x)


def trained_in_parallel():
    """Statistics and gradients of a network that two processes train, and of one that sees the whole batch."""
    from detectron2.engine import create_ddp_model
    from detectron2.utils import comm

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), get_norm("SyncBN", 4), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    whole = copy.deepcopy(network)
    whole[1] = nn.BatchNorm2d(4).double()
    batch = torch.randn(4, 3, 7, 9, dtype=torch.float64)
    parallel = create_ddp_model(network, broadcast_buffers=False)
    parallel(batch[2 * comm.get_rank() :][:2]).square().mean().backward()
    whole(batch).square().mean().backward()
    return [[*n.state_dict().values(), *(p.grad for p in n.parameters())] for n in (network, whole)]


def test_a_parallel_model_on_cpus_sees_the_whole_batch(tmp_path):
    for found, expected in run_in_processes(trained_in_parallel, 2, tmp_path):
        torch.testing.assert_close(found, expected)


def statistics_and_gradients():
    """Of the plain network, of one that recomputes its blocks, and of one that keeps costly results."""
    from detectron2.utils import comm

    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 4, 3), get_norm("SyncBN", 4), nn.ReLU())
    plain = nn.Sequential(block, nn.Conv2d(4, 2, 1)).double()
    recomputed, lean = copy.deepcopy(plain), copy.deepcopy(plain)
    recomputed.__class__ = RecomputedSequential
    lean[0] = RunsLean(lean[0])
    torch.manual_seed(comm.get_rank())
    batches = torch.randn(2, 2, 3, 7, 9, dtype=torch.float64)
    found = []
    for network in (plain, recomputed, lean):
        for x in batches:
            network(x).square().mean().backward()
        found.append([*network.state_dict().values(), *(p.grad for p in network.parameters())])
    return found


def test_synchronised_norms_count_a_batch_once(tmp_path):
    for plain, *others in run_in_processes(statistics_and_gradients, 2, tmp_path):
        assert any(torch.equal(value, torch.tensor(2)) for value in plain)
        for found in others:
            for ours, expected in zip(found, plain):
                torch.testing.assert_close(ours, expected)
