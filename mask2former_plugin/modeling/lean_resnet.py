"""Training of ResNets with frozen norms in little memory: fused steps, 1×1 convolutions again in the backward pass.

A convolution, the norm behind it, the residual sum and ReLU are one step. Of a stage the input, the output and the
results of the 3×3 convolutions are kept; the others follow from them by 1×1 convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mask2former_plugin.modeling.layers.fused_convolution import all_finite, fused_convolution, fuses_convolutions
from mask2former_plugin.modeling.layers.plain import has_hooks, is_plain
from mask2former_plugin.modeling.ops.sampling import traced

_CONVOLUTIONS = {BasicBlock: ("conv1", "conv2"), BottleneckBlock: ("conv1", "conv2", "conv3")}


def train_resnet_leanly(backbone: nn.Module) -> bool:
    """Let stem and stages of a ResNet train with less memory, in place; parameter names and results stay.

    Losses and gradients are those of the modules up to rounding. Stages with other blocks or norms than Detectron2's
    own and frozen ones stay as they are.

    Returns:
        whether anything of the kind was found.
    """
    found = False
    stem = getattr(backbone, "stem", None)
    if type(stem) is BasicStem and _frozen_norms([stem.conv1]):
        stem.__class__ = LeanStem
        found = True
    for stage in getattr(backbone, "stages", ()):
        if type(stage) is nn.Sequential and _convolutions_by_block(stage) is not None:
            stage.__class__ = LeanStage
            found = True
    return found


def _frozen_norms(convolutions: Sequence[nn.Module]) -> bool:
    """Whether all are plain convolutions with frozen norms, whose hooks nobody waits for."""
    return all(
        is_plain(conv, Conv2d)
        and is_plain(conv.norm, FrozenBatchNorm2d)
        and conv.activation is None
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        for conv in convolutions
    )


def _convolutions_by_block(stage: nn.Sequential) -> list[tuple[list[Conv2d], Conv2d | None]] | None:
    """The convolutions one after the other and that of the shortcut, of every block; None if there is another block."""
    blocks = []
    for block in stage:
        names = _CONVOLUTIONS.get(type(block))
        if names is None or has_hooks(block):
            return None
        convolutions = [getattr(block, name) for name in names]
        if not _frozen_norms(convolutions if block.shortcut is None else [*convolutions, block.shortcut]):
            return None
        blocks.append((convolutions, block.shortcut))
    return blocks


def _trains(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether autograd needs what happens to ``x``."""
    return torch.is_grad_enabled() and not traced() and (x.requires_grad or any(w.requires_grad for w in weights))


def _precision(x: Tensor) -> torch.dtype:
    """What a convolution of ``x`` computes in."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _has_fused_steps(x: Tensor) -> bool:
    """Whether :func:`fused_convolution` takes it."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.enabled or not x.numel():
        return False
    if x.dtype == torch.bfloat16 and (x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)):
        return False  # the sum in this layout only, and of single pixels it does not know the layout
    return fuses_convolutions(x.dtype)


def _would_hide_nan(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the fused steps would turn NaN into 0, and a loss that tells of it into one that doesn't."""
    return x.device.type == "cpu" and not all_finite(x, *weights)


def _rectified_gradient(grad: Tensor, result: Tensor, overwrite: bool = True) -> Tensor:
    """The gradient of what a ReLU got, given that of its result."""
    if overwrite:
        return torch.ops.aten.threshold_backward.grad_input(grad, result, 0, grad_input=grad)
    return torch.ops.aten.threshold_backward(grad, result, 0)


class _FrozenConv:
    """A convolution and the frozen norm behind it, which together are a convolution with other weights and a bias."""

    def __init__(self, conv: Conv2d) -> None:
        norm = conv.norm
        dtype = torch.promote_types(norm.running_var.dtype, torch.float32)
        self.scale = norm.weight.to(dtype) * (norm.running_var.to(dtype) + norm.eps).rsqrt()
        self.shift = norm.bias.to(dtype) - norm.running_mean.to(dtype) * self.scale
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.is_cheap = conv.kernel_size == (1, 1)

    def folded(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return (weight * self.scale[:, None, None, None]).to(dtype)

    def __call__(self, x: Tensor, weight: Tensor, *, rectify: bool = True, addend: Tensor | None = None) -> Tensor:
        """``relu(norm(conv(x)) + addend)``, in the place of the addend; with ``rectify`` False ``norm(conv(x))``."""
        weight, bias = self.folded(weight, x.dtype), self.shift.to(x.dtype)
        if _has_fused_steps(x):
            return fused_convolution(x, weight, bias, self, rectify=rectify, addend=addend)
        result = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        if addend is not None:
            result = addend.add_(result)
        return result.relu_() if rectify else result

    def differentiate(
        self, grad: Tensor, x: Tensor, weight: Tensor, of_input: bool, of_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the input and the weight, given that of ``norm(conv(x))``."""
        if not (of_input or of_weight):
            return None, None
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad,
            x,
            self.folded(weight, x.dtype),
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0, 0],
            self.groups,
            [of_input, of_weight, False],
        )
        if of_weight:
            grad_weight = grad_weight.to(weight.dtype).mul_(self.scale[:, None, None, None])
        return grad_x, grad_weight


class _Block:
    """The convolutions of a residual block, and where their weights are in the list of those of the stage."""

    def __init__(self, convolutions: Sequence[Conv2d], shortcut: Conv2d | None, start: int) -> None:
        self.steps = [_FrozenConv(conv) for conv in convolutions]
        self.shortcut = None if shortcut is None else _FrozenConv(shortcut)
        self.start = start
        self.length = len(self.steps) + (shortcut is not None)

    def number(self, step: int) -> int:
        """Index of the weight of a step; that of the shortcut comes last."""
        return self.start + step

    def hidden(self, x: Tensor, weights: Sequence[Tensor], step: int, kept: dict[int, Tensor]) -> Tensor:
        """The input of a step: ``x``, one that was kept, or that of the step before put through it."""
        if step == 0:
            return x
        number = self.number(step - 1)
        if number in kept:
            return kept[number]
        return self.steps[step - 1](self.hidden(x, weights, step - 1, kept), weights[number])

    def finish(self, x: Tensor, hidden: Tensor, weights: Sequence[Tensor], overwrite: bool) -> Tensor:
        """The output, given the input of the last step; in the place of ``x`` if that may be overwritten."""
        last = len(self.steps) - 1
        if self.shortcut is not None:
            total = self.shortcut(x, weights[self.number(last + 1)], rectify=False)
        else:
            total = x if overwrite else x.clone()
        return self.steps[last](hidden, weights[self.number(last)], addend=total)


class _StageFunction(torch.autograd.Function):
    """A stage of residual blocks; see :class:`LeanStage`."""

    @staticmethod
    def forward(ctx: Any, blocks: Sequence[_Block], keeps_wide: bool, image: Tensor, *weights: Tensor) -> Tensor:
        x = image.to(_precision(image))
        kept: dict[int, Tensor] = {}
        with torch.autocast(x.device.type, enabled=False):
            y = x
            for block in blocks:
                hidden = y
                for step, conv in enumerate(block.steps[:-1]):
                    hidden = conv(hidden, weights[block.number(step)])
                    if keeps_wide and not conv.is_cheap:
                        kept[block.number(step)] = hidden
                # what is kept must not be overwritten
                y = block.finish(y, hidden, weights, overwrite=y is not x and not any(y is k for k in kept.values()))
                last = len(block.steps) - 1
                if keeps_wide and not block.steps[last].is_cheap and block is not blocks[-1]:
                    kept[block.number(last)] = y
        ctx.blocks, ctx.kept, ctx.dtype = blocks, tuple(kept), image.dtype
        ctx.save_for_backward(x, y, *kept.values(), *weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, output, *rest = ctx.saved_tensors
        kept, weights = dict(zip(ctx.kept, rest)), rest[len(ctx.kept) :]
        of_input, of_weights = ctx.needs_input_grad[2], ctx.needs_input_grad[3:]
        grads: list[Tensor | None] = [None] * len(weights)
        with torch.autocast(x.device.type, enabled=False):
            ends = [x]  # input of the first block, outputs of all
            for block in ctx.blocks[:-1]:
                last = len(block.steps) - 1
                end = kept.get(block.number(last))
                if end is None:
                    hidden = block.hidden(ends[-1], weights, last, kept)
                    end = block.finish(ends[-1], hidden, weights, overwrite=False)
                ends.append(end)
            ends.append(output)
            grad = grad.to(x.dtype)
            for block in reversed(ctx.blocks):
                total = grad = _rectified_gradient(grad, ends.pop(), overwrite=block is not ctx.blocks[-1])
                x = ends[-1]
                further = of_input or block is not ctx.blocks[0]
                for step in reversed(range(len(block.steps))):
                    number = block.number(step)
                    hidden = block.hidden(x, weights, step, kept)
                    conv = block.steps[step]
                    grad, grads[number] = conv.differentiate(
                        grad, hidden, weights[number], step > 0 or further, of_weights[number]
                    )
                    if step > 0:
                        grad = _rectified_gradient(grad, hidden)
                    kept.pop(number, None)
                if block.shortcut is not None:
                    number = block.number(len(block.steps))
                    total, grads[number] = block.shortcut.differentiate(
                        total, x, weights[number], further, of_weights[number]
                    )
                if further:
                    grad += total
        return None, None, grad.to(ctx.dtype) if of_input else None, *grads


class LeanStage(nn.Sequential):
    """A stage of basic or bottleneck blocks with frozen norms.

    Kept for the backward pass are its input, its output and the results of its 3×3 convolutions. The 1×1 convolutions
    run again, about half of the operations of a bottleneck block, for a third of the memory. Without gradients, with
    hooks inside and with norms that have been exchanged, the blocks run as they are.

    Attributes:
        keeps_wide: False: the 3×3 convolutions run again, too, and nothing but input and output is kept.
    """

    keeps_wide = True

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C', H', W']``."""
        found = _convolutions_by_block(self) if torch.is_grad_enabled() else None
        if found is None:
            return super().forward(x)
        blocks, weights = [], []
        for convolutions, shortcut in found:
            blocks.append(_Block(convolutions, shortcut, len(weights)))
            weights += [conv.weight for conv in convolutions]
            if shortcut is not None:
                weights.append(shortcut.weight)
        if not _trains(x, weights) or _would_hide_nan(x, weights):
            return super().forward(x)
        return _StageFunction.apply(blocks, self.keeps_wide, x, *weights)


class _StemFunction(torch.autograd.Function):
    """A convolution with norm and ReLU, and maximum pooling; only the image and the weight are kept."""

    @staticmethod
    def forward(ctx: Any, conv: _FrozenConv, image: Tensor, weight: Tensor) -> Tensor:
        x = image.to(_precision(image))
        ctx.conv, ctx.dtype = conv, image.dtype
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.max_pool2d(conv(x, weight), kernel_size=3, stride=2, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        size, stride, padding, dilation = [3, 3], [2, 2], [1, 1], [1, 1]
        with torch.autocast(x.device.type, enabled=False):
            hidden = ctx.conv(x, weight)
            places = F.max_pool2d(hidden, size, stride, padding, return_indices=True)[1]
            grad = torch.ops.aten.max_pool2d_with_indices_backward(
                grad.to(x.dtype), hidden, size, stride, padding, dilation, False, places
            )
            grad = _rectified_gradient(grad, hidden)
            of_input, of_weight = ctx.needs_input_grad[1:]
            grad_x, grad_weight = ctx.conv.differentiate(grad, x, weight, of_input, of_weight)
        return None, None if grad_x is None else grad_x.to(ctx.dtype), grad_weight


class LeanStem(BasicStem):
    """:class:`BasicStem` with a frozen norm that runs again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` to ``[B, C, H/4, W/4]``."""
        weights = [self.conv1.weight]
        if not (_trains(x, weights) and _frozen_norms([self.conv1])) or _would_hide_nan(x, weights):
            return super().forward(x)
        return _StemFunction.apply(_FrozenConv(self.conv1), x, self.conv1.weight)
