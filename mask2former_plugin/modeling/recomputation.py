"""Activation checkpointing: layers whose intermediate results are computed again in the backward pass, not kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class RunsLayers(nn.Module):
    """Mixin of modules that run layers; of a layer run by :meth:`run_layer` only the inputs may have to be kept."""

    recompute_layers = False

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
            context_fn=lambda: (contextlib.nullcontext(), _running_statistics_kept(layer)),
        )


class RecomputedSequential(RunsLayers, nn.Sequential):
    """A Sequential each of whose modules is recomputed in the backward pass."""

    recompute_layers = True

    def forward(self, x: Any) -> Any:
        for module in self:
            x = self.run_layer(module, x)
        return x


def recompute_activations(module: nn.Module, key: str) -> None:
    """Let a backbone, pixel decoder or transformer decoder recompute its layers in the backward pass, in place.

    Of a ResNet (Detectron2's or the embedded one) the residual blocks are recomputed, of a Swin Transformer its
    blocks, otherwise what :class:`RunsLayers` runs. Parameter names stay.

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
        if type(stage) is nn.Sequential:
            stage.__class__ = RecomputedSequential
            found = True
    if not found:
        raise ValueError(
            f"{key}: {type(module).__name__} has no layers that can be recomputed; set the key to False. It works for "
            "ResNet and Swin backbones, MSDeformAttnPixelDecoder, TransformerEncoderPixelDecoder and both transformer "
            "decoders"
        )


@contextlib.contextmanager
def _running_statistics_kept(layer: Callable[..., Any]) -> Iterator[None]:
    """While the layer runs a second time, its batch norms don't count the batch a second time."""
    modules = getattr(layer, "__self__", layer).modules()
    norms = [m for m in modules if hasattr(m, "running_mean") and getattr(m, "momentum", None) is not None]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept):
            norm.momentum, norm.num_batches_tracked = momentum, count
