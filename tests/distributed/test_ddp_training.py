"""Training in two processes: the update is that of one process with both shares of the batch."""

import json
import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer, SimpleTrainer, hooks
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.events import JSONWriter
from torch import nn
from workers import run_in_processes

# Upstream's trainer wraps models for GPUs only.
pytestmark = pytest.mark.embedded_only

WRITING_HOOKS = (hooks.PeriodicWriter, hooks.PeriodicCheckpointer)
ITERATIONS = 4
BATCH = 6


@META_ARCH_REGISTRY.register()
class DistributedTestModel(nn.Module):
    """Two means over the batch, so that the gradient over all processes is the mean of theirs."""

    def __init__(self, cfg):
        super().__init__()
        torch.manual_seed(1 + comm.get_rank())  # DDP has to bring the weights of process 0 to all
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, inputs):
        x = torch.stack([item["x"] for item in inputs])
        y = self.net(x)
        return {"square": (y[:, 0] - x.sum(1)).square().mean(), "small": 0.1 * y[:, 1].square().mean()}


def batch(iteration):
    generator = torch.Generator().manual_seed(100 + iteration)
    return [{"x": torch.randn(5, generator=generator)} for _ in range(BATCH)]


class Trainer(DefaultTrainer):
    """Each process gets its share of a batch that depends on the iteration only."""

    @classmethod
    def build_train_loader(cls, cfg):
        rank, share = comm.get_rank(), BATCH // comm.get_world_size()
        return (batch(i)[rank * share : (rank + 1) * share] for i in range(10**6))

    def build_writers(self):
        return [JSONWriter(f"{self.cfg.OUTPUT_DIR}/metrics.json")]


def config(folder):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "DistributedTestModel"
    cfg.OUTPUT_DIR = str(folder)
    cfg.SOLVER.MAX_ITER = ITERATIONS
    cfg.SOLVER.STEPS = ()
    cfg.SOLVER.BASE_LR = 0.1
    cfg.SOLVER.WARMUP_ITERS = 2
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    return cfg


def train(folder):
    """Weights before and after, how far it got, and what each process counts as its hooks."""
    trainer = Trainer(config(folder))
    wrapped = isinstance(trainer.model, nn.parallel.DistributedDataParallel)
    model = trainer.model.module if wrapped else trainer.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer.train()
    resumed = Trainer(config(folder))
    resumed.resume_or_load(resume=True)
    restored = resumed.model.module if wrapped else resumed.model
    return {
        "wrapped": wrapped,
        "before": before,
        "after": model.state_dict(),
        "restored": restored.state_dict(),
        "start": resumed.start_iter,
        "writes": [type(h).__name__ for h in trainer._hooks if isinstance(h, WRITING_HOOKS)],
    }


class Diverges(nn.Module):
    """Not finite in process 1 only."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x):
        factor = math.nan if comm.get_rank() == 1 else 1.0
        return {"good": self.w.sum(), "bad": self.w.sum() * factor}


def diverge():
    model = Diverges()
    trainer = SimpleTrainer(model, [0, 1], torch.optim.SGD(model.parameters(), 0.1))
    try:
        trainer.train(0, 2)
    except FloatingPointError as error:
        return trainer.iter, model.w.item(), str(error)
    return None


def both(folder):
    return {"train": train(folder), "diverge": diverge()}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    (folder / "output").mkdir()
    return run_in_processes(both, 2, folder, folder / "output"), folder / "output"


def test_two_processes_do_the_update_of_one_with_the_whole_batch(outcome, tmp_path):
    (first, second), _ = outcome
    first, second = first["train"], second["train"]
    single = train(tmp_path)
    assert first["wrapped"] and not single["wrapped"]
    for name, value in single["before"].items():
        torch.testing.assert_close(first["before"][name], value)
        torch.testing.assert_close(second["before"][name], value)
    for name, value in single["after"].items():
        assert not torch.equal(value, single["before"][name])
        torch.testing.assert_close(first["after"][name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(first["after"][name], second["after"][name])


def test_metrics_are_means_over_the_processes(outcome, tmp_path):
    _, folder = outcome
    train(tmp_path)

    def last(path):
        lines = [json.loads(line) for line in (path / "metrics.json").read_text().splitlines()]
        return next(line for line in reversed(lines) if "total_loss" in line)

    two, one = last(folder), last(tmp_path)
    assert two["iteration"] == one["iteration"] == ITERATIONS - 1
    for name in ("square", "small", "total_loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-4)


def test_only_the_main_process_writes_and_all_resume(outcome):
    (first, second), folder = outcome
    first, second = first["train"], second["train"]
    assert first["writes"] == ["PeriodicCheckpointer", "PeriodicWriter"] and second["writes"] == []
    assert sorted(p.name for p in folder.glob("*.pth")) == ["model_0000001.pth", "model_0000003.pth", "model_final.pth"]
    for result in (first, second):
        assert result["start"] == ITERATIONS
        for name, value in first["after"].items():
            assert torch.equal(result["restored"][name], value)


def test_a_loss_that_is_not_finite_in_one_process_stops_all(outcome):
    (first, second), _ = outcome
    for iteration, weight, message in (first["diverge"], second["diverge"]):
        assert iteration == 0 and weight == 1.0
        assert "not finite at iteration 0: bad = nan; the other losses: good = 1" in message
