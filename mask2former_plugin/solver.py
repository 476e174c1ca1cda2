"""Optimizers as the originals set them up: learning rate and weight decay by kind of parameter, clipping of the whole model."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)
_NO_DECAY = ("relative_position_bias_table", "absolute_pos_embed")
_OPTIMIZERS = ("ADAMW", "SGD")
_FUSED_DEVICES = ("cpu", "cuda")


def parameter_groups(model: nn.Module, cfg: CfgNode) -> list[dict[str, Any]]:
    """Parameter groups with equal hyper-parameters, one group for each (learning rate, weight decay) that occurs.

    The rules are the published ones: parameters below a module whose name contains ``backbone`` have their rate multiplied by
    ``SOLVER.BACKBONE_MULTIPLIER``; position tables of Swin are not decayed; norms use ``WEIGHT_DECAY_NORM``, embeddings
    ``WEIGHT_DECAY_EMBED``. The originals make one group for each parameter, which gives the same update, slower.
    """
    solver = cfg.SOLVER
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            lr, decay = solver.BASE_LR, solver.WEIGHT_DECAY
            if "backbone" in module_name:
                lr *= solver.BACKBONE_MULTIPLIER
            if any(table in name for table in _NO_DECAY):
                decay = 0.0
            if isinstance(module, _NORMS):
                decay = solver.WEIGHT_DECAY_NORM
            elif isinstance(module, nn.Embedding):
                decay = solver.WEIGHT_DECAY_EMBED
            groups.setdefault((lr, decay), []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD by ``SOLVER.OPTIMIZER``, with the gradient clipping of ``SOLVER.CLIP_GRADIENTS``.

    With ``SOLVER.FUSED`` the step is one pass over all parameters, equal up to rounding, where the device has it.

    Raises:
        ValueError: another optimizer is asked for.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in _OPTIMIZERS:
        raise ValueError(f"SOLVER.OPTIMIZER must be one of {', '.join(_OPTIMIZERS)}, got {solver.OPTIMIZER!r}")
    groups = parameter_groups(model, cfg)
    clip = solver.CLIP_GRADIENTS
    full_model = clip.CLIP_TYPE == "full_model"  # not a type of Detectron2's own
    if solver.OPTIMIZER == "ADAMW":
        optimizer_class, arguments = torch.optim.AdamW, {"lr": solver.BASE_LR}
    else:
        optimizer_class, arguments = torch.optim.SGD, {"lr": solver.BASE_LR, "momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    if full_model and clip.ENABLED and clip.CLIP_VALUE > 0:
        optimizer_class = _clipping_the_whole_model(optimizer_class, clip.CLIP_VALUE)
    if solver.FUSED and _can_be_fused(groups):
        arguments["fused"] = True
    optimizer = optimizer_class(groups, **arguments)
    # a GradScaler would leave unscaling to a fused step, which comes after the clipping
    optimizer._step_supports_amp_scaling = False
    return optimizer if full_model else maybe_add_gradient_clipping(cfg, optimizer)


def _can_be_fused(groups: list[dict[str, Any]]) -> bool:
    parameters = [parameter for group in groups for parameter in group["params"]]
    return bool(parameters) and all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters)


def _clipping_the_whole_model(base: type[torch.optim.Optimizer], max_norm: float) -> type[torch.optim.Optimizer]:
    """Subclass whose step first clips the global L2 norm; a GradScaler has unscaled the gradients by then."""

    class WholeModelClipping(base):
        def step(self, closure=None):
            parameters = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
            nn.utils.clip_grad_norm_(parameters, max_norm)
            return super().step(closure)

    WholeModelClipping.__name__ = f"{base.__name__}WithWholeModelClipping"
    return WholeModelClipping
