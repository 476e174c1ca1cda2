"""Command line, set-up, default trainer (resume included) and default predictor on a tiny model."""

import importlib.util
import json
import random
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import (
    AMPTrainer,
    DefaultPredictor,
    DefaultTrainer,
    SimpleTrainer,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import CommonMetricPrinter, JSONWriter, TensorboardXWriter
from torch import nn

DATASET = "engine_defaults_test"


@META_ARCH_REGISTRY.register()
class EngineDefaultsTestModel(nn.Module):
    """Two losses of a linear layer; in eval mode it hands its input back with the mean of its weights."""

    def __init__(self, cfg):
        super().__init__()
        torch.manual_seed(7)
        self.linear = nn.Linear(3, 2)
        if cfg.TEST.PRECISE_BN.ENABLED:
            self.bn = nn.BatchNorm1d(2)

    def forward(self, inputs):
        if not self.training:
            return [{"input": x, "mean": self.linear.weight.mean()} for x in inputs]
        y = self.linear(inputs)
        return {"square": y.square().mean(), "mean": y.mean().square()}


class WeightSum(DatasetEvaluator):
    """The metric is the negative mean of the weights, which differs from evaluation to evaluation."""

    def reset(self):
        self.means = []

    def process(self, inputs, outputs):
        self.means += [output["mean"].item() for output in outputs]

    def evaluate(self):
        assert len(self.means) == 2
        return {"task": {"score": -self.means[0]}}


class Trainer(DefaultTrainer):
    """Trains on the same batch over and over, so that a resumed run sees the data of an uninterrupted one."""

    @classmethod
    def build_train_loader(cls, cfg):
        batch = torch.linspace(-1, 1, 12).reshape(4, 3)

        def endless():
            while True:
                yield batch

        return endless()

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return [[{"image_id": 0}], [{"image_id": 1}]]

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return WeightSum()

    def build_writers(self):
        return [JSONWriter(f"{self.cfg.OUTPUT_DIR}/metrics.json")]


def config(folder, **solver):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "EngineDefaultsTestModel"
    cfg.OUTPUT_DIR = str(folder)
    cfg.DATASETS.TEST = (DATASET,)
    cfg.SOLVER.BASE_LR = 0.1
    cfg.SOLVER.MAX_ITER = 8
    cfg.SOLVER.STEPS = (6,)
    cfg.SOLVER.WARMUP_ITERS = 2
    cfg.SOLVER.CHECKPOINT_PERIOD = 4
    for key, value in solver.items():
        setattr(cfg.SOLVER, key, value)
    return cfg


# ---- command line and set-up -----------------------------------------------------------------------------------------


def test_command_line():
    parser = default_argument_parser()
    defaults = vars(parser.parse_args([]))
    url = defaults.pop("dist_url")
    host, port = url.rsplit(":", 1)
    assert host == "tcp://127.0.0.1" and 49152 <= int(port) < 65536
    assert defaults == {
        "config_file": "",
        "resume": False,
        "eval_only": False,
        "num_gpus": 1,
        "num_machines": 1,
        "machine_rank": 0,
        "opts": [],
    }
    line = "--config-file a.yaml --num-gpus 2 --resume --eval-only SOLVER.BASE_LR 0.1 --not-a-flag"
    args = parser.parse_args(line.split())
    assert (args.config_file, args.num_gpus, args.resume, args.eval_only) == ("a.yaml", 2, True, True)
    assert args.opts == ["SOLVER.BASE_LR", "0.1", "--not-a-flag"]


def test_help_names_every_flag_and_takes_an_epilog():
    text = default_argument_parser().format_help()
    for flag in "config-file resume eval-only num-gpus num-machines machine-rank dist-url".split():
        assert f"--{flag}" in text
    assert "only this  line" in default_argument_parser(epilog="only this  line").format_help()


def test_setup_writes_config_and_log(tmp_path):
    given = tmp_path / "given.yaml"
    given.write_text("SEED: 5\n")
    cfg = get_cfg()
    cfg.merge_from_file(str(given))
    cfg.OUTPUT_DIR = str(tmp_path / "new" / "out")
    default_setup(cfg, Namespace(config_file=str(given), eval_only=True))
    written = get_cfg()
    written.merge_from_file(f"{cfg.OUTPUT_DIR}/config.yaml")
    assert yaml.safe_load(written.dump()) == yaml.safe_load(cfg.dump())
    log = (tmp_path / "new" / "out" / "log.txt").read_text()
    log = re.sub(r"\x1b\[[0-9;]*m", "", log)  # without colours
    assert "SEED: 5" in log and "given.yaml" in log


def test_setup_seeds_all_generators(tmp_path):
    def draw(seed):
        cfg = get_cfg()
        cfg.OUTPUT_DIR = str(tmp_path)
        cfg.SEED = seed
        default_setup(cfg, {})
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(3) == draw(3) != draw(4)
    assert draw(-1) != draw(-1)


@pytest.mark.parametrize("eval_only", [False, True])
def test_setup_switches_the_search_for_fast_convolutions(tmp_path, monkeypatch, eval_only):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.CUDNN_BENCHMARK = True
    default_setup(cfg, Namespace(config_file="", eval_only=eval_only))
    assert torch.backends.cudnn.benchmark is not eval_only


@pytest.mark.embedded_only
def test_setup_sets_the_precision_of_matrix_products(tmp_path):
    before = torch.get_float32_matmul_precision()
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.FLOAT32_PRECISION = "medium"
    try:
        default_setup(cfg, {})
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_default_writers(tmp_path, monkeypatch):
    kinds = [type(writer) for writer in default_writers(str(tmp_path / "a"), 10)]
    assert kinds[:2] == [CommonMetricPrinter, JSONWriter]
    assert (TensorboardXWriter in kinds) == (importlib.util.find_spec("tensorboard") is not None)


@pytest.mark.embedded_only
def test_default_writers_without_tensorboard(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else find(name, *a))
    assert [type(writer) for writer in default_writers(str(tmp_path))] == [CommonMetricPrinter, JSONWriter]


def test_one_process_needs_no_ddp():
    model = nn.Linear(1, 1)
    assert create_ddp_model(model, broadcast_buffers=False) is model


@pytest.mark.embedded_only
def test_missing_cuda_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = config(tmp_path)
    cfg.MODEL.DEVICE = "cuda"
    for start in (Trainer, DefaultPredictor, Trainer.build_model):
        with pytest.raises(ValueError, match="no CUDA device here; set MODEL.DEVICE cpu"):
            start(cfg)


# ---- default trainer -------------------------------------------------------------------------------------------------


def test_solver_is_scaled_to_the_number_of_processes():
    cfg = get_cfg()
    cfg.SOLVER.IMS_PER_BATCH = 16
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.MAX_ITER = 1000
    cfg.SOLVER.STEPS = (600, 801)
    cfg.SOLVER.WARMUP_ITERS = 100
    cfg.SOLVER.CHECKPOINT_PERIOD = 50
    cfg.TEST.EVAL_PERIOD = 70
    assert DefaultTrainer.auto_scale_workers(cfg, 4) is cfg
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    cfg.freeze()
    assert DefaultTrainer.auto_scale_workers(cfg, 8) is cfg
    scaled = DefaultTrainer.auto_scale_workers(cfg, 16)
    assert scaled.is_frozen() and cfg.SOLVER.MAX_ITER == 1000
    solver = scaled.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER, solver.STEPS) == (32, 0.02, 500, (300, 400))
    assert (solver.WARMUP_ITERS, solver.CHECKPOINT_PERIOD, scaled.TEST.EVAL_PERIOD) == (50, 25, 35)
    assert solver.REFERENCE_WORLD_SIZE == 16


def test_hooks_and_attributes(tmp_path):
    trainer = Trainer(config(tmp_path))
    kinds = [hooks.IterationTimer, hooks.LRScheduler, hooks.PeriodicCheckpointer, hooks.EvalHook, hooks.PeriodicWriter]
    assert [type(hook) for hook in trainer._hooks] == kinds
    assert type(trainer._trainer) is SimpleTrainer
    assert (trainer.start_iter, trainer.max_iter) == (0, 8)
    for name in ("model", "data_loader", "optimizer"):
        assert getattr(trainer, name) is getattr(trainer._trainer, name)
        replacement = object()
        setattr(trainer, name, replacement)
        assert getattr(trainer._trainer, name) is replacement


def test_precise_batch_norm_is_added_on_request(tmp_path):
    cfg = config(tmp_path)
    cfg.TEST.PRECISE_BN.ENABLED = True
    assert hooks.PreciseBN in [type(hook) for hook in Trainer(cfg)._hooks]


class Reference:
    """SGD with momentum on the same losses, written out."""

    def __init__(self, cfg):
        self.model = EngineDefaultsTestModel(cfg)
        self.momentum = [torch.zeros_like(p) for p in self.model.parameters()]

    def run(self, steps):
        batch = torch.linspace(-1, 1, 12).reshape(4, 3)
        for i in range(steps):
            warmup = 0.001 + 0.999 * i / 2 if i < 2 else 1.0
            lr = 0.1 * warmup * (0.1 if i >= 6 else 1.0)
            grads = torch.autograd.grad(sum(self.model(batch).values()), list(self.model.parameters()))
            with torch.no_grad():
                for p, g, m in zip(self.model.parameters(), grads, self.momentum, strict=True):
                    m.mul_(0.9).add_(g + 1e-4 * p)
                    p -= lr * m
        return [p.detach() for p in self.model.parameters()]


def weights(trainer):
    return [p.detach() for p in trainer.model.parameters()]


def test_training_is_gradient_descent_with_momentum_and_schedule(tmp_path):
    cfg = config(tmp_path)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    for actual, expected in zip(weights(trainer), Reference(cfg).run(8), strict=True):
        torch.testing.assert_close(actual, expected)
    checkpoints = sorted(p.name for p in tmp_path.glob("*.pth"))
    assert checkpoints == ["model_0000003.pth", "model_0000007.pth", "model_final.pth"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [7, 8]
    assert lines[0]["lr"] == pytest.approx(0.01)
    assert lines[1]["task/score"] == pytest.approx(-trainer.model.linear.weight.mean().item())


def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(tmp_path):
    class Interrupt(hooks.HookBase):
        def after_step(self):
            if self.trainer.iter == 5:
                raise KeyboardInterrupt

    cfg = config(tmp_path)
    first = Trainer(cfg)
    first.register_hooks([Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = Trainer(cfg)
    second.resume_or_load(resume=True)
    assert second.start_iter == 4  # from the checkpoint after the fourth iteration
    second.train()
    for actual, expected in zip(weights(second), Reference(cfg).run(8), strict=True):
        torch.testing.assert_close(actual, expected)

    third = Trainer(cfg)  # nothing is left to do
    third.resume_or_load(resume=True)
    assert third.start_iter == 8
    third.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(second), weights(third), strict=True))

    fresh = Trainer(cfg)
    fresh.resume_or_load(resume=False)
    assert fresh.start_iter == 0


@pytest.mark.embedded_only
def test_a_resumed_training_can_be_longer(tmp_path):
    Trainer(config(tmp_path, MAX_ITER=4, STEPS=())).train()
    longer = Trainer(config(tmp_path))
    longer.resume_or_load(resume=True)
    longer.train()
    for actual, expected in zip(weights(longer), Reference(longer.cfg).run(8), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.embedded_only
def test_the_best_metric_survives_a_resume(tmp_path):
    class Best(Trainer):
        def build_hooks(self):
            result = super().build_hooks()
            result.insert(-1, hooks.BestCheckpointer(self.cfg.TEST.EVAL_PERIOD, self.checkpointer, "task/score"))
            return result

    cfg = config(tmp_path, MAX_ITER=4, STEPS=())
    cfg.TEST.EVAL_PERIOD = 2
    first = Best(cfg)
    first.train()
    best = first._hooks[-2]
    assert best.best_metric is not None and (tmp_path / "model_best.pth").exists()
    second = Best(config(tmp_path))
    second.resume_or_load(resume=True)
    assert (second._hooks[-2].best_metric, second._hooks[-2].best_iter) == (best.best_metric, best.best_iter)
    assert second.start_iter in (4, 5)


@pytest.mark.embedded_only
def test_hooks_see_the_backward_pass(tmp_path):
    class Look(hooks.HookBase):
        def after_backward(self):
            self.gradient = self.trainer.model.linear.weight.grad.clone()

    trainer, look = Trainer(config(tmp_path, MAX_ITER=1, STEPS=())), Look()
    trainer.register_hooks([look])
    trainer.train()
    model = EngineDefaultsTestModel(trainer.cfg)
    loss = sum(model(torch.linspace(-1, 1, 12).reshape(4, 3)).values())
    torch.testing.assert_close(look.gradient, torch.autograd.grad(loss, model.linear.weight)[0])


@pytest.mark.embedded_only
def test_mixed_precision_by_config(tmp_path):
    cfg = config(tmp_path)
    cfg.SOLVER.AMP.ENABLED = True
    trainer = Trainer(cfg)
    assert type(trainer._trainer) is AMPTrainer and trainer._trainer.precision == torch.bfloat16
    trainer.train()
    cfg.SOLVER.AMP.PRECISION = "bfloat16"
    assert Trainer(cfg)._trainer.precision == torch.bfloat16
    cfg.SOLVER.AMP.PRECISION = "float8"
    with pytest.raises(ValueError, match="float16, bfloat16, got 'float8'"):
        Trainer(cfg)


def test_results_of_one_and_of_several_datasets(tmp_path):
    cfg = config(tmp_path)
    model = EngineDefaultsTestModel(cfg)
    score = -model.linear.weight.mean().item()
    assert Trainer.test(cfg, model) == {"task": {"score": score}}
    assert Trainer.test(cfg, model, WeightSum()) == {"task": {"score": score}}
    assert model.training, "an evaluation leaves the model in the mode in which it found it"
    cfg.DATASETS.TEST = ("engine_test_a", "engine_test_b")
    both = {"engine_test_a": {"task": {"score": score}}, "engine_test_b": {"task": {"score": score}}}
    assert Trainer.test(cfg, model, [WeightSum(), WeightSum()]) == both


@pytest.mark.embedded_only
def test_evaluators_must_fit_the_datasets(tmp_path, caplog):
    cfg = config(tmp_path)
    model = EngineDefaultsTestModel(cfg)
    with pytest.raises(ValueError, match="2 evaluators for 1 datasets"):
        Trainer.test(cfg, model, [WeightSum(), WeightSum()])
    with caplog.at_level("WARNING", logger="detectron2.engine.defaults"):
        assert DefaultTrainer.test(cfg, model) == {}
    assert f"no evaluator for '{DATASET}'" in caplog.text


def test_expected_results_are_verified(tmp_path):
    cfg = config(tmp_path, MAX_ITER=1, STEPS=())
    cfg.TEST.EXPECTED_RESULTS = [["task", "score", 0.0, 100.0]]
    assert set(Trainer(cfg).train()) == {"task"}
    cfg.TEST.EXPECTED_RESULTS = [["task", "score", 1000.0, 1.0]]
    with pytest.raises(SystemExit):
        Trainer(cfg).train()


# ---- default predictor -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_predictor_prepares_its_input(tmp_path, channels):
    cfg = config(tmp_path)
    cfg.INPUT.FORMAT = channels
    cfg.INPUT.MIN_SIZE_TEST = 8
    cfg.INPUT.MAX_SIZE_TEST = 12
    stored = EngineDefaultsTestModel(cfg)
    nn.init.constant_(stored.linear.weight, 0.125)
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    torch.save({"model": stored.state_dict()}, cfg.MODEL.WEIGHTS)
    MetadataCatalog.get(DATASET).set(thing_classes=["a"])

    predictor = DefaultPredictor(cfg)
    image = np.zeros((4, 16, 3), np.uint8)
    image[...] = (10, 20, 30)  # blue, green, red
    output = predictor(image)
    assert output["mean"] == 0.125, "MODEL.WEIGHTS are loaded"
    assert not output["mean"].requires_grad
    given = output["input"]
    assert (given["height"], given["width"]) == (4, 16)
    assert given["image"].shape == (3, 3, 12) and given["image"].dtype == torch.float32
    assert given["image"][:, 0, 0].tolist() == ([30, 20, 10] if channels == "RGB" else [10, 20, 30])
    assert predictor.metadata.thing_classes == ["a"]
    assert predictor.input_format == channels and not predictor.model.training


@pytest.mark.embedded_only
def test_predictor_refuses_what_is_no_image(tmp_path):
    cfg = config(tmp_path)
    predictor = DefaultPredictor(cfg)
    for wrong in (*(np.zeros(shape, np.uint8) for shape in ((4, 4), (4, 4, 4), (0, 4, 3))), "image.jpg"):
        with pytest.raises(ValueError, match="array \\(H, W, 3\\) in BGR order, got"):
            predictor(wrong)
    with pytest.raises(ValueError, match="values 0..255, got uint16 up to 65535"):
        predictor(np.full((4, 4, 3), 65535, np.uint16))
    cfg.INPUT.FORMAT = "L"
    with pytest.raises(ValueError, match="INPUT.FORMAT must be RGB or BGR"):
        DefaultPredictor(cfg)
