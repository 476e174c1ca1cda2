"""Registry of whole models."""

from __future__ import annotations

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.modeling._lookup import lookup, registered_names
from detectron2.utils.missing import needs_upstream
from detectron2.utils.registry import Registry

META_ARCH_REGISTRY = Registry("META_ARCH")
META_ARCH_REGISTRY.__doc__ = "Models ``(cfg) -> nn.Module``, chosen by ``MODEL.META_ARCHITECTURE``."

UPSTREAM_META_ARCHITECTURES = ("GeneralizedRCNN", "ProposalNetwork", "PanopticFPN", "RetinaNet", "FCOS")


def build_model(cfg: CfgNode) -> nn.Module:
    """Build ``cfg.MODEL.META_ARCHITECTURE`` on ``cfg.MODEL.DEVICE``, without loading ``cfg.MODEL.WEIGHTS``.

    Raises:
        KeyError: nobody registered the model.
        NotImplementedError: a model that only upstream Detectron2 has; with the default value, the key is hardly set.
        RuntimeError: CUDA is asked for and not available.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    if name in UPSTREAM_META_ARCHITECTURES and name not in META_ARCH_REGISTRY:
        default = (
            ", which is the default: the config probably does not set the key" if name == "GeneralizedRCNN" else ""
        )
        registered = ", ".join(registered_names(META_ARCH_REGISTRY))
        needs_upstream(f"MODEL.META_ARCHITECTURE is '{name}'{default} (registered are: {registered}). {name}")
    model_class = lookup(META_ARCH_REGISTRY, name, "MODEL.META_ARCHITECTURE")
    device = torch.device(cfg.MODEL.DEVICE)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"MODEL.DEVICE is '{cfg.MODEL.DEVICE}', but PyTorch finds no CUDA device; set MODEL.DEVICE to cpu, "
            "on the command line by appending: MODEL.DEVICE cpu"
        )
    return model_class(cfg).to(device)
