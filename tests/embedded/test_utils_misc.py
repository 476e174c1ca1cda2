"""Logging, seeds, files, registries, memory, pickling, analysis."""

import logging
import pickle
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from detectron2.utils import analysis
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import TORCH_VERSION, seed_all_rng
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table, log_every_n, log_every_n_seconds, log_first_n, setup_logger
from detectron2.utils.memory import retry_if_cuda_oom
from detectron2.utils.registry import Registry, _convert_target_to_string, locate
from detectron2.utils.serialize import PicklableWrapper


@pytest.fixture
def logger_name():
    """A logger of one test; its handlers go away with the test."""
    name = f"test_logger_{random.getrandbits(64):x}"
    yield name
    logging.getLogger(name).handlers.clear()


# ---- logging ----


@pytest.mark.embedded_only
def test_log_files_and_terminal(tmp_path, capsys, logger_name):
    logger = setup_logger(str(tmp_path), name=logger_name, abbrev_name="short", color=False)
    assert logger is logging.getLogger(logger_name) and not logger.propagate
    setup_logger(str(tmp_path), name=logger_name, abbrev_name="short", color=False)  # adds nothing
    logging.getLogger(f"{logger_name}.part").info("hello %d", 5)
    logger.warning("careful")
    terminal = capsys.readouterr().out.splitlines()
    file = (tmp_path / "log.txt").read_text().splitlines()
    for lines in (terminal, file):
        assert len(lines) == 2
        assert "short.part" in lines[0] and lines[0].endswith("hello 5")
        assert "WARNING" in lines[1] and lines[1].endswith("careful")


@pytest.mark.parametrize(
    ("output", "expected"), [("run.txt", "run.txt"), ("a.log", "a.log"), ("folder", "folder/log.txt")]
)
def test_names_of_log_files(tmp_path, capsys, logger_name, output, expected):
    setup_logger(str(tmp_path / output), distributed_rank=2, name=logger_name).info("from rank 2")
    assert "from rank 2" in (tmp_path / f"{expected}.rank2").read_text()
    assert capsys.readouterr().out == ""  # only rank 0 writes to the terminal


def test_colour_is_for_the_terminal_only(tmp_path, capsys, logger_name, monkeypatch):
    monkeypatch.setattr("detectron2.utils.logger.colored", lambda text, *args, **kwargs: f"\x1b[31m{text}\x1b[0m")
    setup_logger(str(tmp_path), name=logger_name).error("red")
    assert "\x1b[" in capsys.readouterr().out
    assert "\x1b[" not in (tmp_path / "log.txt").read_text()


def test_small_table():
    table = create_small_table({"AP": 40.12345, "n": 3})
    assert [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")] == ["AP", "n"]
    assert "40.123" in table and len(table.splitlines()) == 3


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO)
    return lambda: [(record.name, record.getMessage()) for record in caplog.records]


def test_log_first_n(messages):
    for index in range(5):
        log_first_n(logging.INFO, f"place {index}", n=2)
    for index in range(4):
        log_first_n(logging.INFO, f"text {index % 2}", key="message", name="named")
    assert messages() == [(__name__, "place 0"), (__name__, "place 1"), ("named", "text 0"), ("named", "text 1")]
    log_first_n(logging.INFO, "text 0", key="message", name="named")  # another place, the same text
    log_first_n(logging.INFO, "text 0", key=("caller", "message"), name="named")
    assert len(messages()) == 5


def test_log_every_n(messages, monkeypatch):
    for index in range(7):
        log_every_n(logging.INFO, str(index), n=3)
    assert [text for _, text in messages()] == ["0", "3", "6"]
    for index in range(3):
        log_every_n_seconds(logging.INFO, f"seldom {index}", n=1000)
    assert [text for _, text in messages()][3:] == ["seldom 0"]


# ---- seeds and environment ----


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_seed_all_rng():
    seed_all_rng(5)
    first = draw()
    assert draw() != first
    seed_all_rng(5)
    assert draw() == first
    seed_all_rng()
    assert draw() != first


def test_environment():
    assert TORCH_VERSION == tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    text = collect_env_info()
    assert torch.__version__ in text and np.__version__ in text and "detectron2" in text


@pytest.mark.embedded_only
def test_environment_without_setuptools_and_torchvision(monkeypatch):
    for module in ("setuptools", "torchvision", "pkg_resources"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "GPU available" in collect_env_info()


# ---- files ----


def test_detectron2_addresses(tmp_path, monkeypatch):
    asked = []

    def local_path(path, **kwargs):
        asked.append(path)
        return str(tmp_path / "file")

    (tmp_path / "file").write_text("content")
    from iopath.common.file_io import HTTPURLHandler

    monkeypatch.setattr(HTTPURLHandler, "_get_local_path", lambda self, path, **kwargs: local_path(path))
    assert PathManager.get_local_path("detectron2://a/b.pkl") == str(tmp_path / "file")
    import detectron2.checkpoint  # noqa: F401  (registers catalog://)

    assert PathManager.get_local_path("catalog://ImageNetPretrained/MSRA/R-50") == str(tmp_path / "file")
    assert asked == [
        "https://dl.fbaipublicfiles.com/detectron2/a/b.pkl",
        "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/MSRA/R-50.pkl",
    ]


@pytest.mark.embedded_only
def test_catalog_errors():
    from detectron2.checkpoint.catalog import ModelCatalog

    with pytest.raises(RuntimeError, match="MSRA/R-50"):
        ModelCatalog.get("ImageNetPretrained/MSRA/R-5")
    with pytest.raises(NotImplementedError, match="pip install"):
        ModelCatalog.get("Caffe2Detectron/COCO/35857197/e2e_faster_rcnn_R-50-C4_1x")


# ---- registries ----


class Outer:
    class Inner:
        pass


def test_registry_and_locate():
    registry = Registry("TEST")
    registry.register(Outer)
    assert registry.get("Outer") is Outer
    with pytest.raises(KeyError, match="Missing"):
        registry.get("Missing")
    for obj in (Outer, Outer.Inner, len, dict, torch.optim.SGD, nn.functional.relu):
        assert locate(_convert_target_to_string(obj)) is obj
    assert _convert_target_to_string(nn.Linear) == "torch.nn.Linear"
    for name in ("no_such_package.Thing", "torch.nn.NoSuchThing", "nothing"):
        with pytest.raises(ImportError):
            locate(name)


# ---- memory, pickling ----


def test_out_of_memory_is_retried_then_moved_to_the_cpu():
    calls = []

    def function(tensor, *, scale=1):
        calls.append(tensor.device.type)
        if len(calls) <= failures:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return tensor * scale

    wrapped = retry_if_cuda_oom(function)
    for failures in (0, 1, 2):
        calls.clear()
        assert wrapped(torch.ones(2), scale=3).tolist() == [3.0, 3.0]
        assert len(calls) == failures + 1
    failures = 3
    calls.clear()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        wrapped(torch.ones(2))

    @retry_if_cuda_oom
    def broken():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        broken()


def test_picklable_wrapper():
    offset = 3
    wrapped = PicklableWrapper(PicklableWrapper(lambda x: x + offset))
    again = pickle.loads(pickle.dumps(wrapped))
    assert again(4) == 7
    assert type(pickle.loads(pickle.dumps(PicklableWrapper(Outer())))) is Outer
    assert PicklableWrapper(np.zeros((2, 3))).shape == (2, 3)


# ---- analysis ----


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.linear = nn.Linear(8, 5)
        self.unused = nn.Linear(2, 2)

    def forward(self, inputs):
        features = self.conv(torch.stack([entry["image"] for entry in inputs])).relu()
        scores = self.linear(features.mean((2, 3)))
        if self.training:
            return {"loss": scores.sum(), "other": features.mean()}
        return [{"sem_seg": one, "scores": score} for one, score in zip(features, scores)]


def batch():
    return [{"image": torch.rand(3, 16, 20), "height": 16, "file_name": "x.png"} for _ in range(2)]


def test_operation_counts():
    model = Model().eval()
    convolution = 2 * 8 * 3 * 9 * 16 * 20
    linear = 2 * 8 * 5
    count = analysis.FlopCountAnalysis(model, batch())
    assert count.total() == convolution + linear
    assert dict(count.by_operator()) == {"conv": convolution, "linear": linear}
    assert analysis.flop_count_operators(model, batch())["conv"] == pytest.approx(convolution / 1e9)


@pytest.mark.embedded_only
def test_activation_counts():
    counts = analysis.activation_count_operators(Model().eval(), batch())
    assert dict(counts) == {"conv": 2 * 8 * 16 * 20 / 1e6, "linear": 2 * 5 / 1e6}


def test_parameters():
    model = Model()
    assert analysis.parameter_count(model)[""] == 216 + 45 + 6
    assert "conv.weight" in analysis.parameter_count_table(model)
    model.train()
    assert analysis.find_unused_parameters(model, batch()) == ["unused.weight", "unused.bias"]
    assert all(parameter.grad is None for parameter in model.parameters())
