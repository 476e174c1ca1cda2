"""Checkpointer: formats, interruptions, resuming, mismatches; and the matching of foreign names."""

import os
import pickle
import re
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts, convert_basic_c2_names
from detectron2.utils import comm
from workers import run_in_processes


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 1)
        self.norm = nn.BatchNorm2d(3)


class Model(nn.Module):
    """Parameters named as those of a backbone below a detector."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.stem = Block()
        self.backbone.res2 = nn.ModuleList([Block()])
        self.head = nn.Linear(3, 4)
        self.register_buffer("pixel_mean", torch.zeros(3), persistent=False)


class Counter:
    """Something with a state, like a trainer."""

    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"iteration": self.value, "hooks": {"LRScheduler": {"last_epoch": self.value}}}

    def load_state_dict(self, state):
        self.value = state["iteration"]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


# ---- saving and resuming ----


def test_save_and_resume(tmp_path):
    model, trainer = Model(), Counter(7)
    checkpointer = DetectionCheckpointer(model, str(tmp_path), trainer=trainer)
    assert not checkpointer.has_checkpoint() and checkpointer.get_checkpoint_file() == ""
    checkpointer.save("model_0000007", iteration=7, note={"scores": 0.5, "name": "x"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "model_0000007.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000007.pth"

    other, other_trainer = Model(), Counter()
    resumed = DetectionCheckpointer(other, str(tmp_path), trainer=other_trainer)
    assert resumed.has_checkpoint()
    rest = resumed.resume_or_load("ignored.pth", resume=True)
    assert same(model, other) and other_trainer.value == 7
    assert rest["iteration"] == 7 and rest["note"] == {"scores": 0.5, "name": "x"}


def test_load_without_resuming_takes_the_model_only(tmp_path):
    model = Model()
    (tmp_path / "a").mkdir()
    DetectionCheckpointer(model, str(tmp_path / "a"), trainer=Counter(9)).save("final")
    other, trainer = Model(), Counter()
    checkpointer = DetectionCheckpointer(other, str(tmp_path / "b"), trainer=trainer)
    for resume in (False, True):  # there is nothing to resume from
        checkpointer.resume_or_load(str(tmp_path / "a" / "final.pth"), resume=resume)
        assert same(model, other) and trainer.value == 0
    assert checkpointer.load("") == {}


def test_wrapped_models_are_saved_without_prefix(tmp_path):
    model = Model()
    DetectionCheckpointer(nn.DataParallel(model), str(tmp_path)).save("a")
    assert sorted(torch.load(tmp_path / "a.pth", weights_only=True)["model"]) == sorted(model.state_dict())
    torch.save({"model": {f"module.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "b.pth")
    other = Model()
    DetectionCheckpointer(other).load(str(tmp_path / "b.pth"))
    assert same(model, other)


def test_periodic_checkpoints_can_be_limited_in_number(tmp_path):
    checkpointer = PeriodicCheckpointer(DetectionCheckpointer(Model(), str(tmp_path)), 2, max_iter=9, max_to_keep=2)
    for iteration in range(9):
        checkpointer.step(iteration)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["last_checkpoint", "model_0000005.pth", "model_0000007.pth", "model_final.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_nothing_is_saved_when_told_so(tmp_path):
    DetectionCheckpointer(Model(), str(tmp_path), save_to_disk=False).save("a")
    DetectionCheckpointer(Model()).save("a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.embedded_only
def test_a_name_with_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="folder"):
        DetectionCheckpointer(Model(), str(tmp_path)).save("a/b")


@pytest.mark.embedded_only
def test_an_interrupted_save_loses_nothing(tmp_path, monkeypatch):
    model = Model()
    checkpointer = DetectionCheckpointer(model, str(tmp_path))
    checkpointer.save("model")
    before = (tmp_path / "model.pth").read_bytes()

    def interrupted(data, file):
        file.write(b"PK\x03\x04 half of it")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        with pytest.raises(OSError, match="No space"):
            checkpointer.save("model")
        with pytest.raises(OSError, match="No space"):
            checkpointer.save("next")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "model.pth"]
    assert (tmp_path / "model.pth").read_bytes() == before
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model.pth")


@pytest.mark.embedded_only
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "zeros", "untagged"])
def test_resuming_takes_the_newest_intact_file(tmp_path, caplog, damage):
    models = [Model() for _ in range(3)]
    for number, model in enumerate(models):
        DetectionCheckpointer(model, str(tmp_path), trainer=Counter(number)).save(f"model_{number}")
        when = time.time() - 100 + number
        os.utime(tmp_path / f"model_{number}.pth", (when, when))
    last = tmp_path / "model_2.pth"
    raw = last.read_bytes()
    if damage == "truncated":
        last.write_bytes(raw[: len(raw) * 2 // 3])
    elif damage in ("empty", "zeros"):
        last.write_bytes(b"" if damage == "empty" else b"\x00" * len(raw))
    elif damage == "missing":
        last.unlink()
    else:  # the file that names the last one was written by half
        (tmp_path / "last_checkpoint").write_text("")
        last.unlink()
    (tmp_path / ".model_3.pth.1.incomplete").write_bytes(raw[:100])  # left by a process that was killed
    model, trainer = Model(), Counter()
    DetectionCheckpointer(model, str(tmp_path), trainer=trainer).resume_or_load("", resume=True)
    assert same(model, models[1]) and trainer.value == 1
    assert "resuming from" in caplog.text and "model_1.pth" in caplog.text


@pytest.mark.embedded_only
def test_nothing_intact_to_resume_from(tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_5.pth")
    (tmp_path / "model_5.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(FileNotFoundError, match="cannot resume: .*model_5.pth"):
        DetectionCheckpointer(Model(), str(tmp_path)).resume_or_load("")


@pytest.mark.embedded_only
def test_what_killed_processes_left_goes_with_the_next_checkpoint(tmp_path):
    left, being_written = tmp_path / ".model_3.pth.1.incomplete", tmp_path / ".model_4.pth.2.incomplete"
    for path in (left, being_written):
        path.write_bytes(b"PK")
    os.utime(left, (time.time() - 7200,) * 2)
    DetectionCheckpointer(Model(), str(tmp_path)).save("model_5")
    assert {path.name for path in tmp_path.iterdir()} == {being_written.name, "model_5.pth", "last_checkpoint"}


# ---- formats ----


def arrays(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("how", ["model in pth", "bare pth", "detectron2 pkl"])
def test_formats(tmp_path, how):
    model = Model()
    if how == "model in pth":
        path = tmp_path / "m.pth"
        torch.save({"model": model.state_dict(), "iteration": 3}, path)
    elif how == "bare pth":
        path = tmp_path / "m.pt"
        torch.save(model.state_dict(), path)
    else:
        path = tmp_path / "m.pkl"
        path.write_bytes(pickle.dumps({"model": arrays(model), "__author__": "somebody"}))
    other = Model()
    rest = DetectionCheckpointer(other).load(str(path))
    assert same(model, other)
    assert rest == {"model in pth": {"iteration": 3}, "bare pth": {}, "detectron2 pkl": {"__author__": "somebody"}}[how]


@pytest.mark.embedded_only
def test_numpy_safetensors_and_pycls(tmp_path):
    model = Model()
    DetectionCheckpointer(model, str(tmp_path)).save("own", score=np.float64(0.5), array=np.arange(3))
    rest = DetectionCheckpointer(Model()).load(str(tmp_path / "own.pth"))
    assert rest["score"] == 0.5 and rest["array"].tolist() == [0, 1, 2]
    torch.save({"model": arrays(model)}, tmp_path / "arrays.pth")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "m.safetensors")
    torch.save({"model_state": {**model.state_dict(), "x.num_batches_tracked": torch.tensor(1)}}, tmp_path / "m.pyth")
    for name in ("arrays.pth", "m.safetensors", "m.pyth"):
        other = Model()
        DetectionCheckpointer(other).load(str(tmp_path / name))
        assert same(model, other), name


def test_backbone_pickles_ask_for_matching_themselves(tmp_path):
    model = Model()
    weights = arrays(model.backbone)
    content = {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content))
    other = Model()
    head = other.head.weight.clone()
    DetectionCheckpointer(other).load(str(tmp_path / "R-50.pkl"))
    assert same(model.backbone, other.backbone) and torch.equal(other.head.weight, head)


def test_caffe2_pickles(tmp_path):
    model = Model()
    blobs = {
        "conv1_w": np.random.rand(3, 2, 1, 1).astype("float32"),
        "res2_0_branch2a_w": np.random.rand(3, 2, 1, 1).astype("float32"),
        "conv1_w_momentum": np.zeros(3),
    }
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    DetectionCheckpointer(model).load(str(tmp_path / "R-50.pkl"))
    assert np.array_equal(model.backbone.stem.conv1.weight.detach().numpy(), blobs["conv1_w"])
    assert np.array_equal(model.backbone.res2[0].conv1.weight.detach().numpy(), blobs["res2_0_branch2a_w"])


def test_mismatches_are_reported_and_the_rest_is_loaded(tmp_path, caplog):
    model = Model()
    state = model.state_dict()
    state["head.weight"] = torch.rand(9, 3)
    del state["head.bias"]
    state["extra.weight"] = torch.rand(1)
    torch.save({"model": state}, tmp_path / "m.pth")
    other = Model()
    weight = other.head.weight.clone()
    DetectionCheckpointer(other).load(str(tmp_path / "m.pth"))
    assert same(model.backbone, other.backbone) and torch.equal(other.head.weight, weight)
    text = caplog.text
    assert "head.weight" in text and "(9, 3)" in text and "(4, 3)" in text
    assert re.search(r"head\.\S*bias", text) and "extra" in text
    assert "pixel_mean" not in text


@pytest.mark.embedded_only
def test_load_errors(tmp_path):
    checkpointer = DetectionCheckpointer(Model())
    with pytest.raises(FileNotFoundError, match=r"gone\.pth does not exist"):
        checkpointer.load(str(tmp_path / "gone.pth"))
    torch.save({"model": torch.rand(2)}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"m\.pth: its entry 'model' is a Tensor"):
        checkpointer.load(str(tmp_path / "m.pth"))
    with pytest.raises(ValueError, match="unknown option matching"):
        checkpointer.load(str(tmp_path / "m.pth?matching=True"))
    with pytest.raises(ValueError, match="must be True or False, got 'yes'"):
        checkpointer.load(str(tmp_path / "m.pth?matching_heuristics=yes"))
    torch.save({"model": {}, "cfg": nn.Linear(1, 1)}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"code\.pth refers to torch\.nn\.modules\.linear\.Linear"):
        checkpointer.load(str(tmp_path / "code.pth"))
    torch.save({"state_dict": Model().state_dict()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth is no checkpoint of Detectron2: its entry 'state_dict' is a Ordered"):
        checkpointer.load(str(tmp_path / "other.pth"))
    for name, content in (("e.pth", {"model": {}}), ("e.pkl", {"blobs": {"iteration": 3}})):
        (torch.save if name == "e.pth" else lambda c, path: path.write_bytes(pickle.dumps(c)))(content, tmp_path / name)
        with pytest.raises(ValueError, match="holds no weights"):
            checkpointer.load(str(tmp_path / name))


@pytest.mark.embedded_only
def test_pickle_of_a_model_without_author(tmp_path):
    """It is no file of Caffe2, whose weights lie at the top or under 'blobs'."""
    source, model = Model(), Model()
    weights = {name: value.numpy() for name, value in source.state_dict().items()}
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"model": weights}))
    DetectionCheckpointer(model).load(str(tmp_path / "plain.pkl"))
    assert same(source, model)


# ---- matching of names ----


def brute_force_match(model_keys, checkpoint_keys):
    """The longest checkpoint key that is a dotted suffix, by comparing all with all."""
    matches = {}
    for key in model_keys:
        fitting = [other for other in checkpoint_keys if key == other or key.endswith("." + other)]
        if fitting:
            matches[key] = max(fitting, key=len)
    return matches


def test_matching_equals_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(20):
        words = ["a", "b", "ab", "c1", "weight"]
        model_keys = {".".join(rng.choice(words, rng.integers(2, 6))) for _ in range(12)}
        checkpoint_keys = {".".join(rng.choice(words, rng.integers(1, 4))) for _ in range(12)}
        expected = brute_force_match(model_keys, checkpoint_keys)
        model = {key: torch.zeros(2) for key in model_keys}
        checkpoint = {key: torch.full((2,), float(index)) for index, key in enumerate(sorted(checkpoint_keys))}
        if len(set(expected.values())) < len(expected):
            with pytest.raises(ValueError):
                align_and_update_state_dicts(model, checkpoint, c2_conversion=False)
            continue
        result = align_and_update_state_dicts(model, checkpoint, c2_conversion=False)
        for key, source in expected.items():
            assert result[key] is checkpoint[source]
        for source in checkpoint_keys - set(expected.values()):
            assert result[source] is checkpoint[source]


def test_ambiguity_names_the_entries():
    model = {"x.head.weight": torch.zeros(1), "y.head.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="(?i)multiple|both 'x.head.weight' and 'y.head.weight'"):
        align_and_update_state_dicts(model, {"head.weight": torch.zeros(1)})


def test_other_shapes_are_left_out(caplog):
    model = {"a.fc.weight": torch.zeros(2, 2), "b.conv.weight": torch.zeros(3)}
    checkpoint = {"fc.weight": torch.zeros(5, 2), "conv.weight": torch.ones(3)}
    result = align_and_update_state_dicts(model, checkpoint)
    assert result["b.conv.weight"] is checkpoint["conv.weight"] and "a.fc.weight" not in result
    assert "fc.weight" in caplog.text and "5, 2" in caplog.text


def test_caffe2_names():
    names = {
        "conv1_w": "stem.conv1.weight",
        "res_conv1_bn_s": "stem.conv1.norm.weight",
        "res_conv1_bn_riv": "stem.conv1.norm.running_var",
        "conv1_gn_b": "stem.conv1.norm.bias",
        "res2_0_branch1_w": "res2.0.shortcut.weight",
        "res2_0_branch1_bn_rm": "res2.0.shortcut.norm.running_mean",
        "res4_22_branch2c_bn_b": "res4.22.conv3.norm.bias",
        "res5_1_branch2b_w": "res5.1.conv2.weight",
        "fc1000_b": "fc1000.bias",
        "pred_w": "linear.weight",
        "res3.1.conv2.norm.weight": "res3.1.conv2.norm.weight",
    }
    assert convert_basic_c2_names(list(names)) == list(names.values())


# ---- several processes, of which one sees the file ----


def worker(folder):
    import detectron2.checkpoint.detection_checkpoint as module

    rank = comm.get_rank()
    torch.manual_seed(rank)
    model, trainer = nn.Linear(3, 4), Counter()
    own_folder = f"{folder}/machine_{rank}"
    checkpointer = module.DetectionCheckpointer(nn.parallel.DistributedDataParallel(model), own_folder, trainer=trainer)
    rest = checkpointer.resume_or_load("", resume=True)
    return {"weight": model.weight.detach(), "rest": rest, "trainer": trainer.value}


@pytest.mark.embedded_only
def test_the_main_process_sends_what_others_cannot_see(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for rank in range(2):
        (tmp_path / f"machine_{rank}").mkdir()
    model = nn.Linear(3, 4)
    DetectionCheckpointer(model, str(tmp_path / "machine_0"), trainer=Counter(5)).save("model", iteration=5)
    for result in run_in_processes(worker, 2, tmp_path, str(tmp_path)):
        assert torch.equal(result["weight"], model.weight)
        assert result["trainer"] == 5 and result["rest"] == {"iteration": 5}
