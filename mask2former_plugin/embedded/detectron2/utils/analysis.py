"""Operations, activations and parameters of models that take Detectron2's list of dicts; counted by fvcore."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from fvcore.nn import activation_count, parameter_count, parameter_count_table
from fvcore.nn import FlopCountAnalysis as _FlopCountAnalysis
from torch import nn

__all__ = [
    "FlopCountAnalysis",
    "activation_count_operators",
    "find_unused_parameters",
    "flop_count_operators",
    "parameter_count",
    "parameter_count_table",
]

# element-wise and bookkeeping operations: not worth counting next to products (batch norm folds into the convolution)
_IGNORED_OPS = {
    f"aten::{name}"
    for name in (
        "abs add add_ argmax argsort batch_norm ceil clamp constant_pad_nd cumsum div div_ eq exp expand_as fill_ "
        "floor ge gelu gt le log log2 lt masked_fill max max_pool2d maximum mean meshgrid min minimum mul mul_ ne "
        "neg nonzero nonzero_numpy one_hot pad pow prod reciprocal relu repeat repeat_interleave roll rsub sigmoid "
        "sigmoid_ sin cos softmax sort split sqrt sub sub_ sum take topk tril triu unflatten where zeros_like"
    ).split()
} | {"torchvision::nms", "prim::PythonOp"}


def _tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in nested containers, ``Instances`` and structures that hold a ``tensor``."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for element in value.values() for tensor in _tensors_in(element)]
    if isinstance(value, (list, tuple)):
        return [tensor for element in value for tensor in _tensors_in(element)]
    if hasattr(value, "get_fields"):
        return _tensors_in(value.get_fields())
    return [value.tensor] if isinstance(getattr(value, "tensor", None), torch.Tensor) else []


def _with_tensors(value: Any, tensors: list[torch.Tensor]) -> Any:
    """A copy of nested containers with the tensors replaced by those of the list, which is used up from its front."""
    if isinstance(value, torch.Tensor):
        return tensors.pop(0)
    if isinstance(value, dict):
        return {key: _with_tensors(element, tensors) for key, element in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_tensors(element, tensors) for element in value)
    return value


class _TensorsInTensorsOut(nn.Module):
    """Lets a model with structured inputs and results be traced: it takes and gives tensors only."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.model = model
        self._inputs = inputs
        self.flat_inputs = tuple(_plain_tensors_in(inputs))

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_tensors_in(self.model(_with_tensors(self._inputs, list(tensors)))))


def _plain_tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors that :func:`_with_tensors` replaces."""
    if isinstance(value, torch.Tensor):
        return [value]
    elements = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for element in elements for tensor in _plain_tensors_in(element)]


def _unwrapped(model: nn.Module) -> nn.Module:
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return model.module if isinstance(model, parallel) else model


class FlopCountAnalysis(_FlopCountAnalysis):
    """fvcore's ``FlopCountAnalysis`` for models that take Detectron2's inputs; a multiply-add counts as one.

    Args:
        model: in evaluation mode for a count without losses.
        inputs: what the model's ``forward`` takes, e.g. ``[{"image": tensor}]``.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        adapter = _TensorsInTensorsOut(_unwrapped(model), inputs)
        super().__init__(adapter, adapter.flat_inputs)
        self.set_op_handle(**dict.fromkeys(_IGNORED_OPS))


def flop_count_operators(model: nn.Module, inputs: list[dict]) -> defaultdict[str, float]:
    """Operations by type, in 10^9 multiply-adds."""
    counts = FlopCountAnalysis(model, inputs).by_operator()
    return defaultdict(float, {name: count / 1e9 for name, count in counts.items()})


def activation_count_operators(model: nn.Module, inputs: list[dict], **kwargs: Callable) -> defaultdict[str, float]:
    """Elements of the outputs of convolutions and matrix products by type, in 10^6.

    Args:
        model: the model; its mode stays as it is.
        inputs: what the model's ``forward`` takes, e.g. ``[{"image": tensor}]``.
        kwargs: ``supported_ops``, further handlers as in ``fvcore.nn.activation_count``.
    """
    adapter = _TensorsInTensorsOut(_unwrapped(model), inputs)
    counts, _ = activation_count(adapter, adapter.flat_inputs, **kwargs)
    return counts


def find_unused_parameters(model: nn.Module, inputs: Any) -> list[str]:
    """Names of parameters that get no gradient from a training step.

    Args:
        model: in training mode; ``model(inputs)`` returns a loss or a dict of losses. Its gradients are overwritten.
        inputs: a training batch.
    """
    if not model.training:
        raise ValueError("find_unused_parameters needs a model in training mode, which returns losses")
    for parameter in model.parameters():
        parameter.grad = None
    losses = model(inputs)
    torch.stack([loss.sum() for loss in _tensors_in(losses)]).sum().backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    for parameter in model.parameters():
        parameter.grad = None
    return unused
