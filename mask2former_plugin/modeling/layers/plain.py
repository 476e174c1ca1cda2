"""Whether a module is what its class says: fast ways use its weights alone, and what is more than these must be called."""

from __future__ import annotations

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody waits for the module to be called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_hooked_parts(module: nn.Module) -> bool:
    """Whether somebody waits for a part of the module to be called."""
    return any(has_hooks(part) for part in module.modules() if part is not module)


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of one of these classes, not of a class made from them, and nobody waits for it to be called.

    What somebody has put in the place of a layer, or hung on it, may do more and may keep what it gives.
    """
    return type(module) in kinds and not has_hooks(module)
