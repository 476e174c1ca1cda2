"""Fits the parameter names of foreign checkpoints to those of a model."""

from __future__ import annotations

import logging
import os.path
import re
from collections.abc import Mapping
from typing import Any

import torch

# Caffe2's names of ResNets; each rule applies to the result of the rules before.
_CAFFE2_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^pred_", "linear_"),
        (r"_(?:bn|gn)_s$", "_norm.weight"),
        (r"_(?:bn|gn)_b$", "_norm.bias"),
        (r"_(?:bn|gn)_rm$", "_norm.running_mean"),
        (r"_(?:bn|gn)_riv$", "_norm.running_var"),
        (r"_w$", ".weight"),
        (r"_b$", ".bias"),
        (r"_norm\.", ".norm."),
        (r"^(?:res_)?conv1\.", "stem.conv1."),
        (r"^res(\d+)_(\d+)_branch1\.", r"res\1.\2.shortcut."),
        (r"^res(\d+)_(\d+)_branch2a\.", r"res\1.\2.conv1."),
        (r"^res(\d+)_(\d+)_branch2b\.", r"res\1.\2.conv2."),
        (r"^res(\d+)_(\d+)_branch2c\.", r"res\1.\2.conv3."),
    )
)


def _longest_common_prefix_str(names: list[str]) -> str:
    """The characters that all names begin with."""
    return os.path.commonprefix(names)


def convert_basic_c2_names(original_keys: list[str]) -> list[str]:
    """Present names of the layers of a Caffe2 ResNet, ``res2_0_branch2a_w`` -> ``res2.0.conv1.weight``."""
    converted = []
    for key in original_keys:
        for pattern, replacement in _CAFFE2_RULES:
            key = pattern.sub(replacement, key)
        converted.append(key)
    return converted


def convert_c2_detectron_names(weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Rename a Caffe2 ResNet's weights.

    Returns:
        The weights by present names, and for each present name the original one.
    """
    names = dict(zip(convert_basic_c2_names(list(weights)), weights))
    return {new: weights[old] for new, old in names.items()}, names


def _source_name(model_key: str, checkpoint: Mapping[str, Any]) -> str | None:
    """The longest dotted suffix of ``model_key`` that is a key of the checkpoint."""
    suffix = model_key
    while suffix not in checkpoint:
        _, dot, suffix = suffix.partition(".")
        if not dot:
            return None
    return suffix


def align_and_update_state_dicts(
    model_state_dict: Mapping[str, torch.Tensor], ckpt_state_dict: Mapping[str, Any], c2_conversion: bool = True
) -> dict[str, Any]:
    """Rename the entries of a checkpoint to the model's names.

    A name of the model takes the entry whose name is the longest dotted suffix of it: ``backbone.res2.0.conv1.weight``
    takes ``res2.0.conv1.weight`` before ``conv1.weight``. Entries of another shape are left out with a warning.

    Args:
        model_state_dict: names and tensors of the model.
        ckpt_state_dict: names and tensors or arrays of the checkpoint.
        c2_conversion: translate the layer names of Caffe2 first.

    Returns:
        The matched entries by the model's names, and the others by their own.

    Raises:
        ValueError: several names of the model would take the same entry.
    """
    logger = logging.getLogger(__name__)
    if c2_conversion:
        ckpt_state_dict, original_names = convert_c2_detectron_names(ckpt_state_dict)
    else:
        original_names = {name: name for name in ckpt_state_dict}
    result: dict[str, Any] = {}
    taken_by: dict[str, str] = {}
    for model_key in sorted(model_state_dict):
        source = _source_name(model_key, ckpt_state_dict)
        if source is None:
            continue
        value = ckpt_state_dict[source]
        shape, model_shape = tuple(value.shape), tuple(model_state_dict[model_key].shape)
        if shape != model_shape:
            logger.warning(
                "%s of the checkpoint has shape %s, %s of the model has %s: not loaded",
                original_names[source], shape, model_key, model_shape,
            )  # fmt: skip
            continue
        if source in taken_by:
            raise ValueError(
                f"{original_names[source]!r} of the checkpoint fits both {taken_by[source]!r} and {model_key!r} of the "
                "model; rename the entries of the checkpoint, or load it without matching heuristics"
            )
        taken_by[source] = model_key
        result[model_key] = value
    logger.info(
        "%d of %d entries of the checkpoint match the model (names below %r)",
        len(result), len(ckpt_state_dict), _longest_common_prefix_str(list(result)),
    )  # fmt: skip
    for name, value in ckpt_state_dict.items():
        if name not in taken_by:
            result.setdefault(original_names[name], value)
    return result
