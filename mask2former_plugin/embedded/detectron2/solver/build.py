"""Parameter groups, optimizers, gradient clipping and schedules from the SOLVER part of a config."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

import torch
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
    StepWithFixedGammaParamScheduler,
)
from torch import nn
from torch.optim import Optimizer

from detectron2.config import CfgNode
from detectron2.solver.lr_scheduler import LRMultiplier, LRScheduler, WarmupParamScheduler

logger = logging.getLogger(__name__)

NORM_LAYERS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


class GradientClipType(Enum):
    """How SOLVER.CLIP_GRADIENTS clips each parameter: elementwise, or by the norm of its gradient."""

    VALUE = "value"
    NORM = "norm"


def maybe_add_gradient_clipping(cfg: CfgNode, optimizer: type[Optimizer] | Optimizer) -> type[Optimizer] | Optimizer:
    """Return ``optimizer`` so that its ``step`` clips the gradients first, as SOLVER.CLIP_GRADIENTS says.

    Args:
        optimizer: an optimizer class (a subclass is returned) or an instance (changed in place and returned).

    Raises:
        ValueError: the clip type is not "value" or "norm"; both clip every parameter on its own.
    """
    if not cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        return optimizer
    clip = _gradient_clipper(cfg.SOLVER.CLIP_GRADIENTS)
    base = optimizer if isinstance(optimizer, type) else type(optimizer)

    def step(self: Optimizer, closure: Callable[[], float] | None = None) -> float | None:
        for group in self.param_groups:
            clip(group["params"])
        return super(clipping, self).step(closure)

    clipping = type(f"{base.__name__}WithGradientClip", (base,), {"step": step, "__module__": __name__})
    if isinstance(optimizer, type):
        return clipping
    optimizer.__class__ = clipping
    return optimizer


def _gradient_clipper(cfg: CfgNode) -> Callable[[Iterable[torch.Tensor]], None]:
    known = [kind.value for kind in GradientClipType]
    if cfg.CLIP_TYPE not in known:
        raise ValueError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {cfg.CLIP_TYPE!r}; known here: {', '.join(known)} "
            "(clipping of the full model is up to the trainer of the project that offers it)"
        )
    kind, limit, norm_type = GradientClipType(cfg.CLIP_TYPE), cfg.CLIP_VALUE, cfg.NORM_TYPE

    def clip(parameters: Iterable[torch.Tensor]) -> None:
        for parameter in parameters:
            if kind is GradientClipType.VALUE:
                nn.utils.clip_grad_value_(parameter, limit)
            else:
                nn.utils.clip_grad_norm_(parameter, limit, norm_type)

    return clip


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """SGD with momentum over the parameter groups of :func:`get_default_optimizer_params`."""
    solver = cfg.SOLVER
    params = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    sgd = maybe_add_gradient_clipping(cfg, torch.optim.SGD)
    return sgd(
        params,
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        nesterov=solver.NESTEROV,
        weight_decay=solver.WEIGHT_DECAY,
        foreach=True,
    )


def get_default_optimizer_params(
    model: nn.Module,
    base_lr: float | None = None,
    weight_decay: float | None = None,
    weight_decay_norm: float | None = None,
    bias_lr_factor: float | None = 1.0,
    weight_decay_bias: float | None = None,
    lr_factor_func: Callable[[str], float] | None = None,
    overrides: dict[str, dict[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer, one for each combination of options; frozen parameters are left out.

    Args:
        base_lr, weight_decay: for every parameter; None leaves the optimizer's default.
        weight_decay_norm: weight decay of the parameters of normalisation layers.
        bias_lr_factor, weight_decay_bias: for parameters called "bias".
        lr_factor_func: full parameter name -> factor on ``base_lr``.
        overrides: last part of a parameter's name -> options of its group; has the last word.

    Raises:
        ValueError: an option needs ``base_lr`` and there is none, or the bias options meet an override of "bias".
    """
    overrides = dict(overrides or {})
    bias_options: dict[str, float] = {}
    if bias_lr_factor is not None and bias_lr_factor != 1.0:
        if base_lr is None:
            raise ValueError("bias_lr_factor requires base_lr")
        bias_options["lr"] = base_lr * bias_lr_factor
    if weight_decay_bias is not None:
        bias_options["weight_decay"] = weight_decay_bias
    if bias_options:
        if "bias" in overrides:
            raise ValueError("'bias' is in overrides, and bias_lr_factor or weight_decay_bias is set; give one of them")
        overrides["bias"] = bias_options
    if lr_factor_func is not None and base_lr is None:
        raise ValueError("lr_factor_func requires base_lr")

    groups: list[dict[str, Any]] = []
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            options: dict[str, float] = {}
            if base_lr is not None:
                options["lr"] = base_lr
            if weight_decay is not None:
                options["weight_decay"] = weight_decay
            if weight_decay_norm is not None and isinstance(module, NORM_LAYERS):
                options["weight_decay"] = weight_decay_norm
            if lr_factor_func is not None:
                options["lr"] = base_lr * lr_factor_func(f"{module_name}.{name}" if module_name else name)
            options.update(overrides.get(name, {}))
            groups.append({"params": [parameter], **options})
    return reduce_param_groups(groups)


def _expand_param_groups(params: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One group per parameter; of options given twice for a parameter the later one holds."""
    options_of: dict[Any, dict[str, Any]] = {}
    for group in params:
        options = {key: value for key, value in group.items() if key != "params"}
        for parameter in group["params"]:
            options_of.setdefault(parameter, {}).update(options)
    return [{"params": [parameter], **options} for parameter, options in options_of.items()]


def reduce_param_groups(params: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge groups with equal options, in the order of first appearance; optimizers run fewer and larger steps then."""
    merged: list[tuple[dict[str, Any], list[Any]]] = []
    for group in _expand_param_groups(params):
        parameters = group.pop("params")
        for options, members in merged:
            if options == group:
                members.extend(parameters)
                break
        else:
            merged.append((group, parameters))
    return [{**options, "params": members} for options, members in merged]


class _UntilTheEnd(ParamScheduler):
    """Evaluates a scheduler that is defined on [0, 1) also at 1, where it keeps its last value."""

    def __init__(self, scheduler: ParamScheduler) -> None:
        self._scheduler = scheduler

    def __call__(self, where: float) -> float:
        return self._scheduler(min(where, 1.0 - 2 * self.WHERE_EPSILON))


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """The schedule SOLVER.LR_SCHEDULER_NAME: WarmupMultiStepLR, WarmupCosineLR or WarmupStepWithFixedGammaLR.

    Raises:
        ValueError: unknown name, a BASE_LR_END above BASE_LR, or RESCALE_INTERVAL with a warm-up that leaves nothing.
    """
    builders = {
        "WarmupMultiStepLR": _multi_step,
        "WarmupCosineLR": _cosine,
        "WarmupStepWithFixedGammaLR": _step_with_fixed_gamma,
    }
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME not in builders:
        raise ValueError(
            f"unknown SOLVER.LR_SCHEDULER_NAME {solver.LR_SCHEDULER_NAME!r}; known: {', '.join(builders)}, "
            "and WarmupPolyLR of detectron2.projects.deeplab"
        )
    if solver.RESCALE_INTERVAL and solver.WARMUP_ITERS >= solver.MAX_ITER:
        raise ValueError(
            f"SOLVER.RESCALE_INTERVAL needs WARMUP_ITERS = {solver.WARMUP_ITERS} below MAX_ITER = {solver.MAX_ITER}"
        )
    multiplier = WarmupParamScheduler(
        builders[solver.LR_SCHEDULER_NAME](solver),
        solver.WARMUP_FACTOR,
        min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        solver.WARMUP_METHOD,
        solver.RESCALE_INTERVAL,
    )
    return LRMultiplier(optimizer, multiplier, max_iter=solver.MAX_ITER)


def _multi_step(solver: CfgNode) -> ParamScheduler:
    steps = [step for step in solver.STEPS if step < solver.MAX_ITER]
    if len(steps) != len(solver.STEPS):
        logger.warning("SOLVER.STEPS %s: those from MAX_ITER = %d on have no effect", solver.STEPS, solver.MAX_ITER)
    values = [solver.GAMMA**k for k in range(len(steps) + 1)]
    return MultiStepParamScheduler(values=values, milestones=steps, num_updates=solver.MAX_ITER)


def _cosine(solver: CfgNode) -> ParamScheduler:
    end = solver.BASE_LR_END / solver.BASE_LR
    if not 0.0 <= end <= 1.0:
        raise ValueError(f"SOLVER.BASE_LR_END = {solver.BASE_LR_END} must lie in [0, BASE_LR = {solver.BASE_LR}]")
    return CosineParamScheduler(1.0, end)


def _step_with_fixed_gamma(solver: CfgNode) -> ParamScheduler:
    return _UntilTheEnd(
        StepWithFixedGammaParamScheduler(
            base_value=1.0, gamma=solver.GAMMA, num_decays=solver.NUM_DECAYS, num_updates=solver.MAX_ITER
        )
    )
