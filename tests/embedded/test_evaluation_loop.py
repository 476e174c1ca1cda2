"""The loop that runs a model over a dataset, and the helpers for result dicts."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

from detectron2.config import get_cfg
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_context,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detectron2.evaluation.testing import flatten_results_dict


class Recorder(DatasetEvaluator):
    def __init__(self, key="sum", fails=False):
        self.key, self.fails, self.calls = key, fails, []

    def reset(self):
        self.calls.append("reset")

    def process(self, inputs, outputs):
        assert not torch.is_grad_enabled()
        if self.fails:
            raise RuntimeError("evaluator failed")
        self.calls.append([float(x) for x in outputs])

    def evaluate(self):
        return {self.key: sum(sum(call) for call in self.calls[1:])}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.BatchNorm1d(2)
        self.free = nn.Linear(1, 1)
        self.train()
        self.frozen.eval()

    def forward(self, batch):
        assert not self.training and not self.free.training
        return [2 * x for x in batch]


BATCHES = [[torch.tensor(1.0), torch.tensor(2.0)], [torch.tensor(3.0)]]


def test_results_and_modes():
    model = Model()
    results = inference_on_dataset(model, BATCHES, [Recorder("a"), Recorder("b")])
    assert results == {"a": 12.0, "b": 12.0}
    recorder = Recorder()
    assert inference_on_dataset(model, BATCHES, recorder) == {"sum": 12.0}
    assert recorder.calls == ["reset", [2.0, 4.0], [6.0]]
    assert model.training and model.free.training
    assert inference_on_dataset(model, BATCHES, None) == {}
    assert inference_on_dataset(lambda batch: batch, BATCHES, Recorder()) == {"sum": 6.0}
    assert inference_on_dataset(model, [], Recorder()) == {"sum": 0}


@pytest.mark.embedded_only
def test_modes_come_back_after_an_exception():
    model = Model()
    with pytest.raises(RuntimeError, match="evaluator failed"):
        inference_on_dataset(model, BATCHES, Recorder(fails=True))
    assert model.training and model.free.training and not model.frozen.training
    assert torch.is_grad_enabled()
    with pytest.raises(KeyError):
        with inference_context(model):
            assert not model.training
            raise KeyError
    assert model.training and model.free.training and not model.frozen.training


@pytest.mark.embedded_only
def test_callbacks_and_progress_lines(caplog, monkeypatch):
    import detectron2.evaluation.evaluator as module

    monkeypatch.setattr(module, "LOG_PERIOD_SECONDS", 0.0)
    events = []
    names = ("on_start", "before_inference", "after_inference", "on_end")
    callbacks = {name: (lambda name=name: events.append(name)) for name in names}
    with caplog.at_level(logging.INFO):
        inference_on_dataset(lambda batch: batch, BATCHES * 5, Recorder(), callbacks=callbacks)
    assert events == ["on_start", *["before_inference", "after_inference"] * 10, "on_end"]
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "Start inference on 10 batches"
    progress = [line for line in lines if line.startswith("Inference done")]
    assert [line.split()[2] for line in progress] == ["6/10.", "7/10.", "8/10.", "9/10.", "10/10."]  # five are warm-up
    assert "ETA=0:00:00" in progress[-1] and "s/iter" in progress[-1]
    assert lines[-2].startswith("Total inference time") and lines[-1].startswith("Total inference pure compute time")


def test_two_evaluators_with_the_same_task():
    with pytest.raises(AssertionError, match="same"):
        DatasetEvaluators([Recorder(), Recorder()]).evaluate()

    class Silent(DatasetEvaluator):
        def evaluate(self):
            return None

    assert DatasetEvaluators([Silent(), Silent()]).evaluate() == {}


def test_csv_lines(caplog):
    with caplog.at_level(logging.INFO):
        print_csv_format({"segm": {"AP": 12.34567, "AP-dog": 3.0, "AP50": float("nan")}, "loss": 0.5})
    assert [record.getMessage() for record in caplog.records] == [
        "copypaste: Task: segm",
        "copypaste: AP,AP50",
        "copypaste: 12.3457,nan",
        "copypaste: loss=0.5",
    ]


@pytest.mark.embedded_only
def test_csv_of_nothing_is_a_warning(caplog):
    print_csv_format({})
    assert "no results" in caplog.text
    with pytest.raises(TypeError, match="dict of results"):
        print_csv_format([1])


def test_expected_results():
    cfg = get_cfg()
    results = {"segm": {"AP": 40.0}, "bbox": {"AP": float("nan")}}
    assert verify_results(cfg, results) is True
    cfg.TEST.EXPECTED_RESULTS = [["segm", "AP", 40.2, 0.3]]
    assert verify_results(cfg, results) is True
    for wrong in (["segm", "AP", 40.2, 0.1], ["bbox", "AP", 1.0, 100.0]):
        cfg.TEST.EXPECTED_RESULTS = [["segm", "AP", 40.2, 0.3], wrong]
        with pytest.raises(SystemExit) as stop:
            verify_results(cfg, results)
        assert stop.value.code == 1


@pytest.mark.embedded_only
def test_missing_result_fails_the_check(caplog):
    cfg = get_cfg()
    cfg.TEST.EXPECTED_RESULTS = [["segm", "AP75", 1.0, 0.1]]
    with pytest.raises(SystemExit):
        verify_results(cfg, {"segm": {"AP": 1.0}})
    assert "segm/AP75" in caplog.text


def test_flatten():
    assert flatten_results_dict({"a": {"b": {"c": 1}, "d": 2.5}, "e": 3}) == {"a/b/c": 1, "a/d": 2.5, "e": 3}


@pytest.mark.embedded_only
def test_flatten_makes_plain_numbers():
    flat = flatten_results_dict({"a": {"b": np.float64(2.5), "c": np.int32(3)}})
    assert type(flat["a/b"]) is float and type(flat["a/c"]) is int
