"""Activation checkpointing: layers whose intermediate results are computed again in the backward pass, not kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from mask2former_plugin.modeling.lean_resnet import LeanStage, train_resnet_leanly
from mask2former_plugin.modeling.ops.sampling import traced

# operators whose results are worth keeping, by their names without overload; convolutions only with large kernels
_COSTLY = {
    "mask2former::ms_deform_attn_cpu",
    "mask2former_plugin::ms_deform_attn_triton",
    "aten::grid_sampler_2d",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
}


class RunsLayers(nn.Module):
    """Mixin of modules that run layers; of a layer run by :meth:`run_layer` only the inputs may have to be kept.

    Attributes:
        recompute_layers: recompute whole layers.
        recompute_cheap_steps: recompute of the layers run by :meth:`run_lean` what takes little time.
    """

    recompute_layers = False
    recompute_cheap_steps = False

    def recomputing(self) -> bool:
        """Whether :meth:`run_layer` lets a layer run again in the backward pass."""
        return self.recompute_layers and self.training and torch.is_grad_enabled()

    def run_layer(self, layer: Callable[..., Any], *args: Any) -> Any:
        """``layer(*args)``; with ``recompute_layers`` it runs again in the backward pass, dropout included.

        Args:
            layer: a module or a method of one.
        """
        if not self.recomputing():
            return layer(*args)
        return checkpoint(
            layer,
            *args,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), _StatisticsKept(layer)),
        )

    def runs_lean(self) -> bool:
        """Whether :meth:`run_lean` lets cheap steps run again in the backward pass."""
        return self.recompute_cheap_steps and self.training and torch.is_grad_enabled() and not traced()

    def run_lean(self, layer: Callable[..., Any], *args: Any) -> Any:
        """:meth:`run_layer`; with ``recompute_cheap_steps`` the inputs and the results of costly operators are kept.

        Projections, norms, sums and resizes run again in the backward pass, attention and 3×3 convolutions don't.
        """
        if not self.runs_lean():
            return self.run_layer(layer, *args)
        results: list[Any] = []
        return checkpoint(
            layer,
            *args,
            use_reentrant=False,
            context_fn=lambda: (_KeepsCostlyResults(results), _Repeats(results, layer)),
        )


class RecomputedSequential(RunsLayers, nn.Sequential):
    """A Sequential each of whose modules is recomputed in the backward pass."""

    recompute_layers = True

    def forward(self, x: Any) -> Any:
        for module in self:
            x = self.run_layer(module, x)
        return x


def train_leanly(backbone: nn.Module, head: nn.Module) -> None:
    """Let backbone and head recompute in the backward pass what is cheap, in place: less memory, little time.

    See :class:`LeanStage` and :meth:`RunsLayers.run_lean`; what has nothing of the kind stays as it is.
    """
    train_resnet_leanly(backbone)
    for part in head.modules():
        if isinstance(part, RunsLayers):
            part.recompute_cheap_steps = True


def recompute_activations(module: nn.Module, key: str) -> None:
    """Let a backbone, pixel decoder or transformer decoder recompute its layers in the backward pass, in place.

    Of a ResNet (Detectron2's or the embedded one) the residual blocks are recomputed, of lean ones whole stages, of a
    Swin Transformer its blocks, otherwise what :class:`RunsLayers` runs. Parameter names stay.

    Args:
        key: config key that asks for it, for the error message.

    Raises:
        ValueError: the module has nothing of the kind.
    """
    found = hasattr(module, "use_checkpoint")  # Swin's own switch
    if found:
        module.use_checkpoint = True
    for part in module.modules():
        if isinstance(part, RunsLayers):
            part.recompute_layers = found = True
    for stage in getattr(module, "stages", ()):
        if isinstance(stage, LeanStage):
            stage.keeps_wide, found = False, True
        elif type(stage) is nn.Sequential:
            stage.__class__ = RecomputedSequential
            found = True
    if not found:
        raise ValueError(
            f"{key}: {type(module).__name__} has no layers that can be recomputed; set the key to False. It works for "
            "ResNet and Swin backbones, MSDeformAttnPixelDecoder, TransformerEncoderPixelDecoder and both transformer "
            "decoders"
        )


class _StatisticsKept:
    """While a layer runs a second time, its batch norms count the batch in copies of their statistics; as often as
    there are backward passes."""

    def __init__(self, layer: Callable[..., Any]) -> None:
        self.layer = layer

    def __enter__(self) -> None:
        modules = getattr(self.layer, "__self__", self.layer).modules()
        # not momentum 0 and no counter: synchronised norms insist on a counter
        norms = [m for m in modules if getattr(m, "num_batches_tracked", None) is not None]
        self.kept = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
        for norm, name, buffer in self.kept:
            setattr(norm, name, buffer.clone())

    def __exit__(self, *error: object) -> None:
        for norm, name, buffer in self.kept:
            setattr(norm, name, buffer)


def _is_costly(operator: Any, args: tuple) -> bool:
    name = operator.name().partition(".")[0]
    return name in _COSTLY or (name == "aten::convolution" and max(args[1].shape[2:]) > 1)


class _KeepsCostlyResults(TorchDispatchMode):
    """Puts the results of costly operators into a list."""

    def __init__(self, results: list[Any]) -> None:
        super().__init__()
        self.results = results

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_costly(func, args):
            # autograd is about to make the result itself part of the graph
            self.results.append(tree_map_only(Tensor, _Kept, result))
        return result


class _Repeats(TorchDispatchMode):
    """Takes the results of costly operators from a list, in their order, while a layer runs again."""

    def __init__(self, results: list[Any], layer: Callable[..., Any]) -> None:
        super().__init__()
        self.results, self.statistics = results, _StatisticsKept(layer)
        self.number = 0

    def __enter__(self) -> _Repeats:
        self.number = 0
        self.statistics.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.statistics.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not _is_costly(func, args):
            return func(*args, **(kwargs or {}))
        self.number += 1
        return tree_map_only(_Kept, _Kept.get, self.results[self.number - 1])


class _Kept:
    """A tensor that must not be changed in place."""

    def __init__(self, tensor: Tensor) -> None:
        # an alias beside the graph whose version counts changes of the tensor, which a mode leaves out unless told
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self.tensor = tensor.detach()
        self.version = self.tensor._version

    def get(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a result that MODEL.LEAN_TRAINING keeps for the backward pass has been changed in place; set the key "
                "to False, or change the module that does so"
            )
        return self.tensor.detach()
