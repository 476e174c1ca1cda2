"""Seeds and library versions."""

from __future__ import annotations

import logging
import os
import random
import re

import numpy as np
import torch

__all__ = ["TORCH_VERSION", "seed_all_rng"]

TORCH_VERSION: tuple[int, ...] = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
"""Major and minor version of torch."""


def seed_all_rng(seed: int | None = None) -> None:
    """Seed the generators of Python, numpy and torch (all devices).

    Args:
        seed: None takes one from the operating system and logs it.
    """
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
        logging.getLogger(__name__).info("Using a generated random seed %d", seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ["PYTHONHASHSEED"] = str(seed % 2**32)  # for processes that this one starts
