"""Operations, activations and parameters of a model, module by module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis, parameter_count
from fvcore.nn.jit_handles import get_shape
from tabulate import tabulate
from torch import Tensor, nn

from mask2former_plugin.modeling.mask_logits import MaskLogits, mask_logits_of

UNITS = {"flop": ("GFLOP", 1e9), "activation": ("M activations", 1e6), "parameter": ("M parameters", 1e6)}


class NetworkOnly(nn.Module):
    """Backbone and head of a segmentation model, from padded images to class and mask logits.

    What follows (resizing masks, choosing segments) depends on what is found, can't be traced and holds no products.

    Args:
        model: :class:`MaskFormer` or a ``SemanticSegmentor``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name in ("backbone", "sem_seg_head"):
            if not hasattr(model, name):
                raise ValueError(
                    f"{type(model).__name__} has no {name}: only MaskFormer and SemanticSegmentor can be analysed"
                )
        self.backbone = model.backbone
        self.sem_seg_head = model.sem_seg_head
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            images: ``[B, 3, H, W]``, padded to a multiple of the size divisibility.
        """
        output = self.sem_seg_head(self.backbone(images))
        if isinstance(output, Mapping):
            # inference reads the last prediction only, and of it every query at stride 4
            return output["pred_logits"], mask_logits_of(output).dense()
        return tuple(_tensors(output))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, MaskLogits):
        return [value.dense()]
    elements = value.values() if isinstance(value, Mapping) else value if isinstance(value, Sequence) else ()
    return [tensor for element in elements for tensor in _tensors(element)]


def input_size(model: nn.Module, height: int, width: int) -> tuple[int, int]:
    """Height and width after padding, as the model pads."""
    divisor = getattr(model, "size_divisibility", 0) or model.backbone.size_divisibility
    if divisor < 2:
        return height, width
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def _attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of fused attention: Q·Kᵀ and the weighted sum of the values."""
    query, key, value = (get_shape(x) for x in inputs[:3])
    *batch, length, width = query
    pairs = length * key[-2]
    for size in batch:
        pairs *= size
    return pairs * (width + value[-1])


def _attention_activations(inputs: list[Any], outputs: list[Any]) -> int:
    """Elements of the result; fused attention stores no matrix of weights."""
    count = 1
    for size in get_shape(outputs[0]):
        count *= size
    return count


_ATTENTION = "aten::scaled_dot_product_attention"


def count(model: nn.Module, task: str, size: tuple[int, int] | None = None) -> dict[str, int]:
    """Counts by module name, "" for the whole model.

    Args:
        task: "flop" (multiply-adds, one each, of one image: convolutions, linear layers, matrix products, attention,
            norms, bilinear samples of resizing and of deformable attention; element-wise operations count as none, as
            in Detectron2), "activation" (elements of the results of convolutions, products and
            attention) or "parameter".
        size: height and width of the network's input; not needed for parameters.
    """
    if task == "parameter":
        return dict(parameter_count(model))
    if task not in UNITS:
        raise ValueError(f"task must be one of {', '.join(UNITS)}, got {task!r}")
    network = NetworkOnly(model)
    device = next(network.parameters()).device
    kind, attention = {
        "flop": (FlopCountAnalysis, _attention_flops),
        "activation": (ActivationCountAnalysis, _attention_activations),
    }[task]
    analysis = kind(network, torch.zeros(1, 3, *size, device=device))
    analysis.set_op_handle(_ATTENTION, attention)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with torch.no_grad():
        return dict(analysis.by_module())


def mean_counts(model: nn.Module, task: str, sizes: Sequence[tuple[int, int]]) -> tuple[dict[str, float], float]:
    """Mean of :func:`count` over input sizes, and the standard deviation of the whole model's."""
    distinct = {size: count(model, task, size) for size in dict.fromkeys(sizes)}
    names = {name: None for by_module in distinct.values() for name in by_module}
    means = {name: sum(distinct[size].get(name, 0) for size in sizes) / len(sizes) for name in names}
    variance = sum((distinct[size].get("", 0) - means[""]) ** 2 for size in sizes) / len(sizes)
    return means, variance**0.5


def table(model: nn.Module, counts: Mapping[str, Mapping[str, float]], depth: int = 3) -> str:
    """Modules in the order of the model, with what was counted of each, in billions and millions.

    Args:
        counts: by task, then by module name.
        depth: how deep modules are listed; modules without anything counted are left out.
    """
    names = [name for name, _ in model.named_modules() if name.count(".") < depth]
    rows = []
    for name in names:
        values = [by_module.get(name, 0) / UNITS[task][1] for task, by_module in counts.items()]
        if any(values):
            label = "  " * (name.count(".") + bool(name)) + (name.rsplit(".", 1)[-1] or "all")
            rows.append([label, *values])
    headers = ["module", *(UNITS[task][0] for task in counts)]
    return tabulate(rows, headers=headers, floatfmt=".3f", tablefmt="pipe", preserve_whitespace=True)
