"""Recognises what kind of checkpoint a dictionary of weights is, by its keys alone, and renames it to fit the model."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mask2former_plugin.checkpoint.huggingface_names import is_huggingface, to_detectron2

_WRAPPERS = ("model", "state_dict", "model_state")  # training states of this package, of mmseg and Lightning, of pycls
_CAFFE2 = re.compile(r"(?:res_)?conv1(?:_bn_s|_w)|res\d_\d_branch\d[abc]?(?:_bn_s|_w)")
_TORCHVISION_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^layer(\d)\.", lambda match: f"res{int(match.group(1)) + 1}."),
        (r"\bbn(\d)\.", r"conv\1.norm."),
        (r"\bdownsample\.0\.", "shortcut."),
        (r"\bdownsample\.1\.", "shortcut.norm."),
        (r"^(?!res\d\.)", "stem."),
    )
)
# names that only these backbones have
_RESNET, _SWIN = "stem.conv1.weight", "patch_embed.proj.weight"
_BACKBONE = "backbone."
# what backbones trained on ImageNet hold beyond their features: classifier, its norm, masks of Swin's windows
_CLASSIFIER = re.compile(
    r"(?:stem\.)?fc\..*|linear\..*|head\..*|norm\.(?:weight|bias)|layers\.\d+\.blocks\.\d+\.attn_mask"
)


def unwrap(content: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint file holds as ``{"model": weights, …}``, marked where Detectron2 has to match the names.

    Raises:
        ValueError: the weights are no dictionary.
    """
    blobs = content.get("blobs", content)
    if isinstance(blobs, Mapping) and any(_CAFFE2.fullmatch(name) for name in blobs if isinstance(name, str)):
        weights = {k: v for k, v in blobs.items() if isinstance(v, np.ndarray) and not k.endswith("_momentum")}
        return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
    for wrapper in _WRAPPERS:
        if wrapper not in content:
            continue
        weights = content[wrapper]
        if not isinstance(weights, Mapping):
            raise ValueError(
                f"the entry {wrapper!r} of the checkpoint is a {type(weights).__name__}, not a dictionary of weights"
            )
        rest = {key: value for key, value in content.items() if key != wrapper}
        if wrapper == "model_state":
            rest["matching_heuristics"] = True
        return {**rest, "model": weights}
    return {"model": content}


def is_torchvision(names: Collection[str]) -> bool:
    """Whether these are the names of a torchvision ResNet."""
    return "layer1.0.conv1.weight" in names and "conv1.weight" in names


def is_swin_release(names: Collection[str]) -> bool:
    """Whether these are the names of a Swin Transformer, without a prefix."""
    return _SWIN in names


def torchvision_name(name: str) -> str:
    """Detectron2's name of a weight of a torchvision ResNet, without the prefix of the backbone."""
    for pattern, replacement in _TORCHVISION_RULES:
        name = pattern.sub(replacement, name)
    return name


def fit_names(weights: Mapping[str, Any], model_names: Collection[str]) -> tuple[dict[str, Any], bool]:
    """Give weights the names of a model.

    Args:
        weights: of a Hugging Face model, a torchvision ResNet, a backbone alone; anything else keeps its names.
        model_names: names in the state dict of the model.

    Returns:
        The weights without those that a classifier or a statistics counter has beyond the model, and whether names were
        translated, so that no guess at them is needed any more.
    """
    original = weights
    prefix = "module."  # of a model that was saved inside DataParallel
    if all(name.startswith(prefix) for name in weights):
        weights = {name[len(prefix) :]: value for name, value in weights.items()}
    translated = False
    if is_huggingface(weights):
        weights, translated = to_detectron2(weights), True
    elif is_torchvision(weights):
        weights = {torchvision_name(name): value for name, value in weights.items()}
    for anchor in (_RESNET, _SWIN):
        place = _place(anchor, model_names)
        if place is None:
            continue
        if anchor in weights:
            kept = {name: value for name, value in weights.items() if not _CLASSIFIER.fullmatch(name)}
            weights, translated = {place + name: value for name, value in kept.items()}, True
        elif place == "" and _BACKBONE + anchor in weights:  # of a whole model, for its backbone alone
            kept = {name: value for name, value in weights.items() if name.startswith(_BACKBONE)}
            weights, translated = {name[len(_BACKBONE) :]: value for name, value in kept.items()}, True
    counters = {name for name in weights if name.endswith(".num_batches_tracked") and name not in model_names}
    fitted = OrderedDict((name, value) for name, value in weights.items() if name not in counters)
    if hasattr(original, "_metadata") and fitted.keys() <= original.keys():
        fitted._metadata = original._metadata  # versions of the modules, by which some of them read older weights
    return fitted, translated


def _place(anchor: str, model_names: Collection[str]) -> str | None:
    """The prefix of a backbone in a model: "" if it is the model; None if there is no such backbone, or several."""
    if anchor in model_names:
        return ""
    found = [name[: -len(anchor)] for name in model_names if name.endswith(f".{anchor}")]
    return found[0] if len(found) == 1 else None
