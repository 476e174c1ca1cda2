"""A model made ready for inference: norms folded, layouts and precision of the weights chosen, steps fused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

from mask2former_plugin.modeling.layers import MultiheadAttention
from mask2former_plugin.modeling.layers.fused_convolution import all_finite, fused_convolution, fuses_convolutions
from mask2former_plugin.modeling.layers.plain import has_hooks, is_plain
from mask2former_plugin.modeling.lean_resnet import LeanStem
from mask2former_plugin.modeling.ops.sampling import traced

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def optimize_for_inference(model: nn.Module, *, precision: str = "float32", compiled: bool = False) -> nn.Module:
    """A copy of a model that gives the same results faster and cannot be trained.

    - Batch norms with fixed statistics become part of the convolution before them.
    - Convolutions get channels-last weights; on a CPU those of ResNets are one step with ReLU and the residual sum.
    - In half precision the weights of convolutions and linear layers are converted once, and the network runs under
      autocast, which keeps norms, residuals, positions and coordinates in float32; so does everything after the
      network.

    In float32 the results differ from the model's by rounding only. What hooks, parametrizations or subclasses of
    convolutions have changed stays as it is. oneDNN's ReLU makes 0 of what is not a number, hence the errors below.

    Args:
        model: on its final device, weights loaded; it stays as it is. One that is optimised already, also inside a
            wrapper, is returned.
        precision: ``float32``, ``bfloat16`` or ``float16``.
        compiled: let ``torch.compile`` translate the network when it is first used; takes a minute and a C++ compiler.

    Raises:
        ValueError: the precision is unknown, or a weight is not finite; later on, if an image is not.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"the precision of the inference must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if any(isinstance(module, InferenceOnly) for module in model.modules()):
        return model
    model = copy.deepcopy(model).eval().requires_grad_(False)
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    # of a meta architecture the network only: what comes before and after stays in float32
    parts = [part for part in map(model._modules.get, ("backbone", "sem_seg_head")) if part is not None] or [model]
    for part in parts:
        fold_norms(part)
        _require_finite(part)
        _convert_weights(part, PRECISIONS[precision])
        if device == "cpu" and not compiled:
            fuse_residual_blocks(part)
        _make_inference_only(part)
        if precision != "float32":
            part.autocast_to = (device, PRECISIONS[precision])
        if compiled:
            part.compile()
    if model not in parts:
        _make_inference_only(model)
    return model


@torch.no_grad()
def fold_norms(module: nn.Module) -> None:
    """Make batch norms in evaluation mode part of the convolution that holds them as ``norm``, in place."""
    for conv in module.modules():
        norm = conv.norm if is_plain(conv, Conv2d) else None
        if not isinstance(norm, _FOLDABLE) or norm.running_var is None or has_hooks(norm):
            continue
        scale, shift = _affine_form(norm)
        bias = shift if conv.bias is None else shift + conv.bias * scale
        conv.weight = nn.Parameter((conv.weight * scale[:, None, None, None]).to(conv.weight.dtype), False)
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype), False)
        conv.norm = None


_FOLDABLE = (FrozenBatchNorm2d, nn.modules.batchnorm._BatchNorm)


def _require_finite(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not all_finite(parameter):
            raise ValueError(
                f"{name} of {type(module).__name__} is not finite (for a convolution, with its norm), so nothing that "
                "the model gives would mean anything; load other weights"
            )


def _affine_form(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm, in float64."""
    mean, scale = norm.running_mean.double(), (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _convert_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Weights of matrix products in the precision that autocast would give them, convolutions' channels-last; ReLUs
    that follow convolutions overwrite their input."""
    for layer in module.modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear, MultiheadAttention)):
            continue
        for parameter in layer.parameters(recurse=False):
            if parameter.dtype == torch.float32:
                parameter.data = parameter.data.to(dtype)
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
            if getattr(layer, "activation", None) is F.relu:
                layer.activation = F.relu_


def fuse_residual_blocks(module: nn.Module) -> None:
    """Replace stems and blocks of ResNets, norms folded, by ones that add and rectify within the convolution, in place.

    oneDNN does so through operators that ``torch.compile`` uses, too; where PyTorch or the CPU lacks them, and where
    a norm could not be folded, the modules stay.
    """
    for parent in list(module.modules()):
        for name, block in list(parent.named_children()):
            fused = _FUSED.get(type(block))
            if fused is not None and not has_hooks(block) and all(map(_fusible, block.children())):
                # the input of the first block of a stage may be an output of the network
                setattr(parent, name, fused(block, keeps_input=name == "0"))


def _fusible(conv: nn.Module) -> bool:
    if not is_plain(conv, Conv2d) or conv.norm is not None or conv.activation is not None:
        return False
    return conv.padding_mode == "zeros" and fuses_convolutions(conv.weight.dtype)


def _convolve(x: Tensor, conv: nn.Conv2d, *, rectify: bool = True, addend: Tensor | None = None) -> Tensor:
    """See :func:`fused_convolution`; in the precision of the weights, whatever autocast says."""
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("this model is optimised for inference and has no gradients; use the one it was made from")
    return fused_convolution(x.to(conv.weight.dtype), conv.weight, conv.bias, conv, rectify=rectify, addend=addend)


class FusedStem(nn.Module):
    """:class:`BasicStem` whose convolution rectifies."""

    def __init__(self, stem: BasicStem, keeps_input: bool) -> None:
        super().__init__()
        self.conv1 = stem.conv1

    def forward(self, x: Tensor) -> Tensor:
        if not traced() and not all_finite(x):
            raise ValueError("an image has values that are NaN or infinite; repair it before it is given to the model")
        x = _convolve(x, self.conv1)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class FusedBlock(nn.Module):
    """:class:`BasicBlock` or :class:`BottleneckBlock` whose convolutions rectify and add the shortcut."""

    def __init__(self, block: BasicBlock | BottleneckBlock, keeps_input: bool) -> None:
        super().__init__()
        names = ("conv1", "conv2", "conv3") if isinstance(block, BottleneckBlock) else ("conv1", "conv2")
        self.residual = nn.ModuleList(getattr(block, name) for name in names)
        self.shortcut = block.shortcut
        self.keeps_input = keeps_input

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is not None:
            total = _convolve(x, self.shortcut, rectify=False)
        else:
            total = x.to(self.residual[-1].weight.dtype, copy=self.keeps_input)
        *convs, last = self.residual
        for conv in convs:
            x = _convolve(x, conv)
        return _convolve(x, last, addend=total)


_FUSED = {BasicStem: FusedStem, LeanStem: FusedStem, BasicBlock: FusedBlock, BottleneckBlock: FusedBlock}


class InferenceOnly:
    """Mixin of optimised modules: no training, no other weights, device or precision, and autocast if the precision
    asks for it."""

    autocast_to: tuple[str, torch.dtype] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.autocast_to is None:
            return super().forward(*args, **kwargs)
        with torch.autocast(*self.autocast_to):
            return super().forward(*args, **kwargs)

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            raise RuntimeError(
                "this model is optimised for inference and cannot be trained; train the model that it was made from"
            )
        return super().train(mode)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        own = self.state_dict().keys()
        if own - state_dict.keys() and state_dict.keys() - own:
            raise RuntimeError(
                "this model is optimised for inference, and its weights hold the norms of the model that it was made "
                "from; load into that one and optimise it again"
            )
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        for device, dtype in {(p.device, p.dtype) for p in self.parameters()}:
            changed = fn(torch.zeros(1, device=device, dtype=dtype))
            if (changed.device, changed.dtype) != (device, dtype):
                raise RuntimeError(
                    f"this model is optimised for {dtype} on {device}, got {changed.dtype} on {changed.device}; move "
                    "or convert the model that it was made from and optimise it again"
                )
        return super()._apply(fn, *args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        _, plain = type(self).__bases__
        return _restore, (plain,), super().__reduce_ex__(protocol)[2]


def _make_inference_only(module: nn.Module) -> nn.Module:
    module.__class__ = type(f"Optimized{type(module).__name__}", (InferenceOnly, type(module)), {})
    return module


def _restore(plain: type[nn.Module]) -> nn.Module:
    """A module for copy and pickle to fill: they find no class that was made while running."""
    return _make_inference_only(plain.__new__(plain))
