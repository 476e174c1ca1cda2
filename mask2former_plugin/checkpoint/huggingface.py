"""Hugging Face checkpoints of MaskFormer and Mask2Former: folders of weights and configs, read and written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from mask2former_plugin.checkpoint.huggingface_config import (
    class_names,
    from_hf_config,
    to_hf_config,
    to_hf_preprocessor,
)
from mask2former_plugin.checkpoint.huggingface_names import from_detectron2, is_huggingface, to_detectron2
from mask2former_plugin.serialization import CheckpointFileError, load_checkpoint_file

__all__ = [
    "FILES",
    "class_names",
    "from_detectron2",
    "from_hf_config",
    "is_huggingface",
    "load_hf_config",
    "read_weights",
    "save_pretrained",
    "to_detectron2",
    "to_hf_config",
    "to_hf_preprocessor",
    "weight_file",
]

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
WEIGHTS = "model.safetensors"
FILES = (WEIGHTS, CONFIG, PREPROCESSOR)  # what save_pretrained writes
_INDEX = ".index.json"
# in the order in which transformers looks for them
_WEIGHT_FILES = (WEIGHTS, WEIGHTS + _INDEX, "pytorch_model.bin", "pytorch_model.bin" + _INDEX)


def weight_file(folder: str | os.PathLike) -> Path:
    """The file in a Hugging Face folder that holds the weights, or lists the files that hold them.

    Raises:
        FileNotFoundError: there is none.
    """
    for name in _WEIGHT_FILES:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise FileNotFoundError(
        f"the folder {os.fspath(folder)} holds no weights; a Hugging Face checkpoint has one of "
        f"{', '.join(_WEIGHT_FILES)}"
    )


def read_weights(path: str | os.PathLike) -> dict[str, Any]:
    """Content of a checkpoint file of any kind; the files that an index lists become one dictionary.

    Raises:
        FileNotFoundError: the file, or one that the index lists, does not exist.
        CheckpointFileError: a file is damaged or no checkpoint, or lacks weights that the index promises.
    """
    path = Path(path)
    if not path.name.endswith(_INDEX):
        return load_checkpoint_file(path)
    places = _read_json(path).get("weight_map")
    if not isinstance(places, Mapping):
        raise CheckpointFileError(f"{path} is no index of weights: it has no weight_map")
    result: dict[str, Any] = {}
    for name in sorted(set(places.values())):
        result.update(load_checkpoint_file(path.parent / name))
    missing = sorted(places.keys() - result.keys())
    if missing:
        raise CheckpointFileError(f"the files that {path} lists lack {len(missing)} of its weights, e.g. {missing[0]}")
    return result


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointFileError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointFileError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def load_hf_config(path: str | os.PathLike) -> CfgNode:
    """Our config of a Hugging Face checkpoint, see :func:`from_hf_config`, with ``MODEL.WEIGHTS`` set if there are any.

    Args:
        path: the folder, or its ``config.json``.

    Raises:
        FileNotFoundError: there is no ``config.json``.
        ValueError: it describes a model that does not exist here.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; it should be the folder of a Hugging Face checkpoint")
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"the folder {folder} has no {CONFIG}; it is no Hugging Face checkpoint")
    preprocessor = folder / PREPROCESSOR
    cfg = from_hf_config(_read_json(folder / CONFIG), _read_json(preprocessor) if preprocessor.is_file() else None)
    if any((folder / name).is_file() for name in _WEIGHT_FILES):
        cfg.MODEL.WEIGHTS = str(folder)
    return cfg


def save_pretrained(model: nn.Module, cfg: CfgNode, folder: str | os.PathLike) -> None:
    """Write a model of ours as Hugging Face's ``from_pretrained`` reads it.

    Args:
        model: a MaskFormer or Mask2Former on any device.
        cfg: its config; class names come from the metadata of its datasets.
        folder: is created; gets ``model.safetensors``, ``config.json`` and ``preprocessor_config.json``.

    Raises:
        ValueError: Hugging Face has no such model; the text names the config key or the weight.
    """
    from safetensors.torch import save_file

    # everything that can fail comes before the first file
    config, preprocessor = to_hf_config(cfg), to_hf_preprocessor(cfg)
    weights = {name: _separate(value) for name, value in from_detectron2(model.state_dict()).items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    incomplete = folder / f".{WEIGHTS}.{os.getpid()}.incomplete"
    try:
        save_file(weights, incomplete, metadata={"format": "pt"})
        os.replace(incomplete, folder / WEIGHTS)
    finally:
        incomplete.unlink(missing_ok=True)
    for name, content in ((CONFIG, config), (PREPROCESSOR, preprocessor)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _separate(tensor: Tensor) -> Tensor:
    """A copy on the CPU that shares no memory, as safetensors asks for."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
