"""Hugging Face folders: whole, in shards, damaged; as config and weights of the tools; written by us."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mask2former_plugin.checkpoint import Checkpointer
from mask2former_plugin.checkpoint.huggingface import load_hf_config, read_weights, save_pretrained, weight_file
from mask2former_plugin.checkpoint.huggingface_names import from_detectron2
from mask2former_plugin.config import load_config
from mask2former_plugin.engine import check_config, load_for_evaluation

TOOL = Path(__file__).parents[2] / "tools/convert_checkpoint.py"


@pytest.fixture
def saved(small_config, random_model, tmp_path):
    """A config, its random model, and the folder that it was saved to."""
    cfg = small_config()
    model = random_model(cfg)
    save_pretrained(model, cfg, tmp_path / "hf")
    return cfg, model, tmp_path / "hf"


def assert_same(model, other):
    state, wanted = other.state_dict(), model.state_dict()
    assert list(state) == list(wanted) and all(torch.equal(state[name], wanted[name]) for name in wanted)


def shard(folder, kind):
    """Split the weights of a folder into three files with an index, as safetensors or as files of torch."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    places = {name: f"{stem}-{number % 3 + 1:05d}-of-00003.{suffix}" for number, name in enumerate(sorted(weights))}
    for file in sorted(set(places.values())):
        part = {name: weights[name] for name in weights if places[name] == file}
        save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def test_what_is_written(saved):
    cfg, model, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    expected = from_detectron2(model.state_dict())
    written = load_file(folder / "model.safetensors")
    assert written.keys() == expected.keys() and all(torch.equal(written[name], expected[name]) for name in expected)
    assert json.loads((folder / "config.json").read_text())["num_queries"] == 5


def test_folder_file_and_shards_load(saved, load_fresh, tmp_path):
    cfg, model, folder = saved
    assert_same(model, load_fresh(cfg, folder, Checkpointer)[0])
    assert_same(model, load_fresh(cfg, f"{folder}/model.safetensors", Checkpointer)[0])
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    assert_same(model, load_fresh(cfg, tmp_path, Checkpointer)[0])
    for kind in ("safetensors", "bin"):
        other = tmp_path / kind
        other.mkdir()
        save_file(load_file(folder / "model.safetensors"), other / "model.safetensors")
        index = shard(other, kind)
        assert weight_file(other) == index
        assert_same(model, load_fresh(cfg, other, Checkpointer)[0])
        assert_same(model, load_fresh(cfg, index, Checkpointer)[0])


def test_damaged_folders(saved, tmp_path):
    _, _, folder = saved
    index = shard(folder, "safetensors")
    places = json.loads(index.read_text())["weight_map"]
    lost = folder / "model-00002-of-00003.safetensors"
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00003.safetensors does not exist"):
        read_weights(index)
    lost.write_bytes(content)
    index.write_text(json.dumps({"weight_map": {**places, "model.more": lost.name}}))
    with pytest.raises(ValueError, match="index.json lists lack 1 of its weights, e.g. model.more"):
        read_weights(index)
    for text, message in (("{}", "has no weight_map"), ("[]", "holds a list"), ("{", "is no JSON")):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_weights(index)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no weights; .* model.safetensors, "):
        weight_file(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="empty has no config.json"):
        load_config(tmp_path / "empty")


def test_folder_as_config_and_as_weights(saved):
    cfg, model, folder = saved
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 64, "longest_edge": 99}}))
    for path in (folder, str(folder / "config.json")):
        loaded = load_config(path, ["MODEL.DEVICE", "cpu", "INPUT.MAX_SIZE_TEST", 100])
        assert (loaded.INPUT.MIN_SIZE_TEST, loaded.INPUT.MAX_SIZE_TEST) == (64, 100)
        assert loaded.MODEL.WEIGHTS == str(folder)
        check_config(loaded, training=False)
        fresh = build_model(loaded)
        load_for_evaluation(fresh, loaded)
        assert_same(model, fresh)
    assert load_config("").MODEL.WEIGHTS == load_config().MODEL.WEIGHTS  # the working folder is no config
    loaded.MODEL.WEIGHTS = str(folder / "nothing")
    with pytest.raises(FileNotFoundError, match="MODEL.WEIGHTS: .*nothing does not exist"):
        check_config(loaded, training=False)
    (folder / "model.safetensors").unlink()
    assert load_hf_config(folder).MODEL.WEIGHTS == ""


def test_nothing_is_written_when_they_lack_the_model(small_config, random_model, tmp_path):
    cfg = small_config("maskformer")
    cfg.MODEL.MASK_FORMER.ENC_LAYERS = 1
    with pytest.raises(ValueError, match="MODEL.MASK_FORMER.ENC_LAYERS is 1"):
        save_pretrained(random_model(cfg), cfg, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


# ---- the tool ----


def convert(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(TOOL), *map(str, words)])
        runpy.run_path(str(TOOL), run_name="__main__")


@pytest.mark.parametrize("family", ["mask2former", "maskformer"])
def test_tool_there_and_back(small_config, random_model, tmp_path, family, capsys):
    cfg = small_config(family)
    model = random_model(cfg)
    save_pretrained(model, cfg, tmp_path / "hf")
    convert("--from-huggingface", tmp_path / "hf", tmp_path / "ours")
    config = tmp_path / "ours/config.yaml"
    assert capsys.readouterr().out.splitlines()[-2:] == [
        str(tmp_path / "ours/model.pth"),
        str(config),
    ]  # after any logs
    loaded = load_config(config)
    assert loaded.MODEL.WEIGHTS == str(tmp_path / "ours/model.pth") and loaded.MODEL.DEVICE == "cuda"
    state = torch.load(loaded.MODEL.WEIGHTS)["model"]
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())

    # from the layout of the oldest published files, too
    old = {name.replace("pixel_decoder.", "").replace("query_feat", "static_query"): v for name, v in state.items()}
    torch.save({"model": old}, tmp_path / "old.pth")
    for source in ("ours/model.pth", "old.pth"):
        options = ["--config-file", config, "--opts", "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT", "0.25"]
        convert("--to-huggingface", tmp_path / source, tmp_path / "again", *options)
        first, second = load_file(tmp_path / "hf/model.safetensors"), load_file(tmp_path / "again/model.safetensors")
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        written = json.loads((tmp_path / "again/config.json").read_text())
        assert written == {**json.loads((tmp_path / "hf/config.json").read_text()), "no_object_weight": 0.25}
        (tmp_path / "again/model.safetensors").unlink()


def test_tool_errors_are_one_sentence(saved, tmp_path, capsys):
    _, _, folder = saved
    with pytest.raises(SystemExit):
        convert("--to-huggingface", folder, tmp_path / "x")
    assert "--to-huggingface needs the --config-file" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="error: the folder .* has no config.json"):
        convert("--from-huggingface", tmp_path, tmp_path / "x")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "class_predictor" not in name}, folder / "model.safetensors"
    )
    with pytest.raises(SystemExit, match="error: the model would be used with random weights"):
        convert("--from-huggingface", folder, tmp_path / "x")
    assert not (tmp_path / "x").exists()
