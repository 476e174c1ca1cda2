"""Every published layout of a checkpoint loads exactly, decided by its keys alone."""

import copy
import pickle
import re
import runpy
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from mask2former_plugin.checkpoint import Checkpointer
from mask2former_plugin.checkpoint.huggingface import load_hf_config
from mask2former_plugin.checkpoint.layouts import fit_names, torchvision_name, unwrap
from mask2former_plugin.detectron2_runtime import is_embedded

TOOLS = Path(__file__).parents[2] / "tools"


def assert_equal_states(found, expected):
    assert list(found) == list(expected)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == []


# ---- layouts of MaskFormer and Mask2Former ----


def present(name):
    return name


def without_pixel_decoder(name):
    return name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.")


def static_query(name):
    return name.replace("query_feat", "static_query")


def both(name):
    return static_query(without_pixel_decoder(name))


def write(path, state, metadata, version, container):
    """``container``: numpy or torch values in a pickle or a file of torch."""
    if metadata is not None:
        state = OrderedDict(state)
        state._metadata = copy.deepcopy(metadata)
        if version is not None:
            state._metadata["sem_seg_head.predictor"]["version"] = version
    if container == "numpy pickle":
        arrays = {name: value.numpy() for name, value in state.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))
    elif container == "torch pickle":
        path.write_bytes(pickle.dumps({"model": state, "__author__": "somebody"}))
    else:
        torch.save({"model": state, "iteration": 7}, path)


@pytest.mark.parametrize("loader", [Checkpointer, DetectionCheckpointer])
@pytest.mark.parametrize("rename", [present, without_pixel_decoder, static_query, both])
def test_published_layouts_load_exactly(small_config, random_model, load_fresh, tmp_path, rename, loader):
    cfg = small_config()
    wanted = random_model(cfg).state_dict()
    assert "sem_seg_head.predictor.query_feat.weight" in wanted
    state = {rename(name): value for name, value in wanted.items()}
    assert (state.keys() == wanted.keys()) == (rename is present)
    for number, (metadata, version, container) in enumerate(
        [
            (None, None, "numpy pickle"),
            (None, None, "torch pickle"),
            (None, None, "torch"),
            (wanted._metadata, None, "torch"),
            (wanted._metadata, 1, "torch pickle"),  # as the published Mask2Former files seem to be
        ]
    ):
        path = tmp_path / f"{number}.{'pkl' if 'pickle' in container else 'pth'}"
        write(path, state, metadata, version, container)
        model, _ = load_fresh(cfg, path, loader)
        assert_equal_states(model.state_dict(), wanted)


def test_maskformer_and_per_pixel_heads_of_the_old_layout(small_config, random_model, load_fresh, tmp_path):
    configs = [small_config("maskformer")]
    per_pixel = ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NAME"]
    configs.append(small_config("maskformer", "resnet", *per_pixel, "PerPixelBaselineHead"))
    plus = [*per_pixel, "PerPixelBaselinePlusHead", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 3]
    configs.append(small_config("maskformer", "resnet", *plus))
    for cfg in configs:
        wanted = random_model(cfg).state_dict()
        torch.save({without_pixel_decoder(name): value for name, value in wanted.items()}, tmp_path / "old.pth")
        model, loader = load_fresh(cfg, tmp_path / "old.pth", Checkpointer)
        assert_equal_states(model.state_dict(), wanted)
        assert not loader.report


def test_weights_under_other_wrappers(small_config, random_model, load_fresh, tmp_path):
    cfg = small_config()
    wanted = random_model(cfg).state_dict()
    contents = {
        "bare": dict(wanted),
        "state_dict": {"state_dict": dict(wanted), "meta": {"epoch": 3}},
        "parallel": {"model": {f"module.{name}": value for name, value in wanted.items()}},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pth")
        model, _ = load_fresh(cfg, tmp_path / f"{name}.pth", Checkpointer)
        assert_equal_states(model.state_dict(), wanted)
    with pytest.raises(ValueError, match="entry 'model' of the checkpoint is a list, not a dictionary of weights"):
        unwrap({"model": [1, 2]})


# ---- ImageNet ResNets ----


def expected_torchvision_pairs():
    """torchvision's names and ours, ResNet-50."""
    norm = ("weight", "bias", "running_mean", "running_var")
    pairs = [("conv1.weight", "stem.conv1.weight"), *((f"bn1.{k}", f"stem.conv1.norm.{k}") for k in norm)]
    for layer, res, depth in ((1, 2, 3), (2, 3, 4), (3, 4, 6), (4, 5, 3)):
        for block in range(depth):
            theirs, ours = f"layer{layer}.{block}", f"res{res}.{block}"
            for conv in (1, 2, 3):
                pairs.append((f"{theirs}.conv{conv}.weight", f"{ours}.conv{conv}.weight"))
                pairs += [(f"{theirs}.bn{conv}.{k}", f"{ours}.conv{conv}.norm.{k}") for k in norm]
        pairs.append((f"layer{layer}.0.downsample.0.weight", f"res{res}.0.shortcut.weight"))
        pairs += [(f"layer{layer}.0.downsample.1.{k}", f"res{res}.0.shortcut.norm.{k}") for k in norm]
    return pairs


@pytest.fixture
def torchvision_weights(small_config):
    """A ResNet-50 of few channels as torchvision stores it, and its weights under our names."""
    backbone = build_model(small_config("maskformer", "resnet")).backbone.state_dict()
    ours = {name: torch.rand(value.shape) for name, value in backbone.items()}
    theirs = {name: ours[our_name] for name, our_name in expected_torchvision_pairs()}
    assert len(theirs) == len(ours) == 265
    for name in [name for name in theirs if name.endswith("running_mean")]:
        theirs[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(5)
    theirs["fc.weight"], theirs["fc.bias"] = torch.rand(10, 64), torch.rand(10)
    return theirs, ours


def run_tool(name, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(TOOLS / name), run_name="__main__")


def test_torchvision_resnets_load_as_they_are_and_converted(small_config, torchvision_weights, load_fresh, tmp_path):
    theirs, ours = torchvision_weights
    torch.save(theirs, tmp_path / "resnet50.pth")
    run_tool("convert-torchvision-to-d2.py", tmp_path / "resnet50.pth", tmp_path / "R-50.pkl")
    cfg = small_config("mask2former", "resnet")
    for loader, name in (
        (Checkpointer, "resnet50.pth"),
        (Checkpointer, "R-50.pkl"),
        (DetectionCheckpointer, "R-50.pkl"),
    ):
        model, checkpointer = load_fresh(cfg, tmp_path / name, loader)
        assert_equal_states(model.backbone.state_dict(), ours)
        if loader is Checkpointer:
            assert not checkpointer.report.unexpected and not checkpointer.report.wrong_shape
            heads = {name for name, _ in model.named_parameters() if name.startswith("sem_seg_head.")}
            assert set(checkpointer.report.missing) == heads


def test_torchvision_tool_writes_the_format_of_the_originals(torchvision_weights, tmp_path):
    theirs, ours = torchvision_weights
    torch.save(theirs, tmp_path / "resnet50.pth")
    run_tool("convert-torchvision-to-d2.py", tmp_path / "resnet50.pth", tmp_path / "R-50.pkl")
    content = pickle.loads((tmp_path / "R-50.pkl").read_bytes())
    assert {key: value for key, value in content.items() if key != "model"} == {
        "__author__": "torchvision",
        "matching_heuristics": True,
    }
    arrays = content["model"]
    assert all(isinstance(value, np.ndarray) for value in arrays.values())
    assert {"stem.fc.weight", "stem.fc.bias", "res2.0.shortcut.norm.num_batches_tracked"} < arrays.keys()
    assert all(np.array_equal(arrays[name], value.numpy()) for name, value in ours.items())
    with pytest.raises(SystemExit):
        torch.save({"patch_embed.proj.weight": torch.zeros(1)}, tmp_path / "swin.pth")
        run_tool("convert-torchvision-to-d2.py", tmp_path / "swin.pth", tmp_path / "x.pkl")


@pytest.mark.parametrize(
    ("tool", "name"),
    [
        ("convert-torchvision-to-d2.py", "layer1.0.conv1.weight"),
        ("convert-pretrained-swin-model-to-d2.py", "patch_embed.proj.weight"),
    ],
)
def test_converters_say_in_one_sentence_what_is_wrong(tmp_path, tool, name):
    with pytest.raises(SystemExit, match="error: checkpoint .*gone.pth does not exist"):
        run_tool(tool, tmp_path / "gone.pth", tmp_path / "x.pkl")
    (tmp_path / "page.pth").write_text("some text")
    with pytest.raises(SystemExit, match="error: .*page.pth is no checkpoint"):
        run_tool(tool, tmp_path / "page.pth", tmp_path / "x.pkl")
    torch.save({one: torch.zeros(1, 1, 1, 1) for one in (name, "conv1.weight")}, tmp_path / "model.pth")
    with pytest.raises(SystemExit, match="error: .*No such file"):
        run_tool(tool, tmp_path / "model.pth", tmp_path / "gone" / "x.pkl")


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone does not exist; it should be the folder of a Hugging Face"):
        load_hf_config(tmp_path / "gone")


def test_batch_norm_of_its_own_keeps_its_counters(small_config, torchvision_weights, load_fresh, tmp_path):
    theirs, ours = torchvision_weights
    torch.save(theirs, tmp_path / "resnet50.pth")
    cfg = small_config("mask2former", "resnet", "MODEL.RESNETS.NORM", "BN")
    model, checkpointer = load_fresh(cfg, tmp_path / "resnet50.pth", Checkpointer)
    state = model.backbone.state_dict()
    assert all(torch.equal(state[name], value) for name, value in ours.items())
    assert state["res3.1.conv2.norm.num_batches_tracked"] == 5


def test_backbone_alone_and_inside_another_module(torchvision_weights, small_config, tmp_path):
    theirs, ours = torchvision_weights
    torch.save(theirs, tmp_path / "resnet50.pth")
    backbone = build_model(small_config("maskformer", "resnet")).backbone
    checkpointer = Checkpointer(backbone)
    checkpointer.load(str(tmp_path / "resnet50.pth"))
    assert not checkpointer.report
    assert_equal_states(backbone.state_dict(), ours)
    whole = build_model(small_config("mask2former", "resnet"))
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    Checkpointer(backbone).load(str(tmp_path / "whole.pth"))
    assert_equal_states(backbone.state_dict(), whole.backbone.state_dict())
    names = [f"backbone.bottom_up.{name}" for name in ours]
    fitted, translated = fit_names(theirs, names)
    assert translated and set(fitted) == set(names)
    twice = [f"{side}.{name}" for side in ("left", "right") for name in ours]
    assert not fit_names(ours, twice)[1]  # nobody knows which; Detectron2's matching reports it


def test_caffe2_resnet_without_its_suffix(small_config, load_fresh, tmp_path):
    cfg = small_config("mask2former", "resnet")
    state = build_model(cfg).backbone.state_dict()
    wanted = {name: torch.rand(value.shape) for name, value in state.items() if name.startswith(("stem", "res2.0"))}
    kinds = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
    branches = {"conv1": "2a", "conv2": "2b", "conv3": "2c", "shortcut": "1"}
    blobs = {"fc1000_w": np.zeros((2, 2), np.float32), "conv1_w_momentum": np.zeros(3)}
    for name, value in wanted.items():
        stem = re.fullmatch(r"stem\.conv1\.(norm\.)?(\w+)", name)
        block = re.fullmatch(r"res2\.0\.(\w+)\.(norm\.)?(\w+)", name)
        if stem:
            key = f"res_conv1_bn_{kinds[stem[2]]}" if stem[1] else "conv1_w"
        else:
            key = f"res2_0_branch{branches[block[1]]}_" + (f"bn_{kinds[block[3]]}" if block[2] else "w")
        blobs[key] = value.numpy()
    (tmp_path / "R-50.weights").write_bytes(pickle.dumps({"blobs": blobs}))
    with open(tmp_path / "R-50.pkl", "wb") as file:
        pickle.dump({"blobs": blobs}, file, protocol=2)
    for name in ("R-50.weights", "R-50.pkl"):
        model, _ = load_fresh(cfg, tmp_path / name, Checkpointer)
        assert all(torch.equal(model.backbone.state_dict()[key], value) for key, value in wanted.items())


def test_the_query_for_matching_heuristics(small_config, random_model, tmp_path):
    model = random_model(small_config())
    wanted = model.sem_seg_head.state_dict()
    torch.save({f"other.{name}": value for name, value in wanted.items()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="another architecture"):
        Checkpointer(model).load(str(tmp_path / "other.pth"))
    torch.save(dict(wanted), tmp_path / "head.pth")
    fresh = build_model(small_config())
    Checkpointer(fresh).load(f"{tmp_path / 'head.pth'}?matching_heuristics=True")
    assert_equal_states(fresh.sem_seg_head.state_dict(), wanted)


# ---- Swin releases ----


@pytest.fixture
def swin_release(small_config):
    """A Swin Transformer as released, trained to classify, and what of it is ours."""
    state = build_model(small_config()).backbone.state_dict()
    kept = {name: value for name, value in state.items() if not re.match(r"norm\d\.", name)}
    ours = {name: torch.rand(v.shape) if v.is_floating_point() else v for name, v in kept.items()}
    leftovers = {
        "norm.weight": torch.rand(64),
        "norm.bias": torch.rand(64),
        "head.weight": torch.rand(10, 64),
        "head.bias": torch.rand(10),
        "layers.1.blocks.1.attn_mask": torch.rand(4, 16, 16),
    }
    return {**ours, **leftovers}, ours


def test_swin_releases_load_as_they_are_and_converted(small_config, swin_release, load_fresh, tmp_path):
    released, ours = swin_release
    torch.save({"model": released}, tmp_path / "swin.pth")
    torch.save({"state_dict": {f"backbone.{name}": value for name, value in released.items()}}, tmp_path / "prefix.pth")
    run_tool("convert-pretrained-swin-model-to-d2.py", tmp_path / "swin.pth", tmp_path / "swin.pkl")
    content = pickle.loads((tmp_path / "swin.pkl").read_bytes())
    assert content.keys() == {"model", "__author__", "matching_heuristics"}
    assert content["__author__"] == "third_party" and content["matching_heuristics"] is True
    assert_equal_states(content["model"], released)
    # 24 = HIDDEN_DIM and 64 = width of the last stage differ; equal ones must not confuse anybody
    for cfg in (small_config(), small_config("mask2former", "swin", "MODEL.MASK_FORMER.HIDDEN_DIM", 64)):
        for name in ("swin.pth", "swin.pkl", "prefix.pth"):
            model, checkpointer = load_fresh(cfg, tmp_path / name, Checkpointer)
            state = model.backbone.state_dict()
            assert all(torch.equal(state[key], value) for key, value in ours.items())
            rest = state.keys() - ours.keys()
            assert rest == {f"norm{stage}.{kind}" for stage in range(4) for kind in ("weight", "bias")}
            assert all((state[key] == 7).all() for key in rest)
            assert all((value == 7).all() for _, value in model.sem_seg_head.named_parameters())
            if name != "prefix.pth":
                assert not checkpointer.report.unexpected


def test_swin_tool_refuses_other_files(tmp_path, capsys):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(SystemExit):
        run_tool("convert-pretrained-swin-model-to-d2.py", tmp_path / "resnet.pth", tmp_path / "x.pkl")
    assert "is no Swin release" in capsys.readouterr().err
    assert not (tmp_path / "x.pkl").exists()


def test_torchvision_names_of_deeper_and_basic_networks():
    assert torchvision_name("layer3.22.bn3.running_var") == "res4.22.conv3.norm.running_var"
    assert torchvision_name("layer2.0.downsample.1.bias") == "res3.0.shortcut.norm.bias"
    assert torchvision_name("layer4.1.conv2.weight") == "res5.1.conv2.weight"
    assert torchvision_name("fc.bias") == "stem.fc.bias"


@pytest.mark.skipif(not is_embedded(), reason="upstream's own loader unpickles what it wants")
def test_nothing_is_unpickled_with_code(small_config, tmp_path):
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"model": {"x": Path("/")}}))
    model = build_model(small_config())
    for loader in (Checkpointer, DetectionCheckpointer):
        with pytest.raises(ValueError, match="bad.pkl refers to pathlib"):
            loader(model).load(str(tmp_path / "bad.pkl"))
