"""Normalisation layers and how configs name them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from fvcore.nn.distributed import differentiable_all_reduce
from torch import nn
from torch.nn import functional as F


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with constant statistics and constant affine transform.

    All four tensors are buffers, so that checkpoints carry them and optimizers don't see them. A new one is the
    identity up to rounding.
    """

    # 1: affine only, statistics folded in. 2: with statistics. 3: unchanged names; written by current code.
    _version = 3

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) in, the same shape and dtype out."""
        if not x.requires_grad:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        # F.batch_norm would keep its input for gradients that nobody needs; the affine form keeps the scale only.
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.to(x.dtype).view(1, -1, 1, 1) + shift.to(x.dtype).view(1, -1, 1, 1)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, *args: Any, **kwargs: Any
    ) -> None:
        version = local_metadata.get("version")
        if version is None or version < 2:
            # Affine-only weights (also those converted from other frameworks): the statistics are in the affine part.
            state_dict.setdefault(prefix + "running_mean", torch.zeros_like(self.running_mean))
            state_dict.setdefault(prefix + "running_var", torch.ones_like(self.running_var))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)

    def __repr__(self) -> str:
        return f"FrozenBatchNorm2d(num_features={self.num_features}, eps={self.eps})"

    @classmethod
    def convert_frozen_batchnorm(cls, module: nn.Module) -> nn.Module:
        """Replace all 2-D and synchronised batch normalisations inside ``module`` by frozen copies.

        Returns:
            the module itself, or its replacement if it is a batch normalisation.
        """
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            frozen = cls(module.num_features, module.eps)
            for name in ("weight", "bias", "running_mean", "running_var"):
                value = getattr(module, name)
                if value is not None:
                    # A new tensor rather than a copy into the buffer: keeps the device and dtype of the module.
                    setattr(frozen, name, value.detach().clone())
            return frozen.train(module.training)
        for name, child in module.named_children():
            replacement = cls.convert_frozen_batchnorm(child)
            if replacement is not child:
                module.add_module(name, replacement)
        return module


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _shared_batch_norm(module: nn.modules.batchnorm._BatchNorm, x: torch.Tensor) -> torch.Tensor:
    """Training-mode batch normalisation with the statistics of all workers, from differentiable all-reduces.

    Every pixel of every worker counts the same, so the result is that of one worker with the whole batch; workers may
    differ in batch and image size. Mean and variance go in two passes, which loses no digits where the mean is large.
    """
    axes = [0, *range(2, x.dim())]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    value = x.float()
    count = value.new_full((1,), float(value.numel() // value.shape[1]))
    reduced = differentiable_all_reduce(torch.cat((value.sum(axes), count)))
    total = reduced[-1].detach().clamp(min=1)
    mean = reduced[:-1] / total
    centred = value - mean.view(shape)
    var = differentiable_all_reduce(centred.square().sum(axes)) / total

    if module.track_running_stats:
        with torch.no_grad():
            module.num_batches_tracked += 1
            momentum = module.momentum if module.momentum is not None else 1.0 / module.num_batches_tracked.item()
            unbiased = var * (total / (total - 1).clamp(min=1))
            module.running_mean.lerp_(mean.to(module.running_mean.dtype), momentum)
            module.running_var.lerp_(unbiased.to(module.running_var.dtype), momentum)
    out = centred * (var + module.eps).rsqrt().view(shape)
    if module.affine:
        out = out * module.weight.view(shape) + module.bias.view(shape)
    return out.to(x.dtype)


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """Batch normalisation that shares its statistics over all workers, on any device and backend.

    ``torch.nn.SyncBatchNorm`` does that on accelerators only. Statistics and gradients equal those of one worker with
    the whole batch. ``stats_mode`` ("" or "N") is accepted for compatibility: both are the exact statistics here.
    """

    def __init__(self, *args: Any, stats_mode: str = "", **kwargs: Any):
        super().__init__(*args, **kwargs)
        assert stats_mode in ("", "N"), f"stats_mode must be '' or 'N', got {stats_mode!r}"
        self._stats_mode = stats_mode

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training and _world_size() > 1:
            return _shared_batch_norm(self, input)
        return super().forward(input)


class SyncBatchNorm(nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm`` that also works for workers on CPUs."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Also for a group of one worker, on whose CPU torch's own refuses to work.
        if self.training and input.device.type == "cpu" and dist.is_available() and dist.is_initialized():
            return _shared_batch_norm(self, input)
        return super().forward(input)


class LayerNorm(nn.Module):
    """Layer normalisation over the channels of (N, C, H, W), at every pixel on its own."""

    def __init__(self, normalized_shape: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(normalized_shape))
        self.bias = nn.Parameter(torch.zeros(normalized_shape))
        self.eps = eps
        self.normalized_shape = (normalized_shape,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return out.permute(0, 3, 1, 2)


_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "SyncBN": SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": lambda channels: nn.GroupNorm(32, channels),
    "nnSyncBN": nn.SyncBatchNorm,
    "naiveSyncBN": NaiveSyncBatchNorm,
    "naiveSyncBN_N": lambda channels: NaiveSyncBatchNorm(channels, stats_mode="N"),
    "LN": LayerNorm,
}


def get_norm(norm: str | Callable[[int], nn.Module] | None, out_channels: int) -> nn.Module | None:
    """The normalisation layer of a config key such as ``MODEL.RESNETS.NORM``.

    Args:
        norm: BN, SyncBN, FrozenBN, GN (32 groups), LN (channels first), nnSyncBN, naiveSyncBN, naiveSyncBN_N; or a
            callable that takes the number of channels; or "" or None for none.

    Raises:
        KeyError: unknown name.
    """
    if norm is None or norm == "":
        return None
    if isinstance(norm, str):
        if norm not in _NORMS:
            near = difflib.get_close_matches(norm, _NORMS, n=1, cutoff=0.5)
            hint = f", did you mean '{near[0]}'?" if near else "."
            raise KeyError(f"unknown normalisation '{norm}'{hint} Known are {', '.join(_NORMS)}")
        norm = _NORMS[norm]
    return norm(out_channels)
