"""Hooks: when they act, what they write, and what they remember across a resume."""

import json
import math
import os

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import SimpleTrainer, hooks
from detectron2.utils.events import EventWriter, get_event_storage
from fvcore.common.checkpoint import Checkpointer
from fvcore.common.param_scheduler import LinearParamScheduler
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return {"loss": self.linear(x).square().mean()}


def endless():
    while True:
        yield torch.ones(4, 3)


def new_trainer(*registered, lr=0.01):
    model = Model()
    trainer = SimpleTrainer(model, endless(), torch.optim.SGD(model.parameters(), lr))
    trainer.register_hooks(registered)
    return trainer


class Stops(hooks.HookBase):
    """Ends the training with an error."""

    def __init__(self, iteration):
        self.iteration = iteration

    def after_step(self):
        if self.trainer.iter == self.iteration:
            raise KeyError("stop")


def train_until_error(trainer, max_iter):
    with pytest.raises(KeyError, match="stop"):
        trainer.train(0, max_iter)


# ---- callbacks, timing, writing --------------------------------------------------------------------------------------


def test_callbacks_get_the_trainer():
    calls = []
    trainer = new_trainer(
        hooks.CallbackHook(
            before_train=lambda t: calls.append(("before_train", t.iter)),
            before_step=lambda t: calls.append(("before_step", t.iter)),
            after_step=lambda t: calls.append(("after_step", t.iter)),
        ),
        hooks.CallbackHook(after_train=lambda t: calls.append(("after_train", t.iter))),
    )
    trainer.train(0, 2)
    steps = [(point, i) for i in range(2) for point in ("before_step", "after_step")]
    assert calls == [("before_train", 0), *steps, ("after_train", 2)]


def test_times_are_written_after_the_warmup():
    trainer = new_trainer(hooks.IterationTimer(warmup_iter=3))
    trainer.train(10, 16)
    assert [i for _, i in trainer.storage.history("time").values()] == [12, 13, 14, 15]
    assert all(seconds > 0 for seconds, _ in trainer.storage.history("time").values())


@pytest.mark.embedded_only
def test_the_summary_of_the_times_leaves_the_warmup_out(caplog):
    with caplog.at_level("INFO", logger="detectron2.engine.hooks"):
        new_trainer(hooks.IterationTimer(warmup_iter=3)).train(10, 16)
    assert "Overall training speed: 3 iterations" in caplog.text


def test_timer_survives_a_training_without_iterations():
    new_trainer(hooks.IterationTimer()).train(0, 0)


class Log(EventWriter):
    def __init__(self):
        self.calls = []

    def write(self):
        self.calls.append(get_event_storage().iter)

    def close(self):
        self.calls.append("closed")


def test_writers_write_by_period_at_the_last_step_and_in_the_end():
    log = Log()
    new_trainer(hooks.PeriodicWriter([log], period=3)).train(0, 8)
    assert log.calls == [2, 5, 7, 8, "closed"]


@pytest.mark.embedded_only
def test_a_writer_must_be_a_writer():
    with pytest.raises(TypeError, match="EventWriters, got str"):
        hooks.PeriodicWriter(["metrics.json"])


# ---- schedule --------------------------------------------------------------------------------------------------------


def test_rate_of_each_iteration_is_logged_and_the_schedule_is_stepped():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.8)
    trainer = SimpleTrainer(model, endless(), optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    trainer.register_hooks([hooks.LRScheduler(scheduler=schedule)])
    trainer.train(0, 5)
    assert trainer.storage.history("lr").values() == [(0.8, 0), (0.8, 1), (0.4, 2), (0.4, 3), (0.2, 4)]
    assert schedule.last_epoch == 5


def test_a_parameter_schedule_covers_the_whole_training():
    trainer = new_trainer(hooks.LRScheduler(scheduler=LinearParamScheduler(1.0, 0.0)), lr=0.8)
    trainer.train(0, 4)
    assert [v for v, _ in trainer.storage.history("lr").values()] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_the_logged_group_stands_for_most_parameters():
    def optimizer(*groups):
        return torch.optim.SGD(
            [{"params": [nn.Parameter(torch.zeros(1)) for _ in range(n)], "lr": lr} for n, lr in groups]
        )

    best = hooks.LRScheduler.get_best_param_group_id
    assert best(optimizer((1, 0.1), (3, 0.2), (2, 0.3))) == 1
    assert best(optimizer((1, 0.1), (1, 0.2), (1, 0.3), (1, 0.2))) == 1


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoints_by_period_and_in_the_end(tmp_path):
    trainer = new_trainer()
    checkpointer = Checkpointer(trainer.model, str(tmp_path), trainer=trainer)
    trainer.register_hooks([hooks.PeriodicCheckpointer(checkpointer, 3, max_to_keep=1)])
    trainer.train(0, 7)
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == ["model_0000005.pth", "model_final.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert torch.load(tmp_path / "model_0000005.pth")["trainer"]["iteration"] == 5


class FakeCheckpointer(Checkpointer):
    def __init__(self):
        self.saved = []
        self.save_dir = ""

    def save(self, name, **kwargs):
        self.saved.append((name, kwargs["iteration"]))


def best_trainer(values, mode="max", period=2):
    """A trainer whose evaluation gives one value after the other."""
    values = iter(values)
    checkpointer = FakeCheckpointer()
    keeper = hooks.BestCheckpointer(period, checkpointer, "task/metric", mode=mode)
    trainer = new_trainer(hooks.EvalHook(period, lambda: {"task": {"metric": next(values)}}), keeper)
    return trainer, keeper, checkpointer


@pytest.mark.parametrize(
    "mode, values, saved",
    [
        ("max", [0.3, 0.4, 0.35, 0.5], [1, 3, 8]),
        ("min", [0.3, 0.4, 0.3, 0.1], [1, 8]),
        pytest.param("max", [math.nan, -1.0, math.inf, 0.0], [3, 8], marks=pytest.mark.embedded_only),
    ],
)
def test_the_best_checkpoint_is_kept(mode, values, saved):
    trainer, keeper, checkpointer = best_trainer(values, mode)
    trainer.train(0, 8)
    assert checkpointer.saved == [("model_best", i) for i in saved]


@pytest.mark.embedded_only
def test_the_best_value_is_remembered_across_a_resume():
    trainer, keeper, _ = best_trainer([0.3, 0.6])
    trainer.train(0, 4)
    state = trainer.state_dict()
    assert (keeper.best_metric, keeper.best_iter) == (0.6, 4)

    trainer, keeper, checkpointer = best_trainer([0.5, 0.7])
    trainer.load_state_dict(state)
    trainer.train(4, 8)
    assert checkpointer.saved == [("model_best", 8)]

    trainer, keeper, checkpointer = best_trainer([0.5])
    state["hooks"]["BestCheckpointer"]["val_metric"] = "another"
    trainer.load_state_dict(state)
    assert keeper.best_metric is None


@pytest.mark.embedded_only
@pytest.mark.parametrize("values, saved", [([0.5, 0.3], 0.6), ([0.7, 0.3], 0.7)])
def test_a_run_resumed_from_before_the_best_checkpoint_does_not_replace_it_by_a_worse_one(tmp_path, values, saved):
    """The periodic checkpoint is written before the evaluation that makes the best one."""

    class Periodic(DetectionCheckpointer):
        def tag_last_checkpoint(self, last_filename_basename):
            if last_filename_basename != "model_best.pth":
                super().tag_last_checkpoint(last_filename_basename)

    def trainer_with(values):
        values = iter(values)
        trainer = new_trainer()
        checkpointer = Periodic(trainer.model, str(tmp_path), trainer=trainer)
        keeper = hooks.BestCheckpointer(2, checkpointer, "task/metric")
        evaluate = hooks.EvalHook(2, lambda: {"task": {"metric": next(values)}})
        trainer.register_hooks([hooks.PeriodicCheckpointer(checkpointer, 2), evaluate, keeper, Stops(4)])
        return trainer, checkpointer

    trainer, _ = trainer_with([0.6, 0.4])
    train_until_error(trainer, 8)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")  # written before the first evaluation

    trainer, checkpointer = trainer_with(values)
    checkpointer.resume_or_load("", resume=True)
    with pytest.raises(KeyError, match="stop"):
        trainer.train(trainer.iter + 1, 8)
    best = torch.load(tmp_path / "model_best.pth")
    assert best["best"] == best["trainer"]["hooks"]["BestCheckpointer"]
    assert best["best"]["best_metric"] == saved

    # a run that starts afresh compares with nothing
    trainer, _ = trainer_with([0.1, 0.2])
    train_until_error(trainer, 8)
    assert torch.load(tmp_path / "model_best.pth")["best"]["best_metric"] == 0.2


@pytest.mark.embedded_only
def test_a_damaged_best_checkpoint_is_replaced(tmp_path, caplog):
    (tmp_path / "model_best.pth").write_bytes(b"PK\x03\x04 cut off")
    trainer = new_trainer()
    checkpointer = DetectionCheckpointer(trainer.model, str(tmp_path), trainer=trainer)
    keeper = hooks.BestCheckpointer(2, checkpointer, "task/metric")
    trainer.register_hooks([hooks.EvalHook(2, lambda: {"task": {"metric": 0.5}}), keeper])
    with caplog.at_level("WARNING", logger="detectron2.engine.hooks"):
        trainer.train(2, 4)
    assert "model_best.pth" in caplog.text
    assert torch.load(tmp_path / "model_best.pth")["best"]["best_metric"] == 0.5


@pytest.mark.embedded_only
def test_the_saved_checkpoint_knows_its_own_metric():
    trainer, keeper, checkpointer = best_trainer([0.3])
    states = []
    checkpointer.save = lambda name, **kwargs: states.append(keeper.state_dict())
    trainer.train(0, 2)
    assert states == [{"val_metric": "task/metric", "best_metric": 0.3, "best_iter": 2}]


@pytest.mark.embedded_only
def test_best_checkpoint_without_its_metric_or_with_a_wrong_mode(caplog):
    checkpointer = FakeCheckpointer()
    trainer = new_trainer(hooks.BestCheckpointer(1, checkpointer, "bbox/AP"))
    with caplog.at_level("WARNING", logger="detectron2.engine.hooks"):
        trainer.train(0, 2)
    assert "bbox/AP" in caplog.text and checkpointer.saved == []
    with pytest.raises(ValueError, match="'max' or 'min', got 'best'"):
        hooks.BestCheckpointer(1, checkpointer, "bbox/AP", mode="best")


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period, total, expected", [(0, 4, [4]), (2, 4, [1, 4]), (2, 5, [1, 3, 5]), (9, 4, [4])])
def test_evaluations_by_period_and_in_the_end(period, total, expected):
    done = []
    trainer = new_trainer(hooks.EvalHook(period, lambda: done.append(trainer.iter)))
    trainer.train(0, total)
    assert done == expected


def test_no_last_evaluation_if_not_wanted_or_after_a_failure():
    done = []
    new_trainer(hooks.EvalHook(2, lambda: done.append(0), eval_after_train=False)).train(0, 4)
    assert done == [0]
    train_until_error(new_trainer(hooks.EvalHook(0, lambda: done.append(1)), Stops(2)), 4)
    assert done == [0]


def test_results_go_to_the_storage_flat_and_unsmoothed():
    trainer = new_trainer(hooks.EvalHook(0, lambda: {"segm": {"AP": 12.5, "AP50": torch.tensor(20.0)}, "speed": 3}))
    trainer.train(0, 2)
    latest = trainer.storage.latest()
    assert {k: latest[k] for k in ("segm/AP", "segm/AP50", "speed")} == {
        "segm/AP": (12.5, 2),
        "segm/AP50": (20.0, 2),
        "speed": (3.0, 2),
    }
    assert trainer.storage.smoothing_hints()["segm/AP"] is False


@pytest.mark.embedded_only
def test_results_that_are_no_numbers_are_named():
    with pytest.raises(ValueError, match="segm/AP is 'high'"):
        new_trainer(hooks.EvalHook(0, lambda: {"segm": {"AP": "high"}})).train(0, 1)
    with pytest.raises(TypeError, match="must return a dict, got list"):
        new_trainer(hooks.EvalHook(0, lambda: [1])).train(0, 1)


@pytest.mark.embedded_only
def test_a_trainer_with_hooks_can_train_twice():
    done = []
    trainer = new_trainer(
        hooks.IterationTimer(),
        hooks.EvalHook(0, lambda: done.append(1)),
        hooks.CallbackHook(after_train=lambda t: done.append(2)),
    )
    trainer.train(0, 1)
    trainer.train(1, 2)
    assert done == [1, 2, 1, 2]


# ---- batch norm, profiling -------------------------------------------------------------------------------------------


class NormModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x):
        get_event_storage().put_scalar("seen", 1.0)
        return {"loss": self.bn(x).square().mean()}


def test_precise_statistics_are_the_means_over_the_batches():
    data = list(torch.randn(4, 16, 3) * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([0.0, 5.0, -5.0]))
    model = NormModel()
    hook = hooks.PreciseBN(0, model, data, num_iter=4)
    trainer = SimpleTrainer(model, (torch.zeros(16, 3) for _ in range(9)), torch.optim.SGD(model.parameters(), 0.0))
    trainer.register_hooks([hook])
    trainer.train(0, 3)
    everything = torch.cat(data)
    torch.testing.assert_close(model.bn.running_mean, everything.mean(0))
    # Each batch is as large as the others, so the variance of all is that of the batches and of their means.
    torch.testing.assert_close(model.bn.running_var, everything.var(0, unbiased=False), rtol=0.1, atol=0.0)
    assert len(trainer.storage.history("seen").values()) == 3, "the extra passes log elsewhere"


@pytest.mark.embedded_only
def test_precise_statistics_without_batch_norm_need_no_data():
    trainer = new_trainer(hooks.PreciseBN(1, Model(), None, 10))
    trainer.train(0, 2)


@pytest.mark.parametrize("kind", ["torch", pytest.param("autograd", marks=pytest.mark.embedded_only)])
def test_profiles_of_the_selected_iterations(tmp_path, kind, caplog):
    def selected(trainer):
        return trainer.iter == 2

    if kind == "torch":
        hook = hooks.TorchProfiler(selected, str(tmp_path), save_tensorboard=False)
    else:
        hook = hooks.AutogradProfiler(selected, str(tmp_path))
    with caplog.at_level("INFO"):
        new_trainer(hook).train(0, 4)
    assert os.listdir(tmp_path) == ["profiler-trace-iter2.json"]
    trace = json.loads((tmp_path / "profiler-trace-iter2.json").read_text())
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    assert any("addmm" in event["name"] or "linear" in event["name"] for event in events)


def test_profile_for_tensorboard(tmp_path):
    new_trainer(hooks.TorchProfiler(lambda trainer: trainer.iter == 1, str(tmp_path))).train(0, 3)
    assert len(list(tmp_path.rglob("*.json"))) == 1


def test_memory_statistics_need_cuda(caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level("INFO", logger="detectron2.engine.hooks"):
        new_trainer(hooks.TorchMemoryStats(period=1)).train(0, 2)
    assert "memory" not in caplog.text


@pytest.mark.gpu
def test_memory_statistics_are_limited_in_number(caplog):
    with caplog.at_level("INFO", logger="detectron2.engine.hooks"):
        new_trainer(hooks.TorchMemoryStats(period=1, max_runs=2)).train(0, 4)
    assert [record.args[0] for record in caplog.records if "memory" in record.message] == [0, 1]
